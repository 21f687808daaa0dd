"""Attention."""

from __future__ import annotations

from catalog_cases.base import EstimatorCase, TensorCase

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}
