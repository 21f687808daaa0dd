"""Pseudo-likelihood by masking one token at a time (逐词遮盖的伪似然): the slow way, for any masked language model.

    log p(x_i | x without i), i = 1..T: one pass for each token, with [MASK] in its place

Source: Salazar, Liang, Nguyen, Kirchhoff, "Masked Language Model Scoring", ACL 2020. What
:class:`kexue.models.KexueForTextAutoencoding` does in one pass takes T of them here; this is for comparison, and for
models that one has already. Copies of all texts share batches, longest text first, and padding that a batch does not
need is cut off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue._checks import check_int
from kexue._tensors import compute_dtype
from kexue.models._scoring import check_ids, check_mask, evaluating
from kexue.models.heads import KexueForMaskedLM

__all__ = ["masked_token_log_probs"]


def masked_token_log_probs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    mask_token_id: int | None = None,
    batch_size: int = 64,
    **inputs: Tensor,
) -> Tensor:
    """Log-probability of each token given all the others, by one pass per token.

    Args:
        model: A masked language model: ``model(input_ids=, attention_mask=).logits`` is (N, T, V). Its dropout is off
            while this runs.
        input_ids: (B, T) token ids.
        attention_mask: (B, T), 1 or True = takes part; None: all tokens do.
        mask_token_id: Id of [MASK]; None: ``model.config.mask_token_id``.
        batch_size: Masked copies per pass; the scores take ``batch_size`` x T x V numbers, those of
            :class:`KexueForMaskedLM` ``batch_size`` x V, as its head runs on the masked rows only.
        **inputs: Further (B, T) inputs of the model, such as ``token_type_ids``.

    Returns:
        (B, T), 0 at padding; float32, or float64 for a float64 model.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: No id of [MASK], or shapes that do not fit.

    Example:
        >>> from kexue.models import KexueConfig, KexueForMaskedLM
        >>> config = KexueConfig(vocab_size=20, hidden_size=16, num_layers=1, num_heads=2, mask_token_id=4)
        >>> masked_token_log_probs(KexueForMaskedLM(config), torch.tensor([[5, 6, 7]])).shape
        torch.Size([1, 3])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module; got {type(model).__name__}")
    if mask_token_id is None:
        mask_token_id = getattr(getattr(model, "config", None), "mask_token_id", None)
        if mask_token_id is None:
            raise ValueError("mask_token_id must be given: the model's configuration does not name it; got None")
    check_int("mask_token_id", mask_token_id, 0)
    check_int("batch_size", batch_size, 1)
    check_ids(input_ids)
    mask = check_mask(attention_mask, input_ids)
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.shape != input_ids.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} must be a tensor of shape {tuple(input_ids.shape)}; got {got}")
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
    lengths = _extents(real)
    rows, columns = real[order := lengths.argsort(descending=True, stable=True)].nonzero(as_tuple=True)
    rows = order[rows]
    out: Tensor | None = None
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(rows), batch_size):
            row, column = rows[start : start + batch_size], columns[start : start + batch_size]
            width = int(lengths[row].max())
            number = torch.arange(len(row), device=row.device)
            copies = input_ids[row, :width]
            target = copies[number, column]
            copies[number, column] = mask_token_id
            given: dict[str, Any] = {name: value[row, :width] for name, value in inputs.items()}
            if mask is not None:
                given["attention_mask"] = mask[row, :width].to(input_ids.dtype)
            if isinstance(model, KexueForMaskedLM):  # its head can run on the masked rows alone
                states = model.kexue(copies, **given).last_hidden_state
                scores = model.lm_head(states[number, column])
            else:
                scores = model(input_ids=copies, **given).logits[number, column]
            scores = scores.to(compute_dtype(scores))
            if out is None:
                out = scores.new_zeros(input_ids.shape)
            out[row, column] = -F.cross_entropy(scores, target, reduction="none")
    return torch.zeros(input_ids.shape, device=input_ids.device) if out is None else out


def _extents(real: Tensor) -> Tensor:
    """(B,) columns up to the last real token."""
    columns = torch.arange(1, real.shape[1] + 1, device=real.device)
    return (real * columns).amax(1) if real.shape[1] else real.new_zeros(real.shape[0], dtype=torch.long)
