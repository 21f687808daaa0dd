"""Gumbel-max and Gumbel-softmax (重参数、Gumbel Softmax): samples of a categorical variable that pass gradients on.

Source: 科学空间 6705 (漫谈重参数:从正态分布到Gumbel Softmax); Jang et al., https://arxiv.org/abs/1611.01144;
Maddison et al., https://arxiv.org/abs/1611.00712; Gumbel-Rao: Paulus et al., https://arxiv.org/abs/2010.04838.

    Gumbel-max      argmax_i (o_i + g_i) is a sample of softmax(o),  g_i = -log(-log u_i),  u_i ~ U(0, 1)
    Gumbel-softmax  softmax((o + g) / tau): smooth in o, one-hot and categorical in the limit tau -> 0
    straight-through ("st")   forward the one-hot of the argmax, backward the gradient of the soft sample
    Gumbel-Rao ("rao")        the same forward; backward averaged over noise that leads to the same argmax

What differs from ``F.gumbel_softmax``: noise that is several times cheaper and never infinite (``_noise.py``); the
one-hot is exact, not ``y_hard - y_soft + y_soft``; tau = 0 gives a hard sample instead of NaN; a hard sample that needs
no gradient costs one uniform number for each row instead of C exponential ones; a generator, a mask, the index.
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from kexue._checks import check_choice, check_int, check_real
from kexue._tensors import check_float, compute_dtype, once_differentiable
from kexue.stats._gumbel_kernel import (
    is_small,
    race_small,
    run_invert,
    run_race,
    run_rao_backward,
    run_top,
    softmax_backward,
)
from kexue.stats._noise import check_generator, draw_seed, draw_uniform

__all__ = ["gumbel_max", "gumbel_softmax", "kl_to_uniform", "st_embedding"]

ESTIMATORS = ("st", "soft", "rao")
COLDEST, HOTTEST = 1e30, 1e-37  # 1 / tau stays a float32 number; samples beyond are one-hot and flat anyway


class _Race(torch.autograd.Function):
    """Soft sample and index of its largest weight; the soft sample is the only buffer that is kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, seed: Tensor, inverse_tau: float, validate: bool) -> tuple[Tensor, Tensor]:
        soft, index = run_race(logits, seed, inverse_tau, validate)
        ctx.save_for_backward(soft)
        ctx.inverse_tau, ctx.dtype = inverse_tau, logits.dtype
        return soft, index

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (soft,) = ctx.saved_tensors
        if torch.compiler.is_compiling() or torch.is_grad_enabled():  # the second: create_graph
            inner = (grad * soft).sum(-1, keepdim=True)
            return ((grad - inner) * soft * ctx.inverse_tau).to(ctx.dtype), None, None, None
        return softmax_backward(grad, soft, ctx.inverse_tau, ctx.dtype), None, None, None


class _OneHot(torch.autograd.Function):
    """One-hot of the index, with the gradient of the soft sample."""

    @staticmethod
    def forward(ctx: Any, soft: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = soft.dtype
        return _one_hot(index, soft.shape[-1], dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.to(ctx.dtype), None, None


class _Rao(torch.autograd.Function):
    """One-hot of a given index; the noise is drawn in the backward pass, so that no buffer is kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, seed: Tensor, inverse_tau: float, samples: int) -> Tensor:
        ctx.save_for_backward(logits, index, seed)
        ctx.options = (inverse_tau, samples)
        return _one_hot(index, logits.shape[-1], logits.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, index, seed = ctx.saved_tensors
        rows = logits.reshape(-1, logits.shape[-1])
        out = run_rao_backward(grad.reshape(rows.shape), rows, index.view(-1), seed, *ctx.options)
        return out.view(logits.shape), None, None, None, None


class _Lookup(torch.autograd.Function):
    """weight[index] with the gradient of ``one_hot @ weight``; the one-hot is never built."""

    @staticmethod
    def forward(ctx: Any, soft: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(weight, index)
        ctx.dtype = soft.dtype
        return weight[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, index = ctx.saved_tensors
        dtype, to_soft, to_weight = compute_dtype(weight), None, None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                to_soft = (grad.to(dtype) @ weight.to(dtype).T).to(ctx.dtype)
            if ctx.needs_input_grad[1]:
                zeros = torch.zeros_like(weight, dtype=dtype)
                rows = grad.to(dtype).reshape(-1, weight.shape[1])
                to_weight = zeros.index_add(0, index.view(-1), rows).to(weight.dtype)
        return to_soft, to_weight, None


def _race(x: Tensor, seed: Tensor, inverse_tau: float, validate: bool) -> tuple[Tensor, Tensor]:
    """Soft sample (..., C), with its gradient, and index (...) of its largest weight."""
    if is_small(x):
        return race_small(x, seed, inverse_tau, validate)
    soft, index = _Race.apply(x.reshape(-1, x.shape[-1]), seed, inverse_tau, validate)
    return soft.view(x.shape), index.view(x.shape[:-1])


def _invert(x: Tensor, u: Tensor, validate: bool) -> Tensor:
    """Index (...) of a sample of softmax(x), x (..., C), from one uniform number for each row."""
    return run_invert(x.detach().reshape(-1, x.shape[-1]), u, validate).view(x.shape[:-1])


def _straight_through(soft: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """One-hot of the index, with the gradient of the soft sample."""
    if is_small(soft):
        soft = soft.to(dtype)
        return _one_hot(index, soft.shape[-1], dtype) + (soft - soft.detach())  # exact: the difference is 0
    return _OneHot.apply(soft, index, dtype)


def _one_hot(index: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    zeros = torch.zeros((*index.shape, classes), dtype=dtype, device=index.device)
    return zeros.scatter_(-1, index.unsqueeze(-1), 1.0)


def _check_logits(logits: Any, dim: int) -> int:
    """Raise unless ``logits`` has classes along ``dim``; the axis as a non-negative number."""
    check_float("logits", logits)
    check_int("dim", dim, -(2**31))
    if logits.dim() == 0 or not -logits.dim() <= dim < logits.dim():
        raise ValueError(f"logits must have an axis {dim}; got shape {tuple(logits.shape)}")
    if logits.shape[dim] == 0:
        raise ValueError(f"logits must have at least one class along axis {dim}; got shape {tuple(logits.shape)}")
    return dim % logits.dim()


def _masked(logits: Tensor, mask: Any) -> Tensor:
    """The logits with -inf where the mask is False."""
    if mask is None:
        return logits
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor (True = takes part); got {getattr(mask, 'dtype', type(mask))}")
    try:
        fits = torch.broadcast_shapes(mask.shape, logits.shape) == logits.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"mask must be broadcastable to the shape of logits, {tuple(logits.shape)}; got {tuple(mask.shape)}"
        )
    return logits.masked_fill(~mask, -math.inf)


def _check_tau(tau: Any) -> float:
    """1 / tau, or infinity for tau = 0."""
    if isinstance(tau, Tensor) and tau.requires_grad:
        raise TypeError("tau must be a number; got a tensor that requires a gradient, which tau does not get")
    if not (torch.compiler.is_compiling() and isinstance(tau, float) and tau >= 0):  # it may be symbolic there
        check_real("tau", tau, minimum=0.0)
    return max(HOTTEST, 1.0 / max(float(tau), 1.0 / COLDEST)) if tau > 0 else math.inf


@overload
def gumbel_softmax(
    logits: Tensor,
    tau: float = ...,
    hard: bool = ...,
    dim: int = ...,
    generator: torch.Generator | None = ...,
    mask: Tensor | None = ...,
    estimator: str = ...,
    rao_samples: int = ...,
    return_index: Literal[False] = ...,
    *,
    validate: bool = ...,
) -> Tensor: ...
@overload
def gumbel_softmax(
    logits: Tensor,
    tau: float = ...,
    hard: bool = ...,
    dim: int = ...,
    generator: torch.Generator | None = ...,
    mask: Tensor | None = ...,
    estimator: str = ...,
    rao_samples: int = ...,
    *,
    return_index: Literal[True],
    validate: bool = ...,
) -> tuple[Tensor, Tensor]: ...
def gumbel_softmax(
    logits: Tensor,
    tau: float = 1.0,
    hard: bool = False,
    dim: int = -1,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
    estimator: str = "st",
    rao_samples: int = 10,
    return_index: bool = False,
    *,
    validate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """A sample of softmax(logits), one-hot or smooth, whose gradient estimates that of the expectation.

    The forward of a hard sample is exactly one-hot and exactly categorical at every tau; tau then only says which soft
    sample gives the gradient: smaller means less bias and more variance.

    Args:
        logits: Scores (..., C), any floating dtype; -inf takes a class out. Half precision is computed in float32.
        tau: Temperature >= 0. 0 gives a hard sample without gradient, whatever ``hard`` says.
        hard: Return a one-hot instead of the soft sample.
        dim: Axis of the classes.
        generator: Source of randomness; torch's global CPU generator by default. One number (for each row, where no
            gradient is needed) is drawn from it and starts a faster generator, so the stream differs from that of
            ``F.gumbel_softmax``.
        mask: bool, broadcastable to the logits, True = takes part. A class without part gets probability and gradient
            exactly 0.
        estimator: The gradient of a hard sample. "st": straight-through, that of the soft sample. "rao": averaged over
            ``rao_samples`` soft samples with the same index, less variance for the same bias; always hard.
            "soft": refuses ``hard=True``.
        rao_samples: Soft samples that "rao" averages; they are drawn in the backward pass and need no memory.
        return_index: Also return the index of the largest entry, without the axis ``dim``.
        validate: Raise if a row has no finite logit, or NaN or +inf; looks at one number for each row (on a GPU this
            waits for it). Without it such a row gives NaN or any class.

    Returns:
        The sample, of the shape and dtype of the logits; with ``return_index`` a tuple of it and the int64 index. A
        hard sample that needs no gradient (also under ``torch.no_grad``) is drawn in a cheaper way, and with the same
        seed is another sample than with gradient ("rao" gives the same in both).

    Raises:
        TypeError: Logits that are not floating, a mask that is not bool, another kind of argument.
        ValueError: tau < 0, a fully masked row, NaN or +inf among the logits, shapes that do not fit, no classes,
            ``hard=True`` with "soft".

    Reference: https://arxiv.org/abs/1611.01144

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> logits = torch.tensor([[2.0, 0.0, -torch.inf]], requires_grad=True)
        >>> y, index = gumbel_softmax(logits, tau=0.5, hard=True, generator=g, return_index=True)
        >>> y.sum().item(), bool(y[0, index] == 1), y[0, 2].item()
        (1.0, True, 0.0)
        >>> (y * torch.tensor([1.0, 3.0, 5.0])).sum().backward()
        >>> logits.grad[0, 2].item()
        0.0
    """
    axis = _check_logits(logits, dim)
    inverse_tau = _check_tau(tau)
    check_generator(generator)
    check_choice("estimator", estimator, ESTIMATORS)
    check_int("rao_samples", rao_samples, 1)
    if hard and estimator == "soft":
        raise ValueError("estimator='soft' gives a soft sample; got it with hard=True (use 'st' or 'rao')")
    moved = _masked(logits, mask)
    if axis != logits.dim() - 1:
        moved = moved.movedim(axis, -1)
    rao = estimator == "rao"
    hard = hard or rao or inverse_tau == math.inf
    differentiable = torch.is_grad_enabled() and moved.requires_grad and inverse_tau != math.inf
    if hard and (rao or not differentiable):
        u = draw_uniform(moved.numel() // moved.shape[-1] + rao, generator, moved.device)
        index = _invert(moved, u[:-1] if rao else u, validate)
        if differentiable:
            # A seed drawn by itself would only be needed in the backward pass, and torch.compile would draw it there.
            sample = _Rao.apply(moved, index, (u[-1] * 2.0**53).long(), inverse_tau, rao_samples)
        else:
            sample = _one_hot(index, moved.shape[-1], moved.dtype)
    else:
        soft, index = _race(moved, draw_seed(generator), inverse_tau, validate)
        sample = _straight_through(soft, index, moved.dtype) if hard else soft.to(moved.dtype)
    if axis != logits.dim() - 1:
        sample = sample.movedim(-1, axis)
    return (sample, index) if return_index else sample


def gumbel_max(logits: Tensor, k: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """Sample indices of softmax(logits), exactly; k > 1 draws without replacement.

    For k > 1 these are the k largest of logits plus Gumbel noise (Gumbel-top-k): the first is a sample of the
    distribution, the second one of the rest of it, and so on. For k = 1 the same law is drawn by inverting the
    distribution function, with one uniform number for each row. Many draws from one distribution:
    ``gumbel_max(logits.expand(n, -1))``, which computes the distribution function once.

    Args:
        logits: Scores (..., C), any floating dtype; -inf takes a class out.
        k: Number of different classes to draw.
        generator: Source of randomness; torch's global CPU generator by default.

    Returns:
        int64 indices, (...) for k = 1, otherwise (..., k) in the order of the draws.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: k < 1 or above the number of classes that take part in some row, a fully masked row, NaN or +inf.

    Reference: https://arxiv.org/abs/1903.06059 for k > 1

    Example:
        >>> logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0])
        >>> sorted(gumbel_max(logits, k=3).tolist())
        [0, 1, 3]
        >>> gumbel_max(logits.expand(5, 2, 4)).shape
        torch.Size([5, 2])
    """
    _check_logits(logits, -1)
    check_int("k", k, 1)
    check_generator(generator)
    classes = logits.shape[-1]
    if k > classes:
        raise ValueError(f"k must be at most the number of classes; got k = {k} for {classes} classes")
    if k == 1:
        return _invert(logits, draw_uniform(logits.numel() // classes, generator, logits.device), True)
    return run_top(logits.detach().reshape(-1, classes), draw_seed(generator), k).view(*logits.shape[:-1], k)


def st_embedding(
    logits: Tensor,
    weight: Tensor,
    tau: float,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
    return_index: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Embedding of a sampled class, with the straight-through gradient for the logits.

    The same as ``gumbel_softmax(logits, tau, hard=True) @ weight`` with the same generator state, forward and backward,
    but the forward looks rows up and no one-hot is built.

    Args:
        logits: Scores (..., C), any floating dtype; -inf takes a class out.
        weight: (C, D) embeddings, any floating dtype.
        tau: Temperature >= 0; with 0 only ``weight`` gets a gradient.
        generator: Source of randomness; torch's global CPU generator by default.
        mask: bool, broadcastable to the logits, True = takes part.
        return_index: Also return the sampled index (...).

    Returns:
        (..., D) in the dtype of ``weight``, or a tuple of it and the index.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: As for :func:`gumbel_softmax`, or a weight that does not have one row for each class.

    Example:
        >>> logits, weight = torch.zeros(2, 5, requires_grad=True), torch.randn(5, 3)
        >>> out, index = st_embedding(logits, weight, 1.0, return_index=True)
        >>> out.shape, torch.equal(out, weight[index])
        (torch.Size([2, 3]), True)
    """
    _check_logits(logits, -1)
    inverse_tau = _check_tau(tau)
    check_generator(generator)
    check_float("weight", weight, 2)
    classes = logits.shape[-1]
    if weight.shape[0] != classes:
        raise ValueError(f"weight must have a row for each of the {classes} classes; got shape {tuple(weight.shape)}")
    x = _masked(logits, mask)
    if torch.is_grad_enabled() and x.requires_grad and inverse_tau != math.inf:
        soft, index = _race(x, draw_seed(generator), inverse_tau, True)
    else:
        soft = x.detach()  # _Lookup gives it no gradient
        index = _invert(x, draw_uniform(x.numel() // classes, generator, x.device), True)
    out = _Lookup.apply(soft, weight, index)
    return (out, index) if return_index else out


def kl_to_uniform(logits: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    """KL(softmax(logits) || uniform) = log C - entropy: the rate of a categorical latent in a variational autoencoder.

    It is that of the categorical variable, not of its relaxation, so it goes with hard samples at every tau and with
    soft ones approximately.

    Args:
        logits: Scores (..., C), any floating dtype; -inf takes a class out.
        dim: Axis of the classes.
        mask: bool, broadcastable to the logits, True = takes part; the uniform law is over these classes.

    Returns:
        The divergence in nats without the axis, in float32 (float64 for float64 logits).

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Shapes that do not fit, no classes, a row without a finite logit.

    Example:
        >>> kl_to_uniform(torch.tensor([[0.0, 0.0, 0.0, 0.0], [99.0, 0.0, 0.0, 0.0]]))
        tensor([0.0000, 1.3863])
    """
    axis = _check_logits(logits, dim)
    x = _masked(logits, mask)
    logp = torch.log_softmax(x.to(compute_dtype(x)), axis)
    present = x > -math.inf
    count = present.sum(axis)
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(x.detach().amax(axis)).all()):
        raise ValueError("logits must be finite or -inf, with a finite one in every row; got a row without, or NaN")
    logp = torch.where(present, logp, 0.0)
    p = torch.where(present, logp.exp(), 0.0)
    return (p * logp).sum(axis) + count.to(logp.dtype).log()
