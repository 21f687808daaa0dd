"""Steps of a network: how scores are kept, recovered, shared and let go."""

import gc

import pytest
import torch

from attention.residual_forms import FORMS, LAYERS, gradients, layers, normal, padding, steps
from kexue.attention import ResidualScores, _score_ops, residual_attention, residual_attention_step
from reference import realformer as reference


def test_step_returns_the_sum_of_scores_without_the_mask():
    qs, ks, vs = layers()
    _, sums = reference.realformer(qs, ks, vs)
    scores = None
    for n in range(LAYERS):
        _, scores = residual_attention_step(qs[n], ks[n], vs[n], scores, key_padding_mask=padding(), causal=True)
        torch.testing.assert_close(scores, sums[n])


def test_numbers_in_padded_keys_stay_in_the_scores_that_are_handed_on_and_nan_becomes_zero():
    qs, ks, vs = layers()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[:, 3:] = False
    plain = qs[0] @ ks[0].mT / 2
    with torch.no_grad():
        ks[0][:, :, 4] = torch.nan
    _, scores = residual_attention_step(qs[0], ks[0], vs[0], key_padding_mask=mask)
    torch.testing.assert_close(scores[..., :4], plain[..., :4])
    assert (scores[..., 4] == 0).all()
    assert torch.isnan(ks[0][:, :, 4]).all()  # the caller's tensor is left alone


def test_scores_may_be_used_in_the_loss_and_start_from_a_tensor_with_gradient():
    qs, ks, vs = layers()
    start = normal(2, 2, 5, 5, seed=9).requires_grad_()

    def run(step):
        scores, outs = start * 2, []
        for n in range(LAYERS):
            out, scores = step(qs[n], ks[n], vs[n], scores)
            outs += [out, scores.tanh()] if n else [out]
            scores = scores * 1.5 if n == 1 else scores  # between two steps
        return outs

    def plain(q, k, v, scores):
        scores = scores + q @ k.mT / 2
        return scores.softmax(-1) @ v, scores

    leaves = [*qs, *ks, *vs, start]
    outs, expected = run(residual_attention_step), run(plain)
    torch.testing.assert_close(outs, expected)
    torch.testing.assert_close(gradients(outs, leaves), gradients(expected, leaves))


@pytest.mark.parametrize("form", ["steps", "running"])
def test_layers_may_be_differentiated_in_any_order_and_again(form):
    qs, ks, vs = layers(count=5)
    leaves = [*qs, *ks, *vs]
    expected, _ = reference.realformer(qs, ks, vs)
    outs = FORMS[form](qs, ks, vs)
    for chosen in ([2], [0, 4], [4], [1], [0, 1, 2, 3, 4], [3], [4]):
        some, want = [outs[n] for n in chosen], [expected[n] for n in chosen]
        torch.testing.assert_close(gradients(some, leaves), gradients(want, leaves))


@pytest.mark.parametrize("form", ["steps", "running"])
@pytest.mark.parametrize("frozen", [[0, 1], [2], [1, 3]])
def test_layers_without_gradient_take_part_as_constants(form, frozen):
    qs, ks, vs = layers(count=5)

    def run(step):
        outs, scores = [], None
        for n in range(5):
            with torch.set_grad_enabled(n not in frozen):
                out, scores = step(qs[n], ks[n], vs[n], scores)
            outs.append(out)
        return [outs[n] for n in range(5) if n not in frozen]

    def plain(q, k, v, scores):
        scores = q @ k.mT / 2 + (0 if scores is None else scores)
        return scores.softmax(-1) @ v, scores

    store = ResidualScores()
    step = residual_attention_step if form == "steps" else lambda q, k, v, _: (store.step(q, k, v), None)
    leaves = [*qs, *ks, *vs]
    torch.testing.assert_close(gradients(run(step), leaves), gradients(run(plain), leaves))


def test_two_steps_may_continue_the_same_scores():
    qs, ks, vs = layers(count=3)

    def run(step):
        _, scores = step(qs[0], ks[0], vs[0], None)
        a, left = step(qs[1], ks[1], vs[1], scores)
        b, right = step(qs[2], ks[2], vs[2], scores)
        return [a, b, step(qs[2], ks[1], vs[0], left)[0], step(qs[1], ks[2], vs[0], right)[0]]

    def plain(q, k, v, scores):
        scores = q @ k.mT / 2 + (0 if scores is None else scores)
        return scores.softmax(-1) @ v, scores

    leaves = [*qs, *ks, *vs]
    torch.testing.assert_close(gradients(run(residual_attention_step), leaves), gradients(run(plain), leaves))


@pytest.mark.parametrize("form", ["steps", "running"])
def test_scores_that_dwarf_the_earlier_ones_do_not_spoil_the_earlier_gradients(form):
    qs, ks, vs = layers(1, 1, 6, 6, dtype=torch.float32)
    with torch.no_grad():
        qs[2] *= 1e9  # subtracting this layer's scores again would leave nothing of the first two
    exact = [[x.detach().double().requires_grad_() for x in xs] for xs in (qs, ks, vs)]
    outs, expected = FORMS[form](qs, ks, vs), reference.realformer(*exact)[0]
    got = gradients([*outs[:2], outs[2] * 0], [*qs[:2], *ks[:2], *vs])
    want = gradients([*expected[:2], expected[2] * 0], [*exact[0][:2], *exact[1][:2], *exact[2]])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def big_tensors(elements):
    gc.collect()
    return {
        x.untyped_storage().data_ptr() for x in gc.get_objects() if type(x) is torch.Tensor and x.numel() >= elements
    }


@pytest.mark.parametrize(("form", "matrices"), [("stack", 0), ("concat", 0), ("running", 1)])
def test_no_matrix_of_scores_is_kept_per_layer(form, matrices, monkeypatch):
    count, size = 6, 48
    qs, ks, vs = layers(1, 2, size, size, 2, 2, count=count, dtype=torch.float32)
    made = []
    original = _score_ops.new_scores

    def counted(q, k):
        made.append(q.shape)
        return original(q, k)

    monkeypatch.setattr("kexue.attention.residual.new_scores", counted)
    before = big_tensors(2 * size * size)
    outs = FORMS[form](qs, ks, vs)
    assert len(big_tensors(2 * size * size) - before) <= matrices
    assert len(made) == matrices
    total = sum(x.sum() for x in outs)
    total.backward()
    assert not big_tensors(2 * size * size) - before  # although the loss is still there
    assert torch.isfinite(total)


def test_steps_let_go_of_the_scores_of_earlier_layers():
    size = 48
    qs, ks, vs = layers(1, 2, size, size, 2, 2, count=6, dtype=torch.float32)
    before = big_tensors(2 * size * size)
    outs = steps(qs, ks, vs)
    kept = [out.grad_fn.scores is not None for out in outs]
    assert kept == [False] * 5 + [True]
    assert len(big_tensors(2 * size * size) - before) <= 1


def test_modified_scores_are_noticed():
    q, k, v = (x[0] for x in layers())
    out, scores = residual_attention_step(q, k, v)
    scores.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        out.sum().backward()


@pytest.mark.parametrize("form", ["steps", "running"])
def test_dropout_drops_the_same_in_both_passes(form, tiling):
    qs, ks, vs = layers(1, 2, 6, 6)

    def function(*x):
        torch.manual_seed(5)
        outs, scores, store = [], None, ResidualScores(dropout=0.4)
        for q, k, v in zip(x[:LAYERS], x[LAYERS : 2 * LAYERS], x[2 * LAYERS :], strict=True):
            if form == "running":
                outs.append(store.step(q, k, v))
            else:
                out, scores = residual_attention_step(q, k, v, scores, dropout=0.4)
                outs.append(out)
        return tuple(outs)

    assert torch.autograd.gradcheck(function, (*qs, *ks, *vs), fast_mode=True)
    assert not torch.allclose(function(*qs, *ks, *vs)[0], steps(qs, ks, vs)[0])


def test_dropout_drops_its_share_and_keeps_the_mean():
    q, k = torch.zeros(1, 4, 100, 2), torch.zeros(1, 4, 100, 2)
    v = torch.eye(100).expand(1, 4, 100, 100)
    torch.manual_seed(0)
    out, _ = residual_attention_step(q, k, v, dropout=0.25)
    other, _ = residual_attention_step(q, k, v, dropout=0.25)
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 0.01 / 0.75]))
    assert float((out == 0).float().mean()) == pytest.approx(0.25, abs=0.01)  # 40 000 draws
    assert float((out == other).float().mean()) == pytest.approx(0.625, abs=0.01)


def test_a_store_can_be_reset_and_rejects_other_layers():
    qs, ks, vs = layers()
    store = ResidualScores()
    for _ in range(2):
        first = store.step(qs[0], ks[0], vs[0])
        torch.testing.assert_close(first, residual_attention(qs[:1], ks[:1], vs[0]))
        assert len(store) == 1
        store.reset()
        assert len(store) == 0
    store.step(qs[0], ks[0], vs[0])
    with pytest.raises(ValueError, match=r"\(2, 2, 5, 4\).*layer 2 \(2, 1, 5, 4\)"):
        store.step(qs[0][:, :1], ks[0][:, :1], vs[0][:, :1])
    with pytest.raises(ValueError, match=r"layer 2 \(2, 2, 5, 4\) and \(2, 2, 4, 4\)"):
        store.step(qs[0], ks[0][:, :, :4], vs[0][:, :, :4])
    torch.testing.assert_close(store.step(qs[1], ks[1], vs[1]), residual_attention(qs[:2], ks[:2], vs[1]))


def test_a_store_that_failed_half_way_says_so(monkeypatch):
    qs, ks, vs = layers()
    store = ResidualScores()
    first = store.step(qs[0], ks[0], vs[0])

    def fail(*args):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(_score_ops, "step_forward", fail)
        with pytest.raises(MemoryError):
            store.step(qs[1], ks[1], vs[1])
    with pytest.raises(RuntimeError, match="half-way"):
        store.step(qs[1], ks[1], vs[1])
    expected = residual_attention(qs[:1], ks[:1], vs[0])
    torch.testing.assert_close(gradients([first], [qs[0], ks[0]]), gradients([expected], [qs[0], ks[0]]))
    store.reset()
    torch.testing.assert_close(store.step(qs[0], ks[0], vs[0]), expected)


@pytest.mark.parametrize("shape", [(2, 2, 5, 5), (2, 1, 5, 5), (2, 2, 1, 5), (2, 1, 1, 5)])
def test_masks_of_heads_and_rows_apply_to_their_layer_only(shape, tiling):
    qs, ks, vs = layers(2, 2, 5, 5)
    masks = [torch.rand(shape, generator=torch.Generator().manual_seed(n)) < 0.6 for n in range(LAYERS)]
    masks[1][0, 0, 0] = False  # a row without any key in the second layer
    causal = (False, True, False)
    store, outs, expected, total = ResidualScores(), [], [], 0
    for n in range(LAYERS):
        outs.append(store.attend(qs[n], ks[n], vs[n], masks[n], causal[n], 0.5, 0.0, whole=True))
        total = total + qs[n] @ ks[n].mT / 2
        keep = masks[n].expand(2, 2, 5, 5)
        keep = keep.tril() if causal[n] else keep
        expected.append(total.masked_fill(~keep, -1e30).softmax(-1) * keep.any(-1, keepdim=True) @ vs[n])
    torch.testing.assert_close(outs, expected)
    assert not outs[1][0, 0, 0].any()
    leaves = [*qs, *ks, *vs]
    torch.testing.assert_close(gradients(outs, leaves), gradients(expected, leaves))


def test_a_layer_cannot_look_at_keys_that_were_not_summed():
    qs, ks, vs = layers()
    store = ResidualScores()
    store.attend(qs[0], ks[0], vs[0], None, True, 0.5, 0.0, whole=False)
    with pytest.raises(ValueError, match="layer 1 was causal"):
        store.attend(qs[1], ks[1], vs[1], None, False, 0.5, 0.0, whole=False)
