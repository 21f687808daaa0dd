import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kexue.losses import MarginSoftmax, auto_scale, margin_cross_entropy, margin_softmax_loss
from reference import margin_softmax as reference

KINDS = [
    ("softmax", None),
    ("am", 0.35),
    ("arc", 0.5),
    ("arc", 1.4),
    ("a", 4),
    ("a", 3),
    ("simpler_a", 4),
    ("simpler_a", 3),
    ("combined", (1.0, 0.3, 0.2)),
    ("combined", (1.3, 0.2, 0.1)),
    ("metric", 0.4),
    (lambda c: c - 0.2 * (1 + c) ** 2, None),
]
IDS = [f"{kind if isinstance(kind, str) else 'callable'}-{margin}" for kind, margin in KINDS]


def batch(rows=7, width=5, classes=11, dtype=torch.float64, seed=0, grad=True):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad)
    weight = (0.3 * torch.randn(classes, width, generator=g, dtype=torch.float64)).to(dtype).requires_grad_(grad)
    return z, weight, torch.randint(classes, (rows,), generator=g)


def separated(dtype, rows=32, width=64, classes=200, noise=0.05):
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(classes, width, generator=g)
    labels = torch.randint(classes, (rows,), generator=g)
    z = weight[labels] + noise * torch.randn(rows, width, generator=g)
    return z.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def relative(a, b):
    a, b = a.detach().double(), b.detach()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("rows", [None, 1, 3])
@pytest.mark.parametrize(("kind", "margin"), KINDS, ids=IDS)
def test_values_and_gradients_equal_the_formula(kind, margin, rows, reduction):
    z, weight, labels = batch()
    upstream = torch.linspace(0.5, 2.0, len(z), dtype=torch.float64)
    loss = margin_softmax_loss(z, weight, labels, kind, 9.0, margin, reduction, block_rows=rows)
    expected = reference.margin_softmax(z, weight, labels, kind, 9.0, 0.0 if margin is None else margin)
    if reduction == "none":
        torch.testing.assert_close(loss, expected)
        loss, expected = (loss * upstream).sum(), (expected * upstream).sum()
    else:
        expected = expected.mean() if reduction == "mean" else expected.sum()
        loss, expected = 1.7 * loss, 1.7 * expected
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, (z, weight)), torch.autograd.grad(expected, (z, weight)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["am", "metric"])
@pytest.mark.parametrize("scale", [30.0, 64.0])
def test_many_chunks_of_classes_give_the_same_as_one_product(kind, scale):
    z, weight, labels = batch(rows=9, classes=5000)
    loss = margin_softmax_loss(z, weight, labels, kind, scale, 0.2, block_rows=4)
    expected = reference.margin_softmax(z, weight, labels, kind, scale, 0.2).mean()
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, (z, weight)), torch.autograd.grad(expected, (z, weight)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("kind", "margin"), KINDS, ids=IDS)
def test_cosines_and_embeddings_give_the_same_loss(kind, margin):
    z, weight, labels = batch()
    c = reference.cosines(z, weight).detach().requires_grad_()
    loss = margin_cross_entropy(c, labels, kind, 9.0, margin)
    expected = reference.loss_from_cosines(c, labels, kind, 9.0, 0.0 if margin is None else margin).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, c)[0], torch.autograd.grad(expected, c)[0])


@pytest.mark.parametrize(("kind", "margin"), KINDS, ids=IDS)
def test_soft_labels_equal_the_formula_and_one_hot_labels_equal_integers(kind, margin):
    z, weight, labels = batch()
    soft = torch.softmax(torch.randn(len(z), len(weight), dtype=torch.float64), 1)
    value = 0.0 if margin is None else margin
    loss = margin_softmax_loss(z, weight, soft, kind, 9.0, margin, "none")
    expected = reference.dense(z, weight, soft, kind, 9.0, value)
    torch.testing.assert_close(loss, expected)
    got, want = (torch.autograd.grad(x.sum(), (z, weight)) for x in (loss, expected))
    torch.testing.assert_close(got, want)
    hot = F.one_hot(labels, len(weight)).double()
    torch.testing.assert_close(
        margin_softmax_loss(z, weight, hot, kind, 9.0, margin),
        margin_softmax_loss(z, weight, labels, kind, 9.0, margin),
    )


@pytest.mark.parametrize("kind", ["am", "arc", "metric"])
@pytest.mark.parametrize("shape", ["scalar", "classes", "rows"])
def test_tensor_margins_and_their_gradients(kind, shape):
    z, weight, labels = batch()
    size = {"scalar": (), "classes": (11,), "rows": (7,)}[shape]
    margin = (0.1 + 0.3 * torch.rand(size, dtype=torch.float64)).requires_grad_()
    each = margin[labels] if shape == "classes" else margin
    for reduction in ("none", "mean"):
        loss = margin_softmax_loss(z, weight, labels, kind, 9.0, margin, reduction).sum()
        expected = reference.margin_softmax(z, weight, labels, kind, 9.0, each)
        expected = expected.sum() if reduction == "none" else expected.mean()
        torch.testing.assert_close(loss, expected)
        got, want = (torch.autograd.grad(x, (z, weight, margin), retain_graph=True) for x in (loss, expected))
        torch.testing.assert_close(got, want)
    c = reference.cosines(z, weight).detach()
    on_cosines = torch.autograd.grad(margin_cross_entropy(c, labels, kind, 9.0, margin), margin)[0]
    torch.testing.assert_close(on_cosines, want[2])


@pytest.mark.parametrize(("kind", "margin"), [("am", 0.35), ("arc", 0.5), ("metric", 0.4), ("simpler_a", 4)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradcheck(kind, margin, reduction):
    z, weight, labels = batch(rows=3, width=3, classes=4)

    def on_embeddings(a, b):
        return margin_softmax_loss(a, b, labels, kind, 4.0, margin, reduction)

    assert torch.autograd.gradcheck(on_embeddings, (z, weight))
    c = reference.cosines(z, weight).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: margin_cross_entropy(x, labels, kind, 4.0, margin, reduction), (c,))


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), classes=st.integers(1, 12), seed=st.integers(0, 10**6), scale=st.floats(0.5, 80.0))
def test_margin_zero_is_cross_entropy_of_the_cosines(rows, classes, seed, scale):
    z, weight, labels = batch(rows, 4, classes, seed=seed)
    expected = F.cross_entropy(scale * F.normalize(z) @ F.normalize(weight).T, labels)
    for kind, margin in (("am", 0.0), ("arc", 0.0), ("softmax", None), ("a", 1), ("simpler_a", 1)):
        torch.testing.assert_close(margin_softmax_loss(z, weight, labels, kind, scale, margin), expected)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["am", "arc", "a", "metric"]))
def test_permuting_classes_changes_nothing_and_rows_are_independent(seed, kind):
    z, weight, labels = batch(seed=seed)
    loss = margin_softmax_loss(z, weight, labels, kind, 12.0, reduction="none")
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        margin_softmax_loss(z, weight[order], torch.argsort(order)[labels], kind, 12.0, reduction="none"), loss
    )
    changed = torch.cat([z[:3].detach(), torch.full_like(z[3:], 1e6)])
    torch.testing.assert_close(margin_softmax_loss(changed, weight, labels, kind, 12.0, reduction="none")[:3], loss[:3])
    torch.testing.assert_close(margin_softmax_loss(3 * z, 0.1 * weight, labels, kind, 12.0, reduction="none"), loss)


@settings(max_examples=50, deadline=None)
@given(st.floats(-0.999, 0.999), st.sampled_from([("am", 0.3), ("arc", 0.5), ("a", 4), ("simpler_a", 4)]))
def test_psi_never_exceeds_the_cosine_and_falls_with_the_angle(cosine, case):
    kind, margin = case
    value, slope = margins().target_score(torch.tensor([cosine], dtype=torch.float64), kind, margin)
    assert float(value) <= cosine + 1e-12
    if kind != "simpler_a":  # min(cos m theta, cos theta) is not monotone
        assert float(slope) >= -1e-9


def margins():
    from kexue.losses import _margins

    return _margins


@pytest.mark.parametrize("scale", [30.0, 64.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_well_separated_classes_keep_relative_precision(dtype, scale):
    z, weight, labels = separated(dtype)
    loss = margin_softmax_loss(z, weight, labels, "am", scale, 0.35)
    (2.0**24 * loss).backward()  # loss scaling, so that float16 can hold the gradient
    z64, w64 = z.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = reference.margin_softmax(z64, w64, labels, "am", scale, 0.35).mean()
    (2.0**24 * expected).backward()
    assert float(expected.detach()) < 1e-2  # the case in which subtracting the target cancels
    assert loss.dtype == torch.float32
    assert relative(loss, expected) < 2e-5  # rounding of the cosines times the scale
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 4e-3}[dtype]
    assert relative(z.grad, z64.grad) < tolerance
    assert relative(weight.grad, w64.grad) < tolerance


def test_random_batch_reaches_single_precision():
    z, weight, labels = batch(64, 64, 3000, torch.float32)
    loss = margin_softmax_loss(z, weight, labels)
    got = torch.autograd.grad(loss, (z, weight))
    z64, w64 = z.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = reference.margin_softmax(z64, w64, labels, "am", 30.0, 0.35).mean()
    want = torch.autograd.grad(expected, (z64, w64))
    assert relative(loss, expected) < 1e-6
    assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 1e-5


@pytest.mark.parametrize("kind", ["am", "arc", "metric"])
def test_scale_64_with_every_cosine_minus_one_stays_finite(kind):
    z = torch.tensor([[1.0, 0.0]]).requires_grad_()
    weight = torch.tensor([[-1.0, 0.0]]).repeat(5, 1).requires_grad_()
    loss = margin_softmax_loss(z, weight, torch.tensor([2]), kind, 64.0, 0.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(5), rel=1e-5)
    assert torch.isfinite(z.grad).all()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("kind", "margin"), KINDS, ids=IDS)
def test_gradient_is_finite_where_the_cosine_is_one_or_minus_one(kind, margin, sign):
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    z = (sign * weight.detach()[:3]).requires_grad_()
    loss = margin_softmax_loss(z, weight, torch.arange(3), kind, 30.0, margin)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()
    assert torch.isfinite(weight.grad).all()
    c = torch.tensor([[sign, 0.0]], requires_grad=True)
    margin_cross_entropy(c, torch.tensor([0]), kind, 30.0, margin).backward()
    assert torch.isfinite(c.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_zero_vectors_have_a_finite_loss_and_no_gradient(dtype):
    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    z[1], weight[2] = 0, 0
    z.requires_grad_()
    weight.requires_grad_()
    loss = margin_softmax_loss(z, weight, torch.tensor([2, 2, 0]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()
    assert torch.isfinite(weight.grad).all()
    assert not z.grad[1].any()
    assert not weight.grad[2].any()


def test_autocast_does_not_lower_the_precision():
    z, weight, labels = batch(dtype=torch.float32)
    plain = margin_softmax_loss(z, weight, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = margin_softmax_loss(z, weight, labels)
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)


def test_only_the_wanted_gradients_are_made_and_a_second_backward_adds_up():
    z, weight, labels = batch()
    frozen = margin_softmax_loss(z, weight.detach(), labels)
    (only,) = torch.autograd.grad(frozen, z)
    loss = margin_softmax_loss(z, weight, labels)
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    torch.testing.assert_close(z.grad, only)
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_differentiating_twice_is_an_error(reduction):
    z, weight, labels = batch()
    loss = margin_softmax_loss(z, weight, labels, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        (grad.square().sum() + weight.sum()).backward()


def test_dropping_classes_keeps_the_loss_and_the_stated_bound():
    z, weight, labels = separated(torch.float64, noise=0.6)
    exact_z, exact_w = torch.autograd.grad(margin_softmax_loss(z, weight, labels, reduction="sum"), (z, weight))
    c = reference.cosines(z, weight).detach()
    others = torch.exp(30 * c).scatter(1, labels[:, None], 0.0)
    target = torch.exp(30 * (c.gather(1, labels[:, None]) - 0.35))
    p = others / (others.sum(1, keepdim=True) + target)
    mass = p.sum(0)
    eps = float(mass.median())
    dropped = mass < eps
    dropped[labels] = False
    assert dropped.sum() > 20
    loss = margin_softmax_loss(z, weight, labels, reduction="sum", filter_eps=eps)
    approx_z, approx_w = torch.autograd.grad(loss, (z, weight))
    torch.testing.assert_close(loss, margin_softmax_loss(z, weight, labels, reduction="sum"))
    bound = 30 * p[:, dropped].sum(1) / z.detach().norm(dim=1)
    error = (approx_z - exact_z).norm(dim=1)
    assert (error <= bound + 1e-12).all()
    assert error.max() > 0
    assert not approx_w[dropped].any()
    torch.testing.assert_close(approx_w[~dropped], exact_w[~dropped])


@pytest.mark.parametrize(("kind", "scale"), [("am", 30.0), ("arc", 64.0), ("a", 30.0), ("metric", 30.0)])
def test_one_hot_labels_and_steep_margins_keep_relative_precision(kind, scale):
    z, weight, labels = separated(torch.float32)
    margin = 4 if kind == "a" else 0.35
    z64, w64 = z.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = reference.margin_softmax(z64, w64, labels, kind, scale, margin).mean()
    want = torch.autograd.grad(expected, (z64, w64))
    assert 0 < float(expected.detach()) < 1e-3
    loss = margin_softmax_loss(z, weight, labels, kind, scale, margin)
    got = torch.autograd.grad(loss, (z, weight))
    assert relative(loss, expected) < 3e-6
    assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 1e-5
    loss = margin_softmax_loss(z, weight, F.one_hot(labels, len(weight)).float(), kind, scale, margin)
    got = torch.autograd.grad(loss, (z, weight))
    assert max(relative(a, b) for a, b in zip((loss, *got), (expected, *want), strict=True)) < 3e-4


@pytest.mark.parametrize("length", [1e20, 1e30])
@pytest.mark.parametrize("which", ["z", "weight", "soft"])
def test_vectors_whose_squares_overflow_have_the_direction_they_have(length, which):
    z, weight, labels = batch(dtype=torch.float32, grad=False)
    target = F.one_hot(labels, len(weight)).float() if which == "soft" else labels
    plain = margin_softmax_loss(z, weight, target)
    a = (z * (length if which != "weight" else 1)).requires_grad_()
    b = (weight * (length if which == "weight" else 1)).requires_grad_()
    loss = margin_softmax_loss(a, b, target)
    loss.backward()
    torch.testing.assert_close(loss, plain)
    assert torch.isfinite(a.grad).all()
    assert torch.isfinite(b.grad).all()
    assert a.grad.any()
    assert b.grad.any()


@pytest.mark.parametrize("kind", ["softmax", "am", "arc", "a", "metric", "combined"])
def test_classes_at_minus_infinity_take_no_part(kind):
    c = torch.rand(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels, margin = torch.tensor([0, 1, 3]), {"combined": (1.0, 0.2, 0.1)}.get(kind)
    kept = torch.tensor([0, 1, 3, 4, 5])
    expected = margin_cross_entropy(c[:, kept], torch.tensor([0, 1, 2]), kind, 9.0, margin, "none")
    c[:, 2] = -math.inf
    for target in (labels, F.one_hot(labels, 6).double()):
        x = c.clone().requires_grad_()
        loss = margin_cross_entropy(x, target, kind, 9.0, margin, "none")
        torch.testing.assert_close(loss, expected)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert torch.isfinite(grad).all()
        assert not grad[:, 2].any()


def test_cosines_take_any_leading_shape():
    c = torch.rand(2, 3, 6, generator=torch.Generator().manual_seed(0))
    labels, margin = torch.arange(6).view(2, 3), torch.linspace(0.1, 0.5, 6).view(2, 3)
    flat = margin_cross_entropy(c.view(6, 6), labels.view(6), "arc", 9.0, margin.view(6)[labels.view(6)], "none")
    rows = margin_cross_entropy(c, labels, "arc", 9.0, margin, "none")
    torch.testing.assert_close(rows, flat.view(2, 3))
    soft = torch.softmax(c, -1)
    torch.testing.assert_close(margin_cross_entropy(c, soft), margin_cross_entropy(c.view(6, 6), soft.view(6, 6)))
    torch.testing.assert_close(
        margin_cross_entropy(c[0, 0], labels[0, 0]), margin_cross_entropy(c[0, :1], labels[0, :1])
    )


def test_parameters_of_psi_get_their_gradient():
    z, weight, labels = batch()
    bend = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for reduction in ("none", "mean"):
        loss = margin_softmax_loss(z, weight, labels, lambda c: c - bend * c**2, 9.0, reduction=reduction).sum()
        expected = reference.margin_softmax(z, weight, labels, lambda c: c - bend * c**2, 9.0, None)
        expected = expected.sum() if reduction == "none" else expected.mean()
        got, want = (torch.autograd.grad(x, (z, weight, bend)) for x in (loss, expected))
        torch.testing.assert_close(got, want)


def test_angular_margin_is_exact_at_the_ends_and_does_not_wrap_below_zero():
    c = torch.tensor([1.0, -1.0], dtype=torch.float64)
    value, slope = margins().target_score(c, "arc", 0.5)
    assert value.tolist() == pytest.approx([math.cos(0.5), -1 - 0.5 * math.sin(0.5)], abs=1e-15)
    assert torch.isfinite(slope).all()
    c = torch.cos(torch.tensor([3.1], dtype=torch.float64))
    for margin in (-0.4, torch.tensor([-0.4])):
        assert float(margins().target_score(c, "arc", margin)[0]) == pytest.approx(math.cos(2.7))
    assert margins().target_score(torch.ones(1), "metric", 0.25)[0].tolist() == [-0.25]


def test_empty_batch_is_zero_with_zero_gradients():
    z, weight, labels = batch(rows=0)
    loss = margin_softmax_loss(z, weight, labels)
    loss.backward()
    assert float(loss) == 0
    assert not weight.grad.any()


def test_auto_scale_reaches_the_probability_it_names():
    s = auto_scale(1000, 0.9, spread=0.1)
    cosines = torch.full((1, 1000), -0.1)
    cosines[0, 0] = 1.0
    loss = margin_cross_entropy(cosines, torch.tensor([0]), "softmax", s)
    assert math.exp(-float(loss)) == pytest.approx(0.9, rel=1e-5)
    assert MarginSoftmax(4, 1000, scale="auto").scale == auto_scale(1000)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.tensor([0, 11])}, ValueError, r"\[0, 11\); got values from 0 to 11"),
        ({"labels": torch.tensor([-1, 3])}, ValueError, "from -1 to 3"),
        ({"labels": torch.tensor([0, 1, 2])}, ValueError, r"shape \(2,\); got \(3,\)"),
        ({"labels": torch.rand(2, 3)}, ValueError, r"\(2, 11\); got \(2, 3\)"),
        ({"labels": torch.full((2, 11), 1.5)}, ValueError, "1.5"),
        ({"labels": torch.full((2, 11), math.nan)}, ValueError, "nan"),
        ({"labels": [0, 1]}, TypeError, "list"),
        ({"labels": torch.tensor([True, False])}, TypeError, "bool"),
        ({"z": torch.randn(2, 4)}, ValueError, r"\(2, 4\) and \(11, 5\)"),
        ({"z": torch.randn(5)}, ValueError, "2 dimensions"),
        ({"z": torch.ones(2, 5, dtype=torch.long)}, TypeError, "int64"),
        ({"weight": torch.randn(0, 5)}, ValueError, "at least one class"),
        ({"scale": 0.0}, ValueError, "greater than 0"),
        ({"scale": math.nan}, ValueError, "finite"),
        ({"scale": "large"}, ValueError, "'auto'"),
        ({"kind": "cosface"}, ValueError, "'cosface'"),
        ({"reduction": "avg"}, ValueError, "'avg'"),
        ({"kind": "a", "margin": 0.5}, TypeError, "integer"),
        ({"kind": "a", "margin": 0}, ValueError, "at least 1"),
        ({"kind": "combined", "margin": 0.5}, ValueError, r"\(m1, m2, m3\)"),
        ({"kind": torch.cos, "margin": 0.5}, ValueError, "own margin"),
        ({"kind": lambda c: c.sum()}, ValueError, "psi must return"),
        ({"margin": torch.rand(4)}, ValueError, r"got \(4,\)"),
        ({"margin": math.inf}, ValueError, "finite"),
        ({"margin": torch.tensor([0.1, math.nan])}, ValueError, "finite; got nan"),
        ({"kind": "arc", "margin": 3.5}, ValueError, "at most pi; got 3.5"),
        ({"block_rows": 0}, ValueError, "block_rows"),
        ({"filter_eps": -1.0}, ValueError, "filter_eps"),
    ],
)
def test_bad_input_is_rejected_with_expected_and_received(change, error, message):
    arguments = {"z": torch.randn(2, 5), "weight": torch.randn(11, 5), "labels": torch.tensor([0, 3])} | change
    with pytest.raises(error, match=message):
        margin_softmax_loss(**arguments)


def test_bad_cosines_are_rejected():
    with pytest.raises(ValueError, match="at least one class"):
        margin_cross_entropy(torch.randn(2, 0), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="one entry per class or row"):
        margin_cross_entropy(torch.rand(2, 3), torch.rand(2, 3), margin=torch.rand(5))
