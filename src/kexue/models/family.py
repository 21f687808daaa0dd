"""The Kexue models together, registered with transformers: who imports one can load all by the Auto classes."""

from __future__ import annotations

from kexue._transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
)
from kexue.models.autoencoding import KexueForTextAutoencoding
from kexue.models.configuration import KexueConfig
from kexue.models.heads import KexueForCausalLM, KexueForMaskedLM, KexueOutput
from kexue.models.prefix_lm import KexueForPrefixLM
from kexue.models.stack import KexueModel
from kexue.models.text_heads import KexueForNextSentence, KexueForPreTraining, KexueForSequenceClassification

__all__ = [
    "KexueConfig",
    "KexueForCausalLM",
    "KexueForMaskedLM",
    "KexueForNextSentence",
    "KexueForPreTraining",
    "KexueForPrefixLM",
    "KexueForSequenceClassification",
    "KexueForTextAutoencoding",
    "KexueModel",
    "KexueOutput",
]

AutoConfig.register(KexueConfig.model_type, KexueConfig, exist_ok=True)
AutoModel.register(KexueConfig, KexueModel, exist_ok=True)
AutoModelForMaskedLM.register(KexueConfig, KexueForMaskedLM, exist_ok=True)
AutoModelForCausalLM.register(KexueConfig, KexueForCausalLM, exist_ok=True)
AutoModelForNextSentencePrediction.register(KexueConfig, KexueForNextSentence, exist_ok=True)
AutoModelForSequenceClassification.register(KexueConfig, KexueForSequenceClassification, exist_ok=True)
AutoModelForPreTraining.register(KexueConfig, KexueForPreTraining, exist_ok=True)
