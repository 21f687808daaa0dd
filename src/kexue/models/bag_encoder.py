"""A sentence encoder without layers (词袋编码器): weighted sums of trained word vectors, on the unit sphere.

    z = normalise( sum over distinct words w of  exp(a_w) (1 + log tf_w) E_w )

The table E (V, D) and the log-weights a (V,) are trained together, so a word learns how much it counts as well as what
it means. On text of one field this wins against far larger general models (their words are not its words), encodes
40 000 documents in seconds on one core, and every score falls apart into contributions of single words.

What differs from ``nn.EmbeddingBag``: repeated words are counted inside the call, the weights have gradients, and the
gradients come out as sorted sparse tensors that hold the rows of this batch only. A step therefore costs what the
batch costs, not what the vocabulary costs; :class:`RowAdam` keeps it so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from kexue._checks import check_int, check_real
from kexue._files import atomic_path, write_json
from kexue.models._bags import FAST, count_words, sum_rows
from kexue.words._numba import compiled

FORMAT = 1


@runtime_checkable
class RaggedRows(Protocol):
    """Rows of ids: row i is ``values[offsets[i]:offsets[i + 1]]``."""

    @property
    def values(self) -> NDArray[np.int32]:
        """All rows one after another."""

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where each row starts, and the end."""


@compiled(fastmath=FAST)
def _gradients(ids, weights, offsets, table, scale, upstream):  # type: ignore[no-untyped-def]
    """The distinct words of the batch in ascending order, and the gradients of their rows and log-weights."""
    size, width = table.shape
    count = np.zeros(size, np.int64)
    for t in range(len(ids)):
        count[ids[t]] += 1
    words = np.flatnonzero(count)
    start = np.zeros(len(words) + 1, np.int64)
    place = count  # reused: where the next entry of the word goes
    for u in range(len(words)):
        start[u + 1] = start[u] + count[words[u]]
        place[words[u]] = start[u]
    rows = np.empty(len(ids), np.int64)
    factors = np.empty(len(ids), np.float32)
    for row in range(len(offsets) - 1):
        for t in range(offsets[row], offsets[row + 1]):
            entry = place[ids[t]]
            place[ids[t]] += 1
            rows[entry] = row
            factors[entry] = weights[t]
    d_table = np.zeros((len(words), width), np.float32)
    d_log = np.empty(len(words), np.float32)
    for u in range(len(words)):
        gradient = d_table[u]
        for entry in range(start[u], start[u + 1]):
            factor = factors[entry]
            vector = upstream[rows[entry]]
            for d in range(width):
                gradient[d] += factor * vector[d]
        vector = table[words[u]]
        factor = scale[words[u]]
        product = np.float32(0)
        for d in range(width):
            product += gradient[d] * vector[d]
            gradient[d] *= factor
        d_log[u] = product * factor
    return words, d_table, d_log


class _BagSum(torch.autograd.Function):
    """sum_t exp(log_weight[ids_t]) weights_t table[ids_t] for each row, with row-sparse gradients (float32, CPU)."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, log_weight: Tensor, ids: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        scale = log_weight.detach().exp()
        out = torch.zeros(len(offsets) - 1, table.shape[1])
        arrays = (ids.numpy(), weights.numpy(), offsets.numpy(), table.detach().numpy(), scale.numpy())
        sum_rows(arrays[0], arrays[1], arrays[2], arrays[3], arrays[4], out.numpy())
        ctx.arrays = arrays
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        ids, weights, offsets, values, scale = ctx.arrays
        words, d_table, d_log = _gradients(ids, weights, offsets, values, scale, upstream[0].contiguous().numpy())
        index, shape = torch.from_numpy(words)[None], ctx.arrays[3].shape
        table = torch.sparse_coo_tensor(
            index, torch.from_numpy(d_table), shape, is_coalesced=True, check_invariants=False
        )
        log = torch.sparse_coo_tensor(
            index, torch.from_numpy(d_log), shape[:1], is_coalesced=True, check_invariants=False
        )
        return table, log, None, None, None


class BagEncoder(nn.Module):
    """Encode texts by weighted sums of word vectors.

    Args:
        vocabulary: The V words.
        dim: Width D.
        tokenizer: Text -> tokens; needed by :meth:`encode` only.

    Raises:
        ValueError: ``vocabulary`` is empty or has a word twice, or ``dim`` is below 1.

    Example:
        >>> encoder = BagEncoder(["matrix", "norm", "vector"], dim=8, tokenizer=str.split)
        >>> encoder.encode(["matrix norm", "vector norm", ""]).shape
        (3, 8)
    """

    def __init__(
        self, vocabulary: Sequence[str], dim: int = 256, *, tokenizer: Callable[[str], list[str]] | None = None
    ) -> None:
        super().__init__()
        check_int("dim", dim, 1)
        self.vocabulary = list(vocabulary)
        self.ids = {word: number for number, word in enumerate(self.vocabulary)}
        if not self.vocabulary or len(self.ids) != len(self.vocabulary):
            raise ValueError(
                f"vocabulary must hold distinct words, at least one; got {len(self.vocabulary)} words, "
                f"{len(self.ids)} distinct"
            )
        self.tokenizer = tokenizer
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(len(self.vocabulary), dim, generator=generator) / dim**0.5
        self.table = nn.Parameter(table)
        self.log_weight = nn.Parameter(torch.zeros(len(self.vocabulary)))

    @property
    def dim(self) -> int:
        """Width D of the vectors."""
        return self.table.shape[1]

    def forward(self, ids: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        """Encode rows of distinct words.

        Args:
            ids: Words, ``(n,)``; each at most once in a row.
            weights: 1 + log tf of each, ``(n,)``.
            offsets: Row i is ``[offsets[i], offsets[i + 1])``, ``(N + 1,)``.

        Returns:
            Rows of length 1 (0 for a row without words), ``(N, D)``.
        """
        if self.table.device.type == "cpu" and self.table.dtype == torch.float32:
            total = _BagSum.apply(self.table, self.log_weight, ids.int(), weights.float(), offsets.long())
        else:
            scaled = (self.log_weight[ids].exp() * weights.to(self.table.dtype))[:, None] * self.table[ids]
            rows = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=ids.device), offsets.diff())
            total = torch.zeros(len(offsets) - 1, self.dim, dtype=scaled.dtype, device=ids.device)
            total = total.index_add(0, rows, scaled)
        return F.normalize(total, dim=-1)

    @torch.no_grad()
    def encode_ids(self, rows: RaggedRows, block: int = 4096) -> NDArray[np.float32]:
        """Encode ragged rows of ids, repeated words counted; ``(N, D)`` float32.

        Args:
            rows: Anything with ``values`` and ``offsets``.
            block: Rows at a time: bounds the working memory.

        Raises:
            ValueError: An id is outside the vocabulary.
        """
        check_int("block", block, 1)
        n = len(rows.offsets) - 1
        out = np.empty((n, self.dim), np.float32)
        for first in range(0, n, block):
            last = min(first + block, n)
            begin = int(rows.offsets[first])
            values = np.ascontiguousarray(rows.values[begin : int(rows.offsets[last])], np.int32)
            if len(values) and not 0 <= values.min() <= values.max() < len(self.vocabulary):
                raise ValueError(
                    f"ids must be in [0, {len(self.vocabulary)}); got {int(values.min())} to {int(values.max())}"
                )
            offsets = np.ascontiguousarray(rows.offsets[first : last + 1], np.int64) - begin
            batch = (torch.from_numpy(part) for part in count_words(values, offsets, len(self.vocabulary)))
            out[first:last] = self(*(part.to(self.table.device) for part in batch)).float().cpu().numpy()
        return out

    def lookup(self, tokens: Iterable[str]) -> NDArray[np.int32]:
        """Ids of the known ones among ``tokens``."""
        return np.array([self.ids[token] for token in tokens if token in self.ids], np.int32)

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode texts; a text without a known word gives a row of zeros. ``(N, D)`` float32.

        Raises:
            TypeError: ``texts`` is a single string, or the encoder was made without a tokenizer.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of strings; got one string, write [text]")
        if self.tokenizer is None:
            raise TypeError("this encoder has no tokenizer; pass tokenizer= when you make or load it")
        rows = [self.lookup(self.tokenizer(text)) for text in texts]
        return self.encode_ids(_Rows(rows))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``encoder.safetensors``, ``vocabulary.txt`` and, last, ``encoder.json`` into ``folder``."""
        from safetensors.torch import save_file

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        with atomic_path(target / "encoder.safetensors") as temporary:
            save_file({key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}, temporary)
        with atomic_path(target / "vocabulary.txt") as temporary:
            temporary.write_text("".join(word + "\n" for word in self.vocabulary), encoding="utf-8", newline="\n")
        write_json(target / "encoder.json", {"format": FORMAT, "kind": "bag", "dim": self.dim})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], tokenizer: Callable[[str], list[str]] | None = None) -> BagEncoder:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: The folder holds something else, another format version, or weights that do not fit.
        """
        from safetensors.torch import load_file

        source = Path(folder)
        if not (source / "encoder.json").exists():
            raise ValueError(f"{source} holds no encoder: encoder.json is missing")
        head = json.loads((source / "encoder.json").read_text(encoding="utf-8"))
        if (head.get("format"), head.get("kind")) != (FORMAT, "bag"):
            found = f"format {head.get('format')!r}, kind {head.get('kind')!r}"
            raise ValueError(f"{source / 'encoder.json'}: expected format {FORMAT}, kind 'bag'; got {found}")
        vocabulary = (source / "vocabulary.txt").read_text(encoding="utf-8").split("\n")[:-1]
        weights = load_file(source / "encoder.safetensors")
        shapes = {key: tuple(value.shape) for key, value in weights.items()}
        expected = {"table": (len(vocabulary), head["dim"]), "log_weight": (len(vocabulary),)}
        if shapes != expected:
            raise ValueError(f"{source / 'encoder.safetensors'}: expected {expected}, got {shapes}")
        encoder = cls(vocabulary, head["dim"], tokenizer=tokenizer)
        encoder.load_state_dict(weights, strict=True)
        return encoder


class _Rows:
    def __init__(self, rows: list[NDArray[np.int32]]) -> None:
        self.values = np.concatenate(rows) if rows else np.empty(0, np.int32)
        self.offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)


@compiled(fastmath=FAST)
def _adam_rows(words, gradient, values, first, second, rate, beta1, beta2, scale1, scale2, eps):  # type: ignore[no-untyped-def]
    one = np.float32(1)
    width = values.shape[1]
    for u in range(len(words)):
        g, x, m, v = gradient[u], values[words[u]], first[words[u]], second[words[u]]
        for d in range(width):
            m[d] = beta1 * m[d] + (one - beta1) * g[d]
            v[d] = beta2 * v[d] + (one - beta2) * g[d] * g[d]
            x[d] -= rate * (m[d] * scale1) / (np.sqrt(v[d] * scale2) + eps)


def _sorted_rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and values of a sparse gradient, each row once. autograd forgets that a gradient is coalesced; it need not
    be sorted again when its rows ascend.
    """
    rows = gradient._indices()[0]
    if not bool((rows[1:] > rows[:-1]).all()):
        gradient = gradient.coalesce()
    return gradient._indices()[0], gradient._values()


class RowAdam(torch.optim.Optimizer):
    """Adam that touches only the rows with a gradient (lazy Adam), in one pass over them.

    The rule of ``torch.optim.SparseAdam``: moments of rows without a gradient stay as they are, the bias correction
    counts all steps. float32 parameters on the CPU take one fused pass; all others go through torch operations.

    Args:
        params: Parameters whose gradients are sparse tensors, one or two dimensions.
        lr: Learning rate.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.

    Example:
        >>> table = nn.Parameter(torch.zeros(3, 2))
        >>> table.grad = torch.sparse_coo_tensor([[1]], [[1.0, -1.0]], (3, 2), check_invariants=True)
        >>> RowAdam([table], lr=0.5).step()
        >>> table[1].allclose(torch.tensor([-0.5, 0.5])), table[0].tolist()
        (True, [0.0, 0.0])
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.98), eps: float = 1e-8
    ) -> None:
        check_real("lr", lr, minimum=0.0)
        check_real("eps", eps, above=0.0)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1); got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the rows that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (beta1, beta2), rate, eps = group["betas"], float(group["lr"]), group["eps"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not parameter.grad.is_sparse:
                    raise ValueError("RowAdam expects sparse gradients; got a dense one, use torch.optim.AdamW for it")
                words, values = _sorted_rows(parameter.grad)
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                scale1, scale2 = 1 / (1 - beta1 ** state["step"]), 1 / (1 - beta2 ** state["step"])
                first, second = state["exp_avg"], state["exp_avg_sq"]
                if parameter.device.type == "cpu" and parameter.dtype == torch.float32:
                    wide = [x.detach().view(len(x), -1).numpy() for x in (values, parameter, first, second)]
                    settings = [np.float32(x) for x in (rate, beta1, beta2, scale1, scale2, eps)]
                    kernel: Any = _adam_rows
                    kernel(words.numpy(), *wide, *settings)
                    continue
                m = beta1 * first[words] + (1 - beta1) * values
                v = beta2 * second[words] + (1 - beta2) * values.square()
                first[words], second[words] = m, v
                parameter[words] -= rate * (m * scale1) / ((v * scale2).sqrt() + eps)
        return loss
