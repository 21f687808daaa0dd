"""Every ready transform against plain loops, in every dtype, on hostile gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.training import (
    add_noise,
    centralize,
    clip_norm,
    clip_quantile,
    clip_value,
    freeze,
    joint,
    mask,
    normalize,
    project,
    sign,
    zero,
)  # fmt: skip
from reference import layerwise_learning_rates as plain

SHAPES = ((4, 3), (3,), (2, 3, 2), (), (0, 3), (1, 1))
KEEP = torch.tensor([True, False, True])


def gradients(dtype=torch.float64, seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def directions():
    return gradients(seed=1)


RULES = {
    f"clip_norm {p} {each}": (clip_norm(0.7, p, each), lambda g, p=p, each=each: plain.clip_norm(g, 0.7, p, each))
    for p in (1, 2, 3.5, math.inf) for each in (False, True)
} | {
    "clip_norm not reached": (clip_norm(1e3), lambda g: g),
    "clip_value": (clip_value(0.3), lambda g: plain.clip_value(g, 0.3)),
    "clip_quantile": (clip_quantile(0.8), lambda g: plain.clip_quantile(g, 0.8)),
    "clip_quantile of each": (
        clip_quantile(0.5, per_tensor=True), lambda g: [plain.clip_quantile([x], 0.5)[0] if x.numel() else x for x in g]
    ),
    "clip_quantile of all": (clip_quantile(1), lambda g: g),
    "normalize": (normalize(), plain.normalize),
    "normalize each": (normalize(1, per_tensor=True), lambda g: plain.normalize(g, 1, True)),
    "centralize": (centralize(), lambda g: [plain.centralize([x])[0] if x.numel() else x for x in g]),
    "sign": (sign(), lambda g: [torch.where(x > 0, 1.0, -1.0).to(x) for x in g]),
    "zero": (zero(), lambda g: [torch.zeros_like(x) for x in g]),
    "project": (project(), lambda g: plain.project(g, directions())),
}  # fmt: skip
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", list(RULES))
@torch.no_grad()
def test_values(name, dtype):
    transform, expected = RULES[name]
    low = gradients(dtype)
    wanted = expected([g.double() for g in low])
    names = [str(n) for n in range(len(low))]
    made = transform.update(names, [d.to(dtype) for d in directions()], low)
    for got, want in zip(made, wanted, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", list(RULES))
def test_one_gradient_is_left_alone_and_the_result_can_be_differentiated(name):
    transform, expected = RULES[name]
    for g, p in zip(gradients(), directions(), strict=True):
        before = g.clone()
        torch.testing.assert_close(
            transform("w", p, g), expected([g])[0] if name != "project" else plain.project([g], [p])[0]
        )
        assert torch.equal(g, before)
        if g.numel() and name not in ("sign", "zero"):
            g.requires_grad_()
            assert torch.autograd.gradcheck(lambda x, p=p: transform("w", p, x), g)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.floats(0.01, 100), st.sampled_from([1, 2, 5.0, math.inf]), st.booleans(),
    st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
)  # fmt: skip
def test_clipped_norms_reach_the_bound_and_no_more(seed, c, p, per_tensor, shapes):
    before = gradients(seed=seed, shapes=shapes)
    after = clip_norm(c, p, per_tensor).update([""] * len(shapes), before, [g.clone() for g in before])
    for old, new in [([a], [b]) for a, b in zip(before, after, strict=True)] if per_tensor else [(before, after)]:
        size = plain.norm(plain.entries(old), p)
        assert plain.norm(plain.entries(new), p) == pytest.approx(min(size, c), rel=1e-9)
        if size <= c:
            assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


def test_mixed_dtypes_have_one_joint_norm():
    mixed = [torch.full((4,), 3.0, dtype=d) for d in (torch.float64, torch.bfloat16, torch.float32, torch.float16)]
    mixed = clip_norm(6.0).update([""] * 4, mixed, mixed)  # the norm is sqrt(16 * 9) = 12
    assert all(torch.equal(g, torch.full((4,), 1.5, dtype=g.dtype)) for g in mixed)


def test_low_precision_is_accumulated_in_float32():
    for dtype in (torch.bfloat16, torch.float16):
        g = torch.full((100_000,), 2.0, dtype=dtype)  # the norm is beyond float16
        (g,) = clip_norm(1.0, 1).update([""], [g], [g])
        assert torch.equal(g, torch.full_like(g, 1e-5))
        row = torch.full((1, 5000), 0.125, dtype=dtype)
        row[0, 0] = 1.0
        assert centralize()("w", row, row)[0, 1].item() == pytest.approx(-0.000175, rel=1e-2)


def test_zeros_and_nothing_at_all():
    for transform in [t for t, _ in RULES.values()]:
        for shape in ((3, 2), (0,), (2, 0)):
            if transform.text.startswith("project"):
                assert not transform("w", torch.zeros(shape), torch.zeros(shape)).any()
            assert not transform("w", torch.ones(shape), torch.zeros(shape)).any()


def test_gradients_that_are_not_finite_are_not_hidden():
    bad = torch.tensor([math.nan, 1.0, math.inf])
    p = torch.ones(3)
    assert clip_norm(1.0)("w", p, bad).isnan().all()
    infinite = clip_norm(1.0)("w", p, torch.tensor([1.0, math.inf]))
    assert infinite[0] == 0
    assert infinite[1].isnan()
    clipped = clip_value(1.0)("w", p, bad)
    assert clipped[0].isnan()
    assert clipped[1:].tolist() == [1.0, 1.0]
    with pytest.raises(RuntimeError, match=r"clip_norm\(1, p=2\): the norm of the gradient is inf; not finite: b"):
        clip_norm(1.0, error_if_nonfinite=True).update(["a", "b"], [p, p], [torch.ones(3), bad.nan_to_num(1, math.inf)])
    assert torch.equal(clip_norm(1.0, error_if_nonfinite=True)("w", p, torch.zeros(3)), torch.zeros(3))


def test_noise_has_its_deviation_and_repeats():
    g = torch.zeros(40_000)
    a, b, c = (add_noise(0.5, torch.Generator().manual_seed(s))("w", g, g) for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.std().item() == pytest.approx(0.5, rel=0.02)
    torch.manual_seed(3)
    first = add_noise(0.5)("w", g, g)
    torch.manual_seed(3)
    assert torch.equal(add_noise(0.5)("w", g, g), first)
    assert torch.equal(add_noise(0.0)("w", g, g + 2), g + 2)


def test_mask_and_project_take_one_tensor_or_one_for_each_name():
    g = torch.tensor([[1.0, math.nan, 3.0], [4.0, 5.0, 6.0]])
    assert torch.equal(mask(KEEP)("w", g, g), torch.tensor([[1.0, 0.0, 3.0], [4.0, 0.0, 6.0]]))
    assert torch.equal(mask({"w": KEEP})("w", g, g), mask(KEEP)("w", g, g))
    with pytest.raises(ValueError, match="keep has no tensor for 'v'; it has 'w'"):
        mask({"w": KEEP})("v", g, g)
    with pytest.raises(ValueError, match=r"keep of 'w' must fit shape \(2, 2\); got \(3,\)"):
        mask(KEEP)("w", g, torch.ones(2, 2))
    direction = torch.tensor([0.0, 2.0])
    assert torch.equal(project(direction)("w", torch.ones(2), torch.tensor([3.0, 4.0])), torch.tensor([3.0, 0.0]))
    assert torch.equal(
        project({"w": direction})("w", torch.ones(2), torch.tensor([3.0, 4.0])), torch.tensor([3.0, 0.0])
    )


def test_freeze_gives_none_and_joint_sees_everything():
    assert freeze()("w", torch.ones(2), torch.ones(2)) is None
    seen = []

    def function(names, parameters, gradients):
        seen.append((names, parameters, gradients))
        return [2 * g for g in gradients]

    p, g = torch.ones(2), torch.ones(2)
    assert torch.equal(joint(function)("w", p, g), 2 * g)
    assert seen[0][0] == ["w"]
    assert seen[0][1][0] is p
    assert repr(joint(function)) == "joint(function)"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: clip_norm(0.0), ValueError, "c must be greater than 0.0; got 0.0"),
        (lambda: clip_norm(math.nan), ValueError, "c must be finite"),
        (lambda: clip_norm("1"), TypeError, "c must be a number"),
        (lambda: clip_norm(1.0, p=0.5), ValueError, "p must be at least 1.0; got 0.5"),
        (lambda: clip_norm(1.0, p=math.nan), ValueError, "p must be finite"),
        (lambda: normalize(p="2"), TypeError, "p must be a number"),
        (lambda: clip_value(-1.0), ValueError, "c must be greater than 0.0; got -1.0"),
        (lambda: clip_quantile(0.0), ValueError, "q must be greater than 0.0"),
        (lambda: clip_quantile(1.1), ValueError, "q must be at most 1; got 1.1"),
        (lambda: add_noise(-0.1), ValueError, "std must be at least 0.0"),
        (lambda: add_noise(0.1, generator=3), TypeError, "generator must be a torch.Generator or None; got int"),
        (lambda: mask(torch.ones(3)), TypeError, "keep must be boolean tensors; got torch.float32"),
        (lambda: mask({"w": [True]}), TypeError, r"keep must be boolean tensors; got \[True\]"),
        (lambda: project(torch.ones(3, dtype=torch.long)), TypeError, "direction must be floating tensors or None"),
        (lambda: joint(3), TypeError, "function must be callable; got 3"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
