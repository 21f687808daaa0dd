"""The training loop (exact resume, atomic checkpoints, progress, metrics), rates per layer, gradient transforms."""

from kexue.training.checkpoint import (
    Checkpoint,
    DamagedCheckpointError,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from kexue.training.depths import LayerDepths, layer_depths
from kexue.training.gradients import TransformHandle, gradient_transform
from kexue.training.groups import param_groups
from kexue.training.interrupt import TrainingInterrupted
from kexue.training.loop import FitResult, fit
from kexue.training.optimizers import default_optimizers
from kexue.training.order import batch_indices, numpy_generator, shuffled_batches, torch_generator
from kexue.training.scaled_rates import scale_lr_, unscale_lr_
from kexue.training.schedule import lr_factor
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
    "DamagedCheckpointError",
    "FitResult",
    "LayerDepths",
    "TrainingInterrupted",
    "Transform",
    "TransformHandle",
    "add_noise",
    "batch_indices",
    "centralize",
    "clip_norm",
    "clip_quantile",
    "clip_value",
    "default_optimizers",
    "fit",
    "freeze",
    "gradient_transform",
    "joint",
    "layer_depths",
    "load_checkpoint",
    "lr_factor",
    "mask",
    "newest_checkpoint",
    "normalize",
    "numpy_generator",
    "param_groups",
    "project",
    "save_checkpoint",
    "scale_lr_",
    "shuffled_batches",
    "sign",
    "torch_generator",
    "unscale_lr_",
    "zero",
]
