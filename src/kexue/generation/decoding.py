"""Batched decoding with a static cache (静态缓存批量解码): the engine behind ``generate_fast``.

    prompts without repetitions -> their common beginning once -> the rest of each -> one row of the cache for each
    output -> until all have ended: logits -> filters -> a token a row -> one step

A step takes tokens, each with its row and position, and nothing else: prompts of different lengths need no padding and
no mask, a row never influences another one, and rows that have ended cost nothing. For float32 on the CPU a step is
one compiled call (:mod:`kexue.generation._decode_kernel`); for other dtypes and devices it is torch's operations.

Shapes: N tokens, M of them asked for the next token, V vocabulary, D width, H heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kexue._tensors import compute_dtype
from kexue.attention._threads import run_parts
from kexue.generation._decode_kernel import ACTIVATIONS, LAYER_FIELDS, MODEL_FIELDS, step
from kexue.generation._decoder_weights import Named, Weights, read_weights
from kexue.generation.cache import KVCache
from kexue.models import KexueForCausalLM

__all__ = ["Decoder", "common_prefix"]

_CHUNK = 2048  # tokens of prompts that advance together: scratch memory is this times (6 D + F) numbers
_WORTH_A_THREAD = 2**22  # weights times tokens of a step below which a second thread does not pay
_SHORTEST_PREFIX = 8


class Decoder:
    """A model and the cache of the sequences that are being continued.

    Args:
        model: The language model; its weights are used where they are.
        int8: Use matrices rounded to int8, one scale a row.
        kernel: False: torch's operations also where the compiled step could be used.
        limit: Tokens that no sequence will exceed; None: not known.

    Example:
        >>> from kexue.models import KexueConfig
        >>> config = KexueConfig(30, hidden_size=16, num_layers=1, num_heads=2, attn_mode="causal")
        >>> decoder = Decoder(KexueForCausalLM(config))
        >>> decoder.start([[3, 4, 5], [6]]).shape  # logits of the next token
        torch.Size([2, 30])
        >>> decoder.advance([0, 1], [7, 8]).shape
        torch.Size([2, 30])
    """

    def __init__(
        self, model: KexueForCausalLM, int8: bool = False, kernel: bool = True, limit: int | None = None
    ) -> None:
        self.weights = read_weights(model, int8)
        self.config, self.limit = model.config, limit
        self.lengths: list[int] = []
        self._steps: _KernelSteps | _TorchSteps
        self._steps = _KernelSteps(self.weights) if kernel and self.weights.on_kernel() else _TorchSteps(self.weights)

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Take in prompts, one row each; what all of them begin with is computed once. (B, V) logits."""
        config, table = self.config, self.weights.table
        shared = common_prefix(prompts)
        longest = max(len(prompt) for prompt in prompts)
        self.cache = KVCache(
            config.num_layers, config.num_heads, config.hidden_size // config.num_heads,
            1 if shared else len(prompts), longest + 64 if self.limit is None else min(longest + 64, self.limit),
            self.limit, table.dtype, table.device, isinstance(self._steps, _TorchSteps),
        )  # fmt: skip
        self.lengths = [0] * self.cache.rows
        if shared:
            self._take([0] * shared, list(prompts[0][:shared]), [])
            self.select([0] * len(prompts))
        rows = [row for row, prompt in enumerate(prompts) for _ in prompt[shared:]]
        tokens = [token for prompt in prompts for token in prompt[shared:]]
        ends = np.cumsum([len(prompt) - shared for prompt in prompts]) - 1
        return self._take(rows, tokens, ends.tolist())

    def advance(self, rows: list[int], tokens: list[int]) -> Tensor:
        """Append a token to each of the rows, which are distinct; (len(rows), V) logits."""
        return self._take(rows, tokens, list(range(len(rows))))

    def select(self, rows: list[int]) -> None:
        """Make row i of the cache the old row ``rows[i]``: repeat, reorder or drop rows."""
        self.cache.select(rows, max(self.lengths))
        self.lengths = [self.lengths[row] for row in rows]

    def _take(self, rows: list[int], tokens: list[int], wanted: list[int]) -> Tensor:
        """Tokens of a row in order; logits after the wanted ones (ascending)."""
        used = max(self.lengths)
        positions = []
        for row in rows:
            positions.append(self.lengths[row])
            self.lengths[row] += 1
        self.cache.reserve(max(self.lengths), used)
        parts = []
        for start in range(0, len(tokens), _CHUNK):
            stop = start + _CHUNK
            here = [i - start for i in wanted if start <= i < stop]
            parts.append(self._steps(tokens[start:stop], rows[start:stop], positions[start:stop], here, self.cache))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, at least one left over in each; 0 if that is not worth a step."""
    if len(prompts) < 2:
        return 0
    most = min(len(prompt) for prompt in prompts) - 1
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))  # what these two share, all share
    shared = next((i for i in range(most) if first[i] != last[i]), most)
    return shared if shared >= _SHORTEST_PREFIX else 0


class _KernelSteps:
    """Steps by the compiled function."""

    def __init__(self, weights: Weights) -> None:
        config = weights.config
        self.kept = weights  # whose addresses these are
        self.layers = np.array([_addresses(named, LAYER_FIELDS) for named in weights.layers], np.int64)
        self.model = np.array(_addresses(weights.model, MODEL_FIELDS), np.int64)
        self.vocabulary = len(weights.table)
        places = weights.model["position"]
        self.sizes = np.array(
            [
                config.hidden_size, config.num_heads, config.intermediate_size, self.vocabulary,
                0 if places is None else len(places), ACTIVATIONS.index(config.act), config.norm == "rms",
                config.post_norm,
            ],
            np.int64,
        )  # fmt: skip
        self.eps = np.float32(config.norm_eps)
        self.kind = np.empty(0, np.int8 if weights.int8 else np.float32)
        self.rope, self.rotation = config.position == "rope", np.empty((2, 0, 1), np.float32)
        width = config.hidden_size
        self.size = len(self.layers) * width * (4 * width + 3 * config.intermediate_size) + width * self.vocabulary

    def __call__(
        self, tokens: list[int], rows: list[int], positions: list[int], wanted: list[int], cache: KVCache
    ) -> Tensor:
        logits = torch.empty(len(wanted), self.vocabulary)
        if self.rope and self.rotation.shape[1] < cache.room:
            self.rotation = torch.stack(_rotation(self.kept.config, torch.arange(cache.room), torch.float32)).numpy()
        data, out = cache.data.numpy(), logits.numpy()
        ids, slots, places, ends = (np.array(x, np.int64) for x in (tokens, rows, positions, wanted))

        def run(part: slice, asked: slice) -> None:
            step(
                ids[part], slots[part], places[part], ends[asked] - part.start, data, self.layers, self.model,
                self.sizes, self.eps, self.kind, self.rotation, out[asked],
            )  # fmt: skip

        threads = torch.get_num_threads() if len(tokens) * self.size >= _WORTH_A_THREAD else 1
        cuts = _cuts(rows, threads) if threads > 1 else [0, len(tokens)]
        asked = np.searchsorted(ends, cuts)

        def part(i: int) -> None:
            run(slice(cuts[i], cuts[i + 1]), slice(asked[i], asked[i + 1]))

        run_parts(part, len(cuts) - 1, True)
        return logits


def _cuts(rows: list[int], threads: int) -> list[int]:
    """Where to cut the tokens into parts of about equal size that share no row; a part has at least 8 tokens."""
    cuts, n = [0], len(rows)
    for part in range(1, min(threads, n // 8)):
        cut = n * part // min(threads, n // 8)
        while 0 < cut < n and rows[cut] == rows[cut - 1]:
            cut += 1
        if cuts[-1] < cut < n:
            cuts.append(cut)
    return [*cuts, n]


def _addresses(named: Named, fields: tuple[str, ...]) -> list[int]:
    return [0 if (x := named[field]) is None else x.data_ptr() for field in fields]


def _rotation(config: Any, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, d / 2) of the rotary positions of the stack."""
    width = config.hidden_size // config.num_heads
    steps = torch.arange(0, width, 2, device=positions.device, dtype=dtype) / width
    angles = positions.to(dtype)[:, None] * config.rope_base**-steps
    return angles.cos(), angles.sin()


class _TorchSteps:
    """Steps by torch's operations, for every device and dtype."""

    def __init__(self, weights: Weights) -> None:
        self.config, self.int8 = weights.config, weights.int8
        dtype = weights.table.dtype
        # Integers are multiplied out at once: the arithmetic is that of the kernel, the speed that of the plain model
        self.layers = [_multiplied(named, dtype) for named in weights.layers] if self.int8 else weights.layers
        self.model = _multiplied(weights.model, dtype) if self.int8 else weights.model

    @torch.no_grad()
    def __call__(
        self, tokens: list[int], rows: list[int], positions: list[int], wanted: list[int], cache: KVCache
    ) -> Tensor:
        config, model, device = self.config, self.model, cache.data.device
        ids, slots, places = (torch.tensor(x, dtype=torch.long, device=device) for x in (tokens, rows, positions))
        x = model["token"][ids]  # type: ignore[index]
        if model["position"] is not None:
            x = x + model["position"][places]
        if model["segment"] is not None:
            x = x + model["segment"]
        if model["embedding_norm"] is not None:
            x = self._norm(x, model, "embedding_norm")
        plan = _Plan(rows, positions, device)
        turn = None
        if config.position == "rope":
            turn = _rotation(config, places, compute_dtype(x))
        for index, layer in enumerate(self.layers):
            h = x if config.post_norm else self._norm(x, layer, "norm1")
            q, k, v = self._linear(h, layer, "qkv").unflatten(-1, (3, config.num_heads, -1)).unbind(1)
            if turn is not None:
                q, k = _turn(q, turn), _turn(k, turn)
            keys, values = cache.data[index, 0], cache.data[index, 1]
            keys[slots, :, places] = k
            values[slots, :, places] = v
            x = x + self._linear(plan.attend(q, keys, values).flatten(1), layer, "out")
            if config.post_norm:
                x = self._norm(x, layer, "norm1")
            h = x if config.post_norm else self._norm(x, layer, "norm2")
            up = self._linear(h, layer, "up")
            if config.act == "swiglu":
                up = F.silu(self._linear(h, layer, "gate")) * up
            else:
                up = _FUNCTIONS[config.act](up)
            x = x + self._linear(up, layer, "down")
            if config.post_norm:
                x = self._norm(x, layer, "norm2")
        x = x[torch.tensor(wanted, dtype=torch.long, device=device)]
        if model["final_norm"] is not None:
            x = self._norm(x, model, "final_norm")
        return self._linear(x, model, "head")

    def _norm(self, x: Tensor, named: Named, name: str) -> Tensor:
        shape, eps = (x.shape[-1],), self.config.norm_eps
        if self.config.norm == "rms":
            return F.rms_norm(x, shape, named[name], eps)
        return F.layer_norm(x, shape, named[name], named[f"{name}_bias"], eps)

    def _linear(self, x: Tensor, named: Named, name: str) -> Tensor:
        return F.linear(x, named[name], named[f"{name}_bias"])  # type: ignore[arg-type]


_FUNCTIONS = {
    "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "silu": F.silu,
}  # fmt: skip


def _multiplied(named: Named, dtype: torch.dtype) -> Named:
    made = dict(named)
    for name, value in named.items():
        if value is not None and value.dtype == torch.int8:
            scale = named[f"{name}_scale"]
            made[name] = (value.to(torch.float32) * scale[:, None]).to(dtype)  # type: ignore[index]
    return made


def _turn(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of (N, H, d), put out as halves."""
    cos, sin = (table[:, None] for table in tables)
    even, odd = x[..., 0::2].to(cos.dtype), x[..., 1::2].to(cos.dtype)
    return torch.cat([even * cos - odd * sin, even * sin + odd * cos], -1).to(x.dtype)


class _Plan:
    """How the tokens of a step, of several rows, become a batch (R, H, t, d) of queries, and back."""

    def __init__(self, rows: list[int], positions: list[int], device: torch.device) -> None:
        distinct = sorted(set(rows))
        number = {row: i for i, row in enumerate(distinct)}
        counts = [0] * len(distinct)
        places = []
        for row in rows:
            places.append(counts[number[row]])
            counts[number[row]] += 1
        self.shape = (len(distinct), max(counts, default=0))
        self.keys = max(positions, default=-1) + 1
        first = distinct[0] if distinct else 0
        whole = distinct == list(range(first, first + len(distinct)))
        self.slots: Any = slice(first, first + len(distinct)) if whole else torch.tensor(distinct, device=device)
        self.row = torch.tensor([number[row] for row in rows], dtype=torch.long, device=device)
        self.place = torch.tensor(places, dtype=torch.long, device=device)
        seen = torch.zeros(*self.shape, dtype=torch.long, device=device)  # queries that do not exist see one key
        seen[self.row, self.place] = torch.tensor(positions, dtype=torch.long, device=device)
        self.mask = (torch.arange(self.keys, device=device) <= seen[..., None])[:, None]

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(N, H, d) queries, (B, H, T, d) keys and values -> (N, H, d)."""
        batch = q.new_zeros(*self.shape, *q.shape[1:])
        batch[self.row, self.place] = q
        k, v = keys[self.slots, :, : self.keys], values[self.slots, :, : self.keys]
        out = F.scaled_dot_product_attention(batch.transpose(1, 2), k, v, attn_mask=self.mask)
        return out.transpose(1, 2)[self.row, self.place]
