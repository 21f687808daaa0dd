import pytest

from kexue.corpus import Document
from kexue.workbench import WorkspaceError
from kexue.workbench.store import DocumentStore

DOCUMENTS = [
    Document("a", "第一篇 first 🙂", title="One", labels=("x", "y"), meta={"n": 1}),
    Document("b.c_d%", "second\u2028line", meta={"related": ["a"]}),
    Document("z", ""),
]


def create(tmp_path, documents=DOCUMENTS):
    return DocumentStore.create(tmp_path / "documents.sqlite", documents)


def test_documents_come_back_as_they_were_in_order(tmp_path):
    store, _, characters = create(tmp_path)
    assert list(store) == DOCUMENTS
    assert store.fetch([2, 0]) == [DOCUMENTS[2], DOCUMENTS[0]]
    assert [store.row(d.id) for d in DOCUMENTS] == [0, 1, 2]
    assert store.row("absent") is None
    assert len(store) == 3
    assert characters == sum(len(d.text) for d in DOCUMENTS)


def test_the_fingerprint_follows_the_content(tmp_path):
    _, first, _ = create(tmp_path)
    _, again, _ = create(tmp_path)
    _, other, _ = create(tmp_path, [*DOCUMENTS[:2], Document("z", ".")])
    assert first == again != other


def test_duplicate_ids_and_an_empty_corpus_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'a' comes twice"):
        create(tmp_path, [DOCUMENTS[0], DOCUMENTS[0]])
    with pytest.raises(ValueError, match="no documents"):
        create(tmp_path, [])
    with pytest.raises(TypeError, match="'text'"):
        create(tmp_path, ["text"])


def test_ids_are_suggested_literally(tmp_path):
    store, _, _ = create(tmp_path)
    assert store.like("c_d%") == ["b.c_d%"]
    assert store.like("cxd") == []


def test_keyword_search_ranks_by_bm25_and_takes_any_text(tmp_path):
    store, _, _ = create(tmp_path)
    store.index_words([["cat", "dog", "dog", "dog", "dog", "矩阵"], ["cat", "cat", "👍", "train_test_split"], ["bird"]])
    assert [row for row, _ in store.keywords(["cat"], 5)] == [1, 0]
    assert [row for row, _ in store.keywords(["矩阵"], 5)] == [0]
    assert [row for row, _ in store.keywords(["👍"], 5)] == [1]
    assert [row for row, _ in store.keywords(["train_test_split"], 5)] == [1]
    for hostile in ('"', "*", "NEAR(", "a OR", "-", "'; drop table documents; --"):
        assert store.keywords([hostile], 5) == []
    assert store.keywords([], 5) == []
    scores = dict(store.keywords(["dog", "cat"], 5))
    assert scores[0] > scores[1] > 0
    assert len(store) == 3


def test_a_missing_or_damaged_file_says_what_to_do(tmp_path):
    with pytest.raises(WorkspaceError, match="missing; build the workspace again"):
        DocumentStore(tmp_path / "absent.sqlite")
    path = tmp_path / "documents.sqlite"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(WorkspaceError, match="damaged"):
        DocumentStore(path)
