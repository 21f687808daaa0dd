"""Decoding, tokenizers of released models, text by search and sampling; loaded on first use, as it brings torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kexue.generation.annealing import AnnealingResult, SimulatedAnnealing
    from kexue.generation.autoregressive import AutoregressiveProposal
    from kexue.generation.causal_lm import CausalLM, generate_fast, stream
    from kexue.generation.cgmh import CGMH
    from kexue.generation.cgmh_result import CGMHResult
    from kexue.generation.constraints import (
        AllOf,
        BannedTokens,
        Constraint,
        ContainsKeywords,
        LengthBetween,
        keywords_of,
    )
    from kexue.generation.copy_constraint import CopyConstraint, CopyState
    from kexue.generation.copying import CopyLogitsProcessor
    from kexue.generation.cpm_tokenizer import CPMTokenizer
    from kexue.generation.extraction import Extract, extract_words, split_words
    from kexue.generation.filters import filter_logits, token_probabilities
    from kexue.generation.importance import Estimate, ImportanceSampler
    from kexue.generation.inverse import AliasTable, inverse_transform
    from kexue.generation.kernels import Gibbs, Metropolis, MetropolisHastings, ReplicaExchange
    from kexue.generation.loading import load_causal_lm
    from kexue.generation.mlm_gibbs import GibbsResult, MLMGibbs
    from kexue.generation.ngram_lm import NGramLM
    from kexue.generation.ngram_sampler import NGramChains, NGramSampler
    from kexue.generation.prompting import few_shot
    from kexue.generation.proposals import Proposal, RandomEdit, ReplaceToken
    from kexue.generation.rejection import RejectionSampler
    from kexue.generation.relations import Diversity, JointRelation, SentenceMatch, WordMatch
    from kexue.generation.roundtrip import RoundTrip, check_roundtrip
    from kexue.generation.schedules import Constant, Geometric, Linear, Logarithmic
    from kexue.generation.targets import Target
    from kexue.generation.text_search import (
        SearchSettings,
        SentenceFound,
        compress,
        informative_tokens,
        keywords_to_sentence,
        paraphrase,
    )
    from kexue.generation.transition import Chain, Kernel, run_chain, transition_matrix

__all__ = [
    "CGMH",
    "AliasTable",
    "AllOf",
    "AnnealingResult",
    "AutoregressiveProposal",
    "BannedTokens",
    "CGMHResult",
    "CPMTokenizer",
    "CausalLM",
    "Chain",
    "Constant",
    "Constraint",
    "ContainsKeywords",
    "CopyConstraint",
    "CopyLogitsProcessor",
    "CopyState",
    "Diversity",
    "Estimate",
    "Extract",
    "Geometric",
    "Gibbs",
    "GibbsResult",
    "ImportanceSampler",
    "JointRelation",
    "Kernel",
    "LengthBetween",
    "Linear",
    "Logarithmic",
    "MLMGibbs",
    "Metropolis",
    "MetropolisHastings",
    "NGramChains",
    "NGramLM",
    "NGramSampler",
    "Proposal",
    "RandomEdit",
    "RejectionSampler",
    "ReplaceToken",
    "ReplicaExchange",
    "RoundTrip",
    "SearchSettings",
    "SentenceFound",
    "SentenceMatch",
    "SimulatedAnnealing",
    "Target",
    "WordMatch",
    "check_roundtrip",
    "compress",
    "extract_words",
    "few_shot",
    "filter_logits",
    "generate_fast",
    "informative_tokens",
    "inverse_transform",
    "keywords_of",
    "keywords_to_sentence",
    "load_causal_lm",
    "paraphrase",
    "run_chain",
    "split_words",
    "stream",
    "token_probabilities",
    "transition_matrix",
]

_MODULES = {
    "AliasTable": "inverse",
    "AllOf": "constraints",
    "AnnealingResult": "annealing",
    "AutoregressiveProposal": "autoregressive",
    "BannedTokens": "constraints",
    "CGMH": "cgmh",
    "CGMHResult": "cgmh_result",
    "CPMTokenizer": "cpm_tokenizer",
    "CausalLM": "causal_lm",
    "Chain": "transition",
    "Constant": "schedules",
    "Constraint": "constraints",
    "ContainsKeywords": "constraints",
    "CopyConstraint": "copy_constraint",
    "CopyLogitsProcessor": "copying",
    "CopyState": "copy_constraint",
    "Diversity": "relations",
    "Estimate": "importance",
    "Extract": "extraction",
    "Geometric": "schedules",
    "Gibbs": "kernels",
    "GibbsResult": "mlm_gibbs",
    "ImportanceSampler": "importance",
    "JointRelation": "relations",
    "Kernel": "transition",
    "LengthBetween": "constraints",
    "Linear": "schedules",
    "Logarithmic": "schedules",
    "MLMGibbs": "mlm_gibbs",
    "Metropolis": "kernels",
    "MetropolisHastings": "kernels",
    "NGramChains": "ngram_sampler",
    "NGramLM": "ngram_lm",
    "NGramSampler": "ngram_sampler",
    "Proposal": "proposals",
    "RandomEdit": "proposals",
    "RejectionSampler": "rejection",
    "ReplaceToken": "proposals",
    "ReplicaExchange": "kernels",
    "RoundTrip": "roundtrip",
    "SearchSettings": "text_search",
    "SentenceFound": "text_search",
    "SentenceMatch": "relations",
    "SimulatedAnnealing": "annealing",
    "Target": "targets",
    "WordMatch": "relations",
    "check_roundtrip": "roundtrip",
    "compress": "text_search",
    "extract_words": "extraction",
    "few_shot": "prompting",
    "filter_logits": "filters",
    "generate_fast": "causal_lm",
    "informative_tokens": "text_search",
    "inverse_transform": "inverse",
    "keywords_of": "constraints",
    "keywords_to_sentence": "text_search",
    "load_causal_lm": "loading",
    "paraphrase": "text_search",
    "run_chain": "transition",
    "split_words": "extraction",
    "stream": "causal_lm",
    "token_probabilities": "filters",
    "transition_matrix": "transition",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"kexue.generation.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
