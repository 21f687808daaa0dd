"""Adversarial training: GAN-QP and BiGAN-QP, critics with a bounded slope, and a comparison of methods.

Everything is loaded when first used, as it brings torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kexue.adversarial.bigan_qp import BiGANQP
    from kexue.adversarial.grids import image_grid
    from kexue.adversarial.lipschitz import LipschitzCritic
    from kexue.adversarial.networks import PairCritic, bigan_networks, gan_networks
    from kexue.adversarial.normalization import gradient_normalize
    from kexue.adversarial.penalties import clip_weights_, gradient_penalty, w_div_penalty
    from kexue.adversarial.qp import QPCritic, QPLoss
    from kexue.adversarial.quality import ModeCoverage, SampleQuality, mode_coverage, sample_quality
    from kexue.adversarial.ranking import Ranking, rank_gans
    from kexue.adversarial.slope_report import LipschitzReport, lipschitz_report
    from kexue.adversarial.trainer import AdversarialTrainer

__all__ = [
    "AdversarialTrainer",
    "BiGANQP",
    "LipschitzCritic",
    "LipschitzReport",
    "ModeCoverage",
    "PairCritic",
    "QPCritic",
    "QPLoss",
    "Ranking",
    "SampleQuality",
    "bigan_networks",
    "clip_weights_",
    "gan_networks",
    "gradient_normalize",
    "gradient_penalty",
    "image_grid",
    "lipschitz_report",
    "mode_coverage",
    "rank_gans",
    "sample_quality",
    "w_div_penalty",
]

_MODULES = {
    "AdversarialTrainer": "trainer",
    "BiGANQP": "bigan_qp",
    "LipschitzCritic": "lipschitz",
    "LipschitzReport": "slope_report",
    "ModeCoverage": "quality",
    "PairCritic": "networks",
    "QPCritic": "qp",
    "QPLoss": "qp",
    "Ranking": "ranking",
    "SampleQuality": "quality",
    "bigan_networks": "networks",
    "clip_weights_": "penalties",
    "gan_networks": "networks",
    "gradient_normalize": "normalization",
    "gradient_penalty": "penalties",
    "image_grid": "grids",
    "lipschitz_report": "slope_report",
    "mode_coverage": "quality",
    "rank_gans": "ranking",
    "sample_quality": "quality",
    "w_div_penalty": "penalties",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"kexue.adversarial.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
