"""Growing whole models: the same function, the weights of the slow construction, symmetry, training afterwards."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch

from kexue.models import (
    grow,
    plan_growth,
    verify_growth,
)
from reference import lossless_growth as slow
from reference.growth_models import KINDS, LIMIT, build, difference, padded, state, tokens

pytestmark = pytest.mark.slow


# The same function


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("k", "heads"), [(2, "more"), (3, "more"), (2, "wider"), (3, "wider")])
@pytest.mark.parametrize("kind", list(KINDS))
def test_width_keeps_the_function(kind, k, heads, tied):
    if kind == "gau" and heads == "wider":
        pytest.skip("refused, see below")
    model = build(kind, tie_word_embeddings=tied)
    for options in ({}, {"noise": 0.3}, {"convention": "orthogonal"}, {"convention": "orthogonal", "noise": 0.3}):
        if kind == "gau" and "convention" in options:
            continue
        big = grow(model, k, heads=heads, generator=torch.Generator().manual_seed(0), **options)
        assert difference(model, big) < LIMIT, options
        assert type(big) is type(model)
        assert big.config.hidden_size == 32 * k


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gau"])
def test_depth_keeps_the_function(kind, tied):
    model = build(kind, tie_word_embeddings=tied)
    for options in ({"depth": 5}, {"depth": 3, "width": 2}, {"depth": 4, "width": 2, "noise": 0.2}):
        big = grow(model, **options)
        assert difference(model, big) < LIMIT
        assert big.config.num_hidden_layers == options["depth"]
        assert big.config.hidden_size == 32 * options.get("width", 1)


@pytest.mark.parametrize("kind", list(KINDS))
def test_times_one_is_a_copy(kind):
    model = build(kind)
    big = grow(model, width=1, noise=0.3)
    assert big is not model
    for (name, a), (other, b) in zip(model.named_parameters(), big.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


def test_inserted_blocks_are_spread_and_copy_the_block_before_them():
    model = build("gpt2", n_layer=3)
    big = grow(model, depth=7)
    ours, theirs = state(big), state(model)
    for j, i in enumerate([0, 0, 0, 1, 1, 2, 2]):
        name = "mlp.c_fc.weight"
        np.testing.assert_array_equal(ours[f"transformer.h.{j}.{name}"], theirs[f"transformer.h.{i}.{name}"])
    zero = [j for j in range(7) if not big.transformer.h[j].attn.c_proj.weight.any()]
    assert zero == [1, 2, 4, 6]
    assert all(not big.transformer.h[j].mlp.c_proj.bias.any() for j in zero)
    assert verify_growth(model, big, **padded()).max_abs == 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt2", {"hidden_size": 80, "intermediate_size": 301}),
        ("gpt2", {"hidden_size": 40}),  # five heads from four
        ("gpt2", {"hidden_size": 36, "heads": "wider"}),  # heads of nine from eight
        ("gpt2", {"hidden_size": 80, "noise": 0.3, "depth": 3}),
        ("gpt2", {"hidden_size": 80, "convention": "orthogonal", "noise": 0.3}),
        ("llama", {"hidden_size": 80, "intermediate_size": 111}),
        ("llama", {"hidden_size": 48}),
        ("llama", {"hidden_size": 80, "noise": 0.3, "depth": 3}),
        ("llama", {"hidden_size": 80, "convention": "orthogonal"}),
        ("gau", {"hidden_size": 70, "intermediate_size": 50}),
        ("gau", {"hidden_size": 33, "noise": 0.3, "depth": 3}),
        *((kind, {"intermediate_size": 200, "noise": 0.3}) for kind in KINDS),
        *((kind, {"hidden_size": 64, "intermediate_size": 131}) for kind in KINDS),
    ],
)
def test_any_width_keeps_the_function(kind, options, tied):
    model = build(kind, tie_word_embeddings=tied)
    big = grow(model, **options)
    # GAU-alpha tied: eps is one value, 1e-12
    assert difference(model, big) < LIMIT
    assert big.config.hidden_size == options.get("hidden_size", 32)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_eps_follows_the_width(kind):
    name = {"gpt2": "layer_norm_epsilon", "llama": "rms_norm_eps"}[kind]
    model = build(kind, **{name: 0.3})  # so large that a mistake shows
    for options in ({"hidden_size": 48}, {"width": 2, "convention": "orthogonal"}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            big = grow(model, **options)
        assert difference(model, big) < LIMIT
        wrong = copy.deepcopy(big)
        for module in wrong.modules():
            for attribute in ("eps", "variance_epsilon"):
                if hasattr(module, attribute):
                    setattr(module, attribute, 0.3)
        assert difference(model, wrong) > 1e-4


@pytest.mark.parametrize(("kind", "options"), [("bert", {"convention": "orthogonal"}), ("gau", {})])
def test_what_one_eps_cannot_do_is_said_and_small(kind, options):
    model = build(kind, layer_norm_eps=1e-5)
    with pytest.warns(UserWarning, match="eps is one value"):
        big = grow(model, 2, **options)
    assert 1e-8 < difference(model, big) < 1e-3
    tiny = build(kind, layer_norm_eps=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        big = grow(tiny, 2, **options)
    assert difference(tiny, big) < LIMIT
    assert plan_growth(tiny, 2, **options).notes


# Weights and logits against the slow construction


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("k", "heads"), [(2, "more"), (3, "more"), (2, "wider"), (4, "wider")])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_weights_are_those_of_explicit_duplication_matrices(kind, k, heads, tied):
    change = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    model = build(kind, tie_word_embeddings=tied, **change)
    expected = getattr(slow, f"grow_{kind}")(state(model), model.config, k, heads)
    made = state(grow(model, k, heads=heads))
    # The slow version repeats biases of fused heads too; a decoder's bias that is no other name is kept
    assert set(expected) <= set(made)
    assert all("bias" in name for name in set(made) - set(expected))
    for name, value in expected.items():
        np.testing.assert_allclose(made[name], value, rtol=1e-14, atol=1e-15, err_msg=name)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"width": 2}, {"width": 3}, {"width": 2, "heads": "wider"}, {"width": 4, "heads": "wider", "noise": 0.2},
        {"hidden_size": 64, "intermediate_size": 100, "depth": 3}, {"width": 2, "convention": "orthogonal"},
    ],
)  # fmt: skip
def test_llama_without_the_librarys_casts(groups, options):
    model = build("llama", num_key_value_heads=groups, attention_bias=True, head_dim=6)
    ids = tokens(1, 9)[0].numpy()
    big = grow(model, **options)
    before = slow.llama_logits(state(model), model.config, ids)
    after = slow.llama_logits(state(big), big.config, ids)
    np.testing.assert_allclose(after, before, atol=LIMIT)
    with torch.no_grad():  # and the slow model is the library's
        library = model(torch.as_tensor(ids)[None]).logits[0].numpy()
    np.testing.assert_allclose(library, before, atol=1e-4)


# Symmetry


def step(model, count=1):
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(count):
        optimizer.zero_grad()
        model.eval()
        loss = model(input_ids=tokens(3, 10), labels=tokens(3, 10, seed=5)).loss
        loss.backward()
        optimizer.step()


def separation(weight, copies=2):
    """Largest relative distance of the copies of one row."""
    rows = weight.unflatten(0, (-1, copies))
    rows = rows.detach()
    return float((rows[:, 0] - rows[:, 1]).norm() / rows.norm())


@pytest.mark.parametrize("kind", list(KINDS))
def test_noise_separates_copies_and_without_it_they_never_part(kind):
    watched = {
        "bert": "bert.encoder.layer.0.intermediate.dense.bias",
        "roberta": "roberta.encoder.layer.0.intermediate.dense.bias",
        "gpt2": "transformer.h.0.mlp.c_fc.bias",
        "llama": "model.layers.0.mlp.gate_proj.bias",
        "gau": "gau_alpha.encoder.layer.0.gau.o_dense.bias",
    }[kind]
    change = {"llama": {"mlp_bias": True}, "gau": {"use_bias": True}}.get(kind, {})
    model = build(kind, **change)
    plain, noisy = grow(model, 2), grow(model, 2, noise=0.1, generator=torch.Generator().manual_seed(0))
    for big, check in ((plain, lambda d: d < 1e-12), (noisy, lambda d: d > 1e-3)):
        big(input_ids=tokens(3, 10), labels=tokens(3, 10, seed=5)).loss.backward()
        assert check(separation(big.get_parameter(watched).grad))
        assert separation(big.get_parameter(watched)) == 0  # biases are equal copies still
        big.zero_grad()
        step(big, 5)
    assert separation(plain.get_parameter(watched)) < 1e-12
    assert separation(noisy.get_parameter(watched)) > 1e-5


def test_noise_makes_new_rotary_coordinates_and_fills_learn():
    model = build("llama")
    for noise, learns in ((0.0, False), (0.1, True)):
        big = grow(model, 2, heads="wider", noise=noise)
        big(input_ids=tokens(), labels=tokens()).loss.backward()
        # coordinates 1, 3, ... of both halves of a head are new
        grad = big.model.layers[0].self_attn.q_proj.weight.grad.unflatten(0, (4, 2, 4, 2))[:, :, :, 1]
        assert bool(grad.any()) is learns
        big = grow(model, hidden_size=48, noise=noise)
        big(input_ids=tokens(), labels=tokens()).loss.backward()
        assert bool(big.model.layers[0].mlp.down_proj.weight.grad[32:].abs().max() > 1e-12) is learns


def test_noise_follows_the_generator():
    model = build("gpt2")
    made = [state(grow(model, 2, noise=0.1, generator=torch.Generator().manual_seed(s))) for s in (0, 0, 1)]
    name = "transformer.h.0.mlp.c_fc.weight"
    np.testing.assert_array_equal(made[0][name], made[1][name])
    assert not np.array_equal(made[0][name], made[2][name])
    np.testing.assert_array_equal(made[0]["transformer.wte.weight"], made[2]["transformer.wte.weight"])
    np.testing.assert_array_equal(state(grow(model, 2))[name], state(grow(model, 2, noise=0))[name])


def test_training_goes_on_where_the_small_model_was(tmp_path):
    from kexue.training import fit

    model = build("gpt2", dtype=torch.float32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    batches = [{"input_ids": tokens(4, 12, seed=i), "labels": tokens(4, 12, seed=i)} for i in range(4)]
    first = fit(model, batches, steps=20, out=tmp_path / "small", lr=1e-2)
    with torch.no_grad():
        loss = float(model(**batches[0]).loss)
    big = grow(model, 2, depth=3, noise=0.05, generator=torch.Generator().manual_seed(0))
    second = fit(big, batches, steps=20, out=tmp_path / "big", lr=1e-2)
    lines = (tmp_path / "big" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["loss"] == pytest.approx(loss, rel=1e-4)
    assert second.loss < first.loss
