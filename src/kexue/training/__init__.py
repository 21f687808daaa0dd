"""The training loop (exact resume, atomic checkpoints, progress, metrics), and optimizers as flows."""

from kexue.training.checkpoint import (
    Checkpoint,
    DamagedCheckpointError,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from kexue.training.dynamics import Comparison, OrderReport, compare_with_flow, measure_order, quadratic_flow
from kexue.training.flow import GradientFlow, Trajectory
from kexue.training.interrupt import TrainingInterrupted
from kexue.training.loop import FitResult, fit
from kexue.training.optimizers import default_optimizers
from kexue.training.order import batch_indices, numpy_generator, shuffled_batches, torch_generator
from kexue.training.polyak import PolyakSGD
from kexue.training.schedule import lr_factor
from kexue.training.steepest import steepest_direction

__all__ = [
    "Checkpoint",
    "Comparison",
    "DamagedCheckpointError",
    "FitResult",
    "GradientFlow",
    "OrderReport",
    "PolyakSGD",
    "TrainingInterrupted",
    "Trajectory",
    "batch_indices",
    "compare_with_flow",
    "default_optimizers",
    "fit",
    "load_checkpoint",
    "lr_factor",
    "measure_order",
    "newest_checkpoint",
    "numpy_generator",
    "quadratic_flow",
    "save_checkpoint",
    "shuffled_batches",
    "steepest_direction",
    "torch_generator",
]
