"""Masked language modelling (掩码语言模型): which tokens are hidden, as a function of (seed, step, rank).

    each token (or word, or place in a span) is selected with probability ``rate``
    a selected token becomes [MASK], stays, or becomes a random token, with the probabilities ``split``
    labels: the token where it was selected, -100 elsewhere

Source: BERT (arXiv 1810.04805), whole words as in its later release, spans as in SpanBERT (arXiv 1907.10529).

What we do differently: the expected share of selected tokens is exactly ``rate`` in every mode and at every position.
SpanBERT draws spans until a budget is used up, whose first and last tokens are selected less often; here spans begin
with a constant rate, also before the start of a text (then only their end is inside), and the rate of beginnings is
solved for. Special tokens, padding and [MASK] itself are never selected, spans do not cross them, and an id outside the
vocabulary is an error here, not a crash of the GPU later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kexue._checks import check_int, check_real
from kexue.training._token_ids import check_id, check_ids, id_array, ranges
from kexue.training.numbering import batch_source
from kexue.training.order import numpy_generator

__all__ = ["MaskedBatches", "mask_tokens"]

WordStarts = Any  # bool array shaped as the ids, or a function ids -> such an array


def mask_tokens(
    input_ids: Any,
    seed: int = 0,
    step: int = 0,
    rank: int = 0,
    *,
    mask_token_id: int,
    vocab_size: int,
    special_ids: Sequence[int] = (),
    rate: float = 0.15,
    split: Sequence[float] = (0.8, 0.1, 0.1),
    attention_mask: Any = None,
    word_ids: Any = None,
    word_starts: WordStarts = None,
    mean_span: float | None = None,
    max_span: int = 10,
    random_ids: Sequence[int] | str | None = None,
    cu_seqlens: Any = None,
) -> tuple[Any, Any]:
    """Hide tokens that a model is to predict; the same arguments always hide the same ones.

    Args:
        input_ids: (B, T), or packed (N,); tensor, array or nested lists. It is not changed.
        seed: Seed of the run.
        step: Number of the step, or of the batch.
        rank: This process.
        mask_token_id: Id of [MASK].
        vocab_size: Size V of the vocabulary, which all ids have to be inside of.
        special_ids: Ids that are never selected, padding among them.
        rate: Probability that a token is selected; 0 selects none, 1 all that may be.
        split: Shares of the selected tokens that are masked, kept, and replaced at random; their sum is 1.
        attention_mask: Shaped as ``input_ids``, 1 or True = takes part; the rest is never selected.
        word_ids: Shaped as ``input_ids``: neighbours with the same number are one word and are selected together;
            negative = never selected.
        word_starts: Instead of ``word_ids``: True where a word begins, or a function that finds it from the ids.
        mean_span: Select runs of neighbouring tokens (with words: of words) whose lengths are geometric with this mean
            and at most ``max_span``; SpanBERT has 5. None: each by itself.
        max_span: Longest span.
        random_ids: What replaces at random: None, any id of the vocabulary; "ordinary", any that is neither special nor
            [MASK]; or a sequence of ids.
        cu_seqlens: (B + 1,) boundaries of packed texts; neither words nor spans cross them.

    Returns:
        Ids and int64 labels, shaped as ``input_ids`` and of its kind (tensor on the same device, or array).

    Raises:
        TypeError: Ids that are no integers, or settings of the wrong type.
        ValueError: Ids outside [0, V), which are named; a rate outside [0, 1]; a split that is negative or does not sum
            to 1; shapes that do not fit.

    Example:
        >>> ids = torch.tensor([[2, 11, 12, 13, 14, 3, 0, 0]])
        >>> hidden, labels = mask_tokens(ids, 0, 7, mask_token_id=4, vocab_size=30, special_ids=(0, 2, 3), rate=0.5)
        >>> hidden.tolist(), labels.tolist()
        ([[2, 11, 4, 13, 14, 3, 0, 0]], [[-100, -100, 12, -100, 14, -100, -100, -100]])
    """
    check_int("vocab_size", vocab_size, 1)
    mask_id = check_id("mask_token_id", mask_token_id, vocab_size)
    check_real("rate", rate, minimum=0.0)
    if rate > 1:
        raise ValueError(f"rate must be at most 1; got {rate!r}")
    masked, kept, _ = _check_split(split)
    ids = id_array("input_ids", input_ids)
    check_ids("input_ids", ids, vocab_size)
    if vocab_size - 1 > np.iinfo(ids.dtype).max:
        ids = ids.astype(np.int64)  # [MASK] or a random token may not fit
    if not hasattr(special_ids, "__iter__"):
        raise TypeError(f"special_ids must be a sequence of ids; got {special_ids!r}")
    special = id_array("special_ids", list(special_ids))
    check_ids("special_ids", special, vocab_size)
    barred = np.zeros(vocab_size, bool)
    barred[special] = True
    barred[mask_id] = True
    allowed = ~barred[ids]
    if attention_mask is not None:
        allowed &= _shaped("attention_mask", attention_mask, ids.shape).astype(bool)
    starts = _word_starts(ids, allowed, word_ids, word_starts)
    breaks = _text_starts(ids, cu_seqlens)
    generator = numpy_generator(seed, step, rank)
    place = np.flatnonzero(allowed)
    if starts is None and mean_span is None:
        place = place[generator.random(len(place), dtype=np.float32) < rate]
    else:
        place = _select_units(place, starts, breaks, float(rate), mean_span, max_span, generator)
    flat = ids.reshape(-1)
    labels = np.full(ids.size, -100, np.int64)
    labels[place] = flat[place]
    hidden = flat.copy()
    if masked == 1.0:
        hidden[place] = mask_id
    else:
        draw = generator.random(len(place))
        hidden[place[draw < masked]] = mask_id
        swapped = place[draw >= masked + kept] if split[2] > 0 else place[:0]
        hidden[swapped] = _random_ids(random_ids, barred, vocab_size, len(swapped), generator)
    return _like(hidden.reshape(ids.shape), input_ids), _like(labels.reshape(ids.shape), input_ids)


def _check_split(split: Sequence[float]) -> tuple[float, float, float]:
    if isinstance(split, str) or not hasattr(split, "__len__") or len(split) != 3:
        raise ValueError(f"split must be three shares (masked, kept, random); got {split!r}")
    for share in split:
        check_real("a share of split", share, minimum=0.0)
    masked, kept, swapped = (float(share) for share in split)
    if abs(masked + kept + swapped - 1.0) > 1e-6:
        raise ValueError(f"the shares of split must sum to 1; got {tuple(split)} with sum {masked + kept + swapped}")
    return masked, kept, swapped


def _shaped(name: str, values: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.shape != shape:
        raise ValueError(f"{name} must have the shape of input_ids, {shape}; got {array.shape}")
    return array


def _word_starts(ids: NDArray[Any], allowed: NDArray[Any], word_ids: Any, word_starts: Any) -> NDArray[Any] | None:
    """Where words begin, or None; ``allowed`` loses the tokens that belong to no word."""
    if word_ids is not None and word_starts is not None:
        raise ValueError("give word_ids or word_starts, not both")
    if word_ids is not None:
        numbers = _shaped("word_ids", word_ids, ids.shape)
        if numbers.dtype.kind not in "iu":
            raise TypeError(f"word_ids must be integers, negative for no word; got {numbers.dtype}")
        allowed &= numbers >= 0
        starts = np.ones(ids.shape, bool)
        starts[..., 1:] = numbers[..., 1:] != numbers[..., :-1]
        return starts.reshape(-1)
    if word_starts is None:
        return None
    starts = _shaped("word_starts", word_starts(ids) if callable(word_starts) else word_starts, ids.shape)
    if starts.dtype != bool:
        raise TypeError(f"word_starts must be booleans; got {starts.dtype}")
    return starts.reshape(-1)


def _text_starts(ids: NDArray[Any], cu_seqlens: Any) -> NDArray[np.bool_]:
    """Where a row, or a packed text, begins."""
    breaks = np.zeros(ids.size + 1, bool)
    if cu_seqlens is not None:
        bounds = id_array("cu_seqlens", cu_seqlens)
        good = ids.ndim == 1 and bounds.ndim == 1 and len(bounds) and bounds[0] == 0 and bounds[-1] == ids.size
        if not good or (np.diff(bounds) < 0).any():
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of packed tokens; input_ids has shape {ids.shape}, got "
                f"{bounds.tolist()[:8]}"
            )
        breaks[bounds] = True
    elif ids.ndim and ids.size:
        breaks[:: ids.shape[-1]] = True
    return breaks[:-1]


def _select_units(
    place: NDArray[np.int64],
    starts: NDArray[Any] | None,
    breaks: NDArray[np.bool_],
    rate: float,
    mean_span: float | None,
    max_span: int,
    generator: np.random.Generator,
) -> NDArray[np.int64]:
    """Selected ones of the tokens ``place``, whole words and spans of them."""
    apart = breaks[place]  # what is not allowed in between, and the start of a text, end a word and a span
    apart[1:] |= np.diff(place) != 1
    if len(apart):
        apart[0] = True
    begins = apart if starts is None else apart | starts[place]
    if starts is None:
        begins = np.ones(len(place), bool)
    unit = np.cumsum(begins) - 1
    count = int(begins.sum())
    if mean_span is None:
        chosen = generator.random(count, dtype=np.float32) < rate
    else:
        chosen = _spans(apart[begins], rate, mean_span, max_span, generator)
    return place[chosen[unit]]


def _spans(
    run_starts: NDArray[np.bool_], rate: float, mean: float, longest: int, generator: np.random.Generator
) -> NDArray[np.bool_]:
    """Which of the units are inside a span, with probability ``rate`` for each; no span leaves its run of units."""
    check_real("mean_span", mean, minimum=1.0)
    check_int("max_span", longest, 1)
    if not len(run_starts):
        return np.zeros(0, bool)
    first = np.flatnonzero(run_starts)
    sizes = np.diff(np.append(first, len(run_starts)))
    ahead = int(longest) - 1  # spans may begin before the run, or its first units would be selected less often
    slots = sizes + ahead
    ends = np.repeat(np.cumsum(slots), slots)
    begins = np.flatnonzero(generator.random(len(ends), dtype=np.float32) < _span_rate(rate, mean, longest))
    lengths = np.minimum(generator.geometric(1.0 / mean, len(begins)), longest)
    reach = np.zeros(len(ends), np.int64)
    reach[begins] = np.minimum(begins + lengths, ends[begins])
    covered = np.maximum.accumulate(reach) > np.arange(len(ends))
    return covered[ranges(slots) >= ahead]


def _span_rate(rate: float, mean: float, longest: int) -> float:
    """Probability q that a span begins at a place, such that a place is inside one with probability ``rate``:
    1 - rate = product over k < longest of (1 - q P(length > k)).
    """
    tail = (1.0 - 1.0 / mean) ** np.arange(longest)
    low, high = 0.0, 1.0
    if rate in (low, high):
        return rate
    for _ in range(60):
        q = 0.5 * (low + high)
        if 1.0 - np.prod(1.0 - q * tail) < rate:
            low = q
        else:
            high = q
    return 0.5 * (low + high)


def _random_ids(
    spec: Any, barred: NDArray[np.bool_], vocab_size: int, count: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    if spec is None:
        return generator.integers(0, vocab_size, count)
    if isinstance(spec, str):
        if spec != "ordinary":
            raise ValueError(f'random_ids must be None, "ordinary" or a sequence of ids; got {spec!r}')
        pool = np.flatnonzero(~barred)
    else:
        pool = id_array("random_ids", spec if isinstance(spec, (np.ndarray, torch.Tensor)) else list(spec))
        check_ids("random_ids", pool, vocab_size)
    if not len(pool):
        raise ValueError("random_ids is empty, but a share of the tokens is to be replaced at random")
    return pool[generator.integers(0, len(pool), count)]


def _like(values: NDArray[Any], given: Any) -> Any:
    if not isinstance(given, torch.Tensor):
        return values
    return torch.from_numpy(values).to(given.device)


class MaskedBatches:
    """Batches for :func:`kexue.training.fit` with some of their tokens hidden.

    Args:
        batches: Sequence of dicts or function number -> dict with ``input_ids``, and optionally ``attention_mask``,
            ``cu_seqlens``, and ``word_ids`` or ``word_starts``, which are taken out.
        seed: Seed of the noise; batch ``number`` is masked as step ``number``.
        rank: For batches that are cut for this rank already.
        **options: Of :func:`mask_tokens`: ``mask_token_id`` and ``vocab_size``, and whatever else.

    Example:
        >>> inner = [{"input_ids": torch.arange(10, 26).reshape(2, 8)}]
        >>> batches = MaskedBatches(inner, seed=1, mask_token_id=4, vocab_size=30)
        >>> sorted(batches(0)), torch.equal(batches(3)["input_ids"], batches(3)["input_ids"])
        (['input_ids', 'labels'], True)
    """

    def __init__(
        self,
        batches: Sequence[Mapping[str, Any]] | Callable[[int], Mapping[str, Any]],
        *,
        seed: int = 0,
        rank: int = 0,
        **options: Any,
    ) -> None:
        self._batch_at, _ = batch_source(batches)
        self.seed = seed
        self.rank = rank
        self.options = options
        mask_tokens(np.zeros((0, 0), np.int64), seed, 0, rank, **options)  # bad settings show here

    def __call__(self, number: int) -> dict[str, Any]:
        """The batch of a number, from 0."""
        batch = dict(self._batch_at(number))
        if "input_ids" not in batch:
            raise ValueError(f"batch {number} must have input_ids; got {', '.join(map(str, batch)) or 'nothing'}")
        words = {name: batch.pop(name) for name in ("word_ids", "word_starts") if name in batch}
        about = {name: batch.get(name) for name in ("attention_mask", "cu_seqlens")}
        hidden, labels = mask_tokens(
            batch["input_ids"], self.seed, number, self.rank, **{**about, **words, **self.options}
        )
        return batch | {"input_ids": hidden, "labels": labels}
