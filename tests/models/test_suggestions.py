import math

import pytest
import torch

from kexue.models import Candidate, Suggestion
from kexue.models.suggestions import suggestions
from models.one_pass_models import MASK, VOCABULARY, build, texts


def expected(model, ids, mask, top_k, never, silent):
    """By sorting all tokens at every position."""
    scores = model(ids, mask).logits.log_softmax(-1)
    out = []
    for b in range(len(ids)):
        row = []
        for t in range(ids.shape[1]):
            token = int(ids[b, t])
            if not mask[b, t] or token in silent:
                continue
            others = [v for v in range(VOCABULARY) if v not in never and v != token]
            others.sort(key=lambda v: -float(scores[b, t, v]))
            row.append((t, token, float(scores[b, t, token]), [(v, float(scores[b, t, v])) for v in others[:top_k]]))
        row.sort(key=lambda r: -(r[3][0][1] - r[2]))
        out.append(row)
    return out


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 3, 100])
def test_equal_to_sorting_the_whole_vocabulary_at_every_position(top_k):
    model, ids = build(pad_token_id=0, bos_token_id=1, eos_token_id=[2, 3]), texts()
    ids[0, 0], ids[1, 6], ids[2, 2], ids[0, 3] = 1, 3, MASK, 8
    mask = torch.arange(7)[None] < torch.tensor([[7], [7], [4]])
    found = model.suggest(ids, top_k, mask, special=[8])
    never, silent = {0, 1, 2, 3, 8, MASK}, {0, 1, 2, 3, 8}
    for row, want in zip(found, expected(model, ids, mask, top_k, never, silent), strict=True):
        assert [s.position for s in row] == [w[0] for w in want]
        assert [s.gain for s in row] == sorted((s.gain for s in row), reverse=True)
        for suggestion, (_, token, log_prob, others) in zip(row, want, strict=True):
            assert suggestion.token == token
            assert suggestion.log_prob == pytest.approx(log_prob, abs=1e-9)
            assert [c.token for c in suggestion.candidates] == [v for v, _ in others]
            assert [c.log_prob for c in suggestion.candidates] == pytest.approx([p for _, p in others], abs=1e-9)
    assert MASK in [s.token for s in found[2]]  # it is there to be filled


def test_only_positions_that_gain_enough_are_returned():
    model, ids = build(), texts()
    everything = model.suggest(ids)
    kept = model.suggest(ids, min_gain=1.0)
    assert kept == [[s for s in row if s.gain >= 1] for row in everything]
    assert 0 < sum(map(len, kept)) < sum(map(len, everything)) == ids.numel()


def test_chunks_give_what_one_pass_gives():
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((9, 4), (20, 4), (20,)))
    tokens, places = torch.randint(20, (9,), generator=g), [(n % 2, n) for n in range(9)]
    whole = suggestions(hidden, weight, bias, places, tokens, 2, 3, [1, 2], -math.inf)
    for chunk in (1, 80, 3 * 80, 1000):
        parts = suggestions(hidden, weight, bias, places, tokens, 2, 3, [1, 2], -math.inf, chunk)
        for row, want in zip(parts, whole, strict=True):
            assert [(s.position, s.token) for s in row] == [(s.position, s.token) for s in want]
            assert [[c.token for c in s.candidates] for s in row] == [[c.token for c in s.candidates] for s in want]
            assert [s.gain for s in row] == pytest.approx([s.gain for s in want])
    assert [len(row) for row in whole] == [5, 4]


def test_no_candidates_at_all():
    model = build()
    row = model.suggest(torch.tensor([[5, 6]]), special=[v for v in range(VOCABULARY) if v != 5])[0]
    assert [s.position for s in row] == [0]  # token 6 is special
    assert row[0].candidates == ()
    assert row[0].gain == -math.inf
    assert model.suggest(torch.tensor([[5, 6]]), special=range(VOCABULARY)) == [[]]


def test_a_trained_model_corrects_a_wrong_letter():
    """Ten repeated cycles of letters: the neighbours determine what stands between them."""
    model = build(dtype=torch.float32, noise=0.0, num_layers=2, hidden_size=32)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    g = torch.Generator().manual_seed(0)
    for _ in range(150):
        ids = (torch.randint(20, (16, 1), generator=g) + torch.arange(10)) % 20 + 5
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3
    text = torch.arange(8, 18)[None]
    assert all(s.gain < 0 for s in model.suggest(text)[0])
    wrong = text.clone()
    wrong[0, 4] = 23
    best = model.suggest(wrong, top_k=2)[0][0]
    assert (best.position, best.token, best.candidates[0].token) == (4, 23, 12)
    assert best.gain > 1


def test_the_result_types_compare_and_print():
    suggestion = Suggestion(1, 2, -3.0, (Candidate(4, -1.0),))
    assert suggestion == Suggestion(1, 2, -3.0, (Candidate(4, -1.0),))
    assert suggestion.gain == 2.0
    with pytest.raises(AttributeError):
        suggestion.position = 2
