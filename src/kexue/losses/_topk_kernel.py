"""The k largest scores of each row, ties broken by lowest index, for ``sparse_softmax.py`` and ``linear_sparse.py``.

``torch.topk`` leaves open which of several equal scores it takes, and takes differ between devices. Here a score comes
before another if it is larger, or equal and of lower index; NaN comes first, so that it shows in the loss.

On a CPU one pass reads the scores with a heap of k beside it. Blocks without a score above the worst of the heap, which
after a short while is nearly all of them, cost one vectorised comparison: the pass is as fast as memory. Rows too short
for that go without a heap, whose branches nobody can predict; both find the same k. Elsewhere
``torch.topk`` is used, and rows that have a tie at the k-th score are put right.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kexue._tensors import compute_dtype

__all__ = ["linear_top_indices", "nucleus", "top_indices"]

_HEAP_DEVICES = ("cpu",)
_HEAP = 1000  # the largest heap that is faster than torch.topk
_FEW = 256  # the scores that a nucleus is looked for in before all of them are sorted
_PIECE = 1 << 20  # scores that are widened to float32 at a time
_TABLE_ROWS = 768  # of the vocabulary in one product on a CPU; in one product MKL takes longer
_HIDDEN_ROWS = 1024


def _scan(scores: Tensor, offset: int, keys: Tensor, index: Tensor) -> None:
    """Put scores (R, n) of the columns from ``offset`` on into the heaps; the first time n is at least k."""
    from kexue.losses._topk_scan import scan  # numba, which takes a while to import

    scan(scores.numpy(), offset, keys.numpy(), index.numpy())


def top_indices(scores: Tensor, k: int) -> Tensor:
    """Indices (R, k) of the k largest of each row of scores (R, n), k <= n, in no particular order."""
    scores = scores.detach()
    rows, n = scores.shape
    if k >= n or rows == 0:
        return torch.arange(k, device=scores.device).expand(rows, k).contiguous()
    if scores.device.type not in _HEAP_DEVICES or k > _HEAP:
        return _chosen(scores, k)
    dtype = compute_dtype(scores)
    keys, index = scores.new_empty((rows, k), dtype=dtype), torch.empty((rows, k), dtype=torch.int64)
    step = rows if scores.dtype == dtype else max(_PIECE // n, 1)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        _scan(scores[part].to(dtype).contiguous(), 0, keys[part], index[part])
    return index


def _chosen(scores: Tensor, k: int) -> Tensor:
    """:func:`top_indices` by torch.topk, which is put right where it had to choose; k < n."""
    values, index = scores.topk(k + 1, dim=1)
    tied = values[:, k - 1] == values[:, k]  # false for NaN: such a row is NaN anyway
    index = index[:, :k]
    if bool(tied.any()):
        index = index.clone()
        row, edge = scores[tied], values[tied][:, -1:]
        above, equal = ~(row <= edge), row == edge
        room = k - above.sum(1, keepdim=True)
        index[tied] = (above | (equal & (equal.cumsum(1) <= room))).nonzero()[:, 1].view(-1, k)
    return index


def _in_order(scores: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The scores at ``index`` (R, k), the largest first and equal ones by index, and the indices."""
    index = index.sort(dim=1).values
    values, order = scores.gather(1, index).sort(dim=1, descending=True, stable=True)
    return values, index.gather(1, order)


def linear_top_indices(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, chunk_bytes: int | None, product: torch.dtype
) -> Tensor:
    """:func:`top_indices` of ``hidden @ weight.T + bias``, of which no more than ``chunk_bytes`` exist at a time.

    Args:
        hidden: (R, D).
        weight: (V, D).
        bias: (V,), or None.
        k: At most V.
        chunk_bytes: Bound on a block of scores; but a block has at least one row and k columns. None is 4 MiB on a CPU,
            256 MiB elsewhere.
        product: The dtype of the products.
    """
    hidden, weight = hidden.detach(), weight.detach()
    count, vocabulary = hidden.shape[0], weight.shape[0]
    index = torch.empty((count, k), dtype=torch.int64, device=hidden.device)
    heaps = hidden.device.type in _HEAP_DEVICES
    if chunk_bytes is None:
        chunk_bytes = 1 << 22 if heaps else 1 << 28
    numbers = max(chunk_bytes // 4, 1)
    width = max(k, min(_TABLE_ROWS, numbers))
    rows = max(1, min(numbers // width, _HIDDEN_ROWS, count))
    if not heaps:
        width = min(max(width, numbers // rows), vocabulary)
    dtype = compute_dtype(hidden.new_empty(0, dtype=product))
    buffer = hidden.new_empty(rows * min(width, vocabulary), dtype=product)
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        some = hidden[part].to(product)
        found = index[part]
        keys = some.new_empty(found.shape, dtype=dtype)
        for first, scores in _blocks(some, weight, bias, width, buffer):
            if heaps:
                _scan(scores.to(dtype), first, keys, found)
                continue
            scores = scores.to(dtype)
            values, at = _in_order(scores, top_indices(scores, min(k, scores.shape[1])))
            at = at + first
            if first:  # what was found before has the lower indices, so that a stable sort keeps the order
                both, order = torch.cat([keys, values], 1).sort(dim=1, descending=True, stable=True)
                values, at = both[:, :k], torch.cat([found, at], 1).gather(1, order[:, :k])
            keys.copy_(values)
            found.copy_(at)
    return index


def _blocks(
    rows: Tensor, weight: Tensor, bias: Tensor | None, width: int, buffer: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """Yield the first column and the scores of each block of columns; they are overwritten by the next."""
    for first in range(0, weight.shape[0], width):
        table = weight[first : first + width].to(rows.dtype)
        out = buffer[: len(rows) * len(table)].view(len(rows), len(table))
        if bias is None:
            torch.mm(rows, table.T, out=out)
        else:
            torch.addmm(bias.detach()[first : first + width].to(rows.dtype), rows, table.T, out=out)
        yield first, out


def nucleus(scores: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """The smallest set of the largest probabilities of each row of scores (R, n) that sum to p.

    Sums of probabilities are taken in float64 where the device has it.

    Returns:
        Indices (R, m), the largest probability first, and which of them belong to the set (R, m). m is the size of the
        largest set, but n while torch.compile traces.
    """
    scores = scores.detach().to(compute_dtype(scores))
    traced = torch.compiler.is_compiling()
    wide = torch.float32 if scores.device.type == "mps" else torch.float64
    top = scores.amax(1, keepdim=True)
    mass = p * (scores - top).exp_().sum(1, keepdim=True, dtype=wide)
    found = None
    if scores.shape[1] > 4 * _FEW and not traced:
        values, index = _in_order(scores, top_indices(scores, _FEW))
        kept, whole = _first_of(values, top, mass)
        found = (index, kept) if bool(whole.all()) else None
    if found is None:
        values, index = scores.sort(dim=1, descending=True, stable=True)
        found = index, _first_of(values, top, mass)[0]
    if traced or scores.shape[0] == 0:
        return found
    most = int(found[1].sum(1).max())
    return found[0][:, :most], found[1][:, :most]


def _first_of(values: Tensor, top: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Mask of the first of the ordered scores (R, m) that reach the mass, and which rows reach it (R,)."""
    chance = (values - top).exp_().to(mass.dtype)
    sums = chance.cumsum(1)
    kept = (sums - chance < mass) & (chance > 0)
    kept[:, :1] = True  # also where the row is NaN
    return kept, ~(sums[:, -1] < mass.squeeze(1))


@torch.library.custom_op("kexue::top_indices", mutates_args=(), schema="(Tensor scores, SymInt k) -> Tensor")
def _top_op(scores: Tensor, k: int) -> Tensor:
    return top_indices(scores, k)


@_top_op.register_fake
def _(scores, k):  # type: ignore[no-untyped-def]
    return scores.new_empty((scores.shape[0], k), dtype=torch.int64)


@torch.library.custom_op(
    "kexue::linear_top_indices",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, SymInt k, SymInt? chunk_bytes, ScalarType product) -> Tensor",
)
def _linear_op(*args: Any) -> Tensor:
    return linear_top_indices(*args)


@_linear_op.register_fake
def _(hidden, weight, bias, k, chunk_bytes, product):  # type: ignore[no-untyped-def]
    return hidden.new_empty((hidden.shape[0], k), dtype=torch.int64)


def run_top(scores: Tensor, k: int) -> Tensor:
    """:func:`top_indices`; one opaque node while torch.compile traces."""
    return _top_op(scores.detach(), k) if torch.compiler.is_compiling() else top_indices(scores, k)


def run_linear_top(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, chunk_bytes: int | None, product: torch.dtype
) -> Tensor:
    """:func:`linear_top_indices` in the same way, its products in ``product`` also under autocast."""
    if torch.compiler.is_compiling():
        shift = None if bias is None else bias.detach()
        return _linear_op(hidden.detach(), weight.detach(), shift, k, chunk_bytes, product)
    with torch.autocast(hidden.device.type, enabled=False):
        return linear_top_indices(hidden, weight, bias, k, chunk_bytes, product)
