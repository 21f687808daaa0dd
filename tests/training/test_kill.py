"""Runs in processes of their own that are killed or told to stop."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kexue.training import newest_checkpoint
from training.runs import STEPS, train

RUNS = Path(__file__).with_name("runs.py")


def start(out, where, number, **options):
    paths = [str(RUNS.parents[2] / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, RUNS, out, where, str(number)], env=environment, **options)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_again_and_again_it_ends_with_the_bits_of_the_undisturbed_run(tmp_path):
    expected, undisturbed = train(tmp_path / "whole")
    out = tmp_path / "killed"
    # Before the first checkpoint; while the first one is written; between later ones; and between the rename of a
    # checkpoint and that of `latest`. The system calls are counted from the start of each process; that a kill before
    # any one of them is harmless is tested in test_checkpoint.py.
    kills = [("step", 3), ("call", 5), ("step", 13), ("call", 10)]
    for where, number in kills:
        assert start(out, where, number).wait() == -signal.SIGKILL, (where, number)
    assert start(out, "never", 0).wait() == 0
    checkpoint = newest_checkpoint(out)
    assert checkpoint.step == STEPS
    for name, value in expected.state_dict().items():
        assert torch.equal(checkpoint.model[name], value), name
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == undisturbed.history
    assert not [p.name for p in out.iterdir() if p.name.endswith(".tmp")]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_from_outside_saves_the_step_and_the_run_continues(tmp_path, number):
    process = start(tmp_path, "wait", 0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(6):
        process.stdout.readline()
        process.stdin.write(b"\n")
        process.stdin.flush()
    process.stdout.readline()  # it is now inside step 7
    process.send_signal(number)
    _, error = process.communicate(b"\n")
    assert process.returncode != 0
    assert f"stopped by {signal.Signals(number).name} after step 7".encode() in error
    assert newest_checkpoint(tmp_path).step == 7
    expected, whole = train(tmp_path / "whole")
    model, result = train(tmp_path)
    assert result.history == whole.history
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
