"""Reparameterised normal samples (重参数): z = mu + sigma eps.

Source: 科学空间 6705 (漫谈重参数:从正态分布到Gumbel Softmax); Kingma & Welling, https://arxiv.org/abs/1312.6114

The randomness eps has no parameters, so grad E[f(z)] = E[f'(z) dz/dtheta]. Its variance is usually far below that of
the score function estimator, but not always: it grows with f'^2, as f(z) = sin(w z) with a large w shows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kexue._tensors import check_float, compute_dtype
from kexue.stats._noise import check_generator

__all__ = ["rsample_normal"]


def rsample_normal(mu: Tensor, log_var: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A sample of N(mu, exp(log_var)) that passes gradients to both.

    Args:
        mu: Means, any shape and floating dtype.
        log_var: Logarithms of the variances, of a shape that broadcasts with that of ``mu``; -inf means no noise.
        generator: Source of randomness; torch's global generator by default.

    Returns:
        The sample, of the common shape and dtype; half precision is computed in float32.

    Raises:
        TypeError: Tensors that are not floating, or another kind of generator.
        ValueError: Shapes that do not broadcast.

    Example:
        >>> mu, log_var = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
        >>> z = rsample_normal(mu, log_var, torch.Generator().manual_seed(0))
        >>> z.sum().backward()
        >>> mu.grad, torch.equal(log_var.grad, z.detach() / 2)
        (tensor([1., 1., 1.]), True)
    """
    check_float("mu", mu)
    check_float("log_var", log_var)
    check_generator(generator)
    try:
        shape = torch.broadcast_shapes(mu.shape, log_var.shape)
    except RuntimeError:
        raise ValueError(
            f"mu and log_var must have shapes that broadcast; got {tuple(mu.shape)} and {tuple(log_var.shape)}"
        ) from None
    dtype = compute_dtype(mu, log_var)
    source = mu.device if generator is None else generator.device
    eps = torch.empty(shape, device=source, dtype=dtype).normal_(generator=generator).to(mu.device)
    z = mu.to(dtype) + torch.exp(0.5 * log_var.to(dtype)) * eps
    return z.to(torch.promote_types(mu.dtype, log_var.dtype))
