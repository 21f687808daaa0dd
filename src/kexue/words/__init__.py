"""Counting, word vectors, word discovery and segmentation (numpy and numba; torch is not imported here).

The classes are loaded when they are first used: a tokenizer alone does not wait for scikit-learn.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kexue.words.cooccurrence import CooccurrenceCounter
    from kexue.words.discovery import WordDiscovery
    from kexue.words.gain import merge_gain
    from kexue.words.ngrams import NGramCounter
    from kexue.words.parser import TemplateParser, Tree
    from kexue.words.phrases import PhraseMiner
    from kexue.words.pmi_embedding import PMIEmbedding
    from kexue.words.segmenter import Segmenter
    from kexue.words.subwords import train_tokenizer
    from kexue.words.templates import Template, TemplateMiner
    from kexue.words.tokenizer import Tokenizer

__all__ = [
    "CooccurrenceCounter",
    "NGramCounter",
    "PMIEmbedding",
    "PhraseMiner",
    "Segmenter",
    "Template",
    "TemplateMiner",
    "TemplateParser",
    "Tokenizer",
    "Tree",
    "WordDiscovery",
    "merge_gain",
    "train_tokenizer",
]

_PLACES = {
    "CooccurrenceCounter": "cooccurrence",
    "NGramCounter": "ngrams",
    "PMIEmbedding": "pmi_embedding",
    "PhraseMiner": "phrases",
    "Segmenter": "segmenter",
    "Template": "templates",
    "TemplateMiner": "templates",
    "TemplateParser": "parser",
    "Tokenizer": "tokenizer",
    "Tree": "parser",
    "WordDiscovery": "discovery",
    "merge_gain": "gain",
    "train_tokenizer": "subwords",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
