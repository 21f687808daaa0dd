"""SimSiam against two passes, statistics included; its parameter groups; what it refuses."""

import copy

import pytest
import torch
from torch import nn

from kexue.models import SimSiam
from models.simsiam_models import F64, generator, mlp, tensors
from reference import simsiam_dynamics as reference


class Conv(nn.Module):
    """A user's module: convolutions with batch norm, unknown to torch."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=None)

    def forward(self, x):
        return self.norm(self.conv(x)).relu().mean((2, 3))


class Centre(nn.Module):
    """Looks across the batch without saying so."""

    def forward(self, x):
        return x - x.mean(0)


def check_two_passes(model, x1, x2):
    """Loss, gradients and every buffer are those of two passes."""
    model.zero_grad()
    other = copy.deepcopy(model)
    loss = model(x1, x2)
    p1, p2, z1, z2 = reference.two_passes(other, x1, x2)
    targets = [z.detach() if model.stop_gradient else z for z in (z1, z2)]
    expected = reference.loss_rows(p1, p2, *targets).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=lambda m, name=name: f"{name}: {m}")
    for (name, a), b in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
    assert not [m for m in model.modules() if "forward" in vars(m)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("views", ["auto", "apart", "split"])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"output_norm": False}, {"projector": None}, {"predictor": None}, {"stop_gradient": False},
        {"projector": None, "output_norm": False, "predictor": None, "stop_gradient": False},
        {"projection_dim": 4, "hidden_dim": 7, "bottleneck": 3},
    ],
)  # fmt: skip
def test_the_loss_is_that_of_two_passes_statistics_included(options, views, training):
    model = mlp(views=views, **options).double().train(training)
    if "predictor" in options and model.stop_gradient:
        for p in model.predictor.parameters():
            p.requires_grad_(False)
    check_two_passes(model, *tensors(7, 5, count=2))


@pytest.mark.parametrize("views", ["auto", "split"])
def test_a_module_of_the_user_with_its_own_batch_norm(views):
    torch.manual_seed(0)
    model = SimSiam(Conv(), 4, views=views).double()
    for seed in (0, 1):  # momentum=None: the second step weighs its passes by their number
        check_two_passes(model, *tensors(3, 1, 8, 8, count=2, seed=seed))


@pytest.mark.parametrize("spot", ["encoder", "projector", "predictor"])
def test_code_that_looks_across_the_batch_is_run_twice(spot):
    parts = {"encoder": nn.Linear(5, 4), "projector": nn.Linear(4, 4), "predictor": nn.Linear(4, 4)}
    torch.manual_seed(1)
    parts[spot] = nn.Sequential(parts[spot], Centre())
    encoder = parts.pop("encoder")
    check_two_passes(SimSiam(encoder, 4, **parts).double(), *tensors(3, 5, count=2))


def test_hooks_and_exchanged_forwards_are_run_twice_too():
    model = mlp().double()
    model.encoder[2].register_forward_hook(lambda module, inputs, out: out - out.mean(0))
    check_two_passes(model, *tensors(4, 5, count=2))
    model = mlp(views="split").double()
    original = model.encoder[1].forward
    model.encoder[1].forward = lambda x: 2 * original(x)
    other = mlp(views="apart").double()
    with torch.no_grad():
        other.encoder[1].weight *= 2
    torch.testing.assert_close(model(*tensors(4, 5, count=2)), other(*tensors(4, 5, count=2)))
    assert model.encoder[1].forward is not original


def test_an_error_within_the_shared_pass_leaves_the_batch_norms_as_they_were():
    model = mlp()
    with pytest.raises(RuntimeError):
        model(torch.ones(4, 3), torch.ones(4, 3))
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_frozen_batch_norms_and_those_without_running_statistics():
    model = mlp().double()
    model.encoder[1].eval()
    check_two_passes(model, *tensors(4, 5, count=2))
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False))
    check_two_passes(SimSiam(bare, 4).double().eval(), *tensors(4, 5, count=2))


def test_mixed_statistics_are_those_of_both_views_together():
    model, other = mlp(views="mixed").double(), mlp().double()
    x1, x2 = tensors(6, 5, count=2)
    x2 += 3
    z = other.projector(other.encoder(torch.cat([x1, x2])))
    p = other.predictor(z)
    loss = model(x1, x2)
    torch.testing.assert_close(loss, reference.loss_rows(p[:6], p[6:], z[:6], z[6:]).mean())
    assert abs(float(loss.detach()) - float(mlp().double()(x1, x2).detach())) > 1e-3
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_encoder_is_called_once_where_it_can_be():
    calls = []

    class Counting(nn.Linear):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    x1, x2 = tensors(3, 5, count=2, dtype=torch.float32)
    for views, expected in (("auto", [3, 3]), ("apart", [3, 3]), ("split", [6]), ("mixed", [6])):
        calls.clear()
        SimSiam(Counting(5, 4), 4, views=views)(x1, x2)
        assert calls == expected
    calls.clear()
    model = SimSiam(nn.Linear(5, 4), 4)
    model.encoder.register_forward_pre_hook(lambda m, inputs: calls.append(len(inputs[0])))
    model(x1, x2)
    assert calls == [3, 3]


def test_views_of_any_form():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 6)

        def forward(self, batch):
            ids, mask = batch["ids"], batch["mask"].unsqueeze(-1)
            return (self.table(ids) * mask).sum(1) / mask.sum(1).clamp(min=1)

    torch.manual_seed(0)
    model = SimSiam(Words(), 6).double()
    ids = [torch.randint(20, (4, length), generator=generator()) for length in (3, 5)]
    check_two_passes(model, *({"ids": i, "mask": torch.ones(i.shape, dtype=F64)} for i in ids))
    table = SimSiam(nn.Embedding(20, 6), 6).double()
    check_two_passes(table, ids[0][:, 0], ids[1][:, 0])


def test_views_of_different_sizes():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    model = SimSiam(encoder, 4).double()
    check_two_passes(model, torch.randn(3, 2, 8, dtype=F64), torch.randn(3, 2, 12, dtype=F64))
    check_two_passes(model, torch.randn(3, 2, 8, dtype=F64), torch.randn(3, 2, 8, dtype=F64))


def test_small_batches():
    model = mlp()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for rows in (0, 1):
        with pytest.raises(ValueError, match=f"at least 2 rows in training mode; got a batch of {rows}"):
            model(torch.ones(rows, 5), torch.ones(rows, 5))
        with pytest.raises(ValueError, match="at least 2 rows in training mode"):
            mlp(views="mixed")(torch.ones(rows, 5), torch.ones(rows, 5))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    model.eval()
    assert model(torch.ones(0, 5), torch.ones(0, 5)).item() == 0
    assert torch.isfinite(model(torch.ones(1, 5), torch.ones(1, 5)))
    bare = SimSiam(nn.Linear(5, 4), 4, projector=None, output_norm=False, predictor=nn.Linear(4, 4))
    assert torch.isfinite(bare(torch.ones(1, 5), torch.ones(1, 5)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(dtype):
    model = mlp().to(dtype)
    loss = model(*tensors(8, 5, count=2, dtype=dtype))
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.encoder[0].weight.grad.any()


@pytest.mark.slow
def test_training_with_and_without_the_stop_gradient():
    x = torch.randn(64, 5, generator=generator())

    def train(**options):
        model = mlp(output_norm=False, **options)
        optimizer = torch.optim.SGD(model.param_groups(lr=0.1), momentum=0.9)
        g = generator()
        for _ in range(60):
            optimizer.zero_grad()
            loss = model(*(x + 0.3 * torch.randn(x.shape, generator=g) for _ in range(2)))
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    assert train(stop_gradient=False) < train() < -0.3


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_the_model_compiles_as_one_graph(training):
    torch.compiler.reset()
    model, inputs = mlp().train(training), tensors(6, 5, count=2, dtype=torch.float32)
    expected = copy.deepcopy(model)
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(loss, expected(*inputs))
    for a, b in zip(model.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_state_dict_round_trip_and_copies():
    model, other = mlp(), mlp()
    inputs = tensors(6, 5, count=2, dtype=torch.float32)
    model(*inputs)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(*inputs), other(*inputs))
    assert torch.equal(copy.deepcopy(model).eval()(*inputs), model.eval()(*inputs))


def test_the_default_parts_are_those_of_the_paper():
    model = SimSiam(nn.Linear(5, 32), 32)
    kinds = [type(m).__name__ for m in model.projector.modules() if not list(m.children())]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    last = [m for m in model.projector.modules() if isinstance(m, nn.BatchNorm1d)][-1]
    assert last.weight is None
    assert [tuple(m.weight.shape) for m in model.predictor if isinstance(m, nn.Linear)] == [(8, 32), (32, 8)]
    assert model.project(torch.randn(4, 5)).shape == (4, 32)
    assert SimSiam(nn.Linear(5, 32), 32, projection_dim=12).project(torch.randn(4, 5)).shape == (4, 12)


def names(groups):
    return {group["name"]: [name for name, _ in group["params"]] for group in groups}


def test_groups_hold_each_trained_parameter_once():
    model = mlp()
    groups = model.param_groups(lr=0.05, predictor_lr=0.5)
    assert [(g["name"], g["lr"], g["fix_lr"]) for g in groups] == [("encoder", 0.05, False), ("predictor", 0.5, True)]
    assert "weight_decay" not in groups[0]
    held = [id(p) for g in groups for _, p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert all(name.startswith(("encoder.", "projector.")) for name in names(groups)["encoder"])
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.5]
    held_names = [name for own in names(model.param_groups()).values() for name in own]
    assert sorted(held_names) == sorted(dict(model.named_parameters()))
    assert [g["lr"] for g in model.param_groups(0.2, weight_decay=1e-4)] == [0.2, 0.2]
    assert {g["weight_decay"] for g in model.param_groups(weight_decay=1e-4)} == {1e-4}


def test_frozen_shared_and_missing_parameters():
    model = mlp()
    model.encoder[0].requires_grad_(False)
    assert not {"encoder.0.weight", "encoder.0.bias"} & set(names(model.param_groups())["encoder"])
    shared = nn.Linear(4, 4)
    twice = SimSiam(shared, 4, projector=None, predictor=nn.Sequential(shared, nn.Linear(4, 4)))
    assert names(twice.param_groups()) == {
        "encoder": ["encoder.weight", "encoder.bias"],
        "predictor": ["predictor.1.weight", "predictor.1.bias"],
    }
    assert list(names(mlp(predictor=None).param_groups())) == ["encoder"]
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        mlp().requires_grad_(False).param_groups()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1}, ValueError, "lr must be at least 0.0; got -1"),
        ({"predictor_lr": float("nan")}, ValueError, "predictor_lr must be finite"),
        ({"lr": "fast"}, TypeError, "lr must be a number; got 'fast'"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be at least"),
    ],
)
def test_wrong_rates_are_named(options, error, message):
    with pytest.raises(error, match=message):
        mlp().param_groups(**options)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((lambda x: x, 4), {}, TypeError, "encoder must be a Module; got function"),
        ((nn.Linear(5, 4), 4.0), {}, TypeError, "dim must be an integer; got 4.0"),
        ((nn.Linear(5, 1), 1), {}, ValueError, "dim must be at least 2; got 1"),
        ((nn.Linear(5, 4), 4), {"projection_dim": 1}, ValueError, "projection_dim must be at least 2; got 1"),
        ((nn.Linear(5, 4), 4), {"bottleneck": 0}, ValueError, "bottleneck must be at least 1; got 0"),
        (
            (nn.Linear(5, 4), 4),
            {"projector": "cnn"},
            TypeError,
            "projector must be .*, a Module or None; got 'cnn'",
        ),
        ((nn.Linear(5, 4), 4), {"predictor": 3}, TypeError, 'predictor must be "mlp", a Module or None; got 3'),
        ((nn.Linear(5, 4), 4), {"projector": None, "projection_dim": 8}, ValueError, "must be dim, 4; got 8"),
        ((nn.Linear(5, 4), 4), {"stop_gradient": 1}, TypeError, "stop_gradient must be True or False; got 1"),
        ((nn.Linear(5, 4), 4), {"views": "both"}, ValueError, "views must be one of 'auto', .*; got 'both'"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        SimSiam(*arguments, **options)


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


@pytest.mark.parametrize("views", ["auto", "split"])
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x: x[:, :3], ValueError, r"encoder must return shape .*4\); got \(\d+, 3\)"),
        (lambda x: x[:, None], ValueError, r"encoder must return shape .*4\); got \(\d+, 1, 4\)"),
        (lambda x: x[0], ValueError, r"encoder must return shape .*4\); got \(4,\)"),
        (lambda x: (x, x), TypeError, r"encoder must return a tensor of shape .*4\); got tuple"),
        (lambda x: x.long(), TypeError, "encoder must return a floating tensor; got dtype torch.int64"),
    ],
)
def test_an_encoder_that_returns_something_else_is_refused(make, error, message, views):
    with pytest.raises(error, match=message):
        SimSiam(Returns(make), 4, views=views)(torch.ones(3, 4), torch.ones(3, 4))
    with pytest.raises(error, match=message):
        SimSiam(Returns(make), 4).project(torch.ones(3, 4))


def test_parts_and_views_that_do_not_fit_are_refused():
    x = torch.ones(3, 5)
    with pytest.raises(ValueError, match=r"equal batch sizes; got \(3, 5\) and \(2, 5\)"):
        mlp()(x, x[:2])
    with pytest.raises(ValueError, match=r"encoder must return shape \(3, 4\); got \(2, 4\)"):
        SimSiam(Returns(lambda b: b["x"][:, :4]), 4)({"x": x}, {"x": x[:2]})
    with pytest.raises(ValueError, match=r"projector must return shape \(6, 6\); got \(6, 5\)"):
        mlp(projector=nn.Linear(6, 5), output_norm=False)(x, x)
    with pytest.raises(ValueError, match=r"predictor must return shape \(6, 6\); got \(6, 2\)"):
        mlp(predictor=nn.Linear(6, 2))(x, x)
