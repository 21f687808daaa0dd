"""NGramCounter against dictionaries of strings."""

import pickle
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kexue.words import NGramCounter
from kexue.words import _runs as runs_module
from kexue.words._shards import Span
from reference.ngrams import ngram_counts, runs

MIXED = "平方和,平方根 abc ABC 한국어 カタカナー हिन्दी 〇一二 x1\x00y 👍🏽ok ❤️z é"
alphabet = st.sampled_from("ab平方和根 ,.\n\x00é0😀ि")


def table(counter):
    return {gram: count for n in range(1, counter.order + 1) for gram, count in counter.items(n)}


@pytest.mark.parametrize("order", [1, 2, 3, 4, 7, 20])
def test_counts_of_every_order_equal_the_dictionary(order):
    texts = [MIXED, "平方平方平方", "", "aaaa" * 5]
    counter = NGramCounter(order=order).fit(texts)
    assert table(counter) == dict(ngram_counts(texts, order))


@given(st.lists(st.text(alphabet, max_size=30), max_size=5), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_counts_of_any_text_equal_the_dictionary(texts, order):
    expected = dict(ngram_counts(texts, order))
    counter = NGramCounter(order=order).partial_fit(texts)
    assert table(counter) == expected
    assert counter.total_ == sum(count for gram, count in expected.items() if len(gram) == 1)


@pytest.mark.slow
@given(st.text(max_size=60))
@example("\ud800a\udfffb")
@example("e\u0301 ❤\ufe0fx")
@settings(max_examples=100, deadline=None)
def test_runs_of_any_unicode_text_follow_the_definition(text):
    counter = NGramCounter(order=3).partial_fit([text])
    assert table(counter) == dict(ngram_counts([text], 3))


def test_count_looks_up_any_gram_and_returns_zero_for_unseen_ones():
    counter = NGramCounter(order=4).fit(["平方和平方根"])
    expected = ngram_counts(["平方和平方根"], 4)
    for gram in ("平方", "方和平", "平方根", "根", "和方", "平方和根", "zz", "根平", "平方根平"):
        assert counter.count(gram) == expected[gram]


def test_min_count_hides_rare_grams_but_merging_stays_exact():
    a, b = NGramCounter(2, min_count=2).fit(["ab"]), NGramCounter(2, min_count=2).fit(["ab"])
    assert a.count("ab") == 0
    assert list(a.items(1)) == []
    assert a.merge(b).count("ab") == 2


@given(st.lists(st.text(alphabet, max_size=20), min_size=1, max_size=6), st.data())
@settings(max_examples=60, deadline=None)
def test_merging_any_split_equals_counting_the_whole(texts, data):
    border = data.draw(st.integers(0, len(texts)))
    whole = NGramCounter(order=4).partial_fit(texts)
    left, right = NGramCounter(order=4).partial_fit(texts[:border]), NGramCounter(order=4).partial_fit(texts[border:])
    for merged in (left.merge(right), right.merge(left)):
        assert merged.alphabet_ == whole.alphabet_
        np.testing.assert_array_equal(merged.table_.keys, whole.table_.keys)
        np.testing.assert_array_equal(merged.table_.counts, whole.table_.counts)


def test_merging_changes_the_width_of_keys_when_the_alphabet_grows():
    few = NGramCounter(order=6).fit(["abcabc"])
    texts = ["".join(map(chr, range(0x4E00, 0x4E00 + 3000)))]
    many = NGramCounter(order=6).fit(texts)
    assert (few.table_.layout.words, many.table_.layout.words) == (1, 2)
    assert table(few.merge(many)) == dict(ngram_counts(["abcabc", *texts], 6))


@pytest.mark.slow
def test_alphabets_beyond_16_bits_are_counted_exactly():
    codes = [c for c in range(0x3400, 0x323B0) if runs(chr(c))][:70_000]
    text = "".join(map(chr, codes))
    counter = NGramCounter(order=4).fit([text, text[:100]])
    assert len(counter.alphabet_) == 70_000 > 65_534
    assert counter.table_.layout.words == 2
    assert counter.count(text[10:14]) == 2
    assert counter.count(text[69_990:69_994]) == 1
    assert counter.grams(4)[0].shape == (70_000 - 3, 4)


@pytest.mark.parametrize("n_jobs", [1, 3])
def test_chunks_cut_inside_runs_do_not_change_a_count(n_jobs):
    text = "ab平方" * 3000 + " " + "x" * 5000
    small = NGramCounter(order=5, memory=96 * 1024 * n_jobs, n_jobs=n_jobs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        small.fit([text, "平方"])
    assert table(small) == dict(ngram_counts([text, "平方"], 5))


@pytest.mark.parametrize("order", [3, 8])
def test_a_table_that_outgrows_the_memory_budget_goes_to_disk_and_stays_exact(order):
    draw = np.random.default_rng(0)
    texts = ["".join(map(chr, draw.integers(0x4E00, 0x4E00 + 60, 3000))) for _ in range(20)] + [MIXED]
    counter = NGramCounter(order=order, memory="300KB").fit(texts)
    expected = ngram_counts(texts, order)
    assert counter.table_.mapped
    assert table(counter) == dict(expected)
    for gram in [*list(expected)[:200], "zz", "平方"]:
        assert counter.count(gram) == expected[gram]
    copy = pickle.loads(pickle.dumps(counter))
    assert not copy.table_.mapped
    assert table(copy) == dict(expected)
    more = counter.partial_fit([MIXED])
    assert table(more) == dict(ngram_counts([*texts, MIXED], order))


def test_files_and_texts_give_the_same_counts(tmp_path):
    text = "平方和\r\n平方根, naïve 平方" * 50
    path = tmp_path / "a.txt"
    path.write_bytes(("\ufeff" + text).encode())
    expected = dict(ngram_counts([text], 3))
    assert table(NGramCounter(3).fit(path)) == expected
    assert table(NGramCounter(3).fit([path])) == expected
    # blocks that end inside a character
    pieces = list(runs_module._file_pieces(Span(str(path), 0, path.stat().st_size), 7))
    assert "".join(pieces) == path.read_bytes().decode()


def test_broken_utf8_is_reported_with_file_line_and_byte_offset(tmp_path):
    path = tmp_path / "broken.txt"
    path.write_bytes("平方\nab".encode() + b"\xff" + b"c")
    with pytest.raises(ValueError, match=r"broken\.txt: not UTF-8 at line 2, byte offset 9 "):
        NGramCounter().fit(path)
    path.write_bytes("平方".encode()[:-1])
    with pytest.raises(ValueError, match="line 1, byte offset 3"):
        NGramCounter().fit(path)


def test_pieces_of_whole_runs_end_between_runs():
    text = "ab cd" * 100 + "x" * 300 + " end"
    pieces = list(runs_module.whole_runs([text, "next"], 50))
    assert len(pieces) > 5
    assert "".join(pieces) == text + "\nnext\n"
    assert [run for piece in pieces for run in runs(piece)] == runs(text + "\nnext")


def test_a_pickled_counter_counts_and_merges_without_its_texts():
    counter = NGramCounter(2).fit(["平方"])
    copy = pickle.loads(pickle.dumps(counter))
    assert copy.count("平方") == 1
    assert copy.source_ is None
    assert copy.merge(counter).count("平方") == 2


def test_to_arrow_lists_all_grams():
    rows = NGramCounter(2).fit(["aab"]).to_arrow().to_pylist()
    assert {row["gram"]: (row["n"], row["count"]) for row in rows} == {
        "a": (1, 2),
        "b": (1, 1),
        "aa": (2, 1),
        "ab": (2, 1),
    }


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"order": 0}, ValueError),
        ({"order": 2.5}, TypeError),
        ({"min_count": 0}, ValueError),
        ({"n_jobs": 0}, ValueError),
        ({"memory": "much"}, ValueError),
        ({"memory": "-1GB"}, ValueError),
        ({"memory": None}, TypeError),
    ],
)
def test_parameters_out_of_range_are_rejected(arguments, error):
    with pytest.raises(error):
        NGramCounter(**arguments)


@pytest.mark.parametrize("memory", [np.int64(10**6), 10**400, "1.5 mb"])
def test_any_whole_number_of_bytes_is_a_budget(memory):
    assert NGramCounter(memory=memory).fit(["abab"]).count("ab") == 2


@pytest.mark.parametrize("source", [b"abc", 3, None, ["a", 3], {"a": 1}, [b"a"]])
def test_input_that_is_not_text_is_rejected(source):
    with pytest.raises(TypeError, match=r"expected|must be"):
        NGramCounter().fit(source)


def test_an_empty_corpus_a_wrong_gram_and_unequal_counters_are_rejected():
    for empty in ([], [""], [" ,.\x00😀"]):
        with pytest.raises(ValueError, match="without any"):
            NGramCounter().fit(empty)
    with pytest.raises(ValueError, match="call fit"):
        NGramCounter().count("a")
    counter = NGramCounter(2).fit(["ab"])
    with pytest.raises(ValueError, match="1 to 2"):
        counter.count("abc")
    with pytest.raises(ValueError, match="1 to 2"):
        counter.count("")
    with pytest.raises(TypeError):
        counter.count(3)
    with pytest.raises(ValueError, match="agree"):
        counter.merge(NGramCounter(3).fit(["ab"]))
    with pytest.raises(TypeError):
        counter.merge("ab")
