"""Samples that pass gradients on and gradient estimators; normals, points on a circle, optimal transport."""

from kexue.stats.bures import barycenter, ot_map, w2
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
from kexue.stats.frechet import FrechetAccumulator, frechet_distance
from kexue.stats.gaussian import Gaussian
from kexue.stats.gradient_stats import GradientStats, gradient_stats
from kexue.stats.gumbel import gumbel_max, gumbel_softmax, kl_to_uniform, st_embedding
from kexue.stats.normal import rsample_normal
from kexue.stats.score_function import EMABaseline, score_function_loss
from kexue.stats.temperature import TemperatureSchedule

__all__ = [
    "CircularRangeResult",
    "CommonSector",
    "EMABaseline",
    "FrechetAccumulator",
    "Gaussian",
    "GradientStats",
    "TemperatureSchedule",
    "barycenter",
    "bhattacharyya",
    "circular_range_test",
    "common_sector",
    "common_sector_probability",
    "frechet_distance",
    "gradient_stats",
    "gumbel_max",
    "gumbel_softmax",
    "halfspace_probability",
    "hellinger",
    "jeffreys",
    "kl",
    "kl_to_uniform",
    "ot_map",
    "renyi",
    "rsample_normal",
    "score_function_loss",
    "smallest_sector",
    "st_embedding",
    "w2",
]
