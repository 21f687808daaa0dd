"""Why BERT starts from a standard deviation of 0.02 (BERT的初始标准差为什么是0.02?): the direct path of Post-LN.

Source: 科学空间 8747 (模型优化漫谈:BERT的初始标准差为什么是0.02?).

Post-LN computes LN(x + F(x)); with var x = 1 and var F = r it divides by sqrt(1 + r), so that after S sublayers the
input itself has the weight

    (1 + r)^(-S / 2),     r = d sigma^2 for one d x d matrix of standard deviation sigma.

sigma = 1/sqrt(d) makes r = 1 and halves the square in each sublayer; 0.02 at d = 768 makes r = .307. This is the
weight of the direct path and NOT the size of the gradient: what the path loses the branches carry (1 / (1 + r) and
r / (1 + r) add up to 1), and in deep random models the norm of the gradient need not vanish
(``kexue reproduce bert-initial-std``). A real sublayer has two matrices and an attention that averages: measure r with
:func:`kexue.models.probe` instead of assuming it, and pass it as ``ratio``.

The article also says that the gain gamma of the last LayerNorm grows most in training; ``norm_gains`` shows it.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from kexue._checks import check_int, check_real
from kexue._tensors import compute_dtype
from kexue.models._norms import is_norm, neutral_gain
from kexue.models._sampling import truncated_std
from kexue.models.probing import probe

__all__ = ["norm_gains", "skip_gain"]

# Variance that is left when a normal distribution is cut at two standard deviations
_CUT = truncated_std(2.0) ** 2


def skip_gain(
    width: int = 768,
    std: float = 0.02,
    sublayers: int = 24,
    norm: str = "post",
    truncated: bool = False,
    *,
    ratio: float | None = None,
) -> float:
    """Weight with which the input itself arrives behind a Post-LN stack at initialization: (1 + r)^(-S/2).

    Args:
        width: d.
        std: Standard deviation of the weights, 0 or more; r = d std^2.
        sublayers: S, two for each Transformer layer.
        norm: "post". In a Pre-LN stack nothing divides the direct path: its weight is 1 before the last norm.
        truncated: ``std`` is that before the cut at two standard deviations (Google's BERT, TensorFlow); .8796 of it is
            what weights have then. transformers draws without a cut.
        ratio: r as it was measured, var F / var x; ``width``, ``std`` and ``truncated`` do not count then.

    Returns:
        A number in [0, 1]; 1: the input arrives unchanged.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: A value out of range, another ``norm``.

    Reference:
        https://spaces.ac.cn/archives/8747

    Example:
        >>> print(f"{skip_gain(std=768**-0.5):.1e} {skip_gain():.1e} {skip_gain(truncated=True):.1e}")
        2.4e-04 4.0e-02 7.7e-02
    """
    check_int("width", width, 1)
    check_real("std", std, minimum=0.0)
    check_int("sublayers", sublayers, 1)
    if norm == "pre":
        raise ValueError(
            "norm must be 'post': a Pre-LN stack adds to the direct path and never divides it, its weight stays 1 "
            "up to the last norm; got 'pre'"
        )
    if norm != "post":
        raise ValueError(f"norm must be 'post'; got {norm!r}")
    if not isinstance(truncated, bool):
        raise TypeError(f"truncated must be True or False; got {truncated!r}")
    if ratio is None:
        r = width * float(std) * float(std) * (_CUT if truncated else 1.0)
    else:
        check_real("ratio", ratio, minimum=0.0)
        r = float(ratio)
    return math.exp(-0.5 * sublayers * math.log1p(r))


_NAMES = ("weight", "gamma", "scale", "g")  # what norms of other makers call their gain


def _gain(module: nn.Module) -> float | None:
    for name in _NAMES:
        gain = getattr(module, name, None)
        if isinstance(gain, Tensor) and gain.dim() == 1 and gain.numel():
            gain = gain.detach()
            return float((gain.to(compute_dtype(gain)) + (1 - neutral_gain(module, name, gain))).abs().mean())
    return None


def norm_gains(model: nn.Module, *, batch: Any = None) -> list[dict[str, Any]]:
    """Mean absolute gain |gamma| of every normalization of a model.

    Known: torch's LayerNorm, RMSNorm, GroupNorm, BatchNorm and InstanceNorm, and modules without submodules whose class
    is named "...Norm", as transformers' own RMS norms are (those of Gemma multiply by 1 + weight, which is what counts
    then).

    Args:
        model: Any module.
        batch: One as for :func:`kexue.models.probe`: list the norms in the order in which they are computed (for the
            last time). None: in the order in which the model holds them, which is the same in most models (not in
            ALBERT's).

    Returns:
        One dict for each: name, gain (None if it has none), last (True for the last of the list only).

    Raises:
        TypeError: Not a module.
        ValueError: A model without any normalization, or, with a batch, one that computes none.

    Reference:
        https://spaces.ac.cn/archives/8747

    Example:
        >>> norm_gains(nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4, affine=False)))
        [{'name': '0', 'gain': 1.0, 'last': False}, {'name': '1', 'gain': None, 'last': True}]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    found = {name: module for name, module in model.named_modules() if is_norm(module)}
    if batch is not None and found:
        called = [row["name"].partition("#")[0] for row in probe(model, batch).rows]
        order = {name: n for n, name in enumerate(called)}  # of the last call
        found = {name: found[name] for name in sorted(found.keys() & order.keys(), key=order.__getitem__)}
    if not found:
        raise ValueError(f"the model must have a normalization; got {type(model).__name__} without any")
    last = next(reversed(found))
    return [{"name": name, "gain": _gain(module), "last": name == last} for name, module in found.items()]
