"""Losses that stay right at extreme logits, in low precision and at large class counts."""

from kexue.losses._common import lse0
from kexue.losses.class_diameter import ClassDiameter, MarginSchedule, class_diameter, ranking_certificate
from kexue.losses.combination import combination_cross_entropy
from kexue.losses.contrastive import FlatNCELoss, FlatNegativesRankingLoss, InfoNCELoss, info_nce, nt_xent
from kexue.losses.flat_scores import ContrastiveDiagnostics, contrastive_diagnostics, flat_cross_entropy
from kexue.losses.linear_cross_entropy import linear_cross_entropy
from kexue.losses.margin_softmax import MarginSoftmax, auto_scale, margin_cross_entropy, margin_softmax_loss
from kexue.losses.pair_loss import unified_pair_loss
from kexue.losses.zlpr import ZLPRLoss, zlpr_loss, zlpr_proba

__all__ = [
    "ClassDiameter",
    "ContrastiveDiagnostics",
    "FlatNCELoss",
    "FlatNegativesRankingLoss",
    "InfoNCELoss",
    "MarginSchedule",
    "MarginSoftmax",
    "ZLPRLoss",
    "auto_scale",
    "class_diameter",
    "combination_cross_entropy",
    "contrastive_diagnostics",
    "flat_cross_entropy",
    "info_nce",
    "linear_cross_entropy",
    "lse0",
    "margin_cross_entropy",
    "margin_softmax_loss",
    "nt_xent",
    "ranking_certificate",
    "unified_pair_loss",
    "zlpr_loss",
    "zlpr_proba",
]
