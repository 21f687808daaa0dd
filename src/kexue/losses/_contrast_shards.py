"""Contrastive losses over several processes: each computes its own rows against the columns of all.

Row i of the score matrix needs q_i, its positive and every column. So a process gathers the columns (unit vectors),
takes its own rows of the matrix, and adds the gradients of the columns up over the group. The results are those of one
process that has all rows in order of rank; the work of a process is its share of the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kexue._tensors import compute_dtype
from kexue.losses._common import through_norm, unit_rows
from kexue.losses._contrast_kernel import rows_pass
from kexue.losses._shards import Ranks


@dataclass(frozen=True)
class Rows:
    """The rows and the shared negatives that every process brings to one call.

    Attributes:
        ranks: The processes.
        counts: Rows of each.
        extra: Shared negatives of each.
    """

    ranks: Ranks
    counts: list[int]
    extra: list[int]

    @property
    def total(self) -> int:
        """Rows of all processes."""
        return sum(self.counts)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set on any process: all of them have to take part in the sums of gradients."""
        found = torch.tensor([float(flag)], device=device)
        self.ranks.reduce(found, "max")
        return bool(found.item())


def sharded_pairs(
    rows: Rows,
    q: Tensor,
    k: Tensor,
    extra: Tensor | None,
    mask: Tensor | None,
    coef: Tensor | None,
    inverse_t: float,
    margin: float,
    flat: bool,
    symmetric: bool,
    in_batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``pair_pass``, for the own rows of q, k and extra; the mask has the own rows and the columns of all."""
    ranks, own = rows.ranks, rows.ranks.own(rows.counts)
    with torch.autocast(q.device.type, enabled=False):
        dtype = compute_dtype(q, k)
        (uq, iq), (uk, ik) = unit_rows(q, dtype), unit_rows(k, dtype)
        ux, ix = unit_rows(extra, dtype) if extra is not None else (uk[:0], ik[:0])
        columns = []
        if in_batch:
            columns.append(ranks.gather(uk, rows.counts))
        if extra is not None:
            columns.append(ranks.gather(ux, rows.extra))
        index = [torch.arange(own.start, own.stop, device=q.device)] if in_batch else []
        part = coef / 2 if coef is not None and symmetric else coef
        v, gq, gc, gk = rows_pass(uq, uk, torch.cat(columns), index, mask, part, inverse_t, margin, flat)
        v_col, gx = uq.new_empty(0), uq.new_empty(0)
        if coef is not None:
            ranks.reduce(gc, "sum")
            if in_batch:
                gk = gk + gc[own]
                gc = gc[rows.total :]
            if extra is not None:
                gx = through_norm(gc[ranks.own(rows.extra)], ux, ix)
        if symmetric:  # the other direction: own columns of the matrix, which are own rows of its transpose
            turned = None if mask is None else ranks.gather(mask.byte(), rows.counts)[:, own].T.bool()
            v_col, hk, hq, hp = rows_pass(
                uk, uq, ranks.gather(uq, rows.counts), index, turned, part, inverse_t, margin, flat
            )
            if coef is not None:
                ranks.reduce(hq, "sum")
                gq, gk = gq + hq[own] + hp, gk + hk
        if coef is None:
            return v, v_col, uq.new_empty(0), uq.new_empty(0), uq.new_empty(0)
        return v, v_col, through_norm(gq, uq, iq), through_norm(gk, uk, ik), gx


def sharded_views(rows: Rows, z: Tensor, coef: Tensor | None, inverse_t: float, flat: bool) -> tuple[Tensor, Tensor]:
    """As ``self_pass``, for the own pairs of views: z (2N, D), first views before second ones."""
    ranks, own, total = rows.ranks, rows.ranks.own(rows.counts), rows.total
    with torch.autocast(z.device.type, enabled=False):
        unit, inverse = unit_rows(z, compute_dtype(z))
        half = unit.shape[0] // 2
        both = ranks.gather(torch.stack(unit.split(half) if half else (unit, unit), 1), rows.counts)
        first = torch.arange(own.start, own.stop, device=z.device)
        index, partner = torch.cat([first, first + total]), torch.cat([first + total, first])
        v, gq, gc, gp = rows_pass(
            unit, unit.roll(half, 0), torch.cat([both[:, 0], both[:, 1]]), [index, partner], None, coef,
            inverse_t, 0.0, flat,
        )  # fmt: skip
        if coef is None:
            return v, unit.new_empty(0)
        ranks.reduce(gc, "sum")
        return v, through_norm(gq + gc[index] + gp.roll(half, 0), unit, inverse)
