import pytest
import torch
import transformers

from attention.residual_models import CASES, SIZES, batch, bert, forward, llama, realformer_bert
from kexue.attention import use_residual_attention


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


@pytest.mark.parametrize("name", ["Albert", "DistilBert"])
def test_models_without_numbers_of_their_layers_are_refused(name):
    sizes = SIZES if name == "Albert" else {"dim": 16, "n_heads": 4, "n_layers": 3, "hidden_dim": 24, "vocab_size": 30}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}Model")(config).eval()
    ids, mask = batch()
    with use_residual_attention(model), pytest.raises(ValueError, match="this model: its layers are not numbered"):
        model(input_ids=ids, attention_mask=mask)


def test_caches_of_windowed_layers_beside_others_are_refused_with_the_reason():
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        **SIZES, num_key_value_heads=2, use_sliding_window=True, sliding_window=4, max_window_layers=1
    )
    assert set(config.layer_types) == {"full_attention", "sliding_attention"}
    model = transformers.Qwen2ForCausalLM(config).eval()
    ids, mask = batch(padded=0)
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 1}
    with use_residual_attention(model):
        with pytest.raises(ValueError, match=r"layer 1 .* got 4, .* before 8\. .*sliding window.*use_cache=False"):
            model.generate(ids, **options)
        assert model.generate(ids, **options, use_cache=False).shape == (2, 10)


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
