"""Text files, folders, ids, splitting, arguments."""

import bz2
import gzip
import lzma
import os

import pyarrow
import pytest

from kexue.corpus import Document, read_documents


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8", newline="")
    return path


def texts(reader):
    return [(document.id, document.text) for document in reader]


def test_a_folder_of_small_files_gives_one_document_each_in_order_of_names(tmp_path):
    write(tmp_path / "b.txt", "Two.\n\nStill two.\n")
    write(tmp_path / "a" / "z.md", "# One\n")
    write(tmp_path / "a.rst", "Zero")
    write(tmp_path / "c.unknown", "Three")
    write(tmp_path / "d.py", "x = 1\n")
    assert texts(read_documents(tmp_path)) == [
        ("a/z.md", "# One"),
        ("a.rst", "Zero"),
        ("b.txt", "Two.\n\nStill two."),
        ("c.unknown", "Three"),
        ("d.py", "x = 1"),
    ]


def test_naming_the_files_gives_the_same_as_naming_the_folder(tmp_path):
    files = [write(tmp_path / name, f"Line\n\nof {name}") for name in ("a.txt", "b.txt")]
    assert list(read_documents(tmp_path)) == list(read_documents(files))


def test_the_only_file_is_split_into_paragraphs_if_it_has_a_blank_line(tmp_path):
    file = write(tmp_path / "book.txt", "\nOne\none.\n \t\n\nTwo.\nEnd.")
    assert texts(read_documents(file)) == [("book.txt:2", "One\none."), ("book.txt:6", "Two.\nEnd.")]
    assert texts(read_documents(tmp_path)) == texts(read_documents(file))


def test_the_only_file_is_split_into_lines_otherwise(tmp_path):
    file = write(tmp_path / "notes.txt", "One.\r\nTwo.\rThree.\n\n\n")
    assert texts(read_documents(file)) == [("notes.txt:1", "One."), ("notes.txt:2", "Two."), ("notes.txt:3", "Three.")]


def test_a_long_file_among_others_is_split(tmp_path):
    write(tmp_path / "small.txt", "a\nb")
    for length, parts in ((262_144, 14), (262_145, 2)):
        half = "word " * 3000
        big = (half + "\n") * 2 if parts == 2 else "word\n" * 100
        big = big + "x" * (length - len(big))
        write(tmp_path / "big.txt", big)
        ids = [d.id for d in read_documents(tmp_path, max_chars=None)]
        if length <= 262_144:
            assert ids == ["big.txt", "small.txt"]
        else:
            assert ids == ["big.txt:1", "big.txt:2", "big.txt:3", "small.txt"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("file", [("x.txt", "a\nb\n\nc")]),
        ("line", [("x.txt:1", "a"), ("x.txt:2", "b"), ("x.txt:4", "c")]),
        ("paragraph", [("x.txt:1", "a\nb"), ("x.txt:4", "c")]),
    ],
)
def test_split_can_be_chosen(tmp_path, split, expected):
    write(tmp_path / "x.txt", "a\nb\n\nc\n")
    write(tmp_path / "y.txt", "d")
    found = texts(read_documents(tmp_path, split=split))
    assert found == [*expected, ("y.txt" if split == "file" else "y.txt:1", "d")]


def test_long_texts_are_cut_and_numbered(tmp_path):
    file = write(tmp_path / "long.txt", "First sentence here. " * 10 + "\n\nShort.")
    found = list(read_documents(file, max_chars=50))
    assert [d.id for d in found[:2]] == ["long.txt:1#1", "long.txt:1#2"]
    assert found[-1] == Document("long.txt:3", "Short.")
    assert all(len(d.text) <= 50 and d.text.endswith(".") for d in found)
    assert " ".join(d.text for d in found[:-1]) == ("First sentence here. " * 10).strip()


def test_reading_again_reads_again(tmp_path):
    file = write(tmp_path / "a.txt", "One.\nTwo.")
    reader = read_documents(file)
    first = list(reader)
    assert list(reader) == first
    write(file, "Three.")
    assert [d.text for d in reader] == ["Three."]
    one, two = iter(reader), iter(reader)
    assert next(one) == next(two)


def test_fingerprint_changes_with_content_name_and_settings_but_not_with_place(tmp_path):
    for name in ("here", "there"):
        write(tmp_path / name / "a.txt", "One.")
        os.utime(tmp_path / name / "a.txt", ns=(10**18, 10**18))
    here = read_documents(tmp_path / "here")
    before = here.fingerprint()
    assert before == here.fingerprint() == read_documents(tmp_path / "there").fingerprint()
    assert len(before) == 64
    assert before != read_documents(tmp_path / "here", split="line").fingerprint()
    assert before != read_documents(tmp_path / "here", text_column="x").fingerprint()
    write(tmp_path / "here" / "a.txt", "Two.")
    changed = here.fingerprint()
    assert changed != before
    (tmp_path / "here" / "a.txt").rename(tmp_path / "here" / "b.txt")
    assert here.fingerprint() != changed


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", lambda data: pyarrow.compress(data, "zstd", asbytes=True)),
    ],
)
def test_compressed_files_are_read_as_what_is_inside(tmp_path, suffix, compress):
    write(tmp_path / f"a.txt{suffix}", compress("春眠不觉晓".encode()))
    write(tmp_path / f"b.jsonl{suffix}", compress(b'{"id": "x", "text": "One."}\n'))
    write(tmp_path / f"c.csv{suffix}", compress(b"id,text\n7,Two.\n"))
    assert texts(read_documents(tmp_path)) == [(f"a.txt{suffix}", "春眠不觉晓"), ("x", "One."), ("7", "Two.")]


@pytest.mark.parametrize(
    ("encoding", "given"),
    [
        ("utf-8", "utf-8"),
        ("utf-8-sig", "utf-8"),
        ("utf-16", "utf-8"),
        ("utf-32", "utf-8"),
        ("utf-16-le", "utf-16-le"),
        ("utf-16-be", "UTF-16BE"),
        ("utf-16-le", "utf-16"),
        ("gb18030", "gb18030"),
        ("latin-1", "latin-1"),
    ],
)
def test_encodings(tmp_path, encoding, given):
    text = "caf\xe9 \xbd" if encoding == "latin-1" else "caf\xe9 春眠不觉晓 👩\u200d👧 e\u0301 \u00c5\u212b"
    content = (text + "\r\nnext" + "\r\n" * 3).encode(encoding)
    write(tmp_path / "a.txt", content)
    write(tmp_path / "b.csv", ("id,text\r\n1," + text + "\r\n").encode(encoding))
    write(tmp_path / "c.jsonl", ('{"text": "' + text + '"}\n').encode(encoding))
    found = texts(read_documents(tmp_path, encoding=given))
    assert found == [("a.txt", text + "\nnext"), ("1", text), ("c.jsonl:1", text)]  # nothing is normalised


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "utf-16"])
def test_characters_and_line_ends_that_straddle_chunks(tmp_path, monkeypatch, encoding):
    monkeypatch.setattr("kexue.corpus.streams.CHUNK", 7)
    lines = ["春眠不觉晓", "👩\u200d👧 x", "abc", "é"] * 5
    file = write(tmp_path / "a.txt", "\r\n".join(lines).encode(encoding))
    assert [d.text for d in read_documents(file, encoding=encoding, split="line")] == lines


def test_generated_and_column_ids_never_collide(tmp_path):
    write(tmp_path / "a.jsonl", '{"id": "1", "text": "x"}\n{"id": "1", "text": "y"}\n{"id": "b.txt", "text": "z"}\n')
    write(tmp_path / "b.txt", "from a file")
    write(tmp_path / "c.csv", 'id,text\n1,w\nb.txt,v\n,u\n"two\n lines ",t\n')
    reader = read_documents(tmp_path)
    ids = [d.id for d in reader]
    assert ids == ["1", "1~2", "b.txt", "b.txt~2", "1~3", "b.txt~3", "c.csv:4", "two lines"]
    assert reader.repeated_ids == 3


def test_two_folders_with_the_same_names(tmp_path):
    write(tmp_path / "one" / "a.txt", "first")
    write(tmp_path / "two" / "a.txt", "second")
    assert texts(read_documents([tmp_path / "one", tmp_path / "two"])) == [("a.txt", "first"), ("a.txt~2", "second")]


def test_progress_ends_at_the_total(tmp_path):
    write(tmp_path / "a.txt", "12345")
    write(tmp_path / "b.txt", "123")
    calls = []
    list(read_documents(tmp_path, progress=lambda done, total: calls.append((done, total))))
    assert calls == [(5, 8), (8, 8)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"paths": []}, ValueError, "at least one"),
        ({"paths": [3]}, TypeError, "got 3 of type int"),
        ({"paths": b"x"}, TypeError, "paths must be str"),
        ({"format": "xml"}, ValueError, "format must be one of .*got 'xml'"),
        ({"split": "page"}, ValueError, "split must be one of .*got 'page'"),
        ({"on_error": "ignore"}, ValueError, "on_error must be one of"),
        ({"encoding": "klingon"}, ValueError, "got 'klingon'"),
        ({"encoding": "hex"}, ValueError, "got 'hex'"),
        ({"max_chars": 3}, ValueError, "max_chars must be at least 16; got 3"),
        ({"max_chars": 2.5}, TypeError, "max_chars must be an integer"),
        ({"text_column": 3}, TypeError, "text_column must be a str; got 3"),
        ({"progress": True}, TypeError, "progress must be a function"),
    ],
)
def test_arguments_are_checked_at_once(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        read_documents(**{"paths": tmp_path, **arguments})


def test_a_missing_path_is_an_error_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*gone\.txt"):
        read_documents(tmp_path / "gone.txt")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="a link to 'nowhere', which does not exist"):
        read_documents(tmp_path / "link")
