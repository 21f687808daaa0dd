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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kexue._checks import check_int
from kexue._tensors import check_float, compute_dtype
from kexue.generation import _copy_kernel

__all__ = ["CopyConstraint", "CopyState"]

FREE, BEGIN, INSIDE = 0, 1, 2  # O, B, I
NOT_A_NUMBER = "copy_logits must be numbers; got NaN"


class CopyState(NamedTuple):
    """Where in its source the run of each row ends: arrays of numpy on the CPU (they are cheaper), else tensors.

    Attributes:
        match: (N, S) bool; a row without any position has no run.
        owner: (N,) int64, the source of each row.
    """

    match: Any
    owner: Any


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

    From the second step on, ``follow`` does all three at once. A row whose source has no token that could be copied is
    never constrained.

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
        ids = (ids[None] if ids.dim() == 1 else ids).to(device)
        usable = mask.to(ids.device).reshape(ids.shape) & (ids >= 0)
        for special in skipped:
            usable &= ids != special
        largest = int(torch.where(usable, ids, 0).max()) if ids.numel() else 0  # what is never copied may be any id
        for name, value in (("eos_token_id", max(ends)), ("source_ids", largest)):
            if value >= vocab_size:
                raise ValueError(f"{name} must be below the vocabulary's size, {vocab_size}; got {value}")
        self.vocab_size = int(vocab_size)
        self.ids = torch.where(usable, ids, vocab_size)  # what is not usable equals no token
        self.usable = usable
        self.ends = torch.tensor(ends, device=ids.device)
        self._empty = ~usable.any(1)
        self._same = torch.empty(0, dtype=torch.long)
        self.compiled = ids.device.type == "cpu"
        self.arrays = [x.numpy() for x in (self.ids, self.usable, self.ends)] if self.compiled else []
        self._room: tuple[Tensor, Any] | None = None

    def start(self, rows: int | Tensor) -> CopyState:
        """Rows without a run.

        Args:
            rows: N, a multiple of B: as many consecutive rows for each source. Or (N,) int64, the source of each row.
        """
        sources, length = self.ids.shape
        if isinstance(rows, Tensor):
            check_integers("rows", rows)
            owner = rows.to(device=self.ids.device, dtype=torch.long)
            if owner.dim() != 1 or (owner.numel() and not 0 <= int(owner.min()) <= int(owner.max()) < sources):
                raise ValueError(f"rows must be (N,) numbers of the {sources} sources; got {rows}")
        else:
            check_int("rows", rows, 0)
            if (rows % sources if sources else rows) != 0:
                raise ValueError(f"rows must be a multiple of the number of sources, {sources}; got {rows}")
            each = rows // sources if sources else 0
            owner = torch.arange(sources, device=self.ids.device).repeat_interleave(each)
        match = torch.zeros(len(owner), length, dtype=torch.bool, device=self.ids.device)
        return CopyState(match.numpy(), owner.numpy()) if self.compiled else CopyState(match, owner)

    def choose(self, state: CopyState, copy_logits: Tensor) -> Tensor:
        """The tag of each row: the largest of (N, 3) logits for O, B, I (the first of equal ones); I needs a run."""
        logits = check_logits(copy_logits, len(state.match), self.ids.device)
        if self.compiled:
            z = torch.empty(len(logits), dtype=torch.long)
            fine = _copy_kernel.choose(logits.numpy(), state.match, z.numpy())
        else:
            z, fine = _choose(logits, state.match), not bool(logits.isnan().any())
        if not fine:
            raise ValueError(NOT_A_NUMBER)
        return z

    def allow(self, state: CopyState, z: Tensor) -> tuple[Any, Tensor]:
        """What the tags allow.

        Args:
            state: N rows.
            z: (N,) tags 0 O, 1 B, 2 I; an I without a run counts as B.

        Returns:
            ``use`` (N, S) bool, the source positions that the next token may be of, of the kind of the state's arrays;
            ``allowed``, a tensor (N, V) bool, the tokens. ``allowed`` is overwritten by the next call.
        """
        match, owner = state
        rows = len(match)
        if z.shape != (rows,):
            raise ValueError(f"z must be ({rows},), a tag for each row; got shape {tuple(z.shape)}")
        z = z.to(device=self.ids.device, dtype=torch.long)
        allowed, array = self.room(rows)
        if self.compiled:
            use = np.empty_like(match)
            _copy_kernel.allow(*self.arrays, owner, match, z.numpy(), use, array)
            return use, allowed
        ids, usable = self.ids[owner], self.usable[owner]
        free = (z == FREE) | self._empty[owner]
        use = _use(usable, match, z) & ~free[:, None]
        allowed[:] = free[:, None]
        allowed.scatter_(1, torch.where(use, ids, self.vocab_size), True)  # the last column takes what is not used
        allowed[:, self.ends] = True
        return use, allowed[:, :-1]

    def advance(self, state: CopyState, use: Any, tokens: Tensor, index: Tensor | None = None) -> CopyState:
        """The state after a token each.

        Args:
            state: The rows before, N.
            use: Of :meth:`allow`.
            tokens: (N',) the tokens taken.
            index: (N',) the old row that each new row continues; None: the same rows.
        """
        use, index, tokens = self._taken(state, use, tokens, index)
        if not self.compiled:
            owner = state.owner[index]
            return CopyState(use[index] & (self.ids[owner] == tokens[:, None]), owner)
        new = self.empty(len(index))
        if not _copy_kernel.advance(self.arrays[0], state.owner, use, index.numpy(), tokens.numpy(), *new):
            raise IndexError(f"index must be in [0, {len(use)}); got {index.tolist()}")
        return new

    def follow(
        self, state: CopyState, use: Any, tokens: Tensor, copy_logits: Tensor, index: Tensor | None = None
    ) -> tuple[CopyState, Any, Tensor]:
        """:meth:`advance`, :meth:`choose` and :meth:`allow`, on the CPU in one compiled call.

        Returns:
            The new state, ``use`` and ``allowed``.
        """
        if not self.compiled:
            new = self.advance(state, use, tokens, index)
            return new, *self.allow(new, self.choose(new, copy_logits))
        use, index, tokens = self._taken(state, use, tokens, index)
        rows = len(index)
        logits = check_logits(copy_logits, rows, self.ids.device)
        new, (allowed, array) = self.empty(rows), self.room(rows)
        used = np.empty_like(new.match)
        done = _copy_kernel.follow(
            *self.arrays, state.owner, use, index.numpy(), tokens.numpy(), logits.numpy(), *new, used, array
        )
        if done == _copy_kernel.NOT_FOUND:
            raise IndexError(f"index must be in [0, {len(use)}); got {index.tolist()}")
        if done == _copy_kernel.NOT_A_NUMBER:
            raise ValueError(NOT_A_NUMBER)
        return new, used, allowed

    def reorder(self, state: CopyState, index: Tensor) -> CopyState:
        """Rows ``index`` of a state."""
        index = index.to(self.ids.device)
        rows: Any = index.numpy() if self.compiled else index
        return CopyState(state.match[rows], state.owner[rows])

    def empty(self, rows: int) -> CopyState:
        """Memory for a state on the CPU."""
        return CopyState(np.empty((rows, self.ids.shape[1]), np.bool_), np.empty(rows, np.int64))

    def room(self, rows: int) -> tuple[Tensor, Any]:
        """The memory that :meth:`allow` writes to, and the same as an array of numpy (None on another device)."""
        if self._room is None or len(self._room[0]) != rows:
            mask = self.usable.new_empty(rows, self.vocab_size + (not self.compiled))
            self._room = mask, mask.numpy() if self.compiled else None
        return self._room

    def _taken(self, state: CopyState, use: Any, tokens: Tensor, index: Tensor | None) -> tuple[Any, Tensor, Tensor]:
        if isinstance(use, Tensor) and self.compiled:
            use = use.numpy()
        if use.shape != state.match.shape:
            raise ValueError(f"use must be {tuple(state.match.shape)}, as the state; got shape {tuple(use.shape)}")
        check_integers("tokens", tokens)
        if index is None:
            if len(self._same) != len(use):
                self._same = torch.arange(len(use), device=self.ids.device)
            index = self._same
        else:
            check_integers("index", index)
            index = index.to(device=self.ids.device, dtype=torch.long)
        if tokens.dim() != 1 or tokens.shape != index.shape:
            raise ValueError(f"tokens must be ({len(index)},), one for each row; got shape {tuple(tokens.shape)}")
        return use, index, tokens.to(device=self.ids.device, dtype=torch.long)


def _choose(logits: Tensor, match: Tensor) -> Tensor:
    inside = logits[:, 2].masked_fill(~match.any(1), -torch.inf)
    return torch.where(inside > logits[:, :2].amax(1), INSIDE, logits[:, :2].argmax(1))


def _use(usable: Tensor, match: Tensor, z: Tensor) -> Tensor:
    following = torch.zeros_like(match)
    following[:, 1:] = match[:, :-1] & usable[:, 1:]
    return torch.where(((z == INSIDE) & following.any(1))[:, None], following, usable)


def check_logits(copy_logits: Any, rows: int, device: torch.device) -> Tensor:
    """(N, 3) in float32, or float64, on the device; or TypeError, ValueError."""
    check_float("copy_logits", copy_logits)
    if copy_logits.shape != (rows, 3):
        raise ValueError(f"copy_logits must be ({rows}, 3), O B I a row; got shape {tuple(copy_logits.shape)}")
    return plain(copy_logits if copy_logits.device == device else copy_logits.to(device), compute_dtype(copy_logits))


def plain(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Detached, of the dtype and contiguous; what is so already costs nothing here (a step takes microseconds)."""
    if x.requires_grad:
        x = x.detach()
    if x.dtype != dtype:
        x = x.to(dtype)
    return x if x.is_contiguous() else x.contiguous()


def check_integers(name: str, x: Any) -> None:
    """Raise TypeError unless ``x`` is a tensor of integers."""
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        got = f"dtype {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a tensor of integers; got {got}")


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
    try:
        mask = torch.as_tensor(source_mask)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"source_mask must be bool, of the shape of source_ids; got {source_mask!r}") from None
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
    if not isinstance(special_ids, Iterable):
        raise TypeError(f"special_ids must be several ids; got {special_ids!r}")
    special = special_ids.tolist() if isinstance(special_ids, Tensor) else list(special_ids)
    for value in special:
        check_int("special_ids", value, 0)
    return [int(value) for value in special]
