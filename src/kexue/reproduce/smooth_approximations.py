"""Smooth approximations: their bounds, the unsound top-k recursion, the gradients of smooth metrics, and F1 training.

1. Bounds. On the article's numbers [2, 1, 4, 5, 3] and on random rows: max <= smooth max <= max + log(n) / K.
2. Recursion. The article's soft-k-max on random rows of 10 normal scores times 16, for k = 2, 5, 9: share of rows in
   which a larger score has the smaller weight, and the largest weight; the same for the threshold form.
3. Gradients (figure). A batch of 500 with 3 % positives; one row's logit is moved from -8 to 8, and the size of the
   gradient with respect to it is drawn for cross-entropy, smooth accuracy, F1 (binary, macro, micro), precision and
   recall.
4. Training. make_classification with 3 % positives, half of it test; MLP 30-64-1, Adam 2e-3; cross-entropy for 40
   epochs against cross-entropy for 30 and smooth F1 for 10 (Adam 1e-3), batch 500, five seeds; F1 on the test half at
   threshold .5.
5. Batch 16. On one sample of 24 000 logits, 3 % positive: mean of the F1 loss over batches of 16, 64 and 500, and mean
   and spread of its gradient by a common shift of all logits, against those of the whole sample; with the batch's sums
   and with running ones (momentum .95, gradient divided by 1 - .95). The training of 4 at batch 16 (second panel; full
   version), also with F1 from scratch.

Rule, fixed before measuring. The recursion is "unsound as stated" if it inverts rows and leaves [0, 1] while the
threshold form does neither. The training holds if the fine-tuned model beats cross-entropy at threshold .5 on at least
4 of 5 seeds at batch 500. "reproduced": bounds, recursion and training hold; "partly": bounds and one of the others;
otherwise "not reproduced". The quick version has three seeds (at least 2 of 3), a third of the logits in 5 and
no training at batch 16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.datasets import make_classification
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.losses import (
    SmoothF1Loss,
    SwitchLoss,
    smooth_accuracy_loss,
    smooth_f1_loss,
    smooth_max,
    soft_argmax,
    soft_topk,
)
from kexue.reproduce.runner import Measurement, Verdict

CLAIM = (
    "Functions without a useful derivative have smooth approximations: log-sum-exp for the maximum, softmax for the "
    "one-hot argmax, a recursion for the top k, and with them accuracy and F1 become losses; a model trained with "
    "cross-entropy gains F1 when it is fine-tuned on smooth F1."
)
Loss = Callable[[Tensor, Tensor], Tensor]


def _bounds(seed: int) -> tuple[dict[str, list[float]], bool]:
    article = torch.tensor([2.0, 1.0, 4.0, 5.0, 3.0], dtype=torch.float64)
    rows = torch.randn(1000, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sharp = [1.0, 4.0, 16.0]
    table = {
        "K": sharp,
        "smooth max - max": [float(smooth_max(article, K=k) - 5) for k in sharp],
        "bound log(5) / K": [math.log(5) / k for k in sharp],
        "soft argmax, counted from 1": [float(soft_argmax(article, K=k) + 1) for k in sharp],
    }
    holds = all(gap <= bound for gap, bound in zip(*list(table.values())[1:3], strict=True))
    for k in sharp:
        gap = smooth_max(rows, K=k) - rows.amax(1)
        holds &= bool(((gap >= 0) & (gap <= math.log(50) / k)).all())
    return table, holds


def _recursion(seed: int) -> tuple[dict[str, list[Any]], bool]:
    x = 16 * torch.randn(2000, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = x.argsort(1)
    table: dict[str, list[Any]] = {"method": [], "k": [], "rows inverted": [], "largest weight": [], "sum - k": []}
    for method in ("recursive", "sigmoid"):
        for k in (2, 5, 9):
            p = soft_topk(x, k, method=method)
            inverted = (p.gather(1, order).diff(dim=1) < -1e-9).any(1)
            values = (method, k, float(inverted.double().mean()), float(p.max()), float((p.sum(1) - k).abs().max()))
            for column, value in zip(table.values(), values, strict=True):
                column.append(value)
    unsound = all(share > 0 and top > 1 for share, top in zip(table["rows inverted"][:3], table["largest weight"][:3],
                                                              strict=True))  # fmt: skip
    sound = all(share == 0 and top <= 1 for share, top in zip(table["rows inverted"][3:], table["largest weight"][3:],
                                                              strict=True))  # fmt: skip
    return table, unsound and sound


GRADIENTS: dict[str, Loss] = {
    "cross-entropy": lambda x, t: F.binary_cross_entropy_with_logits(x[:, 0], t[:, 0]),
    "accuracy": lambda x, t: smooth_accuracy_loss(x[:, 0], t[:, 0].long()),
    "F1 binary": lambda x, t: smooth_f1_loss(x[:, 0], t[:, 0]),
    "F1 macro": lambda x, t: smooth_f1_loss(x, t, average="macro"),
    "F1 micro": lambda x, t: smooth_f1_loss(x, t, average="micro"),
    "precision": lambda x, t: smooth_f1_loss(x[:, 0], t[:, 0], beta=0.0),
    "recall": lambda x, t: smooth_f1_loss(x[:, 0], t[:, 0], beta=math.inf),
}


def _gradients(seed: int, batch: int = 500) -> tuple[np.ndarray, dict[tuple[str, int], np.ndarray]]:
    """Gradient by one logit as it moves, batch times, for a positive and a negative row.

    The other rows separate moderately (logits N(-3, 1.5) and N(0, 1.5)); a second class, three times as frequent, is
    there for the averages over classes.
    """
    g = torch.Generator().manual_seed(seed)
    t = torch.zeros(batch, 2)
    t[: batch * 3 // 100, 0] = 1
    t[-(batch * 9 // 100) :, 1] = 1
    x = 1.5 * torch.randn(batch, 2, generator=g) - 3 * (1 - t)
    grid = np.linspace(-8, 8, 65)
    found = {}
    for label, row in ((1, 0), (0, batch // 2)):
        for name, loss in GRADIENTS.items():
            values = []
            for value in grid:
                moved = x.clone()
                moved[row, 0] = value
                moved.requires_grad_()
                values.append(batch * float(torch.autograd.grad(loss(moved, t), moved)[0][row, 0]))
            found[name, label] = np.array(values)
    return grid, found


def _bias(seed: int, size: int) -> dict[str, list[Any]]:
    """The batch's F1 loss against the whole sample's."""
    g = torch.Generator().manual_seed(seed)
    t = (torch.rand(size, generator=g) < 0.03).float()
    x = 1.5 * torch.randn(size, generator=g) - 4 + 3 * t
    table: dict[str, list[Any]] = {"batch": [], "sums": [], "no positive": [], "loss": [], "gradient": [], "spread": []}
    for batch, momentum in ((16, None), (16, 0.95), (64, None), (500, None), (size, None)):
        loss = SmoothF1Loss(momentum)
        losses, slopes = [], []
        parts = torch.randperm(len(x), generator=g).split(batch)
        for rows in parts:
            shift = torch.zeros((), requires_grad=True)
            value = loss(x[rows] + shift, t[rows])
            losses.append(float(value.detach()))
            slopes.append(float(torch.autograd.grad(value, shift)[0]) / (1 - (momentum or 0)))
        skip = 100 if momentum else 0  # the running sums settle
        row = (
            batch if batch < len(x) else "all", "batch" if momentum is None else "running",
            float(np.mean([float(t[rows].sum() == 0) for rows in parts])),
            float(np.mean(losses[skip:])), float(np.mean(slopes[skip:])), float(np.std(slopes[skip:])),
        )  # fmt: skip
        for column, cell in zip(table.values(), row, strict=True):
            column.append(cell)
    return table


def _data(seed: int, rows: int = 12000) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = make_classification(
        rows, 30, n_informative=8, n_redundant=2, n_clusters_per_class=3, weights=[0.97], flip_y=0.01, class_sep=0.8,
        random_state=seed,
    )  # fmt: skip
    x = torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)
    t = torch.tensor(y, dtype=torch.float32)
    return x[: rows // 2], t[: rows // 2], x[rows // 2 :], t[rows // 2 :]


@torch.random.fork_rng(devices=[])  # the caller's random state stays as it was
def _train(loss: Loss, data: tuple[Tensor, ...], seed: int, batch: int, epochs: int, switch: int) -> list[float]:
    """F1 at threshold .5 on the test half after each epoch; the learning rate is halved at the switch."""
    torch.manual_seed(seed)
    x, t, test, labels = data
    model = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 1))
    curve = []
    for epoch in range(epochs):
        if epoch in (0, switch):
            optimizer = torch.optim.Adam(model.parameters(), 1e-3 if epoch else 2e-3)
        if isinstance(loss, SwitchLoss):
            loss.set_epoch(epoch)
        for rows in torch.randperm(len(x)).split(batch):
            value = loss(model(x[rows]).squeeze(1), t[rows])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        with torch.no_grad():
            decided = (model(test).squeeze(1) > 0).float()
        curve.append(2 * float(decided @ labels) / float(decided.sum() + labels.sum()))
    return curve


def measure(quick: bool, seed: int) -> Measurement:
    """Measure the claim; see the module for the rule.

    Args:
        quick: Three seeds, and no training at batch 16.
        seed: First of five seeds (three when quick).
    """
    bounds, bounds_hold = _bounds(seed)
    recursion, recursion_holds = _recursion(seed)
    grid, gradients = _gradients(seed)
    epochs, switch = 40, 30
    seeds = range(seed, seed + (3 if quick else 5))
    cross_entropy: Loss = F.binary_cross_entropy_with_logits
    runs: dict[str, list[list[float]]] = {"cross-entropy": [], "then F1": []}
    kinds = ("cross-entropy", "then F1", "then F1, running sums", "F1 from scratch")
    small: dict[str, list[list[float]]] = {name: [] for name in kinds}
    for number in seeds:
        data = _data(number)

        def switched(then: Loss) -> Loss:
            return SwitchLoss(cross_entropy, then, at_epoch=switch)

        runs["cross-entropy"].append(_train(cross_entropy, data, number, 500, epochs, epochs))
        runs["then F1"].append(_train(switched(smooth_f1_loss), data, number, 500, epochs, switch))
        if not quick and number < seed + 2:  # thirty times the steps
            length, turn = 14, 8
            for name, then in (("then F1", smooth_f1_loss), ("then F1, running sums", SmoothF1Loss(0.95))):
                loss = SwitchLoss(cross_entropy, then, at_epoch=turn)
                small[name].append(_train(loss, data, number, 16, length, turn))
            small["cross-entropy"].append(_train(cross_entropy, data, number, 16, length, length))
            small["F1 from scratch"].append(_train(smooth_f1_loss, data, number, 16, length, length))
    final = {name: [curve[-1] for curve in curves] for name, curves in runs.items()}
    wins = sum(a > b for a, b in zip(final["then F1"], final["cross-entropy"], strict=True))
    training_holds = wins >= (2 if quick else 4)
    positive = {name: gradients[name, 1] for name in GRADIENTS}
    at = [int(np.abs(grid - value).argmin()) for value in (-6, -2, 2, 6)]
    figures: dict[str, Any] = {
        "article's numbers": bounds,
        "bounds hold on 1000 random rows": bounds_hold,
        "soft top-k, 10 scores of spread 16": recursion,
        "gradient by a positive row's logit, times the batch": {
            "logit": [float(grid[i]) for i in at],
            **{name: [float(v[i]) for i in at] for name, v in positive.items()},
        },
        "F1 loss of a batch": _bias(seed, 8000 if quick else 24_000),
        "test F1 at threshold .5, batch 500": {"seed": list(seeds), **final},
        "seeds on which F1 wins": wins,
    }
    if not quick:
        last = {name: [curve[-1] for curve in curves] for name, curves in small.items()}
        swing = {f"{name}, swing": [float(np.ptp(curve[-5:])) for curve in curves] for name, curves in small.items()}
        figures["test F1 at threshold .5, batch 16"] = {"seed": list(seeds)[:2], **last, **swing}

    def plot(figure: Any) -> None:
        panels = figure.subplots(2, 2)
        for axis, label, title in ((panels[0, 0], 1, "positive row"), (panels[0, 1], 0, "negative row")):
            for name in GRADIENTS:
                size = np.abs(gradients[name, label])
                if size.any():  # the recall does not look at negatives
                    axis.semilogy(grid, size, label=name)
            axis.set(title=f"|gradient| times batch, {title}", xlabel="its logit")
            axis.title.set_fontsize(9)
        panels[0, 0].legend(fontsize=5.5, ncols=2)
        curves = [(panels[1, 0], runs, switch, "batch 500")]
        if not quick:
            curves.append((panels[1, 1], small, 8, "batch 16"))
        for axis, sets, turn, title in curves:
            for name, lines in sets.items():
                line = np.array(lines)
                epoch = np.arange(1, line.shape[1] + 1)
                (drawn,) = axis.plot(epoch, line.mean(0), label=name)
                for one in line:
                    axis.plot(epoch, one, color=drawn.get_color(), alpha=0.25, linewidth=0.8)
            axis.axvline(turn, color="grey", linestyle=":", label="switch")
            axis.set_title(f"test F1 at threshold .5, {title}", fontsize=9)
            axis.set(xlabel="epoch")
            axis.legend(fontsize=6, loc="upper left" if sets is runs else "lower right")
        if quick:
            panels[1, 1].axis("off")

    verdict: Verdict = "not reproduced"
    if bounds_hold and (recursion_holds or training_holds):
        verdict = "reproduced" if recursion_holds and training_holds else "partly"
    note = "Faint lines are single seeds. "
    note += "Batch 16 only runs in full." if quick else "Batch 16: two seeds; swing is the range of the last 5 epochs."
    return Measurement(figures, verdict, plot, note)
