"""CGMH per step of one chain: the published recipe, its batched form and ours, over the same models."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Row, Table, cpu_seconds, versions
from kexue.generation import CGMH, ContainsKeywords, NGramLM, Target
from kexue.models import KexueConfig, KexueForCausalLM, KexueForMaskedLM
from kexue.reproduce import _cgmh_claims

SECTION = "CGMH"

CANDIDATES, CHAINS, GAMMA, LONGEST, SHORTEST = 64, 64, 0.8, 20, 8
Words = tuple[int, ...]


class Recipe:
    """bojone/unsupervised-text-generation, as published: one chain, nothing kept between steps.

    A step of any kind runs the ranking pass, the K candidate sentences and the old and the new sentence: 67 sentences.

    Args:
        lm: Causal language model with BOS and EOS.
        keywords: Protected tokens.
        chains: The batched form advances so many chains at once and keeps the old scores: 65 sentences a chain.
    """

    def __init__(self, lm: KexueForCausalLM, keywords: set[int], start: Words, chains: int = 1) -> None:
        self.lm, self.keywords, self.chains = lm, keywords, [start] * chains
        self.generator = np.random.default_rng(0)
        self.head, self.tail = (lm.config.bos_token_id,), (lm.config.eos_token_id,)
        self.scores = self.score(self.chains)

    def logits(self, texts: list[Words]) -> torch.Tensor:
        """(N, T, V), padded on the right."""
        width = max(map(len, texts))
        with torch.inference_mode():
            return self.lm(torch.tensor([t + (0,) * (width - len(t)) for t in texts])).logits

    def score(self, texts: list[Words]) -> np.ndarray:
        """(N,) log p."""
        rows = [self.head + text + self.tail for text in texts]
        log_p = self.logits([row[:-1] for row in rows]).log_softmax(-1)
        values = [sum(log_p[n, t, token] for t, token in enumerate(row[1:])) for n, row in enumerate(rows)]
        return torch.stack(values).double().numpy()

    def step(self) -> None:
        """One step of every chain."""
        plans = []
        for x in self.chains:
            op = int(self.generator.integers(3))
            free = [i for i, token in enumerate(x) if token not in self.keywords]
            possible = (len(x) < LONGEST, len(x) > SHORTEST, True)[op] and bool(free)
            i = int(self.generator.integers(len(x) + 1)) if op == 0 else int(self.generator.choice(free))
            plans.append((op if possible else 2, min(i, len(x) - 1) if op == 0 and not possible else i))
        ranks = self.logits([self.head + x for x in self.chains])
        every, kept = [], []
        for n, (x, (op, i)) in enumerate(zip(self.chains, plans, strict=True)):
            top = ranks[n, i].topk(CANDIDATES).indices.tolist()
            after = x[i:] if op == 0 else x[i + 1 :]
            if op and x[i] not in top:
                top[-1] = x[i]  # the published list always holds the current word
            kept.append((top, after))
            every += [(*x[:i], y, *after) for y in top]
        values = self.score(every).reshape(len(plans), CANDIDATES)
        new, factors = [], []
        for n, (x, (op, i)) in enumerate(zip(self.chains, plans, strict=True)):
            top, after = kept[n]
            q = np.exp(values[n] - values[n].max())
            q /= q.sum()
            if op == 1:
                new.append((*x[:i], *after))
                factors.append(q[top.index(x[i])])
            else:
                k = int(self.generator.choice(CANDIDATES, p=q))
                new.append((*x[:i], top[k], *after))
                factors.append((q[top.index(x[i])] if op == 2 else 1.0) / q[k])
        if len(self.chains) == 1:  # the old score again, as published
            self.scores = self.score(self.chains)
        fresh = self.score(new)
        ratio = np.exp(np.minimum(GAMMA * (fresh - self.scores), 0)) * np.array(factors)
        taken = self.generator.random(len(plans)) < ratio
        self.chains = [y if t else x for x, y, t in zip(self.chains, new, taken, strict=True)]
        self.scores = np.where(taken, fresh, self.scores)


def _per_step(
    title: str,
    workload: str,
    contenders: dict[str, tuple[Callable[[], Any], int, Callable[[], str]]],
    peer: str,
    repeats: int,
    remarks: list[str],
) -> Table:
    """CPU time per step of one chain: name -> (work, chain steps in it, what else to say)."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for work, _, _ in contenders.values():
        work()
    for _ in range(repeats):
        for name, (work, steps, _) in contenders.items():
            begin = cpu_seconds()
            work()
            samples[name].append((cpu_seconds() - begin) / steps * 1e3)
    median = {name: statistics.median(times) for name, times in samples.items()}
    rows = [
        Row(name, value, median[peer] / value, {"steps/s": f"{1e3 / value:,.0f}", "accepted": contenders[name][2]()})
        for name, value in median.items()
    ]
    return Table(title, workload, peer, rows, versions("kexue", "torch", "numba", "numpy"), remarks)


def _neural(
    title: str, lm: KexueForCausalLM, mlm: KexueForMaskedLM, keywords: list[int], start: Words, steps: int, repeats: int
) -> Table:
    target = Target(lm, constraint=ContainsKeywords([[token] for token in keywords]), gamma=GAMMA, cache_size=0)
    recipe, batched = (Recipe(lm, set(keywords), start, chains) for chains in (1, 8))
    contenders: dict[str, tuple[Callable[[], Any], int, Callable[[], str]]] = {
        "published recipe, 1 chain": (recipe.step, 1, lambda: ""),
        "recipe, 8 chains batched": (batched.step, 8, lambda: ""),
    }
    rates: dict[str, str] = {}
    forms = {
        "kexue": {},
        "kexue, screen='next'": {"screen": "next"},
        "kexue, masked model proposes": {"proposal": mlm},
        "kexue, masked model, screen='next'": {"proposal": mlm, "screen": "next"},
    }
    operations = {"insert": 1 / 3, "delete": 1 / 3, "replace": 1 / 3}
    for name, options in forms.items():
        sampler = CGMH(
            target, max_length=LONGEST, min_length=SHORTEST, n_chains=CHAINS, candidates=CANDIDATES,
            operations=operations, **options,  # type: ignore[arg-type]
        )  # fmt: skip

        def work(sampler: CGMH = sampler, name: str = name) -> None:
            result = sampler.run(start, steps, 0, steps, progress=False)
            tried = sum(count["tried"] for count in result.counts.values())
            rates[name] = f"{sum(count['accepted'] for count in result.counts.values()) / tried:.2f}"

        contenders[name] = (work, CHAINS * steps, lambda name=name: rates[name])
    size = sum(p.numel() for p in lm.parameters()) / 1e6
    workload = (
        f"Per step of one chain; causal model with {size:.1f} M parameters, V = {lm.config.vocab_size}; sentences "
        f"of {SHORTEST} to {LONGEST} tokens, two keywords, K = {CANDIDATES}; ours with {CHAINS} chains; float32, "
        "one thread."
    )
    remarks = [
        f"Ours: a run of {steps} steps, the first pass over the start included. Only ours has rho as its law.",
        "screen='next': two stages; fewer moves are accepted per step, more per second.",
    ]
    return _per_step(title, workload, contenders, "published recipe, 1 chain", repeats, remarks)


def _trained() -> Table:
    lm, words, _ = _cgmh_claims.train(False, 0)
    torch.manual_seed(0)
    config = KexueConfig(lm.config.vocab_size + 1, 128, 3, 4, max_position=64, mask_token_id=lm.config.vocab_size)
    mlm = KexueForMaskedLM(config)  # its forward costs what that of a trained one costs
    sentence = ["The", "value", "of", "the", "function", "is", "the", "name", "of", "the", "module", "."]
    start = tuple(words.index(word) for word in sentence)
    keywords = [words.index("function"), words.index("module")]
    return _neural("A small trained model of help texts", lm, mlm, keywords, start, 60, 3)


def _larger() -> Table:
    torch.manual_seed(0)
    sizes = {"vocab_size": 8192, "hidden_size": 256, "num_layers": 6, "num_heads": 8, "max_position": 64}
    lm = KexueForCausalLM(KexueConfig(attn_mode="causal", bos_token_id=0, eos_token_id=1, **sizes)).eval()  # type: ignore[arg-type]
    mlm = KexueForMaskedLM(KexueConfig(mask_token_id=2, **sizes)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        lm.lm_head.decoder.weight.mul_(8)  # not flat, as a trained model's law
    return _neural("A larger model with random weights", lm, mlm, [20, 30], tuple(range(20, 32)), 24, 3)


def _python_chain(table: list[list[float]], vocabulary: int, keyword: int, steps: int, whole: bool) -> None:
    """CGMH over a bigram table in Python: one chain, K = V.

    ``whole``: every candidate by the score of its whole sentence, as the published recipe does; otherwise by the two
    factors that it changes, which is as far as plain Python goes.
    """
    end, rng = vocabulary, random.Random(0)
    x, k = [keyword], 0

    def score(y: list[int]) -> float:
        return table[end][y[0]] + sum(table[a][b] for a, b in pairwise(y)) + table[y[-1]][end]

    def law(left: list[int], right: list[int]) -> list[float]:
        a, b = (left[-1] if left else end), (right[0] if right else end)
        if whole:
            scores = [score([*left, y, *right]) for y in sorted(range(vocabulary), key=lambda y: -table[a][y])]
            top = max(scores)
            w = [math.exp(value - top) for value in scores]
        else:
            w = [math.exp(table[a][y] + table[y][b]) for y in range(vocabulary)]
        total = sum(w)
        return [0.95 * v / total + 0.05 / vocabulary for v in w]

    value = score(x)
    for _ in range(steps):
        op, n = rng.randrange(3), len(x)
        free = [i for i in range(n) if i != k]
        if (op == 0 and n == LONGEST) or (op and not free):
            continue
        i = rng.randrange(n + 1) if op == 0 else rng.choice(free)
        left, right = x[:i], x[i:] if op == 0 else x[i + 1 :]
        q = law(left, right)
        if op == 1:
            y, factor = left + right, q[x[i]] * (n - 1) / n
        else:
            j = rng.choices(range(vocabulary), q)[0]
            y = [*left, j, *right]
            factor = (n + 1) / n / q[j] if op == 0 else q[x[i]] / q[j]
        new = score(y)
        if rng.random() < math.exp(min(0.0, new - value)) * factor:
            x, value = y, new
            k += (op == 0 and k >= i) - (op == 1 and k > i)


def _ngram() -> Table:
    vocabulary, steps = 20, 1_000_000
    rows = np.random.default_rng(0).dirichlet(np.full(vocabulary + 1, 0.3), size=vocabulary + 1) + 1e-3
    rows[:, -1] = 0.05 * rows[:, :-1].sum(1)  # texts of some length
    table = np.log(rows / rows.sum(1, keepdims=True))
    listed = table.tolist()
    contenders: dict[str, tuple[Callable[[], Any], int, Callable[[], str]]] = {
        "recipe in Python, 1 chain": (lambda: _python_chain(listed, vocabulary, 2, 3000, True), 3000, lambda: ""),
        "Python, changed factors only": (lambda: _python_chain(listed, vocabulary, 2, 5000, False), 5000, lambda: ""),
    }
    for count in (vocabulary, 8):
        target = Target(NGramLM(table), constraint=ContainsKeywords([[2]]))
        sampler = CGMH(target, max_length=LONGEST, candidates=count)
        contenders[f"kexue, K = {count}"] = (
            lambda sampler=sampler: sampler.run([2], steps, 0, 1000, progress=False, trace=False),
            steps,
            lambda: "",
        )
    remarks = ["Python: K = V. The recipe scores each candidate as a whole sentence, as the published code does."]
    workload = f"Per step; bigram table, V = {vocabulary}, 1 to {LONGEST} tokens, one keyword; one thread."
    return _per_step("An n-gram target", workload, contenders, "recipe in Python, 1 chain", 5, remarks)


def run() -> list[Table]:
    torch.set_num_threads(1)
    return [_ngram(), _trained(), _larger()]
