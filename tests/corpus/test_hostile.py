"""Files that a reader must survive: binary, broken, endless, unreadable, circular."""

import builtins
import gzip
import os
import random
import socket
import subprocess
import sys

import pytest

from kexue.corpus import BinaryFileError, CorpusError, read_documents

SIZE = 100_000_000


@pytest.fixture
def good(tmp_path):
    """A folder with one good file, to which a test adds a bad one."""
    (tmp_path / "z.txt").write_text("good")
    return tmp_path


def texts(reader):
    return [document.text for document in reader]


@pytest.mark.parametrize(
    ("content", "encoding", "line", "offset"),
    [
        ("first\nsecond é\nbro".encode() + b"\xff\xfeken\nlast", "utf-8", 3, 19),
        (b"\xef\xbb\xbfa\r\nb\r\xe6\x98", "utf-8", 3, 8),  # a character cut off at the end of the file
        ("\ufefféé\n".encode("utf-16-le") + b"\x00\xdc", "utf-8", 2, 8),
        ("春\n眠\n".encode("gb18030") + b"\x81", "gb18030", 3, 6),
        (b"x" * 600_000 + b"\n\n\xff", "utf-8", 3, 600_002),  # in a later block
        (b"ok \xe9", "ascii", 1, 3),
    ],
)
def test_broken_bytes_are_named_with_line_and_offset(good, content, encoding, line, offset):
    (good / "a.txt").write_bytes(content)
    with pytest.raises(CorpusError) as caught:
        list(read_documents(good, encoding=encoding))
    assert (caught.value.path, caught.value.line, caught.value.offset) == (str(good / "a.txt"), line, offset)
    assert f"line {line}, byte offset {offset}: not valid" in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value.__cause__, UnicodeDecodeError)


def test_broken_bytes_in_records_are_named(tmp_path):
    for name, content in {
        "a.jsonl": b'{"text": "a"}\n{"text": "\xff"}\n',
        "a.json": b'[{"text": "a"},\n{"text": "\xff"}]',
        "a.csv": b"text\n\xff\n",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CorpusError, match=r"line 2, byte offset \d+: not valid utf-8 \(bytes ff") as caught:
            list(read_documents(tmp_path / name))
        assert caught.value.offset == content.index(b"\xff")


def test_a_broken_file_is_skipped_on_request(good):
    (good / "a.txt").write_bytes(b"one\ntwo\n\xff")
    with pytest.raises(CorpusError, match=r"a\.txt, line 3, byte offset 8"):
        list(read_documents(good))
    reader = read_documents(good, on_error="skip")
    assert texts(reader) == ["good"]
    ((path, reason),) = reader.skipped
    assert path == str(good / "a.txt")
    assert reason.startswith("line 3, byte offset 8: not valid utf-8")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"text\0more", "NUL bytes"),
        ("a", b"\x7fELF\0\0", "NUL bytes"),
        ("a.png", b"\x89PNG", r"a binary file \(\.png\)"),
        ("a.tar.gz", gzip.compress(b"tar", mtime=0), r"a binary file \(\.tar\)"),
        ("a.pdf", b"%PDF-1.4", r"a PDF \(\.pdf\); convert it to text first"),
        ("a.csv", b"text\n\0", "NUL bytes"),
        ("a.txt", "no mark".encode("utf-16-le"), "encoding='utf-16'"),
        ("a.txt", b"", "empty"),
    ],
)
def test_files_without_text_are_left_out_of_folders_and_errors_by_name(good, name, content, reason):
    (good / name).write_bytes(content)
    reader = read_documents(good)
    assert texts(reader) == ["good"]
    assert [path for path, _ in reader.skipped] == [str(good / name)]
    with pytest.raises(CorpusError, match=reason):
        list(read_documents(good / name))
    named = read_documents([good / name, good / "z.txt"], on_error="skip")
    assert texts(named) == ["good"]
    assert len(named.skipped) == 1


def test_nul_characters_far_inside_are_removed(good):
    (good / "a.txt").write_bytes(b"x" * 9000 + b"\0y")
    assert texts(read_documents(good)) == ["x" * 9000 + "y", "good"]


def test_a_png_under_the_name_of_a_text_is_noticed(good):
    (good / "a.txt").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    with pytest.raises(BinaryFileError):
        list(read_documents(good / "a.txt"))
    assert texts(read_documents(good)) == ["good"]


@pytest.mark.parametrize("cut", [20, -20])
def test_damaged_compressed_files(good, cut):
    data = gzip.compress(random.Random(0).randbytes(4000).hex().encode())
    (good / "a.txt.gz").write_bytes(data[:cut])
    with pytest.raises(CorpusError, match="damaged"):
        list(read_documents(good))
    (good / "a.txt.gz").write_bytes(b"this is not gzip")
    with pytest.raises(CorpusError, match="cannot be read: Not a gzipped file"):
        list(read_documents(good))
    assert texts(read_documents(good, on_error="skip"))[-1] == "good"


def test_links_are_followed_once_and_circles_are_cut(good):
    (good / "sub").mkdir()
    (good / "sub" / "loop").symlink_to(good)
    (good / "sub" / "self").symlink_to("self")
    (good / "sub" / "nothing").symlink_to("nowhere")
    (good / "zz.txt").symlink_to("z.txt")
    (good / "zzz.txt").hardlink_to(good / "z.txt")
    reader = read_documents(good)
    assert texts(reader) == ["good"]
    assert {os.path.basename(path): reason for path, reason in reader.skipped} == {
        "loop": "the same folder as one before it",
        "self": "a link that leads in a circle",
        "nothing": "a link to nothing",
        "zz.txt": "the same file as one before it",
        "zzz.txt": "the same file as one before it",
    }
    assert texts(read_documents([good, good / "z.txt", good])) == ["good"]


def test_a_link_to_a_file_outside_is_read(good, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "o.txt"
    other.write_text("linked")
    (good / "a.txt").symlink_to(other)
    assert texts(read_documents(good)) == ["linked", "good"]


def test_pipes_sockets_and_devices_are_never_opened(good):
    os.mkfifo(good / "a.txt")  # reading it would wait forever
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(good / "s.txt"))
        (good / "null.txt").symlink_to("/dev/null")
        reader = read_documents(good)
        assert texts(reader) == ["good"]
        reasons = {os.path.basename(path): reason.partition(":")[0] for path, reason in reader.skipped}
        assert reasons == {"a.txt": "a named pipe", "s.txt": "a socket", "null.txt": "a device"}
    with pytest.raises(CorpusError, match=r"a\.txt: a named pipe: it cannot be read twice"):
        list(read_documents(good / "a.txt"))


def test_hidden_files_and_folders_are_left_out(good):
    (good / ".git").mkdir()
    (good / ".git" / "a.txt").write_text("hidden")
    (good / ".hidden.txt").write_text("hidden")
    reader = read_documents(good)
    assert texts(reader) == ["good"]
    assert [reason for _, reason in reader.skipped] == ["hidden", "hidden"]
    assert texts(read_documents(good / ".hidden.txt")) == ["hidden"]


def test_a_file_that_may_not_be_read(good, monkeypatch):
    (good / "a.txt").write_text("secret")
    real = builtins.open

    def refuse(path, *args, **kwargs):
        if str(path).endswith("a.txt"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(CorpusError, match=r"a\.txt: cannot be read: Permission denied"):
        list(read_documents(good))
    reader = read_documents(good, on_error="skip")
    assert texts(reader) == ["good"]
    assert reader.skipped == [(str(good / "a.txt"), "cannot be read: Permission denied")]


def test_a_folder_that_may_not_be_read(good, monkeypatch):
    (good / "sub").mkdir()
    real = os.scandir

    def refuse(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(CorpusError, match="sub: cannot be read: Permission denied"):
        list(read_documents(good))
    assert texts(read_documents(good, on_error="skip")) == ["good"]


def test_a_file_that_goes_away_while_reading(good):
    (good / "a.txt").write_text("first")
    reader = iter(read_documents(good))
    assert next(reader).text == "first"
    (good / "z.txt").unlink()
    with pytest.raises(CorpusError, match="cannot be read: No such file"):
        next(reader)


def test_a_folder_without_anything_to_read_says_what_was_left_out(tmp_path):
    with pytest.raises(ValueError, match="nothing to read in this folder: it is empty"):
        list(read_documents(tmp_path))
    for i in range(7):
        (tmp_path / f"{i}.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"left out: 0\.png \(a binary file \(\.png\)\); .* and 2 more"):
        list(read_documents(tmp_path))
    (tmp_path / "7.txt").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"no document in .* left out: .* and 3 more"):
        list(read_documents(tmp_path))
    (tmp_path / "7.txt").write_text(" \n ")
    with pytest.raises(ValueError, match="no document"):
        list(read_documents(tmp_path / "7.txt"))


def test_file_names_that_are_not_text(tmp_path):
    with open(os.path.join(os.fsencode(tmp_path), b"bad\xff\nname.txt"), "w") as file:
        file.write("one")
    (tmp_path / "b.txt").write_text("two")
    found = list(read_documents(tmp_path))
    assert [d.id for d in found] == ["b.txt", "bad\ufffd\ufffdname.txt"]


def test_deep_folders(tmp_path):
    deep = tmp_path
    for _ in range(300):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "a.txt").write_text("deep")
    assert texts(read_documents(tmp_path)) == ["deep"]


SCRIPT = """
import resource, sys
from kexue.corpus import read_documents
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = length = longest = 0
for document in read_documents(sys.argv[1]):
    count += 1
    length += len(document.text)
    longest = max(longest, len(document.text))
print(count, length, longest, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "times"), [("a.txt", 0.1), ("a.jsonl", 4), ("a.json", 4), ("a.csv", 4)])
def test_a_line_of_100_megabytes_is_cut_in_bounded_memory(tmp_path, name, times):
    file = tmp_path / name
    before, after = {".jsonl": ('{"text": "', '"}'), ".json": ('[{"text": "', '"}]'), ".csv": ("text\n", "")}.get(
        file.suffix, ("", "")
    )
    with open(file, "w") as handle:
        handle.write(before)
        for _ in range(SIZE // 1_000_000):
            handle.write("word " * 200_000)
        handle.write(after)
    ran = subprocess.run([sys.executable, "-c", SCRIPT, str(file)], capture_output=True, text=True, check=True)
    count, length, longest, memory = map(int, ran.stdout.split())
    assert count >= SIZE // 20_000
    assert 0.99 * SIZE < length + count <= SIZE
    assert longest <= 20_000
    assert memory < times * SIZE


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_lines(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("A line of some words to read.\n" * 300_000)
    ran = subprocess.run([sys.executable, "-c", SCRIPT, str(file)], capture_output=True, text=True, check=True)
    count, _, _, memory = map(int, ran.stdout.split())
    assert count == 300_000
    assert memory < 16_000_000
