"""Soft top-k (光滑的 top-k): weights in [0, 1] that sum to k and mark the k largest scores.

Source: 科学空间 6620 (函数光滑化杂谈:不可导函数的可导逼近) for the recursion, 10373 for the threshold.

    sigmoid:    p_i = sigmoid(K x_i - t), with the one t for which the sum of p is k
    recursive:  x <- K (x - min x); p = 0; k times: p <- p + softmax((1 - p) x)

The threshold form is the default: monotone in x, inside [0, 1], one scalar to solve for in each row. Its gradient comes
from the implicit function theorem: with w = p (1 - p) and upstream g, it is K w (g - sum(g w) / sum(w)). The recursion
of the article sums to k as well but is unsound, see :func:`soft_topk`; it is here for comparison.

How the threshold is found. If k is more than half of n, the row is turned over, p(x, k) = 1 - p(-x, n - k), so that no
small remainder of a large sum counts. With E = exp(K x - c), made once, p = E / (E + T) costs no exponential in an
iteration. Newton's method runs on the log-odds of sum / n as a function of log T, which are straight where all scores
are equal and nearly so in a tail, and a proven bracket, log(n/k - 1) above the least and the greatest K x, catches it.
Two to four iterations are usual.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kexue._checks import check_choice, check_int
from kexue._tensors import compute_dtype
from kexue.losses._common import LOG2E
from kexue.losses.smooth_functions import check_axis, check_sharpness

__all__ = ["soft_topk"]

METHODS = ("sigmoid", "recursive")
BLOCK = 1 << 17  # scores of a block, which stays in the L2 cache
PART = 512  # entries summed in float32 before float64 takes over
REACH = 30.0  # where |log T| gets beyond it, E is made again around the new threshold
CEILING = 115.0  # of log2 E, so that E + T stays finite
ROUNDS = 2200  # halvings from the widest bracket that float64 can hold; two to four are usual
VAST = 1e300


def _total(q: Tensor) -> Tensor:
    """Row sums in float64, at the speed of float32: the parts are short enough to lose nothing that counts."""
    whole = q.shape[1] // PART * PART
    parts = q[:, :whole].unflatten(1, (-1, PART)).sum(2)
    return parts.sum(1, dtype=torch.float64) + q[:, whole:].sum(1, dtype=torch.float64)


def _start(y: Tensor, low: Tensor, count: Tensor, m: Tensor, sharp: float) -> tuple[Tensor, Tensor]:
    """First guess of the threshold in units of y, and the least finite score of each row."""
    if bool((low == -math.inf).any()):
        finite = y > -math.inf
        low = torch.where(finite, y, math.inf).amin(1)
        y = torch.where(finite, y, 0.0)
    mean = y.sum(1).double() / count
    variance = (torch.linalg.vector_norm(y, dim=1).double().square() / count - mean.square()).clamp(min=0)
    # sigmoid is nearly a normal distribution function of variance 2.9; its mean over a normal variable is one too.
    return mean - torch.special.ndtri(m / count) * (variance + 2.9 / sharp**2).sqrt(), low


def _exponentials(y: Tensor, centre: Tensor, rest: Tensor, sharp: float, rows: int, e: Tensor) -> None:
    """Fill e with exp(K (y - centre) - rest), bounded above."""
    middle = centre.to(y.dtype)[:, None]
    more = (rest * LOG2E).clamp(-1e37, 1e37).to(y.dtype)[:, None] if bool(rest.any()) else None
    for start in range(0, len(y), rows):
        part = slice(start, start + rows)
        out = torch.sub(y[part], middle[part], out=e[part]).mul_(sharp * LOG2E)
        if more is not None:
            out.sub_(more[part])
        out.clamp_(max=CEILING).exp2_()


def _widened(end: Tensor, sign: int, *terms: Tensor) -> Tensor:
    """The end of a bracket moved outwards by what the sum of the terms may have rounded off."""
    return end + sign * 1e-15 * (end.abs() + sum(term.abs() for term in terms))


def threshold_weights(y: Tensor, m: Tensor, count: Tensor, sharp: float) -> Tensor:
    """sigmoid(K y - t), rows summing to m.

    Args:
        y: (N, n), -inf = does not take part.
        m: (N,) float64 in [0, count / 2].
        count: (N,) float64, entries that take part.
        sharp: K.
    """
    e = torch.empty_like(y, memory_format=torch.contiguous_format)  # holds E, then the weights
    if not y.shape[0]:
        return e
    rows = max(1, BLOCK // y.shape[1])
    scratch = torch.empty_like(e[:rows])
    idle = m == 0
    m, count = torch.where(idle, 0.5, m), count.clamp(min=1)
    top, low = y.amax(1).double(), y.amin(1)
    guess, low = _start(y, low, count, m, sharp)
    low = low.double()
    shift = torch.log(count / m - 1)
    guess = torch.where(guess.isfinite(), guess, low / 2 + top / 2)
    guess = torch.minimum(torch.maximum(guess, low + shift / sharp), top + shift / sharp)
    centre = guess.to(y.dtype).double().nan_to_num(0.0)  # as y can hold it: y - centre is then exact near it
    rest = torch.zeros_like(centre)  # the threshold is K centre + rest + d
    below, above = (
        _widened((end - centre) * sharp + shift, sign, shift).clamp(-VAST, VAST) for end, sign in ((low, -1), (top, 1))
    )
    d = torch.minimum(torch.maximum((guess - centre) * sharp, below), above).nan_to_num(0.0)
    eps = torch.finfo(y.dtype).eps
    near = 0.5 * math.sqrt(eps)  # Newton squares the error: after such a step there is none
    noise = eps * (m.sqrt() + m.clamp(max=PART) / 4)  # of a sum of rounded weights
    done, fresh = idle.clone(), True
    for number in range(ROUNDS):
        far = d.abs() > REACH
        if bool(far.any()):
            by, whole = torch.where(far, d, 0.0), rest + d
            moved = torch.where(far, (centre + whole / sharp).to(y.dtype).double(), centre)
            went = (moved - centre) * sharp
            # What is left is at most what the rounding of the centre costs; more comes from cancellation.
            ulp = moved.abs() * (eps * sharp)
            rest = torch.where(far, torch.minimum(torch.maximum(whole - went, -ulp), ulp), rest)
            below, above = (
                torch.where(far, _widened(x - by, sign, x, whole, went), x).clamp(-VAST, VAST)
                for x, sign in ((below, -1), (above, 1))
            )
            centre, d, fresh = moved, d - by, True
        if fresh:
            _exponentials(y, centre, rest, sharp, rows, e)
            fresh = False
        factor = d.exp().to(y.dtype)[:, None]
        if bool(done.all()):
            break
        sums = []
        for part, t in zip(e.split(rows), factor.split(rows), strict=True):
            q = torch.add(part, t, out=scratch[: len(part)])
            torch.div(part, q, out=q)
            sums.append((_total(q), q.addcmul_(q, q, value=-1).sum(1).double()))
        total, slope = (torch.cat(v) for v in zip(*sums, strict=True))
        high = total > m
        below = torch.where(high, torch.maximum(below, d), below)
        above = torch.where(high, above, torch.minimum(above, d))
        step = (torch.log(total / (count - total)) + shift) * (total * (count - total) / (count * slope))
        sound = step.isfinite() & (d + step >= below - near) & (d + step <= above + near)
        narrow = (above - below <= 2 * near) & (above.abs() <= REACH)  # beyond it, E is too coarse to tell
        if number > 12 and number % 3 == 0:  # whatever Newton does, the bracket shrinks
            sound &= narrow
        following = torch.where(sound, d + step, below / 2 + above / 2)
        exact = (total - m).abs() <= noise
        d = torch.where(done | exact, d, following)
        done |= exact | (sound & (step.abs() < near)) | narrow
    for part, t in zip(e.split(rows), factor.split(rows), strict=True):
        q = torch.div(t, part, out=scratch[: len(part)])
        torch.reciprocal(q.add_(1), out=part)  # each step is monotone when rounded, E / (E + T) is not
    return e.masked_fill_(idle[:, None], 0.0) if bool(idle.any()) else e


@torch.library.custom_op(
    "kexue::threshold_weights", mutates_args=(), schema="(Tensor y, Tensor m, Tensor count, float sharp) -> Tensor"
)
def _threshold_op(y: Tensor, m: Tensor, count: Tensor, sharp: float) -> Tensor:
    return threshold_weights(y, m, count, sharp)


@_threshold_op.register_fake
def _(y, m, count, sharp):  # type: ignore[no-untyped-def]
    return torch.empty_like(y, memory_format=torch.contiguous_format)


class _Threshold(torch.autograd.Function):
    """Saves its output alone."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, m: Tensor, count: Tensor, sharp: float) -> Tensor:
        run = _threshold_op if torch.compiler.is_compiling() else threshold_weights
        q = run(y, m, count, sharp)
        ctx.save_for_backward(q)
        ctx.sharp = sharp
        return q

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (q,) = ctx.saved_tensors
        w = torch.addcmul(q, q, q, value=-1)
        mass = w.sum(1, keepdim=True)
        weighted = grad * w
        mean = weighted.sum(1, keepdim=True) / torch.where(mass > 0, mass, 1.0)
        if torch.is_grad_enabled():  # to be differentiated again
            return (weighted - w * mean) * ctx.sharp, None, None, None
        return weighted.addcmul_(w, mean, value=-1).mul_(ctx.sharp), None, None, None


def _recursive(x: Tensor, k: int, sharp: float) -> Tensor:
    """The article's recursion along the last axis."""
    absent = x == -math.inf
    low = x.masked_fill(absent, math.inf).amin(-1, keepdim=True)
    gap = ((x - low) * sharp).masked_fill(absent, 0.0)
    p = torch.zeros_like(x)
    for _ in range(k):
        p = p + torch.softmax(((1 - p) * gap).masked_fill(absent, -math.inf), -1)
    return p


def _check_k(k: Any, shape: tuple[int, ...], n: int, method: str, validate: bool) -> None:
    if isinstance(k, Tensor) and k.dim() > 0:
        if k.is_floating_point() or k.is_complex() or k.dtype == torch.bool:
            raise TypeError(f"k must be integers; got dtype {k.dtype}")
        if method == "recursive":
            raise ValueError('method="recursive" takes one k for all rows; got a tensor of them')
        if tuple(k.shape) != shape:
            raise ValueError(f"k must have one entry for each row, shape {shape}; got {tuple(k.shape)}")
        if validate and not torch.compiler.is_compiling() and k.numel():
            low, high = (int(v) for v in torch.aminmax(k))
            if low < 0 or high > n:
                raise ValueError(f"k must lie in [0, {n}]; got values from {low} to {high}")
        return
    check_int("k", k, 0)
    if k > n:
        raise ValueError(f"k must lie in [0, {n}], the number of entries; got {k}")


def soft_topk(
    x: Tensor,
    k: int | Tensor,
    dim: int = -1,
    K: float = 1.0,
    method: str = "sigmoid",
    *,
    validate: bool = True,
) -> Tensor:
    """Weights that sum to k and are near 1 for the k largest entries, near 0 for the others.

    ``method="recursive"`` is the recursion that the article started from, kept for comparison. **It is unsound**: it
    sums to k, but a larger entry may get the smaller weight and weights leave [0, 1]. For x = [2, 1, 4, 5, 3], k = 2,
    K = 4 it gives .995 to the entry 4 and .982 to the entry 5; ``kexue reproduce smooth-approximations`` counts how
    often. It takes memory for k copies of x in training, the default for one.

    Args:
        x: Any shape, n entries along ``dim``; entries of -inf do not take part and get weight 0.
        k: How many, an integer in [0, n]; or a tensor of integers, one for each row (the shape of x without ``dim``).
            k = 0 gives zeros, k = n ones, both without gradient.
        dim: Axis of the choice.
        K: Sharpness, from 1e-30 to 1e30.
        method: "sigmoid": sigmoid(K x - t) with the t that makes the sum k, which is monotone; or "recursive".
        validate: Check that every row is free of NaN and +inf and has k entries that take part (two reductions; never
            done under torch.compile).

    Returns:
        The shape of x, in float32 (float64 for float64).

    Raises:
        TypeError: Not a floating tensor, k not integers, K not a number.
        ValueError: k outside [0, n] or above the number of entries that take part, K not positive, unknown method.

    Reference:
        https://spaces.ac.cn/archives/6620, https://spaces.ac.cn/archives/10373

    Example:
        >>> x = torch.tensor([2.0, 1.0, 4.0, 5.0, 3.0])
        >>> soft_topk(x, 2, K=4.0)
        tensor([2.4...e-03, 4.5...e-05, 8.8...e-01, 9.9...e-01, 1.1...e-01])
    """
    dim, sharp = check_axis(x, dim), check_sharpness(K)
    check_choice("method", method, METHODS)
    shape, n = tuple(x.shape[:dim] + x.shape[dim + 1 :]), x.shape[dim]
    _check_k(k, shape, n, method, validate)
    rows = x.to(compute_dtype(x)).movedim(dim, -1).reshape(-1, n)
    tracing = torch.compiler.is_compiling()
    masked = tracing or bool((rows.detach().amin(1) == -math.inf).any())
    absent = rows == -math.inf if masked else None
    count = rows.new_full((rows.shape[0],), n, dtype=torch.float64)
    if absent is not None:
        count = count - absent.sum(1)
    if isinstance(k, Tensor) and k.dim() > 0:
        wanted = k.to(x.device).reshape(-1).double()
    else:
        wanted = torch.full_like(count, int(k))
    if validate and not tracing and rows.shape[0]:
        top = rows.detach().amax(1)
        if bool((top.isnan() | (top == math.inf)).any()):
            raise ValueError("x must not hold NaN or +inf; got some")
        short = wanted > count
        if bool(short.any()):
            row = int(short.int().argmax())
            found = f"row {row} has {int(count[row])}, k is {int(wanted[row])}"
            raise ValueError(f"k must not exceed the entries that take part; {found}")
    if method == "recursive" and int(k) > 0:
        p = _recursive(rows, int(k), sharp)
    else:
        p = _sigmoid(rows, torch.minimum(wanted, count), count, absent, sharp)
    return p.reshape(*shape, n).movedim(-1, dim)


def _sigmoid(x: Tensor, k: Tensor, count: Tensor, absent: Tensor | None, sharp: float) -> Tensor:
    """(N, n) weights; rows with k above half of their entries are turned over."""
    turned = 2 * k > count
    if absent is None and not torch.compiler.is_compiling():  # torch.where would cost several passes
        if not bool(turned.any()):
            return _Threshold.apply(x, k, count, sharp)
        if bool(turned.all()):
            return 1 - _Threshold.apply(-x, count - k, count, sharp)
    turn = turned[:, None]
    y = torch.where(turn, -x, x)
    if absent is not None:
        y = y.masked_fill(absent, -math.inf)
    q = _Threshold.apply(y, torch.where(turned, count - k, k), count, sharp)
    p = torch.where(turn, 1 - q, q)
    return p if absent is None else p.masked_fill(absent, 0.0)
