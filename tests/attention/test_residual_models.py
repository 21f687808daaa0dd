import threading

import pytest
import torch

transformers = pytest.importorskip("transformers")

from kexue.attention import register_attention, use_residual_attention  # noqa: E402


class Broken(RuntimeError):
    """Raised on purpose."""


SIZES = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 24,
    "vocab_size": 30,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}


def bert(seed=0, **options):
    torch.manual_seed(seed)
    return transformers.BertModel(transformers.BertConfig(**SIZES | options)).double().eval()


def roberta(seed=0):
    torch.manual_seed(seed)
    return transformers.RobertaModel(transformers.RobertaConfig(**SIZES, pad_token_id=1)).double().eval()


def llama(seed=0, **options):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**SIZES | {"num_key_value_heads": 2} | options)
    return transformers.LlamaForCausalLM(config).double().eval()


def batch(seed=0, length=7, padded=2, left=False):
    """Token numbers and a mask; the second sequence has padding."""
    ids = torch.randint(3, 30, (2, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(2, length, dtype=torch.long)
    if padded:
        mask[1, slice(0, padded) if left else slice(length - padded, length)] = 0
        ids[mask == 0] = 1
    return ids, mask


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(scores, v, keep):
    """The RealFormer formula on scores (B, H, T, S)."""
    weights = torch.softmax(scores.masked_fill(~keep, -1e30), -1) * keep.any(-1, keepdim=True)
    return (weights @ v).transpose(1, 2).flatten(2)


def realformer_bert(model, ids, mask, context=None, context_mask=None):
    """A BERT encoder (or decoder without cache) layer by layer, with the model's weights."""
    x, keep = model.embeddings(ids), mask[:, None, None].bool()
    if context is not None:
        keep = keep & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    sums = {"self": 0, "cross": 0}

    def block(layer, name, x, source, keep):
        part = layer.self
        q, k, v = split(part.query(x), 4), split(part.key(source), 4), split(part.value(source), 4)
        sums[name] = sums[name] + q @ k.mT / 2  # head width 4
        return layer.output.LayerNorm(layer.output.dense(attend(sums[name], v, keep)) + x)

    for layer in model.encoder.layer:
        x = block(layer.attention, "self", x, x, keep)
        if context is not None:
            x = block(layer.crossattention, "cross", x, context, context_mask[:, None, None].bool())
        x = layer.output.LayerNorm(layer.output.dense(layer.intermediate(x)) + x)
    return x


def rotate(x, cos, sin):
    """Rotary positions, halves layout."""
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]


def realformer_llama(model, ids, mask):
    """A Llama decoder layer by layer, with the model's weights: logits."""
    body = model.model
    x, length = body.embed_tokens(ids), ids.shape[1]
    table = body.rotary_emb(x, torch.arange(length)[None])  # the model's own: float32 also in a float64 model
    keep = mask[:, None, None].bool() & torch.ones(length, length, dtype=torch.bool).tril()
    total = 0
    for layer in body.layers:
        part, h = layer.self_attn, layer.input_layernorm(x)
        q = rotate(split(part.q_proj(h), 4), *table)
        k, v = rotate(split(part.k_proj(h), 2), *table), split(part.v_proj(h), 2)
        k, v = k[:, [0, 0, 1, 1]], v[:, [0, 0, 1, 1]]
        total = total + q @ k.mT / 2
        x = x + part.o_proj(attend(total, v, keep))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(body.norm(x))


def forward(model, ids, mask):
    out = model(input_ids=ids, attention_mask=mask)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


CASES = {
    "bert": (bert, realformer_bert, False),
    "roberta": (roberta, realformer_bert, False),
    "llama": (llama, realformer_llama, True),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("padded", [0, 2])
def test_models_equal_a_handwritten_forward_with_their_weights(name, padded):
    build, handwritten, left = CASES[name]
    model = build()
    ids, mask = batch(padded=padded, left=left)
    expected = handwritten(model, ids, mask)
    plain = forward(model, ids, mask)
    with use_residual_attention(model) as inside:
        assert inside is model
        out = forward(model, ids, mask)
        with torch.no_grad():
            torch.testing.assert_close(forward(model, ids, mask), out)
        model.train()  # no dropout in the rates that follow, so training computes the same
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        torch.testing.assert_close(forward(model, ids, mask), out)
    real = mask.bool()
    torch.testing.assert_close(out[real], expected[real])
    assert not torch.allclose(plain[real], out[real])
    leaves = list(model.parameters())
    weights = torch.randn(out[real].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = torch.autograd.grad((out[real] * weights).sum(), leaves, allow_unused=True)
    want = torch.autograd.grad((expected[real] * weights).sum(), leaves, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_self_and_cross_attention_have_sums_of_their_own():
    model = bert(is_decoder=True, add_cross_attention=True)
    ids, mask = batch()
    context, context_mask = torch.randn(2, 5, 16, dtype=torch.float64), torch.ones(2, 5, dtype=torch.long)
    context_mask[0, 3:] = 0
    with use_residual_attention(model):
        for _ in range(2):
            out = model(
                input_ids=ids, attention_mask=mask, encoder_hidden_states=context,
                encoder_attention_mask=context_mask, use_cache=False,
            ).last_hidden_state  # fmt: skip
            expected = realformer_bert(model, ids, mask, context, context_mask)
            torch.testing.assert_close(out[mask.bool()], expected[mask.bool()])


def test_one_class_for_self_and_cross_attention_is_told_apart():
    torch.manual_seed(0)
    config = transformers.BartConfig(
        d_model=16, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=30, max_position_embeddings=40, init_std=0.3,
    )  # fmt: skip
    model = transformers.BartModel(config).double().eval()
    ids, mask = batch()
    with use_residual_attention(model):
        outs = [model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids, use_cache=c) for c in (False, True)]
        whole = outs[0].last_hidden_state
        torch.testing.assert_close(outs[1].last_hidden_state, whole)
        # a decoder that goes token by token, with cached keys in both kinds of attention
        encoded, cache = model.encoder(ids, attention_mask=mask), None
        for t in range(ids.shape[1]):
            step = model(
                encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=ids[:, t : t + 1],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            cache = step.past_key_values
            torch.testing.assert_close(step.last_hidden_state[:, 0], whole[:, t])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_decoding_equals_the_whole_forward(cache):
    model = llama()
    ids, mask = batch(left=True)
    with use_residual_attention(model):
        options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 1}
        more = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
        cached = model.generate(ids, **options, **more, output_logits=True, return_dict_in_generate=True)
        plain = model.generate(ids, **options, use_cache=False, output_logits=True, return_dict_in_generate=True)
        assert torch.equal(cached.sequences, plain.sequences)
        torch.testing.assert_close(cached.logits, plain.logits)
    beams = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "attention_mask": mask}
    with use_residual_attention(model):
        assert torch.equal(model.generate(ids, **beams), model.generate(ids, **beams, use_cache=False))


def test_the_prompt_may_be_read_in_pieces():
    model = llama()
    ids, mask = batch(padded=0)
    with use_residual_attention(model):
        whole, cache, pieces = forward(model, ids, mask), None, []
        for start, stop in ((0, 3), (3, 6), (6, 7)):
            out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
            pieces.append(out.logits)
            cache = out.past_key_values
    torch.testing.assert_close(torch.cat(pieces, 1), whole)


def test_padding_does_not_change_the_rest():
    for build, left in ((bert, False), (llama, True)):
        model = build()
        ids, _ = batch(padded=0)
        with use_residual_attention(model):
            alone = forward(model, ids, torch.ones_like(ids))
            pad, zeros = torch.ones(2, 4, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long)
            parts = ((pad, ids), (zeros, torch.ones_like(ids))) if left else ((ids, pad), (torch.ones_like(ids), zeros))
            out = forward(model, *(torch.cat(x, 1) for x in parts))
        if left:
            # rotary positions are relative, up to their float32 tables
            torch.testing.assert_close(out[:, 4:], alone, rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(out[:, :7], alone)


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


def test_dropout_of_the_probabilities_is_honoured():
    model = bert(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0).train()
    ids, mask = batch()
    with use_residual_attention(model):
        outs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            outs.append(forward(model, ids, mask))
        assert torch.equal(outs[0], outs[1])
        assert not torch.allclose(outs[0], outs[2])
        model.eval()
        torch.testing.assert_close(forward(model, ids, mask), realformer_bert(model, ids, mask))


def test_bfloat16_sums_in_float32():
    model = llama()
    ids, mask = batch(left=True)
    low = llama().to(torch.bfloat16)
    with torch.no_grad():
        model.load_state_dict({k: v.double() for k, v in low.state_dict().items()})
    with use_residual_attention(model), use_residual_attention(low):
        exact, out = forward(model, ids, mask)[mask.bool()], forward(low, ids, mask)[mask.bool()]
    assert out.dtype == torch.bfloat16
    assert float(((out.double() - exact).norm() / exact.norm()).detach()) < 2e-2


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
    import gc

    gc.collect()
    assert len(_hf_residual._local.streams) < count


def test_options_that_change_the_scores_are_refused():
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4, vocab_size=30)
    model = transformers.T5EncoderModel(config).eval()
    ids, mask = batch()
    with use_residual_attention(model), pytest.raises(ValueError, match="position_bias of T5Attention"):
        model(input_ids=ids, attention_mask=mask)
    model = bert()
    with use_residual_attention(model), pytest.raises(TypeError, match="bool attention mask.*float64"):
        model(input_ids=ids, attention_mask=torch.zeros(2, 1, 7, 7, dtype=torch.float64))


def test_only_transformers_models_are_accepted():
    with pytest.raises(TypeError, match="PreTrainedModel; got Linear"), use_residual_attention(torch.nn.Linear(2, 2)):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_models_compile_as_one_graph_and_give_the_same(name):
    from kexue.attention import _hf_residual

    torch.compiler.reset()
    build, _, left = CASES[name]
    model = build()
    ids, mask = batch(left=left)
    with use_residual_attention(model):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        results = []
        for one in (model, compiled):
            out = forward(one, ids, mask)
            model.zero_grad()
            out[mask.bool()].square().sum().backward()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
            results.append([out[mask.bool()], *grads])
        torch.testing.assert_close(*results)
    assert not _hf_residual._traced


def test_windowed_and_full_layers_may_alternate():
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=4, sliding_window=3, attn_logit_softcapping=None,
        query_pre_attn_scalar=4,
    )  # fmt: skip
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    model = transformers.Gemma2Model(config).double().eval()
    ids, mask = batch(padded=0)
    seen = []

    def record(module, query, key, value, attention_mask, **kwargs):
        """An attention function that keeps every sum of scores."""
        key, value = (x.repeat_interleave(2, 1) for x in (key, value))
        own = query @ key.mT * kwargs["scaling"]
        seen.append(own if module.layer_idx == 0 else seen[-1] + own)
        keep = torch.ones(7, 7, dtype=torch.bool).tril()
        if config.layer_types[module.layer_idx] == "sliding_attention":
            keep = keep.triu(-2)
        return (seen[-1].masked_fill(~keep, -1e30).softmax(-1) @ value).transpose(1, 2), None

    transformers.AttentionInterface.register("kexue_test_record", record)
    transformers.AttentionMaskInterface.register("kexue_test_record", lambda *args, **kwargs: None)
    model.set_attn_implementation("kexue_test_record")
    expected = forward(model, ids, mask)
    with use_residual_attention(model):
        torch.testing.assert_close(forward(model, ids, mask), expected)
