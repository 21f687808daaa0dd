"""Extending the position table of a BERT-like model in place; the method is in ``positions.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kexue._checks import check_int
from kexue.models.positions import (
    HierarchicalPositionEmbedding,
    check_alpha,
    check_count,
    is_hierarchical,
)

__all__ = ["extend_positions", "tie_positions"]

NAMES = ("position_embeddings", "wpe")  # what transformers calls a table of learned absolute positions
RECORD = "hierarchical_positions"  # attribute of the configuration: alpha, n, tied


Table = nn.Embedding | HierarchicalPositionEmbedding


def _find_table(model: nn.Module) -> tuple[list[tuple[nn.Module, str]], Table]:
    """All places (parent, attribute) of the one position table, and the table."""
    found: dict[int, tuple[list[tuple[nn.Module, str]], Table]] = {}
    for parent in model.modules():
        for name, child in parent.named_children():
            if name in NAMES and isinstance(child, nn.Embedding | HierarchicalPositionEmbedding):
                found.setdefault(id(child), ([], child))[0].append((parent, name))
    kind = type(model).__name__
    if not found:
        raise ValueError(
            f"{kind} has no table of learned absolute positions (an nn.Embedding named {' or '.join(NAMES)}); "
            "rotary, relative and sinusoidal positions cannot be decomposed"
        )
    if len(found) > 1:
        raise ValueError(f"{kind} has {len(found)} position tables; pass the part whose table is to be extended")
    return next(iter(found.values()))


def _check_config(model: Any, rows: int) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        raise TypeError(f"model must be a transformers model with a config; got {type(model).__name__}")
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        raise ValueError(f"only absolute positions can be decomposed; got position_embedding_type={kind!r}")
    for name in ("sinusoidal_pos_embds", "sinusoidal_embeddings", "relative_attention"):
        if getattr(config, name, False):
            raise ValueError(f"only learned absolute positions can be decomposed; got {name}=True")
    known = getattr(config, "max_position_embeddings", None)
    if known != rows:
        raise ValueError(
            f"the table must have config.max_position_embeddings rows; got {rows} rows, max_position_embeddings={known}"
        )
    return config


def _resize_buffers(places: list[tuple[nn.Module, str]], old: int, new: int) -> None:
    """The buffers beside the table that are sliced or gathered by position."""
    for parent, _ in places:
        for name in ("position_ids", "token_type_ids"):
            buffer = parent._buffers.get(name)
            if buffer is None or buffer.shape[-1] != old:
                continue
            if name == "position_ids":
                made = torch.arange(new, dtype=buffer.dtype, device=buffer.device).expand((1, -1))
            else:
                made = torch.zeros(1, new, dtype=buffer.dtype, device=buffer.device)
            parent._buffers[name] = made


def extend_positions(
    model: Any,
    length: int,
    alpha: float = 0.4,
    tied: bool = True,
    tokenizer: Any = None,
) -> Any:
    """Let a BERT-like model read up to n^2 tokens, n being the number of positions that it was trained with.

    In place. Texts of up to n tokens give the same bits as before. For models of transformers with one table of
    learned absolute positions: BERT, RoBERTa, ALBERT, ELECTRA, DistilBERT, CamemBERT, XLM-R, MPNet, GPT-2 and the like,
    with any head on top. The attention of a long text still costs n^2; fine-tune the model on long texts before use.

    ``save_pretrained`` writes the whole table, which plain transformers loads; the configuration records alpha, n and
    whether the table was tied, and :func:`tie_positions` ties a loaded one again.

    Args:
        model: The model.
        length: Number of tokens to be accepted, above n and at most n^2. ``config.max_position_embeddings`` becomes
            ``length``, plus the rows before the first position in RoBERTa's kin (padding_idx + 1), as it was before.
        alpha: As in :func:`kexue.models.hierarchical_positions`.
        tied: The n vectors stay the only parameters (the same Parameter, so that an optimizer keeps its state). False:
            a table of its own parameters for each position.
        tokenizer: Its ``model_max_length`` becomes ``length``.

    Returns:
        The model.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: length or alpha out of range; no such table (rotary, relative or sinusoidal positions) or more than
            one; a table that is extended already. The model is unchanged then.

    Reference:
        https://spaces.ac.cn/archives/7947

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
        >>> model = BertModel(BertConfig(max_position_embeddings=16, **sizes))
        >>> model = extend_positions(model, 40)
        >>> model(torch.ones(1, 40, dtype=torch.long)).last_hidden_state.shape
        torch.Size([1, 40, 8])
    """
    check_alpha(alpha)
    check_int("length", length, 1)
    if not isinstance(tied, bool):
        raise TypeError(f"tied must be True or False; got {tied!r}")
    if tokenizer is not None and not hasattr(tokenizer, "model_max_length"):
        raise TypeError(f"tokenizer must have model_max_length; got {type(tokenizer).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model; got {type(model).__name__}")
    places, table = _find_table(model)
    record = getattr(getattr(model, "config", None), RECORD, None)
    if record is not None or isinstance(table, HierarchicalPositionEmbedding):
        raise ValueError(
            f"the positions of this model are extended already ({record}); extend the original model, or call "
            "tie_positions to tie a loaded table"
        )
    rows = table.num_embeddings
    config = _check_config(model, rows)
    offset = 0 if table.padding_idx is None else table.padding_idx + 1
    n = rows - offset
    check_count("length", length, n)
    if length <= n:
        raise ValueError(f"length must be above {n}, the number of positions that the model has; got {length}")

    hierarchical = HierarchicalPositionEmbedding.from_pretrained(table, alpha, offset, length, save_table=True)
    new: Table = hierarchical if tied else _plain(table, hierarchical.table())
    new.train(table.training)
    for parent, name in places:
        setattr(parent, name, new)
    _resize_buffers(places, rows, offset + length)
    config.max_position_embeddings = offset + length
    setattr(config, RECORD, {"alpha": float(alpha), "n": n, "tied": tied})
    if tokenizer is not None:
        tokenizer.model_max_length = length
    return model


def _plain(table: nn.Embedding, weight: torch.Tensor) -> nn.Embedding:
    rows, width = weight.shape
    made = nn.Embedding(rows, width, padding_idx=table.padding_idx, _weight=weight.detach().clone())
    made.weight.requires_grad_(table.weight.requires_grad)
    return made


def tie_positions(model: Any) -> Any:
    """Tie the table of a loaded model again: its first n vectors become the parameters.

    In place; outputs are the same up to a rounding of positions beyond n. For models that :func:`extend_positions` made
    with ``tied=True`` and that were saved and loaded with transformers.

    Args:
        model: The loaded model; its configuration records alpha and n.

    Returns:
        The model.

    Raises:
        ValueError: No record in the configuration, or a table whose rows do not follow from its first n any more.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
        >>> model = extend_positions(BertModel(BertConfig(max_position_embeddings=16, **sizes)), 40)
        >>> again = BertModel(model.config)  # what from_pretrained does: a plain table of 40 rows
        >>> _ = again.load_state_dict(model.state_dict())
        >>> tie_positions(again).embeddings.position_embeddings
        HierarchicalPositionEmbedding(40 from 16, 8, alpha=0.4)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model; got {type(model).__name__}")
    places, table = _find_table(model)
    if isinstance(table, HierarchicalPositionEmbedding):
        return model
    record = getattr(getattr(model, "config", None), RECORD, None)
    if not isinstance(record, dict) or not {"alpha", "n"} <= set(record):
        raise ValueError(f"the configuration has no record of extended positions ({RECORD}); got {record!r}")
    config = _check_config(model, table.num_embeddings)
    offset = 0 if table.padding_idx is None else table.padding_idx + 1
    alpha, n = check_alpha(record["alpha"]), record["n"]
    check_int("n", n, 2)
    length = table.num_embeddings - offset
    check_count("length", length, n)
    if not is_hierarchical(table.weight, offset, n, alpha):
        raise ValueError(f"the table does not follow from its first {n} positions with alpha={alpha:g}; was it untied?")
    small = _plain(table, table.weight[: offset + n])
    new = HierarchicalPositionEmbedding.from_pretrained(small, alpha, offset, length, save_table=True)
    new.train(table.training)
    for parent, name in places:
        setattr(parent, name, new)
    setattr(config, RECORD, {**record, "tied": True})
    return model
