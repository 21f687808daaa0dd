"""Filters of the next token's distribution (解码时的截断): temperature, top-k, top-p, min-p, penalties of repetition.

Source: 科学空间 7912 (跟风玩玩目前最大的中文GPT2模型); top-p: Holtzman et al., arXiv 1904.09751; min-p: Nguyen et al.,
arXiv 2407.01082; penalty of repetition: Keskar et al., arXiv 1909.05858; no repeated n-gram: Paulus et al., 1705.04304.

    logits / temperature                    before the truncations; order does not matter for the penalty
    logit l of a token that occurred        l / penalty if l > 0, else l * penalty
    token that would repeat an n-gram       excluded
    top-k     the k largest; ties at the k-th value by index, so that exactly k are left
    top-p     the fewest tokens, largest first, whose probabilities sum to at least p; the one that crosses p is kept
    min-p     tokens of probability at least min_p times the largest one
    softmax   once, in float32 (float64 for float64)

Each filter sees what the ones before it have left over, as in transformers. The two about repetition stand before the
truncations: behind them, a token that is forbidden could be the only one left. Transformers keeps all ties of top-k,
so that "top 1" may be several. Probabilities that reach p but for rounding do reach it.

Excluded tokens have the logit -inf. A row with nothing left, or with NaN or +inf, is an error, not a random token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kexue._checks import check_int, check_real
from kexue._tensors import check_float, compute_dtype

__all__ = [
    "ban_repeated_ngrams",
    "check_rows",
    "filter_logits",
    "min_p_filter",
    "repetition_filter",
    "sample_tokens",
    "token_probabilities",
    "top_k_filter",
    "top_p_filter",
]


def filter_logits(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seen: Tensor | None = None,
    no_repeat_ngram: int = 0,
    sequences: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Apply all filters, in their order.

    Args:
        logits: (..., V), floating.
        temperature: Above 0, or 0: only the largest one is left (the first of equal ones).
        top_k: 0: all.
        top_p: In (0, 1]; 1: all.
        min_p: In [0, 1]; 0: all.
        repetition_penalty: Above 0; 1: none. Needs ``seen``.
        seen: (..., V) bool, the tokens that occurred.
        no_repeat_ngram: Length of the n-grams that must not occur twice; 0: none. Needs ``sequences``.
        sequences: For each row of (N, V) logits the ids so far.

    Returns:
        Logits of the same shape, -inf where excluded; float32, or float64 for float64.

    Raises:
        TypeError: ``logits`` is no floating tensor, or another argument is of the wrong kind.
        ValueError: A value out of range, or a row that has nothing left, NaN or +inf.

    Example:
        >>> filter_logits(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), top_k=2)
        tensor([[-inf, 2., 2., -inf]])
    """
    check_float("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must be (..., V) with V at least 1; got shape {tuple(logits.shape)}")
    check_options(logits.shape[-1], temperature, top_k, top_p, min_p, repetition_penalty, no_repeat_ngram)
    logits = logits.to(compute_dtype(logits))
    check_rows(logits)
    if repetition_penalty != 1:
        if seen is None:
            raise ValueError("repetition_penalty needs seen, the tokens that occurred; got None")
        logits = repetition_filter(logits, seen, repetition_penalty)
        check_rows(logits)  # the quotient or the product may overflow
    if no_repeat_ngram:
        if sequences is None:
            raise ValueError("no_repeat_ngram needs sequences, the ids so far; got None")
        logits = ban_repeated_ngrams(logits, sequences, no_repeat_ngram)
        check_rows(logits)
    if temperature == 0:
        return top_k_filter(logits, 1)
    if temperature < 1e-3:  # the quotient may overflow; a constant in all logits changes nothing
        logits = logits - logits.amax(-1, keepdim=True)
        temperature = max(temperature, torch.finfo(logits.dtype).tiny)  # below it, it may be 0 for this dtype
    if temperature != 1:
        logits = logits / temperature
    if top_k:
        logits = top_k_filter(logits, top_k)
    if top_p < 1:
        logits = top_p_filter(logits, top_p)
    if min_p:
        logits = min_p_filter(logits, min_p)
    return logits


def token_probabilities(logits: Tensor, **options: Any) -> Tensor:
    """The distribution the next token is drawn from.

    Args:
        logits: (..., V), floating.
        **options: As of :func:`filter_logits`.

    Returns:
        (..., V) probabilities, 0 where excluded; float32, or float64 for float64.

    Raises:
        TypeError: As of :func:`filter_logits`.
        ValueError: As of :func:`filter_logits`.

    Example:
        >>> token_probabilities(torch.tensor([0.0, 1.0, 1.0, 1.0]), top_k=2)
        tensor([0.0000, 0.5000, 0.5000, 0.0000])
    """
    return filter_logits(logits, **options).softmax(-1)


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest; of equal ones at the boundary those of the lowest indices.

    Args:
        logits: (..., V).
        k: At least 1; V or more: all.

    Example:
        >>> top_k_filter(torch.tensor([1.0, 3.0, 1.0, 1.0]), 2)
        tensor([1., 3., -inf, -inf])
    """
    check_int("k", k, 1)
    if k >= logits.shape[-1]:
        return logits
    largest = logits.detach().topk(k, dim=-1).values
    return _keep_first(logits, largest[..., -1:], k)


def top_p_filter(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest tokens, largest first, whose probabilities sum to at least p.

    Args:
        logits: (..., V).
        p: In (0, 1]; 1: all. The largest token is always kept.

    Example:
        >>> top_p_filter(torch.tensor([0.2, 0.5, 0.3]).log(), 0.6).softmax(-1)
        tensor([0.0000, 0.6250, 0.3750])
    """
    check_real("p", p, above=0.0)
    if p > 1:
        raise ValueError(f"p must be at most 1; got {p!r}")
    if p == 1:
        return logits
    probabilities = logits.detach().to(compute_dtype(logits)).softmax(-1)
    order = logits.detach().sort(dim=-1, descending=True).values
    mass = probabilities.sort(dim=-1, descending=True).values.to(torch.float64).cumsum(-1)
    reached = p - 8 * torch.finfo(probabilities.dtype).eps  # sums that are p but for rounding
    count = (mass < reached).sum(-1, keepdim=True) + 1
    count = count.clamp(max=logits.shape[-1])
    return _keep_first(logits, order.gather(-1, count - 1), count)


def min_p_filter(logits: Tensor, p: float) -> Tensor:
    """Keep tokens whose probability is at least p times the largest one.

    Args:
        logits: (..., V).
        p: In [0, 1].

    Example:
        >>> min_p_filter(torch.tensor([0.5, 0.3, 0.04]).log(), 0.1)
        tensor([-0.6931, -1.2040, -inf])
    """
    check_real("p", p, minimum=0.0)
    if p > 1:
        raise ValueError(f"p must be at most 1; got {p!r}")
    x = logits.detach().to(compute_dtype(logits))
    ratio = (x - x.amax(-1, keepdim=True)).exp()
    return logits.masked_fill(ratio < p, -torch.inf)


def repetition_filter(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of tokens that occurred by the penalty, multiply negative ones.

    Args:
        logits: (..., V).
        seen: (..., V) bool.
        penalty: Above 0; above 1 makes repetition rarer.

    Example:
        >>> seen = torch.tensor([True, True, False])
        >>> repetition_filter(torch.tensor([2.0, -1.0, 2.0]), seen, 2.0)
        tensor([ 1., -2.,  2.])
    """
    check_real("penalty", penalty, above=0.0)
    if seen.dtype != torch.bool:
        raise TypeError(f"seen must be a bool tensor; got {seen.dtype}")
    if seen.shape != logits.shape:
        raise ValueError(f"seen must have the shape of logits, {tuple(logits.shape)}; got {tuple(seen.shape)}")
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def ban_repeated_ngrams(logits: Tensor, sequences: Sequence[Sequence[int]], n: int) -> Tensor:
    """Exclude the tokens that would complete an n-gram which the row's sequence has already.

    Args:
        logits: (N, V).
        sequences: N sequences of ids.
        n: At least 1.

    Example:
        >>> ban_repeated_ngrams(torch.zeros(1, 3), [[0, 1, 2, 0]], 2)  # 0 1 is there
        tensor([[0., -inf, 0.]])
    """
    check_int("n", n, 1)
    if logits.dim() != 2 or len(sequences) != len(logits):
        raise ValueError(f"logits must be (N, V), N = {len(sequences)} sequences; got {tuple(logits.shape)}")
    rows, columns = [], []
    for row, sequence in enumerate(sequences):
        ids = list(sequence)
        last = ids[len(ids) - n + 1 :] if n > 1 else []
        for i in range(len(ids) - n + 1):
            if ids[i : i + n - 1] == last:
                rows.append(row)
                columns.append(ids[i + n - 1])
    if not rows:
        return logits
    banned = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    banned[torch.tensor(rows, device=logits.device), torch.tensor(columns, device=logits.device)] = True
    return logits.masked_fill(banned, -torch.inf)


def sample_tokens(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a token for each row by inversion: the first at which the cumulative sum exceeds the uniform number.

    Args:
        probabilities: (N, V), rows of any positive sum.
        uniforms: (N,) float64 in [0, 1).

    Returns:
        (N,) ids; a token of probability 0 is never drawn.

    Example:
        >>> p = torch.tensor([[0.5, 0.0, 0.5]]).expand(2, 3)
        >>> sample_tokens(p, torch.tensor([0.4, 0.5], dtype=torch.float64))
        tensor([0, 2])
    """
    mass = probabilities.to(torch.float64).cumsum(-1)
    total = mass[:, -1:]
    # Below the total also where the product is rounded up to it
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass, target, right=True)[:, 0]


def check_rows(logits: Tensor) -> None:
    """Raise ValueError if a row of (..., V) has nothing left, NaN or +inf; not asked while compiling."""
    if torch.compiler.is_compiling() or not logits.numel():
        return
    top = logits.detach().amax(-1)  # NaN wins
    fine = top.isfinite()
    if bool(fine.all()):
        return
    row = int((~fine).flatten().nonzero()[0])
    value = top.flatten()[row].item()
    what = "no token left (all are -inf)" if value == float("-inf") else f"a logit of {value}"
    raise ValueError(f"each row of logits must have a finite maximum; row {row} has {what}")


def check_options(
    vocabulary: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    no_repeat_ngram: int,
) -> None:
    """Raise TypeError or ValueError for options out of range."""
    check_real("temperature", temperature, minimum=0.0)
    check_int("top_k", top_k, 0)
    check_real("top_p", top_p, above=0.0)
    check_real("min_p", min_p, minimum=0.0)
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value > 1:
            raise ValueError(f"{name} must be at most 1; got {value!r}")
    check_real("repetition_penalty", repetition_penalty, above=0.0)
    check_int("no_repeat_ngram", no_repeat_ngram, 0)


def _keep_first(logits: Tensor, boundary: Tensor, count: Tensor | int) -> Tensor:
    """The ``count`` largest of each row, given the smallest of them; of those equal to it the first ones."""
    above, equal = logits > boundary, logits == boundary
    room = count - above.sum(-1, keepdim=True)
    return logits.masked_fill(~(above | (equal & (equal.cumsum(-1) <= room))), -torch.inf)
