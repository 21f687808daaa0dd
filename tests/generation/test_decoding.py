"""The decoding engine: logits of batches, greedy tokens, sampling, the cache."""

import numpy as np
import pytest
import torch

from kexue.generation import CausalLM, generate_fast, stream
from kexue.generation import decoding as engine
from kexue.generation.cache import KVCache
from kexue.generation.decoding import Decoder, common_prefix
from kexue.models import KexueConfig, KexueForCausalLM
from reference.decoding import filtered, greedy, next_logits

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_position": 64}
MODELS = {
    "gpt2": {"act": "gelu_tanh"},
    "gelu": {"act": "gelu"},
    "rope": {"position": "rope", "norm": "rms", "act": "swiglu", "bias": False},
    "relu": {"act": "relu", "intermediate_size": 21, "hidden_size": 24, "num_heads": 3},
    "silu": {"act": "silu", "type_vocab_size": 2, "embedding_norm": True, "head_bias": True, "num_heads": 1},
    "post": {"post_norm": True, "norm": "rms", "tie_word_embeddings": False, "vocab_size": 37},
    "post layer": {"post_norm": True, "position": "rope", "num_layers": 1},
}


def build(seed=0, scale=3.0, kind=KexueForCausalLM, **options):
    """A model whose every parameter, biases and norms too, is random, and whose distributions are not flat."""
    torch.manual_seed(seed)
    model = kind(KexueConfig(**{**SIZES, "attn_mode": "causal", **options})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        model.lm_head.decoder.weight.mul_(scale)
    return model


def prompts(lengths, seed=1, vocabulary=37):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_mixed_batch_are_those_of_the_model_on_each_row(name, kernel):
    model = build(**MODELS[name])
    rows = prompts([1, 5, 17, 2, 9, 30, 3])
    decoder = Decoder(model, kernel=kernel)
    assert isinstance(decoder._steps, engine._KernelSteps) == kernel
    logits = decoder.start(rows)
    for token in (3, 36, 11):
        for row, logit in zip(rows, logits, strict=True):
            torch.testing.assert_close(logit, next_logits(model, row), atol=2e-5, rtol=2e-5)
        rows = [[*row, (token + i) % 37] for i, row in enumerate(rows)]
        logits = decoder.advance(list(range(7)), [row[-1] for row in rows])


@pytest.mark.parametrize("kernel", [True, False])
def test_some_rows_advance_and_the_cache_grows_by_doubling(kernel):
    model = build(position="rope")
    rows = prompts([3, 20, 7])
    decoder = Decoder(model, kernel=kernel)
    decoder.start(rows)
    assert decoder.cache.room == 84
    for i in range(150):
        active = [0, 2] if i % 2 else [2]
        for row in active:
            rows[row].append((i + row) % 37)
        logits = decoder.advance(active, [rows[row][-1] for row in active])
    assert decoder.cache.room == 168
    for row, logit in zip([0, 2], logits, strict=True):
        torch.testing.assert_close(logit, next_logits(model, rows[row]), atol=5e-5, rtol=5e-5)


def test_prompts_longer_than_a_chunk_advance_in_parts(monkeypatch):
    model = build(max_position=200)
    rows = prompts([150, 3, 90])
    whole = Decoder(model).start(rows)
    monkeypatch.setattr(engine, "_CHUNK", 16)
    torch.testing.assert_close(Decoder(model).start(rows), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(Decoder(model, kernel=False).start(rows), whole, atol=1e-5, rtol=1e-5)


def test_what_all_prompts_begin_with_is_computed_once(monkeypatch):
    model, shared = build(), prompts([20])[0]
    rows = [[*shared, *rest] for rest in ([1], [2, 3, 4], [2, 5])]
    counted = []
    plain = engine._KernelSteps.__call__

    def count(self, tokens, *args):
        counted.append(len(tokens))
        return plain(self, tokens, *args)

    monkeypatch.setattr(engine._KernelSteps, "__call__", count)
    logits = Decoder(model).start(rows)
    assert counted == [20, 6]
    for row, logit in zip(rows, logits, strict=True):
        torch.testing.assert_close(logit, next_logits(model, row), atol=2e-5, rtol=2e-5)
    counted.clear()
    out = generate_fast(model, [shared, shared], max_new_tokens=3, num_return=2, seed=3)
    assert counted == [20, 4, 4]  # equal prompts are one
    assert len({tuple(row) for row in out}) > 1


def test_common_prefix_leaves_a_token_to_every_prompt():
    long = list(range(20))
    assert common_prefix([long, long[:12]]) == 11
    assert common_prefix([long, long]) == 19
    assert common_prefix([[*long[:9], 1], [*long[:9], 2]]) == 9
    assert common_prefix([long[:3], long]) == 0
    assert common_prefix([long]) == 0


def gpt2(**options):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    config = GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0, **options})
    return GPT2LMHeadModel(config).eval()


def theirs(model, rows, count, **options):
    """transformers' generate, a row at a time."""
    out = []
    for row in rows:
        ids = torch.tensor([row])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **options
        )
        out += [x[len(row) :].tolist() for x in made]
    return out


@pytest.mark.parametrize("name", ["gpt2", "rope", "post"])
def test_greedy_tokens_are_those_of_transformers_generate(name):
    model = build(**MODELS[name])
    rows = prompts([4, 11, 25, 1])
    assert generate_fast(model, rows, 20, temperature=0) == theirs(model, rows, 20)


def test_greedy_tokens_of_gpt2_are_those_of_transformers_with_and_without_penalties():
    model, rows = gpt2(), prompts([4, 11, 25, 1])
    assert generate_fast(model, rows, 30, temperature=0) == theirs(model, rows, 30)
    ours = generate_fast(model, rows, 30, temperature=0, repetition_penalty=1.4, no_repeat_ngram=3)
    assert ours == theirs(model, rows, 30, repetition_penalty=1.4, no_repeat_ngram_size=3)
    assert CausalLM.of(model).generate_fast(rows, 30, temperature=0) == theirs(model, rows, 30)


def test_rows_stop_at_their_stop_token_and_keep_it():
    model, rows = build(), prompts([4, 11, 25, 1, 8])
    whole = generate_fast(model, rows, 24, temperature=0)
    stops = [whole[0][5], whole[3][0]]
    cut = [row[: min([row.index(s) + 1 for s in stops if s in row], default=24)] for row in whole]
    assert len({len(row) for row in cut}) > 2
    assert generate_fast(model, rows, 24, temperature=0, stop_ids=stops) == cut


def test_rows_that_have_ended_leave_the_cache_when_they_are_more_than_half(monkeypatch):
    model, rows = build(), prompts([4, 11, 25, 1, 8])
    whole = generate_fast(model, rows, 24, temperature=0)
    sizes = []
    plain = KVCache.select

    def note(self, chosen, used):
        sizes.append(len(chosen))
        plain(self, chosen, used)

    monkeypatch.setattr(KVCache, "select", note)
    lasting = 1
    stops = {token for i, row in enumerate(whole) if i != lasting for token in row[:6]} - set(whole[lasting])
    out = generate_fast(model, rows, 24, temperature=0, stop_ids=stops)
    assert out[lasting] == whole[lasting]
    assert sizes[0] == 5
    assert sizes[-1] in (1, 2)


def test_a_row_draws_the_same_whatever_the_others_are():
    model, rows = build(), prompts([4, 11, 25, 1])
    options = {"max_new_tokens": 12, "temperature": 0.9, "top_k": 30, "top_p": 0.9, "seed": 5}
    out = generate_fast(model, rows, **options)
    others = prompts([9, 2], seed=9)
    assert generate_fast(model, [others[0], rows[1]], **options)[1] == out[1]
    assert generate_fast(model, [others[0], others[1], rows[2], rows[3], rows[0]], **options)[2:4] == out[2:4]
    early = generate_fast(model, rows, **options, stop_ids=[out[0][2], out[1][3]])
    for a, b in zip(early, out, strict=True):
        assert a == b[: len(a)]
    assert generate_fast(model, rows, **{**options, "seed": 6}) != out
    assert generate_fast(model, rows, **options) == out


def test_num_return_gives_consecutive_different_rows():
    model, rows = build(), prompts([4, 11])
    out = generate_fast(model, rows, 12, num_return=3, seed=2)
    assert len(out) == 6
    assert len({tuple(row) for row in out[:3]}) == 3
    assert generate_fast(model, [rows[0], rows[0], rows[0], rows[1]], 12, seed=2)[:4] == out[:4]
    assert generate_fast(model, rows, 5, temperature=0, num_return=2)[::2] == generate_fast(
        model, rows, 5, temperature=0
    )


def test_more_tokens_than_are_drawn_at_once_continue_the_same_stream():
    from kexue.generation import continuation

    model, row = build(position="rope", hidden_size=8, num_layers=1), [[3, 4]]
    long = generate_fast(model, row, continuation._DRAWS_AT_ONCE + 20, seed=4)[0]
    assert generate_fast(model, row, 40, seed=4)[0] == long[:40]
    assert long[:20] != long[continuation._DRAWS_AT_ONCE :]


def test_drawn_tokens_have_the_filtered_distribution():
    model, row = build(scale=1.0), [3, 14, 15, 9]
    out = generate_fast(model, [row], 1, temperature=1.3, top_k=12, top_p=0.9, num_return=4000, seed=11)
    counts = np.bincount([tokens[0] for tokens in out], minlength=40)
    expected = 4000 * np.array(filtered(next_logits(model, row), 1.3, 12, 0.9))
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi2 = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi2 < kept.sum() - 1 + 4 * np.sqrt(2 * kept.sum())


def test_narrow_filters_are_greedy():
    model, rows = build(), prompts([4, 11, 25])
    best = generate_fast(model, rows, 10, temperature=0)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6}):
        assert generate_fast(model, rows, 10, **options) == best


def test_no_ngram_occurs_twice():
    model, rows = build(vocab_size=5, max_position=80), prompts([3, 8], vocabulary=5)
    for temperature in (0, 1.0):
        for row, tokens in zip(rows, generate_fast(model, rows, 60, temperature, no_repeat_ngram=3), strict=True):
            ids = [*row, *tokens]
            grams = [tuple(ids[i : i + 3]) for i in range(len(row) - 2, len(ids) - 2)]
            old = {tuple(row[i : i + 3]) for i in range(len(row) - 2)}
            assert len(set(grams[1:])) == len(grams) - 1
            assert not old & set(grams[1:])


def test_streaming_gives_the_tokens_of_generate_fast_step_by_step():
    model, rows = build(), prompts([4, 11, 25])
    options = {"temperature": 0.8, "seed": 3, "stop_ids": [1, 2, 3, 4, 5, 6], "num_return": 2}
    whole = generate_fast(model, rows, 9, **options)
    out = [[] for _ in range(6)]
    last = -1
    steps = 1
    for row, token in stream(model, rows, 9, **options):
        steps += row <= last
        last = row
        out[row].append(token)
        assert len(out[row]) == steps
    assert out == whole
    assert len({len(row) for row in out}) > 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_computed_by_torch_in_that_dtype(dtype):
    model, rows = build(**MODELS["rope"]).to(dtype), prompts([4, 11, 25])
    decoder = Decoder(model)
    logits = decoder.start(rows)
    assert logits.dtype == dtype
    for row, logit in zip(rows, logits, strict=True):
        tolerance = 1e-10 if dtype == torch.float64 else 0.15
        torch.testing.assert_close(logit, next_logits(model, row), atol=tolerance, rtol=tolerance)
    if dtype == torch.float64:
        assert generate_fast(model, rows, 12, temperature=0) == [greedy(model, row, 12) for row in rows]
    assert [len(row) for row in generate_fast(model, rows, 4, top_p=0.9)] == [4, 4, 4]


def test_the_model_is_left_as_it_was():
    model = build(dropout=0.5, attention_dropout=0.5).train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    rows = prompts([4, 11])
    kept = [list(row) for row in rows]
    a = generate_fast(model, rows, 8, temperature=0)
    assert model.training
    assert rows == kept
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert a == generate_fast(model.eval(), rows, 8, temperature=0)  # no dropout in either mode


def test_changed_weights_are_seen():
    model, rows = build(), prompts([4, 11])
    for quantize in (None, "int8"):
        first = generate_fast(model, rows, 8, temperature=0, quantize=quantize)
        model.kexue.layers[0].feed_forward.up.weight.data.mul_(-1.5)
        with torch.no_grad():
            model.lm_head.decoder.weight.add_(torch.randn_like(model.lm_head.decoder.weight))
        assert generate_fast(model, rows, 8, temperature=0, quantize=quantize) != first
    model.kexue.layers[0].feed_forward.up.weight.data.mul_(0)
    model.kexue.layers[1].attention.qkv.weight = torch.nn.Parameter(torch.zeros(48, 16))
    assert generate_fast(model, rows, 8, temperature=0) == [greedy(model, row, 8) for row in rows]


def test_nan_weights_raise():
    model = build()
    with torch.no_grad():
        model.kexue.layers[1].feed_forward.down.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        generate_fast(model, [[1, 2]], 3)
    with pytest.raises(ValueError, match="finite"):
        generate_fast(model, [[1, 2]], 3, quantize="int8")


def test_texts_up_to_the_last_learned_position_are_fine_and_longer_ones_raise():
    model, rows = build(), prompts([44])
    assert generate_fast(model, rows, 20, temperature=0) == [greedy(model, rows[0], 20)]
    with pytest.raises(ValueError, match=r"64 .* 44 .* 21"):
        generate_fast(model, rows, 21)
    rope = build(position="rope")
    assert generate_fast(rope, rows, 40, temperature=0) == [greedy(rope, rows[0], 40)]


def test_nothing_to_do_gives_empty_rows():
    model = build()
    assert generate_fast(model, [], 5) == []
    assert generate_fast(model, [[1], [2]], 0, num_return=2) == [[], [], [], []]
    assert generate_fast(model, [], 5, beams=3) == []
    assert generate_fast(model, [[1]], 0, beams=3) == [[]]
    assert list(stream(model, [], 5)) == []


def test_tensors_and_arrays_are_prompts_too():
    model = build()
    expected = generate_fast(model, [[1, 2, 3], [4, 5, 6]], 4, temperature=0)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert generate_fast(model, ids, 4, temperature=0) == expected
    assert generate_fast(model, ids.numpy(), 4, temperature=0) == expected


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([[]], ValueError, "empty"), ([[1, 40]], ValueError, "40"), ([[-1]], ValueError, "-1"),
        ([1, 2], TypeError, "lists of token ids"), ("abc", TypeError, "str"), (["ab"], TypeError, "ab"),
        ([[1.5]], TypeError, "integer"), ([[True]], TypeError, "integer"), (None, TypeError, "NoneType"),
        (5, TypeError, "int"),
    ],
)  # fmt: skip
def test_bad_prompts_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        generate_fast(build(), given)
    with pytest.raises(error, match=message):  # at the call, not at the first token
        stream(build(), given)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_new_tokens": -1}, ValueError), ({"max_new_tokens": 2.0}, TypeError), ({"temperature": -0.1}, ValueError),
        ({"top_k": -1}, ValueError), ({"top_p": 0}, ValueError), ({"top_p": 1.01}, ValueError),
        ({"min_p": 2}, ValueError), ({"repetition_penalty": 0}, ValueError), ({"no_repeat_ngram": -1}, ValueError),
        ({"stop_ids": [40]}, ValueError),
        ({"stop_ids": [-1]}, ValueError), ({"stop_ids": "3"}, TypeError), ({"stop_ids": 3}, TypeError),
        ({"num_return": 0}, ValueError), ({"seed": -1}, ValueError), ({"seed": 2**64}, ValueError),
        ({"seed": None}, TypeError),
        ({"quantize": "int4"}, ValueError), ({"beams": 0}, ValueError), ({"beams": 2, "num_return": 3}, ValueError),
        ({"length_penalty": float("inf")}, ValueError),
    ],
)  # fmt: skip
def test_bad_options_are_refused(options, error):
    with pytest.raises(error):
        generate_fast(build(), [[1, 2]], **options)
    if "max_new_tokens" not in options:
        with pytest.raises(error):
            generate_fast(build(), [], **options)


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="Linear"):
        generate_fast(torch.nn.Linear(2, 2), [[1]])


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_the_result(threads, monkeypatch):
    model, rows = build(), prompts([4, 11, 25, 1] * 8)
    alone = Decoder(model)
    expected = [alone.start(rows), alone.advance(list(range(32)), [5] * 32)]
    monkeypatch.setattr(engine, "_WORTH_A_THREAD", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        split = Decoder(model)
        assert len(engine._cuts(list(range(32)), threads)) == threads + 1
        for want in expected:
            got = split.start(rows) if want is expected[0] else split.advance(list(range(32)), [5] * 32)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_parts_never_share_a_row():
    for rows, threads in (([0] * 40, 4), ([0] * 10 + [1] * 30, 4), (list(range(40)), 3), ([0, 1, 2], 8)):
        cuts = engine._cuts(rows, threads)
        assert cuts[0] == 0
        assert cuts[-1] == len(rows)
        assert cuts == sorted(set(cuts))
        for cut in cuts[1:-1]:
            assert rows[cut] != rows[cut - 1]


def test_the_cache_keeps_what_is_used_when_it_grows_and_when_rows_move():
    cache = KVCache(2, 3, 4, rows=2, room=5, limit=9)
    cache.data.copy_(torch.randn_like(cache.data))
    old = cache.data.clone()
    cache.reserve(5, used=5)
    assert cache.room == 5
    cache.reserve(6, used=3)
    assert cache.room == 9  # not 10: more is never needed
    assert torch.equal(cache.data[..., :3, :], old[..., :3, :])
    cache.select([1, 1, 0], used=3)
    assert torch.equal(cache.data[..., :3, :], old[:, :, [1, 1, 0], :, :3])
    assert not cache.data[..., 3:, :].any()
