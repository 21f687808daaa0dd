"""The one file that imports from transformers whatever its versions move about; everything else imports it from here.

Importing this module imports transformers (seconds): do it inside a function, or in a module that is loaded lazily.
"""

from __future__ import annotations

from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForMaskedLM,
)
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

__all__ = [
    "AttentionInterface",
    "AttentionMaskInterface",
    "AutoConfig",
    "AutoModel",
    "AutoModelForMaskedLM",
    "BaseModelOutput",
    "BertConfig",
    "BertForMaskedLM",
    "Cache",
    "CacheLayerMixin",
    "MaskedLMOutput",
    "PreTrainedModel",
    "PretrainedConfig",
    "RobertaPreLayerNormConfig",
    "RobertaPreLayerNormForMaskedLM",
    "bidirectional_mask_function",
    "causal_mask_function",
    "sdpa_mask",
]
