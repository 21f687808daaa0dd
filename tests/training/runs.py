"""Small models and runs that the tests of the loop share; as a program: one run that kills itself where it is told."""

import os
import random
import shutil
import signal
import sys

import numpy as np
import torch
from torch import nn

from kexue.training import fit, numpy_generator, shuffled_batches, torch_generator

STEPS = 24


class Dense(nn.Module):
    """Embedding, dropout and a head; returns a mapping with the number of labels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(20, 6)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(6, 3)

    def forward(self, ids, labels):
        logits = self.head(self.dropout(self.table(ids).mean(1)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "num_items": len(labels)}


class Sparse(Dense):
    """The table has sparse gradients."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.EmbeddingBag(20, 6, sparse=True)

    def forward(self, ids, labels):
        return nn.functional.cross_entropy(self.head(self.dropout(self.table(ids))), labels)


def data(rows=40):
    generator = torch.Generator().manual_seed(0)
    return {
        "ids": torch.randint(20, (rows, 5), generator=generator),
        "labels": torch.randint(3, (rows,), generator=generator),
    }


def noisy_batches(seed=0):
    """Shuffled samples, with ids replaced at random: noise from both kinds of generators."""
    plain = shuffled_batches(data(), 8, seed=seed)

    def batches(step):
        batch = plain(step)
        noise = torch.randint(20, batch["ids"].shape, generator=torch_generator(seed, step))
        chosen = torch.from_numpy(numpy_generator(seed, step).random(batch["ids"].shape) < 0.2)
        return {"ids": torch.where(chosen, noise, batch["ids"]), "labels": batch["labels"]}

    return batches


def train(out, kind=Dense, **options):
    """One run; returns model and result."""
    model = kind()
    settings = {"steps": STEPS, "save_every": 5, "lr": 0.02, "warmup": 3, "out": out} | options
    return model, fit(model, noisy_batches(), **settings)


def seed_globals(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global generators are what is tested
    random.seed(seed)


def draw_globals():
    return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()  # noqa: NPY002


def kill_before_call(count):
    """SIGKILL just before the system call number `count` that changes or flushes a file."""
    calls = 0

    def counting(function):
        def counted(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted

    for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (shutil, "rmtree")):
        setattr(module, name, counting(getattr(module, name)))


if __name__ == "__main__":
    where, number = sys.argv[2], int(sys.argv[3])
    if where == "call":
        kill_before_call(number)

    def on_step(record):
        if where == "step" and record["step"] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        if where == "wait":
            print(record["step"], flush=True)
            sys.stdin.readline()

    train(sys.argv[1], on_step=on_step)
