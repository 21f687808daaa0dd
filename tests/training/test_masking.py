"""Which tokens are hidden: rates within binomial bounds, units kept together, nothing selected that may not be."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kexue.training import MaskedBatches, fit, mask_tokens

V, MASK, PAD, CLS, SEP = 50, 4, 0, 2, 3
SPECIAL = (PAD, CLS, SEP)


def hide(ids, *args, **options):
    return mask_tokens(ids, *args, **{"mask_token_id": MASK, "vocab_size": V, "special_ids": SPECIAL} | options)


def texts(rows=200, length=64, seed=0):
    """[CLS] words [SEP] words [SEP] and padding of random length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, V, (rows, length), generator=generator)
    ids[:, 0] = CLS
    ids[:, length // 3] = SEP
    for row in ids:
        end = int(torch.randint(length // 2, length, (), generator=generator))
        row[end] = SEP
        row[end + 1 :] = PAD
    return ids


def within(count, n, p, deviations=5):
    assert abs(count - n * p) <= deviations * max((n * p * (1 - p)) ** 0.5, 1e-9), (count, n, p)


@pytest.mark.parametrize("rate", [0.15, 0.4, 0.9])
def test_rate_and_split_within_binomial_bounds(rate):
    ids = texts()
    hidden, labels = hide(ids, 3, 1, rate=rate, split=(0.7, 0.2, 0.1))
    ordinary = (ids > 4).sum().item()
    chosen = labels != -100
    within(chosen.sum().item(), ordinary, rate)
    n = chosen.sum().item()
    within((hidden[chosen] == MASK).sum().item(), n, 0.7 + 0.1 / V)
    within((hidden[chosen] == labels[chosen]).sum().item(), n, 0.2 + 0.1 / V)
    swapped = hidden[chosen & (hidden != MASK) & (hidden != ids)]
    within(len(swapped), n, 0.1 * (V - 2) / V)
    assert set(swapped.tolist()) <= set(range(V))
    assert swapped.min() < 5  # by default any id of the vocabulary
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(hidden[~chosen], ids[~chosen])


def test_every_position_is_selected_equally_often_also_by_spans():
    ids = np.full((4000, 12), 7)
    for options in (
        {},
        {"mean_span": 5.0},
        {"mean_span": 2.0, "max_span": 4},
        {"word_ids": np.tile(np.arange(12) // 3, (4000, 1))},
    ):
        _, labels = hide(ids, 0, 0, rate=0.3, **options)
        for column in (labels != -100).sum(0):
            within(column, 4000, 0.3)


@pytest.mark.parametrize("options", [{}, {"mean_span": 3.8}, {"word_starts": lambda ids: ids % 2 == 0}])
def test_rates_zero_and_one_are_exact(options):
    ids = texts(20)
    hidden, labels = hide(ids, rate=0.0, **options)
    assert torch.equal(hidden, ids)
    assert (labels == -100).all()
    hidden, labels = hide(ids, rate=1.0, split=(1, 0, 0), **options)
    assert torch.equal(hidden, torch.where(ids > 4, MASK, ids))
    assert torch.equal(labels, torch.where(ids > 4, ids, -100))


@pytest.mark.parametrize(
    ("split", "expected"),
    [((1, 0, 0), {"mask"}), ((0, 1, 0), {"same"}), ((0, 0, 1), {"other"}), ((0.5, 0.5, 0), {"mask", "same"})],
)
def test_shares_of_zero_never_occur(split, expected):
    ids = np.full(20_000, 7)
    hidden, _ = hide(ids, rate=1.0, split=split, random_ids=[9, 11])
    found = {"mask" if x == MASK else "same" if x == 7 else "other" for x in set(hidden.tolist())}
    assert found == expected


def test_random_ids_can_be_chosen():
    ids = np.full(20_000, 7)
    ordinary, _ = hide(ids, rate=1.0, split=(0, 0, 1), random_ids="ordinary")
    assert set(ordinary.tolist()) == set(range(V)) - {*SPECIAL, MASK}
    chosen, _ = hide(ids, rate=1.0, split=(0, 0, 1), random_ids=(6, 8))
    assert set(chosen.tolist()) == {6, 8}


def test_a_pure_function_of_seed_step_and_rank():
    ids = texts(8)
    kept = ids.clone()
    first = hide(ids, 1, 2, 3)
    hide(ids, 9, 9, 9)
    np.random.seed(0)  # noqa: NPY002 - the global generators must not matter
    again = hide(ids, 1, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in ((0, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(hide(ids, *other)[1], first[1])
    assert torch.equal(ids, kept)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_tensors_arrays_and_lists_agree(dtype):
    ids = texts(4)
    expected = hide(ids)
    hidden, labels = hide(ids.to(dtype))
    assert (hidden.dtype, labels.dtype) == (dtype, torch.int64)
    assert torch.equal(hidden.long(), expected[0])
    assert torch.equal(labels, expected[1])
    for form in (ids.numpy(), ids.tolist()):
        hidden, labels = hide(form)
        assert np.array_equal(hidden, expected[0])
        assert np.array_equal(labels, expected[1])


def test_narrow_integers_do_not_wrap():
    hidden, _ = mask_tokens(
        np.full(1000, 7, np.uint8), mask_token_id=400, vocab_size=500, rate=1.0, split=(0.5, 0, 0.5), random_ids=[300]
    )
    assert set(hidden.tolist()) == {300, 400}


@given(
    st.integers(0, 10**6), st.integers(0, 6), st.integers(0, 9), st.floats(0, 1), st.sampled_from([None, 1.0, 2.5, 9.0])
)
def test_what_may_not_be_selected_never_is(seed, rows, length, rate, span):
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, V, (rows, length))
    mask = generator.random(ids.shape) < 0.7
    words = generator.integers(-1, 3, ids.shape)
    hidden, labels = hide(ids, seed, rate=rate, attention_mask=mask, word_ids=words, mean_span=span)
    barred = ~mask | (words < 0) | (ids < 5) & (ids != 1)
    assert (labels[barred] == -100).all()
    assert np.array_equal(hidden[barred], ids[barred])
    assert ((hidden >= 0) & (hidden < V)).all()
    # Neighbours with one number are one word: all of it or nothing.
    for row in range(rows):
        for a in range(length - 1):
            if not barred[row, a] and not barred[row, a + 1] and words[row, a] == words[row, a + 1]:
                assert (labels[row, a] == -100) == (labels[row, a + 1] == -100)


def test_word_starts_as_array_function_and_ids_are_the_same_words():
    ids = texts(30)
    starts = ids % 3 == 0
    expected = hide(ids, word_starts=starts)
    assert torch.equal(hide(ids, word_starts=lambda x: x % 3 == 0)[1], expected[1])
    assert torch.equal(hide(ids, word_ids=starts.long().cumsum(1))[1], expected[1])
    assert 0 < (expected[1] != -100).sum() < (ids > 4).sum()


def test_word_and_span_stop_at_the_end_of_a_packed_text():
    """One word number throughout: without boundaries a single unit, with them one for each text."""
    ids, words, bounds = np.full(4000, 7), np.zeros(4000, int), np.arange(0, 4001, 4)
    _, labels = hide(ids, rate=0.5, word_ids=words, cu_seqlens=bounds)
    chosen = (labels != -100).reshape(1000, 4)
    assert (chosen.all(1) == chosen.any(1)).all()
    within(chosen.all(1).sum(), 1000, 0.5)
    _, labels = hide(ids, rate=0.3, mean_span=40.0, max_span=40, cu_seqlens=bounds)
    chosen = (labels != -100).reshape(1000, 4)
    # A span that begins before its text covers it from the start: ends and starts of texts are independent.
    both = (chosen[:-1, 3] & chosen[1:, 0]).sum()
    within(both, 999, chosen[:-1, 3].mean() * chosen[1:, 0].mean(), deviations=6)


def test_lengths_of_spans():
    ids = np.full(400_000, 7)
    _, labels = hide(ids, rate=0.02, mean_span=5.0, max_span=10)
    chosen = np.concatenate([[0], (labels != -100).astype(int), [0]])
    lengths = np.flatnonzero(np.diff(chosen) == -1) - np.flatnonzero(np.diff(chosen) == 1)
    expected = sum(0.8**k for k in range(10))  # mean of the clipped geometric law; at this rate few spans touch
    assert lengths.mean() == pytest.approx(expected, rel=0.05)
    _, labels = hide(ids, rate=0.02, mean_span=1.0)
    within((labels != -100).sum(), len(ids), 0.02)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (1, 1)])
def test_empty_and_tiny_batches(shape):
    ids = torch.full(shape, 7)
    for options in ({}, {"mean_span": 3.0}, {"word_starts": torch.ones(shape, dtype=torch.bool)}):
        hidden, labels = hide(ids, rate=1.0, split=(1, 0, 0), **options)
        assert hidden.shape == labels.shape == ids.shape
        assert (hidden == MASK).all()


@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        ([[7, 50], [99, -3]], {}, ValueError, r"in \[0, 50\); got -3, 50, 99 \(3 in all, the first at \(0, 1\)\)"),
        ([7, -100], {}, ValueError, r"got -100 \(1 in all, the first at 1\)"),
        ([[7.0]], {}, TypeError, "input_ids must be integers; got float64"),
        ([[True]], {}, TypeError, "input_ids must be integers; got bool"),
        ([[7]], {"mask_token_id": 50}, ValueError, r"mask_token_id must be in \[0, 50\); got 50"),
        ([[7]], {"mask_token_id": None}, TypeError, "mask_token_id must be an integer; got None"),
        ([[7]], {"special_ids": (0, 60)}, ValueError, r"special_ids must be in \[0, 50\); got 60"),
        ([[7]], {"vocab_size": 0}, ValueError, "vocab_size must be at least 1; got 0"),
        ([[7]], {"rate": 1.5}, ValueError, "rate must be at most 1; got 1.5"),
        ([[7]], {"rate": -0.1}, ValueError, "rate must be at least 0"),
        ([[7]], {"rate": float("nan")}, ValueError, "rate must be finite"),
        ([[7]], {"split": (0.8, 0.1)}, ValueError, r"three shares \(masked, kept, random\); got \(0.8, 0.1\)"),
        ([[7]], {"split": (0.8, 0.3, -0.1)}, ValueError, "a share of split must be at least 0"),
        ([[7]], {"split": (0.8, 0.1, 0.2)}, ValueError, "must sum to 1; got"),
        ([[7]], {"attention_mask": [[1, 1]]}, ValueError, r"must have the shape of input_ids, \(1, 1\); got \(1, 2\)"),
        ([[7]], {"word_ids": [[1]], "word_starts": [[True]]}, ValueError, "not both"),
        ([[7]], {"word_ids": [[1.0]]}, TypeError, "word_ids must be integers"),
        ([[7]], {"word_starts": [[1]]}, TypeError, "word_starts must be booleans; got int64"),
        ([[7]], {"mean_span": 0.5}, ValueError, "mean_span must be at least 1.0; got 0.5"),
        ([[7]], {"mean_span": 2.0, "max_span": 0}, ValueError, "max_span must be at least 1"),
        ([7, 8], {"cu_seqlens": [0, 1]}, ValueError, "cu_seqlens must rise from 0 to the number"),
        ([[7, 8], [9]], {}, ValueError, "input_ids must have rows of one length"),
        ([[7]], {"special_ids": None}, TypeError, "special_ids must be a sequence of ids; got None"),
        ([7, 8], {"mean_span": 2.0, "cu_seqlens": [0, 1]}, ValueError, "cu_seqlens must rise from 0 to the number"),
        ([7] * 99, {"rate": 1.0, "random_ids": []}, ValueError, "random_ids is empty"),
        ([7] * 99, {"rate": 1.0, "random_ids": [50]}, ValueError, r"random_ids must be in \[0, 50\); got 50"),
        ([7] * 99, {"rate": 1.0, "random_ids": "all"}, ValueError, 'None, "ordinary" or a sequence of ids'),
    ],
)  # fmt: skip
def test_bad_input_is_named(ids, options, error, message):
    with pytest.raises(error, match=message):
        hide(ids, **options)


def test_masked_batches_hide_what_another_function_gives():
    ids = texts(16)
    mask = ids != PAD
    inner = [{"input_ids": part, "attention_mask": m} for part, m in zip(ids.split(4), mask.split(4), strict=True)]
    batches = MaskedBatches(inner, seed=5, mask_token_id=MASK, vocab_size=V, special_ids=SPECIAL)
    for number in (0, 3, 9):
        batch = batches(number)
        hidden, labels = hide(ids.split(4)[number % 4], 5, number, attention_mask=mask.split(4)[number % 4])
        assert torch.equal(batch["input_ids"], hidden)
        assert torch.equal(batch["labels"], labels)
        assert batch["attention_mask"] is inner[number % 4]["attention_mask"]
    words = MaskedBatches(
        lambda number: {"input_ids": ids, "word_starts": ids % 2 == 0}, mask_token_id=MASK, vocab_size=V, rate=0.5
    )
    assert sorted(words(0)) == ["input_ids", "labels"]
    with pytest.raises(ValueError, match="rate must be at most 1"):
        MaskedBatches(inner, mask_token_id=MASK, vocab_size=V, rate=2.0)
    with pytest.raises(ValueError, match="batch 0 must have input_ids; got x"):
        MaskedBatches([{"x": ids}], mask_token_id=MASK, vocab_size=V)(0)


@pytest.mark.slow
def test_fit_learns_from_masked_batches(tmp_path):
    from kexue.models import KexueConfig, KexueForMaskedLM

    torch.manual_seed(0)
    ids = torch.arange(5, 45).repeat(8, 1)  # the token is known from its position
    config = KexueConfig(V, 32, 2, 2, max_position=64, mask_token_id=MASK)
    batches = MaskedBatches([{"input_ids": ids}], mask_token_id=MASK, vocab_size=V)
    result = fit(KexueForMaskedLM(config), batches, steps=60, out=tmp_path, lr=1e-2, warmup=5)
    assert result.history[-1] < 0.3 * result.history[0]
