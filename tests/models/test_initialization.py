"""Truncated normal, variance scaling, fans, predicted gains."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn import functional as F

from kexue.models import fan, predict_gain, truncated_normal_, variance_scaling_
from kexue.models._activations import ACTIVATIONS, moments
from kexue.models._sampling import CHUNK, truncated_std
from reference import non_square_initialization as means
from reference import transformer_initialization as reference

MODES = list(means.MEANS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(*shape, dtype=torch.float32, seed=0, **options):
    return truncated_normal_(torch.empty(*shape, dtype=dtype), generator=g(seed), **options)


@pytest.mark.parametrize("cutoff", [0.3, 0.999, 1.0, 1.7, 2.0, 3.0, 6.0])
def test_the_std_of_the_cut_normal_agrees_with_integration(cutoff):
    assert truncated_std(cutoff) == pytest.approx(math.sqrt(reference.gamma(cutoff)), rel=1e-12)


def test_the_std_of_the_cut_normal_at_the_figures_of_the_article_and_in_the_limits():
    assert truncated_std(2.0) == pytest.approx(0.8796256610, abs=1e-10)
    assert 1 / truncated_std(2.0) == pytest.approx(1.1368472343, abs=1e-10)
    for tiny in (1e-300, 1e-150, 1e-9):
        assert truncated_std(tiny) == pytest.approx(tiny / math.sqrt(3), rel=1e-14)
    for huge in (40.0, 1e160, 1e300, math.inf):
        assert truncated_std(huge) == 1
    assert truncated_std(1 - 1e-12) == pytest.approx(truncated_std(1.0), rel=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cutoff", [1e-300, 1e-5, 0.1, 1.0, 2.0, 3.5, 20.0, math.inf])
def test_the_realised_std_is_the_one_asked_for_and_nothing_is_beyond_the_cutoff(cutoff, dtype):
    w = drawn(1024, 1024, dtype=dtype, std=0.3, cutoff=cutoff, seed=3).double()
    assert float(w.std()) == pytest.approx(0.3, rel=3e-3)
    assert abs(float(w.mean())) < 5 * 0.3 / 1024
    limit = 0.3 * math.sqrt(3) if cutoff < 1e-9 else 0.3 * cutoff / truncated_std(cutoff)
    assert float(w.abs().max()) <= limit
    if cutoff <= 2:
        assert float(w.abs().max()) > 0.98 * limit  # the ends are reached (bfloat16: but for a rounding)


@pytest.mark.slow
@pytest.mark.parametrize("cutoff", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_distribution_is_the_truncated_normal(cutoff, dtype):
    def cdf(x):
        return reference.truncated_cdf(x, 0.02, cutoff)

    p = [
        stats.kstest(drawn(100_000, dtype=dtype, cutoff=cutoff, seed=s).double().numpy(), cdf).pvalue for s in range(8)
    ]
    assert min(p) > 1e-4
    assert stats.kstest(p, "uniform").pvalue > 1e-3


@pytest.mark.slow
def test_neighbours_are_uncorrelated_and_both_halves_of_a_draw_count():
    w = drawn(1 << 20, dtype=torch.float32, std=1.0)
    for lag in (1, 2, 3, 1 << 16):
        assert abs(float((w[:-lag] * w[lag:]).mean())) < 5 / 1024
    assert w.unique().numel() > 0.97 * w.numel()  # 24 bits alone would leave 94 % of them different


@pytest.mark.slow
def test_the_tails_of_a_wide_cut_in_float64_are_those_of_the_normal():
    w = drawn(1 << 21, dtype=torch.float64, std=1.0, cutoff=8.0, seed=1)
    for edge in (3.0, 4.0, 4.5):
        expected = 2 * stats.norm.sf(edge) * w.numel()
        assert abs(int((w.abs() > edge).sum()) - expected) < 5 * math.sqrt(expected)
    assert w.unique().numel() == w.numel()
    assert (w.float().double() != w).float().mean() > 0.99  # more digits than float32 has


def test_the_same_seed_gives_the_same_numbers_whatever_the_strides():
    plain = drawn(300, 500)
    assert torch.equal(plain, drawn(300, 500))
    assert not torch.equal(plain, drawn(300, 500, seed=1))
    other = truncated_normal_(torch.empty(500, 300).T, generator=g())
    assert not other.is_contiguous()
    assert torch.equal(other, plain)
    wide = torch.zeros(300, 1500)
    truncated_normal_(wide[:, 1::3], generator=g())
    assert torch.equal(wide[:, 1::3], plain)
    assert not wide[:, 0::3].any()
    assert not wide[:, 2::3].any()
    assert torch.equal(drawn(300, 500, dtype=torch.bfloat16), plain.bfloat16().clamp(-0.0454, 0.0454))


@pytest.mark.parametrize("n", [1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_a_longer_draw_begins_with_the_shorter_one(n, dtype):
    whole = drawn(2 * CHUNK + 8, dtype=dtype)
    assert torch.equal(drawn(n, dtype=dtype), whole[:n])
    assert whole.unique().numel() > 1000


def test_the_generator_moves_on_and_torchs_own_is_the_default():
    generator = g()
    first, second = (truncated_normal_(torch.empty(64), generator=generator) for _ in range(2))
    assert not torch.equal(first, second)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert torch.equal(truncated_normal_(torch.empty(64)), drawn(64))
        state = torch.get_rng_state()
        drawn(64)
        assert torch.equal(torch.get_rng_state(), state)


def test_a_default_device_does_not_matter():
    expected = drawn(40, 30, dtype=torch.bfloat16)
    w = torch.empty(40, 30, dtype=torch.bfloat16)
    with torch.device("meta"):
        assert torch.equal(truncated_normal_(w, generator=g()), expected)
        assert moments(torch.tanh)[1] == pytest.approx(0.394294, abs=1e-6)


def test_parameters_scalars_and_means():
    weight = nn.Parameter(torch.zeros(40, 30))
    assert truncated_normal_(weight, generator=g()) is weight
    assert weight.grad_fn is None
    assert weight.requires_grad
    assert torch.equal(weight, drawn(40, 30))
    scalar = truncated_normal_(torch.zeros(()), std=1.0, generator=g())
    assert scalar.shape == ()
    assert scalar != 0
    moved = drawn(100_000, std=0.5, mean=-3.0)
    assert float(moved.mean()) == pytest.approx(-3, abs=0.01)
    assert float(moved.std()) == pytest.approx(0.5, rel=0.01)
    assert float((moved.double() + 3).abs().max()) <= 0.5 * 2 / truncated_std(2.0)
    version = weight._version
    truncated_normal_(weight)
    assert weight._version > version  # autograd notices


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"std": 0}, ValueError, "std must be greater than 0.*got 0"),
        ({"std": -1.0}, ValueError, "std must be greater than 0.*got -1.0"),
        ({"std": math.nan}, ValueError, "std must be finite; got nan"),
        ({"std": math.inf}, ValueError, "std must be finite; got inf"),
        ({"std": "a"}, TypeError, "std must be a number; got 'a'"),
        ({"std": 1e-45}, ValueError, "std must be at least .* in torch.float32; got 1e-45"),
        ({"std": 2e38}, ValueError, "below 3.40282e.38, the largest of torch.float32"),
        ({"cutoff": 0.0}, ValueError, "cutoff must be greater than 0"),
        ({"cutoff": -2}, ValueError, "cutoff must be greater than 0"),
        ({"cutoff": math.nan}, ValueError, "cutoff must be finite"),
        ({"cutoff": -math.inf}, ValueError, "cutoff must be finite"),
        ({"mean": math.inf}, ValueError, "mean must be finite"),
        ({"mean": 1e6}, ValueError, "std must be at least .* for mean 1e.06"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator or None; got int"),
        ({"w": torch.zeros(0, 3)}, ValueError, r"w must not be empty; got shape \(0, 3\)"),
        ({"w": torch.zeros(3, dtype=torch.int64)}, TypeError, "got torch.int64"),
        ({"w": torch.zeros(3, dtype=torch.complex64)}, TypeError, "got torch.complex64"),
        ({"w": torch.zeros(3, dtype=torch.bool)}, TypeError, "got torch.bool"),
        ({"w": torch.zeros(3, device="meta")}, ValueError, "meta device"),
        (
            {"w": torch.zeros(3, 1).expand(3, 4)},
            ValueError,
            r"memory of its own .* strides \(1, 0\) for shape \(3, 4\)",
        ),
        ({"w": torch.zeros(8).as_strided((3, 3), (2, 1))}, ValueError, "memory of its own"),
        ({"w": torch.eye(3).to_sparse()}, TypeError, "dense tensor; got layout"),
        ({"w": [1.0]}, TypeError, "w must be a tensor; got list"),
        ({"w": np.zeros(3)}, TypeError, "w must be a tensor; got ndarray"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(change, error, message):
    arguments = {"w": torch.zeros(2, 3), **change}
    before = arguments["w"].clone() if isinstance(arguments["w"], torch.Tensor) else None
    with pytest.raises(error, match=message):
        truncated_normal_(**arguments)
    if before is not None and not before.is_meta and before.layout == torch.strided:
        assert torch.equal(arguments["w"], before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_with_a_generator_of_its_own():
    w = torch.empty(1024, 1024, device="cuda")
    with pytest.raises(ValueError, match="generator must be on the tensor's device, cuda; got one on cpu"):
        truncated_normal_(w, generator=g())
    truncated_normal_(w, std=0.5, generator=torch.Generator("cuda").manual_seed(0))
    assert float(w.std()) == pytest.approx(0.5, rel=3e-3)
    assert float(w.abs().max()) <= 1 / truncated_std(2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("std", [0.02, 0.0173, 1.3])
def test_rounding_to_half_precision_does_not_lead_out(dtype, std):
    w = drawn(1 << 18, dtype=dtype, std=std, cutoff=0.7)
    limit = std * 0.7 / truncated_std(0.7)
    assert float(w.abs().max()) <= limit
    assert float(w.double().std()) == pytest.approx(std, rel=4e-3)


KINKS = {"relu6": [6.0], "hardtanh": [-1.0, 1.0], "hardsigmoid": [-3.0, 3.0], "hardswish": [-3.0, 3.0]}


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_moments_agree_with_adaptive_integration(name):
    f = ACTIVATIONS[name]
    mean, second = reference.moments(lambda z: float(f(torch.tensor(z, dtype=torch.float64))), KINKS.get(name, ()))
    assert moments(name)[0] == pytest.approx(mean, abs=1e-11)
    assert moments(name)[1] == pytest.approx(second, abs=1e-11)
    assert moments(f)[1] == pytest.approx(moments(name)[1], abs=1e-14)


def test_moments_of_the_table_and_in_closed_form():
    assert moments("relu") == pytest.approx((1 / math.sqrt(2 * math.pi), 0.5), abs=1e-14)
    assert moments("leaky_relu")[1] == pytest.approx((1 + 0.01**2) / 2, abs=1e-14)
    assert moments("relu2")[1] == pytest.approx(1.5, abs=1e-13)
    assert moments("selu") == pytest.approx((0, 1), abs=1e-9)
    for name, value in (("gelu", 0.425221), ("silu", 0.355776), ("tanh", 0.394294), ("sigmoid", 0.2933790)):
        assert moments(name)[1] == pytest.approx(value, abs=6e-7)


@given(st.floats(-5, 5), st.floats(-3, 3))
def test_moments_of_a_jump_and_a_kink_anywhere(at, slope):
    def f(x):
        return torch.where(x > at, 1 + slope * (x - at), 0.0)

    q, d = stats.norm.sf(at), stats.norm.pdf(at)
    first, second = d - at * q, (1 + at * at) * q - at * d  # E[(z - at)+], E[(z - at)+^2]
    found = moments(f)
    assert found[0] == pytest.approx(q + slope * first, abs=1e-10)
    assert found[1] == pytest.approx(q + 2 * slope * first + slope**2 * second, abs=1e-10)


@given(st.sampled_from(MODES), st.integers(1, 3000), st.integers(1, 3000))
def test_fans_are_the_means_and_in_order(mode, m, n):
    assert fan((n, m), mode) == pytest.approx(means.MEANS[mode](m, n), rel=1e-12)
    order = [fan((n, m), k) for k in ("harmonic", "geometric", "arithmetic", "quadratic", "contraharmonic")]
    assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(order))


def test_fans_of_convolutions():
    for layer, transposed in (
        (nn.Conv2d(12, 8, (3, 5), groups=4), False),
        (nn.ConvTranspose2d(12, 8, (3, 5), groups=4), True),
        (nn.Conv1d(6, 6, 7, groups=6), False),
        (nn.Conv3d(2, 4, 2), False),
        (nn.Linear(5, 7), False),
    ):
        groups, kernel = getattr(layer, "groups", 1), math.prod(getattr(layer, "kernel_size", ()))
        inputs = getattr(layer, "in_channels", 5) // groups * kernel
        outputs = getattr(layer, "out_channels", 7) // groups * kernel
        assert fan(layer.weight, "fan_in", groups, transposed) == inputs
        assert fan(layer.weight, "fan_out", groups, transposed) == outputs
        assert fan(layer.weight.to("meta"), "geometric", groups, transposed) == math.sqrt(inputs * outputs)


@pytest.mark.parametrize("distribution", ["truncated_normal", "normal", "uniform"])
@pytest.mark.parametrize("mode", MODES)
def test_the_variance_is_one_over_the_mean(mode, distribution):
    w = variance_scaling_(torch.empty(700, 300, dtype=torch.float64), mode, "gelu", distribution, g())
    expected = 1 / (means.MEANS[mode](300, 700) * 0.4252214826)
    assert float(w.var()) == pytest.approx(expected, rel=0.02)
    limit = {"uniform": math.sqrt(3), "truncated_normal": 2 / truncated_std(2.0), "normal": math.inf}[distribution]
    assert float(w.abs().max()) <= math.sqrt(expected) * limit * (1 + 1e-12)
    assert float(w.abs().max()) > math.sqrt(expected) * (3.5 if distribution == "normal" else 0.999 * limit)
    half = variance_scaling_(torch.empty(700, 300, dtype=torch.bfloat16), mode, "gelu", distribution, g())
    assert float(half.double().var()) == pytest.approx(expected, rel=0.02)


def test_known_initialisers_are_special_cases():
    w = torch.empty(600, 400)
    assert float(variance_scaling_(w, "fan_in", "relu", generator=g()).var()) == pytest.approx(2 / 400, rel=0.02)
    assert float(variance_scaling_(w, "arithmetic", generator=g()).var()) == pytest.approx(2 / 1000, rel=0.02)
    assert float(variance_scaling_(w, gain=3.0, generator=g()).var()) == pytest.approx(9 / 400, rel=0.02)
    normal = torch.empty(600, 400).normal_(0, 0.05, generator=g())
    assert torch.equal(variance_scaling_(w, distribution="normal", generator=g()), normal)


@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "tanh", "sigmoid", "selu", "softplus"])
def test_a_layer_that_reads_an_activation_keeps_the_second_moment(name):
    z = torch.randn(4000, 512, generator=g(1), dtype=torch.float64)
    w = variance_scaling_(torch.empty(256, 512, dtype=torch.float64), nonlinearity=name, generator=g())
    assert float((ACTIVATIONS[name](z) @ w.T).square().mean()) == pytest.approx(1, rel=0.06)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_convolution_keeps_the_second_moment(groups, transposed):
    x = torch.randn(4, 32, 24, 24, generator=g(1), dtype=torch.float64)
    shape = (32, 64 // groups, 3, 3) if transposed else (64, 32 // groups, 3, 3)
    w = variance_scaling_(torch.empty(shape, dtype=torch.float64), groups=groups, transposed=transposed, generator=g())
    y = (F.conv_transpose2d if transposed else F.conv2d)(x, w, groups=groups)[..., 3:-3, 3:-3]
    assert float(y.square().mean()) == pytest.approx(1, rel=0.08)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": "fan_avg"}, ValueError, "mode must be one of 'fan_in', 'fan_out', 'arithmetic', .*got 'fan_avg'"),
        ({"w": torch.zeros(5)}, ValueError, r"at least 2 dimensions to have fans; got shape \(5,\)"),
        ({"w": torch.zeros(())}, ValueError, "at least 2 dimensions"),
        ({"w": torch.zeros(0, 5)}, ValueError, "must not be empty"),
        ({"w": torch.zeros(2, 5, dtype=torch.int32)}, TypeError, "got torch.int32"),
        ({"groups": 0}, ValueError, "groups must be at least 1; got 0"),
        ({"groups": 3}, ValueError, "groups must divide the first dimension, 4; got 3"),
        ({"groups": 1.0}, TypeError, "groups must be an integer"),
        (
            {"nonlinearity": "relux"},
            ValueError,
            "must be a function or one of linear, relu, .*got 'relux'",
        ),
        ({"nonlinearity": 3}, TypeError, "nonlinearity must be a name or a function; got int"),
        ({"nonlinearity": lambda x: x[0]}, ValueError, "must map a tensor to one of its shape"),
        ({"nonlinearity": torch.log}, ValueError, "nonlinearity must be finite in"),
        ({"nonlinearity": torch.zeros_like}, ValueError, "must not be 0 throughout"),
        ({"nonlinearity": torch.randn_like}, ValueError, "do not converge"),
        ({"distribution": "cauchy"}, ValueError, "distribution must be one of .*got 'cauchy'"),
        ({"gain": 0.0}, ValueError, "gain must be greater than 0"),
        ({"transposed": 1}, TypeError, "transposed must be True or False; got 1"),
        ({"cutoff": 0}, ValueError, "cutoff must be greater than 0"),
    ],
)
def test_variance_scaling_refuses_bad_input(change, error, message):
    arguments = {"w": torch.zeros(4, 5), **change}
    with pytest.raises(error, match=message):
        variance_scaling_(**arguments)
    assert not arguments["w"].any()


def test_fan_refuses_bad_input():
    with pytest.raises(TypeError, match="w must be a tensor or a shape; got str"):
        fan("ab")
    with pytest.raises(ValueError, match=r"fans must be positive; got shape \(0, 3\)"):
        fan((0, 3))
    with pytest.raises(ValueError, match="w must be at least 0; got -1"):
        fan((3, -1))


@given(st.lists(st.integers(1, 2000), min_size=2, max_size=8), st.sampled_from(MODES))
def test_predicted_gains_are_the_products(widths, mode):
    forward, backward = predict_gain(widths, mode)
    expected = means.gain(widths, mode)
    assert (10**forward, 10**backward) == pytest.approx(expected, rel=1e-10)


@given(st.lists(st.integers(1, 2000), min_size=2, max_size=30))
def test_gains_telescope(widths):
    log = math.log10(widths[0] / widths[-1])
    assert predict_gain(widths, "geometric") == pytest.approx((log / 2, -log / 2), abs=1e-10)
    assert predict_gain(widths, "fan_in") == pytest.approx((0, -log), abs=1e-10)
    assert predict_gain(widths, "fan_out") == pytest.approx((log, 0), abs=1e-10)
    assert predict_gain(widths) == predict_gain(widths, "geometric")
    assert predict_gain(torch.tensor(widths).tolist(), "arithmetic")[0] <= log / 2 + 1e-10


@pytest.mark.parametrize("mode", MODES)
def test_predicted_gains_are_those_of_a_measured_stack(mode):
    widths = [200, 800, 300, 600, 100, 400]
    measured = np.mean([means.measured_gain(widths, mode, seed) for seed in range(4)])
    assert measured == pytest.approx(predict_gain(widths, mode)[0], abs=0.08)


def test_predict_gain_refuses_bad_input():
    for widths, error, message in (
        ([3], ValueError, "at least 2 widths, of the input and of a layer; got 1"),
        ([], ValueError, "got 0"),
        ([3, 0], ValueError, "widths must be at least 1; got 0"),
        ([3, 2.0], TypeError, "widths must be an integer"),
        (3, TypeError, "widths must be a sequence of integers; got int"),
    ):
        with pytest.raises(error, match=message):
            predict_gain(widths)
    with pytest.raises(ValueError, match="mode must be one of"):
        predict_gain([3, 4], "mean")
