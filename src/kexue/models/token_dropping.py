"""DropToken (训练时随机丢弃 token): dropping tokens in training, and its equivalence with masked attention columns.

Source: 科学空间 8770 (Dropout视角下的MLM和MAE:一些新的启发); He et al. 2021, Masked Autoencoders (arXiv 2111.06377).

An encoder that sees only the kept tokens, at their original positions, computes what it computes on all of them with
the attention columns of the dropped ones set to 0 and the rows renormalised, in every layer. In expectation over the
dropped set this changes nothing (Norm(A p) = A), so that nothing has to be rescaled when the dropping ends; and the
encoder gets shorter: the linear maps cost (1 - r) of before, attention (1 - r)^2.

    row with n tokens, rate r: k = ceil((1 - r) n) are kept, a random set of this size, in their order

Protected tokens ([CLS], [SEP]) are never dropped, padding goes first. What differs from PatchDropout, the layer of timm
for images: ids are dropped before the embedding lookup and not after it; text with padding keeps its share of real
tokens (there, padding is drawn like a token); k is exact (``(1 - r) * n`` in floating point is above 3 for .7 and 10).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kexue._checks import check_choice, check_int, check_real
from kexue.attention.gated_attention import check_padding_mask
from kexue.models._sampling import check_generator
from kexue.models.kept_tokens import check_tokens, gather_rows, gather_tokens

__all__ = [
    "DropToken",
    "DroppedTokens",
    "column_mask_equivalent",
    "drop_token",
]

MODES = ("fixed", "dense", "bernoulli")
SCHEDULES = ("constant", "linear")


class DroppedTokens(NamedTuple):
    """What is left of a batch.

    Attributes:
        tokens: (B, K) ids or (B, K, ...) vectors.
        position_ids: (B, K) original positions.
        attention_mask: (B, K), 0 or False where a slot holds no token of the row; in the dtype of the mask that was
            given, bool if none was. If nothing was dropped it is what was given, also None.
        kept: (B, K) int64, places in the row, rising; for :func:`gather_tokens` and :func:`gather_attention_bias`.

    Example:
        >>> dropped = drop_token(torch.tensor([[5, 6, 7, 8]]), 0.5, generator=torch.Generator().manual_seed(0))
        >>> dropped.tokens.shape, bool(dropped.attention_mask.all())
        (torch.Size([1, 2]), True)
    """

    tokens: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    kept: Tensor


def _check_rate(rate: Any) -> None:
    check_real("rate", rate, minimum=0.0)
    if rate >= 1:
        raise ValueError(f"rate must be below 1; got {rate!r}")


def _check_protect(protect: Any) -> tuple[int, ...]:
    """Ids as integers; a tokenizer stands for its special tokens."""
    ids = getattr(protect, "all_special_ids", protect)
    if isinstance(ids, Tensor):
        ids = ids.reshape(-1).tolist()
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise TypeError(f"protect must be token ids or a tokenizer; got {type(protect).__name__}")
    listed = list(ids)
    for number in listed:
        check_int("an id of protect", number, 0)
    return tuple(sorted({int(number) for number in listed}))


def _share(n: Any, rate: float) -> Any:
    """ceil((1 - rate) n) of a number or a tensor, 1 at least of something.

    What floating point adds to a whole number does not count.
    """
    if isinstance(n, Tensor):
        wide = n.to(torch.float32 if n.device.type == "mps" else torch.float64)
        return torch.maximum(torch.ceil(wide * (1 - rate) - 1e-9).to(n.dtype), n.clamp(max=1))
    return max(math.ceil(n * (1 - rate) - 1e-9), min(n, 1))


def _positions(position_ids: Any, shape: tuple[int, int], device: torch.device) -> Tensor:
    if position_ids is None:
        return torch.arange(shape[1], device=device).expand(shape)
    if not isinstance(position_ids, Tensor) or position_ids.is_floating_point():
        got = position_ids.dtype if isinstance(position_ids, Tensor) else type(position_ids).__name__
        raise TypeError(f"position_ids must be a tensor of integers; got {got}")
    if tuple(position_ids.shape) not in (shape, (1, shape[1]), (shape[1],)):
        raise ValueError(f"position_ids must be {shape} or ({shape[1]},); got shape {tuple(position_ids.shape)}")
    return position_ids.expand(shape)


def _must_stay(
    tokens: Tensor, valid: Tensor | None, protect: tuple[int, ...], prefix: int, protected: Any
) -> Tensor | None:
    """(B, T) True where a token must stay, or None if that is nowhere."""
    shape = (tokens.shape[0], tokens.shape[1])
    must = None
    if protect:
        if tokens.dim() != 2 or tokens.is_floating_point() or tokens.is_complex():
            raise ValueError(
                "protect names token ids, and tokens are vectors: give protected=(B, T) bool or prefix= instead; got "
                f"tokens of shape {tuple(tokens.shape)}, {tokens.dtype}"
            )
        must = torch.isin(tokens, torch.tensor(protect, device=tokens.device))
    if protected is not None:
        given = check_padding_mask("protected", protected, shape)
        must = given if must is None else must | given
    if prefix:
        first = (torch.arange(shape[1], device=tokens.device) < prefix).expand(shape)
        must = first if must is None else must | first
    return must if must is None or valid is None else must & valid


def _slots(needed: Tensor, most: int) -> int:
    """How many slots hold the tokens of every row: a number that the shape of a tensor depends on."""
    return max(1, int(needed.max())) if len(needed) else most


def _places(kept: Tensor, valid: Tensor, slots: int) -> Tensor:
    """Places of the kept tokens, (B, slots), rising.

    Slots that are left over take padding, and a dropped token (masked) only where a row has no padding.
    """
    rank = kept.to(torch.int8) * 2 + (~valid).to(torch.int8)
    return rank.argsort(stable=True, dim=1, descending=True)[:, :slots].sort(1).values


def _choose(
    keys: Tensor, valid: Tensor | None, must: Tensor | None, rate: float, mode: str
) -> tuple[Tensor, Tensor | None]:
    """Places that are kept, (B, K), and which of these hold a token (None: all do)."""
    rows, length = keys.shape
    most = _share(length, rate)
    if valid is None and must is None and mode != "bernoulli":
        return keys.topk(most, 1).indices.sort(1).values, None
    valid = torch.ones_like(keys, dtype=torch.bool) if valid is None else valid
    must = torch.zeros_like(valid) if must is None else must
    order = (keys + must.to(keys.dtype)).masked_fill(~valid, -1.0)
    n, least = valid.sum(1), must.sum(1)
    if mode == "bernoulli":
        kept = must | (valid & (keys >= rate))
        best = torch.zeros_like(valid).scatter_(1, order.argmax(1, keepdim=True), True) & valid
        kept = torch.where(kept.any(1, keepdim=True), kept, best)
        slots = _slots(kept.sum(1), length)
        return _take(kept, valid, slots)
    if mode == "dense":
        share = -(-_share(n.sum(), rate) // max(rows, 1))  # of the tokens of all rows
        slots = _slots(torch.maximum(torch.minimum(n, share), least), most)
        k = n.clamp(max=slots)
    else:
        k = torch.maximum(_share(n, rate), least)
        if torch.compiler.is_compiling():  # static: rows need no more, unless more of their tokens are protected
            torch._assert_async((k <= most).all(), f"a row has more protected tokens than the {most} that are kept")
            slots = most
        else:
            slots = _slots(k, most)
    in_use = torch.arange(slots, device=k.device) < k[:, None]
    kept = torch.zeros_like(valid).scatter_(1, order.topk(slots, 1).indices, in_use)
    return _take(kept, valid, slots)


def _take(kept: Tensor, valid: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    places = _places(kept, valid, slots)
    return places, kept.gather(1, places)


def _drop(
    tokens: Tensor,
    rate: float,
    attention_mask: Any,
    protect: tuple[int, ...],
    prefix: int,
    protected: Any,
    position_ids: Any,
    mode: str,
    generator: Any,
) -> DroppedTokens:
    shape = check_tokens(tokens)
    valid = None if attention_mask is None else check_padding_mask("attention_mask", attention_mask, shape)
    must = _must_stay(tokens, valid, protect, prefix, protected)
    positions = _positions(position_ids, shape, tokens.device)
    if generator is not None:
        check_generator(generator, tokens.device)
    if rate == 0 or shape[1] == 0:
        return DroppedTokens(
            tokens, positions, attention_mask, torch.arange(shape[1], device=tokens.device).expand(shape)
        )
    keys = torch.rand(shape, device=tokens.device, generator=generator)
    kept, mask = _choose(keys, valid, must, rate, mode)
    if mask is None:
        mask = torch.ones_like(kept, dtype=torch.bool)
    if attention_mask is not None:
        mask = mask.to(attention_mask.dtype)
    places = kept if position_ids is None else positions.gather(1, kept)
    return DroppedTokens(gather_rows(tokens, kept), places, mask, kept)


def drop_token(
    tokens: Tensor,
    rate: float,
    attention_mask: Tensor | None = None,
    *,
    protect: Any = (),
    prefix: int = 0,
    protected: Tensor | None = None,
    position_ids: Tensor | None = None,
    mode: str = "fixed",
    generator: torch.Generator | None = None,
) -> DroppedTokens:
    """Keep a random part of the tokens of each row, with their positions.

    Args:
        tokens: (B, T) ids, or (B, T, ...) vectors such as image patches before their projection.
        rate: r, the share that is dropped, 0 <= r < 1. 0 returns what was given.
        attention_mask: (B, T), 1 or True where there is a token; None: everywhere. Padding is dropped first.
        protect: Ids that are never dropped, or a tokenizer, which stands for its special tokens.
        prefix: So many tokens at the start of a row are never dropped: 1 for a class token in front of patches.
        protected: (B, T), 1 or True for further tokens that are never dropped.
        position_ids: (B, T) or (T,) positions; None: 0 to T - 1. RoBERTa's kin count from padding_idx + 1.
        mode: "fixed": each row of n tokens keeps ceil((1 - r) n), at least one and at least the protected ones; K is
            the most of any row. "dense": each row keeps K = ceil((1 - r) mean n) tokens, or all if it has no more: no
            slot is wasted when lengths differ, long rows lose more than short ones. "bernoulli": each token is dropped
            by itself, but one stays.
        generator: Source of randomness on the device of ``tokens``; None: torch's global one.

    Returns:
        ``tokens, position_ids, attention_mask, kept``, see :class:`DroppedTokens`.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: A value or a shape out of range, or ids to protect when tokens are vectors.

    Reference:
        https://spaces.ac.cn/archives/8770

    Example:
        >>> ids = torch.tensor([[101, 5, 6, 7, 102], [101, 8, 102, 0, 0]])
        >>> tokens, positions, mask, kept = drop_token(ids, 0.4, (ids != 0).long(), protect=(101, 102))
        >>> tokens.shape, mask.sum(1), tokens[1]  # two of the three in the second row, which are protected
        (torch.Size([2, 3]), tensor([3, 2]), tensor([101, 102,   0]))
    """
    _check_rate(rate)
    check_choice("mode", mode, MODES)
    check_int("prefix", prefix, 0)
    check_tokens(tokens)
    ids = _check_protect(protect)
    return _drop(tokens, float(rate), attention_mask, ids, prefix, protected, position_ids, mode, generator)


class DropToken(nn.Module):
    """Drop tokens in training, so that a text encoder is regularised and a training step is faster.

    In front of the encoder: ``ids, pos, mask, idx = drop(input_ids, attention_mask)``, then the encoder on ``ids`` with
    ``position_ids=pos, attention_mask=mask``. In evaluation mode nothing happens. Rates of .1 to .15 are recommended
    for texts of which every token matters, more for long ones. Randomness comes from torch's global generator, which
    :func:`kexue.training.fit` seeds for each step: an interrupted run goes on with the same tokens.

    ``torch.compile(fullgraph=True)`` works for mode "fixed" and the constant schedule, where K = ceil((1 - r) T).

    Args:
        rate: r, 0 <= r < 1.
        protect: As in :func:`drop_token`; [CLS] and [SEP] should be here.
        prefix: As in :func:`drop_token`.
        mode: As in :func:`drop_token`.
        schedule: "constant", or "linear": from 0 in the first call to r after ``steps`` calls in training mode. The
            number of calls is a buffer, saved with the model.
        steps: Length of the linear schedule.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: A value out of range.

    Reference:
        https://spaces.ac.cn/archives/8770

    Example:
        >>> drop = DropToken(0.5, protect=(101, 102))
        >>> input_ids = torch.tensor([[101, 5, 6, 7, 8, 102]])
        >>> ids, pos, mask, idx = drop(input_ids, torch.ones_like(input_ids))
        >>> ids.shape, ids[0, 0], pos[0, -1]
        (torch.Size([1, 3]), tensor(101), tensor(5))
        >>> drop.eval()(input_ids).tokens is input_ids
        True
    """

    calls: Tensor

    def __init__(
        self,
        rate: float,
        protect: Any = (),
        *,
        prefix: int = 0,
        mode: str = "fixed",
        schedule: str = "constant",
        steps: int | None = None,
    ) -> None:
        super().__init__()
        _check_rate(rate)
        check_int("prefix", prefix, 0)
        check_choice("mode", mode, MODES)
        check_choice("schedule", schedule, SCHEDULES)
        if (steps is None) != (schedule == "constant"):
            wanted = "an integer" if schedule == "linear" else "None"
            raise ValueError(f"steps must be {wanted} for the {schedule} schedule; got {steps!r}")
        if steps is not None:
            check_int("steps", steps, 1)
        self.rate, self.prefix, self.mode, self.schedule, self.steps = float(rate), prefix, mode, schedule, steps
        self.protect = _check_protect(protect)
        if schedule == "linear":
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        """The settings."""
        parts = [f"{self.rate:g}"]
        if self.protect:
            parts.append(f"protect={self.protect}")
        if self.prefix:
            parts.append(f"prefix={self.prefix}")
        if self.mode != "fixed":
            parts.append(f"mode={self.mode!r}")
        if self.steps is not None:
            parts.append(f"schedule='linear', steps={self.steps}")
        return ", ".join(parts)

    @property
    def current_rate(self) -> float:
        """The rate that the next call in training mode has."""
        if self.steps is None:
            return self.rate
        return self.rate * min(1.0, int(self.calls) / self.steps)

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        protected: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> DroppedTokens:
        """Drop tokens of a batch, or return it as it is in evaluation mode.

        Args:
            tokens: As in :func:`drop_token`.
            attention_mask: As in :func:`drop_token`.
            position_ids: As in :func:`drop_token`.
            protected: As in :func:`drop_token`.
            generator: As in :func:`drop_token`.

        Returns:
            ``tokens, position_ids, attention_mask, kept``, see :class:`DroppedTokens`.
        """
        rate = self.current_rate if self.training else 0.0
        out = _drop(
            tokens, rate, attention_mask, self.protect, self.prefix, protected, position_ids, self.mode, generator
        )
        if self.training and self.steps is not None:
            self.calls += 1
        return out


def _compared(output: Any) -> Tensor:
    """The tensor that a model returned, or its hidden states, or its logits."""
    for name in ("last_hidden_state", "logits"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise TypeError(f"the model must return a tensor, last_hidden_state or logits; got {type(output).__name__}")
    return first


@torch.no_grad()
def column_mask_equivalent(
    model: Callable[..., Any],
    tokens: Tensor,
    dropped: DroppedTokens,
    *,
    position_ids: Tensor | None = None,
    **inputs: Any,
) -> float:
    """How far an encoder on the kept tokens is from itself on all tokens with the columns of the dropped ones masked.

    The two are the same function, so that this is the rounding of the arithmetic: below 1e-5 in float32, whatever the
    number of layers. More means that the model looks at tokens in another way than by attention at given positions
    (convolutions, positions counted inside, statistics over the row): dropping tokens then changes what it computes.

    Args:
        model: A transformers or kexue model, or a callable, that takes ``(tokens, attention_mask=(B, T) bool,
            position_ids=(B, T))``; vectors go to ``inputs_embeds`` where there is such an argument. A module is in
            evaluation mode meanwhile.
        tokens: (B, T) or (B, T, ...), all tokens.
        dropped: What :func:`drop_token` made of them.
        position_ids: As given to :func:`drop_token`.
        **inputs: More arguments; tensors (B, T, ...) are reduced to the kept tokens for the short run.

    Returns:
        The largest absolute difference, over the kept tokens if the model returns something for each token, else over
        the rows that have a token.

    Raises:
        TypeError: Wrong kind of argument or output.
        ValueError: ``dropped`` belongs to other tokens, or the outputs have shapes that do not fit.

    Reference:
        https://spaces.ac.cn/archives/8770

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8, vocab_size=9)
        >>> model, ids = BertModel(BertConfig(**sizes)), torch.randint(1, 9, (2, 10))
        >>> column_mask_equivalent(model, ids, drop_token(ids, 0.75)) < 1e-5
        True
    """
    rows, length = check_tokens(tokens)
    if not isinstance(dropped, DroppedTokens):
        raise TypeError(f"dropped must come from drop_token; got {type(dropped).__name__}")
    kept, shape = dropped.kept, (rows, length)
    if not torch.equal(gather_tokens(tokens, kept), dropped.tokens):
        raise ValueError("dropped must be made of these tokens; got others")
    mask = dropped.attention_mask
    taken = torch.ones_like(kept, dtype=torch.bool) if mask is None else mask != 0
    columns = torch.zeros(shape, dtype=torch.bool, device=tokens.device).scatter_(1, kept, taken)
    forward = model.forward if isinstance(model, nn.Module) else model
    vectors = tokens.is_floating_point() and "inputs_embeds" in inspect.signature(forward).parameters
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    flags = [(module, module.training) for module in modules]

    def run(x: Tensor, mask: Tensor, positions: Tensor, more: dict[str, Any]) -> Tensor:
        arguments = {"attention_mask": mask, "position_ids": positions, **more}
        return _compared(model(inputs_embeds=x, **arguments) if vectors else model(x, **arguments))

    short = {
        name: gather_tokens(x, kept) if isinstance(x, Tensor) and x.shape[:2] == shape else x
        for name, x in inputs.items()
    }
    try:
        for module in modules:
            module.training = False
        whole = run(tokens, columns, _positions(position_ids, shape, tokens.device), inputs)
        part = run(dropped.tokens, taken, dropped.position_ids, short)
    finally:
        for module, flag in flags:
            module.training = flag
    if part.dim() > 1 and part.shape[:2] == kept.shape and whole.shape[:2] == shape:
        whole, part = gather_tokens(whole, kept)[taken], part[taken]
    elif part.shape == whole.shape and part.shape[:1] == (rows,):
        whole, part = whole[taken.any(1)], part[taken.any(1)]
    else:
        raise ValueError(f"outputs must be (B, T, ...) or (B, ...); got {tuple(whole.shape)} and {tuple(part.shape)}")
    return float((whole.double() - part.double()).abs().max()) if whole.numel() else 0.0
