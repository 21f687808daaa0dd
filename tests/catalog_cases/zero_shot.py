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


def _few_shot(seed: int) -> tuple[Any, list[str]]:
    clf, texts = _classifier(seed)
    clf.set_params(few_shot="head", few_shot_steps=3)

    class Shots(type(clf)):  # type: ignore[misc]
        """Fits texts with the labels that the zero-shot classifier gives them."""

        def fit(self, X: Any = None, y: Any = None) -> Any:
            return super().fit(X, ["sports", "food", "money", "money"][: len(X)])

    clf.__class__ = Shots
    return clf, texts


def _contrast(seed: int) -> tuple[Any, list[float]]:
    import numpy as np

    from kexue.tasks import SamplesContrast

    return SamplesContrast(3, [0.2, 0.3, 0.5]), np.random.default_rng(seed).normal(size=20).tolist()


CASES["nsp-zero-shot"] = [
    EstimatorCase("NSPZeroShotClassifier", _classifier, lambda fitted: fitted.decision_function(TEXTS), []),
    EstimatorCase("few shots", _few_shot, lambda fitted: fitted.decision_function(TEXTS), []),
    EstimatorCase("SamplesContrast", _contrast, lambda fitted: fitted.predict([-2.0, -0.5, 0.0, 0.5, 2.0]), []),
]
