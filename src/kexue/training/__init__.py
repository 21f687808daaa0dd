"""The training loop: exact resume, atomic checkpoints, progress, metrics."""
