"""The vocabulary of the summary generator: nothing of a text is lost, rare units have numbers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.tasks._summary_vocabulary import CLS, PAD, RARE, SEP, SPELL, SummaryVocabulary, units_of

TEXTS = [
    "The quick brown fox jumps over the lazy dog.", "The dog, however, sleeps (all day): 3.14 and 1,000.",
    "雪梨和苹果的颜色。雪梨、苹果，都是水果！", "苹果和雪梨的味道。", "numpy.ndarray sorts the array in place.",
]  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary():
    return SummaryVocabulary.learn(TEXTS * 2, min_count=4)


_TEXT = st.text(st.sampled_from("The dog雪梨苹果，。,.()\n\t \u3000a1é\ud800😀ก한"), max_size=30)


@settings(deadline=None, max_examples=300)
@given(source=st.one_of(_TEXT, st.text()), target=st.one_of(_TEXT, st.text()))
def test_every_text_comes_back_as_source_and_as_target(vocabulary, source, target):
    ids, rare = vocabulary.read(source)
    assert vocabulary.text(ids, rare) == source
    written, same = vocabulary.read(target, rare, grow=False)
    assert same == rare
    assert vocabulary.text(written, rare) == target
    assert not {PAD, CLS, SEP} & {*ids, *written}
    assert max([*ids, *written], default=0) < len(vocabulary)


def test_units_joined_are_the_text():
    for text in TEXTS:
        assert "".join(units_of(text, None)) == text


def test_usual_text_needs_no_marks_between_words(vocabulary):
    ids, rare = vocabulary.read("The dog, however, sleeps.")
    assert [vocabulary.text([i], rare) for i in ids] == ["The", "dog", ",", "however", ",", "sleeps", "."]


def test_full_width_punctuation_stays_full_width(vocabulary):
    ids, rare = vocabulary.read("苹果，雪梨！")
    assert vocabulary.text(ids, rare) == "苹果，雪梨！"


def test_a_rare_unit_has_the_same_number_in_source_and_target(vocabulary):
    ids, rare = vocabulary.read("The zebra and the yak and the zebra")
    assert rare[:1] == ["zebra"]
    assert ids.count(RARE) == 2
    target, _ = vocabulary.read("zebra", rare, grow=False)
    assert target == [RARE]


def test_a_rare_unit_that_the_source_lacks_is_spelled(vocabulary):
    target, rare = vocabulary.read("é", (), grow=False)
    assert rare == []
    assert target == [SPELL, 5 + 0xC3, 5 + 0xA9]


def test_more_rare_units_than_numbers_are_spelled():
    small = SummaryVocabulary({}, rare=2)
    ids, rare = small.read("aa bb cc dd aa")
    assert rare == ["aa", "bb"]
    assert ids.count(SPELL) == 2
    assert small.text(ids, rare) == "aa bb cc dd aa"


def test_what_a_model_may_write_is_passed_over_where_it_means_nothing(vocabulary):
    assert vocabulary.text([SPELL, 5 + 0xFF, RARE + 3, 5 + 65, SEP, SPELL], []) == "\ufffd"


def test_frequent_words_of_scripts_without_spaces_are_one_token():
    words = ["雪梨", "苹果", "香蕉", "葡萄"]
    texts = [a + link + b for a in words for link in "和与或" for b in words]
    ids, rare = SummaryVocabulary.learn(texts, min_count=4).read("苹果和雪梨")
    assert len(ids) == 3
    assert rare == []


def test_size_and_least_count_bound_the_vocabulary():
    small = SummaryVocabulary.learn(TEXTS * 2, size=330, min_count=1)
    assert len(small) == 330
    assert small.units[3:] == [".", ","]  # the most frequent, equal counts by name
    assert SummaryVocabulary.learn(["a a b"], min_count=2).units[3:] == ["a"]
    assert SummaryVocabulary.learn([], min_count=2).units[3:] == []


def test_the_vocabulary_survives_json(vocabulary):
    again = SummaryVocabulary.from_json(json.loads(json.dumps(vocabulary.to_json())))
    assert again.units == vocabulary.units
    for text in TEXTS:
        assert again.read(text) == vocabulary.read(text)
    for wrong in (
        None,
        {},
        {"counts": {"a": 0}, "rare": 1},
        {"counts": {"a": 1}, "rare": -1},
        {"counts": [], "rare": 2},
    ):
        with pytest.raises(ValueError, match="expected the vocabulary"):
            SummaryVocabulary.from_json(wrong)
