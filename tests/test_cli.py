"""The command line as a user meets it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slow


def kexue(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "kexue", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=300
    )


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    with open(folder / "notes.jsonl", "w", encoding="utf-8") as file:
        for topic in ("apple", "train", "hospital", "court"):
            for number in range(12):
                text = f"Note {number} about the {topic}. Everybody knows the {topic}; nobody owns {topic} {number}."
                file.write(
                    json.dumps({"id": f"{topic}/{number}", "text": text, "title": f"About {topic} {number}"}) + "\n"
                )
    result = kexue("build", folder / "notes.jsonl", "--out", folder / "space", "--epochs", 2, "--dim", 16)
    assert result.returncode == 0, result.stderr
    assert "48 documents" in result.stdout
    for step in ("read", "tokenise", "count", "vectors", "encoder", "index", "evaluate", "summaries", "report"):
        assert step in result.stderr
    return folder / "space"


def test_search_prints_hits_and_json(space):
    text = kexue("search", space, "the hospital", "-k", 2)
    assert text.returncode == 0
    assert "hospital/" in text.stdout
    found = json.loads(kexue("search", space, "the hospital", "-k", 2, "--json").stdout)
    assert [set(hit) for hit in found] == [{"id", "score", "title", "passage", "evidence"}] * 2
    assert found[0]["id"].startswith("hospital/")


def test_similar_words_and_info_answer_in_json(space):
    hits = json.loads(kexue("similar", space, "train/3", "--json").stdout)
    assert hits
    assert "train/3" not in {hit["id"] for hit in hits}
    words = json.loads(kexue("words", "related", space, "hospital", "--json").stdout)
    assert words
    assert set(words[0]) == {"word", "score"}
    info = json.loads(kexue("info", space, "--json").stdout)
    assert info["documents"] == 48


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["search", "absent", "query"], 1, "does not exist"),
        (["search", "{space}", ""], 2, "empty"),
        (["search", "{space}", "x", "-k", "0"], 2, "-k"),
        (["similar", "{space}", "train/99"], 1, "train/99"),
        (["words", "related", "{space}", "zzz"], 1, "zzz"),
        (["build", "--out", "{space}"], 1, "--force"),
        (["build", "{space}/absent.txt", "--out", "x"], 1, "absent.txt"),
        (["build", "--packages", "nosuchpackage", "--out", "x"], 1, "nosuchpackage"),
        (["build", "a", "--packages", "numpy"], 2, "--packages"),
        (["build", "--text-column", "body"], 2, "PATHS"),
        (["methods", "nosuchmethod"], 2, "nosuchmethod"),
        (["reproduce", "nosuchmethod"], 2, "nosuchmethod"),
        (["nosuchcommand"], 2, "nosuchcommand"),
    ],
)
def test_errors_are_one_clear_message_with_the_right_exit_code(space, tmp_path, arguments, code, message):
    result = kexue(*(a.format(space=space) for a in arguments), cwd=tmp_path)
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_errors_of_the_reader_name_options_of_the_command_line(tmp_path):
    (tmp_path / "pairs.tsv").write_text("a\tfirst\tsecond\n", encoding="utf-8")
    (tmp_path / "broken.txt").write_bytes(b"good\nbad \xff\n")
    result = kexue("build", "pairs.tsv", "--out", "x", cwd=tmp_path)
    assert result.returncode == 1
    assert "--text-column" in result.stderr
    result = kexue("build", "broken.txt", "--out", "x", cwd=tmp_path)
    assert result.returncode == 1
    assert "line 2" in result.stderr
    assert "--encoding" in result.stderr
    assert "--skip-errors" in result.stderr


def test_help_texts_lose_no_words_to_markup():
    result = kexue("build", "--help")
    assert "guessed" in result.stdout
    assert "decides" in result.stdout


def test_methods_lists_all_rows(space):
    rows = json.loads(kexue("methods", "--json").stdout)
    assert len(rows) == 38
    state = {row["slug"]: row["state"] for row in rows}
    for slug in ("geometric-word-vectors", "margin-softmax", "flatnce"):
        assert state[slug] == {"importable": True, "reproduced": True, "page": True, "missing": []}
    table = kexue("methods").stdout
    assert len(table.splitlines()) == 39
    one = json.loads(kexue("methods", "flatnce", "--json").stdout)
    assert one["article"] == 8586


def test_ctrl_c_leaves_a_resumable_state(space, tmp_path):
    out = tmp_path / "space"
    command = [sys.executable, "-m", "kexue", "build", str(space.parent / "notes.jsonl"), "--out", str(out)]
    command += ["--epochs", "2000", "--dim", "16"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    # Not before the encoder trains: a signal in the middle of an import ends Python itself by that signal (status -2).
    deadline = time.monotonic() + 60
    while not any(tmp_path.rglob("metrics.jsonl")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "continue" in errors
    assert not out.exists()
    assert any(name.endswith(".partial") for name in os.listdir(tmp_path))


def test_importing_kexue_is_quick_and_brings_no_torch():
    code = "import sys, kexue; print('torch' in sys.modules, 'numpy' in sys.modules, kexue.__version__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split()[:2] == ["False", "False"]


@pytest.mark.parametrize(
    ("number", "orderly", "code"),
    [(signal.SIGINT, False, 130), (signal.SIGTERM, False, 143), (signal.SIGINT, True, 130), (signal.SIGTERM, True, 0)],
)
def test_the_exit_code_of_an_interrupted_run(capsys, tmp_path, number, orderly, code):
    import typer

    from kexue.cli.common import interruptible
    from kexue.training import TrainingInterrupted

    with pytest.raises(typer.Exit) as caught, interruptible("interrupted", orderly):
        raise TrainingInterrupted(number, 7, tmp_path)
    assert caught.value.exit_code == code
    assert "interrupted" in capsys.readouterr().err
