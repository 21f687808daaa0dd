"""Which pairs of tokens make two texts similar: integrated gradients on both sides of a cosine.

The vector z(a) of a text is a sum over its tokens, z(a) - z(a') = sum_i v_i, where v_i is what integrated gradients
give token i in each of the D coordinates and a' is the baseline; so is z(b). The cosine of unit vectors is then

    <z(a), z(b)> = sum_ij <v_i, u_j> + <z(a), z(b')> + <z(a'), z(b)> - <z(a'), z(b')>

a matrix over pairs of tokens and a rest that no pair has made (Möller, Nikolaev, Padó, "An Attribution Method for
Siamese Encoders", EMNLP 2023, who take fixed sums).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kexue._checks import check_real
from kexue._tensors import check_float
from kexue.explain.attribution import attribute

__all__ = ["PairExplanation", "explain_pair"]


@dataclass(frozen=True, eq=False)
class PairExplanation:
    """What :func:`explain_pair` returns.

    Attributes:
        pairs: (T1, T2) float64, what each pair of tokens adds to the cosine.
        cosine: Of the two vectors.
        rest: What no pair has made; ``cosine`` is the sum of ``pairs`` and it, up to ``gap``.
        gap: Size of the difference.
        converged: Whether all coordinates of both vectors did.
    """

    pairs: Tensor
    cosine: float
    rest: float
    gap: float
    converged: bool


@torch.inference_mode(False)
def explain_pair(
    encode: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, baseline: float | Tensor = 0.0, *, tol: float = 1e-3
) -> PairExplanation:
    """Share the cosine of two texts out among the pairs of their tokens.

    Args:
        encode: Embeddings (N, T, E) -> vectors (N, D), of any length.
        a: (T1, E) embeddings of a text.
        b: (T2, E) of the other.
        baseline: Of an embedding: a number or (E,).
        tol: As in :func:`kexue.explain.integrated_gradients`, for each coordinate of the unit vectors.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Embeddings that are not (T, E) of one width, without a token, or vectors of another shape.

    Example:
        >>> table = torch.eye(4)
        >>> found = explain_pair(lambda e: e.sum(1), table[[0, 1]], table[[1, 2]], 0.1)
        >>> int(found.pairs.argmax()), bool(abs(found.cosine - 0.5) < 1e-6)  # token 1 of a with token 0 of b
        (2, True)
    """
    for name, one in (("a", a), ("b", b)):
        check_float(name, one, 2)
        if not len(one):
            raise ValueError(f"{name} must have at least one token; got shape {tuple(one.shape)}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must have embeddings of one width; got {a.shape[1]} and {b.shape[1]}")
    if not isinstance(baseline, Tensor):
        check_real("baseline", baseline)
    whole, start, shares, converged = [], [], [], True
    for one in (a, b):
        empty = torch.as_tensor(baseline, dtype=one.dtype, device=one.device).expand_as(one)
        with torch.no_grad():
            ends = _unit(encode, torch.stack([one, empty]))
        width = ends.shape[1]
        found = attribute(
            lambda e: _unit(encode, e), one.expand(width, *one.shape), empty, torch.arange(width), "adaptive", tol, 200
        )
        whole.append(ends[0].double())
        start.append(ends[1].double())
        shares.append(found.attributions.sum(-1, dtype=torch.float64))  # (D, T)
        converged = converged and bool(found.converged.all())
    pairs = shares[0].T @ shares[1]
    cosine = float(whole[0] @ whole[1])
    rest = float(whole[0] @ start[1] + start[0] @ whole[1] - start[0] @ start[1])
    return PairExplanation(pairs.cpu(), cosine, rest, abs(float(pairs.sum()) + rest - cosine), converged)


def _unit(encode: Callable[[Tensor], Tensor], e: Tensor) -> Tensor:
    out = encode(e)
    if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != len(e):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"encode must return vectors ({len(e)}, D); got {got}")
    return F.normalize(out, dim=1)
