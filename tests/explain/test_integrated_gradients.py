"""Integrated gradients: values against slow sums, the axioms, the adaptive rule, edge cases, bad input."""

import functools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kexue.explain import integrated_gradients
from kexue.explain._quadrature import FIXED, fixed_rule, panel_rule
from reference.integrated_gradients import integrated_gradients as slow
from reference.integrated_gradients import riemann


def rows(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(inputs=4, outputs=3, seed=0, activation=nn.Tanh):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, 16), activation(), nn.Linear(16, outputs)).double()


def step(slope, at=0.7):
    """A classifier with two plateaus, 5 apart, and a flip between them that is 1 / slope of the path wide."""
    return lambda v: 5 * torch.sigmoid(slope * (v.mean(1) - at))


# --- values -----------------------------------------------------------------------------------------------------------


def test_smooth_network_against_a_sum_of_20_000_points():
    net, x, start = network(), rows(3, 4), rows(3, 4, seed=1)
    found = integrated_gradients(net, x, start, target=torch.tensor([0, 2, 1]))
    for i, column in enumerate((0, 2, 1)):
        expected = slow(lambda v, c=column: net(v)[:, c], x[i : i + 1], start[i : i + 1])
        torch.testing.assert_close(found.attributions[i : i + 1], expected, rtol=1e-5, atol=1e-6)
    assert found.converged.all()
    assert found.n_grad <= 3 * 24  # a smooth function takes few


@pytest.mark.parametrize("slope", [30, 300, 3000, 30_000])
def test_a_sharp_flip_is_found_where_fifty_nodes_miss_it(slope):
    x = torch.stack([torch.ones(6), torch.tensor([0.5, 1.0, 1.5, 0.9, 1.1, 1.0])]).double()
    found = integrated_gradients(step(slope), x)
    assert found.converged.all()
    assert (found.gap < 1e-3).all()
    share = x / x.sum(1, keepdim=True)  # the gradient is the same for all inputs
    torch.testing.assert_close(found.attributions, share * found.change[:, None], rtol=1e-3, atol=1e-3)
    assert found.n_grad + found.n_forward <= 2 * 120
    fixed = integrated_gradients(step(slope), x, method="gauss", n=50)
    if slope >= 300:
        assert fixed.gap.max() > 0.5
        assert not fixed.converged.all()


def test_kink_jump_and_root():
    x = torch.tensor([[1.0, 0.7]], dtype=torch.float64)
    kink = integrated_gradients(lambda v: torch.relu(v.sum(1) - 0.6) * 3, x)
    torch.testing.assert_close(kink.attributions, x / 1.7 * 3.3, rtol=1e-3, atol=1e-3)
    root = integrated_gradients(lambda v: v.sum(1).sqrt(), x)
    torch.testing.assert_close(root.attributions, x / 1.7 * 1.7**0.5, rtol=3e-3, atol=1e-3)
    assert bool(kink.converged)
    assert bool(root.converged)
    jump = integrated_gradients(lambda v: (v.sum(1) > 0.6) + v[:, 0], x)  # no gradient makes it
    assert not bool(jump.converged)
    assert jump.gap > 0.9


def test_errors_that_cancel_in_the_sum_are_seen():
    # Two flips at one place with opposite signs: the output is constant and every sum over features is right.
    def f(v):
        return torch.sigmoid(300 * (v[:, 0] - 0.511)) - torch.sigmoid(300 * (v[:, 1] - 0.511))

    found = integrated_gradients(f, torch.ones(1, 2, dtype=torch.float64))
    torch.testing.assert_close(found.attributions, torch.tensor([[1.0, -1.0]], dtype=torch.float64), rtol=0, atol=0.02)
    assert bool(found.converged)
    assert found.error < 0.02
    coarse = integrated_gradients(f, torch.ones(1, 2, dtype=torch.float64), method="gauss", n=9)
    assert coarse.gap < 1e-9
    assert not bool(coarse.converged)


def test_a_bump_between_two_plateaus_of_equal_height():
    def f(v):
        return 4 * torch.exp(-((v[:, 0] - 0.3) ** 2) / 0.001) + v[:, 1]

    found = integrated_gradients(f, torch.ones(1, 2, dtype=torch.float64))
    torch.testing.assert_close(found.attributions, torch.tensor([[0.0, 1.0]], dtype=torch.float64), rtol=0, atol=2e-3)
    assert bool(found.converged)


@settings(max_examples=20)
@given(
    # Upwards all of them: two flips that undo each other between two nodes leave no trace that a rule could see.
    slopes=st.lists(st.floats(0, 400), min_size=1, max_size=3),
    places=st.lists(st.floats(0.05, 0.95), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
def test_what_says_that_it_converged_adds_up(slopes, places, seed):
    w = rows(3, 5, seed=seed).abs()

    def f(v):
        total = torch.tanh(v @ rows(5, seed=seed + 1))
        for slope, place, weights in zip(slopes, places, w, strict=False):
            total = total + torch.sigmoid(slope * (v @ weights / weights.sum() - place))
        return total

    x = torch.ones(2, 5, dtype=torch.float64) + 0.1 * rows(2, 5, seed=seed + 2)
    found = integrated_gradients(f, x)
    allowed = 1e-3 * found.change.abs().clamp(min=1)
    assert ((found.gap <= allowed) | ~found.converged).all()
    expected = slow(f, x, torch.zeros_like(x), 4000)
    off = (found.attributions - expected).abs().sum(1)
    assert ((off <= 0.03 * expected.abs().sum(1).clamp(min=1)) | ~found.converged).all()
    # Three sharp flips one after the other may need more than the default 200 evaluations; then the result says so.
    assert integrated_gradients(f, x, max_evals=1000).converged.all()


def test_a_slope_that_was_seen_is_not_forgotten():
    # The middle of the first nodes lies in two flips that undo each other; no node of the next panels does.
    w = rows(3, 5, seed=0).abs()

    def f(v):
        total = torch.tanh(v @ rows(5, seed=1))
        for slope, place, weights in zip((68.0, 76.0, -66.0), (0.5, 0.875, 0.5), w, strict=True):
            total = total + torch.sigmoid(slope * (v @ weights / weights.sum() - place))
        return total

    x = torch.ones(2, 5, dtype=torch.float64) + 0.1 * rows(2, 5, seed=2)
    found = integrated_gradients(f, x)
    assert found.converged.all()
    torch.testing.assert_close(found.attributions, slow(f, x, torch.zeros_like(x), 4000), rtol=0, atol=5e-3)


def test_the_last_evaluations_go_where_most_is_missing():
    # Sixty kinks; 100 evaluations do not suffice. Cut in the opposite order the mean gap is 0.50.
    w, b, c = rows(6, 60), rows(60, seed=1), 4 * rows(60, seed=2)
    x = rows(20, 6, seed=3)
    few = integrated_gradients(lambda v: torch.relu(v @ w + b) @ c, x, max_evals=100)
    assert not few.converged.any()
    assert few.gap.mean() < 0.4
    assert few.n_grad + few.n_forward <= 100 * len(x)
    many = integrated_gradients(lambda v: torch.relu(v @ w + b) @ c, x, max_evals=2000)
    assert many.converged.all()


def test_a_flip_in_half_precision_is_found():
    # Points round in each coordinate at another place, so that the flip can be narrowed far below their precision.
    w = rows(64, seed=1).abs()

    def f(v):
        return 8 * torch.tanh(500 * ((v @ w.to(v)) / w.sum().to(v) - 0.37))

    x = (1 + 0.3 * rows(4, 64)).bfloat16()
    found = integrated_gradients(lambda v: f(v.float()), x)
    assert found.attributions.dtype == torch.float32
    assert (found.gap < 0.02 * found.change).all()


# --- axioms -----------------------------------------------------------------------------------------------------------


def test_axioms():
    net, x = network(), rows(2, 4)
    found = integrated_gradients(net, x, target=0)
    torch.testing.assert_close(found.attributions.sum(1), found.change, rtol=0, atol=1e-3)  # completeness
    torch.testing.assert_close(found.change, (net(x) - net(0 * x))[:, 0].detach())

    def only_first(v):
        return torch.tanh(v[:, 0] * 3)

    shares = integrated_gradients(only_first, x).attributions
    assert (shares[:, 1:] == 0).all()  # dummy
    assert (shares[:, 0] != 0).all()  # sensitivity
    other = integrated_gradients(lambda v: (torch.exp(6 * v[:, 0]) - 1) / (torch.exp(6 * v[:, 0]) + 1), x).attributions
    torch.testing.assert_close(other, shares, rtol=1e-3, atol=1e-4)  # the same function, computed in another way

    def a(v):
        return net(v)[:, 0]

    def b(v):
        return net(v)[:, 1]

    tight = functools.partial(integrated_gradients, x=x, tol=1e-8, max_evals=500)
    both = tight(lambda v: 2 * a(v) - 3 * b(v)).attributions
    torch.testing.assert_close(both, 2 * tight(a).attributions - 3 * tight(b).attributions)  # linearity
    even = torch.full((1, 4), 0.8, dtype=torch.float64)
    same = integrated_gradients(lambda v: torch.tanh(v.prod(1)), even).attributions
    torch.testing.assert_close(same, same.mean().expand_as(same))  # symmetry


def test_against_is_the_difference_of_two_explanations():
    net, x = network(), rows(3, 4)
    tight = functools.partial(integrated_gradients, net, x, tol=1e-8, max_evals=500)
    difference = tight(target=[0, 1, 2], against=1)
    expected = tight(target=[0, 1, 2]).attributions - tight(target=1).attributions
    torch.testing.assert_close(difference.attributions, expected, rtol=0, atol=1e-7)
    assert difference.change[1] == 0


# --- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("n", [2, 5, 20])
def test_fixed_rules_against_their_sums(method, n):
    net, x, start = network(), rows(2, 4), rows(2, 4, seed=1)
    nodes, weights = fixed_rule(method, n)
    found = integrated_gradients(net, x, start, target=1, method=method, n=n)
    expected = riemann(lambda v: net(v)[:, 1], x, start, nodes, weights)
    torch.testing.assert_close(found.attributions, expected)
    torch.testing.assert_close(found.gap, (expected.sum(1) - found.change).abs())
    assert abs(weights.sum() - 1) < 1e-12  # also for the trapezoid
    assert found.n_grad == 2 * n


def test_the_articles_sum_is_right_with_twenty_nodes():
    net, x = network(outputs=1), rows(2, 4)
    mean = torch.zeros_like(x)
    for k in range(1, 21):
        alpha = k / 20
        point = ((1 - alpha) * x).requires_grad_()
        (gradient,) = torch.autograd.grad(net(point).sum(), point)
        mean += gradient / 20
    found = integrated_gradients(net, x, method="right", absolute=True)
    torch.testing.assert_close(found.attributions, (x * mean).abs())


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 9])
def test_panel_rule_is_exact_where_it_should_be(n):
    rule = panel_rule(n)
    for degree in range(2 * n):
        assert abs(rule.weights @ rule.nodes**degree - 1 / (degree + 1)) < 1e-12
    ends = np.concatenate([[0.0], rule.nodes, [1.0]])
    for degree in range(n):
        parts = np.diff(ends ** (degree + 1)) / (degree + 1)
        np.testing.assert_allclose(rule.between @ rule.nodes**degree, parts, atol=1e-12)
        assert degree == n - 1 or abs(rule.null @ rule.nodes**degree) < 1e-12
        assert degree >= n - 2 or abs(rule.odd @ rule.nodes**degree) < 1e-12
    np.testing.assert_allclose(rule.between.sum(0), rule.weights, atol=1e-12)


def test_curved_paths_in_both_directions():
    net, x = network(), rows(2, 4)
    start = 0.3 * rows(2, 4, seed=1)

    def there(a):
        return x + (start - x) * a + torch.sin(torch.pi * a) * 0.5

    found = integrated_gradients(net, x, target=0, path=there)
    expected = slow(lambda v: net(v)[:, 0], x, start, 4000, path=there)
    torch.testing.assert_close(found.attributions, expected, rtol=1e-3, atol=1e-4)
    back = integrated_gradients(net, x, start, target=0, path=lambda a: there(1 - a))
    torch.testing.assert_close(back.attributions, found.attributions)
    assert found.converged.all()
    with pytest.raises(ValueError, match="misses x"):
        integrated_gradients(net, x, target=0, path=lambda a: x + 1 + a)
    with pytest.raises(ValueError, match="must end in the baseline"):
        integrated_gradients(net, x, torch.ones(2, 4).double(), target=0, path=there)


# --- inputs, masks, batches -------------------------------------------------------------------------------------------


def test_rows_do_not_depend_on_each_other_or_on_blocks():
    x = torch.stack([torch.ones(6), torch.linspace(0.2, 2, 6), 0.1 * torch.ones(6)]).double()
    f = step(500)
    whole = integrated_gradients(f, x)
    for i in range(3):
        alone = integrated_gradients(f, x[i : i + 1])
        torch.testing.assert_close(alone.attributions[0], whole.attributions[i], rtol=1e-9, atol=1e-12)
        assert bool(alone.converged[0]) == bool(whole.converged[i])
    small = integrated_gradients(f, x, block=3)
    torch.testing.assert_close(small.attributions, whole.attributions, rtol=1e-9, atol=1e-12)
    again = integrated_gradients(f, x)
    assert torch.equal(again.attributions, whole.attributions)


def test_masks_are_repeated_and_padding_gets_nothing():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True).double()
    head = rows(8)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])

    def f(v, mask):
        return layer(v, src_key_padding_mask=~mask)[:, 0] @ head

    x, start = rows(2, 5, 8), rows(8, seed=1).expand(5, 8)  # LayerNorm does not see the scale that zero would vary
    found = integrated_gradients(f, x, start, args=(mask,))
    assert found.converged.all()
    assert (found.attributions[1, 3:] == 0).all()
    short = integrated_gradients(f, x[1:, :3], start[:3], args=(mask[1:, :3],))
    torch.testing.assert_close(short.attributions[0], found.attributions[1, :3], rtol=1e-6, atol=1e-8)
    assert layer.training  # dropout was off while it ran, and is on again
    assert all(p.requires_grad and p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("kind", ["module", "bound", "partial", "closure", "default"])
def test_modules_behind_a_function_are_found(kind):
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2), nn.BatchNorm1d(2)).double()
    f = {
        "module": net,
        "bound": net.forward,
        "partial": functools.partial(lambda m, v: m(v), net),
        "closure": lambda v: net(v),
        "default": lambda v, m=net: m(v),
    }[kind]
    first, second = (integrated_gradients(f, rows(3, 4), target=0) for _ in range(2))
    assert torch.equal(first.attributions, second.attributions)
    assert first.converged.all()
    assert net.training
    assert net[2].num_batches_tracked == 0


def test_baselines():
    net, x = network(), rows(2, 4)
    shared = functools.partial(integrated_gradients, net, x, target=0, tol=1e-8, max_evals=500)
    torch.testing.assert_close(shared("zero").attributions, shared(0).attributions)
    torch.testing.assert_close(shared(0.5).attributions, shared(torch.full((4,), 0.5)).attributions)
    torch.testing.assert_close(shared("mean").attributions, shared(x.mean(0)).attributions)
    several = rows(3, 2, 4, seed=3)
    expected = shared(several)
    each = torch.stack([shared(one).attributions for one in several]).mean(0)
    torch.testing.assert_close(expected.attributions, each)
    assert (expected.gap < 1e-7).all()
    assert shared(rows(3, 1, 4)).attributions.shape == x.shape
    chosen = integrated_gradients(net, x, several)  # the target is that of x for all baselines
    assert torch.equal(chosen.target, net(x).argmax(1))


def test_named_baselines_come_from_the_model_in_f():
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 4).double()
            self.config = type("Config", (), {"pad_token_id": 1})()

        def get_input_embeddings(self):
            return self.table

        def forward(self, e):
            return torch.tanh(e).sum((1, 2))

    model, x = Tiny(), rows(1, 3, 4)
    for name, row in (("pad", model.table.weight[1]), ("mean", model.table.weight.mean(0))):
        named = integrated_gradients(lambda e: model(e), x, name)
        torch.testing.assert_close(named.attributions, integrated_gradients(model, x, row.expand(3, 4)).attributions)
    with pytest.raises(ValueError, match="mask_token_id"):
        integrated_gradients(model, x, "mask")
    with pytest.raises(ValueError, match="at least 2; got 1"):
        integrated_gradients(network(), rows(1, 4), "mean")


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
def test_dtypes(dtype, close):
    net, x = network(), rows(3, 4)
    expected = integrated_gradients(net, x, target=0).attributions
    found = integrated_gradients(network().to(dtype), x.to(dtype), target=0)
    assert found.attributions.dtype == torch.float32
    assert (found.attributions - expected).abs().max() < close * expected.abs().sum()
    assert found.gap.dtype == torch.float64
    assert integrated_gradients(net, x).attributions.dtype == torch.float64


def test_edges():
    net = network()
    none = integrated_gradients(net, torch.zeros(0, 4, dtype=torch.float64))
    assert none.attributions.shape == (0, 4)
    assert none.gap.shape == none.error.shape == none.converged.shape == (0,)
    one = integrated_gradients(lambda v: v**3, torch.tensor([2.0]))  # a number for each example
    torch.testing.assert_close(one.attributions, torch.tensor([8.0]))
    same = integrated_gradients(net, rows(2, 4), rows(2, 4))
    assert (same.attributions == 0).all()
    assert same.converged.all()
    constant = integrated_gradients(lambda v: v.new_ones(len(v)), rows(2, 4))
    assert (constant.attributions == 0).all()
    x = rows(4, 2).T.requires_grad_()  # not contiguous, part of a graph
    with torch.no_grad():
        found = integrated_gradients(net, x, target=0)
    assert not found.attributions.requires_grad
    with torch.inference_mode():
        inside = integrated_gradients(net, rows(2, 4), target=0)
    torch.testing.assert_close(inside.attributions, integrated_gradients(net, rows(2, 4), target=0).attributions)
    wide = integrated_gradients(lambda v: v.pow(2).sum((1, 2, 3)), rows(2, 3, 4, 5))
    assert wide.attributions.shape == (2, 3, 4, 5)


@pytest.mark.parametrize("limit", [3, 5, 12, 30, 200])
def test_evaluations_stay_within_their_limit_and_honest(limit):
    x = torch.ones(3, 6, dtype=torch.float64) * torch.tensor([[1.0], [0.9], [2.0]])
    found = integrated_gradients(step(2000), x, max_evals=limit)
    assert found.n_grad + found.n_forward <= 3 * limit
    assert found.converged.all() == (limit == 200)
    gap = (found.attributions.sum(1) - found.change).abs()
    torch.testing.assert_close(gap, found.gap)


def test_the_scale_invariance_trap_is_reported():
    def f(v):
        return v[:, 0] / v.square().mean(1).sqrt().clamp(min=1e-12)

    with pytest.warns(UserWarning, match="next to the baseline"):
        found = integrated_gradients(f, rows(2, 4))
    assert found.at_baseline.all()
    assert not found.converged.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = integrated_gradients(f, rows(2, 4), rows(4, seed=5))
    assert moved.converged.all()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 4, dtype=torch.long)}, TypeError, "ids have no gradient|Ids have no gradient"),
        ({"x": [1.0]}, TypeError, "list"),
        ({"x": torch.tensor(1.0)}, ValueError, r"\(\)"),
        ({"x": torch.full((2, 4), float("nan"))}, ValueError, "8 values"),
        ({"baseline": torch.zeros(3, 4)}, ValueError, r"\(2, 4\).*got \(3, 4\)"),
        ({"baseline": torch.full((4,), float("inf"))}, ValueError, "finite"),
        ({"baseline": "nothing"}, ValueError, "'nothing'"),
        ({"baseline": None}, TypeError, "None"),
        ({"baseline": "pad"}, ValueError, "pad_token_id"),
        ({"target": 3}, ValueError, r"\[0, 3\); got 3"),
        ({"target": -1}, ValueError, "-1"),
        ({"target": [0, 1, 2]}, ValueError, r"2.*\(3,\)"),
        ({"target": 1.5}, TypeError, "1.5"),
        ({"target": torch.tensor([0.0, 1.0])}, TypeError, "float"),
        ({"against": 7}, ValueError, "got 7"),
        ({"method": "simpson"}, ValueError, "'simpson'"),
        ({"method": "gauss", "n": 0}, ValueError, "at least 1; got 0"),
        ({"n": 0}, ValueError, "at least 1; got 0"),
        ({"method": "trapezoid", "n": 1}, ValueError, "at least 2; got 1"),
        ({"n": 5}, ValueError, "n=5"),
        ({"tol": 0.0}, ValueError, "tol"),
        ({"max_evals": 2}, ValueError, "at least 3; got 2"),
        ({"args": torch.ones(2)}, TypeError, "args"),
        ({"args": (torch.ones(3),)}, ValueError, r"args\[0\].*2 examples; got shape \(3,\)"),
        ({"path": 3}, TypeError, "path"),
        ({"absolute": 1}, TypeError, "absolute"),
        ({"f": 3}, TypeError, "int"),
        ({"f": lambda v: v.sum()}, ValueError, r"\(2,\).*got \(\)"),
        ({"f": lambda v: v[:, :, None]}, ValueError, r"got \(2, 4, 1\)"),
        ({"f": lambda v: v[:1, 0]}, ValueError, r"got \(1,\)"),
        ({"f": lambda v: v[:, 0].long()}, TypeError, "int64"),
        ({"f": lambda v: 3.0}, TypeError, "float"),
        ({"f": lambda v: v[:, 0].log()}, ValueError, "must be finite.*example 0"),
        ({"f": lambda v: v[:, 0].detach()}, ValueError, "no gradient"),
        ({"f": lambda v: v[:, 0], "target": 0}, ValueError, "must be None"),
    ],
)
def test_bad_input_is_rejected(change, error, message):
    given = {"f": network().float(), "x": torch.ones(2, 4)} | change
    with pytest.raises(error, match=message):
        integrated_gradients(given.pop("f"), given.pop("x"), **given)


def test_a_gradient_that_is_not_finite_is_an_error():
    x = torch.ones(2, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"gradient of f must be finite.*example 0 at 1"):
        integrated_gradients(lambda v: v[:, 0].sqrt(), x, method="right", n=4)
