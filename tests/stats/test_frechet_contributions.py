"""Shares of rows in the Frechet distance: their sum, and the derivative by weights that they are made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kexue.stats import Gaussian, frechet_contributions, frechet_distance, w2


def _pair(n: int, m: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    y = torch.randn(m, d, generator=g, dtype=torch.float64) @ torch.randn(d, d, generator=g, dtype=torch.float64) + 0.5
    return x, y


@pytest.mark.parametrize(("n", "m", "d"), [(50, 40, 3), (2, 2, 1), (5, 30, 8), (6, 7, 50), (3, 40, 20)])
def test_shares_add_up_to_the_distance(n: int, m: int, d: int) -> None:
    x, y = _pair(n, m, d)
    a, b = frechet_contributions(x, y)
    assert a.shape == (n,)
    assert b.shape == (m,)
    expected = frechet_distance(x, y)
    assert torch.isclose(a.sum() + b.sum(), expected, rtol=1e-9)
    assert torch.isclose(a.sum(), expected * n / (n + m), rtol=1e-9)  # the same for each row, before its influence


def test_shares_are_derivatives_by_weights() -> None:
    x, y = _pair(12, 15, 3)

    def weighted(rows: torch.Tensor, weights: torch.Tensor) -> Gaussian:
        weights = weights / weights.sum()
        mean = weights @ rows
        centred = rows - mean
        return Gaussian(mean, (centred * weights[:, None]).mT @ centred * len(rows) / (len(rows) - 1))

    u = torch.full((12,), 1 / 12, dtype=torch.float64, requires_grad=True)
    v = torch.full((15,), 1 / 15, dtype=torch.float64, requires_grad=True)
    distance = w2(weighted(x, u), weighted(y, v))
    distance.backward()
    a, b = frechet_contributions(x, y)
    assert torch.allclose((a - distance / 27) * 12, u.grad, atol=1e-9)
    assert torch.allclose((b - distance / 27) * 15, v.grad, atol=1e-9)


def test_the_order_is_that_of_leaving_rows_out_also_between_sides_of_different_sizes() -> None:
    x, y = _pair(30, 1, 3)
    y = torch.randn(400, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y[:4] += 6
    shares = torch.cat(frechet_contributions(x, y))
    rows = torch.cat([x, y])

    def without(row: int) -> float:
        keep = torch.arange(430) != row
        return frechet_distance(rows[:30][keep[:30]], rows[30:][keep[30:]]).item()

    fall = frechet_distance(x, y) - torch.tensor([without(row) for row in range(430)])
    ranks = torch.stack([shares, fall]).argsort(1).argsort(1).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.96


def test_swapping_the_sides_swaps_the_shares_and_shifting_changes_nothing() -> None:
    x, y = _pair(20, 10, 4)
    a, b = frechet_contributions(x, y)
    c, d = frechet_contributions(y + 3, x + 3)
    assert torch.allclose(a, d)
    assert torch.allclose(b, c)


def test_planted_rows_come_first() -> None:
    x, y = _pair(200, 1, 6)
    g = torch.Generator().manual_seed(3)
    y = torch.randn(200, 6, generator=g, dtype=torch.float64)
    y[:10] += 4
    a, b = frechet_contributions(x, y)
    assert set(b.topk(10).indices.tolist()) == set(range(10))
    assert a.max() < b.topk(10).values.min()


def test_equal_sets_have_no_shares() -> None:
    x, _ = _pair(10, 2, 3)
    a, b = frechet_contributions(x, x)
    assert a.abs().max() < 1e-12
    assert b.abs().max() < 1e-12


def test_constant_features_and_low_precision() -> None:
    a, b = frechet_contributions(np.zeros((3, 2), dtype=np.float32), np.ones((4, 2), dtype=np.float32))
    assert a.dtype == torch.float64
    assert torch.allclose(torch.cat([a, b]), torch.full((7,), 2 / 7, dtype=torch.float64))


@pytest.mark.parametrize(
    ("x", "y", "error", "words"),
    [
        (torch.zeros(1, 2), torch.zeros(3, 2), ValueError, "x must have at least 2 rows; got 1"),
        (torch.zeros(3, 2), torch.zeros(3, 4), ValueError, "same width; got 2 and 4"),
        (torch.zeros(3, 2), torch.full((3, 2), torch.nan), ValueError, "y must be finite"),
        (torch.zeros(3, 2).long(), torch.zeros(3, 2), TypeError, "x"),
        (
            torch.full((3, 2), 1e200, dtype=torch.float64),
            torch.zeros(3, 2),
            ValueError,
            "x must be at most 1e.70 in size",
        ),
        (torch.zeros(3), torch.zeros(3, 2), ValueError, r"x must have shape \(N, d\)"),
    ],
)
def test_bad_input(x: torch.Tensor, y: torch.Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        frechet_contributions(x, y)
