"""Which rows make two sets of features differ: the Frechet distance shared out among them.

Source: 科学空间 8512 (两个多元正态分布的KL散度、巴氏距离和W距离)

With T the optimal map of the normal of X to that of Y and D the difference of the means, the squared distance F changes
with the weight w_i of a row of X (weights of sum 1) by

    dF/dw_i = 2 D'(x_i - m) + (x_i - m)'(I - T)(x_i - m)  -  the mean of that over X

that is, by the Kantorovich potential of the row. A row receives

    F / (N + M) + dF/dw_i / N

with the M rows of Y: what all rows receive alike, and the part by which the distance falls, to first order, if the row
is left out. All shares add up to F, and a row of a small set does not come before one of a large set for that alone. A
negative share says that the row draws the two sets together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kexue.stats._bures_kernel import symmetric
from kexue.stats.frechet import _features

__all__ = ["frechet_contributions"]


def frechet_contributions(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Share of each row in the squared Frechet distance of two sets of features.

    The cost is O(N d^2 + d^3), or O(N^2 d + N^3) with fewer rows than dimensions. Rows in directions in which their
    own side does not vary are taken as they are: no covariance is inverted there.

    Args:
        x: Features (N, d), tensor or array, with at least two rows.
        y: Features (M, d).

    Returns:
        Shares (N,) and (M,) in float64, without gradients, whose sum is :func:`frechet_distance`; rows that make the
        two sets differ have large ones.

    Raises:
        TypeError: Features that are not floating.
        ValueError: Fewer than two rows, widths that differ, values that are not finite.

    Example:
        >>> from kexue.stats import frechet_distance
        >>> x = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
        >>> y = torch.tensor([[0.0], [1.0], [0.0], [9.0]])
        >>> a, b = frechet_contributions(x, y)
        >>> b.argmax().item(), torch.isclose(a.sum() + b.sum(), frechet_distance(x, y))
        (3, tensor(True))
    """
    x, y = _features("x", x), _features("y", y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have the same width; got {x.shape[1]} and {y.shape[1]}")
    for name, rows in (("x", x), ("y", y)):
        if len(rows) < 2:
            raise ValueError(f"{name} must have at least 2 rows; got {len(rows)}")
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x, y = x.double(), y.double()
        if len(x) + len(y) < x.shape[1]:
            # Distances do not change when both are written in an orthonormal basis of the space that they span.
            basis = torch.linalg.qr(torch.cat([x, y]).mT).Q
            x, y = x @ basis, y @ basis
        shift = x.mean(0) - y.mean(0)
        x, y = x - x.mean(0), y - y.mean(0)
        s, t = (symmetric(rows.mT @ rows / (len(rows) - 1)) for rows in (x, y))
        of_x, trace = _potential(x, s, t, shift)
        of_y, _ = _potential(y, t, s, -shift)
        distance = (shift.square().sum() + s.trace() + t.trace() - 2 * trace).clamp(min=0)
        alike = distance / (len(x) + len(y))
        return alike + of_x / len(x), alike + of_y / len(y)


def _potential(rows: Tensor, own: Tensor, other: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """dF/dw of each centred row, and tr (S T)^1/2."""
    w, v = torch.linalg.eigh(own)
    keep = w > w[-1].clamp(min=0) * len(w) * torch.finfo(w.dtype).eps
    v, root = v[:, keep], w[keep].sqrt()
    factor = v * root
    moment, u = torch.linalg.eigh(symmetric(factor.mT @ other @ factor))
    moment = moment.clamp(min=0).sqrt()
    white = (rows @ v / root) @ u
    quadratic = rows.square().sum(1) - (white.square() * moment).sum(1)
    change = 2 * (rows @ shift) + quadratic * (len(rows) / (len(rows) - 1))
    return change - change.mean(), moment.sum()
