"""PathKernel against one backward pass per example and output."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from explain.path_models import MODELS, Pooled, Tied, build, ids, mlp, normal
from kexue.explain import PathKernel
from kexue.explain import _contributions as passes
from reference.path_kernel import path_kernel


def targets(x, loss="mse", width=1):
    g = torch.Generator().manual_seed(3)
    if loss == "ce":
        return torch.randint(0, width, (len(x),), generator=g)
    y = torch.randn(len(x), width, generator=g, dtype=torch.float64)
    return (y > 0).double() * 0.8 + 0.1 if loss == "bce" else y


def check(model, x, x_test, y, rule="chord3", loss="mse", steps=4, memory=1 << 30, **how):
    """Fit a copy, compare everything with the reference, return the fitted object."""
    own = copy.deepcopy(model)
    pk = PathKernel(own, loss=loss, rule=rule, memory=memory)
    assert pk.fit(x, y, steps=steps, **how) is pk
    how = {key: value for key, value in how.items() if key not in ("batch_size", "seed")}
    truth = path_kernel(model, x, y, x_test, loss, rule, batches=pk.batches_, **how)
    for a, b in zip(own.parameters(), truth["model"].parameters(), strict=True):
        torch.testing.assert_close(a, b)
    squeeze = (lambda v: v[..., 0]) if truth["f0"].shape[1] == 1 else (lambda v: v)
    scale = float(truth["shares"].abs().max()) + 1e-30
    close = {"rtol": 1e-7, "atol": 1e-9 * scale}
    torch.testing.assert_close(pk.contributions(x_test), squeeze(truth["shares"]), **close)
    torch.testing.assert_close(pk.decay_term(x_test), squeeze(truth["decay"]), **close)
    torch.testing.assert_close(pk.f0(x_test), squeeze(truth["f0"]))
    whole = truth["f0"] + truth["shares"].sum(1) + truth["decay"]
    torch.testing.assert_close(pk.reconstruct(x_test), squeeze(whole))
    kernel = truth["kernel"][:, :, 0, 0] if truth["f0"].shape[1] == 1 else truth["kernel"]
    torch.testing.assert_close(pk.kernel(x_test), kernel, rtol=1e-7, atol=1e-9 * float(kernel.abs().max()))
    off = float((whole - truth["f_T"]).norm() / (truth["f_T"] - truth["f0"]).norm())
    assert abs(pk.error(x_test) - off) < 1e-6 * off + 1e-11
    return pk


@pytest.mark.parametrize("name", list(MODELS))
def test_every_layer_agrees_with_the_reference(name):
    model, x, x_test = build(name)
    pk = check(model, x, x_test, targets(x), lr=0.03)
    assert pk.error(x_test) < 1e-6


@pytest.mark.parametrize("name", list(MODELS))
def test_every_layer_with_minibatches_and_momentum(name):
    model, x, x_test = build(name)
    check(model, x, x_test, targets(x), lr=0.03, batch_size=3, momentum=0.8, weight_decay=0.1, seed=2)


def test_which_form_is_used_for_which_model():
    forms = {}
    for name in MODELS:
        model, x, _ = build(name)
        pk = PathKernel(model).fit(x, targets(x), steps=1)
        g = pk._gradients
        forms[name] = (len(g.layers), sorted(g.loose), g._stacked, g._batched)
    assert forms["mlp"] == (2, [], True, True)
    assert forms["conv2d"] == (4, [], True, True)
    assert forms["embedding, padding"] == (2, [], True, True)
    assert forms["shared"] == (2, [], True, True)
    assert forms["in place"] == (3, [], True, True)
    assert forms["attention"] == (4, [], True, True)
    assert forms["folded"] == (2, [], True, True)
    assert forms["time first"][1] == ["layer.bias", "layer.weight"]
    assert forms["direct"][1] == ["gain", "layer.weight"] or forms["direct"][1] == [
        "gain",
        "layer.bias",
        "layer.weight",
    ]
    assert forms["branching"][1:] == (["gain"], False, False)
    assert all(name.startswith("rnn") for name in forms["recurrent"][1])
    assert len(forms["recurrent"][1]) == 4


@pytest.mark.parametrize("rule", ["chord3", "left"])
@pytest.mark.parametrize("loss", ["mse", "bce", "ce"])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_vector_outputs(rule, loss, batch_size):
    torch.manual_seed(0)
    model, x = mlp(4, 6, 3).double(), normal(8, 4)
    pk = check(model, x, normal(3, 4, seed=1), targets(x, loss, 3), rule, loss, lr=0.2, batch_size=batch_size, steps=5)
    assert pk.contributions(x).shape == (8, 8, 3)


@pytest.mark.parametrize("name", ["encoder", "conv2d", "direct", "recurrent", "time, wide", "embedding, wide"])
def test_vector_outputs_of_other_layers(name):
    model, x, x_test = build(name)

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.last = model, nn.Linear(1, 3).double()

        def forward(self, x):
            return self.last(self.model(x))

    check(Wide(), x, x_test, targets(x, "ce", 3), loss="ce", lr=0.1, steps=3)


@pytest.mark.parametrize("name", ["time first", "direct", "encoder", "mlp"])
@pytest.mark.parametrize("zero", ["head", "all"])
def test_parameters_that_start_at_zero_do_not_hide_wrong_layers(name, zero):
    model, x, x_test = build(name)
    if name == "time first":
        x, x_test = normal(7, 3, 4), normal(4, 3, 4, seed=1)  # as many times as rows in the check
    for key, p in model.named_parameters():
        if zero == "all" or key.startswith(("head", "2")):
            nn.init.zeros_(p)
    pk = check(model, x, x_test, targets(x), lr=0.1, steps=5)
    assert pk.error(x_test) < 1e-6


def test_examples_of_zeros_do_not_hide_wrong_layers():
    model, _, x_test = build("direct")
    model.layer.bias = None
    x = torch.zeros(7, 4, dtype=torch.float64)
    x[1] = 1
    pk = check(model, x, x_test, targets(x), lr=0.1)
    assert "layer.weight" in pk._gradients.loose


class Checkpointed(nn.Module):
    """A layer that runs again on the way back."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(checkpoint(lambda h: torch.tanh(self.layer(h)), x, use_reentrant=False))


def test_checkpointing_is_refused():
    torch.manual_seed(0)
    model, x = Checkpointed().double(), normal(7, 4)
    with pytest.raises(ValueError, match=r"got others for layer\.weight: turn checkpointing off"):
        PathKernel(model).fit(x, targets(x))


class Summed(Pooled):
    def forward(self, x):
        return self.head(self.body(self.tokens(x)).sum(1))


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("how", [{}, {"batch_size": 2, "momentum": 0.9}], ids=str)
def test_inputs_without_entries(how):
    """Sequences of length 0 and examples without features leave the last bias alone to be trained."""
    torch.manual_seed(0)
    pooled = Summed(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh()).double()
    flat = nn.Linear(0, 1).double()
    for model, bias, x in (
        (pooled, pooled.head.bias, torch.zeros(5, 0, dtype=torch.long)),
        (flat, flat.bias, normal(5, 0)),
    ):
        first = float(bias.detach())
        pk = PathKernel(model).fit(x, normal(5, 1), lr=0.1, steps=6, **how)
        moved = torch.full((2,), float(bias.detach()) - first, dtype=torch.float64)
        assert moved[0] != 0
        torch.testing.assert_close(pk.contributions(x[:2]).sum(1), moved)


def test_a_table_that_is_also_the_head():
    torch.manual_seed(0)
    x = ids(8, 4)
    pk = check(Tied().double(), x, ids(3, 4, seed=1), targets(x, "ce", 6), loss="ce", lr=0.3)
    assert pk._gradients.loose == ["tokens.weight"]


@pytest.mark.parametrize("rule", ["chord3", "left"])
@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize(
    "how",
    [
        {"momentum": 0.9},
        {"weight_decay": 0.3},
        {"momentum": 0.5, "weight_decay": 0.3},
        {"optimizer": "adam"},
        {"optimizer": "adam", "weight_decay": 0.2, "betas": (0.7, 0.9), "eps": 1e-3},
        {"optimizer": "adam", "betas": (0.0, 0.9)},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch_size", [None, 3])
def test_optimisers_are_torchs_and_their_shares_add_up(rule, loss, how, batch_size):
    model, x, x_test = build("deep")
    check(model, x, x_test, targets(x, loss), rule, loss, steps=6, lr=0.05, batch_size=batch_size, **how)


@pytest.mark.parametrize("how", [{}, {"momentum": 0.9}, {"optimizer": "adam"}, {"batch_size": 2, "weight_decay": 0.1}])
def test_a_path_that_does_not_fit_is_trained_again_and_gives_the_same(how):
    model, x, x_test = build("deep")
    y = targets(x)
    stored = check(model, x, x_test, y, steps=11, lr=0.05, **how)
    again = check(model, x, x_test, y, steps=11, lr=0.05, memory=0, **how)
    assert stored._path.every == 11
    assert again._path.every == 4
    assert len(again._path.checkpoints) == 3
    torch.testing.assert_close(again.contributions(x_test), stored.contributions(x_test), rtol=1e-12, atol=0)
    assert torch.equal(again.losses_, stored.losses_)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, {"batch_size": 3, "momentum": 0.9}])
@pytest.mark.parametrize("name", ["wide", "encoder", "direct"])
def test_chunks_and_blocks_do_not_matter(monkeypatch, how, name):
    model, x, x_test = build(name, m=9)
    pk = PathKernel(model).fit(x, targets(x), steps=10, lr=0.05, **how)
    expected = pk.contributions(x_test), pk.kernel(x_test)
    for chunk, limit in ((1, 1), (1, 1 << 24), (1 << 17, 1 << 13)):
        monkeypatch.setattr(passes, "_CHUNK", chunk)
        monkeypatch.setattr(passes, "_LIMIT", limit)
        pk._known = None
        for a, b in zip((pk.contributions(x_test), pk.kernel(x_test)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_one_point_alone_gives_what_it_gives_among_others():
    model, x, x_test = build("mlp")
    pk = PathKernel(model).fit(x, targets(x), steps=5)
    whole = pk.contributions(x_test)
    for i in range(len(x_test)):
        torch.testing.assert_close(pk.contributions(x_test[i : i + 1])[0], whole[i])


def test_least_squares_in_closed_form():
    """The kernel x . x' + 1 is constant; residuals shrink by I - 2 lr / n K, and c_i = -2 lr / n K sum_s r_i(s)."""
    x, x_test, n, lr, steps = normal(6, 3), normal(4, 3, seed=1), 6, 0.05, 30
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    y = targets(x)
    residual = (model(x) - y).detach()[:, 0]
    pk = PathKernel(model).fit(x, y, lr=lr, steps=steps)
    k, k_test = x @ x.T + 1, x_test @ x.T + 1
    total, r = torch.zeros(n), residual
    for _ in range(steps):
        total = total + r
        r = r - 2 * lr / n * k @ r
    torch.testing.assert_close(pk.contributions(x_test), -2 * lr / n * k_test * total)
    torch.testing.assert_close(pk.kernel(x_test), lr * steps / n * k_test)
    torch.testing.assert_close(pk.alpha(x_test), (-2 / steps * total).expand(4, -1))
    left = PathKernel(copy.deepcopy(model), rule="left").fit(x, y, lr=lr, steps=3)
    assert left.error(x_test) < 1e-12  # linear: no error of discretisation


@settings(max_examples=25)
@given(
    widths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    outputs=st.integers(1, 3),
    n=st.integers(1, 6),
    m=st.integers(0, 4),
    loss=st.sampled_from(["mse", "bce"]),
    optimizer=st.sampled_from(["sgd", "adam"]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    batched=st.booleans(),
    seed=st.integers(0, 100),
)
def test_contributions_add_up_to_the_change(widths, outputs, n, m, loss, optimizer, weight_decay, batched, seed):
    torch.manual_seed(seed)
    model = mlp(*widths, outputs).double()
    x, x_test = normal(n, widths[0], seed=seed), normal(m, widths[0], seed=seed + 1)
    pk = PathKernel(model, loss=loss)
    with torch.no_grad():
        before = model(x_test)
    size = max(1, n // 2) if batched else None
    how = {"batch_size": size, "optimizer": optimizer, "weight_decay": weight_decay}
    pk.fit(x, targets(x, loss, outputs), lr=0.01, steps=5, **how)
    shares, decay = pk.contributions(x_test), pk.decay_term(x_test)
    assert shares.shape == ((m, n) if outputs == 1 else (m, n, outputs))
    added = (shares.sum(1) + decay).reshape(m, outputs)
    torch.testing.assert_close(before + added, model(x_test).detach(), rtol=1e-9, atol=1e-9)
    assert pk.error(x_test) < 1e-7
    outside = [i for i in range(n) if i not in pk.batches_.unique()]
    assert not shares[:, outside].any()


def test_only_members_of_a_batch_get_a_share_and_batches_come_from_the_seed():
    model, x, x_test = build("mlp", n=10)
    y = targets(x)
    pk = PathKernel(copy.deepcopy(model)).fit(x, y, steps=2, batch_size=3, seed=5)
    members = pk.batches_.unique()
    assert pk.batches_.shape == (2, 3)
    assert len(members) == 6  # an epoch shows no example twice
    got = pk.contributions(x_test).ne(0).any(0).nonzero()[:, 0]
    assert torch.equal(got, members)
    same = PathKernel(copy.deepcopy(model)).fit(x, y, steps=2, batch_size=3, seed=5)
    other = PathKernel(copy.deepcopy(model)).fit(x, y, steps=2, batch_size=3, seed=6)
    assert torch.equal(same.contributions(x_test), pk.contributions(x_test))
    assert not torch.equal(other.batches_, pk.batches_)
