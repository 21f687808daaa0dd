"""Heads in closed form: analytic_head_ and to_linear."""

import numpy as np
import pytest
import torch
from torch import nn

from kexue.stats import AnalyticLogisticRegression, analytic_head_


def features(n=90, d=5, classes=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % classes
    return (torch.randn(n, d, generator=g, dtype=torch.float64) + 2 * torch.eye(d)[y] + 3).to(dtype), y


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_head_gives_the_probabilities_of_the_estimator(classes, dtype, tolerance):
    x, y = features(classes=classes, dtype=dtype)
    head = nn.Linear(5, classes, dtype=dtype)
    assert analytic_head_(head, x.requires_grad_(), y) is head
    expected = (
        AnalyticLogisticRegression().fit(x.detach().double().numpy(), y.numpy()).predict_proba(x.detach().double())
    )
    np.testing.assert_allclose(head(x).detach().double().softmax(1), expected, atol=tolerance)
    assert head.weight.dtype == dtype
    assert head.weight.requires_grad
    assert head.weight.grad is None
    assert x.grad is None


def test_one_output_gets_the_log_odds():
    x, y = features(classes=2)
    head = analytic_head_(nn.Linear(5, 1, dtype=torch.float64), x, y, shrinkage=0.2, ridge=0.0)
    model = AnalyticLogisticRegression(shrinkage=0.2, ridge=0.0).fit(x, y)
    np.testing.assert_allclose(head(x).detach()[:, 0], model.decision_function(x), atol=1e-9)


def test_ignored_labels_and_further_axes():
    x, y = features()
    expected = analytic_head_(nn.Linear(5, 3), x[:60], y[:60])
    y[60:] = -100
    x[60:] = torch.nan  # padding may hold anything
    got = analytic_head_(nn.Linear(5, 3), x.view(9, 10, 5), y.view(9, 10).int())
    assert torch.equal(got.weight, expected.weight)
    assert torch.equal(got.bias, expected.bias)
    transposed = analytic_head_(nn.Linear(5, 3), x.T.contiguous().T, y)
    torch.testing.assert_close(transposed.weight, expected.weight)


def test_head_learns_on_from_there():
    x, y = features(dtype=torch.float32)
    head = analytic_head_(nn.Linear(5, 3), x, y)
    start = nn.functional.cross_entropy(head(x), y)
    optimizer = torch.optim.SGD(head.parameters(), 0.01)
    start.backward()
    optimizer.step()
    assert nn.functional.cross_entropy(head(x), y) < start < 0.8


def test_weights_do_not_carry_what_classes_share():
    x, y = features()
    head = analytic_head_(nn.Linear(5, 3, dtype=torch.float64), x, y)
    shares = torch.bincount(y) / len(y)
    torch.testing.assert_close(shares.double() @ head.weight, torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("classes", [2, 4])
def test_to_linear_is_the_decision_function(classes):
    x, y = features(classes=classes)
    model = AnalyticLogisticRegression().fit(x.numpy(), y.numpy())
    head = model.to_linear(torch.float64)
    assert head.weight.shape == model.coef_.shape
    np.testing.assert_allclose(head(x).detach().squeeze(1), model.decision_function(x.numpy()), rtol=1e-12)
    assert model.to_linear().weight.dtype == torch.float32
    with pytest.raises(ValueError, match="covariance='shared'"):
        AnalyticLogisticRegression(covariance="per_class").fit(x.numpy(), y.numpy()).to_linear()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"head": nn.Identity()}, TypeError, "Identity"),
        ({"head": nn.Linear(5, 3, bias=False)}, ValueError, "bias=False"),
        ({"head": nn.Linear(4, 3)}, ValueError, r"\(..., 4\).*\(90, 5\)"),
        ({"features": np.zeros((90, 5))}, TypeError, "ndarray"),
        ({"features": torch.zeros(90, 5, dtype=torch.long)}, TypeError, "int64"),
        ({"features": torch.full((90, 5), torch.inf)}, ValueError, "inf"),
        ({"features": 1e200 * torch.eye(90, 5).double()}, ValueError, r"float64; got values up to 1e\+200"),
        ({"features": torch.zeros(90, 5).to_sparse()}, TypeError, "dense; got a tensor of layout torch.sparse_coo"),
        ({"labels": torch.zeros(90)}, TypeError, "float32"),
        ({"labels": torch.zeros(90, dtype=torch.bool)}, TypeError, "bool"),
        ({"labels": torch.zeros(80, dtype=torch.long)}, ValueError, r"\(80,\)"),
        ({"labels": torch.full((90,), 3)}, ValueError, r"\[0, 3\) or -100; got 3"),
        ({"labels": torch.full((90,), -1)}, ValueError, "got -1"),
        ({"labels": torch.ones(90, dtype=torch.long)}, ValueError, r"none of \[0, 2\]"),
        ({"labels": torch.full((90,), -100)}, ValueError, r"none of \[0, 1, 2\]"),
        ({"features": torch.zeros(0, 5), "labels": torch.zeros(0, dtype=torch.long)}, ValueError, "none of"),
        ({"shrinkage": 2.0}, ValueError, "2.0"),
        ({"ridge": -1.0}, ValueError, "-1.0"),
    ],
)
def test_bad_input_is_named_and_leaves_the_head(change, error, message):
    x, y = features()
    given = {"head": nn.Linear(5, 3), "features": x, "labels": y, **change}
    before = [p.clone() for p in given["head"].parameters()]
    with pytest.raises(error, match=message):
        analytic_head_(**given)
    assert all(torch.equal(a, b) for a, b in zip(before, given["head"].parameters(), strict=True))


def test_weights_beyond_the_range_of_the_head_are_refused():
    x, y = features()
    head = nn.Linear(5, 3, dtype=torch.float16)
    before = head.weight.clone()
    with pytest.raises(ValueError, match=r"must fit the dtype of the head, torch.float16; got up to \d"):
        analytic_head_(head, x * 1e-7, y)
    assert torch.equal(head.weight, before)
    with pytest.raises(ValueError, match=r"must fit the dtype of the head, torch.float16"):
        AnalyticLogisticRegression().fit(x.numpy() * 1e-7, y.numpy()).to_linear(torch.float16)
