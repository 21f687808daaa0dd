"""Counting, word vectors, word discovery and segmentation (numpy and numba; torch is not imported here)."""

from kexue.words.cooccurrence import CooccurrenceCounter
from kexue.words.discovery import WordDiscovery
from kexue.words.ngrams import NGramCounter
from kexue.words.pmi_embedding import PMIEmbedding
from kexue.words.segmenter import Segmenter
from kexue.words.tokenizer import Tokenizer

__all__ = ["CooccurrenceCounter", "NGramCounter", "PMIEmbedding", "Segmenter", "Tokenizer", "WordDiscovery"]
