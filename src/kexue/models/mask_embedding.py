"""The mask-averaged embedding table of a masked language model (MLM 的 Dropout 视角:修正 [MASK] 带来的嵌入偏差).

Source: 科学空间 8770 (Dropout视角下的MLM和MAE:一些新的启发).

Masking is dropout: a token's embedding is replaced, at random, by others. What dropout is switched off to is the
expectation of its input. With BERT's recipe (select s of the tokens; of these a_mask become [MASK], a_keep stay,
a_rand become a random token) the table without masks is therefore not E but

    E'_i = c E_i + v,   c = 1 - s + s a_keep,   v = s a_mask E_m + s a_rand mean_j E_j     (.865, .12 and .015 for BERT)

The decoder keeps the table it was trained with: if it was tied, it is untied first. As c + s a_mask + s a_rand = 1, the
correction leaves v as it is (s a_mask E'_m + s a_rand mean' = v), so that the inverse is E = (E' - v) / c with v from
the corrected table: the solution of the 2 x 2 system for E_m and the mean, whose determinant is c, for every split and
every set of random tokens. At c = 0 (all tokens selected, none kept) all rows would become the same vector, and nothing
could bring the tokens back: refused. All of this is about models that norm the sum of their embeddings, as BERT does:
without that norm the corrected vectors, which are shorter, count for less beside the positions.

What we do beyond the article: any selection rate and split; the record of it in the configuration, so that a model
cannot be corrected twice, also after it was saved; the inverse. Arithmetic in float64, rounded once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from kexue._checks import check_int, check_real
from kexue.models._word_table import find_table, own_config, retie, untie

__all__ = ["correct_mask_embedding", "uncorrect_mask_embedding"]

FLAG, RECORD = "mask_corrected", "mask_correction"  # attributes of the configuration
ROWS = 4096  # rows that are turned to float64 at a time
TOLERANCE = 1e-6  # by how much a split may miss 1


def _check_split(split: Any) -> tuple[float, float, float]:
    """The three shares, scaled to sum to 1 as exactly as float64 allows."""
    if isinstance(split, str | bytes) or not isinstance(split, Iterable):
        raise TypeError(f"split must be three shares (masked, kept, random); got {split!r}")
    shares = list(split)
    if len(shares) != 3:
        raise ValueError(f"split must be three shares (masked, kept, random); got {split!r}")
    for name, share in zip(("masked", "kept", "random"), shares, strict=True):
        check_real(f"the {name} share of split", share, minimum=0.0)
    shares = [float(share) for share in shares]
    total = sum(shares)
    if abs(total - 1) > TOLERANCE:
        raise ValueError(f"split must sum to 1; got {tuple(shares)}, which sums to {total:.9g}")
    mask, keep, random = (share / total for share in shares)
    return mask, keep, random


def _weights(select: Any, split: Any) -> tuple[float, float, float]:
    """c, s a_mask and s a_rand."""
    check_real("select", select, minimum=0.0)
    if select > 1:
        raise ValueError(f"select must be at most 1; got {select!r}")
    mask, keep, random = _check_split(split)
    s = float(select)
    return 1 - s + s * keep, s * mask, s * random


def _check_mask_id(value: Any, config: Any, rows: int) -> int:
    name = "mask_token_id"
    if value is None:
        value = getattr(config, name, None)
        if value is None:
            raise ValueError(f"mask_token_id must be given: the configuration of the model has none; got {value!r}")
        name = "config.mask_token_id"
    check_int(name, value, 0)
    if value >= rows:
        raise ValueError(f"{name} must be below {rows}, the rows of the table; got {value}")
    return int(value)


def _ranges(ids: Any, rows: int) -> list[list[int]] | None:
    """A set of ids as [first, past the last] of each run: short in the saved configuration."""
    if ids is None:
        return None
    if isinstance(ids, Tensor):
        ids = ids.reshape(-1).tolist()
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise TypeError(f"random_ids must be token ids; got {type(ids).__name__}")
    listed = list(ids)
    for number in listed:
        check_int("an id of random_ids", number, 0)
        if number >= rows:
            raise ValueError(f"random_ids must be below {rows}, the rows of the table; got {number}")
    if not listed:
        raise ValueError("random_ids must name a token at least; got none")
    runs = groupby(enumerate(sorted({int(i) for i in listed})), lambda pair: pair[1] - pair[0])
    members = [[i for _, i in run] for _, run in runs]
    return [[run[0], run[-1] + 1] for run in members]


def _wide(x: Tensor) -> Tensor:
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)  # Apple's GPUs have no float64


def _fixed_point(weight: Tensor, mask_id: int, ranges: list[list[int]] | None, mask: float, random: float) -> Tensor:
    """v, (D,) in float64: s a_mask E_m + s a_rand mean."""
    v = mask * _wide(weight[mask_id])
    if random:
        total, count = torch.zeros_like(v), 0
        for start, stop in ranges or [[0, len(weight)]]:
            for chunk in weight[start:stop].split(ROWS):
                total += _wide(chunk).sum(0)
            count += stop - start
        v = v + random / count * total
    if not bool(torch.isfinite(v).all()):
        raise ValueError("the word embeddings must be finite; got a row of [MASK] or a mean that is not")
    return v


def _rewrite(weight: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Replace every row, a few thousand at a time, rounding once."""
    for chunk in weight.split(ROWS):
        chunk.copy_(change(_wide(chunk)))


@torch.no_grad()
def correct_mask_embedding(
    model: Any,
    select: float = 0.15,
    split: Sequence[float] = (0.8, 0.1, 0.1),
    mask_token_id: int | None = None,
    *,
    random_ids: Iterable[int] | None = None,
) -> Any:
    """Replace the word embeddings of a masked language model by their average over masking, for use without masks.

    In place, for models of transformers and of kexue, with any head or none. A decoder that is tied to the table is
    untied and keeps the original one. Position and segment embeddings and the norm after them stay as they are. Every
    row is corrected, also those of [MASK] and of padding (which attention does not look at). The model gets a
    configuration of its own that says ``mask_corrected=True`` and ``tie_word_embeddings=False`` and records the
    arguments; it is saved with the model.

    Args:
        model: The model.
        select: Share s of the tokens that were selected in pretraining, 0 to 1.
        split: Shares of the selected tokens that became [MASK], stayed, and became a random token; their sum is 1. BERT
            and RoBERTa: (.8, .1, .1).
        mask_token_id: Id of [MASK]; None: ``model.config.mask_token_id``.
        random_ids: Set of ids that the random tokens were drawn from; None: the whole vocabulary.

    Returns:
        The model.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: A value out of range; no id of [MASK]; a model that is corrected already; one that was trained
            without masks (``attn_mode="diagonal"``); embeddings on meta, sharded, or not in one plain table; a rate
            that leaves nothing of the tokens (select=1, none kept). The model is unchanged then.

    Reference:
        https://spaces.ac.cn/archives/8770

    Example:
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
        >>> model = BertForMaskedLM(BertConfig(**sizes))
        >>> old = model.get_input_embeddings().weight.detach().clone()
        >>> model = correct_mask_embedding(model, mask_token_id=4)
        >>> new = model.get_input_embeddings().weight
        >>> torch.allclose(new, 0.865 * old + 0.12 * old[4] + 0.015 * old.mean(0))
        True
        >>> torch.equal(model.get_output_embeddings().weight, old)
        True
    """
    keep, mask, random = _weights(select, split)
    weight = find_table(model)
    config, rows = model.config, len(weight)
    if getattr(config, FLAG, False):
        raise ValueError(
            f"the word embeddings of this model are corrected already ({getattr(config, RECORD, None)}), and twice "
            "would be wrong; uncorrect_mask_embedding(model) gives the original ones"
        )
    if getattr(config, "attn_mode", None) == "diagonal":
        raise ValueError("a model with attn_mode='diagonal' is trained without masks: there is nothing to correct")
    mask_id = _check_mask_id(mask_token_id, config, rows)
    ranges = _ranges(random_ids, rows)
    if keep <= torch.finfo(weight.dtype).eps:
        raise ValueError(
            f"select and split must leave something of the tokens: 1 - select + select * kept must be above "
            f"{torch.finfo(weight.dtype).eps:g}, the precision of {weight.dtype}; got {keep:g} for select={select}, "
            f"split={tuple(split)}"
        )
    v = _fixed_point(weight, mask_id, ranges, mask, random)

    config = own_config(model)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    untie(model, weight, config)
    _rewrite(weight, lambda e: e * keep + v)
    setattr(config, FLAG, True)
    record = {"select": float(select), "split": list(_check_split(split)), "mask_token_id": mask_id}
    setattr(config, RECORD, {**record, "random_ids": ranges, "tied": tied})
    return model


def _is_original(table: Tensor, decoder: Tensor, record: dict[str, Any]) -> bool:
    """Whether correcting the decoder's table gives the corrected one, but for rounding: neither was trained since."""
    if table.shape != decoder.shape or table.device != decoder.device:
        return False
    keep, mask, random = _weights(record["select"], record["split"])
    mask_id = record["mask_token_id"]
    v = _fixed_point(decoder, mask_id, record["random_ids"], mask, random)
    eps, masked = max(torch.finfo(x.dtype).eps for x in (table, decoder)), _wide(decoder[mask_id]).abs()
    for ours, theirs in zip(table.split(ROWS), decoder.split(ROWS), strict=True):
        original, corrected = _wide(theirs), _wide(ours)
        # A loaded model may have been rounded, both tables, to another dtype
        size = torch.maximum(torch.maximum(original.abs(), corrected.abs()), masked)
        if not bool(((original * keep + v - corrected).abs() <= eps * size).all()):
            return False
    return True


@torch.no_grad()
def uncorrect_mask_embedding(model: Any) -> Any:
    """Undo :func:`correct_mask_embedding`, in place; what was done is read from the configuration of the model.

    If decoder and table were tied and neither was trained since, they are tied again, with the original bits. If they
    no longer agree, tying would throw one of them away: they stay apart, and a warning says so. Without such a decoder
    the table is computed back, in float64: off by the rounding of the corrected table, divided by
    c = 1 - select + select * kept (.865 for BERT).

    Args:
        model: The corrected model, also a loaded one.

    Returns:
        The model.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: A model that is not corrected, or whose table cannot be rewritten. The model is unchanged then.

    Reference:
        https://spaces.ac.cn/archives/8770

    Example:
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
        >>> model = BertForMaskedLM(BertConfig(**sizes))
        >>> old = model.get_input_embeddings().weight.detach().clone()
        >>> model = uncorrect_mask_embedding(correct_mask_embedding(model, mask_token_id=4))
        >>> torch.equal(model.get_input_embeddings().weight, old)
        True
        >>> model.get_output_embeddings().weight is model.get_input_embeddings().weight
        True
    """
    weight = find_table(model)
    record = getattr(model.config, RECORD, None)
    if not getattr(model.config, FLAG, False):
        raise ValueError(f"the word embeddings of this model are not corrected; got {FLAG}=False in its configuration")
    if not isinstance(record, dict) or not {"select", "split", "mask_token_id", "random_ids", "tied"} <= set(record):
        raise ValueError(f"the configuration must record the correction ({RECORD}); got {record!r}")
    keep, mask, random = _weights(record["select"], record["split"])
    mask_id = _check_mask_id(record["mask_token_id"], None, len(weight))
    ranges = record["random_ids"]
    if ranges is not None and (not ranges or max(stop for _, stop in ranges) > len(weight)):
        raise ValueError(f"the table must have the {ranges} rows that the correction averaged; got {len(weight)} rows")
    v = _fixed_point(weight, mask_id, ranges, mask, random)

    decoder = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    theirs: Any = getattr(decoder, "weight", None)
    has_decoder = isinstance(theirs, nn.Parameter) and theirs is not weight
    config = own_config(model)
    if has_decoder and record["tied"] and _is_original(weight, theirs, record):
        weight.copy_(theirs)
        retie(model, weight, config)
    else:
        _rewrite(weight, lambda e: (e - v) / keep)
        if has_decoder and record["tied"]:
            warnings.warn(
                "the decoder was tied to the word embeddings before the correction, but the two no longer agree (was "
                "one of them trained?): they stay apart, config.tie_word_embeddings=False",
                stacklevel=3,  # past the decorator
            )
        else:
            config.tie_word_embeddings = record["tied"]
    setattr(config, FLAG, False)
    delattr(config, RECORD)
    return model
