"""Samples that pass gradients on, gradient estimators, and classifiers in closed form.

The estimators of scikit-learn's kind are loaded when first used, as they bring scikit-learn.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kexue.stats.analytic_head import analytic_head_
from kexue.stats.gradient_stats import GradientStats, gradient_stats
from kexue.stats.gumbel import gumbel_max, gumbel_softmax, kl_to_uniform, st_embedding
from kexue.stats.normal import rsample_normal
from kexue.stats.score_function import EMABaseline, score_function_loss
from kexue.stats.temperature import TemperatureSchedule

if TYPE_CHECKING:
    from kexue.stats.analytic import AnalyticLogisticRegression, AnalyticLogisticRegressionCV

__all__ = [
    "AnalyticLogisticRegression",
    "AnalyticLogisticRegressionCV",
    "EMABaseline",
    "GradientStats",
    "TemperatureSchedule",
    "analytic_head_",
    "gradient_stats",
    "gumbel_max",
    "gumbel_softmax",
    "kl_to_uniform",
    "rsample_normal",
    "score_function_loss",
    "st_embedding",
]

_MODULES = {"AnalyticLogisticRegression": "analytic", "AnalyticLogisticRegressionCV": "analytic"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"kexue.stats.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
