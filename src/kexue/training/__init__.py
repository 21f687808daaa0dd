"""The training loop, batches of tokens, rates per layer, gradient transforms, and optimizers as flows."""

from kexue.training.checkpoint import (
    Checkpoint,
    DamagedCheckpointError,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from kexue.training.depths import LayerDepths, layer_depths
from kexue.training.dynamics import Comparison, OrderReport, compare_with_flow, measure_order, quadratic_flow
from kexue.training.flow import GradientFlow, Trajectory
from kexue.training.gradients import TransformHandle, gradient_transform
from kexue.training.groups import param_groups
from kexue.training.interrupt import TrainingInterrupted
from kexue.training.loop import FitResult, fit
from kexue.training.masking import MaskedBatches, mask_tokens
from kexue.training.optimizers import default_optimizers
from kexue.training.order import batch_indices, numpy_generator, shuffled_batches, torch_generator
from kexue.training.packing import PackedBatches, PackedDocuments, pack_documents
from kexue.training.pairs import NextSentencePairs
from kexue.training.polyak import PolyakSGD
from kexue.training.scaled_rates import scale_lr_, unscale_lr_
from kexue.training.schedule import lr_factor
from kexue.training.steepest import steepest_direction
from kexue.training.transforms import (
    Transform,
    add_noise,
    centralize,
    clip_norm,
    clip_quantile,
    clip_value,
    freeze,
    joint,
    mask,
    normalize,
    project,
    sign,
    zero,
)

__all__ = [
    "Checkpoint",
    "Comparison",
    "DamagedCheckpointError",
    "FitResult",
    "GradientFlow",
    "LayerDepths",
    "MaskedBatches",
    "NextSentencePairs",
    "OrderReport",
    "PackedBatches",
    "PackedDocuments",
    "PolyakSGD",
    "TrainingInterrupted",
    "Trajectory",
    "Transform",
    "TransformHandle",
    "add_noise",
    "batch_indices",
    "centralize",
    "clip_norm",
    "clip_quantile",
    "clip_value",
    "compare_with_flow",
    "default_optimizers",
    "fit",
    "freeze",
    "gradient_transform",
    "joint",
    "layer_depths",
    "load_checkpoint",
    "lr_factor",
    "mask",
    "mask_tokens",
    "measure_order",
    "newest_checkpoint",
    "normalize",
    "numpy_generator",
    "pack_documents",
    "param_groups",
    "project",
    "quadratic_flow",
    "save_checkpoint",
    "scale_lr_",
    "shuffled_batches",
    "sign",
    "steepest_direction",
    "torch_generator",
    "unscale_lr_",
    "zero",
]
