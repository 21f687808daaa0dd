"""Copy-constrained decoding (BIO Copy, 带复制约束的解码): the state of the copied run, and the tokens that it allows.

Source: 科学空间 8046 (SPACES：“抽取-生成”式长文本摘要), B/I/O copying. Before each token a tag z is chosen:

    O (0)  nothing is constrained; the run ends, n = 0
    B (1)  a token of the source; n = 1
    I (2)  a token that follows, anywhere in the source, the last n output tokens; n = n + 1. Not for n = 0.
           If nothing follows them, as B.

The published rule builds the n-grams of the source at each step. Equivalent and without n-grams: match[j] says that
the run ends at source position j. Then

    use      = all positions for B; match moved on by one for I, if any is set, else all positions
    allowed  = {source[j]: use[j]} and the end of text
    match    = use & (source == the token taken)

so n > 0 means that match has a position, and a run that is in the source several times needs no special care.

What differs from the published code, and why: the end of text is always allowed (there it is allowed only as the last
token of the source: a run in the middle cannot end the text); other special tokens are never copied, and no run leads
over them; padding is never used; taking the end of text, or a token that was not allowed, ends the run; the state
follows the hypothesis (there it stays behind when a beam search reorders its rows).

Shapes: N rows (hypotheses), B sources, S positions of a source, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kexue._checks import check_int

__all__ = ["CopyConstraint", "CopyState"]

FREE, BEGIN, INSIDE = 0, 1, 2  # O, B, I


@dataclass(frozen=True)
class CopyState:
    """Where in its source the run of each row ends.

    Attributes:
        match: (N, S) bool; a row without any position has no run.
        owner: (N,) int64, the source of each row.
    """

    match: Tensor
    owner: Tensor


class CopyConstraint:
    """Which tokens may follow, for rows that copy from their sources; the caller keeps the state.

    Args:
        source_ids: (S,) ids of one source, or (B, S); negative ids are padding.
        eos_token_id: The id, or ids, that end a text: always allowed, never part of a run.
        vocab_size: V.
        source_mask: Of the shape of ``source_ids``; True: a token, False: padding. None: no padding.
        special_ids: Ids that are never copied.
        device: Where the masks are made; None: the device of ``source_ids``.

    A search uses it like this; ``use`` goes with the row until its token is known:

        state = constraint.start(rows)
        z = constraint.choose(state, copy_logits)            # (N,) the tags; I only where a run can go on
        use, allowed = constraint.allow(state, z)            # (N, S), (N, V) bool
        ... tokens are taken; row i continues the old row index[i] ...
        state = constraint.advance(state, use, tokens, index)

    A row whose source has no token that could be copied is never constrained.

    Raises:
        TypeError: Ids that are no integers.
        ValueError: A shape that does not fit, an id that is not in the vocabulary.

    Reference:
        https://spaces.ac.cn/archives/8046

    Example:
        >>> constraint = CopyConstraint([5, 6, 7, 5, 8], eos_token_id=1, vocab_size=10)
        >>> state = constraint.start(1)
        >>> use, allowed = constraint.allow(state, torch.tensor([1]))  # B: any token of the source
        >>> allowed.nonzero()[:, 1].tolist()
        [1, 5, 6, 7, 8]
        >>> state = constraint.advance(state, use, torch.tensor([5]))
        >>> use, allowed = constraint.allow(state, torch.tensor([2]))  # I: what follows 5
        >>> allowed.nonzero()[:, 1].tolist()
        [1, 6, 8]
    """

    def __init__(
        self,
        source_ids: Any,
        eos_token_id: int | Iterable[int],
        vocab_size: int,
        *,
        source_mask: Any = None,
        special_ids: Iterable[int] = (),
        device: torch.device | str | None = None,
    ) -> None:
        check_int("vocab_size", vocab_size, 1)
        ids = check_ids(source_ids)
        mask = check_mask(source_mask, ids)
        ends = check_eos(eos_token_id)
        skipped = [*ends, *check_special(special_ids)]
        for name, values in (("eos_token_id", ends), ("source_ids", [int(ids.max())] if ids.numel() else [])):
            if max(values, default=0) >= vocab_size:
                raise ValueError(f"{name} must be below the vocabulary's size, {vocab_size}; got {max(values)}")
        ids = ids.to(device).reshape(-1, ids.shape[-1])
        usable = mask.to(ids.device).reshape(ids.shape) & (ids >= 0)
        for special in skipped:
            usable &= ids != special
        self.vocab_size = int(vocab_size)
        self.ids = torch.where(usable, ids, vocab_size)  # what is not usable equals no token
        self.usable = usable
        self.ends = torch.tensor(ends, device=ids.device)
        self._empty = ~usable.any(1)
        self._mask = torch.empty(0, vocab_size + 1, dtype=torch.bool, device=ids.device)

    def start(self, rows: int | Tensor) -> CopyState:
        """Rows without a run.

        Args:
            rows: N, a multiple of B: as many consecutive rows for each source. Or (N,) int64, the source of each row.
        """
        sources, length = self.ids.shape
        if isinstance(rows, Tensor):
            owner = rows.to(device=self.ids.device, dtype=torch.long)
            if owner.dim() != 1 or (owner.numel() and not 0 <= int(owner.min()) <= int(owner.max()) < sources):
                raise ValueError(f"rows must be (N,) numbers of the {sources} sources; got {rows}")
        else:
            check_int("rows", rows, 0)
            if (rows % sources if sources else rows) != 0:
                raise ValueError(f"rows must be a multiple of the number of sources, {sources}; got {rows}")
            each = rows // sources if sources else 0
            owner = torch.arange(sources, device=self.ids.device).repeat_interleave(each)
        return CopyState(torch.zeros(len(owner), length, dtype=torch.bool, device=self.ids.device), owner)

    def choose(self, state: CopyState, copy_logits: Tensor) -> Tensor:
        """The tag of each row: the largest of (N, 3) logits for O, B, I (the first of equal ones); I needs a run."""
        logits = copy_logits.detach()
        if logits.shape != (len(state.match), 3):
            raise ValueError(f"copy_logits must be ({len(state.match)}, 3), O B I a row; got {tuple(logits.shape)}")
        if not logits.is_floating_point():
            raise TypeError(f"copy_logits must be floating; got dtype {logits.dtype}")
        if bool(logits.isnan().any()):
            raise ValueError("copy_logits must be numbers; got NaN")
        running = state.match.any(1)
        inside = logits[:, 2].masked_fill(~running, -torch.inf)
        both = logits[:, :2].amax(1)
        best = logits[:, :2].argmax(1)
        return torch.where(inside > both, INSIDE, best)

    def allow(self, state: CopyState, z: Tensor) -> tuple[Tensor, Tensor]:
        """What the tags allow.

        Args:
            state: N rows.
            z: (N,) tags 0 O, 1 B, 2 I; an I without a run counts as B.

        Returns:
            ``use`` (N, S) bool, the source positions that the next token may be of; ``allowed`` (N, V) bool, the
            tokens. ``allowed`` is overwritten by the next call.
        """
        match, owner = state.match, state.owner
        rows = len(match)
        z = z.to(match.device)
        ids, usable = self.ids[owner], self.usable[owner]
        following = torch.zeros_like(match)
        following[:, 1:] = match[:, :-1] & usable[:, 1:]
        inside = (z == INSIDE) & following.any(1)
        free = (z == FREE) | self._empty[owner]
        use = torch.where(inside[:, None], following, usable) & ~free[:, None]
        if len(self._mask) != rows:
            self._mask = self._mask.new_empty(rows, self.vocab_size + 1)
        mask = self._mask
        mask[:] = free[:, None]
        mask.scatter_(1, torch.where(use, ids, self.vocab_size), True)  # the last column takes what is not used
        mask[:, self.ends] = True
        return use, mask[:, :-1]

    def advance(self, state: CopyState, use: Tensor, tokens: Tensor, index: Tensor | None = None) -> CopyState:
        """The state after a token each.

        Args:
            state: The rows before.
            use: Of :meth:`allow`.
            tokens: (N',) the tokens taken.
            index: (N',) the old row that each new row continues; None: the same rows.
        """
        owner = state.owner
        if index is not None:
            use, owner = use[index], owner[index]
        return CopyState(use & (self.ids[owner] == tokens.to(use.device)[:, None]), owner)

    def reorder(self, state: CopyState, index: Tensor) -> CopyState:
        """Rows ``index`` of a state."""
        return CopyState(state.match[index], state.owner[index])


def check_ids(source_ids: Any) -> Tensor:
    """(S,) or (B, S) int64, or TypeError, ValueError."""
    try:
        ids = source_ids.detach() if isinstance(source_ids, Tensor) else torch.as_tensor(source_ids)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"source_ids must be integers, (S,) or (B, S); got {type(source_ids).__name__}") from None
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise TypeError(f"source_ids must be integers; got dtype {ids.dtype}")
    if ids.dim() not in (1, 2):
        raise ValueError(f"source_ids must be (S,) or (B, S); got shape {tuple(ids.shape)}")
    return ids.to(torch.long)


def check_mask(source_mask: Any, ids: Tensor) -> Tensor:
    """The mask as bool, or ValueError."""
    if source_mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    mask = torch.as_tensor(source_mask)
    if mask.shape != ids.shape:
        raise ValueError(f"source_mask must be of the shape of source_ids, {tuple(ids.shape)}; got {tuple(mask.shape)}")
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("source_mask must be True (a token) or False (padding)")
    return mask.bool()


def check_eos(eos_token_id: Any) -> list[int]:
    """The ids that end a text, or TypeError, ValueError."""
    if isinstance(eos_token_id, Tensor):
        eos_token_id = eos_token_id.tolist()
    ends = list(eos_token_id) if isinstance(eos_token_id, Iterable) else [eos_token_id]
    if not ends:
        raise ValueError("eos_token_id must be an id or several; got none")
    for end in ends:
        check_int("eos_token_id", end, 0)
    return [int(end) for end in ends]


def check_special(special_ids: Any) -> list[int]:
    """The ids that are never copied, or TypeError."""
    special = special_ids.tolist() if isinstance(special_ids, Tensor) else list(special_ids)
    for value in special:
        check_int("special_ids", value, 0)
    return [int(value) for value in special]
