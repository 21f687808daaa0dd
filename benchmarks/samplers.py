"""Markov chains over texts: compiled n-gram chains against Python, batched chains of a masked model against one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Table, compare
from kexue.generation import (
    MLMGibbs,
    NGramLM,
    NGramSampler,
)
from kexue.models import KexueConfig, KexueForMaskedLM

SECTION = "Samplers"

VOCABULARY, HIGH, STEPS, SWEEPS = 20, 12, 200_000, 10_000
CHAINS, TOKENS, LENGTH, CHAIN_STEPS = 64, 8000, 20, 2


def _python_edits(table: list[list[float]], steps: int) -> list[int]:
    """The chain as scripts write it: one text, insert / delete / replace, the score of the whole text each time."""
    end = VOCABULARY

    def score(x: list[int]) -> float:
        total = table[end][x[0]]
        for a, b in pairwise(x):
            total += table[a][b]
        return total + table[x[-1]][end]

    source, x = random.Random(0), [0]
    current = score(x)
    for _ in range(steps):
        operation, n = source.randrange(3), len(x)
        if operation == 0:
            i = source.randrange(n)
            y, ratio = [*x[:i], source.randrange(VOCABULARY), *x[i + 1 :]], 0.0
        elif operation == 1:
            if n == HIGH:
                continue
            i = source.randrange(n + 1)
            y, ratio = [*x[:i], source.randrange(VOCABULARY), *x[i:]], math.log(VOCABULARY)
        else:
            if n == 1:
                continue
            i = source.randrange(n)
            y, ratio = x[:i] + x[i + 1 :], -math.log(VOCABULARY)
        new = score(y)
        if math.log(1 - source.random()) < new - current + ratio:
            x, current = y, new
    return x


def _python_gibbs(table: list[list[float]], steps: int) -> list[int]:
    """The same with conditionals: every token tried at a random place, numpy draws from their probabilities."""
    end, source, x = VOCABULARY, np.random.default_rng(0), [0] * 8

    def score(x: list[int]) -> float:
        return table[end][x[0]] + sum(table[a][b] for a, b in pairwise(x)) + table[x[-1]][end]

    for _ in range(steps):
        i = int(source.integers(8))
        z = np.array([score([*x[:i], y, *x[i + 1 :]]) for y in range(VOCABULARY)])
        z = np.exp(z - z.max())
        x[i] = int(source.choice(VOCABULARY, p=z / z.sum()))
    return x


def _language() -> NGramLM:
    table = np.random.default_rng(0).dirichlet(np.full(VOCABULARY + 1, 0.5), VOCABULARY + 1) + 1e-3
    return NGramLM(np.log(table / table.sum(1, keepdims=True)))


def _one_chain(model: KexueForMaskedLM, steps: int) -> None:
    """The published way: one text, all logits of it, a probability vector for numpy's choice."""
    source = np.random.default_rng(0)
    for _ in range(CHAINS):
        ids = torch.from_numpy(source.integers(5, TOKENS, (1, LENGTH)))
        for _ in range(steps):
            i = int(source.integers(LENGTH))
            ids[0, i] = 4
            with torch.no_grad():
                p = model(ids).logits.double().softmax(-1)[0, i].numpy()
            ids[0, i] = int(source.choice(TOKENS, p=p / p.sum()))


def run() -> list[Table]:
    """Measure three comparisons."""
    lm = _language()
    table = lm.table.tolist()
    sampler = NGramSampler(lm)
    n_gram: dict[str, Callable[[], Any]] = {
        "Python script": lambda: _python_edits(table, STEPS),
        "kexue NGramSampler": lambda: sampler.run(
            (0,), STEPS, STEPS - 1, kernel="edit", max_length=HIGH, progress=False
        ),
    }
    gibbs_chains: dict[str, Callable[[], Any]] = {
        "Python script": lambda: _python_gibbs(table, SWEEPS),
        "kexue NGramSampler": lambda: sampler.run((0,) * 8, SWEEPS, SWEEPS - 1, kernel="gibbs", progress=False),
    }
    torch.manual_seed(0)
    config = KexueConfig(TOKENS, 128, 4, 4, mask_token_id=4, max_position=64)
    model = KexueForMaskedLM(config).eval()

    def gibbs(chains: int) -> MLMGibbs:
        return MLMGibbs(model, LENGTH, fill="uniform", n_chains=chains)

    masked: dict[str, Callable[[], Any]] = {
        "script, chain by chain": lambda: _one_chain(model, CHAIN_STEPS),
        "kexue MLMGibbs, chain by chain": lambda: [
            gibbs(1).run(steps=CHAIN_STEPS, burn_in=CHAIN_STEPS, progress=False) for _ in range(CHAINS)
        ],
        f"kexue MLMGibbs, {CHAINS} chains": lambda: gibbs(CHAINS).run(
            steps=CHAIN_STEPS, burn_in=CHAIN_STEPS, progress=False
        ),
    }
    return [
        compare(
            "Edits over an n-gram target",
            f"{STEPS} Metropolis-Hastings steps of one chain (insert, delete, replace) over a bigram model of "
            f"{VOCABULARY} tokens, texts of up to {HIGH}, float64, one thread.",
            n_gram,
            peer="Python script",
            packages=("numpy", "numba"),
            repeats=5,
            remarks=["The script uses lists and random.Random only; most of its texts have a few tokens."],
        ),
        compare(
            "Gibbs sampling over an n-gram target",
            f"{SWEEPS} steps of one chain over the same model, texts of 8, float64, one thread.",
            gibbs_chains,
            peer="Python script",
            packages=("numpy", "numba"),
            repeats=5,
            remarks=["The script draws with numpy's choice and scores whole texts."],
        ),
        compare(
            "Gibbs sampling with a masked language model",
            f"{CHAIN_STEPS} steps of {CHAINS} chains of {LENGTH} tokens, model of width 128, 4 layers, vocabulary "
            f"{TOKENS}, float32, {torch.get_num_threads()} thread(s).",
            masked,
            peer="script, chain by chain",
            packages=("torch",),
            repeats=5,
        ),
    ]
