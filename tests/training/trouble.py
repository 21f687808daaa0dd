"""One rank of runs in which something goes wrong on one of the two ranks."""

import errno
import json
import os
import signal
import sys
from pathlib import Path

from kexue.training import TrainingInterrupted, checkpoint, shuffled_batches
from training.ranks import RANK, Tagger, data, train, whole


def at(step, action, rank=1):
    def on_step(record):
        if record["step"] == step and rank == RANK:
            return action()
        return None

    return on_step


def crash():
    raise LookupError(f"trouble on rank {RANK}")


def bad_batches(number):
    if number == 7:  # step 4 of rank 1
        crash()
    return shuffled_batches(data(), 8)(number)


def nan_batches(number):
    batch = shuffled_batches(data(), 8)(number)
    return batch | {"scale": float("nan") if number == 7 else 1.0}


class Failing(Tagger):
    def forward(self, input_ids, labels, scale=1.0):
        self.calls = getattr(self, "calls", 0) + 1
        if RANK == 1 and self.calls == 4 and scale == 1.0:
            crash()
        found = super().forward(input_ids, labels)
        return found | {"loss": found["loss"] * scale}


class Scaled(Tagger):
    def forward(self, input_ids, labels, scale):
        found = super().forward(input_ids, labels)
        return found | {"loss": found["loss"] * scale}


def full_disk(out):
    write = checkpoint._write

    def full(path, content):
        if path.parent.name == "step-5.tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    checkpoint._write = full
    try:
        train(out)
    finally:
        checkpoint._write = write


def other_settings(out):
    train(out, steps=4)
    train(out, steps=5)


def damaged(out):
    train(out, on_step=lambda record: record["step"] == 7)
    if RANK == 0:
        (out / "step-7" / "model.safetensors").write_bytes(b"short")
    return train(out, strategy="fsdp")


TROUBLES = {
    "batch": lambda out: train(out, bad_batches),
    "batch-fsdp": lambda out: train(out, bad_batches, strategy="fsdp"),
    "accumulated": lambda out: train(out, bad_batches, accumulate=2),
    "forward": lambda out: train(out, model=Failing()),
    "on-step": lambda out: train(out, on_step=at(4, crash)),
    "nan": lambda out: train(out, nan_batches, Scaled()),
    "disk": full_disk,
    "settings": other_settings,
    "sigterm": lambda out: train(out, on_step=at(4, lambda: signal.raise_signal(signal.SIGTERM))),
    "sigint-fsdp": lambda out: train(out, strategy="fsdp", on_step=at(4, lambda: signal.raise_signal(signal.SIGINT))),
    "stop": lambda out: train(out, on_step=at(4, lambda: True)),
    "damaged": damaged,
    "nothing": lambda out: train(
        out, lambda number: {k: v * 0 - 100 if k == "labels" else v for k, v in data(8).items()}
    ),
    "healthy": lambda out: train(out),
}


def main():
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    for name in names:
        report = {}
        try:
            model, result = TROUBLES[name](folder / name)
            report = {"step": result.step, "interrupted": result.interrupted, "weights": whole(model)}
        except TrainingInterrupted as stop:
            report = {"error": "TrainingInterrupted", "step": stop.step, "exit": stop.exit_code, "text": str(stop)}
        except Exception as error:
            report = {"error": type(error).__name__, "text": str(error)}
        (folder / f"{name}.{RANK}.json").write_text(json.dumps(report))


def run_and_die():
    """A run in which one rank kills itself after a step; with step 0 nobody does, and an undisturbed one follows."""
    out, strategy, rank, step = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
    kill = at(step, lambda: os.kill(os.getpid(), signal.SIGKILL), rank)
    train(out, model=Tagger(0.3), strategy=strategy, on_step=kill)
    train(out.with_name("whole"), model=Tagger(0.3), strategy=strategy, on_step=kill)


if __name__ == "__main__":
    run_and_die() if sys.argv[1] == "die" else main()
