"""The law of CGMH, by the full transition matrix, and runs that follow it."""

import numpy as np
import pytest

from kexue.generation import CGMH, ContainsKeywords, LengthBetween, NGramLM, Target, run_chain, transition_matrix
from kexue.generation._ngram_chain import TableChain
from reference import cgmh as reference

V = 4


def table(v=V, seed=0):
    generator = np.random.default_rng(seed)
    p = generator.dirichlet(np.full(v + 1, 0.6), size=v + 1) + 0.02
    return np.log(p / p.sum(1, keepdims=True))


LM = NGramLM(table())


def target(keywords=None, ordered=False, lm=LM, more=None, **options):
    constraint = ContainsKeywords(keywords, ordered=ordered) if keywords else None
    if more is not None:
        constraint = more if constraint is None else constraint & more
    return Target(lm, constraint=constraint, **options)


def ids_of(states):
    return [s[0] if s and isinstance(s[0], tuple) else s for s in states]


def law(of, states):
    pi = np.exp(of.log_rho(ids_of(states)))
    return pi / pi.sum()


def assert_exact(sampler):
    states = sampler.states()
    assert len(states) > 1
    pi = law(sampler.target, states)
    p = transition_matrix(sampler, states)
    assert np.abs(pi @ p - pi).max() < 1e-12
    flow = pi[:, None] * p
    assert np.abs(flow - flow.T).max() < 1e-12  # detailed balance
    return p, states


KEYWORDS = {
    "none": (None, False),
    "one token": ([[2]], False),
    "two tokens": ([[2, 1]], False),
    "one token twice over": ([[2, 2]], False),
    "two, free": ([[2], [1]], False),
    "two, in order": ([[2], [1]], True),
    "the same twice": ([[2], [2]], False),
    "two and one token": ([[2, 1], [2]], False),
    "two and one token, in order": ([[2, 1], [1]], True),
    "three": ([[0], [1], [2]], False),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_stationary_law_for_keywords_of_every_kind(name):
    keywords, ordered = KEYWORDS[name]
    assert_exact(CGMH(target(keywords, ordered), vocab=V, max_length=4, candidates=2, eps=0.1))


@pytest.mark.parametrize("candidates", [1, 2, V, 99])
@pytest.mark.parametrize("eps", [0.0, 0.05, 1.0])
def test_stationary_law_for_every_number_of_candidates_and_share_of_uniform_draws(candidates, eps):
    assert_exact(CGMH(target([[2]]), vocab=V, max_length=4, candidates=candidates, eps=eps))


def contexts(seed):
    scores = np.random.default_rng(seed).normal(size=(V + 1, V + 1, V))
    return lambda pairs: [scores[left[-1] if left else V, right[0] if right else V] for left, right in pairs]


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"gamma": 0.3}, {}),
        ({"gamma": 0.0}, {}),
        ({"sim": lambda ids: 0.2 + ids.count(1)}, {}),
        ({"sim": lambda ids: float(ids.count(1))}, {"eps": 0.5}),  # some sentences are forbidden
        ({"more": LengthBetween(2, 3)}, {"max_length": None}),
        ({"more": lambda ids: ids[-1] != 0}, {}),
        ({}, {"min_length": 3}),
        ({}, {"min_length": 4, "operations": {"replace": 0.5, "swap": 0.4, "skip": 0.1}}),
        ({}, {"operations": {"insert": 0.1, "delete": 0.4, "replace": 0.2, "swap": 0.2, "skip": 0.1}}),
        ({}, {"operations": {"insert": 0.6, "delete": 0.4}}),
        ({}, {"proposal": contexts(1)}),
        ({}, {"proposal": contexts(2), "reweight": True}),
        ({}, {"screen": lambda texts: [0.3 * sum(t) - len(t) for t in texts]}),
        ({}, {"screen": target(lm=NGramLM(table(seed=5)))}),
        ({"lm": lambda texts: LM(texts)}, {}),
        ({"lm": NGramLM(np.log(np.full((V + 1,) * 3, 1 / (V + 1))))}, {}),  # every candidate ties
    ],
)
def test_stationary_law_with_relations_bounds_proposals_and_screens(options, settings):
    settings = {"max_length": 4, "candidates": 2, "eps": 0.1} | settings
    assert_exact(CGMH(target([[2]], **options), vocab=V, **settings))


@pytest.mark.slow
@pytest.mark.parametrize("keywords", [None, [[2]], [[1, 2]], [[2], [2, 3]]])
@pytest.mark.parametrize("ops", [(1 / 3, 1 / 3, 1 / 3), (0.5, 0.2, 0.3)])
def test_matrix_equals_the_reference(keywords, ops):
    words = [tuple(word) for word in keywords or []]
    for candidates, eps, low, gamma in ((2, 0.1, 1, 1.0), (V, 0.0, 2, 0.7)):
        operations = dict(zip(("insert", "delete", "replace"), ops, strict=True))
        sampler = CGMH(
            target(keywords, gamma=gamma), vocab=V, max_length=4, min_length=low, candidates=candidates, eps=eps,
            operations=operations,
        )  # fmt: skip
        states = sampler.states()
        pairs = states if keywords else [(ids, ()) for ids in states]
        total = max(low, sum(map(len, words)))
        assert sorted(pairs) == sorted(reference.all_states(V, total, 4, words, False))
        expected = reference.matrix(LM.table, pairs, words, 4, low, candidates, eps, gamma, ops)
        np.testing.assert_allclose(transition_matrix(sampler, states), expected, atol=1e-13)


@pytest.mark.slow
def test_every_state_can_be_reached_and_left():
    for keywords, ordered in KEYWORDS.values():
        sampler = CGMH(target(keywords, ordered), vocab=V, max_length=4, candidates=1, eps=0.1)
        p, _ = assert_exact(sampler)
        reach = np.linalg.matrix_power((p > 0).astype(float) + np.eye(len(p)), 64) > 0
        assert reach.all()


def test_fixed_length_needs_swaps_to_move_a_keyword_and_has_them():
    fixed = {"vocab": V, "max_length": 3, "min_length": 3}
    p, _ = assert_exact(CGMH(target([[2]]), operations={"replace": 0.5, "swap": 0.5}, **fixed))
    assert (np.linalg.matrix_power((p > 0).astype(float), 32) > 0).all()


def test_the_candidates_do_not_depend_on_the_word_that_stands_there():
    sampler = CGMH(target([[2]]), vocab=V, max_length=4, candidates=1, eps=0.0)
    best = {
        word: [y for (y, _), p in sampler.transitions(((word, 2), (1,))) if len(y) == 2 and y[0] != word and p > 0]
        for word in (0, 1, 3)
    }
    assert len({tuple(found) for found in best.values() if found}) <= 1


def empirical(result, states):
    place = {state: i for i, state in enumerate(states)}
    counts = np.zeros(len(states))
    for texts, starts in zip(result.samples, result.positions.tolist(), strict=True):
        for text, where in zip(texts, starts, strict=True):
            counts[place[(text, tuple(where)) if where else text]] += 1
    return counts / counts.sum()


def distance(result, sampler, thin):
    """Total variation to the law, in units of what as many draws with the chain's autocorrelation have on average."""
    states = sampler.states()
    pi = law(sampler.target, states)
    second = np.sort(np.abs(np.linalg.eigvals(transition_matrix(sampler, states))))[-2]
    draws = result.log_rho.size * min(1.0, thin * (1 - second) / (1 + second))
    floor = np.sqrt(pi * (1 - pi) / (2 * np.pi * draws)).sum()
    return 0.5 * np.abs(empirical(result, states) - pi).sum() / floor


@pytest.mark.slow
@pytest.mark.parametrize("order", [2, 3])
def test_compiled_run_follows_the_law(order):
    texts = [[0, 1, 2], [2, 2, 1], [1, 3], [3, 2, 0, 1]]
    lm = NGramLM.fit(texts, V, order, smoothing=0.5)
    sampler = CGMH(target([[2], [1, 2]], True, lm=lm, gamma=0.8), vocab=V, max_length=5, candidates=2, eps=0.1, seed=3)
    assert TableChain.fits(sampler)
    assert distance(sampler.run(None, 400_000, 1000, 8, progress=False), sampler, 8) < 1.3
    assert_exact(sampler)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"screen": target([[2]], gamma=0.5)}, {"proposal": contexts(1)}])
def test_general_run_follows_the_law(settings):
    settings = {
        "candidates": 2,
        "eps": 0.2,
        "operations": {"insert": 0.3, "delete": 0.3, "replace": 0.3, "swap": 0.1},
    } | settings
    sampler = CGMH(target([[2]]), vocab=V, max_length=3, n_chains=256, seed=5, **settings)
    assert not TableChain.fits(sampler)
    assert distance(sampler.run([2], 500, 50, 10, progress=False), sampler, 10) < 1.3


@pytest.mark.slow
def test_single_steps_follow_the_law():
    sampler = CGMH(target([[2]]), vocab=3, max_length=2, candidates=2, eps=0.2)
    states = sampler.states()
    chain = run_chain(sampler, states[0], 6000, 100, 1, seed=2, progress=False)
    counts = np.array([chain.samples.count(state) for state in states])
    assert 0.5 * np.abs(counts / counts.sum() - law(sampler.target, states)).sum() < 0.06


@pytest.mark.parametrize("proposal", [None, contexts(3)])
def test_equal_seeds_give_equal_runs_and_blocks_do_not_matter(proposal, monkeypatch):
    settings = {"vocab": V, "max_length": 6, "n_chains": 3, "candidates": 2, "proposal": proposal}
    first = CGMH(target([[2]]), seed=7, **settings).run([2], 200, 20, 3, progress=False)
    monkeypatch.setattr("kexue.generation._ngram_chain._BLOCK", 21)
    second = CGMH(target([[2]]), seed=7, **settings).run([2], 200, 20, 3, progress=False)
    assert first.samples == second.samples
    assert first.trace.tolist() == second.trace.tolist()
    assert first.samples != CGMH(target([[2]]), seed=8, **settings).run([2], 200, 20, 3, progress=False).samples


@pytest.mark.parametrize("proposal", [None, contexts(3)])
def test_results_agree_with_the_target_and_with_each_other(proposal):
    law_ = target([[2], [3, 1]], gamma=0.8, more=LengthBetween(0, 6))
    sampler = CGMH(
        law_,
        proposal,
        vocab=V,
        n_chains=5,
        candidates=2,
        seed=1,
        operations={"insert": 0.4, "delete": 0.4, "replace": 0.2},
    )  # fmt: skip
    result = sampler.run([2, 0, 3, 1], 300, 30, 7, progress=False)
    assert [len(chain) for chain in result.samples] == [38] * 5 == [result.log_rho.shape[1]] * 5
    for texts, values in zip(result.samples, result.log_rho, strict=True):
        np.testing.assert_allclose(values, law_.log_rho(texts), atol=1e-9)
        assert all(len(text) <= 6 for text in texts)
    assert result.best_log_rho == pytest.approx(law_.log_rho([result.best])[0])
    assert result.ranked(1)[0] == (result.best, result.best_log_rho)
    assert result.best_log_rho >= result.log_rho.max() - 1e-9
    assert sum(c["tried"] for c in result.counts.values()) == 300 * 5
    accepted = sum(c["accepted"] for c in result.counts.values())
    assert accepted == len(result.trace)
    assert all(0 <= rate <= 1 for rate in result.acceptance.values())
    # The trace replays the chains.
    texts = [[2, 0, 3, 1] for _ in range(5)]
    for edit in result.changes():
        text, i = texts[edit["chain"]], edit["position"]
        if edit["operation"] == "insert":
            text.insert(i, edit["new"])
        else:
            assert text[i] == edit["old"]
            text[i : i + 1] = [] if edit["operation"] == "delete" else [edit["new"]]
        assert edit["log_rho"] == pytest.approx(law_.log_rho([tuple(text)])[0])
    assert [tuple(text) for text in texts] == [state[0] for state in result.state]
    again = sampler.run(result.state, 10, 0, 1, progress=False)
    assert again.ids.shape[:2] == (5, 10)


def test_an_impossible_operation_leaves_the_state_and_counts_it():
    sampler = CGMH(target([[2]]), vocab=V, max_length=1)
    result = sampler.run([2], 50, 0, 1, progress=False)
    assert result.samples == [[(2,)] * 50]
    assert sum(c["impossible"] for c in result.counts.values()) == 50
    assert transition_matrix(sampler, sampler.states()).tolist() == [[1.0]]


def test_a_run_of_no_steps_and_one_that_keeps_nothing():
    sampler = CGMH(target([[2]]), vocab=V, max_length=3, n_chains=2)
    for steps, burn_in, thin in ((0, 0, 1), (5, 5, 1), (5, 0, 6)):
        result = sampler.run([2], steps, burn_in, thin, progress=False)
        assert result.samples == [[], []]
        assert result.log_rho.shape == (2, 0)


def test_no_trace_on_request():
    result = CGMH(target([[2]]), vocab=V, max_length=3).run([2], 50, 0, 1, progress=False, trace=False)
    assert len(result.trace) == 0
    assert sum(c["accepted"] for c in result.counts.values()) > 0
