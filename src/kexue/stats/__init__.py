"""Gaussians, points on a circle, optimal transport, classifiers in closed form, gradients through samples.

The estimators of scikit-learn's kind are loaded when first used, as they bring scikit-learn.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kexue.stats.analytic_head import analytic_head_
from kexue.stats.bures import barycenter, ot_map, w2
from kexue.stats.certificate import Certificate, certificate
from kexue.stats.common_sector import (
    CircularRangeResult,
    CommonSector,
    circular_range_test,
    common_sector,
    common_sector_probability,
    halfspace_probability,
    smallest_sector,
)
from kexue.stats.divergences import bhattacharyya, hellinger, jeffreys, kl, renyi
from kexue.stats.farkas import Alternative, farkas
from kexue.stats.frechet import FrechetAccumulator, frechet_distance
from kexue.stats.frechet_contributions import frechet_contributions
from kexue.stats.gaussian import Gaussian
from kexue.stats.gradient_stats import GradientStats, gradient_stats
from kexue.stats.gumbel import gumbel_max, gumbel_softmax, kl_to_uniform, st_embedding
from kexue.stats.kr_potential import KRPotential, kr_potential
from kexue.stats.normal import rsample_normal
from kexue.stats.score_function import EMABaseline, score_function_loss
from kexue.stats.sinkhorn import Sinkhorn, sinkhorn
from kexue.stats.temperature import TemperatureSchedule
from kexue.stats.transport import Transport, transport
from kexue.stats.wasserstein import wasserstein

if TYPE_CHECKING:
    from kexue.stats.analytic import AnalyticLogisticRegression, AnalyticLogisticRegressionCV

__all__ = [
    "Alternative",
    "AnalyticLogisticRegression",
    "AnalyticLogisticRegressionCV",
    "Certificate",
    "CircularRangeResult",
    "CommonSector",
    "EMABaseline",
    "FrechetAccumulator",
    "Gaussian",
    "GradientStats",
    "KRPotential",
    "Sinkhorn",
    "TemperatureSchedule",
    "Transport",
    "analytic_head_",
    "barycenter",
    "bhattacharyya",
    "certificate",
    "circular_range_test",
    "common_sector",
    "common_sector_probability",
    "farkas",
    "frechet_contributions",
    "frechet_distance",
    "gradient_stats",
    "gumbel_max",
    "gumbel_softmax",
    "halfspace_probability",
    "hellinger",
    "jeffreys",
    "kl",
    "kl_to_uniform",
    "kr_potential",
    "ot_map",
    "renyi",
    "rsample_normal",
    "score_function_loss",
    "sinkhorn",
    "smallest_sector",
    "st_embedding",
    "transport",
    "w2",
    "wasserstein",
]

_MODULES = {"AnalyticLogisticRegression": "analytic", "AnalyticLogisticRegressionCV": "analytic"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"kexue.stats.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
