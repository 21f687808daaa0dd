import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kexue.losses import SmoothF1Loss, SwitchLoss, smooth_accuracy_loss, smooth_f1_loss
from reference import smooth_approximations as reference


def normal(*shape, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()


def hot(*shape, seed=5):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.4


def compare(got, expected, x):
    torch.testing.assert_close(got, expected)
    upstream = torch.linspace(0.5, 2, got.numel(), dtype=got.dtype).view(got.shape)
    grads = (torch.autograd.grad(v, x, upstream, retain_graph=True) for v in (got, expected))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_accuracy_equals_the_formula(reduction):
    x = normal(6, 5)
    y = torch.tensor([0, 4, 2, 2, 1, 3])
    expected = reference.accuracy_loss(x, y)
    expected = expected if reduction == "none" else getattr(expected, reduction)()
    compare(smooth_accuracy_loss(x, y, reduction=reduction), expected, x)
    compare(smooth_accuracy_loss(x.view(2, 3, 5), y.view(2, 3), reduction=reduction).flatten(), expected.flatten(), x)
    two = normal(6)
    labels = torch.tensor([0, 1, 1, 0, 0, 1])
    p = torch.sigmoid(two)
    expected = 1 - (labels * p + (1 - labels) * (1 - p))
    expected = expected if reduction == "none" else getattr(expected, reduction)()
    compare(smooth_accuracy_loss(two, labels, reduction=reduction), expected, two)
    for other in (labels > 0, labels.double(), labels.to(torch.uint8)):
        compare(smooth_accuracy_loss(two, other, reduction=reduction), expected, two)


def test_accuracy_is_exact_for_solved_and_hopeless_rows():
    x = torch.tensor([[60.0, 0.0, 0.0], [0.0, 60.0, 0.0]]).requires_grad_()
    loss = smooth_accuracy_loss(x, torch.tensor([0, 0]), reduction="none")
    torch.testing.assert_close(loss, torch.tensor([2 * math.exp(-60), 1.0]), rtol=1e-5, atol=0)
    loss.sum().backward()
    small = math.exp(-60)
    expected = torch.tensor([[-2 * small, small, small], [-small, small, 0.0]])
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-40)


def test_accuracy_with_excluded_classes_is_finite():
    x = torch.tensor([[-math.inf, 1.0, 0.0], [-math.inf, -math.inf, -math.inf]]).requires_grad_()
    for y, value in (([0, 1], [1.0, 1.0]), ([1, 2], [float(torch.sigmoid(torch.tensor(-1.0))), 1.0])):
        loss = smooth_accuracy_loss(x, torch.tensor(y), reduction="none")
        torch.testing.assert_close(loss, torch.tensor(value))
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert torch.isfinite(grad).all()
        assert not grad[1].any()
    assert float(smooth_accuracy_loss(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))) == 0


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 3.0, math.inf])
@pytest.mark.parametrize("smooth", [0.0, 1.5])
@pytest.mark.parametrize("average", ["binary", "macro", "micro", "macro classes", "micro classes"])
def test_f1_equals_the_formula(beta, smooth, average):
    average, _, classes = average.partition(" ")
    x = normal(7) if average == "binary" else normal(7, 4)
    t = torch.tensor([0, 1, 1, 3, 0, 0, 1]) if classes else hot(*x.shape)
    if not classes and average == "macro":
        t[:, 2] = False  # a class without positives
    expected = reference.f1_loss(x, t, beta, average, smooth)
    compare(smooth_f1_loss(x, t, beta, average, smooth), expected, x)
    if not classes:
        for other in (t.long(), t.double(), t.to(torch.float16)):
            same = smooth_f1_loss(x, other, beta, average, smooth)
            assert torch.equal(same, smooth_f1_loss(x, t, beta, average, smooth))
        soft = torch.rand(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        compare(smooth_f1_loss(x, soft, beta, average, smooth), reference.f1_loss(x, soft, beta, average, smooth), x)


def test_leading_axes_and_layout_do_not_matter():
    x, t = normal(2, 3, 4), hot(2, 3, 4)
    for average in ("macro", "micro"):
        compare(smooth_f1_loss(x, t, average=average), reference.f1_loss(x.view(6, 4), t.view(6, 4), 1.0, average), x)
        turned = smooth_f1_loss(x.transpose(0, 1), t.transpose(0, 1), average=average)
        compare(turned, smooth_f1_loss(x, t, average=average), x)
    compare(smooth_f1_loss(x[0, 0], t[0, 0], average="micro"), smooth_f1_loss(x[0, 0], t[0, 0]), x)


@pytest.mark.parametrize("average", ["binary", "macro", "micro"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_large_batches_give_the_same(average, dtype):
    shape = (20_011,) if average == "binary" else (6_007, 3)  # no multiple of the kernel's vectors
    x, t = normal(*shape, dtype=dtype), hot(*shape)
    t[1000:, ...] &= hot(*shape, seed=6)[1000:]
    exact = x.detach().double().requires_grad_()
    expected = reference.f1_loss(exact, t, 2.0, average, 0.5)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for labels in (t, t.long(), t.double(), t.flip(0).flip(0) if average == "binary" else t.T.contiguous().T):
        loss = smooth_f1_loss(x, labels, 2.0, average, 0.5)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
        (grad,) = torch.autograd.grad(3 * loss, x)
        (want,) = torch.autograd.grad(3 * expected, exact, retain_graph=True)
        # p (1 - p) is off by the rounding of p, which counts as much as p (1 - p) at its largest, 1 / 4
        torch.testing.assert_close(grad.double(), want, rtol=tolerance, atol=4 * eps * float(want.abs().max()))
    soft = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    loss, expected = smooth_f1_loss(x, soft, average=average), reference.f1_loss(exact, soft.double(), 1.0, average)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    turned = x.detach().view(shape[0], -1).T.contiguous().T.view(shape)  # another layout
    torch.testing.assert_close(smooth_f1_loss(turned, t, 2.0, average, 0.5), smooth_f1_loss(x, t, 2.0, average, 0.5))


def test_nan_is_seen_in_large_batches():
    x, t = torch.zeros(20_000, requires_grad=True), torch.ones(20_000)
    with torch.no_grad():
        x[12_345] = math.nan
    for loss in (smooth_f1_loss(x, t), smooth_accuracy_loss(x, t)):
        assert torch.isnan(loss)
        assert torch.isnan(torch.autograd.grad(loss, x)[0]).any()


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_accuracy_of_large_batches_is_the_same(reduction, dtype):
    x, t = normal(20_011, dtype=dtype), hot(20_011)
    exact = x.detach().double().requires_grad_()
    expected = torch.sigmoid(torch.where(t, -exact, exact))
    expected = expected if reduction == "none" else expected.mean()
    upstream = torch.linspace(0.5, 2, expected.numel(), dtype=torch.float64).view(expected.shape)
    (want,) = torch.autograd.grad(expected, exact, upstream)
    for labels in (t, t.long(), t.float()):
        loss = smooth_accuracy_loss(x, labels, reduction=reduction)
        torch.testing.assert_close(loss, expected.to(loss.dtype))
        (grad,) = torch.autograd.grad(loss, x, upstream.to(loss.dtype))
        torch.testing.assert_close(grad, want.to(dtype))


def test_hard_predictions_give_sklearn_s_scores():
    from sklearn.metrics import fbeta_score, precision_score, recall_score

    decisions, t = hot(200, 3, seed=1), hot(200, 3, seed=2)
    x = torch.where(decisions, 80.0, -80.0)
    for average in ("macro", "micro"):
        expected = fbeta_score(t.numpy(), decisions.numpy(), beta=2, average=average)
        assert 1 - float(smooth_f1_loss(x, t, 2.0, average)) == pytest.approx(expected, abs=1e-6)
    precision, recall = (f(t[:, 0].numpy(), decisions[:, 0].numpy()) for f in (precision_score, recall_score))
    assert 1 - float(smooth_f1_loss(x[:, 0], t[:, 0], beta=0)) == pytest.approx(precision, abs=1e-6)
    assert 1 - float(smooth_f1_loss(x[:, 0], t[:, 0], beta=math.inf)) == pytest.approx(recall, abs=1e-6)
    labels = torch.randint(3, (200,), generator=torch.Generator().manual_seed(3))
    micro = smooth_f1_loss(x, labels, average="micro")
    torch.testing.assert_close(micro, smooth_accuracy_loss(x, labels))


def test_nothing_to_find_contributes_nothing():
    x = normal(5, 2)
    none = torch.zeros(5, 2)
    for average in ("macro", "micro"):
        loss = smooth_f1_loss(x, none, average=average)
        assert float(loss.detach()) == 0
        assert not torch.autograd.grad(loss, x)[0].any()
        empty = normal(0, 2)
        loss = smooth_f1_loss(empty, torch.zeros(0, 2), average=average)
        assert float(loss.detach()) == 0
        assert torch.autograd.grad(loss, empty)[0].shape == (0, 2)
    one = torch.tensor([[1.0, 0.0]]).expand(5, 2)
    loss = smooth_f1_loss(x, one, average="macro")
    torch.testing.assert_close(loss, smooth_f1_loss(x[:, 0], one[:, 0]) / 2)  # still divided by both classes
    smoothed = smooth_f1_loss(x, none, average="micro", smooth=1.0)
    assert (torch.autograd.grad(smoothed, x)[0] > 0).all()  # now every logit is pushed down


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_logits_stay_finite(dtype):
    for value in (-math.inf, -6e4, -104.0, -90.0, 104.0, 6e4):
        x = torch.full((8,), value, dtype=dtype).requires_grad_()
        for t in (torch.ones(8), torch.zeros(8), torch.tensor([1.0] + [0.0] * 7)):
            for beta in (0.0, 1.0, math.inf, 1e30, 1e-30):
                loss = smooth_f1_loss(x, t, beta)
                assert torch.isfinite(loss)
                assert 0 <= float(loss.detach()) <= 1
                assert torch.isfinite(torch.autograd.grad(loss, x)[0]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_counts_beyond_half_precision_are_summed_in_float32(dtype):
    x = torch.zeros(100_000, dtype=dtype, requires_grad=True)
    t = torch.ones(100_000, dtype=dtype)
    loss = smooth_f1_loss(x, t)  # 1 - 2 (n / 2) / (n + n / 2)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(1 / 3, rel=1e-5)
    (1e5 * loss).backward()
    assert x.grad.dtype == dtype
    assert float(x.grad[0]) == pytest.approx(-(2 / 9), rel=1e-2)  # -(2 / den - 2 TP / den^2) p (1 - p), den = 1.5 n
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(smooth_f1_loss(x, t), loss)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(0, 10**6), st.floats(0, 5))
def test_f1_is_a_share_and_ignores_the_order(n, seed, beta):
    x, t = normal(n, seed=seed), hot(n, seed=seed)
    loss = smooth_f1_loss(x, t, beta)
    assert 0 <= float(loss.detach()) <= 1
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(smooth_f1_loss(x[order], t[order], beta), loss)
    (grad,) = torch.autograd.grad(loss, x)
    assert (grad[t] <= 0).all()
    assert (grad[~t] >= 0).all()


def test_gradcheck_and_the_error_on_differentiating_twice():
    x, t, y = normal(4, 3), hot(4, 3), torch.tensor([0, 2, 2, 1])
    for average in ("macro", "micro"):
        assert torch.autograd.gradcheck(lambda v, a=average: smooth_f1_loss(v, t, 2.0, a, 0.5), (x,))
        assert torch.autograd.gradcheck(lambda v, a=average: smooth_f1_loss(v, y, 2.0, a), (x,))
    assert torch.autograd.gradcheck(lambda v: smooth_accuracy_loss(v, y, reduction="none"), (x,))
    assert torch.autograd.gradcheck(lambda v: smooth_accuracy_loss(v, t[:, 0], reduction="none"), (x[:, 0],))
    two = smooth_accuracy_loss(x[:, 0], t[:, 0])
    for loss in (smooth_f1_loss(x, t, average="micro"), smooth_accuracy_loss(x, y), two):
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad.square().sum().backward()


def test_module_without_momentum_is_the_function():
    x, t = normal(9, 3), hot(9, 3)
    loss = SmoothF1Loss(beta=2.0, average="macro", smooth=0.5)
    assert torch.equal(loss(x, t), smooth_f1_loss(x, t, 2.0, "macro", 0.5))
    assert not loss.state_dict()
    assert "beta=2" in repr(loss)


@pytest.mark.parametrize("average", ["binary", "macro", "micro"])
def test_running_sums_are_the_weighted_past(average):
    shape = (8,) if average == "binary" else (8, 3)
    batches = [(normal(*shape, seed=i), hot(*shape, seed=i)) for i in range(3)]
    loss = SmoothF1Loss(0.8, average=average, num_classes=3, smooth=0.5).double()
    for step, (x, t) in enumerate(batches):
        weights = [0.2 * 0.8 ** (step - i) / (1 - 0.8 ** (step + 1)) for i in range(step + 1)]
        axis = 0 if average == "macro" else None

        def total(v, axis=axis):
            return v.sum() if axis is None else v.sum(axis)

        tp = count = mass = 0
        for i, (weight, (u, s)) in enumerate(zip(weights, batches, strict=False)):
            p = torch.sigmoid(u if i == step else u.detach())  # the gradient flows through the current batch
            tp, count, mass = tp + weight * total(p * s), count + weight * total(s.double()), mass + weight * total(p)
        expected = (1 - (2 * tp + 0.5) / (count + mass + 0.5)).mean()
        compare(loss(x, t), expected, x)
    assert int(loss.num_batches) == 3
    before = loss.running.clone()
    loss.eval()
    x, t = batches[0]
    torch.testing.assert_close(loss(x, t), smooth_f1_loss(x, t, average=average, smooth=0.5))
    assert torch.equal(loss.running, before)
    second = SmoothF1Loss(0.8, average=average, num_classes=3, smooth=0.5).double()
    second.load_state_dict(loss.state_dict(), strict=True)
    assert torch.equal(second.train()(x, t), loss.train()(x, t))


def test_running_sums_keep_a_gradient_in_batches_without_positives():
    loss = SmoothF1Loss(0.9)
    loss(normal(8, dtype=torch.float32), torch.ones(8))
    x = normal(8, dtype=torch.float32, seed=1)
    value = loss(x, torch.zeros(8))
    assert (torch.autograd.grad(value, x)[0] > 0).all()
    assert not torch.autograd.grad(smooth_f1_loss(x, torch.zeros(8)), x)[0].any()


def test_running_sums_count_in_float32_in_a_bfloat16_model():
    loss = SmoothF1Loss(0.99).to(torch.bfloat16)
    x, t = torch.full((100,), 2.0, dtype=torch.bfloat16), torch.ones(100)
    for _ in range(200):
        value = loss(x, t)
    torch.testing.assert_close(value, smooth_f1_loss(x, t), rtol=1e-5, atol=0)


def test_switch_counts_calls_in_training_mode():
    loss = SwitchLoss(lambda x: x, lambda x: -x, at_step=2)
    seen = [loss(1), loss.eval()(1), loss.train()(1), loss(1), loss.eval()(1), loss.train()(1)]
    assert seen == [1, 1, 1, -1, -1, -1]
    assert SwitchLoss(lambda x: x, lambda x: -x, at_step=0)(1) == -1
    resumed = SwitchLoss(lambda x: x, lambda x: -x, at_step=2)
    assert not resumed.switched
    resumed.load_state_dict(loss.state_dict())
    assert resumed.switched
    assert resumed.steps == loss.steps == 4


def test_switch_follows_the_epoch_and_passes_everything_on():
    x, t = normal(6), hot(6)
    loss = SwitchLoss(F.binary_cross_entropy_with_logits, SmoothF1Loss(0.5), at_epoch=1)
    assert torch.equal(loss(x, target=t.double()), F.binary_cross_entropy_with_logits(x, t.double()))
    loss.set_epoch(1)
    compare(loss(x, t=t), smooth_f1_loss(x, t), x)
    assert int(loss.then.num_batches) == 1
    assert set(loss.state_dict()) == {"then.running", "then.num_batches", "_extra_state"}
    loss.set_epoch(0)
    assert not loss.switched
    assert "at_epoch=1" in repr(loss)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"t": torch.ones(4)}, ValueError, r"\(3,\); got \(4,\)"),
        ({"t": torch.tensor([0.0, 2.0, 1.0])}, ValueError, "from 0 to 2"),
        ({"t": torch.tensor([0.0, math.nan, 1.0])}, ValueError, "nan"),
        ({"t": torch.tensor([-1, 0, 1])}, ValueError, "from -1 to 1"),
        ({"t": [0, 1, 1]}, TypeError, "list"),
        ({"logits": torch.zeros(3, dtype=torch.long)}, TypeError, "int64"),
        ({"logits": torch.zeros(3, 2), "t": torch.zeros(3, 2)}, ValueError, r"binary.*got \(3, 2\)"),
        ({"average": "macro"}, ValueError, r"\(\.\.\., C\).*got \(3,\)"),
        ({"average": "weighted"}, ValueError, "'weighted'"),
        ({"logits": torch.zeros(3, 0), "t": torch.zeros(3, 0), "average": "micro"}, ValueError, r"\(3, 0\)"),
        ({"logits": torch.zeros(3, 2), "t": torch.tensor([0, 1, 2]), "average": "macro"}, ValueError, "from 0 to 2"),
        ({"logits": torch.zeros(3, 2), "t": torch.zeros(3), "average": "macro"}, TypeError, "float32"),
        ({"beta": -1.0}, ValueError, "beta"),
        ({"beta": math.nan}, ValueError, "beta"),
        ({"beta": torch.ones(2)}, TypeError, "beta"),
        ({"smooth": -1.0}, ValueError, "smooth"),
        ({"smooth": "no"}, TypeError, "smooth"),
    ],
)
def test_bad_f1_arguments_are_rejected(change, error, message):
    with pytest.raises(error, match=message):
        smooth_f1_loss(**({"logits": torch.zeros(3), "t": torch.ones(3)} | change))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3, 2), torch.tensor([0, 1, 2])), ValueError, "from 0 to 2"),
        ((torch.zeros(3, 2), torch.tensor([0, 1])), ValueError, r"\(3,\); got \(2,\)"),
        ((torch.zeros(3, 2), torch.zeros(3)), TypeError, "float32"),
        ((torch.zeros(3), torch.tensor([0, 1, 2])), ValueError, r"\[0, 2\)"),
        ((torch.zeros(3), torch.tensor([0.0, 0.5, 1.0])), ValueError, "0 or 1.*got 0.5"),
        ((torch.zeros(3), torch.tensor([0.0, math.nan, 1.0])), ValueError, "0 or 1.*got nan"),
        ((torch.zeros(3), torch.zeros(4)), ValueError, r"\(3,\); got \(4,\)"),
        ((torch.zeros(3, 0), torch.zeros(3, dtype=torch.long)), ValueError, "at least one class"),
        ((torch.tensor(0.0), torch.tensor(0)), ValueError, "scalar"),
        ((torch.zeros(3, 2, dtype=torch.long), torch.tensor([0, 1, 1])), TypeError, "int64"),
    ],
)
def test_bad_accuracy_arguments_are_rejected(arguments, error, message):
    with pytest.raises(error, match=message):
        smooth_accuracy_loss(*arguments)
    with pytest.raises(ValueError, match="'avg'"):
        smooth_accuracy_loss(torch.zeros(1, 2), torch.tensor([0]), reduction="avg")


def test_bad_modules_are_rejected():
    for momentum, error in ((1.0, ValueError), (-0.1, ValueError), ("much", TypeError)):
        with pytest.raises(error, match="momentum"):
            SmoothF1Loss(momentum)
    with pytest.raises(ValueError, match="num_classes; got None"):
        SmoothF1Loss(0.9, average="macro")
    with pytest.raises(ValueError, match="3 classes; got 2"):
        SmoothF1Loss(0.9, average="macro", num_classes=3)(torch.zeros(4, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match="exactly one"):
        SwitchLoss(len, len)
    with pytest.raises(ValueError, match="got 1 and 2"):
        SwitchLoss(len, len, at_step=1, at_epoch=2)
    with pytest.raises(ValueError, match="at_step"):
        SwitchLoss(len, len, at_step=-1)
    with pytest.raises(TypeError, match="first must be callable; got float"):
        SwitchLoss(0.5, len, at_step=1)
    with pytest.raises(ValueError, match="epoch"):
        SwitchLoss(len, len, at_epoch=1).set_epoch(-1)


def test_a_compiled_switch_by_epochs_makes_two_graphs():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    loss = SwitchLoss(lambda x: x.sum(), lambda x: -x.sum(), at_epoch=10)
    step = torch.compile(loss, fullgraph=True, backend=backend)
    seen = []
    for epoch in range(12):
        loss.set_epoch(epoch)
        seen.append(float(step(torch.ones(2))))
    assert seen == [2.0] * 10 + [-2.0] * 2
    assert len(graphs) == 2
    resumed = SwitchLoss(lambda x: x, lambda x: -x, at_epoch=10)
    resumed.load_state_dict(loss.state_dict())
    assert resumed.switched
    assert resumed.epoch == 11
    assert SwitchLoss(len, len, at_epoch=0).switched


@pytest.mark.slow
def test_running_sums_compile_as_one_graph():
    loss, eager = SmoothF1Loss(0.9), SmoothF1Loss(0.9)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        x, t = normal(6, dtype=torch.float32, seed=seed), hot(6, seed=seed)
        compare(compiled(x, t), eager(x, t), x)
    torch.testing.assert_close(loss.running, eager.running)
