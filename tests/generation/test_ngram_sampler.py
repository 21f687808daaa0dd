from itertools import pairwise

import numpy as np
import pytest

from kexue.generation import NGramLM, NGramSampler
from reference import search_sampling as reference

V = 3
TABLE = np.random.default_rng(3).dirichlet(np.ones(V + 1) * 0.7, size=V + 1) * 0.9 + 0.1 / (V + 1)


def sampler(table, gamma=1.0):
    with np.errstate(divide="ignore"):
        return NGramSampler(NGramLM(np.log(table)), gamma)


def test_log_rho_is_the_power_of_the_model():
    texts = [(), *reference.texts(V, [1, 2, 3])]
    wanted = np.array([reference.log_markov(text, TABLE) for text in texts])
    np.testing.assert_allclose(sampler(TABLE, 0.5).log_rho(texts), wanted / 2, atol=1e-13)
    np.testing.assert_allclose(sampler(TABLE, 0.0)(texts), 0.0)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(("kernel", "lengths"), [("replace", [3]), ("gibbs", [3]), ("edit", [1, 2, 3])])
def test_compiled_chains_have_the_law_of_the_target(order, kernel, lengths):
    rng = np.random.default_rng(order)
    target = sampler(rng.dirichlet(np.ones(V + 1), size=(V + 1,) * (order - 1)), gamma=0.7)
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
    target = sampler(table)
    for kernel in ("edit", "gibbs", "replace"):
        texts = target.run((0, 1, 0), 5000, kernel=kernel, max_length=5).samples[0]
        assert all(a != b for text in texts for a, b in pairwise(text))


def test_runs_repeat_thin_and_keep_lengths():
    target = sampler(TABLE)
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
    from kexue.generation import ngram_sampler

    target = sampler(TABLE)
    whole = target.run((0, 1), 5000, 7, 3, "edit")
    monkeypatch.setattr(ngram_sampler, "_PIECE", 301)
    np.testing.assert_array_equal(target.run((0, 1), 5000, 7, 3, "edit").tokens, whole.tokens)


@pytest.mark.parametrize(
    "build",
    [
        lambda: sampler(TABLE, gamma=-1.0),
        lambda: sampler(TABLE).log_rho([(3,)]),
        lambda: sampler(TABLE).run((3,), 10),
        lambda: sampler(TABLE).run((0,), 10, kernel="best"),
        lambda: sampler(TABLE).run((0,), 10, burn_in=11),
        lambda: sampler(TABLE).run((0,), 10, thin=0),
        lambda: sampler(TABLE).run((0, 0, 0), 10, kernel="edit", max_length=2),
        lambda: sampler(TABLE).run((), 10, kernel="gibbs"),
        lambda: sampler(TABLE).run([(0,), (1,)], 10, n_chains=3),
        lambda: sampler([[0.0, 1.0], [1.0, 0.0]]).run((0, 0), 10),
    ],
)
def test_bad_arguments(build):
    with pytest.raises(ValueError):
        build()


def test_only_an_n_gram_model_is_taken():
    with pytest.raises(TypeError, match="NGramLM"):
        NGramSampler(TABLE)
