"""Two gloo processes against one."""

import json

import pytest
import torch

from kexue.training import load_checkpoint, newest_checkpoint, shuffled_batches
from training import ranks
from training.ranks import ByHand, Tagger, data, finish, launch, train, uneven

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]

BOTH = ["plain", "own-part", "uneven", "uneven-accumulated"]
JOBS = [f"{name}:{strategy}" for name in BOTH for strategy in ("ddp", "fsdp")]
JOBS += [f"{name}:ddp" for name in ("dropout", "own-part-of-shuffled", "list", "same-on-all", "bf16", "by-hand")] + [
    "bf16:fsdp"
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All scenarios in two processes, which are started once."""
    made = tmp_path_factory.mktemp("ranks")
    codes, errors = finish(launch(made, *JOBS))
    assert codes == [0, 0], errors
    assert errors[1] == ""  # only rank 0 speaks; here nothing, since it is no terminal
    return made


def report(folder, job, rank=0):
    return json.loads((folder / f"{job.replace(':', '-')}.{rank}.json").read_text())


def assert_same_run(report, expected, tolerance=1e-5):
    model, result = expected
    assert report["history"] == pytest.approx(result.history, abs=tolerance, rel=0)
    for name, value in model.state_dict().items():
        if name != "seen":  # counts the rows of rank 0 only
            torch.testing.assert_close(torch.tensor(report["weights"][name]), value, atol=tolerance, rtol=0)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["plain", "own-part"])
def test_two_ranks_equal_one_at_the_doubled_batch(folder, tmp_path, name, strategy):
    assert_same_run(report(folder, f"{name}:{strategy}"), train(tmp_path, shuffled_batches(data(), 16)))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_is_the_mean_over_the_global_number_of_labels(folder, tmp_path, strategy, accumulate):
    name = "uneven" if accumulate == 1 else "uneven-accumulated"
    expected = train(tmp_path, uneven, accumulate=2 * accumulate)
    assert_same_run(report(folder, f"{name}:{strategy}"), expected)
    lines = [json.loads(line) for line in (folder / f"{name}-{strategy}" / "metrics.jsonl").read_text().splitlines()]
    counts = [sum(int((uneven(2 * accumulate * step + i)["labels"] != -100).sum()) for i in range(2 * accumulate))
              for step in range(ranks.STEPS)]  # fmt: skip
    assert [line["items"] for line in lines] == counts
    assert len(set(counts)) > 3
    assert all(line["tokens"] == 2 * accumulate * 40 for line in lines)


@pytest.mark.parametrize("name", ["dropout", "list", "own-part-of-shuffled"])
def test_noise_and_order_are_those_of_one_process_that_accumulates(folder, tmp_path, name):
    batches = ranks.SCENARIOS["list"]["batches"]() if name == "list" else None
    model = Tagger(0.3) if name == "dropout" else None
    assert_same_run(report(folder, f"{name}:ddp"), train(tmp_path, batches, model, accumulate=2))


def test_a_rank_without_labels_cannot_spoil_the_gradient_of_ddp(folder, tmp_path):
    assert_same_run(report(folder, "by-hand:ddp"), train(tmp_path, uneven, ByHand(), accumulate=4))


def test_a_function_can_be_told_that_every_rank_gets_what_it_gives(folder, tmp_path):
    assert_same_run(report(folder, "same-on-all:ddp"), train(tmp_path, shuffled_batches(data(), 8)))


def test_bf16(folder, tmp_path):
    expected = train(tmp_path, accumulate=2, precision="bf16")
    assert_same_run(report(folder, "bf16:ddp"), expected)
    # The policy of FSDP also casts what autocast leaves alone: equal up to the rounding of bfloat16.
    assert report(folder, "bf16:fsdp")["history"] == pytest.approx(expected[1].history, rel=2**-7)


@pytest.mark.parametrize("job", JOBS)
def test_both_ranks_return_the_same_and_only_rank_0_writes(folder, job):
    assert report(folder, job, 0) == report(folder, job, 1)
    out = folder / job.replace(":", "-")
    assert sorted(p.name for p in out.iterdir()) == ["latest", "metrics.jsonl", "step-10", "step-12"]
    assert not out.with_name(out.name + "-other").exists()


def test_the_checkpoint_of_fsdp_is_that_of_one_process(folder, tmp_path):
    train(tmp_path, shuffled_batches(data(), 16))
    ours, alone = load_checkpoint(folder / "plain-fsdp" / "step-12"), newest_checkpoint(tmp_path)
    assert ours.model.keys() == alone.model.keys()
    assert ours.model["head.weight"].shape == (20, 8)
    for a, b in zip(ours.optimizers, alone.optimizers, strict=True):
        assert a["state"].keys() == b["state"].keys()
        for key, state in a["state"].items():
            for name, value in state.items():
                torch.testing.assert_close(value, b["state"][key][name], atol=1e-5, rtol=0)
