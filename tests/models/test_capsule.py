import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.losses import capsule_margin_loss
from kexue.models import Capsule, CapsulePooler, _capsule_keys, capsule_routing, squash
from reference import capsule_routing as reference

RULES = ["kmeans", "hinton", "squash"]


def draw(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def some(*shape, seed=1):
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[0] = False  # an example that is masked everywhere
    return mask


def layer(shared, rule="kmeans", routings=3, dtype=torch.float64, **options):
    torch.manual_seed(3)
    cap = Capsule(4, 3, 5, routings, shared, rule, num_inputs=None if shared else 6, **options).to(dtype)
    with torch.no_grad():
        cap.weight.mul_(2.0)
    return cap


def compare(got, want, inputs, seed=5):
    """Values and every gradient, for random upstream gradients of all outputs."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    up = [torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype) for x in want]

    def gradients(outputs):
        pairs = [(x, y) for x, y in zip(outputs, up, strict=True) if x.requires_grad]
        return torch.autograd.grad([x for x, _ in pairs], inputs, [y for _, y in pairs])

    for a, b in zip(gradients(got), gradients(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("routings", [1, 2, 3, 5])
@pytest.mark.parametrize("rule", RULES)
def test_routing_of_votes_and_its_gradients(rule, routings, masked):
    votes = draw(3, 6, 4, 5)
    mask = some(3, 6) if masked else None
    got = capsule_routing(votes, routings, rule, mask=mask, temperature=0.7, return_coupling=True)
    want = reference.route(votes, routings, rule, temperature=0.7, mask=mask)
    compare(got, want, (votes,))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("routings", [1, 2, 4])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shared", [True, False])
def test_layers_and_their_gradients(shared, rule, routings, masked):
    cap = layer(shared, rule, routings, kappa=0.8, temperature=1.5)
    u = draw(3, 6, 4)
    mask = some(3, 6) if masked else None
    votes = reference.votes(u, cap.weight, 3, mask)
    want = reference.route(votes, routings, rule, 0.8, 1.5, mask)
    compare(cap(u, mask, return_coupling=True), want, (u, cap.weight))


@pytest.mark.parametrize("option", ["hard", "detach"])
@pytest.mark.parametrize("shared", [True, False])
def test_coefficients_without_gradient(shared, option):
    cap = layer(shared, detach_routing=option == "detach")
    u, mask = draw(3, 6, 4), some(3, 6)
    v, c = cap(u, mask, return_coupling=True, hard=option == "hard")
    votes = reference.votes(u, cap.weight, 3, mask)
    want, want_c = reference.route(votes, mask=mask, hard=option == "hard", detach=True)
    assert not c.requires_grad
    torch.testing.assert_close(c, want_c)
    compare((v,), (want,), (u, cap.weight))
    if option == "hard":
        assert set(c.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("shared", [True, False])
def test_blocks_of_examples_give_the_same(shared, monkeypatch):
    cap = layer(shared)
    u, mask = draw(7, 6, 4), some(7, 6)
    whole = cap(u, mask, return_coupling=True)
    monkeypatch.setattr(_capsule_keys, "BLOCK", 250)
    monkeypatch.setattr(_capsule_keys, "DENSE_BLOCK", 250)
    blocks = cap(u, mask, return_coupling=True)
    compare(blocks, whole, (u, cap.weight))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("rule", "routings", "option"),
    [("kmeans", 3, ""), ("hinton", 4, ""), ("squash", 2, ""), ("kmeans", 1, ""), ("hinton", 3, "detach"),
     ("kmeans", 3, "hard")],
)  # fmt: skip
@pytest.mark.parametrize("shared", [True, False])
def test_compiled_passes_in_float32(shared, rule, routings, option, masked, monkeypatch):
    monkeypatch.setattr(_capsule_keys, "WORTH_THREADS", 0)
    monkeypatch.setattr(_capsule_keys, "EXAMPLES", 5)  # two blocks of the dense kernel; 35 inputs are two tiles
    torch.manual_seed(3)
    cap = Capsule(5, 3, 6, routings, shared, rule, num_inputs=35, detach_routing=option == "detach")
    u = draw(9, 35, 5, dtype=torch.float32)
    mask = some(9, 35) if masked else None
    weight, x = cap.weight.detach().double().requires_grad_(), u.detach().double().requires_grad_()
    hard = option == "hard"
    votes = reference.votes(x, weight, 3, mask)
    want = reference.route(votes, routings, rule, mask=mask, hard=hard, detach=bool(option))
    up = [draw(*y.shape, seed=7 + i).detach() for i, y in enumerate(want)]

    def gradients(outputs, inputs, recorded):
        pairs = [(y, g.to(y.dtype)) for y, g, there in zip(outputs, up, recorded, strict=True) if there]
        return torch.autograd.grad([y for y, _ in pairs], inputs, [g for _, g in pairs], retain_graph=True)

    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            got = cap(u, mask, return_coupling=True, hard=hard)
            recorded = [y.requires_grad for y in got]
            grads = gradients(got, (u, cap.weight), recorded)
        finally:
            torch.set_num_threads(before)
        exact = gradients(want, (x, weight), recorded)
        for a, b in zip((*got, *grads), (*want, *exact), strict=True):
            torch.testing.assert_close(a, b.float(), rtol=2e-5, atol=2e-5)


def test_a_shared_layer_takes_any_number_of_inputs_and_padding_does_not_matter():
    cap = layer(True)
    u = draw(2, 3, 4)
    padded = torch.cat([u, torch.full((2, 5, 4), torch.nan, dtype=torch.float64)], 1)
    mask = torch.arange(8) < torch.tensor([[3], [3]])
    v, c = cap(padded, mask, return_coupling=True)
    want, want_c = cap(u, return_coupling=True)
    torch.testing.assert_close(v, want)
    torch.testing.assert_close(c[:, :3], want_c)
    assert (c[:, 3:] == 0).all()
    (grad,) = torch.autograd.grad(v.sum(), u)
    assert torch.isfinite(grad).all()
    assert cap(u[:, :0]).eq(0).all()  # no inputs


@pytest.mark.parametrize("shared", [True, False])
def test_masked_everywhere_is_zero_with_zero_gradient(shared):
    cap, u = layer(shared), draw(2, 6, 4)
    v, c = cap(u, torch.zeros(2, 6, dtype=torch.bool), return_coupling=True)
    grads = torch.autograd.grad(v.square().sum() + v.sum() + c.sum(), (u, cap.weight))
    assert all((x == 0).all() for x in (v, c, *grads))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 3), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4),
    st.sampled_from(RULES), st.floats(0.01, 100.0), st.integers(0, 99),
)  # fmt: skip
def test_lengths_couplings_and_order_of_inputs(batch, n, k, d, routings, rule, size, seed):
    votes = draw(batch, n, k, d, seed=seed).detach() * size
    v, c = capsule_routing(votes, routings, rule, return_coupling=True)
    assert v.shape == (batch, k, d)
    assert (v.norm(dim=-1) < 1).all()
    torch.testing.assert_close(c.sum(-1), torch.ones(batch, n, dtype=torch.float64))
    turned = capsule_routing(votes.flip(1), routings, rule)
    torch.testing.assert_close(turned, v, rtol=1e-6, atol=1e-9)


def test_inputs_of_the_opposite_sign_have_opposite_capsules():
    cap, u = layer(True), draw(2, 6, 4)
    torch.testing.assert_close(cap(-u), -cap(u))


def test_large_temperature_is_the_average_and_small_is_hard():
    votes = draw(2, 6, 4, 5).detach()
    torch.testing.assert_close(capsule_routing(votes, temperature=1e12), capsule_routing(votes, 1))
    hard = capsule_routing(votes, hard=True)
    torch.testing.assert_close(capsule_routing(votes, temperature=1e-9), hard)


def test_more_members_make_a_longer_capsule():
    one = torch.tensor([[[1.0, 0.0], [0.0, 0.1]]])
    lengths = [float(capsule_routing(one.expand(n, 2, 2))[0].norm()) for n in (1, 2, 4, 8)]
    assert lengths == sorted(lengths)
    assert lengths[-1] > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shared", [True, False])
def test_low_precision_computes_in_float32(shared, dtype):
    cap = layer(shared, dtype=dtype)
    u = draw(3, 6, 4, dtype=dtype)
    v = cap(u)
    v.float().sum().backward()
    assert v.dtype == u.grad.dtype == cap.weight.grad.dtype == dtype
    exact = layer(shared)
    exact.load_state_dict({"weight": cap.weight.detach().double()})
    x = u.detach().double().requires_grad_()
    want = exact(x)
    want.sum().backward()
    torch.testing.assert_close(v, want.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(u.grad, x.grad.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_autocast_changes_nothing_and_types_are_promoted():
    cap, u = layer(True, dtype=torch.float32), draw(3, 6, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = cap(u)
        (grad,) = torch.autograd.grad(inside.sum(), u)
    torch.testing.assert_close(inside, cap(u), rtol=0, atol=0)
    torch.testing.assert_close(grad, torch.autograd.grad(cap(u).sum(), u)[0], rtol=0, atol=0)
    assert cap(u.to(torch.bfloat16)).dtype == torch.float32
    assert cap(u.double()).dtype == torch.float64


@pytest.mark.parametrize("rule", RULES)
def test_hostile_sizes_stay_finite(rule):
    for size in (0.0, 1e-30, 1e-12, 1e15, 1e25):
        votes = draw(2, 6, 4, 5, dtype=torch.float32).detach() * size
        votes.requires_grad_()
        v = capsule_routing(votes, routing=rule)
        (grad,) = torch.autograd.grad(v.sum(), votes)
        assert torch.isfinite(v).all(), size
        assert torch.isfinite(grad).all(), size
    opposite = torch.tensor([[[1.0, 2.0]], [[-1.0, -2.0]]], requires_grad=True)  # the sum is exactly 0
    v = capsule_routing(opposite, routing=rule)
    (grad,) = torch.autograd.grad(v.sum(), opposite)
    assert torch.isfinite(grad).all()


def test_strides_leading_shapes_and_inputs_untouched():
    cap, u = layer(True), draw(2, 4, 6).detach().transpose(1, 2)
    before = u.clone()
    torch.testing.assert_close(cap(u), cap(u.contiguous()))
    assert torch.equal(u, before)
    torch.testing.assert_close(cap(u[0]), cap(u)[0])
    torch.testing.assert_close(cap(u.expand(3, 2, 6, 4)), cap(u).expand(3, 2, 3, 5))
    votes = draw(2, 3, 6, 4, 5).detach()
    torch.testing.assert_close(capsule_routing(votes)[1, 2], capsule_routing(votes[1, 2]))
    mask = some(2, 6)
    torch.testing.assert_close(cap(u, mask)[1], cap(u[1], mask[1]))
    assert cap(u[:0], mask[:0]).shape == (0, 3, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [True, False])
def test_weights_of_any_strides(shared, dtype):
    cap, u = layer(shared, dtype=dtype), draw(9, 6, 4, dtype=dtype)
    plain = cap.weight.detach().clone().requires_grad_()
    turned = plain.detach().mT.contiguous().mT.requires_grad_()
    outputs = [torch.func.functional_call(cap, {"weight": w}, (u,)) for w in (plain, turned)]
    torch.testing.assert_close(*outputs)
    want, got = (torch.autograd.grad(v.square().sum(), w)[0] for v, w in zip(outputs, (plain, turned), strict=True))
    torch.testing.assert_close(got, want)
    assert got.is_contiguous()  # as the operator tells the compiler


def test_differentiable_once():
    cap, u = layer(True), draw(2, 6, 4)
    (grad,) = torch.autograd.grad(cap(u).square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("shared", [True, False])
def test_nothing_of_the_size_of_the_votes_is_kept(shared):
    inputs, capsules, width = 200, 10, 32
    cap = Capsule(8, capsules, width, share_weights=shared, num_inputs=None if shared else inputs)
    u = torch.randn(4, inputs, 8, requires_grad=True)
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        cap(u).sum()
    for own in (u, cap.weight):
        kept.pop(own.untyped_storage().data_ptr())
    assert sum(kept.values()) <= 12 * 4 * capsules * width * 4  # a dozen sums (B, k, o), no tensor with n


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_compiles_with_every_option(shared):
    torch.compiler.reset()
    cap, u, mask = layer(shared, "hinton", dtype=torch.float32), draw(3, 6, 4, dtype=torch.float32), some(3, 6)
    compiled = torch.compile(cap, fullgraph=True, backend="aot_eager")
    got, want = (f(u, mask, return_coupling=True) for f in (compiled, cap))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    wanted = [torch.autograd.grad(x[0].sum() + x[1].square().sum(), (u, cap.weight)) for x in (got, want)]
    for a, b in zip(*wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kappa", [0.5, 1.0, 3.0])
def test_squash(kappa):
    v = draw(4, 3)
    torch.testing.assert_close(squash(v, kappa), reference.squash(v, kappa))
    torch.testing.assert_close(squash(v.T, kappa, dim=0).T, reference.squash(v, kappa))
    assert torch.autograd.gradcheck(lambda x: squash(x, kappa), v)
    assert torch.autograd.gradgradcheck(lambda x: squash(x, kappa), v)
    zero = torch.zeros(2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(squash(zero, kappa).sum(), zero)
    assert torch.isfinite(grad).all()
    assert torch.isfinite(squash(torch.full((3,), 6e4, dtype=torch.float16), kappa)).all()
    assert squash(torch.full((3,), 1e30), kappa).norm() == pytest.approx(1.0)
    assert squash(v[:0], kappa).shape == (0, 3)


def test_the_pooler_scores_labels_from_hidden_states_and_a_tokenizers_mask():
    torch.manual_seed(0)
    head = CapsulePooler(8, 3)
    hidden, mask = draw(2, 5, 8, dtype=torch.float32), torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    scores = head(hidden, mask)
    torch.testing.assert_close(scores[0], head.capsule(hidden[:1, :3]).norm(dim=-1)[0])
    assert (scores[1] == 0).all()
    torch.testing.assert_close(scores, head(hidden, mask.bool()))
    assert head(hidden).shape == (2, 3)
    capsule_margin_loss(scores, torch.tensor([[1, 0, 0], [0, 0, 1]])).backward()
    assert torch.isfinite(hidden.grad).all()
    with pytest.raises(TypeError, match=r"bool or integers; got dtype torch.float32"):
        head(hidden, mask.float())
    with pytest.raises(ValueError, match="labels"):
        CapsulePooler(8, 0)


def test_a_layer_learns_to_tell_two_clusters_apart():
    torch.manual_seed(0)
    cap = Capsule(6, 2, 4)
    x, y = torch.randn(64, 5, 6), torch.arange(64) % 2
    x[torch.arange(64), :, y] += 2.0  # not +2 and -2 on one axis: u and -u have the same lengths
    optimizer = torch.optim.Adam(cap.parameters(), 0.03)
    target = torch.nn.functional.one_hot(y, 2)
    for _ in range(40):
        loss = capsule_margin_loss(cap(x).norm(dim=-1), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (cap(x).norm(dim=-1).argmax(1) == y).float().mean() > 0.95


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"d_in": 0}, ValueError, "d_in must be at least 1; got 0"),
        ({"num_capsules": 0}, ValueError, "num_capsules must be at least 1"),
        ({"dim_capsule": 2.5}, TypeError, "dim_capsule must be an integer; got 2.5"),
        ({"routings": 0}, ValueError, "routings must be at least 1"),
        ({"routing": "em"}, ValueError, "'kmeans', 'hinton', 'squash'; got 'em'"),
        ({"kappa": 0.0}, ValueError, "kappa must be greater than 0"),
        ({"temperature": -1.0}, ValueError, "temperature must be greater than 0"),
        ({"share_weights": False}, ValueError, "num_inputs must be given"),
        ({"num_inputs": 0}, ValueError, "num_inputs must be at least 1"),
    ],
)
def test_bad_settings_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        Capsule(**{"d_in": 4, "num_capsules": 3, "dim_capsule": 5, **change})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: layer(True)(torch.randn(2, 6, 5)), ValueError, r"\(..., inputs, 4\); got \(2, 6, 5\)"),
        (lambda: layer(True)(torch.randn(4)), ValueError, "inputs"),
        (lambda: layer(True)([1.0]), TypeError, "u must be a tensor; got list"),
        (lambda: layer(True)(torch.ones(2, 6, 4).long()), TypeError, "floating"),
        (lambda: layer(False)(torch.randn(2, 7, 4).double()), ValueError, "6 inputs .*got 7"),
        (lambda: layer(True)(draw(2, 6, 4), torch.ones(2, 6)), TypeError, "bool tensor, True = takes part"),
        (lambda: layer(True)(draw(2, 6, 4), [True]), TypeError, "got list"),
        (lambda: layer(True)(draw(2, 6, 4), some(2, 5)), ValueError, r"\(2, 6\).*got \(2, 5\)"),
        (lambda: capsule_routing(torch.randn(3, 4)), ValueError, r"got \(3, 4\)"),
        (lambda: capsule_routing(torch.randn(3, 0, 4)), ValueError, "at least 1 capsule"),
        (lambda: capsule_routing(torch.randn(3, 2, 4), 0), ValueError, "routings must be at least 1"),
        (lambda: capsule_routing(torch.randn(3, 2, 4), True), TypeError, "routings must be an integer"),
        (lambda: capsule_routing(torch.randn(3, 2, 4), temperature=torch.nan), ValueError, "finite"),
        (lambda: squash(torch.ones(3), 0.0), ValueError, "kappa must be greater than 0"),
        (lambda: squash(torch.ones(3).long()), TypeError, "floating"),
        (lambda: squash(torch.ones(3), dim=1), IndexError, "axis of v"),
        (lambda: squash(torch.ones(3), dim=0.5), TypeError, "dim must be an integer"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_state_dict_round_trip_is_strict():
    first, second = layer(False), Capsule(4, 3, 5, share_weights=False, num_inputs=6).double()
    second.load_state_dict(first.state_dict(), strict=True)
    u = draw(2, 6, 4)
    assert torch.equal(first(u), second(u))
    with pytest.raises(RuntimeError, match="size mismatch"):
        Capsule(4, 3, 5).load_state_dict(first.state_dict())
