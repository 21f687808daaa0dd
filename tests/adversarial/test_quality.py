from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from kexue.adversarial import mode_coverage, sample_quality
from kexue.adversarial import quality as module
from kexue.adversarial.quality import nearest
from reference import bigan_qp as reference


@pytest.mark.parametrize(("n", "m", "k"), [(30, 40, 3), (25, 12, 5), (2, 2, 1)])
@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_quality_agrees_with_loops(n, m, k, shift, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 64)  # several blocks
    rng = np.random.default_rng(n)
    real, fake = rng.normal(size=(n, 4)) + shift, rng.normal(size=(m, 4)) * 1.3 + 0.4 + shift
    got = sample_quality(real, torch.from_numpy(fake), k)
    np.testing.assert_allclose(dataclasses.astuple(got), reference.quality(real, fake, k), rtol=1e-12)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", ["grid", "digits", "same", "outlier", "equal", "tight"])
def test_what_ties_with_the_edge_of_a_ball_is_inside(kind, k, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 1000)
    rng = np.random.default_rng(0)
    grid, digits = rng.integers(0, 4, (60, 3)).astype(float), rng.integers(0, 17, (50, 20)) / 8 - 1
    far = np.concatenate([rng.normal(size=(30, 5)), [[1e8] * 5]])
    clusters = rng.normal(size=(60, 5)) * 1e-6 + 1e3 * rng.choice([-1, 1], (60, 1))  # closer than their squares tell
    real, fake = {
        "grid": (grid, rng.integers(0, 4, (45, 3)).astype(float)), "digits": (digits, digits[::-1]),
        "same": (far[:30], far[:30]), "outlier": (far, rng.normal(size=(25, 5))),
        "equal": (np.ones((9, 2)), np.ones((8, 2))), "tight": (clusters[:35], clusters[35:]),
    }[kind]  # fmt: skip
    got = sample_quality(real, fake, k)
    np.testing.assert_allclose(dataclasses.astuple(got), reference.quality(real, fake, k), rtol=1e-12)
    distance, number = nearest(torch.tensor(fake.copy()), torch.tensor(real), k)
    full = np.linalg.norm(fake[:, None] - real[None], axis=2)
    np.testing.assert_allclose(distance, np.sort(full, 1)[:, :k], rtol=1e-12)
    np.testing.assert_allclose(np.take_along_axis(full, number.numpy(), 1), np.sort(full, 1)[:, :k], rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-170, 1e170])
def test_figures_do_not_depend_on_the_unit(scale):
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(30, 4)), rng.normal(size=(20, 4))
    assert sample_quality(real * scale, fake * scale, 3) == sample_quality(real, fake, 3)


def test_arrays_that_torch_does_not_take_are_copied():
    x = np.random.default_rng(0).normal(size=(12, 3))
    frozen = x.copy()
    frozen.flags.writeable = False
    expected = sample_quality(x, x[:9], 2)
    for real in (x[::-1], x.astype(">f8"), np.asfortranarray(x), frozen, x.tolist()):
        assert sample_quality(real, x[:9], 2) == expected


def test_precision_is_about_the_fakes_and_recall_about_the_reals():
    rng = np.random.default_rng(0)
    real = np.concatenate([rng.normal(size=(50, 2)), rng.normal(size=(50, 2)) + 20])
    collapsed = sample_quality(real, rng.normal(size=(60, 2)) * 0.5)  # good samples of one half
    assert collapsed.precision > 0.9
    assert collapsed.recall < 0.6
    assert collapsed.coverage < 0.6
    noisy = sample_quality(real, np.concatenate([real, rng.normal(size=(100, 2)) * 300]) + 1e-3)  # all, and rubbish
    assert noisy.precision < 0.7
    assert noisy.recall > 0.9
    assert noisy.coverage > 0.9


def test_equal_sets_are_perfect_also_with_duplicates():
    rng = np.random.default_rng(1)
    points = rng.normal(size=(10, 3)).astype(np.float32).repeat(4, axis=0) + 1000
    found = sample_quality(points, points[::-1].copy(), k=3)  # every ball has radius 0
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)


def test_nearest_agrees_with_sorting():
    rng = np.random.default_rng(2)
    a, b = torch.tensor(rng.normal(size=(7, 3)) + 100), torch.tensor(rng.normal(size=(20, 3)) + 100)
    distance, number = nearest(a, b, 4)
    full = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(distance, full.sort(1).values[:, :4])
    assert torch.equal(number, full.argsort(1)[:, :4])


def test_modes():
    centres = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    samples = np.array([[0.1, 0.0], [0.0, -0.1], [4.0, 0.1], [2.0, 2.0]])
    found = mode_coverage(samples, centres, radius=0.5)
    assert dataclasses.astuple(found) == (1, 3, 0.75)  # one sample does not make a mode
    assert mode_coverage(samples, centres, 0.5, minimum=1).modes == 2


def test_bad_input_is_rejected():
    x = np.zeros((6, 2))
    for arguments, error, message in [
        ((x, x[:, :1]), ValueError, "same width; got 2 and 1"),
        ((x, x, 6), ValueError, "k 6 for 6 real and 6 fake"),
        ((x, x, 0), ValueError, "at least 1"),
        ((x.astype(int), x), TypeError, "floating"),
        ((x[0], x), ValueError, r"\(N, d\)"),
        ((x, x + np.nan), ValueError, "fake must be finite"),
    ]:
        with pytest.raises(error, match=message):
            sample_quality(*arguments)
    with pytest.raises(ValueError, match="radius"):
        mode_coverage(x, x, 0.0)
    with pytest.raises(ValueError, match=r"\(0, 2\)"):
        mode_coverage(x, x[:0], 1.0)
