"""The collapse meter against explicit eigenvalues and scikit-learn's neighbours."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from kexue.models import BYOL, CollapseMeter, SimSiam, collapse
from reference import simsiam_dynamics as reference

F64 = torch.float64


def features(rows, dim, seed=0, dtype=F64, directions=None):
    g = torch.Generator().manual_seed(seed)
    if directions is None:
        return torch.randn(rows, dim, generator=g, dtype=F64).to(dtype)
    made = torch.randn(rows, directions, generator=g, dtype=F64)
    return (made @ torch.randn(directions, dim, generator=g, dtype=F64)).to(dtype)


def rotation(dim, seed=0):
    return torch.linalg.qr(features(dim, dim, seed + 100))[0]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 30), dim=st.integers(2, 30), offset=st.floats(0, 5), seed=st.integers(0, 99),
    block=st.sampled_from([1, 7, 2**23]),
)  # fmt: skip
def test_std_and_rank_agree_with_explicit_eigenvalues(rows, dim, offset, seed, block):
    z = features(rows, dim, seed) + offset
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collapse, "BLOCK", block)
        report = CollapseMeter()(z)
    assert report.std == pytest.approx(reference.std(z), rel=1e-9)
    assert report.rank == pytest.approx(reference.rank(z), rel=1e-9)
    assert (report.rows, report.dim, report.knn) == (rows, dim, None)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), scale=st.sampled_from([1e-150, 1e-3, 1e6, 1e150]))
def test_lengths_do_not_matter_and_a_rotation_does_not_change_the_rank(seed, scale):
    z = features(25, 6, seed) + 1
    labels = torch.arange(25) % 3
    report = CollapseMeter()(z, labels)
    lengths = torch.rand(25, 1, generator=torch.Generator().manual_seed(seed), dtype=F64) + 0.1
    scaled = CollapseMeter()(z * lengths * scale, labels)
    assert (scaled.std, scaled.rank, scaled.knn) == pytest.approx((report.std, report.rank, report.knn), rel=1e-9)
    turned = CollapseMeter()(z @ rotation(6, seed), labels)
    assert (turned.rank, turned.knn) == pytest.approx((report.rank, report.knn), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 4, 9])
def test_neighbours_agree_with_scikit_learn(k, seed, monkeypatch):
    monkeypatch.setattr(collapse, "BLOCK", 500)  # several blocks of rows
    z = features(120, 5, seed)
    z[:40] += 1
    labels = torch.tensor(np.random.default_rng(seed).integers(-2, 3, 120))
    unit = reference.unit(z).numpy()
    hits = 0
    for i in range(120):
        others = np.arange(120) != i
        model = KNeighborsClassifier(k).fit(unit[others], labels[others])
        hits += int(model.predict(unit[i : i + 1])[0] == labels[i])
    assert CollapseMeter(k=k)(z, labels).knn == pytest.approx(hits / 120)


def test_ties_go_to_the_first_rows_and_the_smallest_label(monkeypatch):
    z = torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 3)
    # k = 1: row 0 sees row 1, rows 1 to 4 see row 0; row 5 sees row 6, the others row 5
    labels = torch.tensor([7, 7, 7, 7, 3, 3, 4, 3])
    assert CollapseMeter(k=1)(z, labels).knn == (4 + 1) / 8  # rows 0 to 3, and row 7
    # k = 2 with one vote each: the smaller label
    pairs = torch.tensor([5, 2, 5, 2, 2, 0, 9, 0])
    # row 0: 2, 5 -> 2; row 1: 5, 5; rows 2 and up: 5, 2 -> 2; row 5: 9, 0 -> 0; row 6: 0, 0; row 7: 0, 9 -> 0
    assert CollapseMeter(k=2)(z, pairs).knn == 4 / 8  # rows 3, 4, 5 and 7
    monkeypatch.setattr(collapse, "BLOCK", 1)
    assert CollapseMeter(k=2)(z, pairs).knn == 4 / 8


def test_known_cases():
    isotropic = CollapseMeter()(features(4000, 16))
    assert isotropic.std == pytest.approx(1, abs=0.01)
    assert isotropic.rank == pytest.approx(16, rel=0.02)
    assert not isotropic.collapsed
    assert str(isotropic).endswith("4000 rows: not collapsed")
    in_plane = CollapseMeter()(features(4000, 16, directions=2) @ rotation(16))
    assert in_plane.rank == pytest.approx(2, rel=0.2)
    assert in_plane.rank <= 2 + 1e-9
    assert in_plane.collapsed
    assert len(in_plane.reasons) == 1
    assert "few directions" in str(in_plane)
    point = CollapseMeter()(features(400, 16) + 100)
    assert point.std < 0.1
    assert point.rank > 10
    assert "point the same way" in str(point)
    assert "kNN accuracy 1.000" in str(CollapseMeter()(features(40, 4), torch.zeros(40, dtype=torch.long)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 0.1, 3.0])
def test_constant_features_have_no_spread_and_no_rank(dtype, value):
    z = torch.full((1000, 7), value, dtype=dtype)
    report = CollapseMeter()(z, torch.arange(1000) % 2)
    assert report.std == pytest.approx(0, abs=1e-6)
    assert report.rank == 0
    assert report.collapsed
    assert len(report.reasons) == 2
    lengths = torch.linspace(1, 2, 1000, dtype=dtype).unsqueeze(1)
    directions = torch.linspace(0.5, 1, 7, dtype=dtype)
    assert CollapseMeter()(lengths * directions).rank == 0  # differs by rounding alone


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_other_dtypes(dtype, tolerance):
    z = features(300, 20, dtype=dtype) + 1
    report, exact = CollapseMeter()(z), CollapseMeter()(z.double())
    assert (report.std, report.rank) == pytest.approx((exact.std, exact.rank), rel=tolerance)
    wide, wide_exact = CollapseMeter()(z.T), CollapseMeter()(z.T.double())
    assert (wide.std, wide.rank) == pytest.approx((wide_exact.std, wide_exact.rank), rel=tolerance)


@pytest.mark.parametrize("scale", [1e-4, 1e-6])
def test_a_small_spread_around_a_large_mean_keeps_its_rank(scale):
    z = 1 + features(500, 8) * scale
    report = CollapseMeter()(z)
    assert report.rank == pytest.approx(reference.rank(z), rel=1e-6)
    single = CollapseMeter()(z.float())
    assert single.std == pytest.approx(report.std, rel=0.2)
    if scale == 1e-4:
        assert single.rank == pytest.approx(report.rank, rel=1e-2)


def test_extreme_and_zero_rows():
    z = features(50, 6, dtype=torch.float32)
    expected = CollapseMeter()(z)
    lengths = torch.logspace(-30, 30, 50).unsqueeze(1)
    report = CollapseMeter()(z * lengths)
    assert (report.std, report.rank) == pytest.approx((expected.std, expected.rank), rel=1e-4)
    z[::2] = 0
    assert CollapseMeter()(z).std == pytest.approx(reference.std(z), rel=1e-5)
    assert CollapseMeter()(z).rank == pytest.approx(reference.rank(z), rel=1e-5)


def test_inputs_are_neither_changed_nor_differentiated():
    z = features(20, 4).requires_grad_()
    before = z.detach().clone()
    first, second = CollapseMeter()(z, torch.arange(20) % 2), CollapseMeter()(z, torch.arange(20) % 2)
    assert first == second
    assert torch.equal(z, before)
    assert z.grad is None
    assert CollapseMeter()(z.T.contiguous().T).rank == pytest.approx(first.rank)


@pytest.mark.parametrize(
    ("rows", "dim", "collapsed"), [(2, 2, False), (2, 50, False), (3, 50, False), (4, 50, False), (50, 2, False)]
)
def test_few_rows_or_columns_are_not_taken_for_a_collapse(rows, dim, collapsed):
    assert CollapseMeter()(features(rows, dim)).collapsed is collapsed
    line = torch.linspace(-1, 1, 20, dtype=F64).sign().unsqueeze(1) * torch.ones(dim, dtype=F64)
    assert CollapseMeter()(line).collapsed


def test_the_limits_can_be_chosen():
    z = features(200, 16, directions=2)
    assert not CollapseMeter(min_rank=1.2)(z).collapsed
    assert CollapseMeter(min_std=2.0, min_rank=0)(z).reasons[0].startswith("std")
    assert repr(CollapseMeter(k=3)) == "CollapseMeter(min_std=0.1, min_rank=3.5, k=3)"


@pytest.mark.parametrize(
    ("z", "labels", "error", "message"),
    [
        ([[1.0]], None, TypeError, "z must be a tensor; got list"),
        (torch.ones(3, 4, dtype=torch.long), None, TypeError, "z must be a floating tensor; got dtype torch.int64"),
        (torch.ones(3), None, ValueError, r"z must have 2 dimensions; got shape \(3,\)"),
        (torch.ones(1, 4), None, ValueError, r"at least 2 rows and 2 columns; got shape \(1, 4\)"),
        (torch.ones(4, 1), None, ValueError, r"at least 2 rows and 2 columns; got shape \(4, 1\)"),
        (torch.ones(0, 4), None, ValueError, "at least 2 rows"),
        (torch.tensor([[1.0, torch.nan], [torch.inf, 1.0]]), None, ValueError, "z must be finite; got 2 entries"),
        (torch.ones(9, 4), [0] * 9, TypeError, "labels must be a tensor; got list"),
        (torch.ones(9, 4), torch.ones(9), TypeError, "labels must be integers; got dtype torch.float32"),
        (torch.ones(9, 4), torch.ones(9, dtype=torch.bool), TypeError, "labels must be integers; got dtype torch.bool"),
        (torch.ones(9, 4), torch.ones(8, dtype=torch.long), ValueError, r"labels must have shape \(9,\); got \(8,\)"),
        (torch.ones(5, 4), torch.ones(5, dtype=torch.long), ValueError, "k must be below the number of rows, 5; got 5"),
    ],
)
def test_wrong_inputs_are_named(z, labels, error, message):
    with pytest.raises(error, match=message):
        CollapseMeter()(z, labels)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"min_std": -1}, ValueError, "min_std must be at least 0.0; got -1"),
        ({"min_rank": float("inf")}, ValueError, "min_rank must be finite"),
        ({"k": 0}, ValueError, "k must be at least 1; got 0"),
        ({"k": 2.0}, TypeError, "k must be an integer; got 2.0"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        CollapseMeter(**options)


@pytest.mark.parametrize("kind", [SimSiam, BYOL])
def test_a_model_is_measured_in_evaluation_mode_and_left_as_found(kind):
    torch.manual_seed(0)
    model = kind(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)), 8)
    model.encoder[1].eval()
    flags = [m.training for m in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = features(60, 5, dtype=torch.float32)
    report = CollapseMeter().measure(model, [x[:50], x[50:51], x[51:]], torch.arange(60) % 3)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        expected = CollapseMeter()(model.project(x), torch.arange(60) % 3)
    assert (report.std, report.rank, report.knn) == pytest.approx((expected.std, expected.rank, expected.knn), rel=1e-4)
    plain = CollapseMeter().measure(model.encoder, [x])
    assert plain.std == pytest.approx(CollapseMeter()(model.encoder(x)).std)


def test_what_cannot_be_measured_is_refused_and_the_flags_return():
    model = nn.Linear(5, 4)
    with pytest.raises(ValueError, match="at least one batch; got none"):
        CollapseMeter().measure(model, [])
    with pytest.raises(RuntimeError):
        CollapseMeter().measure(model, [torch.ones(3, 9)])
    assert model.training
    with pytest.raises(TypeError, match="model must be a Module; got function"):
        CollapseMeter().measure(lambda x: x, [torch.ones(3, 9)])
    with pytest.raises(TypeError, match="the model's output must be a tensor; got tuple"):
        CollapseMeter().measure(nn.LSTM(5, 4), [torch.ones(3, 2, 5)])
