"""A GRU over rows of different lengths on the CPU: the last state of each row, and its gradient, without padding.

    r = sigmoid(x_r + U_r h),  z = sigmoid(x_z + U_z h),  n = tanh(x_n + r (U_n h + b_n)),  h' = n + z (h - n)

``torch.nn.GRU`` records every operation of every step and goes back through them one by one. Here the backward pass is
written out: one small product per step, and one large product at the end for the gradient of U.

The rows are sorted, the longest first, and the steps stand one after another: step t holds the rows that are longer
than t, ``sizes[t]`` of them; together P = sum of the lengths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kexue._tensors import once_differentiable


def steps_of(lengths: Tensor) -> tuple[list[int], Tensor]:
    """Rows of each step, and the place (of P) of the last step of each row; lengths (B,) >= 1 in falling order."""
    sizes = (torch.arange(int(lengths[0]), device=lengths.device)[:, None] < lengths).sum(1)
    starts = sizes.cumsum(0) - sizes
    rows = torch.arange(len(lengths), device=lengths.device)
    return sizes.tolist(), starts[lengths - 1] + rows


def _forward(rz: Tensor, n: Tensor, weight: Tensor, bias: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Gates in the place of their inputs rz (P, 2 D) and n (P, D); returns the states and U_n h + b_n, (P, D) each."""
    d = weight.shape[1]
    states, q = torch.empty_like(n), torch.empty_like(n)
    weight_rz, weight_n = (part.T.contiguous() for part in weight.split((2 * d, d)))
    h = n.new_zeros(sizes[0], d)
    start = 0
    for size in sizes:
        now = slice(start, start + size)
        h, gates, candidate, pre = h[:size], rz[now], n[now], q[now]
        gates.addmm_(h, weight_rz).sigmoid_()
        torch.addmm(bias, h, weight_n, out=pre)
        candidate.addcmul_(gates[:, :d], pre).tanh_()
        h = torch.lerp(candidate, h, gates[:, d:], out=states[now])
        start += size
    return states, q


class LastStates(torch.autograd.Function):
    """Last states (B, D) from x_rz (P, 2 D), x_n (P, D), U (3 D, D), b_n (D,), sizes of the steps, places of the ends.

    x_rz and x_n are overwritten: they must be made for this call, by an operation that does not need its result again.
    """

    @staticmethod
    def forward(
        ctx: Any, rz: Tensor, n: Tensor, weight: Tensor, bias: Tensor, sizes: list[int], ends: Tensor
    ) -> Tensor:
        states, q = _forward(rz.detach(), n.detach(), weight, bias, sizes)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(rz.detach(), n.detach(), weight, bias, states, q)
            ctx.sizes = sizes
        return states[ends]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        rz, n, weight, _, states, q = ctx.saved_tensors
        sizes: list[int] = ctx.sizes
        d = weight.shape[1]
        weight_rz, weight_n = weight.split((2 * d, d))
        dh = upstream[0].clone()  # (B, D); rows that are shorter than t wait for their turn
        d_rz, d_n, d_q = torch.empty_like(rz), torch.empty_like(n), torch.empty_like(q)
        before = torch.zeros_like(states)  # the state in front of each step
        start = len(n)
        for t in range(len(sizes) - 1, -1, -1):
            size = sizes[t]
            start -= size
            now = slice(start, start + size)
            if t > 0:
                before[now] = states[start - sizes[t - 1] : start - sizes[t - 1] + size]
            r, z, tanh = rz[now, :d], rz[now, d:], n[now]
            g, gates, dq = dh[:size], d_rz[now], d_q[now]
            kept = g * z
            dn = torch.sub(g, kept, out=d_n[now])  # g (1 - z)
            dz = (before[now] - tanh).mul_(kept)
            torch.addcmul(dz, dz, z, value=-1, out=gates[:, d:])
            dn.addcmul_(dn, tanh.square(), value=-1)
            torch.mul(dn, r, out=dq)
            dr = q[now] * dq
            torch.addcmul(dr, dr, r, value=-1, out=gates[:, :d])
            g.copy_(kept)
            if t > 0:
                g.addmm_(gates, weight_rz).addmm_(dq, weight_n)
        return d_rz, d_n, torch.cat([d_rz.T @ before, d_q.T @ before]), d_q.sum(0), None, None
