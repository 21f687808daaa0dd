"""Keys and values of the tokens so far (KV 缓存), in one tensor that grows by doubling.

A row of the cache belongs to one sequence and begins at its first token: there is no padding, whatever the lengths of
the others. Rows can be repeated (a prompt that is continued in several ways), reordered (beams) and dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["KVCache"]


class KVCache:
    """Room for B sequences.

    Args:
        layers: L.
        heads: H.
        width: d, of a head.
        rows: B.
        room: T, tokens for which there is room at first.
        limit: Tokens that will never be exceeded; None: not known.
        dtype: Of keys and values.
        device: Where they are.
        clean: Places without a token are 0: who multiplies them by a weight of 0 must not meet NaN.

    Attributes:
        data: (L, 2, B, H, T, d).

    Example:
        >>> cache = KVCache(layers=1, heads=2, width=4, rows=1, room=8)
        >>> cache.reserve(9, used=8)
        >>> cache.room
        16
        >>> cache.select([0, 0, 0], used=8)
        >>> cache.rows
        3
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        width: int,
        rows: int,
        room: int,
        limit: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        clean: bool = True,
    ) -> None:
        self.limit, self.clean = limit, clean
        make = torch.zeros if clean else torch.empty
        self.data = make(layers, 2, rows, heads, max(room, 1), width, dtype=dtype, device=device)

    @property
    def rows(self) -> int:
        """B."""
        return self.data.shape[2]

    @property
    def room(self) -> int:
        """T."""
        return self.data.shape[4]

    def reserve(self, length: int, used: int) -> None:
        """Make room for ``length`` tokens; the first ``used`` are kept."""
        if length <= self.room:
            return
        room = max(length, 2 * self.room)
        if self.limit is not None:
            room = max(length, min(room, self.limit))
        self._replace(list(range(self.rows)), room, used)

    def select(self, rows: list[int], used: int) -> None:
        """Make row i the old row ``rows[i]``, up to its first ``used`` tokens."""
        if rows != list(range(self.rows)):
            self._replace(rows, self.room, used)

    def _replace(self, rows: list[int], room: int, used: int) -> None:
        old: Tensor = self.data
        make = old.new_zeros if self.clean else old.new_empty
        self.data = make(*old.shape[:2], len(rows), old.shape[3], room, old.shape[5])
        if rows == list(range(self.rows)) and len(rows) == old.shape[2]:
            self.data[..., :used, :] = old[..., :used, :]
            return
        for target, source in enumerate(rows):
            self.data[:, :, target, :, :used] = old[:, :, source, :, :used]
