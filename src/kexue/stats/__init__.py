"""Samples that pass gradients on, gradient estimators and their variance, random points on a circle."""

from kexue.stats.common_sector import (
    CircularRangeResult,
    CommonSector,
    circular_range_test,
    common_sector,
    common_sector_probability,
    halfspace_probability,
    smallest_sector,
)
from kexue.stats.gradient_stats import GradientStats, gradient_stats
from kexue.stats.gumbel import gumbel_max, gumbel_softmax, kl_to_uniform, st_embedding
from kexue.stats.normal import rsample_normal
from kexue.stats.score_function import EMABaseline, score_function_loss
from kexue.stats.temperature import TemperatureSchedule

__all__ = [
    "CircularRangeResult",
    "CommonSector",
    "EMABaseline",
    "GradientStats",
    "TemperatureSchedule",
    "circular_range_test",
    "common_sector",
    "common_sector_probability",
    "gradient_stats",
    "gumbel_max",
    "gumbel_softmax",
    "halfspace_probability",
    "kl_to_uniform",
    "rsample_normal",
    "score_function_loss",
    "smallest_sector",
    "st_embedding",
]
