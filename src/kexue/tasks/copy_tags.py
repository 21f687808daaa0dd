"""Copy labels B, I, O of a summary and its source, and their loss (BIO Copy 的标签与损失).

Source: 科学空间 8046 (SPACES：“抽取-生成”式长文本摘要). Tokens of a longest common subsequence (LCS) count as copied.
Along its aligned pairs (i, j), of source and target, in order:

    I (2)  the pair before is (i - 1, j - 1)
    B (1)  otherwise
    O (0)  a token without a pair

    loss = weight (mean of CE over target positions + source_weight * mean of CE over source positions)

There are many LCSs. ``ties="author"`` takes that of the published code: from the end, equal tokens are paired at once;
otherwise the source token is dropped, unless dropping the target token keeps a longer LCS. It does not favour runs:
for the source a b c b and the target a b it says B B. ``ties="contiguous"`` takes, of all LCSs, one with the most I
(B I in that case), and of those the one whose pairs come first, compared in order, source position before target
position. With L(i, j) = (length, number of I) of the best alignment of what is left from i and j on, and R(i, j) the
same if (i - 1, j - 1) is a pair:

    L(i, j) = max(L(i + 1, j), L(i, j + 1), (1, 0) + R(i + 1, j + 1) if the tokens are equal)
    R(i, j) = max(L(i, j), (1, 1) + R(i + 1, j + 1) if the tokens are equal)

What differs from the published code, and why: special tokens are left out of the alignment. There, the leading [CLS] of
both texts are paired, so that a first target token equal to the first source token is labelled I, while decoding
starts without a run and forbids I. And the source's labels are a term of their own, so that their weight can be chosen.

Shapes: S source tokens, T target tokens, B batch.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from kexue._checks import check_choice, check_int, check_real
from kexue._tensors import check_float, compute_dtype
from kexue.words._numba import compiled

__all__ = ["copy_labels", "copy_loss"]

TIES = ("contiguous", "author")
_MATCH, _TARGET, _SOURCE, _RUN = 0, 1, 2, 4  # what to do next at (i, j): pair, drop a token; pair if in a run


def copy_labels(
    source: Sequence[Hashable] | NDArray[Any] | Tensor,
    target: Sequence[Hashable] | NDArray[Any] | Tensor,
    ties: str = "contiguous",
    special_ids: Iterable[Hashable] = (),
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Label the tokens that a summary takes from its source: O = 0, B = 1, I = 2.

    Time S T, memory S T bytes.

    Args:
        source: S tokens: ids, or anything that can be compared and hashed (words; a str is its characters).
        target: T tokens.
        ties: "contiguous": the LCS with the most I; "author": that of the published code.
        special_ids: Tokens that are never copied, such as [CLS] and [SEP].

    Returns:
        Labels (S,) of the source and (T,) of the target, int64.

    Raises:
        TypeError: Tokens that cannot be hashed; arrays that are not of integers.
        ValueError: Another ``ties``; arrays that are not one-dimensional.

    Reference:
        https://spaces.ac.cn/archives/8046

    Example:
        >>> source, target = "我 真的 非常 热爱 我 的 祖国".split(), "我 爱 我 的 祖国".split()
        >>> for labels in copy_labels(source, target):
        ...     print(" ".join("OBI"[label] for label in labels))
        B O O O B I I
        B O B I I
        >>> [copy_labels("abcb", "ab", ties)[1].tolist() for ties in ("author", "contiguous")]
        [[1, 1], [1, 2]]
    """
    check_choice("ties", ties, TIES)
    tokens = _plain("source", source), _plain("target", target)
    if not isinstance(special_ids, Iterable):
        raise TypeError(f"special_ids must be several tokens, such as a tuple; got {special_ids!r}")
    number: dict[Hashable, int] = {}
    try:
        x, y = (np.array([number.setdefault(t, len(number)) for t in side], np.int64) for side in tokens)
        skipped = special_ids.tolist() if isinstance(special_ids, Tensor | np.ndarray) else special_ids
        special = [number[token] for token in set(skipped) if token in number]
    except TypeError as error:
        raise TypeError(f"tokens must be hashable; got one that is not: {error}") from None
    if special:
        x[np.isin(x, special)], y[np.isin(y, special)] = -1, -2
    labels = np.zeros(len(x), np.int64), np.zeros(len(y), np.int64)
    if len(x) and len(y):
        (_author if ties == "author" else _contiguous)(x, y, *labels)
    return labels


def _plain(name: str, tokens: Any) -> list[Hashable]:
    if isinstance(tokens, Tensor):
        tokens = tokens.detach().cpu().numpy()
    if isinstance(tokens, np.ndarray):
        if tokens.ndim != 1:
            raise ValueError(f"{name} must be one-dimensional; got shape {tokens.shape}")
        if len(tokens) and tokens.dtype.kind not in "iuUO":
            raise TypeError(f"{name} must hold integers or words; got dtype {tokens.dtype}")
        return list(tokens.tolist())
    try:
        if isinstance(tokens, set | frozenset):
            raise TypeError
        return list(tokens)
    except TypeError:
        raise TypeError(f"{name} must be a sequence of tokens; got {type(tokens).__name__}") from None


@compiled(nogil=True)
def _author(x: Any, y: Any, source: Any, target: Any) -> None:
    s, t = len(x), len(y)
    steps = np.empty((s + 1, t + 1), np.uint8)
    row = np.zeros(t + 1, np.int32)  # LCS lengths of x[:i] and y[:j]
    for i in range(1, s + 1):
        diagonal = np.int32(0)
        for j in range(1, t + 1):
            up = row[j]
            if x[i - 1] == y[j - 1]:
                row[j] = diagonal + 1
                steps[i, j] = _MATCH
            elif up >= row[j - 1]:
                steps[i, j] = _SOURCE
            else:
                row[j] = row[j - 1]
                steps[i, j] = _TARGET
            diagonal = up
    i, j = s, t
    after = False  # the pair after this one, in the order of the text, is (i + 1, j + 1)
    while i > 0 and j > 0:
        step = steps[i, j]
        if step == _MATCH:
            if after:
                source[i], target[j] = 2, 2
            source[i - 1], target[j - 1] = 1, 1
            i, j = i - 1, j - 1
            after = True
        else:
            after = False
            if step == _SOURCE:
                i -= 1
            else:
                j -= 1


@compiled(nogil=True)
def _contiguous(x: Any, y: Any, source: Any, target: Any) -> None:
    s, t = len(x), len(y)
    one = np.int64(min(s, t) + 1)  # a value is length * one + number of I
    steps = np.empty((s, t), np.uint8)
    free = np.zeros(t + 1, np.int64)  # L of row i + 1, overwritten by row i
    run = np.zeros(t + 1, np.int64)  # R of the same
    for i in range(s - 1, -1, -1):
        beyond = np.int64(0)  # R(i + 1, j + 1)
        here = False  # L(i, j + 1) is reached by a pair in this row
        for j in range(t - 1, -1, -1):
            next_run = run[j]
            down, right = free[j], free[j + 1]
            step, best = _SOURCE, down
            if right > best or (right == best and here):
                step, best = _TARGET, right
            paired = beyond + one
            equal = x[i] == y[j]
            if equal and paired >= best:
                step, best = _MATCH, paired
            here = step == _MATCH or (step == _TARGET and here)
            free[j] = run[j] = best
            if equal and paired + 1 >= best:
                run[j] = paired + 1
                step |= _RUN
            steps[i, j] = step
            beyond = next_run
    i = j = 0
    inside = False
    while i < s and j < t:
        step = steps[i, j]
        if inside and step & _RUN:
            source[i], target[j] = 2, 2
            i, j = i + 1, j + 1
        elif step & 3 == _MATCH:
            source[i], target[j] = 1, 1
            i, j = i + 1, j + 1
            inside = True
        else:
            inside = False
            if step & 3 == _TARGET:
                j += 1
            else:
                i += 1


def copy_loss(
    copy_logits: Tensor,
    labels: Tensor,
    is_source: Tensor,
    *,
    weight: float = 2.0,
    source_weight: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """The loss of the copy tags, source and target each averaged over its own positions.

    In the layout [CLS] source [SEP] [CLS] target [SEP] a source position predicts its own label, and target position
    p, from the second [CLS] on, the label of token p + 1. ``labels`` holds at each position what it predicts.

    Args:
        copy_logits: (..., 3) logits of O, B, I.
        labels: (...) integers 0, 1, 2, or ``ignore_index`` (padding).
        is_source: (...) bool, True for positions of the source.
        weight: Factor of the whole.
        source_weight: Factor of the source's part; 0: the target alone.
        ignore_index: Positions with this label are left out. A part without positions is 0.

    Returns:
        A scalar in float32 (float64 for float64).

    Raises:
        TypeError: Wrong kind of tensor.
        ValueError: Shapes that do not fit, labels out of range.

    Reference:
        https://spaces.ac.cn/archives/8046

    Example:
        >>> logits = torch.zeros(1, 4, 3)
        >>> labels = torch.tensor([[0, 1, 1, 2]])
        >>> is_source = torch.tensor([[True, True, False, False]])
        >>> copy_loss(logits, labels, is_source)  # 2 (log 3 + log 3)
        tensor(4.3944)
    """
    check_float("copy_logits", copy_logits)
    check_int("ignore_index", ignore_index, -(2**63))
    check_real("weight", weight, minimum=0.0)
    check_real("source_weight", source_weight, minimum=0.0)
    batch = copy_logits.shape[:-1]
    if copy_logits.dim() < 1 or copy_logits.shape[-1] != 3:
        raise ValueError(f"copy_logits must be (..., 3), O B I; got shape {tuple(copy_logits.shape)}")
    for name, value in (("labels", labels), ("is_source", is_source)):
        if not isinstance(value, Tensor) or value.shape != batch:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} must be a tensor of shape {tuple(batch)}; got {got}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers; got dtype {labels.dtype}")
    if is_source.dtype != torch.bool:
        raise TypeError(f"is_source must be bool; got dtype {is_source.dtype}")
    kept = labels != ignore_index
    if not torch.compiler.is_compiling():
        wrong = kept & ((labels < 0) | (labels > 2))
        if bool(wrong.any()):
            raise ValueError(f"labels must be 0, 1, 2 or {ignore_index}; got {int(labels[wrong][0])}")
    logits = copy_logits.to(compute_dtype(copy_logits))
    # Ignored positions are replaced before the loss, so that their content (NaN too) reaches no gradient.
    logits = torch.where(kept[..., None], logits, 0.0).reshape(-1, 3)
    target = torch.where(kept, labels, 0).reshape(-1).long()
    losses = F.cross_entropy(logits, target, reduction="none").reshape(batch)
    parts = [
        torch.where(chosen, losses, 0.0).sum() / chosen.sum().clamp(min=1)
        for chosen in (kept & ~is_source, kept & is_source)
    ]
    return weight * (parts[0] + source_weight * parts[1])
