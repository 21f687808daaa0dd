import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.corpus import Document
from kexue.words import Tokenizer
from kexue.workbench import tokens
from kexue.workbench.fields import is_name, name_and_parent, split_head
from kexue.workbench.tokens import Ragged, TokenizedCorpus, concatenate, tokenize_corpus
from workbench.pile import documentation, plain_pile

ROWS = st.lists(st.lists(st.integers(0, 50), max_size=6), min_size=1, max_size=8)


@settings(deadline=None)  # the first call compiles
@given(ROWS, st.data())
def test_ragged_rows_can_be_taken_masked_and_joined_like_lists(rows, data):
    ragged = Ragged.from_rows(rows)
    picks = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=10))
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))))
    assert [r.tolist() for r in (ragged[i] for i in range(len(ragged)))] == rows
    taken = ragged.take(picks)
    assert [taken[i].tolist() for i in range(len(taken))] == [rows[i] for i in picks]
    masked = ragged.masked(keep)
    assert [masked[i].tolist() for i in range(len(rows))] == [r if k else [] for r, k in zip(rows, keep, strict=True)]
    joined = concatenate(ragged, masked)
    assert [joined[i].tolist() for i in range(len(rows))] == [
        r + (r if k else []) for r, k in zip(rows, keep, strict=True)
    ]


def test_ragged_refuses_offsets_that_do_not_fit_and_rows_outside():
    with pytest.raises(ValueError, match="must be one-dimensional and end at 2"):
        Ragged(np.array([1, 2], np.int32), np.array([0, 3]))
    with pytest.raises(IndexError, match="between 0 and 0"):
        Ragged.from_rows([[1]])[1]
    with pytest.raises(ValueError, match="same number of rows"):
        concatenate(Ragged.from_rows([[1]]), Ragged.from_rows([[1], [2]]))


@pytest.mark.parametrize(
    ("title", "text", "first_line", "expected"),
    [
        ("", "Head.\nBody.", True, ("Head.", "Body.")),
        ("", "Head.\nBody.", False, ("", "Head.\nBody.")),
        ("A real title", "Body.", True, ("A real title", "Body.")),
        ("A title on one line.", "A title on\none line.\n\nBody.", True, ("A title on one line.", "\n\nBody.")),
        ("numpy.linalg.norm", "Head.\nBody.", True, ("Head.", "Body.")),
        ("深度学习研究", "正文。", False, ("深度学习研究", "正文。")),
        ("论文/研究", "正文。", False, ("", "正文。")),
        ("", "One line only", True, ("", "One line only")),
        ("", "First sentence. " + "word " * 100, True, ("First sentence.", " " + "word " * 100)),
        ("", "", True, ("", "")),
    ],
)
def test_head_is_the_title_or_the_first_line(title, text, first_line, expected):
    assert split_head(title, text, first_line) == expected


@pytest.mark.parametrize(
    ("identifier", "title", "expected"),
    [
        ("numpy.linalg.norm", "Matrix norm.", ("norm", "numpy.linalg")),
        ("docs/guide/set_up.md", "", ("set_up", "docs/guide")),
        ("17", "train_test_split", ("train_test_split", "")),
        ("17", "A title", ("", "")),
        ("17", "深度学习研究", ("", "")),
        ("书/第一章.txt", "", ("第一章", "书")),
        ("pile.jsonl:12", "", ("jsonl", "pile")),
    ],
)
def test_names_come_from_structured_ids_and_from_titles_that_are_names(identifier, title, expected):
    assert name_and_parent(identifier, title) == expected


def test_a_sentence_or_a_number_is_no_name():
    assert [is_name(text) for text in ("fooBar", "a/b.txt", "Two words", "1234", "", "名称")] == [
        True,
        True,
        False,
        False,
        False,
        True,
    ]


def test_vocabulary_goes_by_document_frequency_then_alphabet(tmp_path):
    texts = ["b a", "a b c", "c d d d d", "a"] * 20
    corpus = tokenize_corpus([Document(str(i), text) for i, text in enumerate(texts)], str.split, tmp_path)
    assert corpus.vocabulary == ["a", "b", "c", "d"]
    assert corpus.df.tolist() == [60, 40, 40, 20]


def test_rare_words_leave_but_words_of_names_stay(tmp_path):
    documents = [*documentation(), Document("lib.sparse.quixotic", "matrix unheard\nof words")]
    corpus = tokenize_corpus(documents, Tokenizer(), tmp_path)
    assert corpus.flags == {"names": True, "order": True, "heads": True, "titles": False}
    assert "quixotic" in corpus.vocabulary
    assert "unheard" not in corpus.vocabulary
    row = len(documents) - 1
    assert [corpus.vocabulary[i] for i in corpus.last[row]] == ["quixotic"]
    assert [corpus.vocabulary[i] for i in corpus.name[row]] == ["lib", "sparse", "quixotic"]
    assert corpus.own[row] == corpus.ids["quixotic"]
    assert corpus.parent[row] == corpus.parent[0] != corpus.parent[60]


def test_numbers_hashes_and_shuffled_piles_have_neither_names_nor_order(tmp_path):
    pile = plain_pile()
    hashed = [Document(f"pile/{hash_of(d.text)}", d.text) for d in pile]
    for number, documents in enumerate((pile, hashed)):
        corpus = tokenize_corpus(documents, Tokenizer(), tmp_path / str(number))
        assert not corpus.flags["names"]
        assert not corpus.flags["order"]
        assert len(corpus.name.values) == 0
        assert (corpus.own == -1).all()


def hash_of(text):
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:12]


def test_titles_given_for_a_half_leave_the_others_without_a_head(tmp_path):
    titled = documentation(title=True)
    half = [Document(d.id, d.text, title=d.title if i % 2 else "") for i, d in enumerate(titled)]
    corpus = tokenize_corpus(half, Tokenizer(), tmp_path)
    assert ((corpus.head.lengths > 0) == (np.arange(len(half)) % 2 == 1)).all()


def test_saved_corpus_comes_back_equal_and_damage_is_reported(tmp_path):
    corpus = tokenize_corpus(documentation(), Tokenizer(), tmp_path)
    for mmap in (True, False):
        again = TokenizedCorpus.load(tmp_path, mmap=mmap)
        assert again.vocabulary == corpus.vocabulary
        assert again.flags == corpus.flags
        assert again.labels == corpus.labels
        for name in ("head", "body", "name", "last"):
            np.testing.assert_array_equal(getattr(again, name).values, getattr(corpus, name).values)
            np.testing.assert_array_equal(getattr(again, name).offsets, getattr(corpus, name).offsets)
        for name in ("df", "own", "parent", "position"):
            np.testing.assert_array_equal(getattr(again, name), getattr(corpus, name))
    assert not list(tmp_path.glob("*.spill")) + list(tmp_path.glob("*.raw"))
    lines = (tmp_path / "vocabulary.txt").read_text().splitlines()
    (tmp_path / "vocabulary.txt").write_text("\n".join(lines[:5]) + "\n")
    with pytest.raises(ValueError, match="damaged"):
        TokenizedCorpus.load(tmp_path)
    with pytest.raises(ValueError, match=r"tokens\.json is missing"):
        TokenizedCorpus.load(tmp_path / "nowhere")


def test_what_cannot_be_tokenised_is_refused(tmp_path):
    documents = documentation(2)
    with pytest.raises(TypeError, match="must start anew"):
        tokenize_corpus(iter(documents), str.split, tmp_path)
    with pytest.raises(TypeError, match="tokenizer must be callable"):
        tokenize_corpus(documents, "words", tmp_path)
    with pytest.raises(ValueError, match="at least one document"):
        tokenize_corpus([], str.split, tmp_path)
    with pytest.raises(ValueError, match="no word in any of the 1 documents"):
        tokenize_corpus([Document("1", " ")], str.split, tmp_path)
    assert not list(tmp_path.glob("*.spill"))


def test_views_of_the_corpus_without_heads_or_names_leave_the_original_alone(tmp_path):
    corpus = tokenize_corpus(documentation(), Tokenizer(), tmp_path)
    some = np.zeros(len(corpus), bool)
    some[:10] = True
    assert (corpus.without_heads(some).head.lengths[:10] == 0).all()
    assert (corpus.head.lengths > 0).all()
    bare = corpus.without_names()
    assert not bare.flags["names"]
    assert len(bare.name.values) == 0
    assert corpus.flags["names"]


def test_a_vocabulary_that_would_be_too_large_keeps_the_commonest_words(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_MOST_WORDS", 2)
    monkeypatch.setattr(tokens, "_AT_ONCE", 3)  # more than one piece is renumbered
    texts = ["a b c a", "b c", "c", "c b d d", ""]
    corpus = tokenize_corpus([Document(str(i), t) for i, t in enumerate(texts)], str.split, tmp_path)
    assert corpus.vocabulary == ["c", "b"]
    assert [corpus.body[i].tolist() for i in range(5)] == [[1, 0], [1, 0], [0], [0, 1], []]


def test_some_documents_of_a_corpus_are_a_corpus(tmp_path):
    corpus = tokenize_corpus(documentation(), Tokenizer(), tmp_path)
    some = corpus.take([7, 2])
    assert len(some) == 2
    assert some.vocabulary == corpus.vocabulary
    for name in ("head", "body", "name", "last"):
        assert [getattr(some, name)[i].tolist() for i in (0, 1)] == [getattr(corpus, name)[i].tolist() for i in (7, 2)]
    assert some.labels == [corpus.labels[7], corpus.labels[2]]
    assert some.parent.tolist() == corpus.parent[[7, 2]].tolist()
