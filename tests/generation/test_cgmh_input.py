"""What CGMH refuses, and how it says so; lengths, starts, Ctrl-C."""

import signal

import numpy as np
import pytest
import torch
from torch import nn

from kexue.generation import CGMH, ContainsKeywords, LengthBetween, NGramLM, Target, transition_matrix
from kexue.models import KexueConfig, KexueForCausalLM


def flat(texts):
    return [0.0] * len(texts)


def make(keywords=((2,),), more=None, lm=flat, **options):
    constraint = ContainsKeywords([list(w) for w in keywords]) if keywords else None
    if more is not None:
        constraint = more if constraint is None else constraint & more
    return CGMH(Target(lm, constraint=constraint), **({"vocab": 4, "max_length": 5} | options))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"candidates": 0}, ValueError, "candidates must be at least 1; got 0"),
        ({"candidates": 2.5}, TypeError, "candidates"),
        ({"eps": -0.1}, ValueError, "eps"),
        ({"eps": 1.01}, ValueError, r"eps must be in \[0, 1\]; got 1.01"),
        ({"eps": float("nan")}, ValueError, "eps"),
        ({"n_chains": 0}, ValueError, "n_chains"),
        ({"max_length": 0}, ValueError, "max_length"),
        ({"max_length": 2, "min_length": 3}, ValueError, "min_length must be at most max_length = 2; got 3"),
        ({"keywords": ((2, 1, 3), (0, 0, 0))}, ValueError, "the keywords have 6 tokens, max_length is 5"),
        ({"vocab": []}, ValueError, "vocab must hold at least one id"),
        ({"vocab": 0}, ValueError, "vocab"),
        ({"vocab": [1, -1]}, ValueError, "vocab"),
        ({"vocab": None}, ValueError, "vocab must be given"),
        ({"vocab": "abc"}, TypeError, "vocab"),
        ({"proposal": 3}, TypeError, "proposal must be callable or None; got int"),
        ({"proposal": nn.Linear(2, 2)}, ValueError, "mask token is unknown"),
        ({"screen": "bigram"}, TypeError, "screen must be callable, 'next' or None; got 'bigram'"),
        ({"operations": {"insert": 0.5}}, ValueError, "must sum to 1; got 0.5"),
        ({"operations": {"insert": 0.5, "turn": 0.5}}, ValueError, "got 'turn'"),
        ({"operations": {"insert": 2, "delete": -1}}, ValueError, "probability of 'delete'"),
        ({"operations": [1, 0, 0]}, TypeError, "operations must be a dict"),
    ],
)
def test_arguments_out_of_range_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        make(**options)


def test_a_target_must_be_a_target():
    with pytest.raises(TypeError, match="target must be a kexue.generation.Target; got function"):
        CGMH(flat, vocab=4)


@pytest.mark.parametrize(
    ("start", "error", "words"),
    [
        ([1, 3], ValueError, "must contain the keywords"),
        ([2] * 6, ValueError, "must have 1 to 5 tokens; got 6"),
        ([2, 7], ValueError, "only the 4 allowed ids; got 7"),
        ([2, 1.5], TypeError, "sequence of integers"),
        ("2", TypeError, "init_ids"),
        ([[2], [2]], ValueError, "one start for each of the 1 chains; got 2"),
        (((2, 1), (1,)), ValueError, r"do not stand at \(1,\)"),
        (5, TypeError, "init_ids must be a sequence"),
    ],
)
def test_starts_that_cannot_be_are_refused(start, error, words):
    with pytest.raises(error, match=words):
        make().run(start, 5, 0, 1)


def test_a_start_without_probability_is_refused():
    for lm in (lambda texts: [-np.inf] * len(texts), NGramLM(np.log(np.eye(5)[[4, 4, 4, 4, 4]] + 1e-300))):
        sampler = make(lm=lm, more=lambda ids: len(ids) != 1)
        with pytest.raises(ValueError, match="rho > 0; got log rho = -inf"):
            sampler.run([2], 5, 0, 1)
    with pytest.raises(ValueError, match="rho > 0"):
        sampler.transitions(((2,), (0,)))


@pytest.mark.parametrize("numbers", [(-1, 0, 1), (5, 6, 1), (5, 0, 0), (5, -1, 1)])
def test_runs_of_impossible_length_are_refused(numbers):
    with pytest.raises(ValueError):
        make().run([2], *numbers)


def test_states_outside_the_sampler_are_refused():
    sampler = make()
    with pytest.raises(ValueError, match="allowed ids; got 4"):
        sampler.states(vocab=5)
    with pytest.raises(ValueError, match="at most 5"):
        sampler.states(max_length=6)
    with pytest.raises(ValueError, match="do not stand at"):
        sampler.transitions(((2, 1), (1,)))
    with pytest.raises(ValueError, match="not among the"):
        transition_matrix(sampler, sampler.states(max_length=2))


def test_states_may_be_fewer_words_or_shorter():
    sampler = make(keywords=())
    assert sampler.states(2, 2) == [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
    assert len(make().states([0, 1], 2)) == 5


@pytest.mark.parametrize(
    ("screen", "words"),
    [(lambda texts: [0.0], "numbers below"), (lambda texts: [np.nan] * len(texts), "numbers below"),
     (lambda texts: [-np.inf] * len(texts), "finite where rho > 0")],
)  # fmt: skip
def test_screens_that_return_nonsense_are_refused(screen, words):
    sampler = make(screen=screen, n_chains=3)
    with pytest.raises(ValueError, match=words):
        sampler.run([2], 20, 0, 1)


@pytest.mark.parametrize(
    "proposal",
    [
        lambda pairs: np.zeros((len(pairs), 3)),
        lambda pairs: np.zeros(4),
        lambda pairs: np.full((len(pairs), 4), np.nan),
    ],
)
def test_proposals_that_return_nonsense_are_refused(proposal):
    with pytest.raises(ValueError, match="proposal"):
        make(proposal=proposal).run([2], 20, 0, 1)


def test_a_context_that_excludes_every_word_gets_all_alike():
    sampler = make(proposal=lambda pairs: np.full((len(pairs), 4), -np.inf), candidates=2, eps=0.2)
    states = sampler.states(max_length=5)
    pi = np.full(len(states), 1 / len(states))
    assert np.abs(pi @ transition_matrix(sampler, states) - pi).max() < 1e-12


def test_lengths_come_from_the_constraint_and_the_model():
    sampler = make(more=LengthBetween(2, 4), max_length=None)
    assert (sampler.edits.low, sampler.edits.high) == (2, 4)
    assert make(max_length=None).edits.high == 32
    config = KexueConfig(9, 8, 1, 2, attn_mode="causal", max_position=10, bos_token_id=7)
    lm = KexueForCausalLM(config)
    assert CGMH(Target(lm)).edits.high == 9
    with pytest.raises(ValueError, match="at most 9, the positions of the language model; got 12"):
        CGMH(Target(lm), max_length=12)
    with pytest.raises(ValueError, match="below 9"):
        CGMH(Target(lm), vocab=10)
    rotary = KexueForCausalLM(KexueConfig(9, 8, 1, 2, attn_mode="causal", max_position=10, position="rope"))
    assert CGMH(Target(rotary), max_length=40).edits.high == 40
    with pytest.raises(ValueError, match="at least 1 for a language model without BOS"):
        CGMH(Target(rotary), min_length=0)


def test_an_empty_sentence_is_a_state_if_asked_for():
    lm = NGramLM(np.log(np.full((3, 3), 1 / 3)))
    sampler = CGMH(Target(lm), max_length=2, min_length=0)
    states = sampler.states()
    assert states[0] == ()
    pi = np.exp(sampler.target.log_rho(states))
    p = transition_matrix(sampler, states)
    assert np.abs(pi @ p - pi).max() < 1e-12
    assert () in sampler.run((), 100, 0, 1, progress=False).samples[0]


def test_an_empty_sentence_that_was_visited_can_be_the_best():
    lm = NGramLM(np.log([[0.1, 0.1, 0.8], [0.1, 0.1, 0.8], [0.05, 0.05, 0.9]]))
    result = CGMH(Target(lm), max_length=2, min_length=0).run([0], 200, 200, 1, progress=False)
    assert result.best == ()
    assert result.best_log_rho == pytest.approx(np.log(0.9))


def test_numpy_numbers_are_numbers_of_words():
    sampler = CGMH(Target(flat), vocab=np.int64(3), max_length=2)
    assert sampler.vocab.tolist() == [0, 1, 2]
    assert sampler.states(np.int64(2), 1) == [(0,), (1,)]


def test_keywords_outside_the_vocabulary_are_refused():
    lm = NGramLM(np.log(np.full((3, 3), 1 / 3)))
    with pytest.raises(ValueError, match="keywords must hold ids below 2.*got 7"):
        CGMH(Target(lm, constraint=ContainsKeywords([[1, 7]])))


def test_starts_of_every_form():
    sampler = make(n_chains=2)
    for start in ([2, 1], (2, 1), np.array([2, 1]), torch.tensor([2, 1]), [[2, 1], [2, 1]], torch.tensor([[2, 1]] * 2),
                  ((2, 1), (0,)), [((2, 1), (0,))] * 2):  # fmt: skip
        assert sampler.run(start, 0, 0, 1).state == [((2, 1), (0,))] * 2
    assert make(min_length=4).run(None, 0, 0, 1).lengths.shape == (1, 0)
    assert len(make(min_length=4).run(None, 0, 0, 1).state[0][0]) == 4
    assert len(make(keywords=()).run(None, 0, 0, 1).state[0]) == 1


def test_ctrl_c_keeps_what_there_is():
    calls = []

    def lm(texts):
        calls.append(len(texts))
        if len(calls) == 20:
            signal.raise_signal(signal.SIGINT)
        return [0.0] * len(texts)

    result = make(lm=lm, eps=1.0).run([2], 10_000, 0, 1, progress=False)
    assert result.interrupted
    assert 0 < result.log_rho.shape[1] < 10_000


def test_compiled_chains_stop_at_ctrl_c(monkeypatch):
    from kexue.generation import _ngram_chain

    monkeypatch.setattr(_ngram_chain, "_BLOCK", 10)
    recorded = _ngram_chain.TableChain._record

    def record(*arguments):
        signal.raise_signal(signal.SIGINT)
        recorded(*arguments)

    monkeypatch.setattr(_ngram_chain.TableChain, "_record", staticmethod(record))
    lm = NGramLM(np.log(np.full((5, 5), 0.2)))
    result = make(lm=lm).run([2], 1000, 0, 1, progress=False)
    assert result.interrupted
    assert result.log_rho.shape == (1, 10)
    np.testing.assert_allclose(result.log_rho[0], Target(lm).log_rho(result.samples[0]))


def test_ngram_tables_are_checked():
    for wrong in (np.zeros((2, 3)), np.zeros((2, 2)), np.log([0.5, 0.5]), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="table"):
            NGramLM(wrong)
    with pytest.raises(ValueError, match="below vocab_size = 2; got 2"):
        NGramLM.fit([[0, 2]], 2)
    with pytest.raises(ValueError, match="at least one text"):
        NGramLM.fit([], 2)
    with pytest.raises(ValueError, match="entries"):
        NGramLM.fit([[0]], 30_000, order=3)
    with pytest.raises(ValueError, match="below 2; got 5"):
        NGramLM.fit([[0, 1]], 2)([(5,)])


def test_ngram_model_is_smoothed_as_written_down():
    lm = NGramLM.fit([[0, 1], [1]], 2, order=2, smoothing=2.0)
    unigram = (np.array([1, 2, 2]) + 2 / 3) / 7  # words 0 and 1, and two ends
    expected = (np.array([0, 1, 0]) + 2 * unigram) / 3  # after 0 came 1 once
    np.testing.assert_allclose(np.exp(lm.table[0]), expected)
    assert lm([()])[0] == pytest.approx(lm.table[2, 2])
