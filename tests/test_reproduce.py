"""The runner of reproductions and its report page, on a made-up method."""

import importlib.machinery
import json
import subprocess
import sys
import types

import pytest

from kexue.reproduce import Measurement, available, run, write_report
from kexue.reproduce.report import figure_tables


@pytest.fixture
def fake(monkeypatch):
    """Put a reproduction in the place of the one of flatnce."""

    def install(verdict="partly"):
        def measure(quick, seed):
            return Measurement(
                figures={"error": 0.12345678, "seed": seed, "table": {"n": [1, 2], "value": [0.5, 0.25]}},
                verdict=verdict,
                plot=lambda figure: figure.subplots().plot([0, 1]),
                note="<script>quick</script>" if quick else "",
            )

        module = types.ModuleType("kexue.reproduce.flatnce")
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        module.CLAIM, module.measure = "A < B holds.", measure
        monkeypatch.setitem(sys.modules, "kexue.reproduce.flatnce", module)

    return install


def test_run_returns_figures_verdict_seconds_and_a_figure(fake, tmp_path):
    fake()
    result = run("flatnce", seed=3, out=tmp_path)
    assert (result.verdict, result.figures["seed"], result.claim) == ("partly", 3, "A < B holds.")
    assert result.seconds >= 0
    assert result.figure_path.read_bytes().startswith(b"\x89PNG")
    assert run("flatnce").figure_path is None


def test_the_page_shows_everything_and_escapes_it(fake, tmp_path):
    fake()
    page = write_report([run("flatnce", quick=True, out=tmp_path)], tmp_path / "r.html").read_text(encoding="utf-8")
    for part in ("A &lt; B holds.", "partly", "0.1235", "&lt;script&gt;quick", "data:image/png;base64,"):
        assert part in page
    assert "<script>" not in page


def test_tables_split_single_figures_from_columns():
    tables = dict(figure_tables({"a": 1.5, "t": {"x": [1, 2], "y": ["p", "q"]}}))
    assert tables["Figures"] == (["figure", "value"], [["a", "1.5"]])
    assert tables["t"] == (["x", "y"], [["1", "p"], ["2", "q"]])


def test_a_made_up_verdict_unknown_slugs_and_bad_seeds_are_refused(fake, monkeypatch):
    fake("splendid")
    with pytest.raises(ValueError, match="'splendid'"):
        run("flatnce")
    with pytest.raises(ValueError, match="unknown method 'nothing'"):
        run("nothing")
    monkeypatch.setattr("kexue.reproduce.runner.available", lambda: ["flatnce"])
    with pytest.raises(ValueError, match="no reproduction yet"):
        run("bigan-qp")
    with pytest.raises(ValueError, match="seed"):
        run("flatnce", seed=-1)


def test_the_three_finished_rows_can_be_reproduced():
    assert {"geometric-word-vectors", "margin-softmax", "flatnce"} <= set(available())


@pytest.mark.slow
def test_the_command_writes_json_and_the_page(tmp_path):
    command = [sys.executable, "-m", "kexue", "reproduce", "flatnce", "--quick", "--json", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    rows = json.loads(result.stdout)
    assert rows[0]["slug"] == "flatnce"
    assert rows[0]["quick"] is True
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "flatnce.png").is_file()
