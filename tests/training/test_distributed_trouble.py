"""Two processes, and something goes wrong on one of them: the other must neither hang nor go on."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kexue.training import newest_checkpoint
from training.ranks import STEPS, Tagger, finish, launch, train

SCRIPT = Path(__file__).with_name("trouble.py")
NAMES = [
    "batch", "batch-fsdp", "accumulated", "forward", "on-step", "nan", "disk", "settings", "sigterm", "sigint-fsdp",
    "stop", "damaged", "nothing", "healthy",
]  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All troubles one after the other in the same two processes: none may leave them unusable."""
    made = tmp_path_factory.mktemp("trouble")
    codes, errors = finish(launch(made, *NAMES, script=SCRIPT))
    assert codes == [0, 0], errors
    return made


def reports(folder, name):
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("name", "step"), [("batch", 4), ("batch-fsdp", 4), ("accumulated", 2), ("forward", 4), ("on-step", 4)]
)
def test_an_exception_on_one_rank_is_raised_there_and_named_on_the_other(folder, name, step):
    other, failed = reports(folder, name)
    assert failed == {"error": "LookupError", "text": "trouble on rank 1"}
    assert other["error"] == "RuntimeError"
    where = f"after step {step}" if name == "on-step" else f"in step {step}"
    assert other["text"].startswith(f"rank 1 failed {where}")
    assert other["text"].endswith("LookupError: trouble on rank 1")


def test_a_bad_number_on_one_rank_ends_the_run_on_both_before_the_weights_change(folder):
    for report in reports(folder, "nan"):
        assert report["error"] == "FloatingPointError"
        assert "is nan in step 4, which was not applied" in report["text"]


def test_a_full_disk_of_rank_0_ends_the_run_on_both(folder):
    for report in reports(folder, "disk"):
        assert report["error"] == "OSError"
        assert "No space left on device" in report["text"]
    assert not list((folder / "disk").glob("step-*"))


def test_other_settings_are_refused_on_both(folder):
    for report in reports(folder, "settings"):
        assert report["error"] == "ValueError"
        assert "steps was 4 and is 5" in report["text"]


@pytest.mark.parametrize(("name", "code"), [("sigterm", 0), ("sigint-fsdp", 130)])
def test_a_signal_on_one_rank_stops_all_at_the_same_saved_step(folder, name, code):
    first, second = reports(folder, name)
    assert first == second
    assert (first["error"], first["step"], first["exit"]) == ("TrainingInterrupted", 5, code)
    assert newest_checkpoint(folder / name).step == 5


def test_on_step_of_one_rank_ends_the_run_on_all(folder):
    first, second = reports(folder, "stop")
    assert first == second
    assert (first["step"], first["interrupted"]) == (4, True)


def test_a_damaged_checkpoint_falls_back_on_all_ranks_also_under_the_other_strategy(folder, tmp_path):
    first, second = reports(folder, "damaged")
    assert first == second
    expected, _ = train(tmp_path, accumulate=2)
    for name, value in expected.state_dict().items():
        if name != "seen":
            torch.testing.assert_close(torch.tensor(first["weights"][name]), value, atol=1e-5, rtol=0)


def test_a_step_without_any_label_is_an_error_on_both(folder):
    for report in reports(folder, "nothing"):
        assert report["error"] == "ValueError"
        assert "step 1 has nothing to predict" in report["text"]
        assert "on all 2 ranks" in report["text"]


def test_after_all_of_it_the_processes_are_healthy(folder):
    first, second = reports(folder, "healthy")
    assert first == second
    assert first["step"] == STEPS


@pytest.mark.parametrize(("strategy", "kills"), [("ddp", [(1, 7), (0, 11)]), ("fsdp", [(1, 8)])])
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_runs_end_with_the_bits_of_the_undisturbed_run(tmp_path, strategy, kills):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    for rank, step in kills:
        codes, _ = finish(launch("die", out, strategy, rank, step, script=SCRIPT))
        assert codes[rank] == -signal.SIGKILL
        assert codes[1 - rank] != 0  # it lost its partner
    codes, errors = finish(launch("die", out, strategy, 0, 0, script=SCRIPT))
    assert codes == [0, 0], errors
    a, b = newest_checkpoint(whole), newest_checkpoint(out)
    assert a.step == b.step == STEPS
    for name, value in a.model.items():
        assert torch.equal(value, b.model[name]), name
    histories = [(p / "metrics.jsonl").read_text().splitlines() for p in (whole, out)]
    assert [json.loads(line)["loss"] for line in histories[0]] == [json.loads(line)["loss"] for line in histories[1]]


def test_torchrun_and_a_continuation_in_one_process(tmp_path):
    """Under torchrun the first half, then one process that accumulates what two have done."""
    out = tmp_path / "out"
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from training.ranks import Tagger, train\n"
        f"train({str(out)!r}, model=Tagger(0.3), on_step=lambda record: record['step'] == 6)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert newest_checkpoint(out).step == 6
    with pytest.raises(ValueError, match="batches per step was 2 and is 1"):
        train(out, model=Tagger(0.3))
    model, result = train(out, model=Tagger(0.3), accumulate=2)
    expected, whole = train(tmp_path / "whole", model=Tagger(0.3), accumulate=2)
    assert result.history == pytest.approx(whole.history, abs=1e-5)
    for name, value in expected.state_dict().items():
        if name != "seen":
            torch.testing.assert_close(model.state_dict()[name], value, atol=1e-5, rtol=0)
