"""The training loop: exact resume, atomic checkpoints, progress, metrics."""

from kexue.training.checkpoint import (
    Checkpoint,
    DamagedCheckpointError,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from kexue.training.interrupt import TrainingInterrupted
from kexue.training.loop import FitResult, fit
from kexue.training.optimizers import default_optimizers
from kexue.training.order import batch_indices, numpy_generator, shuffled_batches, torch_generator
from kexue.training.schedule import lr_factor

__all__ = [
    "Checkpoint",
    "DamagedCheckpointError",
    "FitResult",
    "TrainingInterrupted",
    "batch_indices",
    "default_optimizers",
    "fit",
    "load_checkpoint",
    "lr_factor",
    "newest_checkpoint",
    "numpy_generator",
    "save_checkpoint",
    "shuffled_batches",
    "torch_generator",
]
