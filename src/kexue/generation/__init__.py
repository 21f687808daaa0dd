"""Decoding, tokenizers of released models, text by search and sampling; loaded on first use, as it brings torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kexue.generation.constraints import (
        AllOf,
        BannedTokens,
        Constraint,
        ContainsKeywords,
        LengthBetween,
        keywords_of,
    )
    from kexue.generation.kernels import Gibbs, Metropolis, MetropolisHastings, ReplicaExchange
    from kexue.generation.proposals import Proposal, RandomEdit, ReplaceToken
    from kexue.generation.targets import Target
    from kexue.generation.transition import Chain, Kernel, run_chain, transition_matrix

__all__ = [
    "AllOf",
    "BannedTokens",
    "Chain",
    "Constraint",
    "ContainsKeywords",
    "Gibbs",
    "Kernel",
    "LengthBetween",
    "Metropolis",
    "MetropolisHastings",
    "Proposal",
    "RandomEdit",
    "ReplaceToken",
    "ReplicaExchange",
    "Target",
    "keywords_of",
    "run_chain",
    "transition_matrix",
]

_MODULES = {
    "AllOf": "constraints",
    "BannedTokens": "constraints",
    "Chain": "transition",
    "Constraint": "constraints",
    "ContainsKeywords": "constraints",
    "Gibbs": "kernels",
    "Kernel": "transition",
    "LengthBetween": "constraints",
    "Metropolis": "kernels",
    "MetropolisHastings": "kernels",
    "Proposal": "proposals",
    "RandomEdit": "proposals",
    "ReplaceToken": "proposals",
    "ReplicaExchange": "kernels",
    "Target": "targets",
    "keywords_of": "constraints",
    "run_chain": "transition",
    "transition_matrix": "transition",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"kexue.generation.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
