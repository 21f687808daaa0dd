"""Samples contrast: thresholds by definition, priors, ties, scikit-learn's contract, bad input."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score

from kexue.tasks import SamplesContrast
from reference.nsp_zero_shot import samples_contrast

NUMBERS = st.floats(-1e6, 1e6)


@given(st.lists(NUMBERS, min_size=5, max_size=40), st.integers(2, 5), st.lists(NUMBERS, max_size=10))
def test_classes_are_those_of_the_definition(scores, classes, new):
    contrast = SamplesContrast(classes).fit(scores)
    cuts = [math.ceil(Fraction(i * len(scores), classes)) for i in range(1, classes)]
    assert contrast.thresholds_.tolist() == [sorted(scores)[cut] for cut in cuts]
    assert contrast.predict(scores + new).tolist() == samples_contrast(scores, scores + new, cuts)
    assert contrast.classes_.tolist() == list(range(classes))


@given(st.lists(NUMBERS, min_size=5, max_size=40, unique=True), st.integers(2, 5))
def test_one_call_equals_two_without_ties_and_its_sizes_are_even(scores, classes):
    got = SamplesContrast(classes).fit_predict(scores)
    assert got.tolist() == SamplesContrast(classes).fit(scores).predict(scores).tolist()
    sizes = np.bincount(got, minlength=classes)
    assert sizes.max() - sizes.min() <= 1


def test_ties_go_up_together_or_are_cut_by_rank():
    scores = [1.0, 1.0, 1.0, 1.0, 2.0]
    assert SamplesContrast(2).fit(scores).predict(scores).tolist() == [1, 1, 1, 1, 1]
    assert SamplesContrast(2).fit_predict(scores).tolist() == [0, 0, 0, 1, 1]


def test_a_prior_sets_the_sizes():
    scores = np.arange(10.0)[::-1]
    assert SamplesContrast(2, [0.3, 0.7]).fit_predict(scores).tolist() == [1] * 7 + [0] * 3
    assert SamplesContrast(3, [0.1, 0.2, 0.7]).fit(scores).thresholds_.tolist() == [1.0, 3.0]  # .1 + .2 > .3
    assert SamplesContrast(3, [0.5, 0.5, 0]).fit(scores).thresholds_.tolist() == [5.0, math.inf]
    assert SamplesContrast(3, [0, 0, 1.0]).fit_predict(scores).tolist() == [2] * 10
    assert SamplesContrast(3, [0, 0.5, 0.5]).fit(scores).thresholds_.tolist() == [-math.inf, 5.0]
    equal = SamplesContrast(4, [0.25] * 4).fit_predict(scores)
    assert equal.tolist() == SamplesContrast(4).fit_predict(scores).tolist()


def test_classes_of_prior_zero_get_no_new_scores_either():
    new = [-100.0, 0.0, 4.0, 5.0, 9.0, 100.0]
    for prior, expected in (
        ([0, 0.5, 0.5], [1, 1, 1, 2, 2, 2]), ([0.5, 0, 0.5], [0, 0, 0, 2, 2, 2]), ([0.5, 0.5, 0], [0, 0, 0, 1, 1, 1]),
        ([0, 1, 0], [1] * 6), ([0, 0, 1], [2] * 6),
    ):  # fmt: skip
        assert SamplesContrast(3, prior).fit(np.arange(10.0)).predict(new).tolist() == expected


def test_as_few_scores_as_classes_are_enough():
    assert SamplesContrast(3).fit_predict([3, 1, 2]).tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="3 classes need at least as many scores; got 2"):
        SamplesContrast(3).fit([1, 2])
    assert SamplesContrast(3, [0.5, 0.5, 0]).fit_predict([2, 1]).tolist() == [1, 0]
    with pytest.raises(ValueError, match="got 0"):
        SamplesContrast(2).fit([])


def test_scikit_learn_can_clone_set_and_cross_validate():
    contrast = SamplesContrast(n_classes=3, prior=[0.2, 0.3, 0.5])
    again = clone(contrast).set_params(n_classes=2, prior=None)
    assert again.get_params() == {"n_classes": 2, "prior": None}
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 30)
    X = rng.normal(size=60) + 4 * y
    assert cross_val_score(again, X[:, None], y, cv=3).mean() > 0.9
    assert contrast.fit(X) is contrast
    assert SamplesContrast(2).fit(X).predict([]).shape == (0,)
    with pytest.raises(NotFittedError):
        SamplesContrast().predict([1.0])


def test_bad_input():
    for value in (1, 0, -2):
        with pytest.raises(ValueError, match="n_classes must be at least 2"):
            SamplesContrast(value).fit([1, 2, 3])
    with pytest.raises(TypeError, match="n_classes"):
        SamplesContrast(2.5).fit([1, 2, 3])
    fitted = SamplesContrast(2).fit([1, 2, 3])
    for bad in (math.nan, math.inf, -math.inf):
        for call in (fitted.fit, fitted.predict, fitted.fit_predict):
            with pytest.raises(ValueError, match="finite; got .* at place 1"):
                call([1.0, bad, 2.0])
    for shape in ((2, 2), (), (3, 0)):
        with pytest.raises(ValueError, match="shape"):
            fitted.predict(np.zeros(shape))
    for text in (["a", "b"], [None, {}], torch.ones(3, requires_grad=True)):
        with pytest.raises(TypeError, match="numbers"):
            fitted.predict(text)
    for prior, kind in (
        ([0.5], ValueError), ([0.5, 0.6], ValueError), ([1.5, -0.5], ValueError), ([math.nan, 1], ValueError),
        ("ab", TypeError), ([[0.5, 0.5]], ValueError),
    ):  # fmt: skip
        with pytest.raises(kind, match="prior"):
            SamplesContrast(2, prior).fit([1, 2, 3])
