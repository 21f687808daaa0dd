from itertools import product
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kexue.generation import AllOf, BannedTokens, ContainsKeywords, LengthBetween, Target, keywords_of

TEXT = st.lists(st.integers(0, 2), max_size=7).map(tuple)
WORDS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=2).map(tuple), min_size=1, max_size=3)


def all_placements(text, words, ordered):
    """Every choice of starts that spells the words, disjoint; equal words in order."""
    found = []
    for starts in product(range(len(text)), repeat=len(words)):
        spans = [set(range(s, s + len(w))) for s, w in zip(starts, words, strict=True)]
        spelled = all(text[s : s + len(w)] == w for s, w in zip(starts, words, strict=True))
        disjoint = len(set().union(*spans)) == sum(map(len, spans))
        equal = all(
            starts[i] < starts[j] for i in range(len(words)) for j in range(i + 1, len(words)) if words[i] == words[j]
        )
        if spelled and disjoint and equal and (not ordered or list(starts) == sorted(starts)):
            found.append(starts)
    return found


@given(TEXT, WORDS, st.booleans())
def test_placements_are_all_disjoint_occurrences(text, words, ordered):
    constraint = ContainsKeywords(words, ordered=ordered)
    wanted = all_placements(text, words, ordered)
    assert sorted(constraint.placements(text)) == sorted(wanted)
    assert constraint(text) == bool(wanted)
    assert constraint(list(text)) == bool(wanted)


def test_same_keyword_twice_must_occur_twice():
    twice = ContainsKeywords([[1, 1], [1, 1]])
    assert not twice((1, 1, 1))
    assert list(twice.placements((1, 1, 1, 1))) == [(0, 2)]


class Letters:
    def __call__(self, text, add_special_tokens=True):
        return [0] * add_special_tokens + [ord(c) - 96 for c in text if c != "-"]

    def encode(self, text, add_special_tokens=True):
        return self(text, add_special_tokens)


class RustTokenizer:
    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return SimpleNamespace(ids=[7, 8])


@pytest.mark.parametrize("tokenizer", [Letters(), Letters().__call__, lambda text: [ord(c) - 96 for c in text]])
def test_strings_become_ids_without_special_tokens(tokenizer):
    assert ContainsKeywords(["ab", "c"], tokenizer).keywords == ((1, 2), (3,))
    assert ContainsKeywords(["ab"], RustTokenizer()).keywords == ((7, 8),)


def test_target_supplies_its_tokenizer_also_inside_a_composition():
    lm = lambda texts: [0.0] * len(texts)  # noqa: E731
    for constraint in (ContainsKeywords(["ab"]), LengthBetween(1, 4) & ContainsKeywords(["ab"])):
        target = Target(lm, constraint=constraint, tokenizer=Letters())
        assert target.allowed([(9, 1, 2), (2, 1)]).tolist() == [True, False]
        with pytest.raises(ValueError, match="tokenizer"):
            Target(lm, constraint=constraint)
    with pytest.raises(ValueError, match="greatest length"):
        Target(lm, constraint=LengthBetween(1, 1) & ContainsKeywords(["ab"]), tokenizer=Letters())


def test_composition_is_flat_and_takes_functions():
    constraint = (LengthBetween(1, 3) & BannedTokens([4])) & (lambda ids: ids[-1] == 2)
    assert len(constraint.parts) == 3
    assert constraint((1, 2))
    assert not constraint((1, 1))
    assert not constraint((4, 2))
    left = (lambda ids: len(ids) > 1) & LengthBetween(0)
    assert left((1, 2))
    assert not left((1,))
    assert keywords_of(None) is None
    assert keywords_of(lambda ids: True) is None
    with pytest.raises(ValueError, match="one list of keywords"):
        keywords_of(ContainsKeywords([[1]]) & ContainsKeywords([[2]]))


def test_lengths_include_their_bounds():
    assert [LengthBetween(1, 2)((0,) * n) for n in range(4)] == [False, True, True, False]
    assert LengthBetween(2)((0,) * 99)


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda: ContainsKeywords([]), ValueError),
        (lambda: ContainsKeywords([[]]), ValueError),
        (lambda: ContainsKeywords([""]), ValueError),
        (lambda: ContainsKeywords(["  "]), ValueError),
        (lambda: ContainsKeywords(["-"], Letters()), ValueError),
        (lambda: ContainsKeywords("good"), TypeError),
        (lambda: ContainsKeywords([1.5]), TypeError),
        (lambda: ContainsKeywords([[1.5]]), TypeError),
        (lambda: ContainsKeywords([[-1]]), ValueError),
        (lambda: ContainsKeywords(["a"], 3), TypeError),
        (lambda: LengthBetween(-1), ValueError),
        (lambda: LengthBetween(3, 2), ValueError),
        (lambda: LengthBetween(1.0), TypeError),
        (lambda: BannedTokens([-1]), ValueError),
        (lambda: BannedTokens(["a"]), TypeError),
        (lambda: AllOf(), ValueError),
        (lambda: AllOf(3), TypeError),
        (lambda: LengthBetween(1, 2) & ContainsKeywords([[1, 2], [3]]), ValueError),
    ],
)
def test_bad_arguments(build, error):
    with pytest.raises(error):
        build()
