"""Filters of the next token's distribution."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.generation import filter_logits, token_probabilities
from kexue.generation.filters import (
    ban_repeated_ngrams,
    min_p_filter,
    repetition_filter,
    sample_tokens,
    top_k_filter,
    top_p_filter,
)
from reference.decoding import filtered

INF = float("inf")


@settings(max_examples=150)
@given(
    st.lists(st.sampled_from([-3.0, -1.5, -1.0, 0.0, 0.25, 0.5, 2.0, 4.0]), min_size=1, max_size=9),
    st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    st.integers(0, 10),
    st.sampled_from([0.011, 0.37, 0.83, 0.991, 1.0]),
    st.sampled_from([0.0, 0.07, 0.61]),
    st.sampled_from([0.7, 1.0, 1.9]),
    st.data(),
)
def test_all_filters_in_order_agree_with_the_reference(logits, temperature, k, p, min_p, penalty, data):
    sequence = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=6))
    seen = torch.zeros(1, len(logits), dtype=torch.bool)
    seen[0, sequence] = True
    out = token_probabilities(
        torch.tensor([logits], dtype=torch.float64), temperature=temperature, top_k=k, top_p=p, min_p=min_p,
        repetition_penalty=penalty, seen=seen,
    )  # fmt: skip
    expected = filtered(logits, temperature, k, p, min_p, penalty, sequence)
    np.testing.assert_allclose(out[0], expected, atol=1e-12)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 3), max_size=10), st.integers(1, 4))
def test_repeated_ngrams_are_excluded_as_in_the_reference(sequence, n):
    logits = torch.tensor([[0.5, -1.0, 2.0, 0.0, 0.1]], dtype=torch.float64)
    out = token_probabilities(logits, no_repeat_ngram=n, sequences=[sequence])
    np.testing.assert_allclose(out[0], filtered(logits[0], sequence=sequence, ngram=n), atol=1e-12)


def test_rows_are_filtered_each_for_itself():
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = token_probabilities(logits, temperature=0.8, top_k=20, top_p=0.6, min_p=0.02)
    for row, x in enumerate(logits):
        np.testing.assert_allclose(out[row], filtered(x, 0.8, 20, 0.6, 0.02), atol=1e-12)
    assert torch.equal(
        token_probabilities(logits.reshape(7, 1, 50), top_p=0.6)[:, 0], token_probabilities(logits, top_p=0.6)
    )


def test_top_k_keeps_exactly_k_and_takes_ties_by_index():
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    kept = top_k_filter(logits, 3) > -INF
    assert kept.tolist() == [[True, True, False, False, True], [True, True, True, False, False]]
    assert torch.equal(top_k_filter(logits, 5), logits)
    assert torch.equal(top_k_filter(logits, 500), logits)


def test_top_p_keeps_the_first_token_the_one_that_crosses_and_takes_ties_by_index():
    p = torch.tensor([0.1, 0.4, 0.1, 0.4]).log()
    assert (top_p_filter(p, 1e-9) > -INF).tolist() == [False, True, False, False]
    assert (top_p_filter(p, 0.41) > -INF).tolist() == [False, True, False, True]
    assert (top_p_filter(p, 0.85) > -INF).tolist() == [True, True, False, True]
    assert (top_p_filter(p, 0.95) > -INF).tolist() == [True, True, True, True]
    assert torch.equal(top_p_filter(p, 1.0), p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_prefix_that_sums_to_exactly_p_is_enough(dtype):
    p = torch.tensor([0.5, 0.3, 0.2], dtype=dtype).log()
    assert (top_p_filter(p, 0.8) > -INF).tolist() == [True, True, False]
    assert (top_p_filter(p, 0.5) > -INF).tolist() == [True, False, False]


def test_excluded_tokens_stay_excluded_and_more_than_are_left_can_be_asked_for():
    logits = torch.tensor([[-INF, 1.0, -INF, 0.0]])
    for out in (top_k_filter(logits, 3), top_p_filter(logits, 0.999999), min_p_filter(logits, 0.1)):
        assert (out > -INF).tolist() == [[False, True, False, True]]


def test_agrees_with_transformers_where_nothing_ties():
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    generator = torch.Generator().manual_seed(1)
    logits, ids = torch.randn(4, 40, generator=generator), torch.randint(40, (4, 30), generator=generator)
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.3), NoRepeatNGramLogitsProcessor(2), TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(25), TopPLogitsWarper(0.8), MinPLogitsWarper(0.05),
        ]
    )(ids, logits.clone())  # fmt: skip
    seen = torch.zeros(4, 40, dtype=torch.bool).scatter(1, ids, True)
    ours = filter_logits(logits, 0.7, 25, 0.8, 0.05, 1.3, seen, 2, ids.tolist())
    torch.testing.assert_close(ours, theirs)


def test_softmax_is_in_float32_for_low_precision_and_float64_stays():
    logits = torch.tensor([[10.0, 9.9375, -3.0]], dtype=torch.bfloat16)
    assert token_probabilities(logits).dtype == torch.float32
    torch.testing.assert_close(token_probabilities(logits), logits.float().softmax(-1))
    assert token_probabilities(logits.double()).dtype == torch.float64


def test_tiny_temperature_is_the_largest_token_and_not_nan():
    out = token_probabilities(torch.tensor([[300.0, -2e4, 299.0]]), temperature=1e-38)
    assert out.tolist() == [[1.0, 0.0, 0.0]]


def test_inputs_are_not_changed():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    before = logits.clone()
    filter_logits(logits, 0.5, 2, 0.5, 0.1, 1.5, torch.tensor([[True, False, True]]), 1, [[0]])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [[-INF, -INF], [float("nan"), 0.0], [INF, 0.0]])
def test_a_row_without_a_distribution_raises(bad):
    with pytest.raises(ValueError, match="row 1"):
        filter_logits(torch.tensor([[0.0, 1.0], bad]))


def test_banning_everything_raises():
    with pytest.raises(ValueError, match="no token left"):
        filter_logits(torch.zeros(1, 2), no_repeat_ngram=1, sequences=[[0, 1]])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"temperature": -1.0}, ValueError), ({"temperature": float("nan")}, ValueError),
        ({"temperature": "1"}, TypeError), ({"top_k": -1}, ValueError), ({"top_k": 1.5}, TypeError),
        ({"top_p": 0.0}, ValueError), ({"top_p": 1.1}, ValueError),
        ({"min_p": -0.1}, ValueError), ({"min_p": 2}, ValueError), ({"repetition_penalty": 0.0}, ValueError),
        ({"repetition_penalty": 2.0}, ValueError), ({"no_repeat_ngram": 2}, ValueError),
        ({"no_repeat_ngram": -1}, ValueError),
    ],
)  # fmt: skip
def test_bad_options_are_refused(options, error):
    with pytest.raises(error):
        filter_logits(torch.zeros(1, 3), **options)


def test_bad_tensors_are_refused():
    with pytest.raises(TypeError, match="floating"):
        filter_logits(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="shape"):
        filter_logits(torch.zeros(2, 0))
    with pytest.raises(ValueError, match="shape"):
        repetition_filter(torch.zeros(1, 3), torch.zeros(3, dtype=torch.bool), 2.0)
    with pytest.raises(TypeError, match="bool"):
        repetition_filter(torch.zeros(3), torch.zeros(3), 2.0)
    with pytest.raises(ValueError, match="sequences"):
        ban_repeated_ngrams(torch.zeros(2, 3), [[1]], 1)


def test_inversion_draws_from_the_distribution_and_never_what_is_excluded():
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    uniforms = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]
    tokens = sample_tokens(p.expand(4000, 6), uniforms)
    assert torch.bincount(tokens, minlength=6).tolist() == [0, 1000, 0, 2000, 1000, 0]
    edge = torch.tensor([np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert sample_tokens(p[None] / 3, edge).tolist() == [4]
    assert sample_tokens(torch.zeros(0, 6), torch.zeros(0, dtype=torch.float64)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_temperature_too_small_for_the_dtype_leaves_the_largest_logit(dtype):
    found = token_probabilities(torch.tensor([[0.0, 2.0, -3.0]], dtype=dtype), temperature=1e-320)
    assert found.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("penalty", [1e-320, 1e300])
def test_a_penalty_that_overflows_is_an_error_not_a_random_token(penalty):
    logits = torch.tensor([[0.0, 2.0, -1.0]])
    with pytest.raises(ValueError, match="finite maximum"):
        filter_logits(logits, repetition_penalty=penalty, seen=torch.ones(1, 3, dtype=torch.bool))
