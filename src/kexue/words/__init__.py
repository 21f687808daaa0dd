"""Counting, word vectors, word discovery and segmentation (numpy and numba; torch is not imported here)."""
