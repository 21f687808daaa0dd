"""WordDiscovery against the definition, and on synthetic languages whose words are known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.words import NGramCounter, WordDiscovery
from kexue.words._lexicon import Lexicon, description, remove_redundant
from kexue.words._runs import code_points
from kexue.words.discovery import solidity
from reference.ngrams import adjacent_lexicon, lexicon, ngram_counts
from reference.segmenter import redundancy


def language(letters, seed, words=200, lines=20_000, lengths=(1, 2, 3, 4)):
    """Words drawn from an alphabet, Zipf-Mandelbrot frequencies, 12 words a line."""
    rng = np.random.default_rng(seed)
    found = set()
    while len(found) < words:
        found.add(
            "".join(chr(0x4E00 + i) for i in rng.integers(0, letters, rng.choice(lengths, p=(0.1, 0.5, 0.25, 0.15))))
        )
    listed = sorted(found)
    rng.shuffle(listed)
    p = 1 / (np.arange(words) + 2.7)
    return listed, [[listed[j] for j in row] for row in rng.choice(words, size=(lines, 12), p=p / p.sum())]


def f1(found, true):
    common = len(found & true)
    return 2 * common / (len(found) + len(true))


def spans(words):
    ends = np.cumsum([len(w) for w in words])
    return {(int(e) - len(w), int(e)) for w, e in zip(words, ends, strict=True)}


def small_corpus(seed=0):
    rng = np.random.default_rng(seed)
    words = ["ab", "abc", "d", "ef", "ghij", "klmnop", "和", "平方"]
    return ["".join(rng.choice(words, size=8)) + "," + "".join(rng.choice(words, size=3)) for _ in range(150)]


@pytest.mark.parametrize("order", [2, 3, 4, 6])
@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
def test_the_lexicon_equals_the_definition(order, scale):
    texts = small_corpus()
    thresholds = tuple(scale * n for n in range(1, order))
    found = WordDiscovery(order=order, min_count=5, min_pmi=thresholds, redundancy=None).fit(texts)
    assert found.vocabulary_ == lexicon(texts, order, 5, thresholds)
    assert found.min_pmi_ == thresholds


@given(st.lists(st.text(st.sampled_from("ab平方, "), max_size=20), min_size=1, max_size=8), st.integers(0, 20))
@settings(max_examples=80, deadline=None)
def test_the_lexicon_of_any_text_equals_the_definition(texts, step):
    # not a logarithm of a small fraction, so that rounding cannot decide
    scale = step / 10 + 0.0137
    thresholds = (scale, 1.7 * scale, 2.9 * scale)
    expected = lexicon(texts, 4, 2, thresholds)
    if not expected:
        with pytest.raises(ValueError):
            WordDiscovery(min_count=2, min_pmi=thresholds, redundancy=None).fit(texts)
        return
    assert WordDiscovery(min_count=2, min_pmi=thresholds, redundancy=None).fit(texts).vocabulary_ == expected


def test_solidity_is_the_weakest_split():
    texts = small_corpus(1)
    counts = ngram_counts(texts, 4)
    total = sum(c for gram, c in counts.items() if len(gram) == 1)
    seen = 0
    for rows, weakest in solidity(NGramCounter(4).fit(texts), 3):
        for row, value in zip(rows, weakest, strict=True):
            gram = "".join(map(chr, row))
            splits = [total * counts[gram] / (counts[gram[:j]] * counts[gram[j:]]) for j in range(1, len(gram))]
            assert value == pytest.approx(math.log(min(splits)), abs=1e-12)
            seen += 1
    assert seen > 100


@pytest.mark.parametrize(("min_pmi", "min_proba"), [(1.0, 1e-7), (0.2, 0.01), (2.0, 0.0)])
def test_adjacent_pairs_equal_the_definition(min_pmi, min_proba):
    texts = small_corpus(2)
    found = WordDiscovery(method="adjacent", min_count=3, min_pmi=min_pmi, min_proba=min_proba, redundancy=None).fit(
        texts
    )
    assert found.vocabulary_ == adjacent_lexicon(texts, 3, min_pmi, min_proba)


def test_auto_for_adjacent_pairs_is_where_merging_starts_to_pay():
    assert WordDiscovery(method="adjacent", min_count=3).fit(small_corpus()).min_pmi_ == (1.0,)


@pytest.mark.parametrize("rule", ["article", "length"])
def test_a_redundant_word_goes_and_its_count_goes_to_its_parts(rule):
    # 雪梨和 is 雪梨 + 和 by chance; 苹果 is not 苹 + 果
    words = {"雪梨": 100, "和": 100, "雪梨和": 12, "苹果": 50, "苹": 1, "果": 1}
    assert remove_redundant(Lexicon.of_words(words), rule).words() == {
        "雪梨": 112,
        "和": 112,
        "苹果": 50,
        "苹": 1,
        "果": 1,
    }


@pytest.mark.parametrize("rule", ["article", "length"])
@pytest.mark.parametrize("seed", range(6))
def test_redundancy_equals_trying_every_segmentation(rule, seed):
    rng = np.random.default_rng(seed)
    drawn = {"".join(rng.choice(list("ab平"), rng.integers(1, 6))) for _ in range(60)}
    # frequent short words, rare long ones: about half of the long words are explained by their parts
    words = {w: 1 + int(rng.integers(1, 10**6) / 20 ** (len(w) - 1)) for w in sorted(drawn)}
    left = remove_redundant(Lexicon.of_words(words), rule).words()
    assert left == redundancy(words, rule)
    assert len(left) < len(words)


def test_description_is_the_cost_of_words_and_vocabulary():
    # three words 平方, each costing ln(4/3), one 和 costing ln 4; both words spelt once
    length = description(["平方平方,平方和"], Lexicon.of_words({"平方": 3, "和": 1}), character_entropy=0.5)
    assert length == pytest.approx(3 * math.log(4 / 3) + math.log(4) + (3 + 2) * 0.5)
    # characters outside the vocabulary are words of their own
    longer = description(["平方xx"], Lexicon.of_words({"平方": 1}), character_entropy=0.5)
    assert longer == pytest.approx(math.log(3) + 2 * math.log(3 / 2) + (3 + 2) * 0.5)


def test_entropy_per_character_is_h_over_l():
    found = WordDiscovery(min_count=5).fit(small_corpus())
    counts, lengths = list(found.vocabulary_.values()), [len(w) for w in found.vocabulary_]
    total = sum(counts)
    h = -sum(c / total * math.log(c / total) for c in counts)
    assert found.entropy_per_char_ == pytest.approx(
        h / (sum(c * n for c, n in zip(counts, lengths, strict=True)) / total)
    )
    assert list(found.vocabulary_.values()) == sorted(counts, reverse=True)


def test_a_counter_files_and_texts_give_the_same_words(tmp_path):
    texts = small_corpus(4)
    expected = WordDiscovery(min_count=5).fit(texts).vocabulary_
    counter = NGramCounter(order=4).fit(texts)
    assert WordDiscovery(min_count=5).fit(counter).vocabulary_ == expected
    half = NGramCounter(order=4).fit(texts[:70]).merge(NGramCounter(order=4).fit(texts[70:]))
    assert WordDiscovery(min_count=5).fit(half).vocabulary_ == expected
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(texts), encoding="utf-8")
    assert WordDiscovery(min_count=5).fit(path).vocabulary_ == expected
    once = NGramCounter(order=4).fit(iter(texts))
    assert WordDiscovery(min_count=5).fit(once, texts).vocabulary_ == expected


def test_text_that_can_be_read_only_once_is_refused():
    texts = small_corpus()
    with pytest.raises(ValueError, match="only once"):
        WordDiscovery(min_count=5).fit(iter(texts))
    with pytest.raises(ValueError, match="only once"):
        WordDiscovery(min_count=5).fit(NGramCounter(4).fit(iter(texts)))


def test_a_word_may_be_longer_than_the_order_and_a_run_longer_than_a_piece(monkeypatch):
    monkeypatch.setattr("kexue.words.discovery.piece_size", lambda memory: 64)
    texts = small_corpus(5)
    found = WordDiscovery(min_count=5, min_pmi=(1, 2, 3), redundancy=None).fit([*texts, "x" * 500])
    assert "klmnop" in found.vocabulary_
    assert found.vocabulary_ == lexicon([*texts, "x" * 500], 4, 5, (1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 11])
def test_default_settings_find_the_words_of_a_language_with_400_letters(seed):
    words, lines = language(400, seed)
    found = WordDiscovery().fit(["".join(line) for line in lines])
    assert f1(set(found.vocabulary_), set(words)) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 11])
def test_auto_thresholds_find_the_words_of_a_language_with_40_letters(seed):
    words, lines = language(40, seed)
    texts = ["".join(line) for line in lines]
    counter = NGramCounter(4).fit(texts)
    found = WordDiscovery(min_count=10, min_pmi="auto").fit(counter)
    fixed = WordDiscovery(min_count=10, min_pmi=(2, 4, 6), redundancy=None).fit(counter)
    assert f1(set(found.vocabulary_), set(words)) > 0.80
    assert f1(set(fixed.vocabulary_), set(words)) < 0.50
    segmenter = found.segmenter()
    pairs = [(spans(segmenter("".join(line))), spans(line)) for line in lines[:300]]
    common, all_spans = sum(len(a & b) for a, b in pairs), sum(len(a) + len(b) for a, b in pairs)
    assert 2 * common / all_spans > 0.80


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"order": 1}, ValueError),
        ({"min_count": 0}, ValueError),
        ({"min_pmi": float("nan")}, ValueError),
        ({"min_pmi": (1, float("nan"), 3)}, ValueError),
        ({"min_pmi": (2, 4)}, ValueError),
        ({"min_pmi": "best"}, ValueError),
        ({"min_pmi": None}, TypeError),
        ({"min_pmi": ("a", 2, 3)}, TypeError),
        ({"method": "magic"}, ValueError),
        ({"redundancy": "all"}, ValueError),
        ({"min_proba": -1.0}, ValueError),
        ({"method": "adjacent", "min_pmi": (2, 4, 6)}, ValueError),
    ],
)
def test_parameters_out_of_range_are_rejected(arguments, error):
    with pytest.raises(error):
        WordDiscovery(**arguments)


def test_empty_and_too_small_corpora_and_wrong_counters_are_rejected():
    with pytest.raises(ValueError, match="without any"):
        WordDiscovery().fit([])
    with pytest.raises(ValueError, match="min_count=32"):
        WordDiscovery().fit(["平方"])
    with pytest.raises(ValueError, match="order 4 or more"):
        WordDiscovery().fit(NGramCounter(2).fit(["平方"]))
    with pytest.raises(TypeError, match="only used with an NGramCounter"):
        WordDiscovery().fit(["平方"], ["平方"])
    with pytest.raises(ValueError, match="call fit"):
        WordDiscovery().segmenter()
    assert code_points("").size == 0


@pytest.mark.slow
def test_the_words_depend_neither_on_the_budget_nor_on_threads():
    texts = ["".join(line) for line in language(40, 3, lines=6000)[1]]
    expected = WordDiscovery(min_count=10).fit(texts)
    for options in ({"memory": "2MB"}, {"n_jobs": 3}, {"memory": "5MB", "n_jobs": 2}):
        found = WordDiscovery(min_count=10, **options).fit(texts)
        assert found.vocabulary_ == expected.vocabulary_
        assert found.min_pmi_ == expected.min_pmi_
