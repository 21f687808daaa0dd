"""Fixtures of the attention tests."""

import pytest

from kexue.attention import _score_kernel


@pytest.fixture(params=["one tile", "rows", "heads"])
def tiling(request, monkeypatch):
    """The sizes at which the tiles cut nothing, rows, or between heads."""
    if request.param != "one tile":
        monkeypatch.setattr(_score_kernel, "TILE", 20 if request.param == "rows" else 60)
        monkeypatch.setattr(_score_kernel, "LEAST_ROWS", 2)
