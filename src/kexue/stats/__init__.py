"""Samples that pass gradients on, gradient estimators and their variance."""

from kexue.stats.gradient_stats import GradientStats, gradient_stats
from kexue.stats.gumbel import gumbel_max, gumbel_softmax, kl_to_uniform, st_embedding
from kexue.stats.normal import rsample_normal
from kexue.stats.score_function import EMABaseline, score_function_loss
from kexue.stats.temperature import TemperatureSchedule

__all__ = [
    "EMABaseline",
    "GradientStats",
    "TemperatureSchedule",
    "gradient_stats",
    "gumbel_max",
    "gumbel_softmax",
    "kl_to_uniform",
    "rsample_normal",
    "score_function_loss",
    "st_embedding",
]
