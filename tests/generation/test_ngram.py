import math
from itertools import pairwise

import numpy as np
import pytest

from kexue.generation import NGramTarget, Target
from reference import search_sampling as reference

V = 3
TABLE = np.random.default_rng(3).dirichlet(np.ones(V + 1) * 0.7, size=V + 1) * 0.9 + 0.1 / (V + 1)


def test_bigram_is_the_markov_chain():
    texts = [(), *reference.texts(V, [1, 2, 3])]
    wanted = [reference.log_markov(text, TABLE) for text in texts]
    np.testing.assert_allclose(NGramTarget(TABLE).log_p(texts), wanted, atol=1e-13)
    np.testing.assert_allclose(NGramTarget(TABLE, 0.5).log_rho(texts), np.array(wanted) / 2, atol=1e-13)
    np.testing.assert_allclose(Target(NGramTarget(TABLE)).log_rho(texts), wanted, atol=1e-13)


def test_probabilities_of_all_texts_sum_to_one():
    ends = np.array([[0.1, 0.1, 0.8], [0.1, 0.1, 0.8], [0.5, 0.4, 0.1]])
    texts = [(), *reference.texts(2, range(1, 12))]
    assert np.exp(NGramTarget(ends).log_p(texts)).sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "lengths"), [("replace", [3]), ("gibbs", [3]), ("edit", [1, 2, 3])])
def test_compiled_chains_have_the_law_of_the_target(order, kernel, lengths):
    rng = np.random.default_rng(order)
    target = NGramTarget(rng.dirichlet(np.ones(V + 1), size=(V + 1,) * (order - 1)), gamma=0.7)
    states = reference.texts(V, lengths)
    pi = reference.law(target.log_rho(states))
    chains = target.run((0,) * lengths[0], 400_000, 1000, 10, kernel, n_chains=2, max_length=3, seed=1)
    samples = [text for texts in chains.samples for text in texts]
    drawn = rng.choice(len(states), len(samples), p=pi)
    floor = reference.total_variation([states[i] for i in drawn], states, pi)
    assert reference.total_variation(samples, states, pi) < 2 * floor + 0.003
    assert chains.acceptance == 1 if kernel == "gibbs" else 0 < chains.acceptance < 1


def test_forbidden_transitions_are_never_made():
    table = np.array([[0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]])  # no token twice in a row
    target = NGramTarget(table)
    for kernel in ("edit", "gibbs", "replace"):
        texts = target.run((0, 1, 0), 5000, kernel=kernel, max_length=5).samples[0]
        assert all(a != b for text in texts for a, b in pairwise(text))


def test_runs_repeat_thin_and_keep_lengths():
    target = NGramTarget(TABLE)
    first = target.run((0,), 1000, 100, 9, "edit", n_chains=3, max_length=4, min_length=1, seed=5)
    second = target.run((0,), 1000, 100, 9, "edit", n_chains=3, max_length=4, min_length=1, seed=5)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    assert first.tokens.shape == (3, 100, 4)
    assert first.lengths.min() >= 1
    assert first.lengths.max() <= 4
    assert first.samples[0] != first.samples[1]
    assert first.states == [texts[-1] for texts in first.samples]
    assert all(len(text) == n for text, n in zip(first.samples[2], first.lengths[2], strict=True))
    empty = target.run((), 50, kernel="edit", min_length=0, max_length=2)
    assert () in empty.samples[0]
    assert target.run((), 5).samples == [[()] * 5]


def test_a_run_in_pieces_is_the_same_run(monkeypatch):
    from kexue.generation import ngram

    target = NGramTarget(TABLE)
    whole = target.run((0, 1), 5000, 7, 3, "edit")
    monkeypatch.setattr(ngram, "_PIECE", 301)
    np.testing.assert_array_equal(target.run((0, 1), 5000, 7, 3, "edit").tokens, whole.tokens)


def test_fit_counts_with_smoothing():
    target = NGramTarget.fit([(0, 1), (0, 1, 0)], order=2, smoothing=0.5, gamma=2.0)
    counts = np.array([[0, 2, 1], [1, 0, 1], [2, 0, 0]]) + 0.5
    np.testing.assert_allclose(target.probs, counts / counts.sum(1, keepdims=True))
    assert target.gamma == 2.0
    trigram = NGramTarget.fit([(0, 1), (0, 1, 0)], order=3, vocab_size=4)
    assert trigram.probs.shape == (5, 5, 5)
    assert trigram.probs[4, 0].argmax() == 1


@pytest.mark.parametrize(
    "build",
    [
        lambda: NGramTarget([[0.5, 0.5], [0.5, 0.6]]),
        lambda: NGramTarget([[0.5, 0.5]]),
        lambda: NGramTarget([[1.5, -0.5], [0.5, 0.5]]),
        lambda: NGramTarget([[math.nan, 0.5], [0.5, 0.5]]),
        lambda: NGramTarget([1.0]),
        lambda: NGramTarget(TABLE, gamma=-1.0),
        lambda: NGramTarget(TABLE).log_p([(3,)]),
        lambda: NGramTarget(TABLE).run((3,), 10),
        lambda: NGramTarget(TABLE).run((0,), 10, kernel="best"),
        lambda: NGramTarget(TABLE).run((0,), 10, burn_in=11),
        lambda: NGramTarget(TABLE).run((0,), 10, thin=0),
        lambda: NGramTarget(TABLE).run((0, 0, 0), 10, kernel="edit", max_length=2),
        lambda: NGramTarget(TABLE).run((), 10, kernel="gibbs"),
        lambda: NGramTarget(TABLE).run([(0,), (1,)], 10, n_chains=3),
        lambda: NGramTarget([[0.0, 1.0], [1.0, 0.0]]).run((0, 0), 10),
        lambda: NGramTarget.fit([]),
        lambda: NGramTarget.fit([(5,)], vocab_size=5),
        lambda: NGramTarget.fit([(5,)], smoothing=0.0),
        lambda: NGramTarget.fit([(5,)], vocab_size=30000, order=3),
    ],
)
def test_bad_arguments(build):
    with pytest.raises(ValueError):
        build()
