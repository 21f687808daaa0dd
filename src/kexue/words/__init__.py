"""Counting, word vectors, word discovery and segmentation (numpy and numba; torch is not imported here)."""

from kexue.words.cooccurrence import CooccurrenceCounter
from kexue.words.pmi_embedding import PMIEmbedding

__all__ = ["CooccurrenceCounter", "PMIEmbedding"]
