"""Drift between two corpora: what it finds, what it adds up to, what it refuses."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kexue.cli import app
from kexue.stats import frechet_distance
from kexue.workbench.drift import FITTED, _sample, drift

PETS = ["cats", "dogs", "birds", "fish", "pets", "animals", "food", "vets"]
CARS = ["engine", "petrol", "wheels", "car", "brakes", "road"]


def _write(path, texts, prefix=""):
    lines = [json.dumps({"id": f"{prefix}{i}", "text": text}, ensure_ascii=False) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def piles(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("drift"), random.Random(0)

    def say(words):
        return " ".join(rng.choices(words, k=12))

    _write(folder / "a.jsonl", [say(PETS) for _ in range(60)])
    _write(folder / "same.jsonl", [say(PETS) for _ in range(60)])
    _write(folder / "b.jsonl", [say(PETS) for _ in range(50)] + [say(CARS) for _ in range(5)], "b")
    return folder


def test_planted_documents_come_first(piles):
    found = drift(piles / "a.jsonl", piles / "b.jsonl")
    assert {share.id for share in found.documents[:5]} == {f"b{i}" for i in range(50, 55)}
    assert found.sizes == (60, 55)
    assert len(found.documents) == 115
    assert sum(share.contribution for share in found.documents) == pytest.approx(found.distance)
    contributions = [share.contribution for share in found.documents]
    assert contributions == sorted(contributions, reverse=True)
    assert found.p_value <= 0.05
    assert found.chance < found.distance
    assert found.documents[0].title.split()[0] in CARS


def test_same_source_is_no_drift(piles):
    found = drift(piles / "a.jsonl", piles / "same.jsonl")
    assert found.p_value > 0.05
    equal = drift(piles / "a.jsonl", piles / "a.jsonl")
    assert (equal.distance, equal.p_value) == (0.0, 1.0)
    result = CliRunner().invoke(app, ["drift", str(piles / "a.jsonl"), str(piles / "a.jsonl"), "-k", "1"])
    assert " 0.00%  A" in result.stdout


def test_texts_that_are_all_alike(tmp_path, recwarn):
    _write(tmp_path / "a.jsonl", ["the same text"] * 5)
    assert drift(tmp_path / "a.jsonl", tmp_path / "a.jsonl").distance == 0.0
    assert not [str(warning.message) for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


def test_deals_too_few_for_a_verdict(piles):
    sides = [str(piles / "a.jsonl"), str(piles / "b.jsonl")]
    few = CliRunner().invoke(app, ["drift", *sides, "--permutations", "18"])
    assert "p = 0.053, fewer deals than the 19 that could tell" in few.stdout
    enough = CliRunner().invoke(app, ["drift", *sides, "--permutations", "19"])
    assert "p = 0.05, more than chance" in enough.stdout


def test_swapping_the_sides_keeps_the_distance_and_runs_are_equal(piles):
    one = drift(piles / "a.jsonl", piles / "b.jsonl", permutations=0)
    again = drift(piles / "a.jsonl", piles / "b.jsonl", permutations=0)
    other = drift(piles / "b.jsonl", piles / "a.jsonl", permutations=0)
    assert one == again
    assert one.p_value is None
    assert one.chance is None
    assert other.distance == pytest.approx(one.distance, rel=1e-6)


def test_chinese_texts(tmp_path):
    rng = random.Random(0)
    lines = ["春眠不觉晓", "处处闻啼鸟", "夜来风雨声", "花落知多少", "明月几时有", "把酒问青天"]
    poems = ["，".join(rng.choices(lines, k=4)) for _ in range(39)]
    _write(tmp_path / "a.jsonl", poems[:20])
    _write(tmp_path / "b.jsonl", [*poems[20:], "股票市场今天大幅下跌，投资者恐慌👍"])
    found = drift(tmp_path / "a.jsonl", tmp_path / "b.jsonl", permutations=19)
    assert (found.documents[0].id, found.documents[0].source) == ("19", "B")


def test_texts_in_the_vectors_of_a_workspace(piles, workspace, tmp_path):
    documents = list(workspace._parts.store)
    text = [{"id": d.id, "text": d.text} for d in documents[:30]]
    (tmp_path / "part.jsonl").write_text("\n".join(map(json.dumps, text)), encoding="utf-8")
    found = drift(workspace.folder, tmp_path / "part.jsonl", permutations=0)
    assert found.features == "workspace"
    assert found.dim == 32
    assert found.sizes == (len(documents), 30)
    named = drift(tmp_path / "part.jsonl", workspace.folder, workspace=workspace.folder, permutations=0)
    assert named.distance == pytest.approx(found.distance, rel=1e-9)
    # Words that the workspace does not know are no vectors, and no error.
    assert drift(piles / "a.jsonl", piles / "b.jsonl", workspace=workspace.folder, permutations=0).distance >= 0


def test_features(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)), rng.normal(size=(30, 6)) + 0.3
    y[7] += 9
    np.save(tmp_path / "x.npy", x.astype(np.float32))
    np.savez(tmp_path / "y.npz", features=y, ids=np.array([f"row {i}" for i in range(30)]))
    found = drift(tmp_path / "x.npy", tmp_path / "y.npz")
    assert (found.documents[0].id, found.documents[0].source, found.documents[0].title) == ("row 7", "B", "")
    expected = frechet_distance(torch.tensor(x.astype(np.float32)).double(), torch.tensor(y))
    assert found.distance == pytest.approx(float(expected))
    assert found.features == "given"
    assert "x.npy:40" in {share.id for share in found.documents}
    # More dimensions than rows, whole numbers, an array under another name.
    np.savez(tmp_path / "wide.npz", anything=rng.integers(0, 9, size=(4, 50)))
    wide = drift(tmp_path / "wide.npz", tmp_path / "wide.npz")
    assert (wide.distance, wide.p_value) == (pytest.approx(0.0, abs=1e-6), 1.0)


def test_chance_is_that_of_a_permutation_test(tmp_path):
    """Each deal is a distance between halves of the same rows, whatever the sides were."""
    x = np.random.default_rng(1).normal(size=(20, 3))
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", x + 100)
    from kexue.workbench.drift import _deals

    rows = np.concatenate([x, x + 100])
    dealt = list(_deals(x, x + 100, 3, seed=4))
    rng = np.random.default_rng(4)
    for value in dealt:
        order = rng.permutation(40)
        expected = frechet_distance(torch.tensor(rows[order[:20]]), torch.tensor(rows[order[20:]]))
        assert value == pytest.approx(float(expected), rel=1e-6)


def test_a_sample_is_bounded_and_fair():
    class Text:
        title = ""

        def __init__(self, text):
            self.text = text

    kept = _sample((Text(str(i)) for i in range(FITTED + 500)), 0, lambda amount: None)
    assert len(kept) == FITTED == len(set(kept))
    assert 200 < sum(int(text) >= FITTED for text in kept) <= 500


@pytest.mark.parametrize(
    ("a", "b", "options", "words"),
    [
        ("a.jsonl", "x.npy", {}, "both be texts or both be features"),
        ("x.npy", "nan.npy", {}, r"nan.npy must hold finite values; got 2"),
        ("x.npy", "flat.npy", {}, r"numbers of shape \(N, D\)"),
        ("x.npy", "words.npy", {}, r"numbers of shape"),
        ("x.npy", "broken.npy", {}, "broken.npy is no file of features"),
        ("x.npy", "two.npz", {}, "one array, or one named features; got"),
        ("x.npy", "ids.npz", {}, "an id for each of its 3 rows; got 2"),
        ("x.npy", "wide.npy", {}, "same width; got 2 and 3"),
        ("x.npy", "one.npy", {}, "B must hold at least 2 documents"),
        ("x.npy", "x.npy", {"workspace": "w"}, "are for texts"),
        ("x.npy", "x.npy", {"permutations": -1}, "permutations must be"),
        ("a.jsonl", "single.jsonl", {}, "at least 2 documents; got 60 and 1"),
        ("signs.jsonl", "signs.jsonl", {}, "no words to compare"),
        ("a.jsonl", "a.jsonl", {"workspace": "nowhere"}, "does not exist"),
    ],
)
def test_bad_input(piles, a, b, options, words):
    np.save(piles / "x.npy", np.eye(3)[:, :2])
    np.save(piles / "nan.npy", np.array([[np.nan, np.inf], [0, 0]]))
    np.save(piles / "flat.npy", np.zeros(4))
    np.save(piles / "words.npy", np.array([["a", "b"]]))
    np.save(piles / "wide.npy", np.zeros((3, 3)))
    np.save(piles / "one.npy", np.zeros((1, 2)))
    np.savez(piles / "two.npz", p=np.zeros((3, 2)), q=np.zeros((3, 2)))
    np.savez(piles / "ids.npz", features=np.zeros((3, 2)), ids=np.array(["a", "b"]))
    (piles / "broken.npy").write_text("hello")
    _write(piles / "single.jsonl", ["alone"])
    _write(piles / "signs.jsonl", ["!!", "??"])
    with pytest.raises(ValueError, match=words):
        drift(piles / a, piles / b, **options)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        drift(tmp_path / "x.npy", tmp_path / "y.npy")
    with pytest.raises(FileNotFoundError, match="no such file"):
        drift(tmp_path / "x.jsonl", tmp_path / "y.jsonl")


def test_command(piles):
    runner = CliRunner()
    result = runner.invoke(app, ["drift", str(piles / "a.jsonl"), str(piles / "b.jsonl"), "-k", "2"])
    assert result.exit_code == 0, result.output
    assert "more than chance" in result.output
    assert " 1. " in result.output
    assert " 3. " not in result.output
    result = runner.invoke(app, ["drift", str(piles / "a.jsonl"), str(piles / "b.jsonl"), "--json"])
    found = json.loads(result.stdout)
    assert len(found["documents"]) == 115
    assert found["sizes"] == {"A": 60, "B": 55}
    assert set(found["documents"][0]) == {"id", "source", "contribution", "title"}
    assert found["documents"][0]["source"] == "B"
    assert found["distance"] == pytest.approx(sum(d["contribution"] for d in found["documents"]))
