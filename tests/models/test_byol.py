"""BYOL: its teacher, and SimSiam as the case without memory."""

import copy

import pytest
import torch
from torch import nn

from kexue.models import BYOL
from models.simsiam_models import mlp, tensors
from reference import simsiam_dynamics as reference


def byol(**options):
    torch.manual_seed(0)
    return BYOL(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6)), 6, **options)


def step(model, optimizer, seed):
    optimizer.zero_grad()
    loss = model(*tensors(8, 5, count=2, seed=seed))
    loss.backward()
    optimizer.step()
    if isinstance(model, BYOL):
        model.update_teacher()
    return float(loss.detach())


def test_the_teacher_is_a_moving_average_that_is_never_trained():
    model = byol(tau=0.75).double()
    model.requires_grad_(True)  # even then
    optimizer = torch.optim.SGD(model.param_groups(lr=0.1))
    assert not [n for g in model.param_groups() for n, _ in g["params"] if n.startswith("teacher")]
    own = [*model.encoder.parameters(), *model.projector.parameters()]
    teacher = list(model.teacher.parameters())
    expected = [p.detach().clone() for p in teacher]
    for a, b in zip(expected, own, strict=True):
        assert torch.equal(a, b)
    for seed in range(3):
        step(model, optimizer, seed)
        assert all(p.grad is None for p in teacher)
        expected = [0.75 * a + 0.25 * b.detach() for a, b in zip(expected, own, strict=True)]
        for a, b in zip(teacher, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_byol_compares_with_the_teachers_targets():
    model = byol(tau=0.9).double()
    optimizer = torch.optim.SGD(model.param_groups(lr=0.5))
    for seed in range(2):
        step(model, optimizer, seed)
    other = copy.deepcopy(model)
    x1, x2 = tensors(8, 5, count=2, seed=9)
    p1, p2, *_ = reference.two_passes(other, x1, x2)
    with torch.no_grad():
        z1, z2 = (other.teacher["projector"](other.teacher["encoder"](x)) for x in (x1, x2))
    torch.testing.assert_close(model(x1, x2), reference.loss_rows(p1, p2, z1, z2).mean())
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_without_memory_it_is_simsiam():
    plain, model = mlp(output_norm=False).double(), byol(tau=0).double()
    optimizers = [torch.optim.SGD(m.param_groups(lr=0.1)) for m in (plain, model)]
    for seed in range(3):
        assert step(plain, optimizers[0], seed) == pytest.approx(step(model, optimizers[1], seed), abs=1e-12)
    for part in ("encoder", "projector"):
        for a, b in zip(
            getattr(model, part).state_dict().values(), model.teacher[part].state_dict().values(), strict=True
        ):
            torch.testing.assert_close(a, b)
    fixed = byol(tau=1)
    before = [p.clone() for p in fixed.teacher.parameters()]
    nn.init.zeros_(fixed.encoder[0].weight)
    fixed.update_teacher()
    assert all(torch.equal(a, b) for a, b in zip(before, fixed.teacher.parameters(), strict=True))


def test_byol_is_saved_with_its_teacher():
    model, other = byol(), byol()
    optimizer = torch.optim.SGD(model.double().param_groups(lr=0.5))
    step(model, optimizer, 0)
    other.double().load_state_dict(model.state_dict(), strict=True)
    inputs = tensors(8, 5, count=2)
    assert torch.equal(model(*inputs), other(*inputs))
    assert not any(p.requires_grad for p in other.teacher.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tau": 1.1}, ValueError, "tau must be at most 1; got 1.1"),
        ({"tau": -0.1}, ValueError, "tau must be at least 0.0; got -0.1"),
        ({"tau": None}, TypeError, "tau must be a number; got None"),
        ({"stop_gradient": True}, TypeError, "no option stop_gradient"),
    ],
)
def test_wrong_arguments_of_byol_are_named(options, error, message):
    with pytest.raises(error, match=message):
        byol(**options)
