"""JSON lines, JSON, CSV, TSV, Parquet: columns, hostile content, errors with their place."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.corpus import CorpusError, Document, read_documents

TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(str.strip)


def read(tmp_path, name, content, **options):
    file = tmp_path / name
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    file.write_bytes(content)
    return list(read_documents(file, **options))


def test_json_lines_are_split_at_line_feeds_only(tmp_path):
    text = "one\u2028two\u2029three\x85four\x0bfive\x1csix"
    content = json.dumps({"text": text, "title": "a\u2028b"}, ensure_ascii=False) + "\r\n\n" + '{"text": "x"}'
    found = read(tmp_path, "a.jsonl", content)
    assert found == [Document("a.jsonl:1", text, "a b"), Document("a.jsonl:3", "x")]


@settings(max_examples=50)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1))
def test_what_to_json_writes_is_read_back(tmp_path_factory, pairs):
    documents = [
        Document(f"d{i}", text.strip(), " ".join(title.split()), ("l",), {"n": i})
        for i, (text, title) in enumerate(pairs)
    ]
    file = tmp_path_factory.mktemp("x") / "a.jsonl"
    file.write_text("".join(d.to_json() + "\n" for d in documents), encoding="utf-8", newline="")
    assert list(read_documents(file)) == documents


@pytest.mark.parametrize("chunk", [1, 5, 1 << 18])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_arrays_are_read_one_object_at_a_time(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr("kexue.corpus.streams.CHUNK", chunk)
    records = [{"id": i, "text": f'{i} "quoted" \\ [,]{{}} \u2028 春', "labels": [1, "b"]} for i in range(3)]
    found = read(tmp_path, "a.json", json.dumps(records, indent=indent))
    assert found == [Document(str(r["id"]), r["text"], labels=("1", "b")) for r in records]


def test_other_shapes_of_json(tmp_path):
    assert [d.text for d in read(tmp_path, "a.json", '{"text": "one"}')] == ["one"]
    assert [d.id for d in read(tmp_path, "a.json", '{"text": "one"}\n{"text": "two"}\n')] == ["a.json:1", "a.json:2"]
    assert [d.text for d in read(tmp_path, "a.json", '["one", "two"]')] == ["one", "two"]
    assert [d.text for d in read(tmp_path, "a.jsonl", '"one"\n"two"')] == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}\n{"text": "b"}]', "line 2: not valid JSON: expected ',' or ']'"),
        ('[{"text": "a"},\n', "line 2: not valid JSON: the array is never closed"),
        ('[{"text": "a"},]', "not valid JSON"),
        ('[{"text": "a"}] []', "more text after the end"),
        ('[\n{"text": "a"},\n{"text": nope}]', "line 3: not valid JSON: Expecting value"),
        ('[{"text": "a', "line 1: not valid JSON: Unterminated string"),
        ("[[1]]", "expected a JSON object or string; got list"),
        ("[3]", "got int"),
        ('{"title": "a", "x": 1, "y": 2}', r"cannot tell which column is the text.*'title', 'x', 'y'"),
        ('[{"text": {"a": 1}}]', "record 1: the text must be a string or a list of strings; got an object with 'a'"),
        ("[" * 100_000, "not valid JSON"),
        ('{"text": ' + "9" * 10_000 + "}", "digits"),
        ("[]", "no document"),
    ],
)
def test_json_that_is_no_corpus(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, "a.json", content)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2: not valid JSON: Expecting property name"),
        ('{"text": "a \\ud83d b"}', r"line 2: the text holds half of a surrogate pair, U\+D83D"),
        ('{"text": "a", "meta": {"\\u0000": 1}}', None),
        ("[1, 2]", "line 2: expected a JSON object"),
        ('{"words": 3, "more": 4}', "line 2: cannot tell which column is the text"),
        ('{"text": "a", "id": {"x": 1}}', "line 2: the id must be a string"),
    ],
)
def test_a_bad_line_is_named_or_left_out(tmp_path, line, message):
    content = '{"text": "one"}\n' + line + '\n{"text": "three"}\n'
    if message is None:
        assert len(read(tmp_path, "a.jsonl", content)) == 3
        return
    with pytest.raises(CorpusError, match=message) as caught:
        read(tmp_path, "a.jsonl", content)
    assert (caught.value.line, caught.value.path) == (2, str(tmp_path / "a.jsonl"))
    reader = read_documents(tmp_path / "a.jsonl", on_error="skip")
    assert [d.id for d in reader] == ["a.jsonl:1", "a.jsonl:3"]
    assert reader.skipped_count == 1
    assert reader.skipped[0][0] == str(tmp_path / "a.jsonl")
    assert reader.skipped[0][1].startswith("line 2: ")


def test_nul_characters_inside_json_are_removed(tmp_path):
    assert read(tmp_path, "a.jsonl", '{"text": "a\\u0000b", "title": "c\\u0000d"}') == [
        Document("a.jsonl:1", "ab", "cd")
    ]


def test_records_with_empty_text_are_left_out_and_listed(tmp_path):
    reader = read_documents(tmp_path)
    (tmp_path / "a.csv").write_text("text,label\n ,x\nfull,y\n\n,\n")
    assert [(d.id, d.labels) for d in reader] == [("a.csv:3", ("y",))]
    assert reader.skipped == [(str(tmp_path / "a.csv"), "line 2: the text is empty")]


def test_many_bad_lines_do_not_fill_the_list(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + "{\n" * 500)
    reader = read_documents(tmp_path, on_error="skip")
    assert len(list(reader)) == 1
    assert (len(reader.skipped), reader.skipped_count) == (100, 500)


@pytest.mark.parametrize(
    ("record", "document"),
    [
        ({"content": "x", "headline": "t\n u"}, ("x", "t u", ())),
        ({"Body": "x", " Subject ": "t"}, ("x", "t", ())),
        ({"paragraphs": ["a", "b"], "name": "t", "tags": "p, q;r"}, ("a\nb", "t", ("p", "q", "r"))),
        ({"review": "x", "category": "p, q"}, ("x", "", ("p, q",))),
        ({"abstract": "x", "labels": ["p", 2, None]}, ("x", "", ("p", "2"))),
        ({"text": "x", "body": "y", "label": 3.0}, ("x", "", ("3",))),
        ({"正文": "x", "标题": "t", "标签": "p"}, ("x", "t", ("p",))),
        ({"id": "", "label": True, "comment": "x"}, ("x", "", ("true",))),
        ({"text": 5}, ("5", "", ())),
        ({"text": "a\r\nb\rc"}, ("a\nb\nc", "", ())),
    ],
)
def test_columns_are_guessed(tmp_path, record, document):
    (found,) = read(tmp_path, "a.jsonl", json.dumps(record))
    assert (found.text, found.title, found.labels) == document


def test_columns_can_be_named(tmp_path):
    record = {"text": "no", "a": "i", "b": "yes", "c": "t", "d": "l"}
    options = {"id_column": "a", "text_column": "B", "title_column": "c", "label_column": "d"}
    expected = [Document("i", "yes", "t", ("l",))]
    assert read(tmp_path, "a.jsonl", json.dumps(record), **options) == expected
    assert read(tmp_path, "a.csv", "text,a,b,c,d\nno,i,yes,t,l\n", **options) == expected
    with pytest.raises(CorpusError, match="there is no column 'zzz' for the title; columns found: 'text', 'a'"):
        read(tmp_path, "a.csv", "text,a\nx,y\n", title_column="zzz")
    with pytest.raises(CorpusError, match="no record has the key 'zzz' for the title"):
        read(tmp_path, "a.jsonl", json.dumps(record), title_column="zzz")


def test_csv_with_quotes_line_ends_and_long_cells(tmp_path):
    long = "长" * 200_000  # over the limit that the csv module has by default
    rows = [["1", 'He said "no",\r\nthen left'], ["2", long], ["3", "plain; text"]]
    file = tmp_path / "a.csv"
    with open(file, "w", encoding="utf-8", newline="") as handle:
        csv.writer(handle).writerows([["id", "text"], *rows])
    limit = csv.field_size_limit()
    found = list(read_documents(file, max_chars=None))
    assert [(d.id, d.text) for d in found] == [("1", 'He said "no",\nthen left'), ("2", long), ("3", "plain; text")]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_are_recognised(tmp_path, delimiter):
    content = f'label{delimiter}"review{delimiter}"\nx{delimiter}good\n'.replace(f'{delimiter}"\n', '"\n')
    (found,) = read(tmp_path, "a.csv", content)
    assert (found.text, found.labels, found.id) == ("good", ("x",), "a.csv:2")


def test_tables_without_header(tmp_path):
    content = "7\tapple pie\t1\n8\tpear\t0\n"
    with pytest.raises(CorpusError, match=r"name it with text_column. Columns found: '1', '2', '3'"):
        read(tmp_path, "a.tsv", content)
    found = read(tmp_path, "a.tsv", content, text_column="2", label_column="3", id_column="1")
    assert found == [Document("7", "apple pie", labels=("1",)), Document("8", "pear", labels=("0",))]
    assert [d.text for d in read(tmp_path, "b.csv", "one\ntwo\n")] == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message", "line"),
    [
        ('text,label\nfine,1\n"open,2\nmore\n', "a quote that opens in this row is never closed", 3),
        ('text,label\nfine,1\nx,"', "never closed", 3),
        ("text,label\nfine,1\na,b,c\n", "expected 2 cells, as in the first row; got 3", 3),
    ],
)
def test_broken_tables_are_named(tmp_path, content, message, line):
    with pytest.raises(CorpusError, match=message) as caught:
        read(tmp_path, "a.csv", content)
    assert caught.value.line == line
    reader = read_documents(tmp_path / "a.csv", on_error="skip")
    assert [d.text for d in reader] == ["fine"]
    assert reader.skipped_count == 1


def test_quotes_that_are_closed_are_not_reported(tmp_path):
    for last in ('"a\nb"', '"a ""b"""', 'a "b', '"a"b'):
        assert len(read(tmp_path, "a.csv", f"text,label\nx,1\n{last},2")) == 2


def test_parquet_round_trip(tmp_path):
    texts = [f"text {i} 春 👍🏽" for i in range(1500)]
    table = pyarrow.table(
        {
            "unused": pyarrow.array([{"x": i} for i in range(1500)]),
            "text": [*texts[:-1], None],
            "id": range(1500),
            "tags": [["a", "b"]] * 1500,
            "title": pyarrow.array(["t"] * 1500).dictionary_encode(),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=400)
    reader = read_documents(tmp_path)
    assert list(reader) == [Document(str(i), t, "t", ("a", "b")) for i, t in enumerate(texts[:-1])]
    assert list(reader) == list(read_documents(tmp_path / "a.parquet"))
    assert reader.skipped == [(str(tmp_path / "a.parquet"), "record 1500: the text is empty")]


def test_parquet_problems(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing else")
    with pytest.raises(CorpusError, match="not a readable Parquet file"):
        list(read_documents(tmp_path))
    pyarrow.parquet.write_table(pyarrow.table({"a": [1], "b": [2]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match="Columns found: 'a', 'b'"):
        list(read_documents(tmp_path))
    (document,) = read_documents(tmp_path, text_column="a", label_column="b")
    assert document == Document("a.parquet:1", "1", labels=("2",))


def test_format_overrides_the_name(tmp_path):
    assert read(tmp_path, "a.data", '{"text": "x"}', format="jsonl") == [Document("a.data:1", "x")]
    assert read(tmp_path, "a.json", "text\nx\n", format="csv")[0].text == "x"
