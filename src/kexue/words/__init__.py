"""Counting, word vectors, word discovery and segmentation (numpy and numba; torch is not imported here)."""

from kexue.words.cooccurrence import CooccurrenceCounter

__all__ = ["CooccurrenceCounter"]
