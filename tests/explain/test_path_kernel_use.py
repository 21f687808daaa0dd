"""PathKernel as it is used: bad input, dtypes, interruption, divergence, alpha, and what must stay as it was."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from explain.path_models import build, mlp, normal
from kexue.explain import PathKernel, _path


def data(n=6, width=4, outputs=1):
    return normal(n, width), normal(n, outputs, seed=9)


def net(*widths, seed=0):
    torch.manual_seed(seed)
    return mlp(*(widths or (4, 5, 1))).double()


def state(model):
    return [v.clone() for v in model.state_dict().values()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def fitted():
    x, y = data()
    return PathKernel(net()).fit(x, y, steps=5)


def test_float32_gives_float32_and_says_how_far_off_it_is():
    x, y = data(20)
    exact = PathKernel(net(4, 8, 1)).fit(x, y, lr=0.1, steps=50)
    low = PathKernel(net(4, 8, 1).float()).fit(x.float(), y.float(), lr=0.1, steps=50)
    for name in ("contributions", "f0", "decay_term", "reconstruct", "kernel", "alpha"):
        got, expected = getattr(low, name)(x.float()), getattr(exact, name)(x)
        assert got.dtype == torch.float32
        assert not got.requires_grad
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4)
    assert 1e-9 < low.error(x.float()) < 1e-5
    assert exact.error(x) < 1e-13
    assert isinstance(low.error(x.float()), float)


def test_float64_targets_follow_a_float32_model():
    x, y = data()
    pk = PathKernel(net().float()).fit(x.float(), y, steps=2)
    assert pk.contributions(x.float()).dtype == torch.float32


def test_the_left_rule_is_off_by_the_first_order_and_the_chord_is_not():
    errors = {}
    for rule in ("left", "chord3"):
        for lr in (0.1, 0.05):
            x, y = data(20)
            pk = PathKernel(net(4, 8, 1), rule=rule).fit(x, y, lr=lr, steps=int(5 / lr))
            errors[rule, lr] = pk.error(x)
    assert 1.7 < errors["left", 0.1] / errors["left", 0.05] < 2.3
    assert errors["chord3", 0.1] < 1e-12


def test_no_test_point_gives_empty_results(fitted):
    x = data(0)[0]
    assert fitted.contributions(x).shape == (0, 6)
    assert fitted.kernel(x).shape == (0, 6)
    assert fitted.alpha(x).shape == (0, 6)
    assert fitted.f0(x).shape == fitted.decay_term(x).shape == fitted.reconstruct(x).shape == (0,)
    assert fitted.error(x) == 0.0
    wide = PathKernel(net(4, 3)).fit(data()[0], data(outputs=3)[1], steps=2)
    assert wide.contributions(x).shape == wide.alpha(x).shape == (0, 6, 3)
    assert wide.kernel(x).shape == (0, 6, 3, 3)


def test_one_training_example_has_all_the_credit():
    x, y = data(1)
    model = net()
    pk = PathKernel(model).fit(x, y, steps=3)
    change = model(x).detach()[:, 0] - pk.f0(x)
    torch.testing.assert_close(pk.contributions(x)[:, 0], change)


def test_a_training_that_changes_nothing_has_no_error():
    x = data()[0]
    model = net()
    pk = PathKernel(model).fit(x, model(x).detach(), steps=3)
    assert pk.error(x) == 0.0
    assert pk.contributions(x).abs().max() < 1e-15


def test_inputs_that_are_numbers_of_one_axis():
    torch.manual_seed(0)
    model = nn.Embedding(6, 1).double()
    x, y = torch.tensor([0, 1, 1, 5]), normal(4)
    pk = PathKernel(model).fit(x, y, lr=0.1, steps=3)
    shares = pk.contributions(torch.tensor([1, 2, 0]))
    assert shares.ne(0).tolist() == [[False, True, True, False], [False] * 4, [True, False, False, False]]


@pytest.mark.parametrize("name", ["mlp", "direct", "branching"])
def test_nothing_but_the_parameters_changes(name):
    model, x, x_test = build(name)
    y = normal(len(x), 1, seed=9)
    own = (x.clone(), y.clone(), x_test.clone())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.manual_seed(5)
    random = torch.random.get_rng_state()
    pk = PathKernel(model).fit(x, y, steps=3, batch_size=3)
    trained = state(model)
    pk.contributions(x_test), pk.alpha(x_test), pk.error(x_test)
    assert same((x, y, x_test), own)
    assert same(state(model), trained)
    assert all(bool((p.grad == 1).all()) and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert model.training
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_what_happens_to_model_and_data_later_does_not_matter():
    model, (x, y) = net(), data()
    x_test = normal(3, 4, seed=2)
    pk = PathKernel(model).fit(x, y, steps=4)
    expected = pk.contributions(x_test)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    x.zero_(), y.zero_()
    pk._known = None
    assert torch.equal(pk.contributions(x_test), expected)
    shares = pk.contributions(x_test)
    shares.zero_()  # a result is the caller's
    x_test_before = x_test.clone()
    assert torch.equal(pk.contributions(x_test_before), expected)


def test_results_follow_the_points_and_not_the_object():
    pk = PathKernel(net()).fit(*data(), steps=3)
    x_test = normal(2, 4, seed=2)
    first = pk.contributions(x_test)
    x_test.add_(1)
    assert not torch.equal(pk.contributions(x_test), first)


def test_a_second_fit_goes_on_and_replaces_the_path():
    model, (x, y) = net(), data()
    pk = PathKernel(model).fit(x, y, steps=4)
    middle = model(x).detach()[:, 0]
    pk.fit(x, y, steps=2)
    torch.testing.assert_close(pk.f0(x), middle)
    assert pk.n_steps_ == len(pk.losses_) == 2
    assert pk.error(x) < 1e-12


def test_losses_are_those_before_each_step():
    model, (x, y) = net(), data()
    first = float((model(x) - y).detach().square().mean())
    pk = PathKernel(model).fit(x, y, lr=0.1, steps=20)
    assert float(pk.losses_[0]) == pytest.approx(first)
    assert pk.losses_[-1] < pk.losses_[0]
    two = PathKernel(net(4, 2)).fit(x, data(outputs=2)[1], steps=1)  # summed over the outputs
    assert float(two.losses_[0]) == pytest.approx(
        float((net(4, 2)(x) - data(outputs=2)[1]).detach().square().sum(1).mean())
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_working_without_gradients_makes_no_difference(mode):
    (x, y), model = data(), net()
    expected = PathKernel(net()).fit(x, y, steps=3)
    with mode():
        pk = PathKernel(model).fit(x, y, steps=3)
        for name in ("contributions", "kernel", "reconstruct"):
            assert torch.equal(getattr(pk, name)(x.clone()), getattr(expected, name)(x))


def test_a_model_that_changes_its_inputs_in_place_leaves_the_callers_alone():
    x, y = data()
    x_test, kept = normal(3, 4, seed=2), x.clone()
    points = x_test.clone()
    pk = PathKernel(nn.Sequential(nn.ReLU(inplace=True), *net())).fit(x, y, steps=3)
    assert pk.error(x_test) < 1e-10
    pk.kernel(x_test), pk.alpha(x_test)
    assert torch.equal(x, kept)
    assert torch.equal(x_test, points)


@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_ctrl_c_leaves_the_last_complete_step(monkeypatch, memory):
    advance, calls = _path.advance, [0]

    def interrupted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == 8:
            raise KeyboardInterrupt
        return advance(*args, **kwargs)

    x, y = data()
    model, reference = net(), net()
    pk = PathKernel(model, memory=memory)
    monkeypatch.setattr(_path, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pk.fit(x, y, lr=0.1, steps=30)
    monkeypatch.setattr(_path, "advance", advance)
    PathKernel(reference).fit(x, y, lr=0.1, steps=7)
    assert same(state(model), state(reference))
    assert pk.n_steps_ == len(pk.losses_) == len(pk.batches_) == 7
    assert pk.error(x) < 1e-8


def test_ctrl_c_before_the_first_step_leaves_everything(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    model = net()
    before, pk = state(model), PathKernel(model)
    monkeypatch.setattr(_path, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pk.fit(*data(), steps=3)
    assert same(state(model), before)
    with pytest.raises(RuntimeError, match="fit must be called first"):
        pk.contributions(data()[0])


@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_a_training_that_diverges_names_the_step_and_changes_nothing(memory):
    x, y = data()
    model = nn.Linear(4, 1).double()
    pk = PathKernel(model, memory=memory).fit(x, y, steps=3)
    before, shares = state(model), pk.contributions(x)
    with pytest.raises(FloatingPointError, match=r"diverged at step \d+ of 900: .* smaller lr than 1000") as found:
        pk.fit(x, y, lr=1000.0, steps=900)
    step = int(str(found.value).split("step ")[1].split()[0])
    assert same(state(model), before)
    assert torch.equal(pk.contributions(x), shares)
    other = copy.deepcopy(model)  # one step fewer is finite
    PathKernel(other).fit(x, y, lr=1000.0, steps=step - 1)
    with pytest.raises(FloatingPointError, match=f"step {step} of {step}"):
        PathKernel(model).fit(x, y, lr=1000.0, steps=step)


class Curve(nn.Module):
    """theta at x = 0 and theta^2 at x = 1: the kernel of the two is 2 theta."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, x):
        return (1 - x) * self.theta + x * self.theta**2


def test_alpha_does_not_exist_where_the_kernel_cancels():
    x, y = torch.zeros(1, 1, dtype=torch.float64), torch.full((1,), -1.5, dtype=torch.float64)
    model = Curve()
    pk = PathKernel(model, rule="left").fit(x, y, lr=0.25, steps=2)  # theta: .5, -.5, ...
    assert pk.kernel(torch.ones(1, 1, dtype=torch.float64)).tolist() == [[0.0]]
    both = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    assert pk.contributions(both)[1, 0] == -0.25 * (4 * 1 + 2 * -1)
    with pytest.warns(UserWarning, match="alpha does not exist at 1 of 2 places"):
        alpha = pk.alpha(both)
    assert alpha[0, 0] == -(4 + 2) / 2  # the mean of -l'
    assert torch.isnan(alpha[1, 0])


def test_alpha_of_an_example_that_was_in_no_batch_is_0():
    x = data(9)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for outputs in (1, 2):
            pk = PathKernel(net(4, 5, outputs)).fit(x, data(9, outputs=outputs)[1], steps=2, batch_size=2)
            outside = [i for i in range(9) if i not in pk.batches_.unique()]
            alpha = pk.alpha(x[:3])
            assert len(outside) == 5
            assert not alpha[:, outside].any()
            assert alpha[:, pk.batches_[0]].all()


def test_alpha_times_the_kernel_is_the_contribution():
    x, y = data(outputs=3)
    pk = PathKernel(net(4, 5, 3)).fit(x, y, lr=0.05, steps=10)
    made = (pk.kernel(x) @ pk.alpha(x)[..., None])[..., 0]
    torch.testing.assert_close(made, pk.contributions(x))
    one = PathKernel(net()).fit(x, y[:, :1], lr=0.05, steps=10)
    torch.testing.assert_close(one.kernel(x) * one.alpha(x), one.contributions(x))


class Coupled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1).double()

    def forward(self, x):
        return self.layer(x - x.mean(0))


class Along(Coupled):
    """A recurrence along the examples, which the first one does not notice."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(4, 4).double()

    def forward(self, x):
        return self.layer(self.rnn(x)[0])


class Detached(Coupled):
    def forward(self, x):
        return self.layer(x).detach()


class Bound(Coupled):
    """Its copy runs the parameters of the original."""

    def __init__(self):
        super().__init__()
        self.forward = lambda x: self.layer(x)


class Noisy(Coupled):
    def forward(self, x):
        return self.layer(F.dropout(x, 0.5, self.training))


class Pair(Coupled):
    def forward(self, x):
        return self.layer(x), x


class Deep(Coupled):
    def forward(self, x):
        return self.layer(x)[:, None]


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: 3, TypeError, "nn.Module; got int"),
        (nn.Tanh, ValueError, "a parameter with requires_grad; got none"),
        (lambda: nn.Linear(4, 1).half(), TypeError, "got torch.float16"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1).double()), TypeError, "torch.float32 .* torch.float64"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), ValueError, r"1 \(BatchNorm1d\) couples"),
        (lambda: nn.BatchNorm1d(4, track_running_stats=False).eval(), ValueError, "couples"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)), ValueError, r"p=0.1.*eval\(\)"),
        (lambda: nn.LSTM(4, 4, 2, dropout=0.5), ValueError, "dropout=0.5"),
        (lambda: nn.Embedding(4, 1, max_norm=1.0), ValueError, "max_norm=1"),
        (lambda: nn.Embedding(4, 1, sparse=True), ValueError, "sparse=False; got sparse=True"),
        (lambda: nn.LazyLinear(1), ValueError, "not initialized"),
    ],
)
def test_models_that_cannot_be_explained_are_refused(model, error, message):
    with pytest.raises(error, match=message):
        PathKernel(model())


def test_what_is_inactive_is_no_reason_to_refuse():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)).double().eval()
    x, y = data()
    pk = PathKernel(model).fit(x, y, steps=3)
    assert pk.error(x) < 1e-10
    model.train()
    with pytest.raises(ValueError, match="couples"):
        pk.fit(x, y)
    assert pk.contributions(x).shape == (6, 6)  # of the training in eval mode
    PathKernel(nn.Sequential(nn.Dropout(0.0), nn.Linear(4, 1)).double()).fit(x, y, steps=1)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (Coupled, ValueError, "must not depend on the others"),
        (Along, ValueError, "must not depend on the others"),
        (Bound, ValueError, "must depend on the trained parameters"),
        (Detached, ValueError, "must depend on the trained parameters; got outputs without their gradients"),
        (Noisy, ValueError, "must be deterministic"),
        (Pair, TypeError, "must return a tensor; got tuple"),
        (Deep, ValueError, r"\(N,\), \(N, 1\) or \(N, C\); got \(3, 1, 1\)"),
    ],
)
def test_outputs_that_cannot_be_explained_are_refused(model, error, message):
    with pytest.raises(error, match=message):
        PathKernel(model()).fit(*data())


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"lr": 0.0}, ValueError, "lr must be greater than 0.0; got 0.0"),
        ({"lr": -1}, ValueError, "lr"),
        ({"lr": float("nan")}, ValueError, "lr must be finite"),
        ({"lr": "fast"}, TypeError, "lr must be a number"),
        ({"steps": 0}, ValueError, "steps must be at least 1; got 0"),
        ({"steps": 1.5}, TypeError, "steps must be an integer"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"batch_size": 7}, ValueError, "at most 6, the number of examples; got 7"),
        ({"momentum": 1.0}, ValueError, "momentum must be below 1"),
        ({"momentum": -0.1}, ValueError, "momentum"),
        ({"momentum": 0.9, "optimizer": "adam"}, ValueError, "belongs to 'sgd'"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay"),
        ({"optimizer": "lion"}, ValueError, "'sgd', 'adam'; got 'lion'"),
        ({"betas": 0.9}, TypeError, "betas must be two numbers"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]"),
        ({"seed": -1}, ValueError, "seed"),
    ],
)
def test_bad_settings_are_refused(how, error, message):
    model = net()
    before = state(model)
    with pytest.raises(error, match=message):
        PathKernel(model).fit(*data(), **how)
    assert same(state(model), before)


@pytest.mark.parametrize(
    ("loss", "x", "y", "error", "message"),
    [
        ("mse", [[1.0]], torch.zeros(1), TypeError, "X must be a tensor; got list"),
        ("mse", data()[0].float(), data()[1], TypeError, "X must be torch.float64.*got torch.float32"),
        ("mse", data(0)[0], data(0)[1], ValueError, "at least one example"),
        ("mse", normal(6, 3), data()[1], ValueError, r"that the model can take; got \(6, 3\) of torch.float64"),
        ("mse", data()[0].long(), data()[1], ValueError, r"got \(6, 4\) of torch.int64, on which it fails"),
        ("mse", data()[0].to_sparse(), data()[1], TypeError, "X must be a dense tensor; got torch.sparse_coo"),
        ("mse", torch.tensor(1.0).double(), data()[1], ValueError, r"shape \(N, ...\); got \(\)"),
        ("mse", data()[0].log(), data()[1], ValueError, "X must be finite; got"),
        ("mse", data()[0], data()[1].tolist(), TypeError, "y must be a tensor; got list"),
        ("mse", data()[0], data()[1].long(), TypeError, "y must be floating for 'mse'; got torch.int64"),
        ("mse", data()[0], data(5)[1], ValueError, r"\(6,\) or \(6, 1\).*got \(5, 1\)"),
        ("mse", data()[0], data(outputs=2)[1], ValueError, r"got \(6, 2\)"),
        ("mse", data()[0], data()[1] / 0, ValueError, "y must be finite"),
        ("bce", data()[0], torch.full((6,), 1.5), ValueError, r"\[0, 1\] for 'bce'; got 1.5 to 1.5"),
        ("ce", data()[0], torch.zeros(6).long(), ValueError, "C >= 2; the model has 1"),
    ],
)
def test_bad_data_is_refused(loss, x, y, error, message):
    with pytest.raises(error, match=message):
        PathKernel(net(), loss=loss).fit(x, y)


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (torch.zeros(6), TypeError, "integer class indices for 'ce'; got torch.float32"),
        (torch.zeros(6, 1).long(), ValueError, r"shape \(6,\) for 'ce'; got \(6, 1\)"),
        (torch.full((6,), 3), ValueError, r"in \[0, 3\) for 'ce'; got 3 to 3"),
        (torch.full((6,), -100), ValueError, "got -100"),
    ],
)
def test_bad_classes_are_refused(y, error, message):
    with pytest.raises(error, match=message):
        PathKernel(net(4, 3), loss="ce").fit(data()[0], y)


def test_a_vector_of_outputs_needs_a_vector_of_targets():
    with pytest.raises(ValueError, match=r"shape \(6, 3\), as the outputs; got \(6,\)"):
        PathKernel(net(4, 3)).fit(data()[0], torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (normal(2, 5), ValueError, r"X_test must have the shape \(N, 4\); got \(2, 5\)"),
        (normal(4), ValueError, r"\(N, 4\); got \(4,\)"),
        (normal(2, 4).float(), TypeError, "X_test must be torch.float64"),
        (torch.zeros(2, 4).long(), TypeError, "like the training examples; got torch.int64"),
        (normal(2, 4).log(), ValueError, "X_test must be finite"),
        (None, TypeError, "X_test must be a tensor; got NoneType"),
    ],
)
def test_bad_points_are_refused(fitted, x, error, message):
    for name in ("contributions", "reconstruct", "error", "kernel", "alpha", "f0", "decay_term"):
        with pytest.raises(error, match=message):
            getattr(fitted, name)(x)


def test_explaining_before_training_is_refused():
    for name in ("contributions", "reconstruct", "error", "kernel", "alpha", "f0", "decay_term"):
        with pytest.raises(RuntimeError, match="fit must be called first"):
            getattr(PathKernel(net()), name)(data()[0])


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'mse', 'bce', 'ce'; got 'hinge'"):
        PathKernel(net(), loss="hinge")
    with pytest.raises(ValueError, match="'left', 'chord3'; got 'euler'"):
        PathKernel(net(), rule="euler")
    with pytest.raises(ValueError, match="memory must be at least 0"):
        PathKernel(net(), memory=-1)
