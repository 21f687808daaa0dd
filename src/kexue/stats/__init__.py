"""Samples that pass gradients on, gradient estimators and their variance; normals and the distances between them."""

from kexue.stats.bures import barycenter, ot_map, w2
from kexue.stats.divergences import bhattacharyya, hellinger, jeffreys, kl, renyi
from kexue.stats.frechet import FrechetAccumulator, frechet_distance
from kexue.stats.gaussian import Gaussian
from kexue.stats.gradient_stats import GradientStats, gradient_stats
from kexue.stats.gumbel import gumbel_max, gumbel_softmax, kl_to_uniform, st_embedding
from kexue.stats.normal import rsample_normal
from kexue.stats.score_function import EMABaseline, score_function_loss
from kexue.stats.temperature import TemperatureSchedule

__all__ = [
    "EMABaseline",
    "FrechetAccumulator",
    "Gaussian",
    "GradientStats",
    "TemperatureSchedule",
    "barycenter",
    "bhattacharyya",
    "frechet_distance",
    "gradient_stats",
    "gumbel_max",
    "gumbel_softmax",
    "hellinger",
    "jeffreys",
    "kl",
    "kl_to_uniform",
    "ot_map",
    "renyi",
    "rsample_normal",
    "score_function_loss",
    "st_embedding",
    "w2",
]
