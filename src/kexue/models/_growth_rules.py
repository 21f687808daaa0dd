"""Writing a grown tensor: where every entry of the small one goes, and with what factor.

An axis of a tensor is a concatenation of *parts* (queries, keys, values of a fused layer; mostly one), a part is a
product of *factors* (heads x entries of a head; mostly one), and a factor is cut into *blocks*: runs of entries that
are copied the same number of times. Entry ``first + i`` of the small factor stands at
``start + i * step + t * period`` of the large one for every copy t, so that repetition (a, a, b, b), tiling
(a, b, a, b) and stride (a, 0, b, 0) are one thing: a strided view of the target. Nothing of the size of a tensor is
ever allocated, and every entry is written once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Axis", "Block", "Factor", "Recipe", "fills", "keep", "repeat", "stride", "tile"]

_CHUNK = 1 << 18  # entries of the target written at a time: what is copied again is still in the cache then
_NOISE_CHUNK = 1 << 20


@dataclass(frozen=True)
class Block:
    """A run of entries of a factor.

    Attributes:
        start: Place of its first entry in the large factor.
        count: Entries of the run.
        first: Place of its first entry in the small factor.
        copies: Copies of each entry in this block.
        total: Copies of each entry in all blocks; copies that are read are divided by it.
        step: Distance of neighbours in the large factor.
        period: Distance of two copies of an entry.
        scale: What the values are multiplied by.
        source: "copy"; "mean", the mean over the small axis; "value", the constant ``scale``; "spare", 0, of which
            nothing is read, so that noise need not cancel there.
    """

    start: int
    count: int
    first: int = 0
    copies: int = 1
    total: int = 1
    step: int = 1
    period: int = 1
    scale: float = 1.0
    source: str = "copy"


@dataclass(frozen=True)
class Factor:
    """A factor of an axis: its two sizes and the blocks, which cover the large one exactly."""

    small: int
    big: int
    blocks: tuple[Block, ...]

    def averaged(self) -> Factor:
        """What reads this factor: copies share the weight, entries that are no copies have weight 0."""
        return Factor(
            self.small,
            self.big,
            tuple(
                replace(b, scale=1 / b.total) if b.source == "copy" else replace(b, scale=0.0, source="value")
                for b in self.blocks
            ),
        )

    def shared_product(self, scale: float) -> Factor:
        """One of two factors whose inner product is taken: copies of a product have to sum to ``scale``^2 of it."""
        blocks = (replace(b, scale=scale / math.sqrt(b.total)) if b.source == "copy" else b for b in self.blocks)
        return Factor(self.small, self.big, tuple(blocks))

    def spare(self) -> Factor:
        """The same with its zeros free to hold noise."""
        blocks = (b if b.source == "copy" else replace(b, source="spare") for b in self.blocks)
        return Factor(self.small, self.big, tuple(blocks))

    def filled(self, source: str, scale: float = 0.0) -> Factor:
        """The same with other fills."""
        blocks = (b if b.source == "copy" else replace(b, source=source, scale=scale) for b in self.blocks)
        return Factor(self.small, self.big, tuple(blocks))


def keep(size: int) -> Factor:
    """An axis that does not grow."""
    return Factor(size, size, (Block(0, size),))


def _uneven(small: int, big: int, step: int, period: int, width: int) -> Factor:
    q, r = divmod(big, small)
    blocks = [
        Block(0, r, 0, q, q + 1, step, period),
        Block(r * width, small - r, r, q, q, step, period),
        Block(q * small, r, 0, 1, q + 1),
    ]
    return Factor(small, big, tuple(b for b in blocks if b.count))


def repeat(small: int, big: int) -> Factor:
    """a, a, b, b; if ``big`` is no multiple of ``small``, the first entries get one more copy each, at the end."""
    q = big // small
    return _uneven(small, big, q, 1, q)


def tile(small: int, big: int) -> Factor:
    """a, b, a, b; if ``big`` is no multiple of ``small``, the last turn is cut short."""
    return _uneven(small, big, 1, small, 1)


def fills(small: int, big: int, source: str) -> Factor:
    """a, a, b, b and then fills, "mean" or "value" (0): all entries have the same number of copies."""
    q, r = divmod(big, small)
    blocks = [Block(0, small, 0, q, q, q, 1)]
    if r:
        blocks.append(Block(q * small, r, source=source, scale=1.0 if source == "mean" else 0.0))
    return Factor(small, big, tuple(blocks))


def stride(small: int, times: int) -> Factor:
    """a, 0, b, 0."""
    blocks = [Block(0, small, step=times)]
    if times > 1:
        blocks.append(Block(1, small, 0, times - 1, 1, times, 1, 0.0, "value"))
    return Factor(small, small * times, tuple(blocks))


@dataclass(frozen=True)
class Axis:
    """An axis of a tensor: parts one after another, each a product of factors."""

    parts: tuple[tuple[Factor, ...], ...]

    @classmethod
    def of(cls, *factors: Factor) -> Axis:
        """An axis of one part."""
        return cls((factors,))

    @classmethod
    def joined(cls, axes: Iterable[Axis]) -> Axis:
        """Several axes one after another, as in a fused layer."""
        return cls(tuple(part for axis in axes for part in axis.parts))

    def scaled(self, scale: float) -> Axis:
        """The same with every value multiplied."""
        parts = []
        for first, *rest in self.parts:
            blocks = (replace(b, scale=b.scale * scale) for b in first.blocks)
            parts.append((Factor(first.small, first.big, tuple(blocks)), *rest))
        return Axis(tuple(parts))

    def averaged(self) -> Axis:
        """What reads this axis."""
        return Axis(tuple(tuple(f.averaged() for f in part) for part in self.parts))

    @property
    def small(self) -> int:
        """Size in the small model."""
        return sum(math.prod(f.small for f in part) for part in self.parts)

    @property
    def big(self) -> int:
        """Size in the large model."""
        return sum(math.prod(f.big for f in part) for part in self.parts)

    @property
    def grown(self) -> bool:
        """Whether anything is copied or filled."""
        return any(len(f.blocks) > 1 or f.blocks[0].copies > 1 for part in self.parts for f in part)

    def pieces(self) -> Iterator[_Piece]:
        """All combinations of blocks."""
        small = big = 0
        for part in self.parts:
            for blocks in itertools.product(*(f.blocks for f in part)):
                yield _Piece(part, blocks, small, big)
            small += math.prod(f.small for f in part)
            big += math.prod(f.big for f in part)


@dataclass(frozen=True)
class _Piece:
    """One block of every factor of a part, as strided views: sizes, and (offset, strides) in both tensors."""

    part: tuple[Factor, ...]
    blocks: tuple[Block, ...]
    small_offset: int
    big_offset: int

    @property
    def scale(self) -> float:
        return math.prod(b.scale for b in self.blocks)

    def source(self) -> str:
        kinds = {b.source for b in self.blocks} - {"copy"}
        if "value" in kinds or "spare" in kinds:
            return "spare" if "spare" in kinds else "value"
        return "mean" if kinds else "copy"

    def layout(self, small_stride: int, big_stride: int) -> tuple[list[int], int, list[int], int, list[int]]:
        """Sizes (count, copies, count, copies, ...); offset and strides in the small tensor, and in the large one."""
        sizes: list[int] = []
        small_strides: list[int] = []
        big_strides: list[int] = []
        small_offset, big_offset = self.small_offset * small_stride, self.big_offset * big_stride
        for i, b in enumerate(self.blocks):
            small_unit = small_stride * math.prod(f.small for f in self.part[i + 1 :])
            big_unit = big_stride * math.prod(f.big for f in self.part[i + 1 :])
            sizes += [b.count, b.copies]
            small_offset += b.first * small_unit
            big_offset += b.start * big_unit
            small_strides += [small_unit, 0]
            big_strides += [b.step * big_unit, b.period * big_unit]
        return sizes, small_offset, small_strides, big_offset, big_strides


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Recipe:
    """How one tensor of the grown model comes from one of the small model.

    Attributes:
        source: Name of the tensor of the small model.
        axes: One per axis of the tensor.
        scale: Factor of all values (not of constant fills).
        inputs: The axis that is read, over whose copies noise has to sum to 0; None: no noise.
        noise: Standard deviation of the noise, before it is centred, as a part of the root mean square of the values.
    """

    source: str
    axes: tuple[Axis, ...]
    scale: float = 1.0
    inputs: int | None = None
    noise: float = 0.0

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Shape in the small model."""
        return tuple(axis.small for axis in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the grown model."""
        return tuple(axis.big for axis in self.axes)

    @property
    def noisy(self) -> bool:
        """Whether :meth:`write` draws numbers."""
        return self.noise > 0 and self.inputs is not None and self.scale != 0 and self.axes[self.inputs].grown

    @torch.no_grad()
    def write(self, source: Tensor, out: Tensor, generator: torch.Generator | None = None) -> None:
        """Fill ``out``, contiguous and of any content, once.

        Args:
            source: The tensor of the small model.
            out: The tensor of the grown model, of the dtype in which values are to be rounded.
            generator: Source of the noise, of any device; None: torch's global one.

        Raises:
            ValueError: A shape other than planned, or a target that is not contiguous.
        """
        for name, tensor, shape in (("source", source, self.source_shape), ("out", out, self.shape)):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} of {self.source} must have shape {shape}; got {tuple(tensor.shape)}")
        if not out.is_contiguous():
            raise ValueError(f"out of {self.source} must be contiguous; got strides {out.stride()}")
        source, out = source.detach(), out.detach()
        if self.scale == 0:
            out.zero_()
            return
        for pieces in itertools.product(*(axis.pieces() for axis in self.axes)):
            self._write(source, out, pieces)
        if self.noisy:
            self._perturb(source, out, generator)

    def _write(self, source: Tensor, out: Tensor, pieces: tuple[_Piece, ...]) -> None:
        kinds = [piece.source() for piece in pieces]
        scale = math.prod(piece.scale for piece in pieces)
        constant = any(kind in ("value", "spare") for kind in kinds)
        for axis, kind in enumerate(kinds):
            if kind == "mean" and not constant:
                source = source.mean(axis, keepdim=True, dtype=_accumulator(source.dtype)).expand(source.shape)
        sizes: list[int] = []
        small_strides: list[int] = []
        big_strides: list[int] = []
        small_offset, big_offset = source.storage_offset(), out.storage_offset()
        for piece, small_stride, big_stride in zip(pieces, source.stride(), out.stride(), strict=True):
            layout = piece.layout(small_stride, big_stride)
            sizes += layout[0]
            small_offset, small_strides = small_offset + layout[1], small_strides + layout[2]
            big_offset, big_strides = big_offset + layout[3], big_strides + layout[4]
        target = out.as_strided(sizes, big_strides, big_offset)
        if constant:
            target.fill_(scale)
            return
        values = source.as_strided(sizes, small_strides, small_offset)
        scale *= self.scale
        # Copies along the first axis are whole rows: they are made from the first copy, which the cache still holds.
        rows = max(1, _CHUNK // max(1, target[:1].numel()))
        for low in range(0, sizes[0], rows):
            chunk, read = target[low : low + rows], values[low : low + rows, :1]
            if out.dtype.itemsize > 2 or out.dim() == 1:
                torch.mul(read, scale, out=chunk[:, :1])
            else:  # arithmetic on 2 bytes is fast on contiguous memory only
                product = torch.empty(read[..., 0].shape, dtype=out.dtype, device=out.device)
                torch.mul(read[..., 0], scale, out=product)
                for t in range(sizes[-1]):
                    chunk[:, :1, ..., t].copy_(product)
            if sizes[1] > 1:
                chunk[:, 1:].copy_(chunk[:, :1].expand_as(chunk[:, 1:]))

    def _perturb(self, source: Tensor, out: Tensor, generator: torch.Generator | None) -> None:
        """Add noise whose sum over the copies of every input is 0."""
        axis = self.axes[self.inputs]  # type: ignore[index]
        dtype = _accumulator(out.dtype)
        norm = float(torch.linalg.vector_norm(source, dtype=_accumulator(source.dtype)))
        std = self.noise * norm / math.sqrt(max(1, source.numel())) * abs(self.scale) * axis.small / axis.big
        free = self._free_rows(out.device)
        device = generator.device if generator is not None else out.device
        matrix = out if self.inputs == 1 else out.T
        for low in range(0, matrix.shape[0], max(1, _NOISE_CHUNK // axis.big)):
            rows = matrix[low : low + max(1, _NOISE_CHUNK // axis.big)]
            # Drawn in float32 whatever the dtype is: one seed gives one noise.
            noise = torch.randn(rows.shape, generator=generator, device=device).to(out.device, dtype).mul_(std)
            raw = noise[free[low : low + len(rows)]] if free is not None else None
            _centre(noise, axis)
            if raw is not None:
                noise[free[low : low + len(rows)]] = raw  # type: ignore[index]
            torch.add(rows, noise, out=rows)

    def _free_rows(self, device: Any) -> Tensor | None:
        """Which outputs nothing reads yet: their noise needs no centring."""
        found = torch.zeros(self.axes[1 - self.inputs].big, dtype=torch.bool)  # type: ignore[operator]
        for piece in self.axes[1 - self.inputs].pieces():  # type: ignore[operator]
            if piece.source() == "spare":
                sizes, _, _, offset, strides = piece.layout(1, 1)
                found.as_strided(sizes, strides, offset).fill_(True)
        return found.to(device) if bool(found.any()) else None


def _centre(noise: Tensor, axis: Axis) -> None:
    """Subtract from (N, big) the mean over the copies of each entry of the axis."""
    means = noise.new_zeros(len(noise), axis.small)
    views = []
    for piece in axis.pieces():
        if piece.source() != "copy":
            continue  # a fill holds exactly 0: whatever is read from it adds nothing
        sizes, small_offset, small_strides, big_offset, big_strides = piece.layout(1, 1)
        copies = list(range(2, len(sizes) + 1, 2))
        part = noise.as_strided([len(noise), *sizes], [axis.big, *big_strides], big_offset)
        once = [1 if i % 2 else size for i, size in enumerate(sizes)]
        mean = means.as_strided([len(noise), *once], [axis.small, *small_strides], small_offset)
        total = math.prod(b.total for b in piece.blocks)
        mean += part.sum(copies, keepdim=True) / total
        views.append((part, mean))
    for part, mean in views:
        part -= mean
