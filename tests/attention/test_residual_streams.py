"""Which running sum a layer of a transformers model belongs to, and what is refused."""

import gc
import threading

import pytest
import torch
import transformers

from attention.residual_models import batch, bert, forward
from kexue.attention import register_attention, use_residual_attention


class Broken(RuntimeError):
    """Raised on purpose."""


def test_the_implementation_is_restored_also_after_an_exception():
    model = bert(attn_implementation="eager")
    ids, mask = batch()
    before = forward(model, ids, mask)

    def leave():
        with use_residual_attention(model):
            assert model.config._attn_implementation == "kexue_realformer"
            raise Broken

    with pytest.raises(Broken):
        leave()
    assert model.config._attn_implementation == "eager"
    assert torch.equal(forward(model, ids, mask), before)


def test_a_forward_cut_short_leaves_no_trace():
    model = bert()
    ids, mask = batch()

    def fail(*args):
        raise Broken

    with use_residual_attention(model):
        expected = forward(model, ids, mask)
        for layer in model.encoder.layer:
            for first in (True, False):  # before and after the attention of this layer
                target = layer.attention if first else layer.intermediate
                handle = target.register_forward_pre_hook(fail)
                with pytest.raises(Broken):
                    forward(model, ids, mask)
                handle.remove()
                assert torch.equal(forward(model, ids, mask), expected)


@pytest.mark.parametrize("shared", [False, True])
def test_models_whose_layers_take_turns_do_not_mix(shared):
    first, second = bert(0), bert(1)
    if shared:  # models built from one configuration object
        second = transformers.BertModel(first.config).double().eval()
    ids, mask = batch()
    register_attention()
    for model in (first, second):
        model.set_attn_implementation("kexue_realformer")
    alone = [forward(model, ids, mask) for model in (first, second)]
    again = []
    handle = first.encoder.layer[1].register_forward_pre_hook(lambda *_: again.append(forward(second, ids, mask)))
    out = forward(first, ids, mask)  # a whole forward of the second between two layers of the first
    handle.remove()
    assert torch.equal(out, alone[0])
    assert torch.equal(again[0], alone[1])
    grads = [torch.autograd.grad(x.square().sum(), first.embeddings.word_embeddings.weight) for x in (out, alone[0])]
    torch.testing.assert_close(*grads)


def test_models_of_one_configuration_that_take_turns_unseen_are_refused():
    first = bert(0)
    second = transformers.BertModel(first.config).double().eval()
    ids, mask = batch()
    register_attention()
    first.set_attn_implementation("kexue_realformer")
    handle = first.encoder.layer[1].register_forward_pre_hook(
        lambda *_: second.encoder.layer[0](second.embeddings(ids))
    )
    with pytest.raises(RuntimeError, match="share one configuration"):
        forward(first, ids, mask)
    handle.remove()


def test_threads_do_not_mix():
    model, other = bert(0), bert(1)
    ids, mask = batch()
    register_attention()
    for one in (model, other):
        one.set_attn_implementation("kexue_realformer")
    expected = [forward(one, ids, mask).detach() for one in (model, other)]
    barrier = threading.Barrier(3)

    def wait(*_):
        barrier.wait(20)

    for one in (model, other):
        for layer in one.encoder.layer:  # all threads finish a layer before any starts the next
            layer.register_forward_pre_hook(wait)
    found = {}

    def work(number, one):
        with torch.no_grad():
            found[number] = forward(one, ids, mask)

    threads = [threading.Thread(target=work, args=(n, one)) for n, one in enumerate((model, model, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, want in ((0, expected[0]), (1, expected[0]), (2, expected[1])):
        assert torch.equal(found[number], want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_single_layers_is_refused(reentrant):
    model = bert().train()
    ids, mask = batch()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with pytest.raises(ValueError, match="gradient checkpointing"), use_residual_attention(model):
        pass
    model.set_attn_implementation("kexue_realformer")
    with pytest.raises(RuntimeError, match=r"layer \d .*checkpointing"):
        forward(model, ids, mask).sum().backward()
    model.gradient_checkpointing_disable()
    forward(model, ids, mask).sum().backward()  # and works once it is off


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_checkpointing_of_one_layer_is_refused(reentrant, chosen):
    from torch.utils.checkpoint import checkpoint

    model = bert()
    ids, mask = batch()
    layer = model.encoder.layer[chosen]
    inner = layer.forward
    layer.forward = lambda x, *args, **kw: checkpoint(lambda y: inner(y, *args, **kw), x, use_reentrant=reentrant)
    with use_residual_attention(model), pytest.raises(RuntimeError, match="checkpointing of single layers"):
        forward(model, ids, mask)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_the_whole_model_works(reentrant):
    from torch.utils.checkpoint import checkpoint

    model = bert()
    ids, mask = batch()
    x = model.embeddings(ids).detach().requires_grad_()
    keep = mask[:, None, None].bool().expand(2, 1, 7, 7)

    def run(x):
        return model.encoder(x, attention_mask=keep).last_hidden_state

    with use_residual_attention(model):
        plain = torch.autograd.grad(run(x).square().sum(), x)
        again = checkpoint(run, x, use_reentrant=reentrant)
        again.square().sum().backward()
    torch.testing.assert_close(x.grad, plain[0])


def test_layers_out_of_order_are_refused():
    model = bert()
    with use_residual_attention(model):
        with pytest.raises(RuntimeError, match="layer 1 was called, layer 0 of a new forward pass was expected"):
            model.encoder.layer[1](torch.randn(1, 3, 16, dtype=torch.float64))
        model.encoder.layer[0](torch.randn(1, 3, 16, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="layer 2 was called"):
            model.encoder.layer[2](torch.randn(1, 3, 16, dtype=torch.float64))


def test_no_scores_stay_behind():
    from kexue.attention import _hf_residual

    model = bert()
    ids, mask = batch()
    with use_residual_attention(model):
        loss = forward(model, ids, mask).sum()
        with torch.no_grad():
            forward(model, ids, mask)
        (stream,) = (_hf_residual._local.streams[m] for m in model.modules() if m in _hf_residual._local.streams)
        assert len(stream.scores) == 0
        assert stream.scores._matrix is None
        loss.backward()
    assert not any(m in _hf_residual._local.streams for m in model.modules())
    other = bert(3)
    other.set_attn_implementation("kexue_realformer")
    forward(other, ids, mask)
    count = len(_hf_residual._local.streams)
    del other

    gc.collect()
    assert len(_hf_residual._local.streams) < count
