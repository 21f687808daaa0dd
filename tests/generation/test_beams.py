"""Beam search."""

import itertools

import pytest
import torch

from kexue.generation import beams as search
from kexue.generation import generate_fast
from kexue.models import KexueConfig, KexueForCausalLM
from reference.decoding import best_continuations


def build(vocab_size=4, seed=0, scale=6.0):
    torch.manual_seed(seed)
    options = {"attn_mode": "causal", "max_position": 40, "tie_word_embeddings": False}  # tied models repeat themselves
    config = KexueConfig(vocab_size, hidden_size=8, num_layers=1, num_heads=2, **options)
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
    model = build(vocab_size=30, seed=3, scale=8.0)
    stops = [1, 4, 7, 9, 12, 20]
    rows = torch.randint(1, 30, (3, 6), generator=torch.Generator().manual_seed(0))
    theirs = model.generate(
        rows, attention_mask=torch.ones_like(rows), max_new_tokens=12, do_sample=False, num_beams=4,
        num_return_sequences=2, length_penalty=alpha, early_stopping="never", eos_token_id=stops, pad_token_id=0,
    )[:, 6:].tolist()  # fmt: skip
    theirs = [row[: min((row.index(s) + 1 for s in stops if s in row), default=12)] for row in theirs]
    ours = generate_fast(model, rows, 12, beams=4, num_return=2, length_penalty=alpha, stop_ids=stops)
    assert ours == theirs
    assert any(len(row) < 12 for row in ours)


def test_prompts_of_a_batch_do_not_influence_each_other():
    model = build(vocab_size=30, seed=3, scale=8.0)
    rows = [[1, 2, 3], [4], [9, 8, 7, 6, 5, 4, 3], [4]]
    out = generate_fast(model, rows, 9, beams=3, num_return=2, stop_ids=[5, 11])
    for i, row in enumerate(rows):
        assert generate_fast(model, [row], 9, beams=3, num_return=2, stop_ids=[5, 11]) == out[2 * i : 2 * i + 2]


def test_a_search_ends_as_soon_as_nothing_can_change_and_not_before(monkeypatch):
    model, prompt = build(vocab_size=6, seed=5), [1, 2]
    options = {"beams": 3, "stop_ids": [0, 1, 2], "length_penalty": 0.3}
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
    pairs = list(itertools.pairwise(ids))
    assert len(set(pairs)) == len(pairs)
    with pytest.raises(ValueError, match="num_return"):
        generate_fast(model, [[1, 2]], 1, beams=4, num_return=4, top_k=2)
