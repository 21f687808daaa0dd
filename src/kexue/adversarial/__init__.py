"""Adversarial models: critics with a bounded slope, penalties on the slope, and reports on them."""

from __future__ import annotations

from kexue.adversarial.lipschitz import LipschitzCritic
from kexue.adversarial.normalization import gradient_normalize
from kexue.adversarial.penalties import clip_weights_, gradient_penalty, w_div_penalty
from kexue.adversarial.slope_report import LipschitzReport, lipschitz_report

__all__ = [
    "LipschitzCritic",
    "LipschitzReport",
    "clip_weights_",
    "gradient_normalize",
    "gradient_penalty",
    "lipschitz_report",
    "w_div_penalty",
]
