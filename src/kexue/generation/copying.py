"""Copying in transformers' generation (BIO Copy 解码, 接入 transformers): a logits processor.

Source: 科学空间 8046 (SPACES：“抽取-生成”式长文本摘要). The rule and its state are in ``copy_constraint.py``.

    copy logits -> tag O, B or I -> tokens that are not allowed get -inf -> the top k survive -> log-softmax over them

What the state depends on is not in ``input_ids``: the tags of the steps before. They are a function of ``input_ids``
though, since ``copy_logits`` is: the tag before position p is decided by the ids up to p. A call therefore looks for
each row among the rows of the call before (its ids without the last one, of the same source) and goes on from there:
beams that are reordered, repeated or dropped find their own state, by content. If a row is not found, the tags are
decided again from the beginning. So what comes out depends on nothing but the arguments.

Where the scores come in as log-probabilities (beam search takes the log-softmax before the processors) or as logits
(greedy search, sampling) makes no difference: the log-softmax over the survivors is the same for both, and beam search
adds it up as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kexue._checks import check_int
from kexue._tensors import check_float, compute_dtype
from kexue._transformers import LogitsProcessor
from kexue.generation import _copy_kernel
from kexue.generation.copy_constraint import (
    NOT_A_NUMBER,
    CopyConstraint,
    CopyState,
    check_eos,
    check_ids,
    check_integers,
    check_logits,
    check_mask,
    check_special,
    plain,
)
from kexue.generation.filters import top_k_filter

__all__ = ["CopyLogitsProcessor"]


class CopyLogitsProcessor(LogitsProcessor):
    """Let ``model.generate`` copy spans of a source as they stand.

    Args:
        source_ids: (S,) ids of one source for all rows, or (B, S): rows of ``input_ids`` belong to the sources in
            equal consecutive parts (beams, returned sequences). Negative ids are padding.
        copy_logits: ``input_ids`` (N, t) -> (N, 3) logits of O, B, I for the token at position t. It must depend on
            nothing but the ids and the row's source. Always called with all rows.
        eos_token_id: The id, or ids, that end a text; allowed at each step.
        top_k: How many tokens survive after masking; None or 0: all. Of equal ones the lowest ids.
        source_mask: Of the shape of ``source_ids``; True: a token, False: padding.
        special_ids: Ids that are never copied, such as [CLS] and padding.
        prompt_length: How many ids a row begins with before the first generated one. 1: the start token of an
            encoder-decoder. For a decoder-only model the length of the prompt.

    The result holds log-probabilities: -inf for what may not follow, and the exponentials of a row sum to 1. If every
    allowed token has a score of -inf (other processors forbade them), the row is not constrained at that step. Rows
    of -inf only come back as they are. One instance may serve several calls of ``generate`` with the same sources.

    Raises:
        TypeError: Ids that are no integers, ``copy_logits`` that cannot be called.
        ValueError: Shapes that do not fit, ids out of range, copy logits with NaN.

    Reference:
        https://spaces.ac.cn/archives/8046

    Example:
        >>> source = [5, 6, 7, 5, 8]
        >>> def tags(input_ids):  # B first, then I
        ...     z = 1 if input_ids.shape[1] == 1 else 2
        ...     return torch.eye(3)[z].expand(len(input_ids), 3)
        >>> processor = CopyLogitsProcessor(source, tags, eos_token_id=1)
        >>> scores = torch.zeros(1, 10)
        >>> processor(torch.tensor([[0]]), scores).isfinite().nonzero()[:, 1].tolist()
        [1, 5, 6, 7, 8]
        >>> processor(torch.tensor([[0, 5]]), scores).isfinite().nonzero()[:, 1].tolist()
        [1, 6, 8]
    """

    def __init__(
        self,
        source_ids: Any,
        copy_logits: Callable[[Tensor], Tensor],
        eos_token_id: int | Iterable[int],
        top_k: int | None = 10,
        *,
        source_mask: Any = None,
        special_ids: Iterable[int] = (),
        prompt_length: int = 1,
    ) -> None:
        if not callable(copy_logits):
            raise TypeError(f"copy_logits must be callable: input_ids -> (N, 3); got {type(copy_logits).__name__}")
        if top_k is not None:
            check_int("top_k", top_k, 0)
        check_int("prompt_length", prompt_length, 0)
        self.source_ids = check_ids(source_ids).clone()
        self.source_mask = check_mask(source_mask, self.source_ids)
        self.eos_token_id = check_eos(eos_token_id)
        self.special_ids = check_special(special_ids)
        self.copy_logits, self.top_k, self.prompt_length = copy_logits, top_k or 0, int(prompt_length)
        self._constraint: CopyConstraint | None = None
        self._last: tuple[Any, CopyState, Any] | None = None  # ids, state, use of the call before

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-probabilities of the tokens that may follow.

        Args:
            input_ids: (N, t) ids so far.
            scores: (N, V) logits or log-probabilities; not changed.

        Returns:
            (N, V) in the dtype of ``scores``.
        """
        self._check(input_ids, scores)
        constraint = self._tables(scores)
        rows, sources = input_ids.shape[0], constraint.ids.shape[0]
        if rows % max(sources, 1):
            raise ValueError(f"input_ids must have a multiple of {sources} rows, one for each source; got {rows}")
        wide = plain(scores, compute_dtype(scores))
        logits = self._tags(input_ids)
        made = self._step(constraint, input_ids, logits, wide)
        if made is None:
            ids = plain(input_ids, torch.long)
            if ids is input_ids:
                ids = input_ids.clone()  # the caller may write on in its own tensor
            state = self._state(constraint, ids)
            use, allowed = constraint.allow(state, constraint.choose(state, logits))
            self._last = ids, state, use
            made = _survivors(wide, allowed, self.top_k, _on_kernel(constraint, self.top_k))
        return plain(made, scores.dtype)

    def _check(self, input_ids: Any, scores: Any) -> None:
        check_float("scores", scores, 2)
        check_integers("input_ids", input_ids)
        shape, rows = input_ids.shape, scores.shape[0]
        if len(shape) != 2 or shape[0] != rows:
            raise ValueError(f"input_ids must be ({rows}, t), a row for each row of scores; got {tuple(shape)}")
        if shape[1] < self.prompt_length:
            raise ValueError(
                f"input_ids must have at least the {self.prompt_length} ids of the prompt (prompt_length) a row; got "
                f"{shape[1]}"
            )

    def _tables(self, scores: Tensor) -> CopyConstraint:
        found = self._constraint
        if found is None or found.vocab_size != scores.shape[1] or found.ids.device != scores.device:
            found = self._constraint = CopyConstraint(
                self.source_ids, self.eos_token_id, scores.shape[1], source_mask=self.source_mask,
                special_ids=self.special_ids, device=scores.device,
            )  # fmt: skip
            self._last = None
        return found

    def _tags(self, input_ids: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # ``generate`` has turned it off; doing it again costs a microsecond or two
            with torch.no_grad():
                logits = self.copy_logits(input_ids)
        else:
            logits = self.copy_logits(input_ids)
        device = input_ids.device if self._constraint is None else self._constraint.ids.device
        return check_logits(logits, input_ids.shape[0], device)

    def _step(self, constraint: CopyConstraint, input_ids: Tensor, logits: Tensor, scores: Tensor) -> Tensor | None:
        """The usual case on the CPU as one compiled call: each row is one of the call before and a token."""
        if self._last is None or not _on_kernel(constraint, self.top_k):
            return None
        before, (_, owner), use = self._last
        rows, length = input_ids.shape
        if length != before.shape[1] + 1:
            return None
        if owner.shape[0] != rows:
            owner = constraint.start(rows).owner
        if isinstance(before, Tensor):
            before = before.numpy()
        ids = np.array(input_ids.numpy(force=True), np.int64, order="C")  # the caller may write on in its own tensor
        match, used = np.empty((2, rows, use.shape[1]), np.bool_)
        given = scores.numpy()
        made = np.empty(given.shape, given.dtype)
        done = _copy_kernel.step(
            *constraint.arrays, use, before, ids, logits.numpy(), given, self.top_k, match, used, made
        )
        if done == _copy_kernel.NOT_A_NUMBER:
            raise ValueError(NOT_A_NUMBER)
        if done == _copy_kernel.NOT_FOUND:
            return None
        self._last = ids, CopyState(match, owner), used
        return torch.from_numpy(made)

    def _state(self, constraint: CopyConstraint, ids: Tensor) -> CopyState:
        """The state of each row: from the call before, or by deciding all tags again."""
        if ids.shape[1] == self.prompt_length:
            return constraint.start(len(ids))
        if self._last is not None:
            before, state, use = torch.as_tensor(self._last[0]), *self._last[1:]
            new = ids.shape[1] - before.shape[1]
            rows = _find(ids, before, len(constraint.ids), constraint.compiled) if new in (0, 1) else None
            if rows is not None:
                return constraint.advance(state, use, ids[:, -1], rows) if new else constraint.reorder(state, rows)
        state = constraint.start(len(ids))
        for t in range(self.prompt_length, ids.shape[1]):
            use, _ = constraint.allow(state, constraint.choose(state, self._tags(ids[:, :t])))
            state = constraint.advance(state, use, ids[:, t])
        return state


def _find(ids: Tensor, before: Tensor, sources: int, compiled: bool) -> Tensor | None:
    """For each row of ``ids`` a row of ``before`` that it begins with, of the same source; None if one has none."""
    length = before.shape[1]
    if not len(ids):
        return torch.arange(0, device=ids.device)
    if compiled:
        rows = torch.empty(len(ids), dtype=torch.long)
        return rows if _copy_kernel.find(ids.numpy(), length, before.numpy(), sources, rows.numpy()) else None
    groups = ids[:, :length].reshape(sources, len(ids) // sources, 1, length)
    equal = (groups == before.reshape(sources, 1, len(before) // sources, length)).all(-1)  # (B, rows, rows before)
    if not bool(equal.any(-1).all()):
        return None
    first = torch.arange(sources, device=ids.device)[:, None] * equal.shape[2]
    return (first + equal.to(torch.uint8).argmax(-1)).flatten()


def _survivors(scores: Tensor, allowed: Tensor, top_k: int, compiled: bool) -> Tensor:
    """Log-softmax over the top k of the allowed tokens of each row."""
    if compiled:
        made = torch.empty(scores.shape, dtype=scores.dtype)
        _copy_kernel.survivors(scores.numpy(), allowed.numpy(), top_k, made.numpy())
        return made
    masked = scores.masked_fill(~allowed, -torch.inf)
    masked = torch.where((masked == -torch.inf).all(1, keepdim=True), scores, masked)
    broken = masked.isnan().any(1, keepdim=True)
    if top_k:
        masked = top_k_filter(masked, top_k)
    made = masked.log_softmax(1).masked_fill(broken, torch.nan)
    return torch.where((scores == -torch.inf).all(1, keepdim=True), scores, made)


def _on_kernel(constraint: CopyConstraint, top_k: int) -> bool:
    return constraint.compiled and 0 < top_k <= _copy_kernel.LARGEST_K
