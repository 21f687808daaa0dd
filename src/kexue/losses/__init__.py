"""Losses that stay right at extreme logits, in low precision and at large class counts."""

from kexue.losses._common import lse0
from kexue.losses.capsule_margin import capsule_margin_loss
from kexue.losses.class_diameter import ClassDiameter, MarginSchedule, class_diameter, ranking_certificate
from kexue.losses.combination import combination_cross_entropy
from kexue.losses.contrastive import FlatNCELoss, FlatNegativesRankingLoss, InfoNCELoss, info_nce, nt_xent
from kexue.losses.flat_scores import ContrastiveDiagnostics, contrastive_diagnostics, flat_cross_entropy
from kexue.losses.linear_cross_entropy import linear_cross_entropy
from kexue.losses.linear_sparse import LinearSparseCrossEntropyLoss, linear_sparse_cross_entropy
from kexue.losses.linear_zlpr import LinearZLPR, linear_zlpr
from kexue.losses.margin_softmax import MarginSoftmax, auto_scale, margin_cross_entropy, margin_softmax_loss
from kexue.losses.multilabel_head import MultiLabelHead, mixup_multilabel
from kexue.losses.pair_loss import unified_pair_loss
from kexue.losses.smooth_functions import (
    smooth_abs,
    smooth_max,
    smooth_min,
    smooth_relu,
    smooth_step,
    soft_argmax,
    soft_onehot,
)
from kexue.losses.smooth_metrics import SmoothF1Loss, smooth_accuracy_loss, smooth_f1_loss
from kexue.losses.soft_topk import soft_topk
from kexue.losses.sparse_softmax import SparseCrossEntropyLoss, sparse_cross_entropy, sparse_softmax
from kexue.losses.switch_loss import SwitchLoss
from kexue.losses.trainer_glue import ZLPRTrainerMixin, compute_loss_func, zlpr_compute_loss
from kexue.losses.zlpr import ZLPRLoss, zlpr_loss, zlpr_proba

__all__ = [
    "ClassDiameter",
    "ContrastiveDiagnostics",
    "FlatNCELoss",
    "FlatNegativesRankingLoss",
    "InfoNCELoss",
    "LinearSparseCrossEntropyLoss",
    "LinearZLPR",
    "MarginSchedule",
    "MarginSoftmax",
    "MultiLabelHead",
    "SmoothF1Loss",
    "SparseCrossEntropyLoss",
    "SwitchLoss",
    "ZLPRLoss",
    "ZLPRTrainerMixin",
    "auto_scale",
    "capsule_margin_loss",
    "class_diameter",
    "combination_cross_entropy",
    "compute_loss_func",
    "contrastive_diagnostics",
    "flat_cross_entropy",
    "info_nce",
    "linear_cross_entropy",
    "linear_sparse_cross_entropy",
    "linear_zlpr",
    "lse0",
    "margin_cross_entropy",
    "margin_softmax_loss",
    "mixup_multilabel",
    "nt_xent",
    "ranking_certificate",
    "smooth_abs",
    "smooth_accuracy_loss",
    "smooth_f1_loss",
    "smooth_max",
    "smooth_min",
    "smooth_relu",
    "smooth_step",
    "soft_argmax",
    "soft_onehot",
    "soft_topk",
    "sparse_cross_entropy",
    "sparse_softmax",
    "unified_pair_loss",
    "zlpr_compute_loss",
    "zlpr_loss",
    "zlpr_proba",
]
