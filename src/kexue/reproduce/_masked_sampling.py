"""R2 of search-sampling: Gibbs sampling with masked language models trained here, on a chain and on text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kexue.generation import MLMGibbs, NGramLM
from kexue.models import KexueConfig, KexueForMaskedLM

_WORD = re.compile(r"[A-Za-z_]+|[.,;:()]")
LENGTH = 10


def untrained(vocabulary: int) -> KexueForMaskedLM:
    """A masked model with random weights, in float64, to be corrected to an exact sampler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = KexueConfig(vocabulary + 1, 16, 2, 4, mask_token_id=vocabulary, initializer_range=0.3)
        return KexueForMaskedLM(config).double()


def train(ids: Tensor, vocabulary: int, steps: int, seed: int, width: int) -> KexueForMaskedLM:
    """A masked model on rows of equal length, (N, T); the mask is the id ``vocabulary``; 1 to 3 masks a row."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = KexueConfig(
            vocabulary + 1, width, 2, 4, mask_token_id=vocabulary, max_position=ids.shape[1], norm="rms"
        )
        model = KexueForMaskedLM(config).train()
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1)
        for _ in range(steps):
            rows = ids[torch.randint(len(ids), (64,), generator=generator)]
            keys = torch.rand(rows.shape, generator=generator).argsort(1)
            hidden = keys < torch.randint(1, 4, (64, 1), generator=generator)
            labels = rows.masked_fill(~hidden, -100)
            loss = model(rows.masked_fill(hidden, vocabulary), labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _frequencies(rows: NDArray[np.int64], size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unigram and bigram laws of texts of equal length."""
    first = np.bincount(rows.ravel(), minlength=size) / rows.size
    pairs = rows[:, :-1] * size + rows[:, 1:]
    return first, np.bincount(pairs.ravel(), minlength=size * size) / pairs.size


def on_a_chain(quick: bool, seed: int) -> dict[str, float]:
    """Total variation of the samples' unigrams and bigrams to those of the Markov chain that made the training data."""
    size, rng = 6, np.random.default_rng(seed)
    table = rng.dirichlet(np.full(size, 0.5), size=size) * 0.9 + 0.1 / size
    start = np.linalg.matrix_power(table, 200)[0]
    rows = np.empty((500 if quick else 20000, LENGTH), np.int64)
    rows[:, 0] = rng.choice(size, len(rows), p=start)
    edges = table.cumsum(1)
    for t in range(1, LENGTH):
        rows[:, t] = (edges[rows[:, t - 1]] < rng.random((len(rows), 1)) * edges[rows[:, t - 1], -1:]).sum(1)
    model = train(torch.from_numpy(rows), size, 20 if quick else 800, seed, 32)
    steps = 40 if quick else 400
    chains = MLMGibbs(model, LENGTH, n_chains=32 if quick else 128, seed=seed).run(
        steps=steps, burn_in=steps // 3, thin=10, progress=False
    )
    drawn = np.array([text for texts in chains.samples for text in texts])
    unigram, bigram = _frequencies(drawn, size)
    independent = _frequencies(rows[: len(drawn)], size)[1]
    law = start[:, None] * table
    return {
        "unigram TV": float(abs(unigram - start).sum() / 2),
        "bigram TV": float(abs(bigram - law.ravel()).sum() / 2),
        "bigram TV of data": float(abs(independent - law.ravel()).sum() / 2),
    }


def _topics() -> tuple[list[str], list[list[int]]]:
    """Vocabulary (0 is the unknown word) and sentences of the standard library's help, as ids."""
    from pydoc_data.topics import topics

    text = " ".join(topics[name] for name in sorted(topics))
    words = _WORD.findall(text.lower())
    kept = [word for word, _ in Counter(words).most_common(999)]
    place = {word: i + 1 for i, word in enumerate(kept)}
    sentences: list[list[int]] = [[]]
    for word in words:
        sentences[-1].append(place.get(word, 0))
        if word == ".":
            sentences.append([])
    return ["?", *kept], [s for s in sentences if len(s) >= LENGTH]


def _report(texts: Sequence[Sequence[int]], model: NGramLM) -> dict[str, float]:
    """Distinct bigrams over all bigrams, and perplexity for each token under the bigram model."""
    pairs = [pair for text in texts for pair in pairwise(text)]
    factors = [model.table[pair] for pair in pairs]
    return {"distinct-2": len(set(pairs)) / len(pairs), "perplexity": float(np.exp(-np.mean(factors)))}


def on_text(quick: bool, seed: int) -> tuple[dict[str, list[Any]], list[str]]:
    """Samples of a masked model of words trained on help texts: a table against real text and chance, ten samples."""
    names, sentences = _topics()
    rng = np.random.default_rng(seed)
    windows = np.array([s[i : i + LENGTH] for s in sentences for i in range(0, len(s) - LENGTH + 1, 3)])
    windows = windows[rng.permutation(len(windows))]
    held, train_rows = windows[:100], windows[100:]
    size = len(names)
    judge = NGramLM.fit([row.tolist() for row in train_rows], size, smoothing=20.0)
    model = train(torch.from_numpy(train_rows), size, 10 if quick else 600, seed, 64)
    steps = 20 if quick else 400
    result = MLMGibbs(model, LENGTH, ban=[0], n_chains=10 if quick else 100, seed=seed).run(
        steps=steps, burn_in=steps, thin=1, progress=False
    )
    chance = rng.choice(train_rows.ravel(), held.shape)
    table: dict[str, list[Any]] = {"texts": [], "distinct-2": [], "perplexity": []}
    for name, texts in (
        ("sampled", result.states),
        ("held-out", held.tolist()),
        ("words by frequency", chance.tolist()),
    ):
        table["texts"].append(name)
        for key, value in _report(texts, judge).items():
            table[key].append(value)
    return table, [" ".join(names[i] for i in text) for text in result.states[:10]]
