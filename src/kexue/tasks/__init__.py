"""What trained models are used for; loaded when first used, as it brings torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kexue.tasks.copy_tags import copy_labels, copy_loss
    from kexue.tasks.entities import RankedCandidate, coreference_prompt, link_entities, rank_cloze, type_entity
    from kexue.tasks.next_sentence import NextSentenceScorer
    from kexue.tasks.retrieval import retrieval_report
    from kexue.tasks.samples_contrast import SamplesContrast
    from kexue.tasks.sentence_similarity import SentenceSimilarity
    from kexue.tasks.zero_shot import NSPZeroShotClassifier

__all__ = [
    "NSPZeroShotClassifier",
    "NextSentenceScorer",
    "RankedCandidate",
    "SamplesContrast",
    "SentenceSimilarity",
    "copy_labels",
    "copy_loss",
    "coreference_prompt",
    "link_entities",
    "rank_cloze",
    "retrieval_report",
    "type_entity",
]

_MODULES = {
    "NSPZeroShotClassifier": "zero_shot",
    "NextSentenceScorer": "next_sentence",
    "RankedCandidate": "entities",
    "SamplesContrast": "samples_contrast",
    "SentenceSimilarity": "sentence_similarity",
    "copy_labels": "copy_tags",
    "copy_loss": "copy_tags",
    "coreference_prompt": "entities",
    "link_entities": "entities",
    "rank_cloze": "entities",
    "retrieval_report": "retrieval",
    "type_entity": "entities",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"kexue.tasks.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
