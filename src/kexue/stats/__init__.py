"""Samples that pass gradients on, gradient estimators and their variance; optimal transport with certificates."""

from kexue.stats.certificate import Certificate, certificate
from kexue.stats.farkas import Alternative, farkas
from kexue.stats.gradient_stats import GradientStats, gradient_stats
from kexue.stats.gumbel import gumbel_max, gumbel_softmax, kl_to_uniform, st_embedding
from kexue.stats.kr_potential import KRPotential, kr_potential
from kexue.stats.normal import rsample_normal
from kexue.stats.score_function import EMABaseline, score_function_loss
from kexue.stats.sinkhorn import Sinkhorn, sinkhorn
from kexue.stats.temperature import TemperatureSchedule
from kexue.stats.transport import Transport, transport
from kexue.stats.wasserstein import wasserstein

__all__ = [
    "Alternative",
    "Certificate",
    "EMABaseline",
    "GradientStats",
    "KRPotential",
    "Sinkhorn",
    "TemperatureSchedule",
    "Transport",
    "certificate",
    "farkas",
    "gradient_stats",
    "gumbel_max",
    "gumbel_softmax",
    "kl_to_uniform",
    "kr_potential",
    "rsample_normal",
    "score_function_loss",
    "sinkhorn",
    "st_embedding",
    "transport",
    "wasserstein",
]
