"""``set_attn_implementation("kexue_entropy")`` on models of transformers, tiny and random."""

import subprocess
import sys

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    RobertaConfig,
    RobertaModel,
    StaticCache,
)

from kexue.attention import _hf_entropy, entropy_invariant_attention, register_attention

register_attention()
SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.5,
}  # fmt: skip
pytestmark = pytest.mark.slow  # each builds a model


def prepared(model, **options):
    model.set_attn_implementation("kexue_entropy")
    for name, value in {"min_length": 2, "base": 8, **options}.items():
        setattr(model.config, f"entropy_{name}", value)
    return model.double().eval()


def llama(**options):
    torch.manual_seed(0)
    config = LlamaConfig(num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, **SIZES)
    return prepared(LlamaForCausalLM(config), **options)


def bert(**options):
    torch.manual_seed(0)
    return prepared(BertForMaskedLM(BertConfig(max_position_embeddings=64, **SIZES)), **options)


def roberta(**options):
    torch.manual_seed(0)
    return prepared(RobertaModel(RobertaConfig(max_position_embeddings=64, **SIZES)), **options)


def tokens(*shape, seed=1):
    return torch.randint(5, 50, shape, generator=torch.Generator().manual_seed(seed))


def output(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, **inputs)[0]


def padded(ids, count, side):
    pad = torch.zeros(len(ids), count, dtype=torch.long)
    ones = torch.ones_like(ids)
    parts = ((pad, ids), (pad, ones)) if side == "left" else ((ids, pad), (ones, pad))
    return tuple(torch.cat(p, 1) for p in parts)


class Layer(torch.nn.Module):
    """What the attention function looks at."""

    def __init__(self, causal, **options):
        super().__init__()
        self.is_causal = causal
        self.config = type("Config", (), {f"entropy_{k}": v for k, v in options.items()})()


def qkv(rows=9, keys=None):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, h, n, 8, generator=g) for h, n in ((4, rows), (2, keys or rows), (2, keys or rows))]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "padding"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"base": 8, "min_length": 2},
        {"mode": "inference", "base": 3},
        {"scale_mode": "kappa", "kappa": 3.0},
        {"per_row": False, "min_length": 2},
    ],
)
def test_the_function_is_that_of_the_package(causal, mask, options):
    q, k, v = qkv()
    keep = None
    if mask:
        keep = torch.ones(2, 9, dtype=torch.bool)
        keep[0, :2] = False
    want = entropy_invariant_attention(q, k, v, causal=causal, key_padding_mask=keep, scale=0.4, **options)
    four = None
    if keep is not None:
        four = keep[:, None, None, :].expand(2, 1, 9, 9)
        four = four & torch.ones(9, 9, dtype=torch.bool).tril() if causal else four
    got, weights = _hf_entropy.attention_forward(Layer(causal, **options), q, k, v, four, scaling=0.4)
    torch.testing.assert_close(got.transpose(1, 2), want)
    assert got.is_contiguous()
    assert weights is None


def test_the_call_overrides_the_module_and_the_scale_has_its_default():
    q, k, v = qkv()
    got = _hf_entropy.attention_forward(Layer(True), q, k, v, None, is_causal=False)[0].transpose(1, 2)
    torch.testing.assert_close(got, entropy_invariant_attention(q, k, v))
    got = _hf_entropy.attention_forward(Layer(False), q, k, v, None, is_causal=True)[0].transpose(1, 2)
    torch.testing.assert_close(got, entropy_invariant_attention(q, k, v, causal=True))


@pytest.mark.parametrize("build", [bert, roberta, llama])
def test_the_models_change_and_the_factor_one_changes_nothing(build):
    model, ids = build(), tokens(2, 20)
    changed = output(model, ids)
    model.config.entropy_mode, model.config.entropy_base = "inference", 20
    unchanged = output(model, ids)
    model.set_attn_implementation("sdpa")
    ordinary = output(model, ids)
    torch.testing.assert_close(unchanged, ordinary)
    assert (changed - ordinary).abs().max() > 1e-3


@pytest.mark.parametrize("build", [bert, roberta, llama])
def test_right_padding_has_no_influence(build):
    model, ids = build(), tokens(2, 11)
    if build is roberta:
        ids = ids.clamp(min=5)  # its positions skip token 1
    long, mask = padded(ids, 7, "right")
    torch.testing.assert_close(output(model, long, attention_mask=mask)[:, :11], output(model, ids))


def test_left_padding_has_no_influence():
    model, ids = llama(), tokens(2, 11)
    long, mask = padded(ids, 7, "left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = output(model, long, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(got[:, 7:], output(model, ids))
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("build", [bert, llama])
def test_a_sample_gives_the_same_alone_and_in_a_batch(build):
    model, short, long = build(), tokens(1, 6), tokens(1, 13, seed=2)
    first, mask = padded(short, 7, "right")
    both = output(model, torch.cat([first, long]), attention_mask=torch.cat([mask, torch.ones_like(long)]))
    torch.testing.assert_close(both[:1, :6], output(model, short))
    torch.testing.assert_close(both[1:], output(model, long))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("pads", [0, 4])
def test_the_cache_gives_the_logits_of_the_whole_pass(kind, pads):
    model, ids = llama(), tokens(2, 14)
    ids, mask = padded(ids, pads, "left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = output(model, ids, attention_mask=mask, position_ids=positions)
    cache = None if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=24)
    parts, start = [], 0
    for end in (6, 9, *range(10, 15 + pads)):  # a prompt, a chunk, then single steps
        with torch.no_grad():
            step = model(
                ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions[:, start:end],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
        cache, start = step.past_key_values, end
        parts.append(step.logits)
    torch.testing.assert_close(torch.cat(parts, 1)[:, pads:], whole[:, pads:])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("pads", [0, 4])
def test_generate_equals_a_greedy_loop_over_whole_passes(kind, pads):
    model, prompt = llama(), tokens(2, 6)
    ids = prompt
    for _ in range(8):
        ids = torch.cat([ids, output(model, ids)[:, -1:].argmax(-1)], 1)
    long, mask = padded(prompt, pads, "left")
    got = model.generate(
        long, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, cache_implementation=kind
    )
    assert torch.equal(got[:, pads:], ids)


def test_windows_count_the_keys_inside_them():
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(num_key_value_heads=2, sliding_window=5, **SIZES))
    prepared(model, base=5, mode="train")
    ids = tokens(1, 12)
    got = output(model, ids)
    model.config.entropy_min_length = 5  # all rows that have a full window are ordinary, and so are the first ones now
    clamped = output(model, ids)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(clamped, output(model, ids))
    assert (got - clamped).abs().max() > 1e-3


@pytest.mark.parametrize("build", [BertLMHeadModel, GPT2LMHeadModel])
def test_decoders_without_rotary_positions_are_causal(build):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 64}
    config = BertConfig(is_decoder=True, **SIZES) if build is BertLMHeadModel else GPT2Config(**sizes)
    model, ids = prepared(build(config)), tokens(1, 12)
    other = ids.clone()
    other[:, 8:] = 5
    torch.testing.assert_close(output(model, ids)[:, :8], output(model, other)[:, :8])


@pytest.mark.parametrize("build", [bert, llama])
@pytest.mark.parametrize("padded", [False, True])
def test_compiled_models_take_any_length(build, padded):
    torch.compiler.reset()
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    options = {} if build is bert else {"use_cache": False}
    for length in range(20, 34):  # more than torch.compile compiles anew
        ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.long)
        mask[1, -3:] = 0
        options["attention_mask"] = mask if padded else None
        with torch.no_grad():
            out, expected = (f(input_ids=ids, **options).logits for f in (compiled, model))
        torch.testing.assert_close(out, expected)


def test_training_uses_dropout_and_sends_gradients_everywhere():
    torch.manual_seed(0)
    config = LlamaConfig(num_key_value_heads=2, attention_dropout=0.5, **SIZES)
    model, ids = prepared(LlamaForCausalLM(config)), tokens(2, 10)
    assert torch.equal(output(model, ids), output(model, ids))
    model.train()
    assert not torch.equal(output(model, ids), output(model, ids))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_options_are_saved_with_the_model(tmp_path):
    model, ids = llama(base=11), tokens(1, 9)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="kexue_entropy", dtype=torch.float64)
    again.eval()
    assert again.config.entropy_base == 11
    torch.testing.assert_close(output(again, ids), output(model, ids))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"softcap": 30.0}, "does not support softcap"),
        ({"position_bias": torch.zeros(1, 4, 9, 9)}, "does not support position_bias"),
        ({"s_aux": torch.zeros(4)}, "does not support s_aux"),
        ({"output_attentions": True}, "no attention weights"),
        ({"attention_mask": torch.zeros(2, 1, 9, 9)}, "needs a bool mask .* got torch.float32"),
        ({"attention_mask": torch.ones(2, 9).bool()}, r"of shape \(2, 9\)"),
    ],
)
def test_what_cannot_be_honoured_is_refused(extra, message):
    q, k, v = qkv()
    arguments = {"attention_mask": None, **extra}
    with pytest.raises(ValueError, match=message):
        _hf_entropy.attention_forward(Layer(False), q, k, v, **arguments)
    with pytest.raises(ValueError, match=r"configuration \(entropy_...\): base must be greater"):
        _hf_entropy.attention_forward(Layer(False, base=0.5), q, k, v, None)


def test_importing_the_room_does_not_import_transformers():
    code = "import sys, kexue.attention, kexue.attention._hf_entropy; print('transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
