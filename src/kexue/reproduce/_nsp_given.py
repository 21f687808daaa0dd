"""The reproduction of nsp-zero-shot with a model and labelled texts of the user's.

At most 1000 texts (``quick``: 100) are drawn. On the first fifth the side of the prompt is chosen, as the paper does on
its development sets; the accuracy is that of the other four fifths. Labels are put into "This is about {}." (labels
with Chinese characters: "这是关于{}的。"), so they have to be words: write "sports" and not "3" into the file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from kexue.reproduce.runner import Measurement, Verdict
from kexue.tasks import NSPZeroShotClassifier

_CHINESE = re.compile(r"[\u3400-\u9fff]")


def measure_given(model: str | Path, data: str | Path, quick: bool, seed: int) -> Measurement:
    """Zero-shot accuracy of ``model`` on ``data``.

    Args:
        model: Folder of a model with a next-sentence head.
        data: File that :func:`kexue.corpus.read_documents` reads, with one label for each text.
        quick: 100 texts instead of 1000.
        seed: Seed of the draw.

    Raises:
        ValueError: Fewer than 10 labelled texts or fewer than 2 labels; a model without a next-sentence head.
    """
    from kexue.corpus import read_documents

    found = [(f"{d.title} {d.text}" if d.title else d.text, d.labels[0]) for d in read_documents(data) if d.labels]
    if len(found) < 10:
        raise ValueError(f"data must hold at least 10 texts with a label; got {len(found)} in {data}")
    labels = sorted({label for _, label in found})
    if len(labels) < 2:
        raise ValueError(f"data must hold at least 2 labels; got only {labels[0]!r} in {data}")
    order = np.random.default_rng(seed).permutation(len(found))[: 100 if quick else 1000]
    texts = [found[k][0] for k in order]
    gold = np.array([found[k][1] for k in order])
    template = "这是关于{}的。" if any(_CHINESE.search(label) for label in labels) else "This is about {}."
    cut = max(1, len(texts) // 5)

    rows: dict[str, list[Any]] = {"prompt": [], "calibrated": [], "choosing": [], "accuracy": []}
    chosen: dict[bool, tuple[float, float]] = {}
    for prefix in (True, False):
        clf = NSPZeroShotClassifier(str(model), labels, template, prefix).fit()
        scores = clf.decision_function(texts)
        for calibrated in (False, True):
            own = scores - scores.mean(0) if calibrated else scores
            right = clf.classes_[own.argmax(1)] == gold
            dev, test = float(right[:cut].mean()), float(right[cut:].mean())
            rows["prompt"].append("before the text" if prefix else "after the text")
            rows["calibrated"].append(str(calibrated))
            rows["choosing"].append(dev)
            rows["accuracy"].append(test)
            if not calibrated:
                chosen[prefix] = (dev, test)
    accuracy = max(chosen.values(), key=lambda pair: pair[0])[1]
    n = len(texts) - cut
    # chance is what the most frequent label would get
    chance = max(float((gold[cut:] == label).mean()) for label in labels)
    p = float(binomtest(round(accuracy * n), n, chance, alternative="greater").pvalue) if chance < 1 else 1.0
    verdict: Verdict = "reproduced" if accuracy >= 0.7 else "partly" if p < 0.01 else "not reproduced"

    def plot(figure: Any) -> None:
        axis = figure.subplots()
        names = [f"{side}\n{how}" for side in ("before the text", "after the text") for how in ("as is", "calibrated")]
        axis.bar(range(4), rows["accuracy"])
        axis.set_xticks(range(4), names, fontsize=8)
        axis.axhline(chance, color="grey", linewidth=0.8, linestyle=":")
        axis.set(ylabel="accuracy", ylim=(0, 1), title=f"{Path(model).name} on {Path(data).name}, {n} texts")

    figures = {
        "your model and data": rows,
        "accuracy": accuracy,
        "most frequent label": chance,
        "p": p,
        "labels": ", ".join(labels),
        "template": template,
    }
    note = f"{n} texts, {len(labels)} labels; the side of the prompt was chosen on {cut} further ones."
    return Measurement(figures, verdict, plot, note)
