import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.corpus import Document

TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"))
LINE = TEXT.map(lambda text: " ".join(text.split()))
JSON = st.none() | st.booleans() | st.integers() | TEXT | st.lists(TEXT) | st.dictionaries(TEXT, st.integers())


@settings(max_examples=40)
@given(LINE.filter(str.strip), TEXT, LINE, st.lists(LINE.filter(str.strip)), st.dictionaries(TEXT, JSON, max_size=3))
def test_json_gives_the_same_document_back(name, text, title, labels, meta):
    document = Document(name, text, title, tuple(labels), meta)
    line = document.to_json()
    assert "\n" not in line
    assert Document.from_json(line) == document
    assert Document.from_json(line.encode()) == document
    assert Document.from_json(document.to_dict()) == document
    assert pickle.loads(pickle.dumps(document)) == document


def test_keys_of_the_json():
    assert list(Document("1", "a").to_dict()) == ["id", "text", "title", "labels"]
    assert list(Document("1", "a", meta={"x": 1}).to_dict()) == ["id", "text", "title", "labels", "meta"]


@pytest.mark.parametrize("field", ["id", "text", "title"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (3, TypeError, "must be a str; got 3 of type int"),
        (None, TypeError, "must be a str"),
        ("a\0b", ValueError, "NUL characters; found one at position 1"),
        ("ab\ud83d", ValueError, r"U\+D83D, at position 2"),
    ],
)
def test_text_that_cannot_be_stored_is_rejected(field, value, error, message):
    with pytest.raises(error, match=message):
        Document(**{"id": "1", "text": "x", field: value})


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"id": "  "}, ValueError, "not blank"),
        ({"id": "a\nb"}, ValueError, "one line"),
        ({"title": "a\nb"}, ValueError, "one line"),
        ({"labels": "sport"}, TypeError, "labels must be a tuple of str"),
        ({"labels": (1,)}, TypeError, "a label must be a str; got 1"),
        ({"labels": ("",)}, ValueError, "must not be blank"),
        ({"meta": [1]}, TypeError, "must be a mapping"),
        ({"meta": {1: 2}}, TypeError, "keys of meta must be str; got 1"),
    ],
)
def test_other_fields_are_checked(fields, error, message):
    with pytest.raises(error, match=message):
        Document(**{"id": "1", "text": "x", **fields})


def test_a_document_does_not_change():
    meta = {"page": 1}
    document = Document("1", "x", labels=["b"], meta=meta)
    meta["page"] = 2
    assert document.meta == {"page": 1}
    assert document.labels == ("b",)
    assert hash(document) == hash(Document("1", "x", labels=("b",)))
    with pytest.raises(AttributeError):
        document.text = "y"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "1"}', "id, text required"),
        ('{"id": "1", "text": "x", "body": "y"}', "got id, text, body"),
        ("[1]", "must be a JSON object"),
        ("{", "Expecting"),
    ],
)
def test_json_that_is_no_document_is_rejected(line, message):
    with pytest.raises(ValueError, match=message):
        Document.from_json(line)


def test_meta_that_json_cannot_hold_is_an_error():
    with pytest.raises(TypeError):
        Document("1", "x", meta={"a": {1}}).to_json()
    with pytest.raises(ValueError):
        Document("1", "x", meta={"a": float("nan")}).to_json()
