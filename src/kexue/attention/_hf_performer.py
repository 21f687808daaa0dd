"""Performer attention inside transformers models; masks, caches and what is refused are those of ``_hf_linear``.

Each layer has random features of its own, drawn from ``config.performer_seed`` (0) and the number of the layer, so that
a loaded model computes what the saved one did although nothing random is saved. Further attributes of the
configuration: ``performer_features`` (default D ln D), ``performer_variant`` ("positive"), ``performer_norms`` ("chi").
The directions stay as they are in training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kexue.attention._hf_linear import attention_mask, run_linear
from kexue.attention.favor import FavorFeatures

__all__ = ["attention_forward", "attention_mask"]

_ATTRIBUTE = "_kexue_favor"  # beside the submodules: the state_dict of the model stays as it is


def _features(module: torch.nn.Module, query: Tensor, scaling: float | None) -> FavorFeatures:
    config = getattr(module, "config", None)
    options: dict[str, Any] = {
        "head_dim": query.shape[-1],
        "num_features": getattr(config, "performer_features", None),
        "variant": getattr(config, "performer_variant", "positive"),
        "norms": getattr(config, "performer_norms", "chi"),
        "scale": scaling,
    }
    seed = (getattr(config, "performer_seed", 0), getattr(module, "layer_idx", None) or 0)
    known = module.__dict__.get(_ATTRIBUTE)
    if known is not None and known[0] == (options, seed) and known[1].projection.device == query.device:
        return known[1]
    generator = torch.Generator().manual_seed(seed[0] * 1_000_003 + seed[1])
    features = FavorFeatures(**options, redraw_interval=None, generator=generator).to(query.device)
    module.__dict__[_ATTRIBUTE] = ((options, seed), features)
    return features


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function: an estimate of softmax(scaling q k^T) v."""
    features = _features(module, query, scaling)
    return run_linear("kexue_performer", features, module, query, key, value, attention_mask, dropout, kwargs), None
