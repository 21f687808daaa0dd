"""PhraseMiner against counting with dictionaries and trying every way to join."""

import itertools
import json
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.words import PhraseMiner, merge_gain

CITY = [
    "she moved to new york city",
    "new york city is large",
    "he left new york",
    "machine learning is not magic",
    "she likes machine learning",
    "he is in new york for machine learning",
]
token_lists = st.lists(st.lists(st.sampled_from(["a", "b", "c", "ha"]), max_size=10), min_size=1, max_size=10).filter(
    any
)


def split(lines):
    return [line.split() for line in lines]


def count(sentences, gram):
    """Occurrences that do not overlap, from the left."""
    found, n = 0, len(gram)
    for sentence in sentences:
        i = 0
        while i + n <= len(sentence):
            hit = tuple(sentence[i : i + n]) == gram
            found += hit
            i += n if hit else 1
    return found


def slow_phrases(sentences, min_count, min_gain, max_length, min_npmi):
    """Gram -> (gain, count, by how much it passes the hardest test)."""
    total = sum(map(len, sentences))
    grams = {tuple(s[i : i + n]) for s in sentences for n in range(2, max_length + 1) for i in range(len(s) - n + 1)}
    found = {}
    for gram in grams:
        c = count(sentences, gram)
        if c < min_count:
            continue
        words = Counter(gram)
        whole = merge_gain(c / total, [count(sentences, (w,)) / total for w in words], list(words.values()))
        margins = [whole - min_gain]
        for cut in range(1, len(gram)):
            halves = Counter([gram[:cut], gram[cut:]])
            counts = [count(sentences, half) for half in halves]
            gain = merge_gain(c / total, [k / total for k in counts], list(halves.values()))
            close = math.log(total * c) - sum(m * math.log(k) for m, k in zip(halves.values(), counts, strict=True))
            margins += [gain - min_gain, close - min_npmi * math.log(total / c)]
        found[gram] = whole, c, min(margins)
    return found


@pytest.mark.slow
@given(
    token_lists, st.integers(1, 3), st.integers(2, 5), st.sampled_from([0.0, 0.01, -1.0]), st.sampled_from([-1, 0.371])
)
@settings(max_examples=200, deadline=None)
def test_phrases_are_those_of_the_definition(sentences, min_count, max_length, min_gain, min_npmi):
    miner = PhraseMiner(min_count, min_gain, max_length, min_npmi).fit(sentences)
    expected = slow_phrases(sentences, min_count, min_gain, max_length, min_npmi)
    assert miner.phrases_.keys() <= expected.keys()
    for gram, (gain, times, margin) in expected.items():
        if abs(margin) > 1e-12:  # exactly on the border it may fall to either side in floating point
            assert (gram in miner.phrases_) == (margin > 0)
        if gram in miner.phrases_:
            assert miner.phrases_[gram] == pytest.approx(gain, abs=1e-12)
            assert miner.counts_[gram] == times
    gains = list(miner.phrases_.values())
    assert gains == sorted(gains, reverse=True)


@pytest.mark.slow
@given(token_lists, st.lists(st.sampled_from(["a", "b", "c", "ha", "new", ""]), max_size=9))
@settings(max_examples=200, deadline=None)
def test_joining_loses_nothing_and_saves_most(sentences, tokens):
    miner = PhraseMiner(min_count=1, min_npmi=0.0).fit(sentences)
    joined = miner.transform(tokens)
    assert "_".join(joined) == "_".join(tokens)
    saving = {"_".join(p): g * miner.total_ / miner.counts_[p] for p, g in miner.phrases_.items()}

    def saved(borders):
        parts = [tuple(tokens[i:j]) for i, j in itertools.pairwise([0, *borders, len(tokens)])]
        if any(len(part) > 1 and part not in miner.phrases_ for part in parts):
            return -math.inf
        return sum(saving["_".join(part)] for part in parts if len(part) > 1)

    ways = (c for k in range(len(tokens)) for c in itertools.combinations(range(1, len(tokens)), k))
    best = max((saved(way) for way in ways), default=0.0)
    assert sum(saving.get(word, 0.0) for word in joined) == pytest.approx(best, abs=1e-9)


def test_english_phrases_with_default_settings():
    lines = CITY * 10
    phrases = PhraseMiner().fit(split(lines)).phrases_
    assert ("new", "york") in phrases
    assert ("machine", "learning") in phrases
    assert ("new", "york", "city") in phrases
    joined = (
        PhraseMiner(max_length=2)
        .fit(split(lines))
        .transform(["we", "like", "new", "york", "for", "machine", "learning"])
    )
    assert joined == ["we", "like", "new_york", "for", "machine_learning"]


def test_frequent_words_that_are_independent_make_no_phrase():
    words = list(itertools.product(["of", "in", "to"], ["the", "a", "all"]))
    assert PhraseMiner().fit([list(pair) for pair in words * 20]).phrases_ == {}


def test_a_longer_phrase_must_earn_each_of_its_words():
    before = ["of", "in", "to", "from", "near", "for", "with", "by", "at", "on"]
    lines = [[word, "new", "york"] for word in before for _ in range(10)]
    assert list(PhraseMiner(min_npmi=0.5).fit(lines).phrases_) == [("new", "york")]


def test_repeated_words_do_not_overlap_themselves():
    miner = PhraseMiner(min_count=1, min_npmi=-1, min_gain=-1).fit([["ha", "ha", "ha"], ["ho", "hi"]])
    assert miner.counts_[("ha", "ha")] == 1
    assert miner.phrases_[("ha", "ha")] == pytest.approx(merge_gain(1 / 5, [3 / 5], [2]))
    rare = PhraseMiner(min_count=1, max_length=2).fit([["ha", "ha"], *([word] for word in "abcdefghijklmno")])
    assert rare.transform(["ha"] * 5) == ["ha_ha", "ha_ha", "ha"]


def test_phrases_do_not_cross_sentences():
    miner = PhraseMiner(min_count=2).fit([["x", "new"], ["york", "y"], ["z", "new"], ["york", "u"]])
    assert ("new", "york") not in miner.phrases_


def test_several_sentences_and_generators():
    miner = PhraseMiner(min_count=5, max_length=2).fit(line.split() for line in CITY * 5)
    sentences = split(CITY[:2])
    assert miner.transform(sentences) == [miner.transform(sentence) for sentence in sentences]
    assert miner.transform([]) == []
    assert miner.transform(["new"]) == ["new"]
    assert miner.transform(["🙂", "é", "new", "york", "a b"]) == ["🙂", "é", "new_york", "a b"]


def test_save_and_load(tmp_path):
    miner = PhraseMiner(min_count=3, min_gain=1e-4, max_length=3, min_npmi=0.2).fit(split(CITY * 3))
    path = tmp_path / "phrases.json"
    miner.save(path)
    loaded = PhraseMiner.load(path)
    assert list(loaded.phrases_.items()) == list(miner.phrases_.items())
    assert repr(loaded) == repr(miner)
    assert loaded.transform(CITY[0].split()) == miner.transform(CITY[0].split())
    config = json.loads(path.read_text(encoding="utf-8"))
    for change in ({"format": "other"}, {"version": 9}, {"more": 1}, {"phrases": [["a"]]}, {"phrases": [[[1], 2, 3]]}):
        path.write_text(json.dumps({**config, **change}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"expected|damaged"):
            PhraseMiner.load(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="not a saved"):
        PhraseMiner.load(path)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"min_count": 0}, ValueError),
        ({"min_gain": math.nan}, ValueError),
        ({"max_length": 1}, ValueError),
        ({"min_npmi": 1.5}, ValueError),
        ({"min_count": 1.5}, TypeError),
        ({"min_gain": "0"}, TypeError),
    ],
)
def test_settings_out_of_range_are_refused(settings, error):
    with pytest.raises(error, match=next(iter(settings))):
        PhraseMiner(**settings)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ([], ValueError),
        ([[], []], ValueError),
        ("new york", TypeError),
        (["new york"], TypeError),
        ([["a", 1]], TypeError),
        ([["a", True]], TypeError),
        ([b"ab"], TypeError),
        (3, TypeError),
        ({"a": 1}, TypeError),
    ],
)
def test_other_input_is_refused(data, error):
    with pytest.raises(error, match="expected|must be"):
        PhraseMiner().fit(data)


def test_transform_refuses_what_is_not_tokens():
    miner = PhraseMiner()
    with pytest.raises(ValueError, match="call fit"):
        miner.transform(["a"])
    miner.fit([["a", "b"]])
    with pytest.raises(TypeError, match="split the text first"):
        miner.transform("new york")
    with pytest.raises(TypeError, match="token 1 must be a str; got 1"):
        miner.transform(["a", 1])


def test_a_given_gain_alone_decides():
    lines = split(CITY * 3)
    plain = PhraseMiner(min_count=3, min_gain=0.0).fit(lines)
    assert plain.min_npmi == -1.0
    assert plain.phrases_ == PhraseMiner(min_count=3, min_npmi=-1.0).fit(lines).phrases_
    assert set(PhraseMiner(min_count=3).fit(lines).phrases_) <= set(plain.phrases_)
    assert PhraseMiner().min_npmi == 0.4
