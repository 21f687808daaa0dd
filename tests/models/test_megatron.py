import copy
import math

import pytest
import torch

from kexue.models import KexueForCausalLM, from_gpt2, from_megatron_gpt2
from kexue.models.megatron import merge_shards
from reference import cpm_gpt2 as reference

HEADS = 2


def whole(**sizes):
    return reference.gpt2(**{"vocabulary": 20, "width": 16, "layers": 2, "positions": 12, **sizes})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_shards_merge_back_bit_for_bit(count, dtype):
    weights = whole(dtype=dtype)
    merged = merge_shards(reference.shard(weights, count))
    assert set(merged) == set(weights)
    for name, value in weights.items():
        assert merged[name].dtype == dtype
        assert torch.equal(merged[name], value), name


@pytest.mark.parametrize("sizes", [{}, {"layers": 11, "width": 8}, {"vocabulary": 12, "inner": 20, "positions": 3}])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_model_is_the_same_however_it_was_cut(count, sizes):
    weights = whole(**sizes)
    model = from_megatron_gpt2(reference.shard(weights, count), num_heads=HEADS)
    one = from_megatron_gpt2([weights], num_heads=HEADS)
    assert type(model) is KexueForCausalLM
    assert not model.training
    for (name, a), (_, b) in zip(model.state_dict().items(), one.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    config = model.config
    assert (config.num_heads, config.attn_mode, config.act) == (HEADS, "causal", "gelu_tanh")
    assert config.vocab_size == len(weights["word_embeddings.weight"])
    assert model.lm_head.decoder.weight is model.kexue.embeddings.token.weight


def test_logits_are_those_of_the_formula_and_of_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel

    weights = whole(dtype=torch.float64)
    ids = torch.tensor([[3, 1, 19, 0, 7, 7, 2]])
    model = from_megatron_gpt2(reference.shard(weights, 2), num_heads=HEADS)
    expected = reference.logits(weights, ids[0].tolist(), HEADS)
    torch.testing.assert_close(model(ids).logits[0], expected, rtol=0, atol=1e-12)
    sizes = {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": HEADS, "n_positions": 12}
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).double().eval()
    gpt2.load_state_dict(reference.to_transformers(weights))
    torch.testing.assert_close(gpt2(ids).logits[0], expected, rtol=0, atol=1e-12)
    other = from_gpt2(gpt2.state_dict(), gpt2.config)
    for (name, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_joining_the_fused_matrix_as_a_whole_would_be_another_model():
    weights = whole(dtype=torch.float64)
    parts = reference.shard(weights, 2)
    ids = torch.tensor([[3, 1, 19, 0, 7]])
    right = from_megatron_gpt2(parts, num_heads=HEADS)(ids).logits
    plain = copy.deepcopy(weights)
    for name in weights:
        if "query_key_value" in name:
            plain[name] = torch.cat([part[name] for part in parts])
    wrong = from_megatron_gpt2([plain], num_heads=HEADS)(ids).logits
    assert (right - wrong).abs().max() > 1e-3
    heads = from_megatron_gpt2(parts, num_heads=4)(ids).logits
    assert (right - heads).abs().max() > 1e-3  # nothing else tells the number of heads


def test_dtypes_are_kept_or_converted():
    half = whole(dtype=torch.float16)
    assert {p.dtype for p in from_megatron_gpt2(reference.shard(half, 2), HEADS).parameters()} == {torch.float16}
    single = from_megatron_gpt2(reference.shard(half, 2), HEADS, dtype=torch.float32)
    assert {p.dtype for p in single.parameters()} == {torch.float32}
    assert torch.equal(single.kexue.embeddings.token.weight, half["word_embeddings.weight"].float())
    mixed = {n: v.float() if "layernorm" in n else v for n, v in half.items()}
    model = from_megatron_gpt2(reference.shard(mixed, 2), HEADS)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.isfinite(model(torch.tensor([[1, 2]])).logits).all()
    with pytest.raises(TypeError, match="dtype must be a floating torch.dtype"):
        from_megatron_gpt2([half], HEADS, dtype=torch.int8)


@pytest.mark.parametrize("count", [1, 2])
def test_the_model_has_memory_of_its_own(count):
    shards = reference.shard(whole(), count)
    before = copy.deepcopy(shards)
    model = from_megatron_gpt2(shards, HEADS)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
    for shard, kept in zip(shards, before, strict=True):
        assert all(torch.equal(shard[name], kept[name]) for name in kept)


def test_gradients_flow_and_the_model_saves(tmp_path):
    model = from_megatron_gpt2(reference.shard(whole(), 2), HEADS)
    ids = torch.tensor([[3, 1, 19, 0, 7]])
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    model.save_pretrained(tmp_path)
    again = KexueForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_whole_checkpoints_are_unwrapped():
    parts = reference.shard(whole(), 2)
    expected = from_megatron_gpt2(parts, HEADS).state_dict()
    for key in ("module", "model"):
        wrapped = [{key: part, "iteration": 80000, "optimizer": None} for part in parts]
        found = from_megatron_gpt2(wrapped, HEADS).state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


QKV = "transformer.layers.1.attention.query_key_value.weight"


def changed(name, value, rank=0, count=2):
    parts = reference.shard(whole(), count)
    if value is None:
        del parts[rank][name]
    else:
        parts[rank][name] = value
    return parts


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        (
            lambda: reference.shard(whole(), 2)[:1],
            "1 shards .* = 48 rows .* got 24; so many .* one of 2 shards",
        ),
        (
            lambda: reference.shard(whole(), 2) * 2,
            "4 shards .* = 12 rows .* got 24; so many .* one of 2 shards",
        ),
        (lambda: reference.shard(whole(width=20), 2), None),
        (list, "at least one dict; got an empty list"),
        (lambda: [{}], "expected the names of Megatron's GPT-2, got an empty dict"),
        (lambda: [{"wte.weight": torch.ones(2, 2)}], "no tensor transformer.layers.0.*got wte.weight"),
        (lambda: changed(QKV, None), "shard 0 lacks transformer.layers.1.attention.query_key_value.weight"),
        (lambda: changed(QKV, None, 1), "shard 1 lacks transformer.layers.1.attention.query_key_value.weight"),
        (lambda: changed("lm_head.weight", torch.ones(2), 1), "shard 1 has lm_head.weight, which"),
        (lambda: changed(QKV, torch.ones(24, 15)), r"\(24, 15\) in shard 0 and \(24, 16\) in shard 1"),
        (lambda: changed(QKV, torch.ones(48, 16), 0, 1), None),
        (
            lambda: changed(QKV, torch.ones(24, 16).half(), 1),
            "torch.float32 in shard 0 and torch.float16 in shard 1",
        ),
        (lambda: changed(QKV, torch.ones(48, 16).long(), 0, 1), "must hold floating numbers; got torch.int64"),
        (lambda: changed("word_embeddings.weight", torch.ones(20, 12), 0, 1), "width 12 and .* has 16"),
        (lambda: changed("word_embeddings.weight", torch.ones(9, 16), 1), r"\(10, 16\) in shard 0 and \(9, 16\)"),
        (
            lambda: changed("position_embeddings.weight", torch.ones(0, 16), 0, 1),
            r"columns; got shape \(0, 16",
        ),
        (lambda: changed("transformer.layers.0.mlp.dense_h_to_4h.weight", torch.ones(()), 0, 1), "must have rows"),
        (
            lambda: changed("transformer.layers.0.mlp.dense_4h_to_h.weight", torch.ones(16, 63), 0, 1),
            r"must have shape \(16, 64\) in each of 1 shards; got \(16, 63\)",
        ),
        (
            lambda: changed("transformer.layers.1000000000.input_layernorm.bias", torch.ones(16), 0, 1),
            "a layer 1000000000 but only",
        ),
        (lambda: changed("transformer.layers.0.attention.dense.bias", torch.ones(8), 0, 1), r"\(16,\).*got \(8,\)"),
    ],
)
def test_shards_that_do_not_fit_are_refused(shards, message):
    given = shards()
    if message is None:  # the control of its neighbours
        from_megatron_gpt2(given, HEADS)
        return
    with pytest.raises(ValueError, match=message):
        from_megatron_gpt2(given, HEADS)


def test_the_width_is_a_multiple_of_shards_times_heads():
    for count, heads, width in ((2, 3, 16), (2, 4, 20), (4, 8, 16), (1, 5, 16)):
        assert math.gcd(width, count * heads) != count * heads
        message = f"{count} \\* {heads} = {count * heads}; got {width}"
        with pytest.raises(ValueError, match=message):
            from_megatron_gpt2(reference.shard(whole(width=width), count), num_heads=heads)


def test_wrong_kinds_are_refused():
    parts = reference.shard(whole(), 2)
    for bad in (parts[0], "shards", 5, iter(parts)):
        with pytest.raises(TypeError, match="shards must be a list of dicts"):
            from_megatron_gpt2(bad, HEADS)
    with pytest.raises(TypeError, match="a shard must be a dict of tensors; got list"):
        from_megatron_gpt2([[1]], HEADS)
    with pytest.raises(TypeError, match="must be a tensor; got list"):
        from_megatron_gpt2(changed(QKV, [1.0]), HEADS)
    for bad in (2.0, "2", None, True):
        with pytest.raises(TypeError, match="num_heads must be an integer"):
            from_megatron_gpt2(parts, num_heads=bad)
    with pytest.raises(ValueError, match="num_heads must be at least 1; got 0"):
        from_megatron_gpt2(parts, num_heads=0)
