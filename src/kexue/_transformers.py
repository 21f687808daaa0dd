"""The one file that imports from transformers whatever its versions move about; everything else imports it from here.

Importing this module imports transformers (seconds): do it inside a function, or in a module that is loaded lazily.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForSequenceClassification,
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForMaskedLM,
)
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    create_bidirectional_mask,
    create_causal_mask,
    sdpa_mask,
)
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast, MaskedLMOutput
from transformers.utils import ModelOutput

__all__ = [
    "AttentionInterface",
    "AttentionMaskInterface",
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForNextSentencePrediction",
    "AutoModelForPreTraining",
    "AutoModelForSequenceClassification",
    "AutoTokenizer",
    "BaseModelOutput",
    "BaseModelOutputWithPast",
    "BertConfig",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForSequenceClassification",
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "GPT2Config",
    "GPT2LMHeadModel",
    "GenerationMixin",
    "LogitsProcessor",
    "MaskedLMOutput",
    "ModelOutput",
    "PreTrainedModel",
    "PreTrainedTokenizerFast",
    "PretrainedConfig",
    "RobertaPreLayerNormConfig",
    "RobertaPreLayerNormForMaskedLM",
    "bidirectional_mask_function",
    "causal_mask_function",
    "create_bidirectional_mask",
    "create_causal_mask",
    "find_class",
    "sdpa_mask",
    "show_loading",
]


def find_class(name: str) -> Any:
    """A class of transformers by its name, or None."""
    return getattr(transformers, name, None)


def show_loading(shown: bool) -> None:
    """Whether transformers draws a bar while it loads weights."""
    logging = transformers.utils.logging
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
