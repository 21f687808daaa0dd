"""CooccurrenceCounter against counting every pair of places, its inputs, its exactness and its errors."""

import copy
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from kexue.words import CooccurrenceCounter
from kexue.words._text import encode
from reference.cooccurrence import cooccurrence, vocabulary

WORDS = st.sampled_from(["a", "b", "c", "dé", "中文", "😀", "e\u0301", "a\u200bb", "\x00"])
DOCUMENTS = st.lists(st.lists(WORDS, max_size=12), min_size=1, max_size=8)


def counter(**settings):
    return CooccurrenceCounter(**{"window": 3, "min_count": 1, **settings})


def zipf_ids(rng, size, words):
    return np.minimum(rng.zipf(1.3, size) - 1, words - 1).astype(np.int32)


def same(a, b):
    return (
        a.vocabulary_ == b.vocabulary_
        and np.array_equal(a.counts_, b.counts_)
        and a.n_tokens_ == b.n_tokens_
        and all(np.array_equal(getattr(a.lower_, x), getattr(b.lower_, x)) for x in ("data", "indices", "indptr"))
    )


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.integers(1, 12), st.sampled_from(["harmonic", "flat"]), st.integers(1, 3))
def test_counts_equal_the_reference(documents, window, weighting, min_count):
    words, counts = vocabulary(documents, min_count)
    made = CooccurrenceCounter(window=window, min_count=min_count, weighting=weighting)
    if not words:
        with pytest.raises(ValueError, match="min_count"):
            made.fit(documents)
        return
    made.fit(documents)
    expected = cooccurrence(documents, words, window, weighting)
    assert made.vocabulary_ == words
    assert made.counts_.tolist() == counts
    assert made.n_documents_ == len(documents)
    found = made.matrix_.toarray()
    assert found.dtype == np.int64
    assert [[Fraction(int(x), made.unit_) for x in row] for row in found] == expected


def test_a_larger_corpus_equals_a_sum_of_shifted_products():
    rng = np.random.default_rng(0)
    ids, offsets = zipf_ids(rng, 30_000, 700), np.r_[0, np.sort(rng.integers(0, 30_001, 900)), 30_000]
    names = [f"w{k}" for k in range(700)]
    made = CooccurrenceCounter(window=10).fit_ids(ids, offsets, names)
    document = np.searchsorted(offsets, np.arange(len(ids)), side="right")
    total = sparse.csr_matrix((700, 700), dtype=np.int64)
    for distance in range(1, 11):
        ok = document[distance:] == document[:-distance]
        pair = (ids[distance:][ok], ids[:-distance][ok])
        total = total + sparse.coo_matrix((np.full(ok.sum(), 2520 // distance), pair), (700, 700)).tocsr()
    total = total + total.T
    total.setdiag(0)
    assert made.unit_ == 2520
    assert (made.matrix_ != total).nnz == 0
    assert np.array_equal(made.counts_, np.bincount(ids, minlength=700))


def test_the_matrix_is_symmetric_with_an_empty_diagonal_and_sorted_rows():
    made = counter().fit(["a a b a c", "b c c a"])
    matrix = made.matrix_
    assert (matrix != matrix.T).nnz == 0
    assert not matrix.diagonal().any()
    assert matrix.has_sorted_indices
    assert made.lower_.data.nbytes + made.lower_.indices.nbytes <= 12 * made.lower_.nnz


def test_dropped_words_leave_before_windowing_and_documents_separate():
    made = CooccurrenceCounter(window=1, min_count=2).fit(["a rare b", "a", "b"])
    assert made.vocabulary_ == ["a", "b"]
    assert made.matrix_[0, 1] == 1


@pytest.mark.parametrize("n_jobs", [2, 3])
def test_the_number_of_threads_does_not_change_a_bit(n_jobs):
    rng = np.random.default_rng(1)
    ids = zipf_ids(rng, 300_000, 3000)
    offsets = np.arange(0, 300_001, 100)
    names = [str(k) for k in range(3000)]
    one = CooccurrenceCounter(window=5).fit_ids(ids, offsets, names)
    assert same(one, CooccurrenceCounter(window=5, n_jobs=n_jobs).fit_ids(ids, offsets, names))


@settings(max_examples=40, deadline=None)
@given(
    DOCUMENTS.filter(lambda d: any(d)), st.lists(st.integers(0, 2), min_size=8, max_size=8), st.permutations(range(3))
)
def test_any_split_of_the_corpus_merges_to_the_same_bits(documents, shard_of, order):
    whole = counter().fit(documents)
    shards = [[d for d, s in zip(documents, shard_of, strict=False) if s == k] for k in range(3)]
    words = sum((counter().count_words(shard) for shard in shards), start=counter().count_words([]))
    fitted = [counter(vocabulary=words).fit(shards[k]) for k in order]
    assert same(fitted[0].merge(fitted[1]).merge(fitted[2]), whole)
    assert same(fitted[0].merge(fitted[1].merge(fitted[2])), whole)


def test_found_vocabularies_are_renumbered_by_the_merged_counts():
    texts = ["a b c c", "b a a c"], ["c b a b b b b"]
    merged = counter().fit(texts[0]).merge(counter().fit(texts[1]))
    assert same(merged, counter().fit([*texts[0], *texts[1]]))
    assert merged.vocabulary_ == ["b", "a", "c"]


def test_merging_leaves_both_parts_as_they_were():
    a, b = counter().fit(["a b c"]), counter().fit(["c b a b"])
    before = copy.deepcopy((a.lower_.toarray(), a.counts_, b.lower_.toarray()))
    a.merge(b)
    assert np.array_equal(a.lower_.toarray(), before[0])
    assert np.array_equal(a.counts_, before[1])
    assert np.array_equal(b.lower_.toarray(), before[2])


@pytest.mark.parametrize(
    ("changed", "corpus"),
    [({"window": 4}, "a b"), ({"weighting": "flat"}, "a b"), ({"min_count": 2}, "a a b b"), ({}, "a c")],
)
def test_counts_of_other_settings_or_words_are_not_merged(changed, corpus):
    with pytest.raises(ValueError, match="cannot merge"):
        counter().fit(["a b"]).merge(counter(**changed).fit([corpus]))


def test_given_vocabularies_merge_only_in_equal_order_and_with_counters():
    a, b = counter(vocabulary=["a", "b"]).fit(["a b"]), counter(vocabulary=["b", "a"]).fit(["a b"])
    with pytest.raises(ValueError, match="order"):
        a.merge(b)
    with pytest.raises(ValueError, match="given vocabulary"):
        a.merge(counter().fit(["a b"]))
    with pytest.raises(TypeError, match="list"):
        a.merge(["a b"])


def test_texts_token_lists_files_and_ids_give_the_same_counts(tmp_path):
    texts = ["a b 中文 a", "", "b\u3000c\u00a0d\u2028e", "  ", "😀 e\u0301 b"]
    expected = counter().fit(texts)
    (tmp_path / "one.txt").write_bytes("\n".join(texts[:3]).encode())
    (tmp_path / "two.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(texts[3:]).encode() + b"\n")
    corpus = encode(texts, None)
    for found in (
        counter().fit(iter(texts)),
        counter().fit([text.split() for text in texts]),
        counter().fit(tuple(text.split()) for text in texts),
        counter(tokenize=str.split).fit(texts),
        counter().fit([tmp_path / "one.txt", tmp_path / "two.txt"]),
        counter(tokenize=str.split).fit([tmp_path / "one.txt", tmp_path / "two.txt"]),
    ):
        assert same(found, expected)
        assert found.n_documents_ == 5
    by_id = counter().fit_ids(corpus.ids, corpus.offsets, corpus.words)
    order = [by_id.vocabulary_.index(word) for word in expected.vocabulary_]
    assert np.array_equal(by_id.matrix_.toarray()[np.ix_(order, order)], expected.matrix_.toarray())


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20), max_size=6))
def test_texts_are_split_as_str_split_does(texts):
    found = encode(texts, None)
    words = [
        [found.words[k] for k in found.ids[a:b]] for a, b in zip(found.offsets[:-1], found.offsets[1:], strict=True)
    ]
    assert words == [text.split() for text in texts]
    assert len(set(found.words)) == len(found.words)


def test_every_white_space_character_of_unicode_separates_words():
    spaces = [chr(k) for k in range(0x110000) if chr(k).isspace()]
    assert encode(["x".join(["", *spaces, ""])], None).ids.tolist() == [0] * (len(spaces) + 1)


@pytest.mark.slow
def test_tables_grow_with_many_and_long_words():
    rng = np.random.default_rng(0)
    words = [f"{k:x}" * int(rng.integers(1, 40)) for k in range(30_000)]
    texts = [" ".join(words[a : a + 1000]) for a in range(0, 30_000, 1000)] + ["y" * 5_000_000, " ".join(words[::-1])]
    found = encode(texts, None)
    assert [found.words[k] for k in found.ids] == " ".join(texts).split()


def test_a_file_that_is_cut_into_blocks_is_read_whole(tmp_path, monkeypatch):
    text = "\n".join(f"w{k} 中文{k % 7}" for k in range(500))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr("kexue.words._text._READ", 37)
    found = encode(tmp_path / "a.txt", None)
    assert [found.words[k] for k in found.ids] == text.split()
    assert len(found.offsets) == 501


@pytest.mark.parametrize("block", [1 << 20, 16])
def test_broken_utf8_is_named_with_file_line_and_byte(tmp_path, monkeypatch, block):
    monkeypatch.setattr("kexue.words._text._READ", block)
    data = "good line\nanother 中\nbad ".encode() + b"\xff\xfe rest\n"
    path = tmp_path / "broken.txt"
    path.write_bytes(data)
    offset = data.index(b"\xff")
    with pytest.raises(ValueError, match=f"broken.txt: not UTF-8 at line 3, byte offset {offset} "):
        counter().fit(path)


def test_ids_outside_the_vocabulary_are_dropped_whatever_their_type(tmp_path):
    plain = np.array([0, 1, 2, 0, 1], np.int32)
    expected = counter().fit_ids(plain, np.array([0, 5]), ["x", "y", "z"])
    for dtype in (np.int8, np.int32, np.int64):
        ids = np.array([0, 1, -1, 2, 3, 0, 1, 100], dtype)
        assert same(counter().fit_ids(ids, np.array([0, 8], dtype), ["x", "y", "z"]), expected)
    assert same(counter().fit_ids(np.array([0, 1, 2**63, 2, 0, 1], np.uint64), [0, 6], ["x", "y", "z"]), expected)
    stored = np.memmap(tmp_path / "ids", np.int32, "w+", shape=5)
    stored[:] = plain
    stored.flush()
    readonly = np.memmap(tmp_path / "ids", np.int32, "r", shape=5)
    assert same(counter().fit_ids(readonly, np.array([0, 5]), ["x", "y", "z"]), expected)
    assert np.array_equal(readonly, plain)


def test_ids_in_several_chunks_equal_one(monkeypatch):
    rng = np.random.default_rng(2)
    ids, offsets = zipf_ids(rng, 5000, 90), np.r_[0, 0, np.sort(rng.integers(0, 5001, 300)), 5000, 5000]
    names = [str(k) for k in range(80)]
    whole = counter().fit_ids(ids, offsets, names)
    monkeypatch.setattr("kexue.words._windows._CHUNK", 7)
    assert same(counter().fit_ids(ids, offsets, names), whole)


@pytest.mark.parametrize("offsets", [[], [0], [1, 5], [0, 4], [0, 3, 2, 5], [0, 6]])
def test_offsets_that_do_not_fit_are_rejected(offsets):
    with pytest.raises(ValueError, match="offsets must start at 0"):
        counter().fit_ids(np.zeros(5, np.int32), np.array(offsets, np.int64), ["x"])


def test_ids_must_be_integers_and_the_vocabulary_distinct():
    with pytest.raises(TypeError, match="ids must be a 1-d array of integers"):
        counter().fit_ids(np.zeros(5), np.array([0, 5]), ["x"])
    with pytest.raises(ValueError, match="repeat words; 'x' occurs again at position 1"):
        counter().fit_ids(np.zeros(5, int), np.array([0, 5]), ["x", "x"])
    with pytest.raises(ValueError, match="vocabulary is empty"):
        counter().fit_ids(np.zeros(0, int), np.array([0]), [])
    with pytest.raises(TypeError, match=r"vocabulary\[0\] must be a str"):
        counter(vocabulary=[1]).fit(["a"])


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"window": 0}, ValueError),
        ({"window": 2.5}, TypeError),
        ({"min_count": 0}, ValueError),
        ({"weighting": "linear"}, ValueError),
        ({"n_jobs": 0}, ValueError),
        ({"tokenize": "x"}, TypeError),
        ({"window": 100}, ValueError),
    ],
)
def test_bad_settings_are_rejected_at_once_and_after_set_params(settings, error):
    with pytest.raises(error):
        CooccurrenceCounter(**settings)
    with pytest.raises(error):
        CooccurrenceCounter().set_params(**settings).fit(["a b"])


@pytest.mark.parametrize(
    "data", ["a b", b"a", 3, {"a": 1}, [1], [b"a"], [None], ["a", 1], ["a", ["b"]], [["a"], "b"], [["a", 1]]]
)
def test_anything_but_texts_paths_and_token_lists_is_a_type_error(data):
    with pytest.raises(TypeError):
        counter().fit(data)


@pytest.mark.parametrize("data", [[], [""], ["  ", "\n"], [[]], [["", ""]], iter([])])
def test_a_corpus_without_words_is_rejected(data):
    with pytest.raises(ValueError, match="no word occurs"):
        counter().fit(data)


def test_paths_and_texts_do_not_mix_and_missing_files_are_named(tmp_path):
    with pytest.raises(TypeError, match="item 1 must be a path"):
        counter().fit([Path(__file__), "text"])
    with pytest.raises(FileNotFoundError, match="missing"):
        counter().fit(tmp_path / "missing")


def test_lone_surrogates_are_rejected_with_their_place():
    with pytest.raises(ValueError, match="text 1 is not valid Unicode"):
        counter().fit(["a", "\ud800"])
    with pytest.raises(ValueError, match="lone surrogate"):
        counter().fit([["a", "\ud800"]])


def test_a_tokenizer_that_returns_no_words_is_reported():
    with pytest.raises(TypeError, match=r"tokenize\(document 0\): token 0 must be a str"):
        counter(tokenize=lambda text: [1]).fit(["a"])
    with pytest.raises(TypeError, match="tokenize must return a sequence of str; got None for document 0"):
        counter(tokenize=lambda text: None).fit(["a"])


def test_harmonic_weights_that_could_overflow_are_refused():
    made = CooccurrenceCounter(window=40)
    with pytest.raises(ValueError, match="overflow exact 64-bit"):
        made.fit_ids(np.zeros(1000, np.int32), np.array([0, 1000]), ["x"])
    assert CooccurrenceCounter(window=42).window == 42
    for window in (43, 10**5):
        with pytest.raises(ValueError, match=rf"window {window} is too wide .*at most 42"):
            CooccurrenceCounter(window=window)


def test_using_an_unfitted_counter_says_so():
    with pytest.raises(ValueError, match="has not been fitted"):
        counter().matrix_.sum()


def test_a_counter_comes_back_from_its_arrays():
    counter = CooccurrenceCounter(window=3, min_count=1).fit(["a b c a", "c d"])
    again = CooccurrenceCounter.from_counts(counter.lower_, counter.vocabulary_, counter.counts_, window=3)
    np.testing.assert_array_equal(again.matrix_.toarray(), counter.matrix_.toarray())
    assert (again.unit_, again.n_tokens_, again.vocabulary_) == (counter.unit_, counter.n_tokens_, counter.vocabulary_)
    with pytest.raises(ValueError, match="expected pairs of shape"):
        CooccurrenceCounter.from_counts(counter.lower_, ["a"], counter.counts_)
