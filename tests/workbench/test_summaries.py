"""Summaries by what was learned from pairs and by the vectors of a workspace, in the library and as commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from kexue.cli import app
from kexue.corpus import Document
from kexue.tasks import Summarizer
from kexue.workbench import Workspace, WorkspaceError, parts, summary_step
from kexue.workbench.manifest import NAME
from kexue.workbench.summaries import (
    MANIFEST,
    SummaryModel,
    SummarySettings,
    hold_out,
    open_summarizer,
    train_summaries,
)
from kexue.workbench.summary_pairs import Pair
from kexue.workbench.summary_vectors import piece_features, take_pieces

THINGS = ("budget", "bridge", "school", "harbour", "library", "museum", "railway", "stadium", "market", "tower")
PLACES = ("north", "south", "east", "west", "old", "new")
QUICK = ["--epochs", 3, "--folds", 2, "--extract-only", "yes"]


def kexue(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)


def make_pairs():
    """The decision, which stands in different places, is the summary."""
    rng = np.random.default_rng(0)
    pairs = []
    for i, (place, thing) in enumerate((p, t) for p in PLACES for t in THINGS):
        rest = [
            f"The {place} district met on day {i}.",
            f"Many spoke about the {thing}, some of them at length.",
            "Coffee was served in the break.",
            f"The weather in the {place} was fine.",
        ]
        rest.insert(int(rng.integers(1, 5)), f"Decision: the {place} {thing} will be built for {i + 3} million.")
        pairs.append(Pair(f"p{i}", " ".join(rest), f"The {place} {thing} will be built for {i + 3} million."))
    return pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("summaries")


@pytest.fixture(scope="module")
def lines(folder):
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in make_pairs()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(folder, lines):
    result = kexue("summarize", "train", lines, "--out", folder / "model", *QUICK, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), folder / "model"


@pytest.fixture(scope="module")
def text(folder):
    path = folder / "note.txt"
    path.write_text(make_pairs()[7].text.replace("Coffee", "Tea"), encoding="utf-8")
    return path


def test_training_compares_with_the_opening_and_textrank_on_held_out_pairs(model):
    info, _ = model
    assert info["figures"] == {"pairs": 60, "held-out pairs": 6, "generator": "not used"}
    rows = {row["name"]: row for row in info["evaluation"]}
    assert list(rows) == ["lead-1", "lead-3", "TextRank", "summarizer"]
    assert rows["summarizer"]["main"] > 0.7  # the decision itself; any other sentence shares a few words
    assert rows["summarizer"]["main"] > max(rows[name]["main"] for name in ("lead-1", "lead-3", "TextRank")) + 0.2
    assert {row["documents"] for row in rows.values()} == {6}


def test_a_file_becomes_a_summary_whose_pieces_stand_in_it(model, text):
    shown = kexue("summarize", model[1], text)
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.strip() == "Decision: the north stadium will be built for 10 million."
    found = json.loads(kexue("summarize", model[1], text, "--json").stdout)
    assert set(found) == {"id", "summary", "method", "pieces"}
    assert found["id"] == "note.txt"
    assert found["method"] == "trained"
    assert found["summary"] == shown.stdout.strip()
    content = text.read_text(encoding="utf-8")
    for piece in found["pieces"]:
        assert content[piece["start"] : piece["end"]] == piece["text"]
        assert 0 < piece["score"] < 1
    assert SummaryModel(model[1]).summary(content).text == found["summary"]


def test_a_length_and_a_number_of_pieces_are_kept(model, text):
    opened, content = SummaryModel(model[1]), text.read_text(encoding="utf-8")
    for length in (60, 100, 150, 1000):
        found = opened.summary(content, length)
        assert sum(len(piece.text) for piece in found.pieces) <= length
        positions = [piece.position for piece in found.pieces]
        assert positions == sorted(set(positions))
    assert len(opened.summary(content, 1000).pieces) == 5
    assert len(opened.summary(content, pieces=2).pieces) == 2
    assert len(opened.summary(content, 1).pieces) == 1
    best = opened.summary(content, pieces=1).pieces[0]
    assert best.score == max(piece.score for piece in opened.summary(content, 1000).pieces)


def test_many_documents_are_a_line_each(model, lines, tmp_path):
    result = kexue("summarize", model[1], lines, "--pieces", 1)
    assert result.exit_code == 0, result.stderr
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert [row[0] for row in rows] == [pair.id for pair in make_pairs()]
    assert all(len(row) == 2 and row[1] for row in rows)
    records = [
        json.loads(line)
        for line in kexue("summarize", model[1], lines, "--pieces", 1, "--json").stdout.split("\n")[:-1]
    ]
    assert [(r["id"], r["summary"]) for r in records] == [tuple(row) for row in rows]
    more = tmp_path / "b.txt"
    more.write_text("One sentence. Another one.", encoding="utf-8")
    shown = kexue("summarize", model[1], more, more, "--pieces", 1).stdout.splitlines()
    assert [line.split("\t")[0] for line in shown] == ["b.txt", "b.txt"]


def test_standard_input_is_a_text(model, text):
    content = text.read_text(encoding="utf-8")
    result = kexue("summarize", "--json", model[1], "-", stdin=content)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["summary"] == SummaryModel(model[1]).summary(content).text
    records = json.dumps({"id": "x", "text": content})
    assert kexue("summarize", model[1], "-", "--format", "jsonl", stdin=records).stdout.startswith("x\t")


def test_standard_input_is_named_and_read_once(model, text):
    result = kexue("summarize", model[1], "-", "-", stdin="A text. Another.")
    assert result.exit_code == 2
    with pytest.raises(ValueError, match="^standard input: empty"):
        raise kexue("summarize", model[1], "-", stdin="").exception


def test_one_bad_file_among_others(model, text, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("", encoding="utf-8")
    for files in ([empty, text], [text, empty]):
        result = kexue("summarize", model[1], *files, "--skip-bad")
        assert result.exit_code == 0, result.exception
        assert result.stdout.startswith("note.txt\t")
        assert result.stdout.count("\n") == 1
        assert "empty.txt: empty" in result.stderr.replace("\n", "")
    result = kexue("summarize", model[1], empty, empty, "--skip-bad")
    assert result.exit_code == 1
    assert "no document" in str(result.exception)
    result = kexue("summarize", model[1], text, tmp_path / "nothing.txt")
    assert isinstance(result.exception, FileNotFoundError)
    assert not result.stdout


def test_pairs_that_repeat_a_text_and_large_seeds(tmp_path):
    with pytest.raises(ValueError, match="two pairs of different texts; got 1"):
        train_summaries([Pair("a", "A b. C d.", "A b.")] * 30, tmp_path / "same")
    assert not list(tmp_path.glob(".*.partial"))
    with pytest.raises(ValueError, match="seed must be below 2 "):
        SummarySettings(seed=2**63)
    lines = []
    pairs = [Pair("a", "A b. C d.", "A b."), Pair("b", "E f. G h.", "G h.")] * 2 + make_pairs()[:1]
    settings = SummarySettings(extract_only=True, epochs=1, folds=5)
    train_summaries(pairs, tmp_path / "few", settings, log=lines.append)
    assert any("folds 3" in line for line in lines)
    lines.clear()
    twice = make_pairs()[:30] * 2
    held = {pair.text for pair in hold_out(twice, 0.1, 0)[1]}
    repeated = sum(pair.text in held for pair in twice) - 6
    assert repeated > 0
    train_summaries(twice, tmp_path / "twice", settings, log=lines.append)
    assert f"6 held out, {repeated} that repeat their text or summary not learned from" in lines[0]


def test_help_explains_both_and_a_folder_called_train_can_be_named(model, text, tmp_path, monkeypatch):
    shown = kexue("summarize", "--help").stdout
    assert "summarize train PAIRS" in shown
    assert "summarize DIR FILE" in shown
    assert "--length" in kexue("summarize", "DIR", "--help").stdout
    assert "--folds" in kexue("summarize", "train", "--help").stdout
    assert kexue("summarize").exit_code == 2
    shutil.copytree(model[1], tmp_path / "train")
    monkeypatch.chdir(tmp_path)
    assert kexue("summarize", "./train", text).stdout == kexue("summarize", model[1], text).stdout


@pytest.mark.parametrize("text", ["", " \n", "🎉", "x" * 5000, "\u4e2d" * 3, "no mark", ". . .", "e\u0301\n\ne\u0301"])
def test_any_text_has_a_summary_of_its_own_words(model, workspace, text):
    for summarizer in (SummaryModel(model[1]), workspace):
        found = summarizer.summary(text)
        assert bool(found.text) == bool(text.strip())
        for piece in found.pieces:
            assert " ".join(text[piece.start : piece.end].split()) == piece.text


def test_wrong_use_is_told_in_a_line(model, workspace, text, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    (tmp_path / "records.jsonl").write_text('{"id": "a"}\n')
    (tmp_path / "dir").mkdir()
    for arguments, code, message in (
        ([model[1], tmp_path / "absent.txt"], 1, "no such file"),
        ([model[1], tmp_path / "empty.txt"], 1, "empty.txt"),
        ([model[1], tmp_path / "binary.txt"], 1, "binary"),
        ([model[1], tmp_path / "records.jsonl"], 1, "line 1"),
        ([tmp_path / "absent", text], 1, "does not exist; expected a model made by `kexue summarize train"),
        ([tmp_path / "dir", text], 1, "is neither"),
        ([text, text], 1, "is a file"),
        ([model[1], text, "--method", "vectors"], 1, "has no vectors"),
        ([workspace.folder, text, "--method", "trained"], 1, "has no summarizer of its own"),
        ([model[1], text, "--length", 0], 2, ""),
        ([model[1], text, "--method", "best"], 2, ""),
        ([model[1], text, "--format", "pdf"], 2, ""),
        ([model[1]], 2, ""),
        (["train", text, "--extract-only", "maybe"], 2, ""),
        (["train", text, "--held-out", 0.9], 2, ""),
        (["train", text, "--encoder", tmp_path / "absent"], 2, ""),
        (["train", text, "--out", tmp_path / "out"], 1, "pairs of a text and its summary are JSON lines"),
        (["train", tmp_path / "records.jsonl", "--out", tmp_path / "out"], 1, "records.jsonl, line 1"),
    ):
        result = kexue("summarize", *arguments)
        assert result.exit_code == code, (arguments, result.stderr, result.exception)
        assert message in f"{result.exception}{result.stderr}", arguments
        assert result.stdout == ""
    assert not (tmp_path / "out").exists()
    with pytest.raises(TypeError, match="must be a str"):
        workspace.summarize(b"bytes")
    for wrong in ({"length": 0}, {"pieces": 0}, {"method": "best"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            workspace.summarize("text", **wrong)


def test_a_folder_that_stands_there_is_kept(model, lines, tmp_path):
    with pytest.raises(WorkspaceError, match="--force"):
        train_summaries([lines], model[1])
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(WorkspaceError, match="is no model of summaries"):
        train_summaries([lines], tmp_path, force=True)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    damaged = tmp_path / "damaged"
    shutil.copytree(model[1], damaged)
    (damaged / MANIFEST).write_text("{}")
    with pytest.raises(WorkspaceError, match="cannot be read .*train it again"):
        open_summarizer(damaged)
    with pytest.raises(TypeError, match="Pair"):
        train_summaries([Document("a", "text")], tmp_path / "out")
    with pytest.raises(ValueError, match="at least two pairs"):
        train_summaries(make_pairs()[:1], tmp_path / "out")
    for bad in ({"language": "xx"}, {"epochs": 0}, {"folds": 1}, {"held_out": 0.6}, {"seed": -1}, {"extract_only": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SummarySettings(**bad)


def test_what_is_held_out_is_not_learned_from():
    pairs = make_pairs()
    copies = [Pair(f"copy of {pair.id}", pair.text, pair.summary) for pair in pairs]
    train, held = hold_out([*pairs, *copies], 0.1, seed=0)
    assert len(held) == 12
    assert not {pair.text for pair in train} & {pair.text for pair in held}
    assert not {pair.summary for pair in train} & {pair.summary for pair in held}
    assert hold_out(pairs[:10], 0.1, 0) == (pairs[:10], [])
    assert hold_out(pairs, 0.0, 0) == (pairs, [])


def test_sentences_near_the_whole_text_are_taken_and_do_not_repeat_each_other(workspace):
    text = (
        "Compute the norm of a matrix. Lunch is at noon. Compute the norm of a matrix! The matrix is read once and its "
        "rank is returned. An empty matrix raises an error, and its norm is zero. Somebody sang."
    )
    found = workspace.summary(text, 110)
    assert found.method == "vectors"
    assert "Lunch" not in found.text
    assert "sang" not in found.text
    assert found.text.startswith("Compute the norm of a matrix.")
    assert found.text.count("Compute the norm") == 1
    assert len(found.text) <= 110
    assert workspace.summarize(text, 110) == found.text
    assert workspace.summarize(text, pieces=1) == max(found.pieces, key=lambda piece: piece.score).text
    scores = np.array([0.9, 0.8, 0.5], np.float32)
    vectors = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    sizes = np.array([4, 4, 4])
    assert take_pieces(sizes, scores, vectors, 8, None) == [0, 2]
    assert take_pieces(np.array([4, 9, 4]), scores, vectors, 3, None) == [0]
    assert take_pieces(sizes, scores, vectors, 9, 1) == [0]
    vectors[1] = 0.8, 0.6  # worth 0.8 - 0.4 after the first; the last 0.5, then the other way round
    assert take_pieces(sizes, scores, vectors, 12, None) == [0, 2, 1]
    assert take_pieces(sizes, scores, vectors, 11, None) == [0, 2]
    assert take_pieces(sizes, scores, vectors, 10, None, strict=False) == [0, 2, 1]
    assert take_pieces(sizes, scores, vectors, 9, None, strict=False) == [0, 2]


def documentation(count=70):
    documents = []
    for i, pair in enumerate(make_pairs() + make_pairs()[: count - 60]):
        summary = f"{pair.summary[:-1]} in year {i}."
        package = f"package{i % 7}"
        text = f"{summary}\n\n{pair.text} It is {summary[4:]}"
        meta = {"package": package, "kind": "function"}
        documents.append(Document(f"{package}.part.f{i}", text, summary, (package, f"{package}.m{i % 23}"), meta))
    return documents


def test_documentation_teaches_a_workspace_to_summarise(tmp_path, monkeypatch):
    monkeypatch.setattr(summary_step, "EPOCHS", 3)
    lines = []
    space = Workspace.build(documentation(), tmp_path / "space", epochs=1, dim=16, log=lines.append)
    assert any(line.startswith("summaries pairs ") for line in lines)
    figures = space.info()["figures"]["summaries"]
    assert figures["pairs"] + figures["held back"] == 70
    assert 5 <= figures["held back"] <= 14
    rows = space.info()["evaluation"][summary_step.TITLE]
    assert [row["name"] for row in rows] == ["lead-1", "lead-3", "TextRank", "vectors", "summarizer"]
    assert rows[-1]["main"] > rows[0]["main"]
    page = space.report().read_text(encoding="utf-8")
    assert "summary of the rest" in page
    assert figures["examples"][0]["id"] in page
    text = documentation()[3].text
    assert space.summary(text).method == "trained"
    assert space.summary(text, method="vectors").method == "vectors"
    with Workspace.open(space.folder) as opened:
        assert opened.summary(text) == space.summary(text)
    plain = Summarizer(extract_only=True, folds=2, epochs=1).fit([text, text + " More."], ["A summary.", "Another."])
    shutil.copytree(space.folder, tmp_path / "earlier")
    plain.save(tmp_path / "earlier" / parts.SUMMARIZER)  # of an earlier build: it does not see the vectors
    earlier = parts.Parts.load(tmp_path / "earlier")
    assert earlier.summarizer.predict([text]) == plain.predict([text])
    earlier.store.close()
    features = piece_features(space._parts)(["The first piece.", "", "!?", "The last piece is here."])
    assert features.shape == (4, 279)
    assert np.isfinite(features).all()
    chinese = "北京今天开会。天气很好。大家都来了。"  # nothing of the kind was learned from
    assert space.summary(chinese).method == "vectors"
    assert space.summary(chinese, method="trained").method == "trained"
    again = Workspace.build(documentation(), tmp_path / "again", epochs=1, dim=16)
    assert again.info()["figures"]["summaries"] == figures
    told = kexue("info", space.folder).stdout
    assert told.count("\nsummarizer ") == 1
    assert "used the summarizer" in told


def test_a_summarizer_that_does_not_beat_the_vectors_is_not_used(tmp_path, monkeypatch):
    scores = {"lead-1": 0.1, "vectors": 0.2, "summarizer": 0.2}
    rows = [{"name": name, "main": score} for name, score in scores.items()]
    monkeypatch.setattr(summary_step, "EPOCHS", 1)
    monkeypatch.setattr(summary_step, "compared", lambda *given: rows)
    lines = []
    space = Workspace.build(documentation(), tmp_path / "space", epochs=1, dim=16, log=lines.append)
    (line,) = (line for line in lines if line.startswith("summaries"))
    assert "summarizer 0.200, lead-1 0.100, vectors 0.200" in line
    assert "used the vectors" in line
    text = documentation()[3].text
    assert space.summary(text).method == "vectors"
    with pytest.raises(ValueError, match="no better than the vectors"):
        space.summary(text, method="trained")
    assert "by the vectors" in space.report().read_text(encoding="utf-8")


def test_what_cannot_be_measured_is_not_learned(tmp_path):
    one = [replace(document, labels=("package", "package.module")) for document in documentation()]
    space = Workspace.build(one, tmp_path / "space", epochs=1, dim=16)
    assert "too few modules" in space.info()["figures"]["summaries"]["result"]
    assert space.summary(one[0].text).method == "vectors"


def test_a_workspace_of_an_earlier_version_summarises_by_vectors(tmp_path, workspace):
    old = tmp_path / "old"
    shutil.copytree(workspace.folder, old)
    manifest = json.loads((old / NAME).read_text(encoding="utf-8"))
    assert "nothing to learn from" in manifest["figures"].pop("summaries")["result"]
    (old / NAME).write_text(json.dumps(manifest), encoding="utf-8")
    space = Workspace.open(old)
    assert space.summary("The matrix has a norm. It rains.").method == "vectors"
    assert space.info()["evaluation"] == workspace.info()["evaluation"]


def test_few_summaries_are_not_learned_from_and_own_ones_are(tmp_path, documents):
    assert summary_step.pair_of(documents[0]) is None
    own = Document("a", "Text. More.", meta={"summary": "Short."})
    assert summary_step.pair_of(own) == Pair("a", "Text. More.", "Short.")
    assert summary_step.pair_of(documentation()[0]).summary == documentation()[0].title
    one = Document("a", "Sum of numbers.\n\nOne sentence only", "Sum of numbers.", meta={"package": "p"})
    assert summary_step.pair_of(one) is None


@pytest.mark.slow
def test_a_killed_and_then_interrupted_run_continues_to_the_same_model(tmp_path, lines, model):
    options = [str(option) for option in QUICK]
    out = tmp_path / "cut"
    command = [sys.executable, "-m", "kexue", "summarize", "train", str(lines), "--out", str(out), *options]
    for number, code, place in ((signal.SIGKILL, -9, "fold-0"), (signal.SIGINT, 130, "fold-1")):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while not any(path.parent.name == place for path in tmp_path.rglob("metrics.jsonl")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == code, errors
        assert not out.exists()
        assert any(name.endswith(".partial") for name in os.listdir(tmp_path))
    assert "continue" in errors
    assert "Traceback" not in errors
    assert kexue("summarize", "train", lines, "--out", out, *options).exit_code == 0
    assert not any(name.endswith(".partial") for name in os.listdir(tmp_path))
    weights = [(folder / "labelers.safetensors").read_bytes() for folder in (out, model[1])]
    assert weights[0] == weights[1]
    assert SummaryModel(out).info["evaluation"] == model[0]["evaluation"]
