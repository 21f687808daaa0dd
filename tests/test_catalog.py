"""Tests that every method of the catalogue passes, from the table in catalog_cases.py."""

import importlib
import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from catalog_cases import CASES, EstimatorCase, TensorCase
from kexue.catalog import METHODS, state

DONE = [slug for slug, method in METHODS.items() if state(method).importable]
TENSOR = [(slug, case) for slug in CASES for case in CASES[slug] if isinstance(case, TensorCase)]
ESTIMATOR = [(slug, case) for slug in CASES for case in CASES[slug] if isinstance(case, EstimatorCase)]


def ids(cases):
    return [f"{slug}-{case.name}" for slug, case in cases]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def differentiable(inputs):
    return [x for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point()]


def test_catalogue_lists_the_38_methods_once():
    assert len(METHODS) == 38
    assert len({m.article for m in METHODS.values()}) == 38
    assert all(key == method.slug for key, method in METHODS.items())


def test_catalogue_imports_nothing_of_the_package():
    code = "import sys, kexue.catalog; print([m for m in sys.modules if m.startswith('kexue.') or m == 'torch'])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "['kexue.catalog']"


@pytest.mark.parametrize("slug", DONE)
def test_a_method_with_its_component_has_cases_reproduction_and_page(slug):
    found = state(METHODS[slug])
    assert CASES.get(slug), f"add the shared test cases of {slug} to tests/catalog_cases.py"
    assert found.reproduced, f"{METHODS[slug].module} is missing"
    assert found.page, f"docs/{METHODS[slug].page} or its Chinese twin is missing"


@pytest.mark.parametrize("slug", DONE)
def test_public_names_are_documented_with_an_example(slug):
    for path in METHODS[slug].names:
        module, _, name = path.rpartition(".")
        thing = getattr(importlib.import_module(module), name)
        doc = inspect.getdoc(thing) or ""
        assert ">>>" in doc, f"{path} has no doctest"
        has_arguments = inspect.isclass(thing) or inspect.signature(thing).parameters
        assert not has_arguments or "Args:" in doc or "Parameters" in doc, f"{path} does not document its arguments"


@pytest.mark.parametrize("slug", DONE)
@pytest.mark.slow
def test_quick_reproduction_runs_and_is_json(slug, tmp_path):
    from kexue.reproduce import VERDICTS, run, write_report

    result = run(slug, quick=True, out=tmp_path)
    assert result.verdict in VERDICTS
    assert json.loads(json.dumps(result.figures)) == result.figures
    assert result.figure_path.stat().st_size > 1000
    page = write_report([result], tmp_path / "report.html").read_text(encoding="utf-8")
    assert result.verdict in page
    assert METHODS[slug].name_zh in page


@pytest.mark.parametrize(("slug", "case"), TENSOR, ids=ids(TENSOR))
def test_every_dtype_gives_finite_values_and_gradients_close_to_float64(slug, case):
    function, inputs = case.build(6, torch.float64, generator())
    for dtype in (getattr(torch, name) for name in case.dtypes):
        low = [
            x.detach().to(dtype, copy=True) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in inputs
        ]
        exact = [
            x.detach().to(torch.float64, copy=True) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in low
        ]
        model = function
        if isinstance(function, torch.nn.Module):
            reference = case.build(6, torch.float64, generator())[0]
            model = case.build(6, torch.float64, generator())[0].to(dtype)
            reference.load_state_dict({k: v.to(dtype).double() for k, v in reference.state_dict().items()})
        else:
            reference = function
        for values in (low, exact):
            for x in differentiable(values):
                x.requires_grad_()
        out, expected = model(*low), reference(*exact)
        out.float().sum().backward()
        expected.sum().backward()
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
        assert torch.isfinite(out).all()
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
        for a, b in zip(differentiable(low), differentiable(exact), strict=True):
            assert a.grad.dtype == dtype
            assert torch.isfinite(a.grad).all()
            scale = b.grad.norm() + 1e-6
            assert (a.grad.double() - b.grad).norm() / scale < tolerance


@pytest.mark.parametrize(("slug", "case"), TENSOR, ids=ids(TENSOR))
def test_gradients_agree_with_finite_differences(slug, case):
    function, inputs = case.build(3, torch.float64, generator(1))
    for x in differentiable(inputs):
        x.requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: function(*args), inputs, fast_mode=True)


@pytest.mark.parametrize(("slug", "case"), TENSOR, ids=ids(TENSOR))
def test_one_row_and_no_row(slug, case):
    function, inputs = case.build(1, torch.float32, generator())
    assert torch.isfinite(function(*inputs)).all()
    if isinstance(case.empty, str):
        function, inputs = case.build(0, torch.float32, generator())
        assert torch.isfinite(function(*inputs)).all()
    else:
        function, inputs = case.build(0, torch.float32, generator())
        with pytest.raises(case.empty):
            function(*inputs)


@pytest.mark.parametrize(("slug", "case"), TENSOR, ids=ids(TENSOR))
def test_rows_do_not_influence_each_other(slug, case):
    if not case.row_independent:
        pytest.skip("rows interact by design")
    function, inputs = case.build(5, torch.float64, generator())
    whole = function(*inputs)
    first = [x[:2] if isinstance(x, torch.Tensor) and x.shape[:1] == (5,) else x for x in inputs]
    torch.testing.assert_close(function(*first), whole[:2])


@pytest.mark.parametrize(("slug", "case"), TENSOR, ids=ids(TENSOR))
def test_equal_inputs_give_equal_bits(slug, case):
    function, inputs = case.build(5, torch.float32, generator())
    first, second = function(*inputs), function(*inputs)
    assert torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize(("slug", "case"), TENSOR, ids=ids(TENSOR))
def test_compiles_as_one_graph(slug, case):
    if not case.compile:
        pytest.skip("torch.compile is not promised")
    torch.compiler.reset()
    function, inputs = case.build(4, torch.float32, generator())
    for x in differentiable(inputs):
        x.requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), function(*inputs))
    grads = torch.autograd.grad(compiled(*inputs).sum(), differentiable(inputs))
    expected = torch.autograd.grad(function(*inputs).sum(), differentiable(inputs))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("slug", "case"), TENSOR, ids=ids(TENSOR))
def test_state_dict_round_trip(slug, case):
    if not case.module:
        pytest.skip("not a Module")
    first, inputs = case.build(4, torch.float32, generator(0))
    second, _ = case.build(4, torch.float32, generator(1))
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(first(*inputs), second(*inputs))


@pytest.mark.slow
@pytest.mark.parametrize(("slug", "case"), ESTIMATOR, ids=ids(ESTIMATOR))
def test_estimator_is_deterministic_saves_loads_and_rejects_nothing(slug, case, tmp_path):
    (first, data), (second, _) = case.build(0), case.build(0)
    assert first.fit(data) is first
    second.fit(data)
    np.testing.assert_array_equal(case.output(first), case.output(second))
    if case.save_load is not None:
        np.testing.assert_array_equal(case.output(case.save_load(first, tmp_path)), case.output(first))
    empty, _ = case.build(0)
    with pytest.raises(ValueError):
        empty.fit(case.empty)
