import gzip
import json

import pytest

from kexue.corpus import BinaryFileError, CorpusError
from kexue.workbench.summary_pairs import Pair, read_pairs

ROWS = [("a", "First text. It has two sentences.", "First.\nIt is short."), ("b", "第二篇，正文。", "摘要")]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def records():
    return [{"id": i, "text": t, "summary": s} for i, t, s in ROWS]


def test_json_lines_keep_ids_and_line_breaks(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(lines(records()), encoding="utf-8")
    pairs, left_out = read_pairs([path])
    assert pairs == [Pair(*row) for row in ROWS]
    assert left_out == []
    packed = tmp_path / "pairs.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_pairs([packed])[0] == pairs
    (tmp_path / "pairs.json").write_text(json.dumps(records()), encoding="utf-8")
    assert read_pairs([tmp_path / "pairs.json"])[0] == pairs


def test_tables_with_and_without_header_hold_the_same(tmp_path):
    import pyarrow
    import pyarrow.parquet

    flat = [(t, s.replace("\n", " ")) for _, t, s in ROWS]
    bare, header, csv = tmp_path / "bare.tsv", tmp_path / "header.tsv", tmp_path / "pairs.csv"
    bare.write_text("".join(f"{t}\t{s}\n" for t, s in flat), encoding="utf-8")
    header.write_text("summary\ttext\n" + "".join(f"{s}\t{t}\n" for t, s in flat), encoding="utf-8")
    csv.write_text("Text,Summary\n" + "".join(f'"{t}","{s}"\n' for t, s in flat), encoding="utf-8")
    parquet = tmp_path / "pairs.parquet"
    table = {"other": [1, 2], "text": [t for t, _ in flat], "summary": [s for _, s in flat]}
    pyarrow.parquet.write_table(pyarrow.table(table), parquet)
    for path in (bare, header, csv, parquet):
        pairs, _ = read_pairs([path])
        assert [(p.text, p.summary) for p in pairs] == flat
    assert [p.id for p in read_pairs([bare])[0]] == ["bare.tsv:1", "bare.tsv:2"]


def test_columns_are_named_by_name_or_number(tmp_path):
    three = tmp_path / "three.tsv"
    three.write_text("".join(f"to title\t{t}\t{i}\n" for i, t, _ in ROWS), encoding="utf-8")
    with pytest.raises(CorpusError, match=r"three.tsv.*text_column.*'1', '2', '3'"):
        read_pairs([three])
    pairs, _ = read_pairs([three], text_column="2", summary_column="3")
    assert [(p.text, p.summary) for p in pairs] == [(t, i) for i, t, _ in ROWS]
    path = tmp_path / "other.jsonl"
    path.write_text(lines([{"article": "Long text.", "highlights": "Short."}]), encoding="utf-8")
    assert read_pairs([path], text_column="article")[0][0][1:] == ("Long text.", "Short.")
    with pytest.raises(CorpusError, match="line 1: there is no column 'story' for the text"):
        read_pairs([path], text_column="story")


def test_an_abstract_is_the_summary_of_an_article_and_the_text_of_a_title(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines([{"text": "article", "abstract": "abstract", "title": "title"}]), encoding="utf-8")
    assert read_pairs([path])[0][0][1:] == ("article", "abstract")
    path.write_text(lines([{"abstract": "abstract", "title": "title"}]), encoding="utf-8")
    assert read_pairs([path])[0][0][1:] == ("abstract", "title")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "summary": "b"}\n{"text": "a"}\n', "x.jsonl, line 2: cannot tell which column is the summary"),
        ('{"text": "a", "summary": "b"}\n{"text": \n', "x.jsonl, line 2: not valid JSON"),
        ('{"text": "a", "summary": {"b": 1}}\n', "x.jsonl, line 1: the summary must be a string"),
        ('{"text": {"b": 1}, "summary": "a"}\n', "x.jsonl, line 1: the text must be a string"),
        ('{"text": "a", "summary": null}\n', "x.jsonl, line 1: there is no summary in this record"),
        ("[1]\n", "x.jsonl, line 1: expected a JSON object"),
    ],
)
def test_a_record_that_is_no_pair_is_named_by_file_and_line(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(CorpusError, match=message):
        read_pairs([path])
    path.write_text(lines(records()) + content, encoding="utf-8")
    pairs, left_out = read_pairs([path], on_error="skip")
    assert [p.id for p in pairs][:2] == ["a", "b"]
    assert len(left_out) == 1
    assert "x.jsonl" in left_out[0]


def test_blank_ones_are_left_out_and_told(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(lines([*records(), {"text": " ", "summary": "a"}, {"text": "a", "summary": ""}]), encoding="utf-8")
    pairs, left_out = read_pairs([path])
    assert len(pairs) == 2
    assert left_out == [f"{path}, line 3: the text is blank", f"{path}, line 4: the summary is blank"]
    path.write_text(lines([{"text": "a", "summary": " "}]), encoding="utf-8")
    with pytest.raises(ValueError, match="no text with a summary in .*the summary is blank"):
        read_pairs([path])


def test_files_that_hold_no_pairs_are_refused(tmp_path):
    text, binary, torn = tmp_path / "a.txt", tmp_path / "b.tsv", tmp_path / "c.tsv"
    text.write_text("only text", encoding="utf-8")
    binary.write_bytes(b"\x00\x01text\tb\n")
    torn.write_text("a\tb\nc\n", encoding="utf-8")
    with pytest.raises(CorpusError, match="a.txt: pairs of a text and its summary are JSON lines"):
        read_pairs([text])
    with pytest.raises(BinaryFileError, match="b.tsv"):
        read_pairs([binary])
    with pytest.raises(CorpusError, match="c.tsv, line 2"):
        read_pairs([torn])
    with pytest.raises(FileNotFoundError, match="absent"):
        read_pairs([tmp_path / "absent.jsonl"])
    with pytest.raises(ValueError, match="on_error"):
        read_pairs([torn], on_error="ignore")
