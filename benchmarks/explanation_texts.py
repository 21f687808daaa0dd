"""Integrated gradients against a fixed rule of 50 Gauss-Legendre nodes, captum's default.

Without captum installed its place is taken by ``fifty``: what captum 0.9 computes by default (all nodes of all padded
texts in one batch, the output once more at both ends for the convergence delta), without its own overhead.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Table, compare
from kexue.explain import explain_text
from kexue.reproduce._review_classifier import Review, batch, review, tokenizer, train

SECTION = "Explanations of texts"
TEXTS = 8
FIFTY = "50 fixed nodes, padded"


def fixed(model: Any, reviews: list[Review], n: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that returns attributions (B, T, D) and their gap (B,) by n nodes."""
    ids, mask, labels = batch(reviews)
    x = model.get_input_embeddings()(ids).detach()

    def output(e: Tensor, copies: int) -> Tensor:
        logits = model(inputs_embeds=e, attention_mask=mask.repeat(copies, 1)).logits
        return logits.gather(1, labels.repeat(copies)[:, None])[:, 0]

    def run() -> tuple[Tensor, Tensor]:
        nodes, weights = np.polynomial.legendre.leggauss(n)
        alphas = torch.tensor((nodes + 1) / 2, dtype=x.dtype).view(-1, 1, 1, 1)
        points = (alphas * x).flatten(0, 1).requires_grad_()
        (g,) = torch.autograd.grad(output(points, n).sum(), points)
        parts = g.view(n, *x.shape) * torch.tensor(weights / 2, dtype=x.dtype).view(-1, 1, 1, 1)
        shares = x * parts.sum(0)
        with torch.no_grad():
            change = output(x, 1) - output(torch.zeros_like(x), 1)
        return shares, (shares.sum((1, 2)) - change).abs()

    return run


@functools.lru_cache(maxsize=1)
def trained(steps: int) -> Any:
    return train(steps, 0)


def table(name: str, steps: int, only: int | None, counts: tuple[int, ...]) -> Table:
    model = trained(steps)
    for p in model.parameters():
        p.requires_grad_(False)
    draw = random.Random(1000)
    reviews = [review(draw, i % 2 if only is None else only) for i in range(TEXTS)]
    reader, texts = tokenizer(), [one.text for one in reviews]
    labels = [one.label for one in reviews]

    def adaptive(baseline: str) -> Any:
        return explain_text(model, reader, texts, baseline, target=labels)

    contenders: dict[str, Callable[[], Any]] = {FIFTY: fixed(model, reviews, 50)}
    contenders |= {f"{n} fixed nodes, padded": fixed(model, reviews, n) for n in counts if n != 50}
    contenders["explain_text"] = lambda: adaptive("zero")
    contenders["explain_text, baseline pad"] = lambda: adaptive("pad")
    extra = {}
    for contender, run in contenders.items():
        found = run()
        gaps = found[1].tolist() if isinstance(found, tuple) else [one.gap for one in found]
        extra[contender] = {
            "largest gap": f"{max(gaps):.1e}",
            "texts with a gap below 1e-3": f"{sum(gap < 1e-3 for gap in gaps)} of {len(gaps)}",
        }
    change = float(np.mean([abs(one.change) for one in adaptive("zero")]))
    return compare(
        name,
        f"BERT, 4 layers, width 128, {steps} steps of training; {TEXTS} reviews"
        f"{'' if only is None else ' of the class with evidence'} of 10 to 32 characters, logit of the true class, "
        f"mean change {change:.2f}; embeddings scaled from zero, float32, one thread.",
        contenders,
        peer=FIFTY,
        packages=("torch", "transformers"),
        repeats=3,
        extra=extra,
    )


def run() -> list[Table]:
    """All comparisons of this room."""
    return [
        table("Saturated classifier, both classes", 120, None, (50, 100)),
        table("Saturated classifier, the class with evidence", 120, 0, (50,)),
        table("Halfway", 45, None, (8, 50)),
        table("Hardly trained: smooth", 30, None, (8, 50)),
    ]
