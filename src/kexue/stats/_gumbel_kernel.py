"""Gumbel-softmax on matrices of logits, by blocks of rows that stay in the cache.

With E_i ~ Exp(1) the Gumbel noise is -log E_i, so that exp(o_i + noise) = e^{o_i} / E_i: the largest is a sample of
softmax(o), and at tau = 1 the soft sample is these weights divided by their sum, without a logarithm.

- ``race_pass``: soft sample and its index; ``race_small``: the same for few numbers.
- ``softmax_backward``: the gradient of softmax(./tau), in blocks.
- ``rao_backward``: the same averaged over samples of the noise given the index. With p = softmax(o), E_d the noise of
  the winner and a_i = p_i E_d, the conditional weights are 1 for the winner and (a_i / (E_i + a_i))^(1/tau) for others.
- ``invert_cdf``: indices alone, from one uniform number for each row. The distribution function has two levels, sums of
  chunks and sums within the chunk that was hit, so that its running sums can be float64 at little cost.
- ``race_top``: the k first of the race in their order, that is k draws without replacement.

Each is one opaque operator while torch.compile traces; the noise starts from a seed that is an input, so that the
operators are functions of their inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kexue._tensors import compute_dtype
from kexue.stats._noise import Noise, draw_exponential

BLOCK = 2**17  # numbers of a block of rows, 512 KiB in float32: small enough for the cache, few calls
SMALL = 2**11  # numbers up to which calls cost more than work
CHUNK = 128
LOG2E = math.log2(math.e)
BELOW_ONE = 1.0 - 2.0**-52


def row_blocks(x: Tensor) -> Iterator[slice]:
    """Slices of the rows of x (N, C): blocks on the CPU, all at once elsewhere."""
    rows, width = x.shape
    step = max(1, BLOCK // width) if x.device.type == "cpu" else max(1, rows)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def check_tops(tops: Tensor) -> None:
    """Raise ValueError unless the largest logit of every row is finite."""
    if math.isfinite(float(tops.sum())):  # nearly always one look is enough; finite numbers may overflow
        return
    tops = tops.flatten()
    good = torch.isfinite(tops)
    if bool(good.all()):
        return
    row = int((~good).nonzero()[0])
    value = float(tops[row])
    what = "no class that takes part" if value == -math.inf else f"{value} among its logits"
    raise ValueError(f"logits must be finite or -inf, with a finite one in every row; got row {row} with {what}")


def _scratch(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A buffer for the rows of one block, made once: fresh memory in every block would cost more than its use."""
    rows = next(row_blocks(x), slice(0, 0))
    return x.new_empty(rows.stop, x.shape[1], dtype=dtype)


def _argmax(x: Tensor) -> Tensor:
    """Argmax of each row; numpy's is many times faster than torch's on the CPU."""
    return torch.from_numpy(x.numpy().argmax(1)) if x.device.type == "cpu" else x.argmax(1)


def _log_(x: Tensor) -> Tensor:
    """Logarithm in place; numpy's is several times faster than torch's on the CPU in float32."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return x.log_()
    np.log(x.numpy(), out=x.numpy())
    return x


def race_pass(x: Tensor, seed: Tensor, inverse_tau: float, validate: bool) -> tuple[Tensor, Tensor]:
    """Soft sample (N, C) in float32 (float64 for float64) and index (N,) of its largest weight.

    Args:
        x: (N, C) logits, any floating dtype, -inf where masked.
        seed: Of the noise.
        inverse_tau: 1 / tau.
        validate: Check that every row has a finite largest logit.
    """
    dtype = compute_dtype(x)
    soft = x.new_empty(x.shape, dtype=dtype)
    noise = Noise(seed, dtype, x.device)
    scratch = _scratch(x, dtype)
    indices, tops = [], []
    for block in row_blocks(x):
        e, logits = soft[block], x[block].to(dtype)
        noise.exponential_(e)
        top = torch.amax(logits, 1, keepdim=True)
        weights = torch.sub(logits, top, out=scratch[: len(e)])
        if inverse_tau == 1.0:
            torch.div(weights.mul_(LOG2E).exp2_(), e, out=e)
            best = _argmax(e)
        else:
            torch.sub(weights, _log_(e), out=e)
            best = _argmax(e)
            e.sub_(e.gather(1, best[:, None])).mul_(LOG2E * inverse_tau).exp2_()
        e.div_(e.sum(1, keepdim=True))
        tops.append(top)
        indices.append(best)
    if validate and tops:
        check_tops(torch.cat(tops))
    return soft, torch.cat(indices) if indices else x.new_empty(0, dtype=torch.int64)


def is_small(x: Tensor) -> bool:
    """Whether :func:`race_small` pays."""
    return not torch.compiler.is_compiling() and x.numel() <= SMALL and x.device.type == "cpu"


def race_small(x: Tensor, seed: Tensor, inverse_tau: float, validate: bool) -> tuple[Tensor, Tensor]:
    """:func:`race_pass` for (..., C), in few calls of torch's own functions, which also do its backward pass.

    Noise and results are those of :func:`race_pass`, up to rounding.
    """
    if x.dtype != torch.float64:
        x = x.float()
    e = draw_exponential(seed, x.shape, x.dtype)
    top = x.detach().amax(-1, keepdim=True)
    if validate:
        check_tops(top)
    raced = (x - top).sub_(e.log_())
    index = raced.detach().argmax(-1)
    if inverse_tau != 1.0:
        raced = raced * inverse_tau
    return raced.softmax(-1), index


def softmax_backward(grad: Tensor, soft: Tensor, inverse_tau: float, dtype: torch.dtype) -> Tensor:
    """Gradient of softmax(x / tau) with respect to x, (N, C) in ``dtype``."""
    out = soft.new_empty(soft.shape, dtype=dtype)
    scratch = None if dtype == soft.dtype else _scratch(soft, soft.dtype)
    for block in row_blocks(soft):
        s = soft[block]
        part = torch.mul(grad[block], s, out=out[block] if scratch is None else scratch[: len(s)])
        part.addcmul_(s, part.sum(1, keepdim=True), value=-1)
        if inverse_tau != 1.0:
            part.mul_(inverse_tau)
        if scratch is not None:
            out[block] = part
    return out


def rao_backward(grad: Tensor, x: Tensor, index: Tensor, seed: Tensor, inverse_tau: float, samples: int) -> Tensor:
    """The gradient of the soft sample, averaged over ``samples`` draws of the noise given the index."""
    dtype = compute_dtype(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    noise = Noise(seed, dtype, x.device)
    blocks = list(row_blocks(x))
    if not blocks:
        return out
    step = min(samples, max(1, BLOCK // x.numel()))  # samples at a time, where one leaves room in a block
    buffers = x.new_empty(2, step, blocks[0].stop, x.shape[1], dtype=dtype)
    for block in blocks:
        logp = torch.log_softmax(x[block].to(dtype), 1)
        p, total = logp.exp(), torch.zeros_like(logp)
        g, winner = grad[block].to(dtype), index[block, None]
        for start in range(0, samples, step):
            e, part = buffers[:, : samples - start, : len(p)]
            chosen = winner.expand(len(e), -1, -1)
            noise.exponential_(e)
            mine = e.gather(2, chosen)
            if inverse_tau == 1.0:
                torch.mul(p, mine, out=part)
                torch.div(part, e.add_(part), out=e)
            else:
                torch.sub(logp, _log_(e.addcmul_(p, mine)), out=e)
                e.add_(mine.log_()).mul_(LOG2E * inverse_tau).exp2_()
            e.scatter_(2, chosen, 1.0)
            e.div_(e.sum(2, keepdim=True))
            torch.mul(g, e, out=part)
            part.addcmul_(e, part.sum(2, keepdim=True), value=-1)
            total.add_(part[0] if len(part) == 1 else part.sum(0))
        out[block] = total.mul_(inverse_tau / samples)
    return out


def _hit(running: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The interval of running sums (N, G) or (G,) that u (N, 1) or (N,) times the total falls in, and this product.

    It stays below the total, so that an interval of length 0 is never hit.
    """
    target = u.clamp(max=BELOW_ONE).mul_(running[..., -1:])
    return torch.searchsorted(running, target, right=True).clamp_(max=running.shape[-1] - 1), target


def invert_cdf(x: Tensor, u: Tensor, validate: bool) -> Tensor:
    """One index (N,) for each row of logits x (N, C), from one uniform number (N,) in [0, 1) for each row."""
    rows, width = x.shape
    dtype = compute_dtype(x)
    if rows > 1 and x.stride(0) == 0:  # one distribution, expanded: its running sums are computed once
        one = x[0].to(dtype)
        if validate:
            check_tops(one.amax(0, keepdim=True))
        return _hit((one - one.amax()).double().exp_().cumsum(0), u)[0]
    if width <= CHUNK:
        wide = x.to(dtype)
        top = wide.amax(1, keepdim=True)
        if validate:
            check_tops(top)
        return _hit((wide - top).double().exp_().cumsum(1), u[:, None])[0].view(-1)
    groups = -(-width // CHUNK)
    sums, tops = x.new_empty(rows, groups, dtype=dtype), x.new_empty(rows, 1, dtype=dtype)
    blocks = list(row_blocks(x))
    weights = x.new_zeros(blocks[0].stop if blocks else 0, groups, CHUNK, dtype=dtype)  # zeros behind the last class
    for block in blocks:
        logits = x[block].to(dtype)
        part = weights[: len(logits)]
        top = torch.amax(logits, 1, keepdim=True)
        tops[block] = top
        torch.sub(logits, top, out=part.view(len(logits), -1)[:, :width]).mul_(LOG2E).exp2_()
        torch.sum(part, 2, out=sums[block])
    if validate:
        check_tops(tops)
    wide_sums = sums.double()
    running = wide_sums.cumsum(1)
    group, target = _hit(running, u[:, None])
    length = wide_sums.gather(1, group)
    rest = ((target - running.gather(1, group)) / length).add_(1.0).clamp_(min=0.0)
    place = group * CHUNK + torch.arange(CHUNK, device=x.device)
    chunk = x.gather(1, place.clamp(max=width - 1)).to(dtype) - tops
    within, _ = _hit(chunk.double().exp_().masked_fill_(place >= width, 0.0).cumsum_(1), rest)
    return (group * CHUNK + within).view(-1)


def race_top(x: Tensor, seed: Tensor, k: int) -> Tensor:
    """The k largest of logits plus Gumbel noise in falling order, (N, k).

    Their sums are float64, since the order among unlikely classes lies in small differences of large negative numbers.
    """
    index = x.new_empty(x.shape[0], k, dtype=torch.int64)
    dtype = compute_dtype(x)
    noise = Noise(seed, dtype, x.device)
    for block in row_blocks(x):
        logits = x[block].to(dtype)
        top = logits.amax(1, keepdim=True)
        check_tops(top)
        log_e = _log_(noise.exponential_(x.new_empty(logits.shape, dtype=dtype)))
        found = (logits.double() - top).sub_(log_e).topk(k, 1)
        if float(found.values.amin()) == -math.inf:
            count = int((logits > -math.inf).sum(1).min())
            if count < k:
                raise ValueError(
                    f"k must be at most the number of classes that take part; got k = {k} for {count} classes"
                )
        index[block] = found.indices
    return index


@torch.library.custom_op("kexue::gumbel_race", mutates_args=())
def _race_op(x: Tensor, seed: Tensor, inverse_tau: float, validate: bool) -> tuple[Tensor, Tensor]:
    return race_pass(x, seed, inverse_tau, validate)


@_race_op.register_fake
def _(x, seed, inverse_tau, validate):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=compute_dtype(x)), x.new_empty(x.shape[0], dtype=torch.int64)


@torch.library.custom_op("kexue::gumbel_rao_backward", mutates_args=())
def _rao_op(grad: Tensor, x: Tensor, index: Tensor, seed: Tensor, inverse_tau: float, samples: int) -> Tensor:
    return rao_backward(grad, x, index, seed, inverse_tau, samples)


@_rao_op.register_fake
def _(grad, x, index, seed, inverse_tau, samples):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@torch.library.custom_op("kexue::invert_cdf", mutates_args=())
def _invert_op(x: Tensor, u: Tensor, validate: bool) -> Tensor:
    return invert_cdf(x, u, validate)


@_invert_op.register_fake
def _(x, u, validate):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], dtype=torch.int64)


@torch.library.custom_op("kexue::gumbel_top", mutates_args=())
def _top_op(x: Tensor, seed: Tensor, k: int) -> Tensor:
    return race_top(x, seed, k)


@_top_op.register_fake
def _(x, seed, k):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], k), dtype=torch.int64)


def run_race(x: Tensor, seed: Tensor, inverse_tau: float, validate: bool) -> tuple[Tensor, Tensor]:
    """:func:`race_pass`; one opaque node while torch.compile traces."""
    return (_race_op if torch.compiler.is_compiling() else race_pass)(x, seed, inverse_tau, validate)


def run_rao_backward(grad: Tensor, x: Tensor, index: Tensor, seed: Tensor, inverse_tau: float, samples: int) -> Tensor:
    """:func:`rao_backward`, in the same way."""
    run = _rao_op if torch.compiler.is_compiling() else rao_backward
    return run(grad, x, index, seed, inverse_tau, samples)


def run_invert(x: Tensor, u: Tensor, validate: bool) -> Tensor:
    """:func:`invert_cdf`, in the same way."""
    return (_invert_op if torch.compiler.is_compiling() else invert_cdf)(x, u, validate)


def run_top(x: Tensor, seed: Tensor, k: int) -> Tensor:
    """:func:`race_top`, in the same way."""
    return (_top_op if torch.compiler.is_compiling() else race_top)(x, seed, k)
