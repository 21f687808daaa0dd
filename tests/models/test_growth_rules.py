"""Blocks, axes and recipes against explicit matrices."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kexue.models._growth_rules import Axis, Recipe, fills, keep, repeat, stride, tile

F64 = torch.float64


def matrix(axis):
    """(big, small): what the recipe does to the unit vectors."""
    rows = []
    for unit in torch.eye(axis.small, dtype=F64):
        out = torch.full((axis.big,), torch.nan, dtype=F64)
        Recipe("x", (axis,)).write(unit, out)
        rows.append(out)
    return torch.stack(rows, 1)


def factors():
    small = st.integers(1, 5)
    kinds = st.sampled_from(["keep", "repeat", "tile", "mean", "value", "stride"])
    return st.tuples(kinds, small, st.integers(0, 9), st.integers(1, 3)).map(
        lambda v: {
            "keep": lambda n, more, k: keep(n),
            "repeat": lambda n, more, k: repeat(n, n + more),
            "tile": lambda n, more, k: tile(n, n + more),
            "mean": lambda n, more, k: fills(n, n + more, "mean"),
            "value": lambda n, more, k: fills(n, n + more, "value"),
            "stride": lambda n, more, k: stride(n, k),
        }[v[0]](*v[1:])
    )


@given(factors())
def test_blocks_cover_every_entry_once(factor):
    places = [
        b.start + i * b.step + t * b.period for b in factor.blocks for i in range(b.count) for t in range(b.copies)
    ]
    assert sorted(places) == list(range(factor.big))
    copies = [b.first + i for b in factor.blocks if b.source == "copy" for i in range(b.count) for _ in range(b.copies)]
    for b in factor.blocks:
        if b.source == "copy":
            assert all(copies.count(b.first + i) == b.total for i in range(b.count))


@given(factors(), st.floats(0.1, 3))
def test_what_reads_copies_undoes_them(factor, scale):
    axis = Axis.of(factor)
    made, read = matrix(axis), matrix(axis.averaged())
    torch.testing.assert_close(read.T @ made, torch.eye(axis.small, dtype=F64))
    halves = matrix(Axis.of(factor.shared_product(scale)))
    if all(b.source != "mean" for b in factor.blocks):
        torch.testing.assert_close(halves.T @ halves, scale**2 * torch.eye(axis.small, dtype=F64))


def test_layouts():
    x = torch.arange(1.0, 4)
    cases = {
        repeat(3, 6): [1, 1, 2, 2, 3, 3],
        repeat(3, 7): [1, 1, 2, 2, 3, 3, 1],
        tile(3, 8): [1, 2, 3, 1, 2, 3, 1, 2],
        fills(3, 8, "mean"): [1, 1, 2, 2, 3, 3, 2, 2],
        fills(3, 7, "value"): [1, 1, 2, 2, 3, 3, 0],
        stride(3, 3): [1, 0, 0, 2, 0, 0, 3, 0, 0],
        tile(3, 3): [1, 2, 3],
    }
    for factor, expected in cases.items():
        out = torch.full((factor.big,), torch.nan)
        Recipe("x", (Axis.of(factor),)).write(x, out)
        assert out.tolist() == expected


@given(factors(), factors(), factors(), st.sampled_from([0.5, -2.0]), st.booleans())
def test_a_tensor_is_the_product_of_the_matrices_of_its_axes(first, second, third, scale, transposed):
    rows, columns = Axis.joined([Axis.of(first, second), Axis.of(keep(2))]), Axis.of(third).averaged()
    if any(b.source == "mean" for f in (first, second) for b in f.blocks):
        rows = Axis.of(first) if any(b.source == "mean" for b in first.blocks) else Axis.of(second)
    shape = (columns.small, rows.small) if transposed else (rows.small, columns.small)
    source = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    source = source.T if transposed else source
    kept = source.clone()
    out = torch.full((rows.big, columns.big), torch.nan, dtype=F64)
    Recipe("x", (rows, columns), scale, 1).write(source, out)
    torch.testing.assert_close(out, scale * matrix(rows) @ source @ matrix(columns).T)
    assert torch.equal(source, kept)
    # The transposed layer, as Conv1D of GPT-2 stores it
    turned = torch.full((columns.big, rows.big), torch.nan, dtype=F64)
    Recipe("x", (columns, rows), scale, 0).write(source.T, turned)
    torch.testing.assert_close(turned, out.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_values_are_rounded_once(dtype, k):
    source = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), dtype=F64).to(dtype)
    axis = Axis.of(repeat(8, 8 * k)).averaged()
    out = torch.full((6, 8 * k), torch.nan, dtype=dtype)
    Recipe("x", (Axis.of(keep(6)), axis), 1.0, 1).write(source, out)
    exact = (source.double() / k).repeat_interleave(k, 1)
    worst = torch.finfo(dtype).eps * (0 if k != 3 else 0.5 if dtype.itemsize == 2 else 1.0)
    assert ((out.double() - exact).abs() <= worst * exact.abs()).all()


@given(factors(), st.integers(0, 1), st.booleans())
def test_noise_sums_to_nothing_over_the_copies_of_an_input(factor, seed, conv):
    axis = Axis.of(keep(2), factor).averaged()
    rows = Axis.of(keep(3))
    source = torch.randn(3, axis.small, generator=torch.Generator().manual_seed(seed), dtype=F64)
    axes = (axis, rows) if conv else (rows, axis)
    recipe = Recipe("x", axes, 1.0, 0 if conv else 1, noise=0.5)
    outs = []
    for _ in range(2):
        out = torch.full(recipe.shape, torch.nan, dtype=F64)
        recipe.write(source.T if conv else source, out, torch.Generator().manual_seed(5))
        outs.append(out.T if conv else out)
    assert torch.equal(*outs)
    # Copies in, fills 0: the outputs are those of the small layer
    inputs = torch.randn(axis.small, 4, generator=torch.Generator().manual_seed(9), dtype=F64)
    copies = matrix(Axis.of(keep(2), factor.filled("value", 0.0) if factor.big > factor.small else factor))
    torch.testing.assert_close(outs[0] @ (copies @ inputs), source @ inputs)
    plain = torch.empty(recipe.shape, dtype=F64)
    Recipe("x", axes, 1.0, recipe.inputs).write(source.T if conv else source, plain)
    assert torch.equal(plain.T if conv else plain, outs[0]) is not axis.grown


def test_noise_has_the_size_that_was_asked_for():
    source = torch.randn(200, 100, generator=torch.Generator().manual_seed(0))
    recipe = Recipe("x", (Axis.of(repeat(200, 400)), Axis.of(repeat(100, 400)).averaged()), 1.0, 1, noise=0.1)
    noisy, plain = torch.empty(400, 400), torch.empty(400, 400)
    recipe.write(source, noisy, torch.Generator().manual_seed(0))
    Recipe("x", recipe.axes, 1.0, 1).write(source, plain)
    realised = (noisy - plain).std() / plain.square().mean().sqrt()
    assert float(realised) == pytest.approx(0.1 * (3 / 4) ** 0.5, rel=0.02)  # centring four copies takes a quarter
    assert not torch.equal(noisy[0], noisy[1])  # rows that were copies differ


def test_one_seed_gives_one_noise_in_every_dtype():
    source = torch.ones(4, 4)
    recipe = Recipe("x", (Axis.of(keep(4)), Axis.of(repeat(4, 8)).averaged()), 1.0, 1, noise=0.1)
    made = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        out = torch.empty(4, 8, dtype=dtype)
        recipe.write(source.to(dtype), out, torch.Generator().manual_seed(3))
        made.append(out.double())
    torch.testing.assert_close(made[1], made[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(made[2], made[0], rtol=1e-2, atol=1e-2)


def test_a_zero_scale_writes_zeros_even_with_noise():
    out = torch.full((4, 8), torch.nan)
    Recipe("x", (Axis.of(keep(4)), Axis.of(repeat(4, 8)).averaged()), 0.0, 1, noise=0.1).write(torch.ones(4, 4), out)
    assert not out.any()


def test_shapes_and_layout_are_checked():
    recipe = Recipe("w", (Axis.of(keep(2)), Axis.of(repeat(3, 6))))
    for source, out in itertools.product((torch.ones(2, 3), torch.ones(3, 3)), (torch.ones(2, 6), torch.ones(2, 5))):
        if source.shape == (2, 3) and out.shape == (2, 6):
            continue
        with pytest.raises(ValueError, match="w must have shape"):
            recipe.write(source, out)
    with pytest.raises(ValueError, match="contiguous"):
        recipe.write(torch.ones(2, 3), torch.ones(6, 2).T)
