"""Classification without labels."""

from __future__ import annotations

from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}
TEXTS = ["the cup goal ball", "soup rice", "", "news about the bank"]


def _classifier(seed: int) -> tuple[Any, list[str]]:
    from kexue.tasks import NSPZeroShotClassifier
    from tasks.nsp_models import bert, tokenizer

    labels = {"sports": ["goal", "team"], "food": "soup", "money": "tax"}
    clf = NSPZeroShotClassifier(
        bert(seed), labels, ["{}", "about {}"], calibrate=True, tokenizer=tokenizer(), sanity_pairs=[]
    )
    return clf, TEXTS


def _contrast(seed: int) -> tuple[Any, list[float]]:
    import numpy as np

    from kexue.tasks import SamplesContrast

    return SamplesContrast(3, [0.2, 0.3, 0.5]), np.random.default_rng(seed).normal(size=20).tolist()


CASES["nsp-zero-shot"] = [
    EstimatorCase("NSPZeroShotClassifier", _classifier, lambda fitted: fitted.decision_function(TEXTS), []),
    EstimatorCase("SamplesContrast", _contrast, lambda fitted: fitted.predict([-2.0, -0.5, 0.0, 0.5, 2.0]), []),
]
