import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.corpus import Document
from kexue.models.bag_encoder import BagEncoder
from kexue.words import Tokenizer
from kexue.workbench.encoder import document_vectors, heads_are_text
from kexue.workbench.ranking import Impacts, Ranker, top_k
from kexue.workbench.tokens import Ragged, tokenize_corpus
from workbench.pile import documentation, plain_pile

ROWS = st.lists(st.lists(st.integers(0, 9), max_size=12), min_size=1, max_size=12).filter(any)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tokenize_corpus(documentation(), Tokenizer(), tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def encoder(corpus):
    return BagEncoder(corpus.vocabulary, 16)


def bm25(rows, word, i, k1=1.5, b=0.75):
    """The textbook formula."""
    n, average = len(rows), sum(map(len, rows)) / len(rows)
    df = sum(word in row for row in rows)
    tf = rows[i].count(word)
    idf = np.log(1 + (n - df + 0.5) / (df + 0.5))
    return idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(rows[i]) / average)) if tf else 0.0


@settings(deadline=None)
@given(ROWS, st.sets(st.integers(0, 9)))
def test_impacts_are_bm25(rows, query):
    scores = Impacts.build(Ragged.from_rows(rows), 10).scores_of(np.array(sorted(query), np.int64), len(rows))
    expected = [sum(bm25(rows, word, i) for word in query) for i in range(len(rows))]
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


@given(st.lists(st.integers(-3, 3), max_size=30), st.integers(1, 10))
def test_top_k_is_a_stable_sort(values, k):
    scores = np.array(values, np.float32)
    assert top_k(scores, k).tolist() == sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def test_a_name_and_a_rare_word_lead_to_their_document(corpus, encoder):
    ranker = Ranker.build(corpus, document_vectors(encoder, corpus))
    for target in (0, 57, 159):
        words = corpus.last[target]
        order, scores, parts = ranker.search(words, encoder.encode_ids(Ragged.from_rows([words]))[0], 5)
        assert order[0] == target
        assert (np.diff(scores) <= 0).all()
        assert set(parts[0]["words"]) == set(words.tolist())
        assert parts[0]["lexical"] == 1
        assert -1 <= parts[0]["cosine"] <= 1


def test_scores_are_the_sum_of_their_parts_and_words_alone_suffice(corpus, encoder):
    ranker = Ranker.build(corpus, document_vectors(encoder, corpus))
    query = corpus.body[3][:8]
    vector = encoder.encode_ids(Ragged.from_rows([query]))[0]
    total, lexical, meaning = ranker.scores(query, vector)
    np.testing.assert_allclose(total, lexical + meaning, rtol=1e-6)
    np.testing.assert_allclose(meaning, document_vectors(encoder, corpus) @ vector, rtol=1e-5, atol=1e-6)
    order, _, parts = ranker.search(query, None, 3)
    assert order.tolist() == top_k(ranker.scores(query, None)[1], 3).tolist()
    assert all(part["cosine"] == 0 for part in parts)


def test_queries_without_known_words_find_nothing(corpus, encoder):
    ranker = Ranker.build(corpus, document_vectors(encoder, corpus))
    order, scores, parts = ranker.search(np.empty(0, np.int32), np.zeros(16, np.float32), 10)
    assert (len(order), len(scores), parts) == (0, 0, [])
    with pytest.raises(ValueError, match="k must be at least 1"):
        ranker.search(corpus.head[0], None, 0)


def test_documents_without_a_title_compete_on_equal_terms(corpus, encoder):
    some = np.arange(len(corpus)) % 2 == 0
    half = corpus.without_heads(some)
    assert heads_are_text(corpus)
    assert not heads_are_text(half)
    ranker = Ranker.build(half, document_vectors(encoder, half))
    bare = Ranker.build(corpus, document_vectors(encoder, corpus, heads=False), heads=False)
    query = corpus.head[0]  # its own title is missing
    np.testing.assert_array_equal(ranker.scores(query, None)[1], bare.scores(query, None)[1])
    order, _, _ = ranker.search(corpus.head[1], None, 1)  # a title that is there is found by its exact words
    assert order.tolist() == [1]
    reordered = corpus.head[1][::-1]
    assert ranker.search(reordered, None, 1)[0].tolist() == [1]


def test_a_whole_title_finds_its_document_first_whatever_else_is_similar(corpus, encoder):
    ranker = Ranker.build(corpus, document_vectors(encoder, corpus))
    for i in range(0, len(corpus), 7):
        vector = encoder.encode_ids(Ragged.from_rows([corpus.head[i]]))[0]
        first = int(ranker.search(corpus.head[i], vector, 1)[0][0])
        assert set(corpus.head[first].tolist()) == set(corpus.head[i].tolist())


def test_part_of_a_title_finds_its_document_where_others_have_none(tmp_path):
    body = "Numbers of the year, with remarks."
    documents = [Document(str(i), body) for i in range(6)] + [
        Document("quarter", body, title="Quarterly report of the northern office"),
        Document("year", body, title="Annual report of the northern office"),
    ]
    half = tokenize_corpus(documents, Tokenizer(), tmp_path)
    assert not heads_are_text(half)
    ranker = Ranker.build(half, None)
    for query, expected in (("quarterly report", [6]), ("northern office", [6, 7]), ("Annual", [7])):
        words = half.lookup(Tokenizer()(query))
        order, _, parts = ranker.search(words, None, 8)
        assert order.tolist() == expected
        assert set(parts[0]["words"]) == set(words.tolist())
    ranker.save(tmp_path / "ranker")
    again = Ranker.load(tmp_path / "ranker")
    words = half.lookup(Tokenizer()("quarterly report"))
    np.testing.assert_array_equal(again.scores(words, None)[0], ranker.scores(words, None)[0])


def test_a_plain_pile_is_ranked_by_text(tmp_path):
    pile = tokenize_corpus(plain_pile(), Tokenizer(), tmp_path)
    ranker = Ranker.build(pile, None)
    assert len(ranker.names.rows) == 0
    assert ranker.search(pile.body[5], None, 1)[0].tolist() == [5]


def test_saved_ranker_answers_the_same(corpus, encoder, tmp_path):
    half = corpus.without_heads(np.arange(len(corpus)) % 2 == 0)
    for number, ranker in enumerate(
        [Ranker.build(half, document_vectors(encoder, half, heads=False)), Ranker.build(corpus, None)]
    ):
        ranker.save(tmp_path / str(number))
        vector = encoder.encode_ids(Ragged.from_rows([corpus.head[7]]))[0]
        expected = ranker.search(corpus.head[7], vector, 10)
        for mmap in (True, False):
            order, scores, parts = Ranker.load(tmp_path / str(number), mmap=mmap).search(corpus.head[7], vector, 10)
            np.testing.assert_array_equal(order, expected[0])
            np.testing.assert_array_equal(scores, expected[1])
            assert parts == expected[2]
    (tmp_path / "0" / "ranker.json").write_text('{"format": 7}')
    with pytest.raises(ValueError, match="expected format 1, got 7"):
        Ranker.load(tmp_path / "0")
    with pytest.raises(ValueError, match=r"ranker\.json is missing"):
        Ranker.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="one row for each of the 160"):
        Ranker.build(corpus, np.zeros((3, 4), np.float32))


def test_first_lines_are_searched_as_text_however_many_there_are(tmp_path):
    texts = ["opening words. " + "body " * 60 if i < 20 else f"only body number {i}" for i in range(40)]
    texts[3] = "zebra crossing. " + "body " * 60
    pile = [Document(str(i), text) for i, text in enumerate(texts)]
    corpus = tokenize_corpus(pile, lambda text: text.replace(".", "").split(), tmp_path)
    assert corpus.head.lengths[3] > 0
    assert (corpus.head.lengths == 0).sum() >= 20
    order, _, _ = Ranker.build(corpus, None).search(corpus.lookup(["zebra"]), None, 1)
    assert order.tolist() == [3]


def test_titles_without_spaces_are_searched(tmp_path):
    pile = [Document(f"d{i}", f"正文 {i}", title=f"标题第{'一二三四五六七八九十'[i]}") for i in range(10)]
    corpus = tokenize_corpus(pile, Tokenizer(), tmp_path)
    order, _, _ = Ranker.build(corpus, None).search(corpus.lookup(["七"]), None, 1)
    assert order.tolist() == [6]
