import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kexue.losses import MarginSchedule, MarginSoftmax, class_diameter, ranking_certificate


def clusters(rows=60, classes=5, width=4, noise=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=g, dtype=torch.float64)
    y = torch.randint(classes, (rows,), generator=g)
    z = F.normalize(centres)[y] + noise * torch.randn(rows, width, generator=g, dtype=torch.float64)
    return z, y, centres


def distance(a, b, metric):
    if metric == "euclidean":
        return math.dist(a.tolist(), b.tolist())
    cosine = max(-1.0, min(1.0, float(F.cosine_similarity(a, b, dim=0))))
    return math.acos(cosine) if metric == "angle" else math.sqrt(1 - cosine)


@pytest.mark.parametrize("metric", ["sqrt_cos", "angle", "euclidean"])
def test_diameter_is_twice_the_mean_distance_to_the_own_centre(metric):
    z, y, centres = clusters()
    centres = torch.cat([centres, torch.ones(2, 4)])
    each = torch.tensor([2 * distance(a, centres[b], metric) for a, b in zip(z, y, strict=True)], dtype=torch.float64)
    result = class_diameter(z, y, centres, metric)
    assert result == pytest.approx(float(each.mean()))
    assert result.empty_classes == 2
    assert result.counts.sum() == len(z)
    for label in range(5):
        assert float(result.per_class[label]) == pytest.approx(float(each[y == label].mean()))
    assert result.per_class[5:].isnan().all()
    upper = class_diameter(z, y, centres, metric, stat="quantile", q=0.75)
    assert upper == pytest.approx(float(each.quantile(0.75)))
    assert float(upper.per_class[1]) == pytest.approx(float(each[y == 1].quantile(0.75)))


def test_diameter_is_precise_for_nearly_equal_directions():
    z = torch.tensor([[1.0, 1e-6]], dtype=torch.float32)
    got = class_diameter(z, torch.tensor([0]), torch.tensor([[1.0, 0.0]]))
    assert got == pytest.approx(2e-6 / math.sqrt(2), rel=1e-3)


def certified_pairs(z, y, centres, metric):
    radius = {int(t): max(distance(a, centres[t], metric) for a in z[y == t]) for t in y.unique()}
    return {
        (i, c): distance(z[i], centres[t], metric) + radius[t] + radius[c] < distance(z[i], centres[c], metric)
        for i, t in enumerate(y.tolist())
        for c in radius
        if c != t
    }


@pytest.mark.parametrize("metric", ["sqrt_cos", "angle", "euclidean"])
def test_certificate_is_the_share_of_certified_pairs(metric):
    z, y, centres = clusters(noise=0.12, width=12)
    pairs = certified_pairs(z, y, centres, metric)
    assert ranking_certificate(z, y, centres, metric) == pytest.approx(sum(pairs.values()) / len(pairs))
    assert 0 < sum(pairs.values()) < len(pairs) or metric == "euclidean"


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 0.3))
def test_a_certified_pair_is_always_ranked_correctly(seed, noise):
    z, y, centres = clusters(30, 3, 6, noise, seed)
    for (i, other), certified in certified_pairs(z, y, centres, "sqrt_cos").items():
        if certified:
            same = max(distance(z[i], a, "sqrt_cos") for a in z[y == y[i]])
            foreign = min(distance(z[i], a, "sqrt_cos") for a in z[y == other])
            assert same < foreign


def test_one_class_is_certified_and_blocks_do_not_matter(monkeypatch):
    z, y, centres = clusters(noise=0.12, width=12)
    assert ranking_certificate(z, torch.zeros_like(y), centres) == 1.0
    whole = ranking_certificate(z, y, centres)
    from kexue.losses import ranking_certificate as function

    monkeypatch.setitem(function.__wrapped__.__globals__, "BLOCK", 20)
    assert ranking_certificate(z, y, centres) == whole


def test_schedule_follows_the_diameter_with_a_moving_average():
    z, y, centres = clusters()
    head = MarginSoftmax(4, 5, kind="metric", margin=0.0).double()
    with torch.no_grad():
        head.weight.copy_(centres)
    schedule = MarginSchedule(head, every=2, momentum=0.25)
    first, second = class_diameter(z, y, centres), class_diameter(0.2 * z + F.normalize(centres)[y], y, centres)
    margins = [schedule.step(z, y) for _ in range(2)]
    margins += [schedule.step(0.2 * z + F.normalize(centres)[y], y) for _ in range(2)]
    assert margins == pytest.approx([0.0, first, first, 0.25 * first + 0.75 * second])
    assert head.margin == margins[-1]
    other = MarginSchedule(MarginSoftmax(4, 5, kind="metric", margin=0.0), every=2)
    other.load_state_dict(schedule.state_dict())
    assert other.state_dict() == schedule.state_dict()
    assert other.head.margin == head.margin
    capped = MarginSchedule(head, maximum=0.01)
    assert capped.step(z, y) == 0.01


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y": torch.zeros(5, dtype=torch.long)}, ValueError, r"\(60,\); got \(5,\)"),
        ({"y": torch.full((60,), 5)}, ValueError, r"\[0, 5\)"),
        ({"centres": torch.randn(5, 3)}, ValueError, "equal width"),
        ({"metric": "cos"}, ValueError, "'cos'"),
        ({"z": torch.zeros(0, 4), "y": torch.zeros(0, dtype=torch.long)}, ValueError, "at least one row"),
        ({"z": [[1.0]]}, TypeError, "list"),
    ],
)
def test_bad_input_is_rejected(change, error, message):
    arguments = dict(zip(("z", "y", "centres"), clusters(), strict=True)) | change
    for function in (class_diameter, ranking_certificate):
        with pytest.raises(error, match=message):
            function(**arguments)


def test_bad_settings_are_rejected():
    z, y, centres = clusters()
    with pytest.raises(ValueError, match="'median'"):
        class_diameter(z, y, centres, stat="median")
    with pytest.raises(ValueError, match="at most 1; got 2"):
        class_diameter(z, y, centres, stat="quantile", q=2)
    with pytest.raises(TypeError, match="Linear"):
        MarginSchedule(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="'am'"):
        MarginSchedule(MarginSoftmax(4, 5))
    with pytest.raises(ValueError, match="below 1; got 1"):
        MarginSchedule(MarginSoftmax(4, 5, kind="metric"), momentum=1.0)
    with pytest.raises(ValueError, match="keys epoch"):
        MarginSchedule(MarginSoftmax(4, 5, kind="metric")).load_state_dict({})


def test_one_minus_cos_violates_what_its_root_satisfies():
    points = [torch.tensor([math.cos(t), math.sin(t)], dtype=torch.float64) for t in (0.0, math.pi / 4, math.pi / 2)]
    a, b, c = points
    assert distance(a, c, "sqrt_cos") ** 2 > distance(a, b, "sqrt_cos") ** 2 + distance(b, c, "sqrt_cos") ** 2
    for x, y, w in itertools.permutations(points):
        assert distance(x, w, "sqrt_cos") <= distance(x, y, "sqrt_cos") + distance(y, w, "sqrt_cos")
