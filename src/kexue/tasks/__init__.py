"""What trained models are used for; loaded when first used, as it brings torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kexue.tasks.copy_tags import copy_labels, copy_loss
    from kexue.tasks.entities import RankedCandidate, coreference_prompt, link_entities, rank_cloze, type_entity
    from kexue.tasks.extract_labels import align_extract
    from kexue.tasks.gated_conv import GatedConvLabeler, labeler_loss
    from kexue.tasks.graph_rank import select_pieces, text_rank
    from kexue.tasks.next_sentence import NextSentenceScorer
    from kexue.tasks.pieces import join_pieces, split_pieces
    from kexue.tasks.retrieval import retrieval_report
    from kexue.tasks.rouge_metric import rouge, rouge_corpus
    from kexue.tasks.samples_contrast import SamplesContrast
    from kexue.tasks.sentence_similarity import SentenceSimilarity
    from kexue.tasks.summarizer import ExplainedPiece, Summarizer
    from kexue.tasks.summary_generator import SummaryGenerator
    from kexue.tasks.zero_shot import NSPZeroShotClassifier

__all__ = [
    "ExplainedPiece",
    "GatedConvLabeler",
    "NSPZeroShotClassifier",
    "NextSentenceScorer",
    "RankedCandidate",
    "SamplesContrast",
    "SentenceSimilarity",
    "Summarizer",
    "SummaryGenerator",
    "align_extract",
    "copy_labels",
    "copy_loss",
    "coreference_prompt",
    "join_pieces",
    "labeler_loss",
    "link_entities",
    "rank_cloze",
    "retrieval_report",
    "rouge",
    "rouge_corpus",
    "select_pieces",
    "split_pieces",
    "text_rank",
    "type_entity",
]

_MODULES = {
    "ExplainedPiece": "summarizer",
    "GatedConvLabeler": "gated_conv",
    "NSPZeroShotClassifier": "zero_shot",
    "NextSentenceScorer": "next_sentence",
    "RankedCandidate": "entities",
    "SamplesContrast": "samples_contrast",
    "SentenceSimilarity": "sentence_similarity",
    "Summarizer": "summarizer",
    "SummaryGenerator": "summary_generator",
    "align_extract": "extract_labels",
    "copy_labels": "copy_tags",
    "copy_loss": "copy_tags",
    "coreference_prompt": "entities",
    "join_pieces": "pieces",
    "labeler_loss": "gated_conv",
    "link_entities": "entities",
    "rank_cloze": "entities",
    "retrieval_report": "retrieval",
    "rouge": "rouge_metric",
    "rouge_corpus": "rouge_metric",
    "select_pieces": "graph_rank",
    "split_pieces": "pieces",
    "text_rank": "graph_rank",
    "type_entity": "entities",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"kexue.tasks.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
