"""Runs of several processes for the tests; as a program, one rank of the scenarios that its arguments name."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from kexue.training import fit, shuffled_batches

STEPS = 12


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Tagger(nn.Module):
    """Labels for tokens, -100 = none: the mean over those that count, NaN when there are none. Tied, with a buffer."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(20, 8)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList([Block(8), Block(8)])
        self.head = nn.Linear(8, 20)
        self.head.weight = self.table.weight
        self.idle = nn.Linear(3, 3)  # never used: gets no gradient, and must not decay
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, input_ids, labels):
        self.seen += len(input_ids)
        x = self.dropout(self.table(input_ids))
        for layer in self.layers:
            x = layer(x)
        each = nn.functional.cross_entropy(
            self.head(x).flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
        )
        count = (labels != -100).sum()
        return {"loss": each.sum() / count, "num_items": count, "logits": x}


class ByHand(Tagger):
    """The same mean written out: without labels, its gradient is 0 / 0 for every parameter."""

    def forward(self, input_ids, labels):
        x = self.table(input_ids)
        for layer in self.layers:
            x = layer(x)
        scores = self.head(x).log_softmax(-1)
        kept = labels != -100
        each = scores.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        return {"loss": -(each * kept).sum() / kept.sum(), "num_items": kept.sum()}


def data(rows=96):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (rows, 5), generator=generator)
    return {"input_ids": ids, "labels": (ids * 7 + 3) % 20}


def uneven(number):
    """Batches with between 0 and 40 labels, none at all in every fourth."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(20, (8, 5), generator=generator)
    kept = torch.rand(ids.shape, generator=generator) < (0.0 if number % 4 == 1 else 1.0 / (1 + number % 3))
    return {"input_ids": ids, "labels": torch.where(kept, (ids * 7 + 3) % 20, -100)}


def train(out, batches=None, model=None, **options):
    model = model or Tagger()
    settings = {"steps": STEPS, "save_every": 5, "lr": 0.02, "warmup": 3, "weight_decay": 0.1, "out": out} | options
    return model, fit(model, batches or shuffled_batches(data(), 8), **settings)


def whole(model):
    return {
        name: (v.full_tensor() if hasattr(v, "full_tensor") else v).tolist() for name, v in model.state_dict().items()
    }


RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def own_part(number):
    batch = shuffled_batches(data(), 16)(number)
    return {name: value[RANK::WORLD] for name, value in batch.items()}


SCENARIOS = {
    "plain": {},
    "dropout": {"model": lambda: Tagger(0.3)},
    "own-part": {"batches": lambda: own_part},
    "own-part-of-shuffled": {"batches": lambda: shuffled_batches(data(), 16, rank=RANK, world=WORLD)},
    "list": {"batches": lambda: [shuffled_batches(data(), 8)(number) for number in range(12)]},
    "uneven": {"batches": lambda: uneven},
    "uneven-accumulated": {"batches": lambda: uneven, "accumulate": 2},
    "by-hand": {"batches": lambda: uneven, "model": ByHand, "accumulate": 2},
    "same-on-all": {"batches": lambda: shuffled_batches(data(), 8), "per_rank": True},
    "bf16": {"precision": "bf16"},
}


def scenario(name, strategy, out):
    options = dict(SCENARIOS[name])
    made = {key: options.pop(key)() for key in ("model", "batches") if key in options}
    # Rank 1 is given a folder of its own, which it must not make.
    return train(out if RANK == 0 else out.with_name(out.name + "-other"), strategy=strategy, **made, **options)


def main():
    folder, jobs = Path(sys.argv[1]), sys.argv[2:]
    for job in jobs:
        name, strategy = job.split(":")
        model, result = scenario(name, strategy, folder / job.replace(":", "-"))
        report = {"history": result.history, "weights": whole(model), "step": result.step}
        (folder / f"{job.replace(':', '-')}.{RANK}.json").write_text(json.dumps(report))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(*arguments, script=__file__, world=2, **options):
    """Start the ranks; returns the processes."""
    here = Path(__file__)
    paths = [str(here.parents[2] / "src"), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        for rank in range(world)
    ]


def finish(processes, timeout=120):
    """Return codes and errors of all ranks; a rank that hangs fails the test."""
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


if __name__ == "__main__":
    main()
