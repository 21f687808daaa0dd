"""rouge and rouge_corpus against sets, counters and whole tables; the definitions of the packages; hostile input."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.tasks import rouge, rouge_corpus
from reference import spaces_rouge as reference

WORDS = st.lists(st.sampled_from(["的", "法律", "未成年人", "a", "bb"]), max_size=12)


def draw_texts(seed, longest, count=12, alphabet="甲乙丙丁戊己庚辛"):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(alphabet), n)) for n in rng.integers(0, longest, count)]


@pytest.mark.parametrize("unique", [True, False])
@pytest.mark.parametrize("longest", [3, 60, 300])
def test_characters_agree_with_sets_counters_and_the_whole_table(longest, unique):
    for h, r in zip(draw_texts(1, longest), draw_texts(2, longest), strict=True):
        assert rouge(h, r, unique=unique) == reference.rouge(list(h), list(r), unique)


@given(WORDS, WORDS, st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_token_lists_agree_with_the_definition_weighted_or_not(h, r, unique, weighted):
    assert rouge(h, r, unique=unique, weight="chars" if weighted else None) == pytest.approx(
        reference.rouge(h, r, unique, weighted), abs=1e-15
    )


@pytest.mark.parametrize("m", [1, 63, 64, 65, 128, 129, 300])
@pytest.mark.parametrize("n", [1, 64, 127, 190])
def test_subsequence_across_words_of_64_positions(m, n):
    rng = np.random.default_rng(m * 1000 + n)
    h, r = rng.integers(0, 4, m).tolist(), rng.integers(0, 4, n).tolist()
    expected = reference.subsequence(h, r)
    scores = rouge_corpus([h], [r])
    assert scores["rouge-l-precision"][0] == expected / m
    assert scores["rouge-l-recall"][0] == expected / n


def test_a_carry_runs_through_many_words():
    assert rouge("甲" * 1000, "甲" * 999)["rouge-l"] == reference.f1(999, 1000, 999)
    assert rouge("甲" * 500 + "乙" * 500, "乙" * 500 + "甲" * 500)["rouge-l"] == 0.5


def test_the_law_name_of_the_article():
    assert rouge("中国人民共和国文物保护法", "中国人民共和国未成年人保护法")["rouge-l"] == pytest.approx(20 / 26)
    law = "中国人民共和国未成年人保护法"
    words = ["根据", "《", law, "》", "的", "有关", "规定"]
    plain = rouge_corpus([[law]], [words], "word")
    heavy = rouge_corpus([[law]], [words], "word", weight="chars")
    for name in ("rouge-1-recall", "rouge-l-recall"):
        assert plain[name][0] == 1 / 7
        assert heavy[name][0] == 14 / 23
    assert rouge(["中国人民共和国文物保护法"], [law], "word", weight="chars")["main"] == 0


def test_a_weighted_pair_of_words_counts_the_characters_of_both():
    scores = rouge_corpus([["甲", "乙丙", "丁"]], [["甲", "乙丙", "戊己庚"]], weight="chars")
    assert scores["rouge-2-precision"][0] == 3 / 6  # 甲乙丙 of 甲乙丙 and 乙丙丁
    assert scores["rouge-2-recall"][0] == 3 / 8


def test_the_heaviest_subsequence_is_not_the_longest():
    # 甲 乙 are two words, 中华人民 is one: it wins by weight.
    scores = rouge_corpus([["甲", "乙", "中华人民"]], [["中华人民", "甲", "乙"]], weight="chars")
    assert scores["rouge-l-precision"][0] == 4 / 6


def test_values_of_the_packages():
    # rouge 1.0.1 (sets) and rouge_score 0.1.2 (counts) on the same characters.
    h, r = "甲甲乙丙甲乙", "甲乙乙丁"
    sets, counts = rouge(h, r), rouge(h, r, unique=False)
    assert (sets["rouge-1"], sets["rouge-2"]) == (pytest.approx(2 / 3), pytest.approx(2 / 7))
    assert (counts["rouge-1"], counts["rouge-2"], counts["rouge-l"]) == (0.6, 0.25, 0.6)


def test_one_side_without_tokens_scores_zero():
    zero = dict.fromkeys(("rouge-1", "rouge-2", "rouge-l", "main"), 0.0)
    for h, r in (("", ""), ("", "甲"), ("甲", ""), (" \n", "甲"), ([], ["a"])):
        for weight in (None, "chars"):
            assert rouge(h, r, weight=weight) == zero
    assert rouge([""], [""], weight="chars") == zero  # a token of no weight
    assert rouge("甲", "甲") == {"rouge-1": 1.0, "rouge-2": 0.0, "rouge-l": 1.0, "main": pytest.approx(0.6)}
    assert all(type(value) is float for value in rouge("甲", "乙").values())


def test_white_space_is_no_character_and_a_full_stop_is_one():
    assert rouge("甲 乙\n丙\u3000", "甲乙丙")["main"] == 1
    assert rouge("甲.乙", "甲乙")["rouge-1"] == 0.8
    assert rouge("e\u0301", "\u00e9")["main"] == 0  # code points
    assert rouge("\ud800甲😀", "\ud800甲😀")["main"] == 1


@pytest.mark.slow  # loads jieba's dictionary
def test_words_without_spaces_are_jiebas_and_others_are_lower_case():
    pytest.importorskip("jieba")
    # 我 爱 北京 天安门, 我 爱 天安门
    assert rouge("我爱北京天安门", "我爱天安门", "word")["rouge-1"] == pytest.approx(6 / 7)
    assert rouge("The CAT, 3 cats!", "the cat -- 3 dogs", "word")["rouge-1"] == 0.75
    assert rouge("snake_case", "snake case", "word")["main"] == 1
    assert rouge("हिन्दी भाषा", "हिन्दी", "word")["rouge-1"] == pytest.approx(2 / 3)


def test_words_of_chinese_need_jieba_or_a_tokenizer(monkeypatch):
    from kexue.words import _jieba

    monkeypatch.setitem(sys.modules, "jieba", None)
    _jieba._load.cache_clear()
    with pytest.raises(ImportError, match="zh.*tokenizer of your own"):
        rouge("今天", "今天", "word")
    assert rouge("today", "today!", "word")["rouge-1"] == 1
    assert rouge("今天 下雨", "今天 下雪", "word", tokenizer=str.split)["rouge-1"] == 0.5
    _jieba._load.cache_clear()


def test_a_tokenizer_must_return_tokens():
    for found in (None, 3):
        with pytest.raises(TypeError, match=f"tokenizer must return an iterable of tokens; got {found}"):
            rouge("a", "a", tokenizer=lambda text, found=found: found)


def test_a_tokenizer_cuts_texts_and_leaves_lists():
    assert rouge("a b c", ["a", "b", "d"], tokenizer=str.split)["rouge-1"] == pytest.approx(2 / 3)
    assert rouge("abc", ["a", "b", "c"])["main"] == pytest.approx(1)
    assert rouge(np.array([1, 2, 3]), (1, 2, 3))["main"] == pytest.approx(1)


def test_a_corpus_is_its_pairs():
    h, r = draw_texts(3, 90, 40), draw_texts(4, 90, 40)
    h[0], r[1] = "", ""
    scores = rouge_corpus(h, r)
    for name in ("rouge-1", "rouge-2", "rouge-l", "main"):
        assert scores[name].tolist() == [rouge(a, b)[name] for a, b in zip(h, r, strict=True)]
        assert scores[name].dtype == np.float64
    again = rouge_corpus(iter(h), iter(r))
    assert all((again[name] == scores[name]).all() for name in scores)
    assert all(value.shape == (0,) for value in rouge_corpus([], []).values())


def test_a_corpus_is_numbered_in_batches(monkeypatch):
    from kexue.tasks import rouge_metric

    h, r = draw_texts(5, 90, 40), draw_texts(6, 90, 40)
    whole = rouge_corpus(h, r)
    monkeypatch.setattr(rouge_metric, "_BATCH", 100)
    parts = rouge_corpus(h, r)
    assert all((whole[name] == parts[name]).all() for name in whole)


def test_n_grams_of_huge_vocabularies_are_sorted_by_two_keys(monkeypatch):
    from kexue.tasks import _rouge_tokens

    grams = np.array([2**62, 1, 2**62, 5], np.int64)
    found, rows = _rouge_tokens._sorted_grams(grams, np.array([0, 0, 1, 1]), 2, True)
    assert found.tolist() == [1, 2**62, 5, 2**62]
    assert rows.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((None, "a"), TypeError, "hypothesis must be a str or a list of tokens; got None"),
        (("a", b"a"), TypeError, "reference must be a str"),
        (({"a"}, "a"), TypeError, "hypothesis must be"),
        (([["a"]], "a"), TypeError, "hashable"),
        (("a", "a", "letter"), ValueError, "unit must be one of 'char', 'word'; got 'letter'"),
        (("a", "a", "char", 2), TypeError, "unique must be True or False; got 2"),
        (("a", "a", "char", True, "words"), ValueError, "weight must be"),
        (([1], [1], "word", True, "chars"), TypeError, "needs tokens that are str; got 1"),
        (("a", "a", "char", True, None, "x"), TypeError, "tokenizer must be a function"),
    ],
)
def test_bad_input(arguments, error, words):
    with pytest.raises(error, match=words):
        rouge(*arguments)


def test_bad_corpora():
    with pytest.raises(ValueError, match="got 1 and 2"):
        rouge_corpus(["a"], ["a", "b"])
    with pytest.raises(TypeError, match="hypotheses must be an iterable of texts"):
        rouge_corpus("a", ["a"])
