"""TemplateMiner against listing every maximal path."""

import itertools
import json
import math
import pickle
import random
import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.words import Segmenter, Template, TemplateMiner, merge_gain
from kexue.words._display import join_words
from kexue.words._templates import skip_grams
from reference.templates import mine

FRUIT = ["雪梨", "苹果", "香蕉", "葡萄", "西瓜"]
QUESTIONS = [f"{fruit} 是 什么 意思" for fruit in FRUIT] + [f"请问 {fruit} 怎么 卖" for fruit in FRUIT]


@st.composite
def corpora(draw):
    words = "abcdefg"[: draw(st.integers(1, 7))]
    sentences = draw(st.lists(st.lists(st.sampled_from(words), max_size=9), min_size=1, max_size=12).filter(any))
    return sentences, {
        "window": draw(st.integers(1, 5)),
        "min_prob": draw(st.sampled_from([0.0, 1e-5, 0.02])),
        "min_pmi": draw(st.sampled_from([-1.0, 0.0, 0.3, 0.7])),
        "max_words": draw(st.sampled_from([2, 4, 12])),
    }


@pytest.mark.slow
@given(corpora(), st.integers(1, 3))
@settings(max_examples=300, deadline=None)
def test_supports_are_those_of_all_maximal_paths(corpus, min_support):
    sentences, options = corpus
    support, paths, _ = mine(sentences, **options)
    for count, expected in (("sentences", support), ("paths", paths)):
        found = TemplateMiner(min_support=min_support, count=count, **options).fit(sentences).templates_
        assert {t.pattern: t.support for t in found} == {p: n for p, n in expected.items() if n >= min_support}
        assert len({t.pattern for t in found}) == len(found)


@pytest.mark.slow
@given(corpora())
@settings(max_examples=200, deadline=None)
def test_fillers_are_the_blocks_in_the_holes_of_all_maximal_paths(corpus):
    sentences, options = corpus
    _, _, fillers = mine(sentences, **options)
    for template in TemplateMiner(min_support=1, **options).fit(sentences).templates_:
        for k in range(template.holes):
            expected = Counter(join_words(sentences[s][a:b]) for s, a, b in fillers[template.pattern, k])
            assert template.fillers(k) == expected
            assert list(template.fillers(k).values()) == sorted(expected.values(), reverse=True)


@given(corpora())
@settings(max_examples=100, deadline=None)
def test_gain_is_that_of_the_words_of_the_template(corpus):
    sentences, options = corpus
    words = Counter(word for sentence in sentences for word in sentence)
    total = sum(words.values())
    support, _, _ = mine(sentences, **options)
    for count in ("sentences", "paths"):
        for template in TemplateMiner(min_support=1, count=count, **options).fit(sentences).templates_:
            parts = Counter(word for word in template.pattern if word is not None)
            expected = merge_gain(
                support[template.pattern] / total, [words[w] / total for w in parts], list(parts.values())
            )
            assert template.gain == pytest.approx(expected, abs=1e-13)


def test_a_repeated_word_inside_the_window_counts_once_for_a_sentence_and_by_path_for_the_author():
    # Both b are bound to a and to c, not to each other: two paths give the same template.
    sentences = [["a", f"x{k}", "b", f"y{k}", "b", f"z{k}", "c"] for k in range(10)]
    options = {"min_pmi": 0.5, "min_prob": 0.02, "min_support": 1}
    by_sentence = {t.pattern: t.support for t in TemplateMiner(**options).fit(sentences).templates_}
    by_path = {t.pattern: t.support for t in TemplateMiner(count="paths", **options).fit(sentences).templates_}
    support, paths, _ = mine(sentences, min_pmi=0.5, min_prob=0.02)
    assert by_sentence == support
    assert by_path == paths
    assert by_sentence["a", None, "b", None, "c"] == 10
    assert by_path["a", None, "b", None, "c"] == 20


def test_order_is_support_then_gain_or_the_other_way_round():
    found = TemplateMiner(min_support=2, min_pmi=1.0).fit(QUESTIONS).templates_
    assert [(-t.support, -t.gain) for t in found] == sorted((-t.support, -t.gain) for t in found)
    assert [str(t) for t in found[:2]] == ["[X] 是 什么 意思", "请问 [X] 怎么 卖"]
    found = TemplateMiner(min_support=2, min_pmi=0.5, rank="gain").fit(QUESTIONS).templates_
    assert [(-t.gain, -t.support) for t in found] == sorted((-t.gain, -t.support) for t in found)


def test_the_order_of_the_sentences_does_not_matter():
    shuffled = random.Random(0).sample(QUESTIONS, len(QUESTIONS))
    first, second = (TemplateMiner(min_support=1, min_pmi=0.5).fit(texts).templates_ for texts in (QUESTIONS, shuffled))
    assert first == second


def test_trivial_templates_stay():
    sentences = [[f"x{k}", "的", f"y{k}"] for k in range(20)]
    found = TemplateMiner(min_support=10, min_pmi=5.0).fit(sentences).templates_
    assert [(t.pattern, t.support) for t in found] == [((None, "的", None), 20)]


def test_a_pair_of_exactly_the_least_probability_is_not_bound():
    # 10 pairs (a, b) among 500: a share of .02.
    sentences = [["a", "b"]] * 10 + [[f"x{k}", f"y{k}"] for k in range(490)]
    for least, expected in ((0.02, {("a", None), (None, "b")}), (0.0199, {("a", "b")})):
        found = TemplateMiner(min_prob=least, min_pmi=1.0).fit(sentences).templates_
        assert {t.pattern for t in found} == expected


def test_window_1_finds_phrases():
    sentences = [[f"x{k}", "new", "york", f"y{k % 7}", "z"] for k in range(30)]
    found = {
        t.pattern for t in TemplateMiner(window=1, min_support=20, min_prob=0.05, min_pmi=1.0).fit(sentences).templates_
    }
    assert (None, "new", "york", None) in found


def test_templates_longer_than_max_words_are_left_out():
    sentences = [list("abcdefgh")] * 5 + [list("ijklmnop")] * 5
    options = {"min_support": 1, "min_pmi": 0.5, "window": 1}
    assert {len(t.pattern) for t in TemplateMiner(max_words=8, **options).fit(sentences).templates_} == {8}
    assert TemplateMiner(max_words=7, **options).fit(sentences).templates_ == []


@pytest.mark.slow
def test_copies_of_a_long_sentence_end_with_a_warning_and_exact_supports():
    sentences = [[f"w{k}" for k in range(24)]] * 12 + [["u", "v"]] * 40
    full = TemplateMiner(min_pmi=1.0, max_words=24, window=2).fit(sentences)
    assert full.complete_ == 10
    with pytest.warns(RuntimeWarning, match="complete for support >= 13"):
        few = TemplateMiner(min_pmi=1.0, max_words=24, window=2, max_templates=50).fit(sentences)
    assert len(few.templates_) == 50
    assert few.complete_ == 13
    assert set(few.templates_) <= set(full.templates_)
    assert [t for t in few.templates_ if t.support >= 13] == [t for t in full.templates_ if t.support >= 13]


def test_a_cut_list_keeps_the_best():
    generator = random.Random(1)
    sentences = [[generator.choice("abcdefgh") for _ in range(7)] for _ in range(300)]
    options = {"min_pmi": 0.02, "min_support": 1, "window": 3}
    full = TemplateMiner(**options).fit(sentences)
    for limit in (1, 2, 10, 100, len(full.templates_) - 1):
        with pytest.warns(RuntimeWarning, match="complete"):
            few = TemplateMiner(max_templates=limit, **options).fit(sentences)
        assert [t for t in few.templates_ if t.support >= few.complete_] == [
            t for t in full.templates_ if t.support >= few.complete_
        ]
        assert set(few.templates_) <= set(full.templates_)
        assert len(few.templates_) <= limit
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TemplateMiner(max_templates=len(full.templates_), **options).fit(sentences).templates_ == full.templates_


def test_long_sentences_with_more_paths_than_any_number_end():
    # Fully linked within the window: 1.97 ** 600 paths.
    sentences = [[f"w{k}_{i % 3}" for k in range(600)] for i in range(30)]
    miner = TemplateMiner(min_support=10, min_pmi=1.0).fit(sentences)
    assert miner.templates_ == []
    with pytest.raises(ValueError, match=r"sentence 0 has .*e\+"):
        TemplateMiner(min_support=10, min_pmi=1.0, count="paths").fit(sentences)


def test_the_path_guard_names_the_sentence_and_its_count():
    # 2 ** 20 ways: pairs of words of which either is skipped. Window 2: fib-like; count by the reference recurrence.
    sentences = [["x", "y"]] + [[f"w{k}" for k in range(40)]] * 3
    ways = [1, 1]
    while len(ways) < 40:
        ways.append(ways[-1] + ways[-2])
    with pytest.raises(ValueError, match=rf"sentence 1 has {ways[-1]:.4g}".replace("+", r"\+")):
        TemplateMiner(window=2, min_support=1, min_pmi=0.5, count="paths").fit(sentences)


def test_pairs_are_counted_within_the_window_and_the_sentence():
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 9, 3000).astype(np.int32)
    offsets = np.array([0, 3, 3, 100, 101, 480, 500, 3000])
    expected = Counter(
        (int(ids[i]) << 32 | int(ids[j]))
        for a, b in itertools.pairwise(offsets)
        for i in range(a, b)
        for j in range(i + 1, min(b, i + 5))
    )
    keys, counts, total = skip_grams(ids, offsets, 4, 9, 0.0)
    assert dict(zip(keys.tolist(), counts.tolist(), strict=True)) == expected
    assert total == expected.total()
    keys, counts, total = skip_grams(ids, offsets, 4, 9, 0.013)
    frequent = {key: count for key, count in expected.items() if count / expected.total() > 0.013}
    assert 0 < len(frequent) < len(expected)
    assert dict(zip(keys.tolist(), counts.tolist(), strict=True)) == frequent


def test_texts_tokens_and_segmenters_give_the_same_templates():
    segmenter = Segmenter(dict.fromkeys([*FRUIT, "是", "什么", "意思", "请问", "怎么", "卖"], 5))
    options = {"min_support": 2, "min_pmi": 0.5}
    spaced = TemplateMiner(**options).fit(iter(QUESTIONS)).templates_
    tokens = TemplateMiner(**options).fit([text.split() for text in QUESTIONS]).templates_
    plain = TemplateMiner(tokenize=segmenter, **options).fit([text.replace(" ", "") for text in QUESTIONS]).templates_
    assert spaced == tokens == plain
    assert spaced[0].fillers(0) == Counter(FRUIT)


def test_odd_words_are_words_like_others():
    words = ["True", "1", "None", "[X]", "🙂", "é", "e\u0301", "a b", "的", "X"]
    sentences = [[word, "is", f"y{k}", "odd"] for k in range(12) for word in words]
    miner = TemplateMiner(min_pmi=-2.0, min_prob=0.0, min_support=1, max_words=12).fit(sentences)
    support, _, _ = mine(sentences, min_pmi=-2.0, min_prob=0.0)
    assert {t.pattern: t.support for t in miner.templates_} == support


def test_words_are_joined_as_their_script_asks():
    assert join_words(["new", "york", "city"]) == "new york city"
    assert join_words(["苹果", "的", "颜色"]) == "苹果的颜色"
    assert join_words(["苹果", "ok", "了"]) == "苹果ok了"
    assert join_words(["🙂", "a", " ", "b"]) == "🙂 a b"
    assert join_words([]) == ""


def test_one_word_and_empty_sentences():
    miner = TemplateMiner(min_support=1).fit(["", "a", " ", "a b", "a"])
    assert {t.pattern: t.support for t in miner.templates_}[("a",)] == 2
    template = next(t for t in miner.templates_ if t.pattern == ("a",))
    assert template.holes == 0
    with pytest.raises(ValueError, match="has 0 holes"):
        template.fillers(0)


def test_save_and_load(tmp_path):
    miner = TemplateMiner(min_support=2, min_pmi=0.5, window=4, max_words=6, count="paths", rank="gain").fit(QUESTIONS)
    path = tmp_path / "templates.json"
    miner.save(path)
    loaded = TemplateMiner.load(path, tokenize=str.split)
    assert loaded.templates_ == miner.templates_
    assert repr(loaded) == repr(miner)
    assert (loaded.complete_, loaded.total_) == (miner.complete_, miner.total_)
    with pytest.raises(ValueError, match="not saved with a template"):
        next(t for t in loaded.templates_ if t.holes).fillers(0)
    assert loaded.fit(QUESTIONS).templates_ == miner.templates_
    config = json.loads(path.read_text(encoding="utf-8"))
    for change in (
        {"format": "other"},
        {"version": 9},
        {"more": 1},
        {"settings": {}},
        {"templates": [["a"]]},
        {"templates": [[[1], 1, 1.0]]},
    ):
        path.write_text(json.dumps({**config, **change}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"expected|damaged"):
            TemplateMiner.load(path)
    with pytest.raises(ValueError, match="call fit"):
        TemplateMiner().save(path)


def test_pickled_templates_keep_their_fillers():
    template = TemplateMiner(min_support=2, min_pmi=0.5).fit(QUESTIONS).templates_[0]
    copy = pickle.loads(pickle.dumps(template))
    assert copy == template
    assert copy.fillers(0) == template.fillers(0)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"window": 0}, ValueError),
        ({"window": 2.0}, TypeError),
        ({"min_prob": math.nan}, ValueError),
        ({"min_prob": -1.0}, ValueError),
        ({"min_pmi": math.nan}, ValueError),
        ({"min_pmi": math.inf}, ValueError),
        ({"min_support": 0}, ValueError),
        ({"max_words": 0}, ValueError),
        ({"count": "path"}, ValueError),
        ({"rank": "best"}, ValueError),
        ({"max_templates": 0}, ValueError),
        ({"tokenize": "zh"}, TypeError),
    ],
)
def test_settings_out_of_range_are_refused(settings, error):
    with pytest.raises(error, match=next(iter(settings))):
        TemplateMiner(**settings)


@pytest.mark.parametrize(
    ("texts", "error"),
    [([], ValueError), (["", " "], ValueError), ([[]], ValueError), ("a b", TypeError), ([1], TypeError),
     ([["a", 1]], TypeError), ([["a"], "b"], TypeError), (None, TypeError), ([b"a"], TypeError)],
)  # fmt: skip
def test_other_input_is_refused(texts, error):
    with pytest.raises(error, match="expected|must be"):
        TemplateMiner().fit(texts)


def test_a_huge_window_and_bad_holes():
    miner = TemplateMiner(window=10**12, min_support=1, min_pmi=0.5).fit(QUESTIONS)
    assert {t.pattern: t.support for t in miner.templates_} == mine(
        [q.split() for q in QUESTIONS], window=99, min_pmi=0.5
    )[0]
    with pytest.raises(ValueError, match="numbered from 0; got 5"):
        miner.templates_[0].fillers(5)
    assert str(Template(("a", None, "b"), 3)) == "a [X] b"
