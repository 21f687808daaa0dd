import math

import pytest
import torch
import transformers as t
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kexue.models import gradient_norms, norm_gains, skip_gain
from reference import bert_initial_std as reference


@pytest.mark.parametrize(
    ("std", "truncated", "r", "step", "path"),
    [
        (768**-0.5, False, 1.0, 0.707, 2.4e-4),
        (0.02, False, 0.3072, 0.875, 4.0e-2),
        (0.02, True, 0.238, 0.899, 7.7e-2),
        (0.02 / 1.1368472, False, 0.238, 0.899, 7.7e-2),
    ],
)
def test_the_table_of_the_article(std, truncated, r, step, path):
    assert skip_gain(std=std, truncated=truncated) == pytest.approx(path, rel=0.02)
    assert skip_gain(std=std, sublayers=1, truncated=truncated) == pytest.approx(step, abs=6e-4)
    assert skip_gain(std=std, sublayers=2, truncated=truncated) == pytest.approx(1 / (1 + r), rel=1e-3)


def test_the_ratios_to_the_standard_value():
    standard = skip_gain(std=768**-0.5)
    assert standard == pytest.approx(2**-12, rel=1e-12)
    assert round(skip_gain() / standard) == 165
    assert round(skip_gain(std=0.0176) / standard) == 316  # the article's rounded 0.0176
    assert round(skip_gain(truncated=True) / standard) == 317


@given(width=st.integers(1, 5000), std=st.floats(0, 0.2), sublayers=st.integers(1, 60), truncated=st.booleans())
def test_equals_one_division_after_the_other(width, std, sublayers, truncated):
    r = width * std**2 * (0.7737413035 if truncated else 1)
    want = reference.skip_gain(r, sublayers)
    assert skip_gain(width, std, sublayers, "post", truncated) == pytest.approx(want, rel=1e-7)
    assert skip_gain(sublayers=sublayers, ratio=r) == pytest.approx(want, rel=1e-9)


def test_the_cut_leaves_the_variance_of_the_truncated_normal():
    assert skip_gain(1, 1.0, 2, truncated=True) == pytest.approx(1 / (1 + reference.kept_variance()), rel=1e-8)


def test_ends_of_the_range():
    assert skip_gain(std=0.0) == 1.0
    assert skip_gain(ratio=0, sublayers=10**6) == 1.0
    assert skip_gain(sublayers=10**6) == 0.0
    assert skip_gain(std=1e200) == 0.0
    assert 0.99 < skip_gain(ratio=1e-9, sublayers=10**6) < 1  # no rounding of 1 + r


@pytest.mark.slow
def test_a_stack_of_random_linear_branches_keeps_the_predicted_share():
    g = torch.Generator().manual_seed(0)
    width, std, sublayers = 256, 0.04, 8
    x0 = torch.randn(2000, width, generator=g, dtype=torch.float64)
    x = x0 = torch.nn.functional.layer_norm(x0, (width,))
    for _ in range(sublayers):
        weight = std * torch.randn(width, width, generator=g, dtype=torch.float64)
        x = torch.nn.functional.layer_norm(x + x @ weight, (width,))
    share = float((x * x0).mean())
    assert share == pytest.approx(skip_gain(width, std, sublayers), abs=0.03)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"norm": "pre"}, ValueError, "Pre-LN"),
        ({"norm": "sandwich"}, ValueError, "'sandwich'"),
        ({"sublayers": 0}, ValueError, "sublayers must be at least 1; got 0"),
        ({"sublayers": 2.0}, TypeError, "sublayers"),
        ({"ratio": -0.1}, ValueError, "ratio must be at least 0.0; got -0.1"),
        ({"ratio": math.nan}, ValueError, "finite"),
        ({"std": -0.02}, ValueError, "std"),
        ({"std": math.inf}, ValueError, "finite"),
        ({"width": 0}, ValueError, "width"),
        ({"truncated": 1}, TypeError, "truncated"),
    ],
)
def test_bad_input_of_skip_gain(change, error, message):
    with pytest.raises(error, match=message):
        skip_gain(**change)


def test_gains_are_means_of_absolute_values_and_the_last_one_is_flagged():
    model = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.RMSNorm(4, elementwise_affine=False))
    model[0].weight.data = torch.tensor([1.0, -2.0, 3.0])
    model[2].weight.data.fill_(0.5)
    assert norm_gains(model) == [
        {"name": "0", "gain": 2.0, "last": False},
        {"name": "2", "gain": 0.5, "last": False},
        {"name": "3", "gain": None, "last": True},
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gains_of_other_dtypes_are_added_in_float32_at_least(dtype):
    model = nn.GroupNorm(1, 3001).to(dtype)
    model.weight.data[0] = 4.0  # in float16 a running sum near 3000 could not count by ones
    assert norm_gains(model)[0]["gain"] == pytest.approx(3004 / 3001, rel=1e-6)


def test_norms_of_transformers_are_known_by_name_and_by_what_they_do():
    sizes = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    llama = norm_gains(t.LlamaModel(t.LlamaConfig(**sizes, **heads)))
    assert [row["gain"] for row in llama] == [1.0] * 3
    assert llama[-1] == {"name": "norm", "gain": 1.0, "last": True}
    gemma = t.GemmaModel(t.GemmaConfig(**sizes, **heads))
    gemma.norm.weight.data.fill_(-0.25)  # it multiplies by 1 + weight
    assert [row["gain"] for row in norm_gains(gemma)] == [1.0, 1.0, 0.75]


def test_with_a_batch_norms_come_in_the_order_of_the_computation():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first, self.unused = nn.LayerNorm(4), nn.LayerNorm(4), nn.LayerNorm(4)

        def forward(self, x):
            return self.second(self.first(x))

    model = Backwards()
    assert [row["name"] for row in norm_gains(model)] == ["second", "first", "unused"]
    ordered = norm_gains(model, batch=torch.randn(2, 4))
    assert [(row["name"], row["last"]) for row in ordered] == [("first", False), ("second", True)]


def test_bad_input_of_norm_gains():
    with pytest.raises(ValueError, match="Linear without any"):
        norm_gains(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got list"):
        norm_gains([nn.LayerNorm(2)])


@pytest.mark.parametrize("ord", [1, 2.0, 3, math.inf])
def test_gradient_norms_are_those_of_the_loop(ord):
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 2).double().float(), nn.Linear(2, 2))
    model[:3](torch.randn(3, 5, generator=g)).square().sum().backward()
    want = {n: float(p.grad.double().norm(ord)) for n, p in model.named_parameters() if p.grad is not None}
    got = gradient_norms(model, ord)
    assert list(got) == list(want)
    assert got == pytest.approx(want, rel=1e-6)
    assert not any(name.startswith("3.") for name in got)


def test_gradient_norms_of_half_precision_sparse_and_empty_gradients():
    shapes = {"low": torch.zeros(400, dtype=torch.float16), "wide": torch.zeros(2).double(), "empty": torch.zeros(0)}
    model = nn.ParameterDict({**shapes, "none": torch.zeros(2)})
    model["low"].grad = torch.full((400,), 6e4, dtype=torch.float16)  # its norm is beyond float16
    model["wide"].grad = torch.tensor([3.0, 4.0]).double() * 1e100
    model["empty"].grad = torch.zeros(0)
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1, 1])).sum().backward()
    got = gradient_norms(model)
    assert got == {"low": pytest.approx(20 * 6e4, rel=1e-3), "wide": pytest.approx(5e100, rel=1e-12), "empty": 0.0}
    assert gradient_norms(table) == {"weight": pytest.approx(math.sqrt(8))}


def test_bad_input_of_gradient_norms():
    with pytest.raises(TypeError, match="got list"):
        gradient_norms([])
    with pytest.raises(ValueError, match="positive; got 0"):
        gradient_norms(nn.Linear(1, 1), 0)
    with pytest.raises(TypeError, match="ord"):
        gradient_norms(nn.Linear(1, 1), "fro")
    assert gradient_norms(nn.Linear(1, 1)) == {}
