from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from kexue.attention import register_attention
from kexue.models import KexueConfig, KexueForMaskedLM, KexueModel
from reference.kexue_stack import stack

MODES = ("bidirectional", "causal")
FORMS = [  # norm, act, post_norm, bias
    ("layer", "gelu", False, True),
    ("rms", "swiglu", False, False),
    ("layer", "gelu_tanh", True, True),
    ("rms", "relu", True, True),
    ("layer", "silu", False, True),
]


def make(mode="bidirectional", position="learned", form=FORMS[0], seed=0, dtype=torch.float64, **options):
    norm, act, post, bias = form
    torch.manual_seed(seed)
    sizes = {"vocab_size": 23, "hidden_size": 12, "num_layers": 2, "num_heads": 3, "max_position": 16}
    config = KexueConfig(
        **(sizes | options), attn_mode=mode, position=position, norm=norm, act=act, post_norm=post, bias=bias,
        type_vocab_size=2,
    )  # fmt: skip
    model = KexueModel(config).eval().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.to(dtype)


def texts(lengths=(5, 9, 1, 3), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(23, (n,), generator=g) for n in lengths]


def padded(rows, left=False):
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[i, at], mask[i, at] = row, True
    return ids, mask


@pytest.mark.parametrize(("mode", "position", "form"), list(itertools.product(MODES, ("learned", "rope"), FORMS)))
def test_values_and_every_gradient_are_those_of_the_reference(mode, position, form):
    model = make(mode, position, form)
    ids = texts((6,))[0]
    segments = torch.tensor([0, 0, 1, 1, 1, 0])
    p = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    theirs = stack(model.config, p, ids, segments)
    ours = model(ids[None], token_type_ids=segments[None]).last_hidden_state[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    upstream = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (ours * upstream).sum().backward()
    (theirs * upstream).sum().backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, p[name].grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(("mode", "position"), list(itertools.product(MODES, ("learned", "rope"))))
def test_padding_and_packing_change_nothing(mode, position):
    model, rows = make(mode, position), texts()
    alone = [model(row[None]).last_hidden_state[0] for row in rows]
    ids, mask = padded(rows)
    for kind in (mask, mask.long(), mask.float()):
        together = model(ids, kind).last_hidden_state
        torch.testing.assert_close(together[mask], torch.cat(alone), rtol=1e-11, atol=1e-11)
    bounds = torch.tensor([0, *itertools.accumulate(map(len, rows))])
    packed = model(torch.cat(rows), cu_seqlens=bounds).last_hidden_state
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-11, atol=1e-11)
    # What stands at padded places is not looked at.
    other = ids.masked_fill(~mask, 7)
    torch.testing.assert_close(model(other, mask).last_hidden_state[mask], torch.cat(alone), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_padding_on_the_left_of_causal_models(position):
    model, rows = make("causal", position), texts()
    ids, mask = padded(rows, left=True)
    alone = torch.cat([model(row[None]).last_hidden_state[0] for row in rows])
    out = model(ids, mask).last_hidden_state
    torch.testing.assert_close(out[mask], alone, rtol=1e-11, atol=1e-11)
    assert out.isfinite().all()


def test_gradients_of_packed_and_padded_input_agree():
    model, rows = make(), texts()
    ids, mask = padded(rows)
    bounds = torch.tensor([0, *itertools.accumulate(map(len, rows))])
    weights = torch.randn(int(mask.sum()), 12, dtype=torch.float64)
    grads = []
    for out in (model(ids, mask).last_hidden_state[mask], model(torch.cat(rows), cu_seqlens=bounds).last_hidden_state):
        grads.append(torch.autograd.grad((out * weights).sum(), list(model.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_the_past_does_not_see_the_future_bit_for_bit(position):
    model = make("causal", position, dtype=torch.float32)
    ids = texts((9,))[0][None]
    out = model(ids).last_hidden_state
    for t in range(1, 9):
        changed = ids.clone()
        changed[0, t:] = (changed[0, t:] + 5) % 23
        assert torch.equal(model(changed).last_hidden_state[:, :t], out[:, :t])


@pytest.mark.parametrize(("position", "left"), [("learned", False), ("rope", True), ("learned", True)])
def test_a_cache_gives_what_the_whole_text_gives(position, left):
    model = make("causal", position)
    ids, mask = padded(texts((6, 4)), left=left)
    if not left:
        ids, mask = ids[:1], mask[:1]
    whole = model(ids, mask).last_hidden_state
    cache, parts, done = None, [], 0
    for step in (3, 1, 2):
        out = model(ids[:, done : done + step], mask[:, : done + step], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.last_hidden_state)
        done += step
    torch.testing.assert_close(torch.cat(parts, 1)[mask], whole[mask], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_attention_weights_and_hidden_states(mode):
    model = make(mode)
    ids, mask = padded(texts())
    plain = model(ids, mask).last_hidden_state
    out = model(ids, mask, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(out.last_hidden_state, plain, rtol=1e-11, atol=1e-11)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    for weights in out.attentions:
        assert weights.shape == (4, 3, 9, 9)
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, 3, 9, dtype=torch.float64))
        assert (weights.transpose(1, 3)[~mask] == 0).all()  # padded keys
    assert model(ids, mask, return_dict=False)[0].shape == (4, 9, 12)


def test_a_row_that_is_all_padding_is_finite_and_takes_nothing_from_others():
    model = make(dtype=torch.float32)
    ids, mask = padded(texts())
    mask[2] = False
    out = model(ids, mask).last_hidden_state
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    weights = model(ids, mask, output_attentions=True).attentions[0]
    assert (weights[2] == 0).all()


def test_embeddings_in_place_of_ids():
    model, ids = make(), texts((5, 5))
    ids = torch.stack(ids)
    embedded = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embedded).last_hidden_state, model(ids).last_hidden_state)


@pytest.mark.parametrize("shape", [(0, 4), (2, 1), (1, 1), (3, 0)])
def test_small_and_empty_batches(shape):
    model = make()
    assert model(torch.zeros(shape, dtype=torch.long)).last_hidden_state.shape == (*shape, 12)


def test_packed_texts_may_be_empty():
    model = make()
    ids = texts((5,))[0]
    out = model(ids, cu_seqlens=torch.tensor([0, 0, 2, 2, 5, 5])).last_hidden_state
    torch.testing.assert_close(out[:2], model(ids[None, :2]).last_hidden_state[0])
    none = model(ids[:0], cu_seqlens=torch.tensor([0])).last_hidden_state
    assert none.shape == (0, 12)


def test_padding_id_of_the_configuration_stands_for_a_mask():
    model = make(pad_token_id=0)
    rows = [row.clamp(min=1) for row in texts()]
    ids, mask = padded(rows)
    assert torch.equal(model(ids).last_hidden_state[mask], model(ids, mask).last_hidden_state[mask])


@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing_changes_no_gradient(mode):
    model, ids = make(mode, dropout=0.0), torch.stack(texts((5, 5)))
    model.train()
    plain = torch.autograd.grad(model(ids).last_hidden_state.square().sum(), list(model.parameters()))
    model.gradient_checkpointing_enable()
    again = torch.autograd.grad(model(ids).last_hidden_state.square().sum(), list(model.parameters()))
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_checkpointing_fills_a_cache_once():
    model, ids = make("causal"), texts((5,))[0][None]
    model(ids, use_cache=True).last_hidden_state.sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    out = model.train()(ids, use_cache=True)
    out.last_hidden_state.sum().backward()
    assert out.past_key_values.get_seq_length() == 5
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, plain[name])


def test_dropout_is_off_in_evaluation_and_seeded_in_training():
    model, ids = make(dropout=0.5, attention_dropout=0.5), torch.stack(texts((5, 5)))
    assert torch.equal(model(ids).last_hidden_state, model(ids).last_hidden_state)
    model.train()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(ids).last_hidden_state)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_starting_weights():
    torch.manual_seed(0)
    model = KexueForMaskedLM(KexueConfig(4000, 256, 8, 4))
    std = {name: p.std().item() for name, p in model.named_parameters() if p.dim() == 2}
    assert std["kexue.embeddings.token.weight"] == pytest.approx(0.02, rel=0.02)  # shared with the decoder
    assert std["kexue.layers.0.attention.qkv.weight"] == pytest.approx(256**-0.5, rel=0.02)
    assert std["kexue.layers.3.feed_forward.down.weight"] == pytest.approx(1024**-0.5 / 4, rel=0.02)
    assert std["lm_head.dense.weight"] == pytest.approx(256**-0.5, rel=0.03)
    ids = torch.randint(4000, (4, 32))
    loss = model(ids, labels=ids).loss.item()
    assert abs(loss - torch.tensor(4000.0).log().item()) < 0.2
    given = KexueModel(KexueConfig(400, 128, 2, 4, initializer_range=0.5))
    assert given.embeddings.token.weight.std().item() == pytest.approx(0.5, rel=0.05)


def test_saving_and_loading(tmp_path):
    model, ids = make(position="rope", form=FORMS[1], dtype=torch.float32), torch.stack(texts((5, 5)))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    again = KexueModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).last_hidden_state, model(ids).last_hidden_state)
    kept = (c.to_dict() for c in (again.config, model.config))
    ours, theirs = ({k: v for k, v in c.items() if k not in ("_name_or_path", "dtype")} for c in kept)
    assert ours == theirs


def test_a_layer_compiles_into_one_graph():
    model = make("causal", "rope")
    ids = torch.stack(texts((5, 5)))
    plain = model(ids).last_hidden_state
    for layer in model.layers:
        layer.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(model(ids).last_hidden_state, plain)


def test_attention_of_the_registry_works_in_the_stack():
    register_attention()
    model = make(dtype=torch.float32)
    ids, mask = padded(texts())
    plain = model(ids, mask).last_hidden_state
    model.set_attn_implementation("kexue_linear")
    linear = model(ids, mask).last_hidden_state
    assert not torch.allclose(linear[mask], plain[mask], atol=1e-3)
    alone = torch.cat([model(row[None]).last_hidden_state[0] for row in texts()])
    torch.testing.assert_close(linear[mask], alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="packed input.*'kexue_linear'"):  # it would be softmax attention
        model(ids[mask], cu_seqlens=torch.tensor([0, *(len(row) for row in texts())]).cumsum(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, ids = make(dtype=dtype), torch.stack(texts((5, 5)))
    exact = make()(ids).last_hidden_state
    out = model(ids).last_hidden_state
    assert out.dtype == dtype
    assert (out.double() - exact).norm() < 20 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden_size": 10}, ValueError, "num_heads = 3; got 10"),
        ({"hidden_size": 9, "position": "rope"}, ValueError, "even"),
        ({"vocab_size": 0}, ValueError, "vocab_size.*0"),
        ({"vocab_size": 2.5}, TypeError, "vocab_size.*2.5"),
        ({"num_layers": 0}, ValueError, "num_layers"),
        ({"mask_token_id": 23}, ValueError, "below 23; got 23"),
        ({"mask_token_id": -1}, ValueError, "-1"),
        ({"pad_token_id": 99}, ValueError, "99"),
        ({"attn_mode": "both"}, ValueError, "'both'"),
        ({"attn_mode": "diagonal"}, ValueError, "mask_token_id"),
        ({"position": "sinusoid"}, ValueError, "'sinusoid'"),
        ({"norm": "batch"}, ValueError, "'batch'"),
        ({"act": "tanh"}, ValueError, "'tanh'"),
        ({"dropout": 1.0}, ValueError, "below 1"),
        ({"attention_dropout": -0.1}, ValueError, "attention_dropout"),
        ({"dropout": "much"}, TypeError, "'much'"),
        ({"norm_eps": 0.0}, ValueError, "norm_eps"),
        ({"rope_base": 0.5}, ValueError, "rope_base"),
        ({"initializer_range": float("nan")}, ValueError, "finite"),
        ({"objectives": {}}, ValueError, "non-empty"),
        ({"objectives": {"mlm": -1.0}}, ValueError, "mlm"),
        ({"objectives": {"electra": 1.0}}, ValueError, "electra"),
        ({"objectives": {"clm": 1.0}}, ValueError, "'clm'"),
    ],
)
def test_bad_configurations(options, error, message):
    sizes = {"vocab_size": 23, "hidden_size": 12, "num_layers": 2, "num_heads": 3}
    with pytest.raises(error, match=message):
        KexueConfig(**(sizes | options))


IDS = torch.zeros(2, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "neither"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 5, 12)}, ValueError, "both"),
        ({"input_ids": IDS.double()}, TypeError, "integers"),
        ({"input_ids": IDS.tolist()}, TypeError, "integers"),
        ({"input_ids": IDS[0]}, ValueError, "cu_seqlens"),
        ({"input_ids": IDS + 23}, ValueError, r"\[0, 23\); got 23"),
        ({"input_ids": IDS - 1}, ValueError, "-1"),
        ({"input_ids": IDS.new_zeros(1, 17)}, ValueError, "max_position = 16.*17"),
        ({"input_ids": IDS, "position_ids": IDS + 16}, ValueError, "position_ids.*16"),
        ({"input_ids": IDS, "position_ids": IDS[:, :3]}, ValueError, "position_ids"),
        ({"input_ids": IDS[:1], "position_ids": IDS}, ValueError, r"position_ids.*\(1, 5\).*\(2, 5\)"),
        ({"input_ids": IDS, "position_ids": IDS.float()}, TypeError, "position_ids.*float32"),
        ({"input_ids": IDS, "position_ids": [0, 1, 2, 3, 4]}, TypeError, "position_ids.*list"),
        ({"input_ids": IDS, "token_type_ids": IDS.float()}, TypeError, "token_type_ids.*float32"),
        ({"input_ids": IDS, "attention_mask": IDS[:, :4]}, ValueError, r"\(2, 5\).*\(2, 4\)"),
        ({"input_ids": IDS, "attention_mask": [[1]]}, TypeError, "attention_mask"),
        ({"input_ids": IDS, "token_type_ids": IDS + 2}, ValueError, "token_type_ids"),
        ({"input_ids": IDS, "token_type_ids": IDS[:1]}, ValueError, "token_type_ids"),
        ({"inputs_embeds": torch.zeros(2, 5, 11)}, ValueError, "12"),
        ({"input_ids": IDS, "use_cache": True}, ValueError, "causal"),
        ({"input_ids": IDS[0], "cu_seqlens": torch.tensor([0, 4])}, ValueError, "5"),
        ({"input_ids": IDS[0], "cu_seqlens": torch.tensor([0, 4, 3, 5])}, ValueError, "rise"),
        ({"input_ids": IDS[0], "cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "integers"),
        ({"input_ids": IDS, "cu_seqlens": torch.tensor([0, 5])}, ValueError, "shape"),
        ({"input_ids": IDS[0], "cu_seqlens": torch.tensor([0, 5]), "attention_mask": IDS[0]}, ValueError, "packed"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        make()(**arguments)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_positions_of_other_batches_are_refused(position):
    with pytest.raises(ValueError, match=r"position_ids must have shape \(1, 5\)"):
        make(position=position)(IDS[:1], position_ids=IDS)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_integers_of_every_width_are_ids(dtype):
    model, ids = make(), torch.stack(texts((5, 5)))
    segments, positions = ids % 2, torch.arange(5).expand(2, 5) + 1
    plain = model(ids, token_type_ids=segments, position_ids=positions).last_hidden_state
    narrow = model(ids.to(dtype), token_type_ids=segments.to(dtype), position_ids=positions.to(dtype))
    assert torch.equal(narrow.last_hidden_state, plain)


def test_sizes_of_numpy_are_saved(tmp_path):
    config = KexueConfig(np.int64(23), np.int64(12), 1, 3, mask_token_id=np.int64(4), pad_token_id=np.int32(0))
    config.save_pretrained(tmp_path)
    again = KexueConfig.from_pretrained(tmp_path)
    assert (again.mask_token_id, again.pad_token_id, again.vocab_size) == (4, 0, 23)


def test_long_texts_need_no_table_with_rotary_positions():
    assert make(position="rope")(IDS.new_zeros(1, 40)).last_hidden_state.shape == (1, 40, 12)


def test_segments_of_a_model_without_any():
    torch.manual_seed(0)
    model = KexueModel(KexueConfig(23, 12, 1, 3))
    model(IDS, token_type_ids=IDS)
    with pytest.raises(ValueError, match="type_vocab_size=0"):
        model(IDS, token_type_ids=IDS + 1)
