"""Hierarchical position tables (层次分解位置编码): up to n^2 positions from the n of a trained table.

Source: 科学空间 7947 (层次分解位置编码,让BERT可以处理超长文本).

With vectors p_0 ... p_(n-1) and position i n + j (0 <= i, j < n):

    q_(i n + j) = alpha u_i + (1 - alpha) u_j,   u = (p - alpha p_0) / (1 - alpha)
                = p_j + beta (p_i - p_0),        beta = alpha / (1 - alpha)

The second line is what is computed: one addition, and for i = 0 it is p_j to the last bit (the first is off by
rounding). alpha = 1/2 would make the positions (i, j) and (j, i) equal; below it the place within a block dominates.
What differs from the ports in use: the block form writes the table once, without gathers; whether a position is new is
decided by the position, not by the length of the input, so that cached decoding and left padding work; the n vectors
stay the only parameters, and models are saved with the whole table, so that plain transformers loads them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue._checks import check_int, check_real
from kexue._tensors import check_float, compute_dtype

__all__ = ["HierarchicalPositionEmbedding", "hierarchical_positions"]


def check_alpha(alpha: Any) -> float:
    """Raise unless alpha is in (0, 1) and not 1/2."""
    check_real("alpha", alpha, above=0.0)
    if alpha >= 1:
        raise ValueError(f"alpha must be below 1; got {alpha!r}")
    if alpha == 0.5:
        raise ValueError("alpha must not be .5, where the positions (i, j) and (j, i) coincide; got 0.5")
    return float(alpha)


def check_count(name: str, m: Any, n: int) -> None:
    """Raise unless 1 <= m <= n^2 and the table has two rows."""
    check_int(name, m, 1)
    if n < 2:
        raise ValueError(f"a table needs at least 2 positions to be decomposed; got {n}")
    if m > n * n:
        raise ValueError(f"{name} must be at most {n * n}, the square of the {n} positions of the table; got {m}")


def _shifts(weight: Tensor, count: int, beta: float) -> Tensor:
    """(count, D): beta (p_i - p_0), exactly 0 in the first row and without a gradient there."""
    wide = weight[:count].to(compute_dtype(weight))
    return torch.cat([wide.new_zeros(1, wide.shape[1]), (wide[1:] - wide[:1]) * beta])


def _is_range(ids: Tensor, start: int, stop: int) -> bool:
    """Whether ids, of one row, are start, start + 1, ..., stop - 1."""
    if ids.numel() != stop - start or ids.shape[-1] != stop - start:
        return False
    return torch.equal(ids.reshape(-1), torch.arange(start, stop, dtype=ids.dtype))


def hierarchical_positions(weight: Tensor, m: int, alpha: float = 0.4) -> Tensor:
    """A table of m positions from one of n.

    The first n rows are ``weight``, bit for bit. Differentiable; writes m D numbers once.

    Args:
        weight: (n, D) vectors of the trained positions, n >= 2.
        m: Number of positions wanted, 1 to n^2.
        alpha: Share of the block's number in (0, 1), not .5; below .5 advised.

    Returns:
        (m, D) in the dtype of ``weight`` (half precision is added in float32 and rounded once).

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: alpha, m or the table out of range.

    Reference:
        https://spaces.ac.cn/archives/7947

    Example:
        >>> hierarchical_positions(torch.tensor([[0.0], [1.0], [4.0]]), 6, alpha=0.2)[:, 0]  # beta = 1/4
        tensor([0.0000, 1.0000, 4.0000, 0.2500, 1.2500, 4.2500])
    """
    check_float("weight", weight, 2)
    alpha = check_alpha(alpha)
    n, width = weight.shape
    check_count("m", m, n)
    if m <= n:
        return weight[:m].clone()
    blocks = -(-m // n)
    shifts = _shifts(weight, blocks, alpha / (1 - alpha))
    table = (weight + shifts[:, None]).view(blocks * n, width)
    return table[:m].to(weight.dtype)


class HierarchicalPositionEmbedding(nn.Module):
    """Drop-in for a position ``nn.Embedding`` that answers for up to n^2 positions with n trained vectors.

    Positions below n give the bits of the plain embedding, and its gradients. The parameter ``weight`` holds the n
    vectors (and the rows before them, see ``offset``).

    Args:
        num_embeddings: Rows of the trained table: offset + n.
        embedding_dim: D.
        length: Number of positions that are accepted, at most n^2; None is n^2.
        alpha: As in :func:`hierarchical_positions`.
        offset: Rows before the first position that are not positions (padding_idx + 1 in RoBERTa).
        padding_idx: Row that gets no gradient, as in ``nn.Embedding``; it starts at 0.
        save_table: The state dict holds the whole table (offset + length rows) instead of the n vectors. Both forms
            can be loaded.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: A value out of range.

    Reference:
        https://spaces.ac.cn/archives/7947

    Example:
        >>> positions = HierarchicalPositionEmbedding(8, 4)
        >>> positions(torch.tensor([[0, 7, 8, 63]])).shape, positions.weight.shape
        (torch.Size([1, 4, 4]), torch.Size([8, 4]))
    """

    weight: nn.Parameter
    alpha: float
    offset: int
    length: int
    padding_idx: int | None
    save_table: bool

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        length: int | None = None,
        alpha: float = 0.4,
        offset: int = 0,
        padding_idx: int | None = None,
        save_table: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("num_embeddings", num_embeddings, 1)
        check_int("embedding_dim", embedding_dim, 1)
        weight = torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype)
        nn.init.normal_(weight)
        self._setup(nn.Parameter(weight), length, alpha, offset, padding_idx, save_table)
        if padding_idx is not None:
            with torch.no_grad():
                self.weight[padding_idx].zero_()

    def _setup(
        self,
        weight: nn.Parameter,
        length: int | None,
        alpha: float,
        offset: int,
        padding_idx: int | None,
        save_table: bool,
    ) -> None:
        check_int("offset", offset, 0)
        rows = weight.shape[0]
        n = rows - offset
        if n < 2:
            raise ValueError(f"a table needs at least 2 positions to be decomposed; got {rows} rows, offset {offset}")
        length = n * n if length is None else length
        check_count("length", length, n)
        if padding_idx is not None:
            check_int("padding_idx", padding_idx, 0)
            if padding_idx >= rows:
                raise ValueError(f"padding_idx must be below {rows}, the rows of the table; got {padding_idx}")
        self.alpha, self.offset, self.length = check_alpha(alpha), int(offset), int(length)
        self.padding_idx, self.save_table = padding_idx, save_table
        self.weight = weight

    @classmethod
    def from_pretrained(
        cls,
        embedding: nn.Embedding | Tensor,
        alpha: float = 0.4,
        offset: int = 0,
        length: int | None = None,
        save_table: bool = False,
    ) -> HierarchicalPositionEmbedding:
        """Take the trained vectors of an embedding.

        Args:
            embedding: An ``nn.Embedding``, whose parameter is shared, not copied, and whose ``padding_idx`` is kept;
                or a floating tensor (offset + n, D), which is copied.
            alpha: As in :func:`hierarchical_positions`.
            offset: As in the class.
            length: As in the class.
            save_table: As in the class.

        Raises:
            TypeError: Not an embedding.
            ValueError: A value out of range, or an embedding with max_norm, sparse or scale_grad_by_freq.

        Example:
            >>> plain = torch.nn.Embedding(8, 4)
            >>> longer = HierarchicalPositionEmbedding.from_pretrained(plain, alpha=0.4)
            >>> bool((longer(torch.arange(8)) == plain.weight).all()), longer.length
            (True, 64)
        """
        if isinstance(embedding, nn.Embedding):
            for name in ("max_norm", "sparse", "scale_grad_by_freq"):
                if getattr(embedding, name):
                    raise ValueError(f"an embedding with {name} is not supported; got {getattr(embedding, name)!r}")
            weight: nn.Parameter = embedding.weight  # type: ignore[assignment]
            padding_idx = embedding.padding_idx
        elif isinstance(embedding, Tensor):
            check_float("embedding", embedding, 2)
            weight, padding_idx = nn.Parameter(embedding.detach().clone()), None
        else:
            raise TypeError(f"embedding must be an nn.Embedding or a tensor; got {type(embedding).__name__}")
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._setup(weight, length, alpha, offset, padding_idx, save_table)
        return made

    @property
    def n(self) -> int:
        """Number of trained positions."""
        return self.weight.shape[0] - self.offset

    @property
    def num_embeddings(self) -> int:
        """Number of ids that are accepted: offset + length."""
        return self.offset + self.length

    @property
    def embedding_dim(self) -> int:
        """D."""
        return self.weight.shape[1]

    def extra_repr(self) -> str:
        """What print shows."""
        return f"{self.num_embeddings} from {self.weight.shape[0]}, {self.embedding_dim}, alpha={self.alpha:g}"

    def table(self) -> Tensor:
        """The whole table (offset + length, D), differentiable."""
        rows = hierarchical_positions(self.weight[self.offset :], self.length, self.alpha)
        return torch.cat([self.weight[: self.offset], rows]) if self.offset else rows

    def forward(self, position_ids: Tensor) -> Tensor:
        """Vectors of positions.

        Args:
            position_ids: (...) integers in [0, offset + length).

        Returns:
            (..., D).

        Raises:
            TypeError: Not integers.
            ValueError: An id out of range (on other devices than the CPU and under torch.compile an error of the
                device, as with ``nn.Embedding``).
        """
        if not isinstance(position_ids, Tensor) or position_ids.dtype not in (torch.int64, torch.int32):
            got = position_ids.dtype if isinstance(position_ids, Tensor) else type(position_ids).__name__
            raise TypeError(f"position_ids must be a tensor of int64 or int32; got {got}")
        rows, n, last = self.weight.shape[0], self.n, self.length - 1
        if position_ids.device.type == "cpu" and not torch.compiler.is_compiling() and position_ids.numel():
            low, high = (int(x) for x in position_ids.aminmax())  # known at no cost: it saves the second gather
            if low < 0 or high >= self.num_embeddings:
                raise ValueError(f"position_ids must be in [0, {self.num_embeddings}); got {low} to {high}")
            if high < rows:
                return F.embedding(position_ids, self.weight, self.padding_idx)
            last = high - self.offset
            if low == self.offset and _is_range(position_ids, low, high + 1):
                out = hierarchical_positions(self.weight[self.offset :], last + 1, self.alpha)
                return out.view(*position_ids.shape, -1)
        place = position_ids - self.offset
        inside = torch.where(place < 0, position_ids, self.offset + place % n)
        # an id that is too large must not fall back on a trained row: it stays out of range and F.embedding refuses it
        inside = torch.where(position_ids < self.num_embeddings, inside, position_ids.clamp(min=rows))
        shifts = _shifts(self.weight[self.offset :], last // n + 1, self.alpha / (1 - self.alpha))
        block = torch.div(place.clamp(min=0, max=last), n, rounding_mode="floor")
        out = F.embedding(inside, self.weight, self.padding_idx) + F.embedding(block, shifts)
        return out.to(self.weight.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.save_table:
            table = self.table()
            destination[f"{prefix}weight"] = table if keep_vars else table.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = state_dict.get(f"{prefix}weight")
        rows = self.weight.shape[0]
        whole = (self.num_embeddings, self.embedding_dim)
        if isinstance(given, Tensor) and tuple(given.shape) == whole and self.num_embeddings > rows:
            if is_hierarchical(given, self.offset, self.n, self.alpha):
                state_dict[f"{prefix}weight"] = given[:rows]  # a copy of the dict: load_state_dict made it
            else:
                error_msgs.append(
                    f"{prefix}weight: the rows after {rows} do not follow from those before with alpha={self.alpha:g}; "
                    "a table that was trained untied goes into nn.Embedding"
                )
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


@torch.no_grad()
def is_hierarchical(table: Tensor, offset: int, n: int, alpha: float) -> bool:
    """Whether a table (offset + m, D) follows from its first n positions, up to a few roundings.

    A table may have been saved in a coarser dtype than it is loaded in: the roundings are those of the coarsest dtype
    that holds its numbers.
    """
    rows = table[offset:]
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    eps = max([torch.finfo(d).eps for d in kinds if torch.equal(rows.to(d).to(rows.dtype), rows)], default=0.0)
    eps = max(eps, torch.finfo(rows.dtype).eps)
    expected = hierarchical_positions(rows[:n], rows.shape[0], alpha)
    size = expected.abs().amax().double() if expected.numel() else 0.0
    tolerance = 4 * eps * (1 + 2 * alpha / (1 - alpha)) * size
    return bool(((rows - expected).abs().double() <= tolerance).all())
