"""Frequencies and noise against their laws; every seed is fixed, so the p-values are constants."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from kexue.stats import _noise_kernel as kernel
from kexue.stats import gumbel_max, gumbel_softmax
from kexue.stats._noise import Noise

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -3.0])


def p_value(index, p):
    counts = torch.bincount(index.flatten(), minlength=len(p)).double().numpy()
    return stats.chisquare(counts, p.double().numpy() / p.double().sum().item() * counts.sum()).pvalue


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("way", ["straight-through", "soft", "small calls", "inverse", "shared", "top", "rao"])
def test_the_sampled_class_has_the_law_softmax(way, dtype):
    n = 50_000
    x = LOGITS.to(dtype).expand(n, 6)
    g = torch.Generator().manual_seed(11)
    own = x.clone().requires_grad_()
    index = {
        "straight-through": lambda: gumbel_softmax(own, 0.3, True, generator=g).argmax(1),
        "soft": lambda: gumbel_softmax(own, 1.0, generator=g, return_index=True)[1],
        "small calls": lambda: torch.cat([gumbel_softmax(part, 0.3, generator=g).argmax(1) for part in own.split(300)]),
        "inverse": lambda: gumbel_max(x.clone(), generator=g),
        "shared": lambda: gumbel_max(x, generator=g),
        "top": lambda: gumbel_max(x, 2, g)[:, 0],
        "rao": lambda: gumbel_softmax(own, estimator="rao", generator=g).argmax(1),
    }[way]()
    assert p_value(index, torch.softmax(LOGITS, 0)) > 1e-3


def test_many_classes_are_not_blurred_by_the_grid_of_the_noise():
    k, rows = 50_000, 400
    x = torch.randn(k, generator=torch.Generator().manual_seed(0))
    p = torch.softmax(x.double(), 0)
    bins = torch.arange(k) // 2500  # expected counts large enough for the test
    law = torch.zeros(20, dtype=torch.float64).index_add_(0, bins, p)
    own = x.expand(rows, k).clone().requires_grad_()
    g = torch.Generator().manual_seed(1)
    assert p_value(bins[gumbel_softmax(own, 1.0, True, generator=g, return_index=True)[1]], law) > 1e-3
    assert p_value(bins[gumbel_max(x.expand(10**6, k), generator=g)], law) > 1e-3


def test_draws_without_replacement_have_the_law_of_successive_draws():
    x = LOGITS[[0, 1, 2, 4]]
    p = torch.softmax(x.double(), 0)
    pairs = gumbel_max(x.expand(60_000, 4), 2, torch.Generator().manual_seed(3))
    assert (pairs[:, 0] != pairs[:, 1]).all()
    law = torch.outer(p, p) / (1 - p[:, None])
    keep = ~torch.eye(4, dtype=torch.bool)
    counts = torch.bincount(pairs[:, 0] * 4 + pairs[:, 1], minlength=16).view(4, 4)[keep].double().numpy()
    assert stats.chisquare(counts, law[keep].numpy() * counts.sum()).pvalue > 1e-3
    everything = gumbel_max(x.expand(100, 4), 4, torch.Generator().manual_seed(3))
    assert torch.equal(everything.sort(1).values, torch.arange(4).expand(100, 4))


def test_order_among_very_unlikely_classes_follows_their_odds():
    x = torch.tensor([0.0, -4000.0, -4000.0 + math.log(3.0)], dtype=torch.float64)
    second = gumbel_max(x.expand(20_000, 3), 2, torch.Generator().manual_seed(2))[:, 1]
    assert p_value(second - 1, torch.tensor([0.25, 0.75])) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_exponential_and_never_zero_or_infinite(dtype):
    noise = Noise(torch.tensor(5), dtype, torch.device("cpu"))
    e = noise.exponential_(torch.empty(300, 1001, dtype=dtype))
    assert (e > 0).all()
    assert torch.isfinite(e).all()
    assert stats.kstest(e.flatten().double().numpy(), "expon").pvalue > 1e-3
    small = e[e < 1e-3].flatten().double().numpy()  # where the winner of many classes is decided
    assert stats.kstest(-np.expm1(-small) / -math.expm1(-1e-3), "uniform").pvalue > 1e-3
    u = np.exp(-e.double().numpy())
    neighbours = np.corrcoef(u[:, :-1].flatten(), u[:, 1:].flatten())[0, 1]
    assert abs(neighbours) < 5 / math.sqrt(e.numel())
    lanes = np.corrcoef(u.flatten()[: 300_000 // 16 * 16].reshape(-1, 16).T)
    assert np.abs(lanes - np.eye(16)).max() < 5 / math.sqrt(300_000 / 16)
    again = Noise(torch.tensor(5), dtype, torch.device("cpu")).exponential_(torch.empty(300, 1001, dtype=dtype))
    assert torch.equal(e, again)


def test_logarithm_of_the_kernel_is_exact_to_rounding_over_all_bits():
    bits = np.concatenate([[0, 1, 2, 2**31, 2**32 - 2, 2**32 - 1], 2 ** np.arange(32), 2**32 - 2 ** np.arange(32)])
    bits = np.concatenate([bits, np.random.default_rng(0).integers(0, 2**32, 20_000)]).astype(np.uint32)
    got = np.array([kernel._minus_log(b) for b in bits], dtype=np.float64)
    u = (bits.astype(np.float64) + 0.5) / 2.0**32
    exact = -np.log1p(-u)
    assert np.abs(got / exact - 1).max() < 3e-7
    assert got.min() == 2.0**-33


def test_bits_of_the_kernel_are_those_of_sfc32():
    state = kernel.start(123)
    a, b, c, counter = (int(x) for x in state[:, 3])
    for _ in range(50):
        out = (a + b + counter) % 2**32
        a, b, c = b ^ (b >> 9), (c + (c << 3)) % 2**32, (((c << 21) | (c >> 11)) + out) % 2**32
        counter = (counter + 1) % 2**32
        assert kernel._next(state, 3) == out
    assert not np.array_equal(kernel.start(123), kernel.start(124))
