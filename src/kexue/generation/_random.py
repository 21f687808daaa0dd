"""One source of randomness for moves that are written with numpy and for moves that are written with torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class MoveGenerator(torch.Generator):
    """A ``torch.Generator`` that also has the methods of numpy's Generator, both from one seed.

    Args:
        seed: Seed.

    Example:
        >>> generator = MoveGenerator(0)
        >>> 0 <= generator.random() < 1, torch.rand(2, generator=generator).shape
        (True, torch.Size([2]))
    """

    def __new__(cls, seed: int) -> MoveGenerator:
        return super().__new__(cls, device="cpu")  # type: ignore[call-arg]  # torch takes a number for a device

    def __init__(self, seed: int) -> None:
        self.manual_seed(seed)
        self.numpy = np.random.default_rng(seed)
        # The usual ones at hand: __getattr__ is asked after torch has failed, which takes longer than a draw.
        self.random, self.integers, self.choice = self.numpy.random, self.numpy.integers, self.numpy.choice

    def copy(self) -> MoveGenerator:
        """Another generator in the same state."""
        other = MoveGenerator(0)
        other.set_state(self.get_state())
        other.numpy.bit_generator.state = self.numpy.bit_generator.state
        return other

    def __getattr__(self, name: str) -> Any:
        if name == "numpy":  # not yet there
            raise AttributeError(name)
        return getattr(self.numpy, name)
