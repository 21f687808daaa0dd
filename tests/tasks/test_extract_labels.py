"""align_extract against the published recursion and exact greedy search; its rules, degenerate and hostile input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.tasks import align_extract, split_pieces
from kexue.tasks.extract_labels import align_pairs
from reference import spaces_rouge as reference

PIECES = st.lists(st.text("甲乙丙丁戊 ，", max_size=7), max_size=9)


@given(PIECES, PIECES)
@settings(max_examples=100, deadline=None)
def test_every_rule_agrees_with_its_definition(T, S):
    assert align_pairs(T, S) == reference.monotone(T, S)
    assert align_extract(T, S) == sorted({j for _, j in reference.monotone(T, S)})
    assert align_pairs(T, S, "independent") == reference.independent(T, S)
    assert align_extract(T, S, "independent") == sorted({j for _, j in reference.independent(T, S)})


@given(PIECES, PIECES)
@settings(max_examples=100, deadline=None)
def test_the_greedy_rule_agrees_with_exact_fractions(T, S):
    # Floats may order two sums that are equal as fractions, so the reached score is compared.
    def total(chosen):
        score = 0.0
        for n in (1, 2):
            have = {gram for j in chosen for gram in reference.grams(reference.characters(T[j]), n)}
            wanted = set(reference.grams(reference.characters("".join(S)), n))
            score += reference.f1(len(have & wanted), len(have), len(wanted))
        return score

    found = align_extract(T, S, "greedy")
    assert found == sorted(set(found))
    expected = reference.greedy(T, S)
    if len(expected) < 2:
        assert found == expected
    else:
        best = max(total([j]) for j in range(len(T)))
        assert total(found) >= best - 1e-12
        for j in set(range(len(T))) - set(found):  # nothing gains any more
            assert total([*found, j]) <= total(found) + 1e-12


@pytest.mark.parametrize("seed", range(10))
def test_the_greedy_rule_without_ties(seed):
    rng = np.random.default_rng(seed)
    letters = [chr(0x4E00 + i) for i in range(60)]
    T, S = (["".join(rng.choice(letters, n)) for n in rng.integers(3, 15, count)] for count in (25, 6))
    assert align_extract(T, S, "greedy") == reference.greedy(T, S)


def test_greedy_takes_the_pieces_that_gain():
    T = ["甲乙丙丁", "戊己庚辛", "甲乙", "壬癸", "庚辛"]
    assert align_extract(T, ["甲乙丙丁", "戊己庚辛"], "greedy") == [0, 1]
    assert align_extract(T, ["庚辛甲乙"], "greedy") == [2, 4] == reference.greedy(T, ["庚辛甲乙"])
    assert align_extract(T, ["甲乙丙丁", "戊"], "greedy", min_score=0.5) == [0]


def test_the_monotone_rule_never_crosses_and_the_independent_one_may():
    T, S = ["被告应当还款，", "原告诉称借款三万元，"], ["原告诉称借款三万元，", "被告应当还款，"]
    assert align_pairs(T, S, "independent") == [(0, 1), (1, 0)]
    assert align_pairs(T, S) == [(0, 1), (1, 1)]
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("甲乙丙丁戊己"), 6)) for _ in range(60)]
    places = [j for _, j in align_pairs(words[:40], words[40:])]
    assert places == sorted(places)


def test_one_piece_may_serve_several():
    assert align_extract(["无关", "甲乙丙丁"], ["甲乙", "丙丁"]) == [1]


def test_a_piece_without_anything_in_common_takes_the_first_unless_dropped():
    for rule in ("monotone", "independent"):
        assert align_extract(["甲", "乙"], ["丙丁"], rule) == [0]
        assert align_extract(["甲", "乙"], ["丙丁"], rule, min_score=1e-9) == []
        assert align_extract(["甲", "乙乙"], ["乙乙", "丙"], rule, min_score=0.1) == [1]
    assert align_extract(["甲", "乙"], ["丙丁"], "greedy") == []


def test_a_match_that_scores_exactly_the_minimum_stays():
    assert align_extract(["甲"], ["甲"], min_score=reference.main("甲", "甲")) == [0]


@pytest.mark.parametrize("rule", ["monotone", "independent", "greedy"])
def test_degenerate_input(rule):
    assert align_extract([], ["甲"], rule) == []
    assert align_extract(["甲"], [], rule) == []
    assert align_extract([], [], rule) == []
    assert align_extract(["甲乙"], ["甲乙"], rule) == [0]
    assert align_extract(iter(["", "甲乙"]), iter(["甲乙"]), rule) == [1]
    assert all(type(j) is int for j in align_extract(["甲", "乙"], ["甲", "乙"], rule))


@pytest.mark.parametrize("rule", ["monotone", "independent", "greedy"])
def test_words_and_token_lists(rule):
    T = ["the cat sat.", "a dog barked loudly.", "rain fell."]
    assert align_extract(T, ["Dog barked"], rule, unit="word") == [1]
    assert align_extract([t.split() for t in T], [["rain", "fell."]], rule) == [2]
    assert align_extract(T, ["rain fell."], rule, tokenizer=str.split) == [2]


def test_a_summary_of_many_pieces_needs_no_recursion():
    pieces = [f"{chr(0x4E00 + i)}{chr(0x4E00 + i + 1)}" for i in range(1500)]
    assert align_extract(pieces, pieces) == list(range(1500))


def test_pieces_of_a_document():
    document = split_pieces("原告诉称：被告向原告借款三万元，约定一年后偿还，被告至今未还。判决如下：被告偿还三万元。")
    assert align_extract(document, split_pieces("被告借款三万元，至今未还。判令偿还三万元。")) == [1, 3, 5]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("甲", ["甲"]), TypeError, "pieces must be an iterable of texts"),
        ((["甲"], "甲"), TypeError, "reference_pieces must be an iterable of texts"),
        (([1], ["甲"]), TypeError, "each of pieces must be a str or a list of tokens; got 1"),
        ((["甲"], ["甲"], "best"), ValueError, "rule must be one of 'monotone', 'independent', 'greedy'; got 'best'"),
        ((["甲"], ["甲"], "monotone", -1), ValueError, "min_score must be at least 0"),
        ((["甲"], ["甲"], "monotone", "a"), TypeError, "min_score must be a number"),
        ((["甲"], ["甲"], "monotone", float("nan")), ValueError, "min_score must be finite"),
        ((["甲"], ["甲"], "greedy", 0, "letter"), ValueError, "unit must be"),
    ],
)
def test_bad_input(arguments, error, words):
    with pytest.raises(error, match=words):
        align_extract(*arguments)
