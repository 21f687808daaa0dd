"""Beam search."""

import pytest
import torch

from kexue.generation import generate_fast
from kexue.generation import beams as search
from kexue.models import KexueConfig, KexueForCausalLM
from reference.decoding import best_continuations


def build(vocab_size=4, seed=0, scale=6.0):
    torch.manual_seed(seed)
    config = KexueConfig(vocab_size, hidden_size=8, num_layers=1, num_heads=2, attn_mode="causal", max_position=40)
    model = KexueForCausalLM(config).eval().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        model.lm_head.decoder.weight.mul_(scale)
    return model


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("stops", [(), (2,), (0, 3)])
def test_as_many_beams_as_there_are_continuations_find_the_best_ones(alpha, stops):
    model, prompt = build(), [1, 2, 0, 3, 3]
    out = generate_fast(
        model, [prompt], 4, beams=256, num_return=5, stop_ids=stops, length_penalty=alpha, temperature=1.0
    )
    expected = best_continuations(model, prompt, 4, alpha, stops, 5)
    assert out == [tokens for _, tokens in expected]


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_agrees_with_transformers_beam_search(alpha):
    model = build(vocab_size=30, seed=3, scale=3.0)
    rows = torch.randint(1, 30, (3, 6), generator=torch.Generator().manual_seed(0))
    theirs = model.generate(
        rows, attention_mask=torch.ones_like(rows), max_new_tokens=12, do_sample=False, num_beams=4,
        num_return_sequences=2, length_penalty=alpha, early_stopping="never", eos_token_id=7, pad_token_id=0,
    )[:, 6:].tolist()  # fmt: skip
    theirs = [row[: row.index(7) + 1] if 7 in row else row for row in theirs]
    ours = generate_fast(model, rows, 12, beams=4, num_return=2, length_penalty=alpha, stop_ids=[7])
    assert ours == theirs
    assert any(len(row) < 12 for row in ours)


def test_prompts_of_a_batch_do_not_influence_each_other():
    model = build(vocab_size=30, seed=3, scale=3.0)
    rows = [[1, 2, 3], [4], [9, 8, 7, 6, 5, 4, 3], [4]]
    out = generate_fast(model, rows, 9, beams=3, num_return=2, stop_ids=[5, 11])
    for i, row in enumerate(rows):
        assert generate_fast(model, [row], 9, beams=3, num_return=2, stop_ids=[5, 11]) == out[2 * i : 2 * i + 2]


def test_a_search_ends_as_soon_as_nothing_can_change_and_not_before(monkeypatch):
    model, prompt = build(vocab_size=6, seed=5), [1, 2]
    options = {"beams": 3, "stop_ids": [0, 1, 2], "length_penalty": 1.0}
    steps = []
    plain = search._Search.over

    def note(self, length):
        steps.append(length)
        return plain(self, length)

    monkeypatch.setattr(search._Search, "over", note)
    out = generate_fast(model, [prompt], 30, **options)
    assert max(steps) < 29
    monkeypatch.setattr(search._Search, "over", lambda self, length: not self.live)
    assert generate_fast(model, [prompt], 30, **options) == out


def test_one_beam_that_draws_nothing_is_greedy():
    model = build(vocab_size=30, seed=3)
    assert generate_fast(model, [[1, 2]], 8, beams=2, top_k=1) == generate_fast(model, [[1, 2]], 8, temperature=0)


def test_filters_restrict_beams():
    model = build(vocab_size=6, seed=2)
    (tokens,) = generate_fast(model, [[1, 2]], 20, beams=4, no_repeat_ngram=2)
    ids = [2, *tokens]
    pairs = list(zip(ids, ids[1:], strict=False))
    assert len(set(pairs)) == len(pairs)
    with pytest.raises(ValueError, match="num_return"):
        generate_fast(model, [[1, 2]], 1, beams=4, num_return=4, top_k=2)
