"""The benchmark harness itself; the speeds are measured by `make bench`, never asserted."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def harness():
    spec = importlib.util.spec_from_file_location("kexue_benchmark_harness", ROOT / "benchmarks" / "harness.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_contenders_take_turns_and_the_ratio_is_against_the_peer(harness, monkeypatch):
    clock, calls = [0.0], []

    def work(name, seconds):
        def function():
            calls.append(name)
            clock[0] += seconds

        return function

    monkeypatch.setattr(harness.time, "process_time", lambda: clock[0])
    table = harness.compare("t", "w", {"ours": work("ours", 0.5), "peer": work("peer", 2.0)}, peer="peer", repeats=3)
    assert calls == ["ours", "peer"] * 4
    assert [(row.name, row.milliseconds, row.ratio) for row in table.rows] == [("ours", 500, 4), ("peer", 2000, 1)]
    assert "| ours | 500 | 4.00 |" in table.markdown()
    assert "Python " in table.markdown()


def test_a_missing_peer_leaves_the_first_contender_as_the_measure(harness):
    table = harness.compare("t", "w", {"ours": lambda: None}, peer="absent", repeats=1)
    assert table.peer == "ours"


def test_peak_memory_counts_torch_allocations(harness):
    import torch

    assert harness.peak_memory(lambda: torch.ones(1 << 20)) >= 4
