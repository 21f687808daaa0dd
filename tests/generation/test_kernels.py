import math
from itertools import product

import numpy as np
import pytest

from kexue.generation import (
    Gibbs,
    Metropolis,
    MetropolisHastings,
    RandomEdit,
    ReplaceToken,
    ReplicaExchange,
    Target,
    run_chain,
    transition_matrix,
)
from reference import search_sampling as reference

V = 3
TABLE = np.random.default_rng(0).dirichlet(np.ones(V + 1) * 0.6, size=V + 1) * 0.9 + 0.1 / (V + 1)
FIXED = reference.texts(V, [3])
ALL = reference.texts(V, [1, 2, 3])


def lm(texts):
    return [reference.log_markov(text, TABLE) for text in texts]


def law(states, tau=1.0):
    return reference.law(np.array(lm(states)) / tau)


def check(kernel, states, pi):
    matrix = transition_matrix(kernel, states)
    assert matrix.dtype == np.float64
    assert (matrix >= 0).all()
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-13)
    assert np.abs(pi @ matrix - pi).max() < 1e-12
    np.testing.assert_allclose(reference.stationary(matrix), pi, atol=1e-9)  # and it is the only one
    return matrix


@pytest.mark.parametrize("tau", [1.0, 0.4, 3.0])
def test_metropolis_hastings_is_the_formula_and_keeps_the_target(tau):
    pi = law(FIXED, tau)
    matrix = check(MetropolisHastings(lm, ReplaceToken(V), tau), FIXED, pi)
    wanted = reference.hastings_matrix(FIXED, pi, reference.replace_matrix(FIXED, V))
    np.testing.assert_allclose(matrix, wanted, atol=1e-14)
    flux = pi[:, None] * matrix
    np.testing.assert_allclose(flux, flux.T, atol=1e-15)


def test_metropolis_of_the_article_is_the_formula_keeps_the_target_and_hardly_accepts():
    p = np.exp(lm(FIXED))  # below 1; sums to less than 1, which only makes it accept less
    article = transition_matrix(Metropolis(lm, ReplaceToken(V)), FIXED)
    q = reference.replace_matrix(FIXED, V)
    routes = np.where(q > 0, 1 / (3 * V), 0)  # one way back, not the three that lead nowhere
    np.testing.assert_allclose(article - np.diag(article.diagonal()), (q * routes * p) * (1 - np.eye(27)), atol=1e-14)
    pi = law(FIXED)
    assert np.abs(pi @ article - pi).max() < 1e-12
    hastings = transition_matrix(MetropolisHastings(lm, ReplaceToken(V)), FIXED)
    assert pi @ (1 - article.diagonal()) < 0.02 * (pi @ (1 - hastings.diagonal()))


def test_metropolis_refuses_a_target_above_one():
    with pytest.raises(ValueError, match="normalised"):
        transition_matrix(Metropolis(lambda texts: [5.0] * len(texts), ReplaceToken(V)), FIXED)


def test_edits_keep_the_target_over_several_lengths():
    check(MetropolisHastings(lm, RandomEdit(V, 1, 3)), ALL, law(ALL))
    states = [(), *ALL]
    check(MetropolisHastings(lm, RandomEdit(V, 0, 3)), states, law(states))


def test_forgetting_the_ratio_of_the_proposal_gives_another_law():
    class Forgetful(RandomEdit):
        def moves(self, state):
            return [(y, q, q) for y, q, _ in super().moves(state)]

    pi = law(ALL)
    matrix = transition_matrix(MetropolisHastings(lm, Forgetful(V, 1, 3)), ALL)
    assert np.abs(pi @ matrix - pi).max() > 1e-3


@pytest.mark.parametrize("block", [1, 2, 3])
def test_random_gibbs_is_the_mean_of_the_conditionals(block):
    pi = law(FIXED)
    matrix = check(Gibbs(lm, V, block=block), FIXED, pi)
    starts = range(3 - block + 1)
    wanted = np.mean([reference.gibbs_matrix(FIXED, pi, start, block) for start in starts], 0)
    np.testing.assert_allclose(matrix, wanted, atol=1e-14)


@pytest.mark.parametrize(("block", "starts"), [(1, [0, 1, 2]), (2, [0, 1]), (3, [0])])
def test_systematic_gibbs_is_the_product_of_the_conditionals(block, starts):
    pi = law(FIXED)
    matrix = check(Gibbs(lm, V, "systematic", block), FIXED, pi)
    wanted = np.eye(27)
    for start in starts:
        wanted = wanted @ reference.gibbs_matrix(FIXED, pi, start, block)
    np.testing.assert_allclose(matrix, wanted, atol=1e-14)


def test_gibbs_at_a_temperature_keeps_the_power_of_the_target():
    check(Gibbs(lm, V, tau=0.5), FIXED, law(FIXED, 0.5))


def test_replicas_keep_the_product_law_and_swap_the_right_way():
    singles = reference.texts(V, [1])
    states = list(product(singles, repeat=2))
    taus = (1.0, 3.0)
    pi = np.array([law(singles, 1.0)[a[0]] * law(singles, 3.0)[b[0]] for a, b in states])
    kernel = ReplicaExchange(lm, ReplaceToken(V), taus)
    check(kernel, states, pi)
    # The better state belongs to the colder replica.
    assert kernel.swap_acceptance(0, f_first=0.0, f_second=2.0) == 1.0
    assert kernel.swap_acceptance(0, f_first=2.0, f_second=0.0) == pytest.approx(math.exp(-(1 - 1 / 3) * 2))
    assert kernel.swap_acceptance(0, 1.0, 1.0) == 1.0


def test_constraint_keeps_the_chain_inside():
    target = Target(lm, constraint=lambda ids: 1 in ids)
    states = [state for state in ALL if 1 in state]
    check(MetropolisHastings(target, RandomEdit(V, 1, 3)), states, law(states))
    with pytest.raises(ValueError, match="rho > 0"):
        MetropolisHastings(target, ReplaceToken(V)).transitions((0, 0))


@pytest.mark.parametrize(
    "kernel",
    [
        MetropolisHastings(lm, ReplaceToken(V)),
        MetropolisHastings(lm, RandomEdit(V, 3, 3)),
        Gibbs(lm, V),
        Gibbs(lm, V, "systematic", 2),
        Metropolis(lambda texts: [x + 2 for x in lm(texts)], ReplaceToken(V)),
    ],
)
def test_step_has_the_law_that_transitions_say(kernel):
    start, count = (0, 1, 2), 6000
    wanted = transition_matrix(kernel, FIXED)[FIXED.index(start)]
    generator = np.random.default_rng(1)
    found = np.bincount([FIXED.index(kernel.step(start, generator)) for _ in range(count)], minlength=27) / count
    assert np.abs(found - wanted).max() < 5 * math.sqrt(0.25 / count)
    assert (found[wanted == 0] == 0).all()


def test_step_of_replicas_has_the_law_that_transitions_say():
    singles = reference.texts(V, [1])
    states, count = list(product(singles, repeat=2)), 6000
    kernel = ReplicaExchange(lm, ReplaceToken(V), (0.5, 2.0))
    wanted = transition_matrix(kernel, states)[1]
    generator = np.random.default_rng(1)
    found = np.bincount([states.index(kernel.step(states[1], generator)) for _ in range(count)], minlength=9) / count
    assert np.abs(found - wanted).max() < 5 * math.sqrt(0.25 / count)


@pytest.mark.slow
def test_long_chain_reaches_the_floor_of_independent_draws():
    pi, steps = law(ALL), 40_000
    target = Target(lm)
    chain = run_chain(MetropolisHastings(target, RandomEdit(V, 1, 3)), (0,), steps, 500, seed=2)
    drawn = np.random.default_rng(0).choice(len(ALL), steps, p=pi)
    floor = reference.total_variation([ALL[i] for i in drawn], ALL, pi)
    assert reference.total_variation(chain.samples, ALL, pi) < 3 * floor + 0.01
    assert target.evaluations == len(ALL)  # every text once


def test_chain_counts_thins_repeats_and_goes_on():
    kernel = MetropolisHastings(lm, ReplaceToken(V))
    whole = run_chain(kernel, (0, 0, 0), 50, burn_in=10, thin=4, seed=3)
    assert len(whole.samples) == 10
    again = run_chain(kernel, (0, 0, 0), 50, burn_in=10, thin=4, seed=3)
    assert whole.samples == again.samples
    generator = np.random.default_rng(3)
    first = run_chain(kernel, (0, 0, 0), 20, seed=generator)
    second = run_chain(kernel, first.state, 30, seed=generator)
    assert second.state == whole.state
    assert 0 < whole.moved < 1
    assert run_chain(kernel, (0, 0, 0), 0).samples == []


def test_interrupted_chain_keeps_its_samples():
    class Stops:
        def step(self, state, generator):
            if state == 7:
                raise KeyboardInterrupt
            return state + 1

    chain = run_chain(Stops(), 0, 100)
    assert chain.samples == [1, 2, 3, 4, 5, 6, 7]
    assert chain.interrupted


@pytest.mark.parametrize(
    ("kernel", "states", "error", "match"),
    [
        (lambda s: [(1 - s, 0.5), (s, 0.5)], [0], ValueError, "not among"),
        (lambda s: [(s, 0.9)], [0], ValueError, "sum to 1"),
        (lambda s: [(s, 1.5), (1 - s, -0.5)], [0, 1], ValueError, "at least 0"),
        (lambda s: [(s, math.nan)], [0], ValueError, "at least 0"),
        (lambda s: [(s, 1.0)], [], ValueError, "at least one"),
        (lambda s: [(s, 1.0)], [0, 0], ValueError, "twice"),
        (lambda s: [(s, 1.0)], [{}], TypeError, "hashable"),
        (3, [0], TypeError, "transitions"),
    ],
)
def test_matrix_refuses_what_is_no_transition_law(kernel, states, error, match):
    with pytest.raises(error, match=match):
        transition_matrix(kernel, states)


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda: MetropolisHastings(lm, ReplaceToken(V), tau=0.0), ValueError),
        (lambda: MetropolisHastings(lm, ReplaceToken(V), tau=-1.0), ValueError),
        (lambda: MetropolisHastings(lm, lambda x: x), TypeError),
        (lambda: MetropolisHastings(3, ReplaceToken(V)), TypeError),
        (lambda: Gibbs(lm, V, scan="odd"), ValueError),
        (lambda: Gibbs(lm, V, block=0), ValueError),
        (lambda: Gibbs(lm, 1000, block=3), ValueError),
        (lambda: Gibbs(lm, V, tau=0.0), ValueError),
        (lambda: Gibbs(lm, []), ValueError),
        (lambda: Gibbs(lm, V, block=4).transitions((0, 1, 2)), ValueError),
        (lambda: ReplicaExchange(lm, ReplaceToken(V), [1.0]), ValueError),
        (lambda: ReplicaExchange(lm, ReplaceToken(V), 1.0), TypeError),
        (lambda: ReplicaExchange(lm, ReplaceToken(V), [1.0, 0.0]), ValueError),
        (lambda: ReplicaExchange(lm, ReplaceToken(V), [1.0, 2.0]).transitions(((0,),)), ValueError),
        (lambda: ReplaceToken([1, 1]), ValueError),
        (lambda: ReplaceToken(0), ValueError),
        (lambda: ReplaceToken([0.5]), TypeError),
        (lambda: RandomEdit(V, 2, 1), ValueError),
        (lambda: RandomEdit(V, -1, 1), ValueError),
        (lambda: run_chain(3, 0, 1), TypeError),
        (lambda: run_chain(Gibbs(lm, V), (0,), 5, burn_in=6), ValueError),
        (lambda: run_chain(Gibbs(lm, V), (0,), 5, thin=0), ValueError),
        (lambda: Gibbs(lambda texts: [math.nan] * len(texts), V).transitions((0,)), ValueError),
        (lambda: Gibbs(lambda texts: [-math.inf] * len(texts), V).transitions((0,)), ValueError),
    ],
)
def test_bad_arguments(build, error):
    with pytest.raises(error):
        build()
