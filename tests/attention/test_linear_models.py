"""Linear attention inside transformers models."""

import copy

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
)

from kexue.attention import LinearAttentionState, linear_attention, register_attention

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 70,
}
NAME = "kexue_linear"


@pytest.fixture(scope="module", autouse=True)
def names():
    return register_attention()


def llama(name=NAME, seed=0, **options):
    torch.manual_seed(seed)
    config = LlamaConfig(**SMALL, num_key_value_heads=2, attn_implementation=name, pad_token_id=0, **options)
    return LlamaForCausalLM(config).eval()


def bert(seed=0):
    torch.manual_seed(seed)
    model = BertModel(BertConfig(**SMALL)).eval()
    model.set_attn_implementation(NAME)
    return model


def tokens(rows, length, seed=0):
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def bert_by_hand(model, ids, mask=None):
    """The encoder written out, with linear_attention called on its own projections."""
    x = model.embeddings(ids)
    for layer in model.encoder.layer:
        attention = layer.attention.self
        q, k, v = (
            f(x).view(*x.shape[:2], 4, 8).transpose(1, 2) for f in (attention.query, attention.key, attention.value)
        )
        o = linear_attention(q, k, v, key_padding_mask=mask).transpose(1, 2).flatten(2)
        x = layer.output(layer.intermediate(layer.attention.output(o, x)), layer.attention.output(o, x))
    return x


def test_names_are_registered(names):
    assert NAME in names


def test_bert_computes_linear_attention():
    model, ids = bert(), tokens(3, 20)
    torch.testing.assert_close(model(ids).last_hidden_state, bert_by_hand(model, ids))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    out = model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(out, bert_by_hand(model, ids, mask.bool()))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
def test_padding_changes_nothing(kind, side):
    if kind == "bert":
        model = bert()
    elif kind == "roberta":
        torch.manual_seed(0)
        model = RobertaModel(RobertaConfig(**SMALL, pad_token_id=1)).eval()
        model.set_attn_implementation(NAME)
    else:
        model = llama().model
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    live = slice(0, 12) if side == "right" else slice(8, 20)
    mask[1] = 0
    mask[1, live] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0) + (2 if kind == "roberta" else 0)
    padded = model(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    alone = model(ids[1:, live], position_ids=positions[1:, live]).last_hidden_state
    torch.testing.assert_close(padded[1, live], alone[0], rtol=1e-5, atol=1e-5)
    other = ids.clone()
    other[1, mask[1] == 0] = 7
    again = model(other, attention_mask=mask, position_ids=positions).last_hidden_state
    assert torch.equal(padded[1, live], again[1, live])


def test_llama_is_causal_and_a_cache_of_keys_gives_the_same():
    model, ids = llama(), tokens(2, 24)
    whole = model(ids).logits
    torch.testing.assert_close(model(ids[:, :17]).logits, whole[:, :17], rtol=1e-5, atol=1e-5)
    cache = DynamicCache(config=model.config)
    parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 9), (9, 10), (10, 24))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("feature_map", ["elu1", "exp", "cosine1"])
def test_state_decodes_as_the_whole_sequence_does(feature_map):
    model, ids = llama(linear_feature_map=feature_map), tokens(2, 40)
    whole = model(ids).logits
    cache = LinearAttentionState.for_model(model)
    parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 20), (20, 21), (21, 22), (22, 40))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def floats(cache):
    return sum(layer.state.s.numel() + layer.state.z.numel() for layer in cache.layers)


def test_generation_with_a_state_of_constant_size_equals_recomputation():
    model, ids = llama(), tokens(1, 7)
    expected = ids
    for _ in range(12):
        expected = torch.cat([expected, model(expected).logits[:, -1].argmax(-1, keepdim=True)], 1)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), expected)
    cache = LinearAttentionState.for_model(model)
    model(ids, past_key_values=cache)
    size = floats(cache)
    assert size == 2 * 2 * (8 * 8 + 8)  # layers x key heads x (S and z)
    cache.reset()
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)
    assert floats(cache) == size
    assert cache.get_seq_length() == 18  # the last token is not fed back


def test_left_padded_batches_generate_what_single_rows_do():
    model, ids = llama(), tokens(2, 9)
    ids[1, :4] = 0
    mask = (ids != 0).long()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    batch = model.generate(ids, attention_mask=mask, past_key_values=LinearAttentionState.for_model(model), **options)
    for row, start in ((0, 0), (1, 4)):
        alone = model.generate(
            ids[row : row + 1, start:], past_key_values=LinearAttentionState.for_model(model), **options
        )
        assert torch.equal(batch[row, start:], alone[0])


def test_beam_search_with_a_state_equals_beam_search_with_keys():
    model, ids = llama(), tokens(2, 6)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    with_keys = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, past_key_values=LinearAttentionState.for_model(model), **options), with_keys)


def test_a_state_repeats_selects_and_never_crops():
    model = llama()
    cache = LinearAttentionState.for_model(model)
    model(tokens(2, 5), past_key_values=cache)
    before = cache.layers[0].state.s
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[0].state.s, before[[0, 0, 1, 1]])
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert torch.equal(cache.layers[0].state.s, before[[1, 0]])
    with pytest.raises(ValueError, match="cannot forget its last tokens"):
        cache.layers[0].crop(1)


def test_a_state_with_other_attention_is_refused():
    with pytest.raises(ValueError, match=r"set_attn_implementation.*'sdpa'"):
        LinearAttentionState.for_model(llama("sdpa"))
    with pytest.raises(TypeError, match="Linear"):
        LinearAttentionState.for_model(torch.nn.Linear(2, 2))
    model = llama()
    cache = LinearAttentionState.for_model(model)
    model.set_attn_implementation("sdpa")
    model(tokens(1, 4), past_key_values=cache)
    with pytest.raises(RuntimeError, match="was not used"):
        model(tokens(1, 1), past_key_values=cache)


def test_gradients_reach_every_weight():
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SMALL, attention_probs_dropout_prob=0.0, attn_implementation=NAME)).train()
    ids = tokens(2, 12)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.bert.encoder.parameters() if p.dim() > 1)


def test_dropout_of_weights_is_refused():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL, attn_implementation=NAME)).train()
    with pytest.raises(ValueError, match=r"dropout.*0\.1"):
        model(tokens(1, 4))


def test_masks_that_differ_from_row_to_row_are_refused():
    model = llama()
    with pytest.raises(ValueError, match="padding mask"):
        model(tokens(1, 4), attention_mask=torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="padding mask"):
        model(tokens(1, 4), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))


def test_packed_sequences_windows_and_position_biases_are_refused():
    with pytest.raises(ValueError, match="packed"):
        llama()(tokens(1, 6), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)
    torch.manual_seed(0)
    config = MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4, attn_implementation=NAME)
    with pytest.raises(ValueError, match="sliding"):
        MistralForCausalLM(config)(tokens(1, 8))
    t5 = T5Model(T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)).eval()
    t5.set_attn_implementation(NAME)
    if t5.config._attn_implementation == NAME:  # versions whose T5 has no exchangeable attention keep their own
        with pytest.raises(ValueError, match="cannot honour"):
            t5(tokens(1, 5), decoder_input_ids=tokens(1, 3))


@pytest.mark.parametrize("name", ["kexue_linear", "kexue_performer", "kexue_entropy", "kexue_realformer"])
def test_models_with_attention_code_of_their_own_are_refused(name, tmp_path):
    config = BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=60)
    model = BloomForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"BloomForCausalLM cannot be exchanged.*{name}"):
        BloomForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    assert BloomForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "eager"


def test_preallocated_caches_are_refused():
    with pytest.raises(ValueError, match="preallocated"):
        llama().generate(
            tokens(1, 4), max_new_tokens=3, do_sample=False, eos_token_id=None, cache_implementation="static"
        )


def test_models_save_load_and_copy(tmp_path):
    model, ids = llama(), tokens(1, 9)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)


@pytest.mark.slow
def test_a_whole_model_compiles_as_one_graph():
    model, ids = bert(), tokens(2, 12)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).last_hidden_state, model(ids).last_hidden_state)


# Performer: the same paths with random features


def test_performer_estimates_softmax_with_the_scale_of_the_model():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL, initializer_range=0.1)).eval()
    ids = tokens(2, 16)
    exact = model(ids).last_hidden_state
    model.config.performer_features, model.config.performer_variant = 4096, "cosh"
    model.set_attn_implementation("kexue_performer")
    near = model(ids).last_hidden_state
    model.set_attn_implementation(NAME)
    far = model(ids).last_hidden_state
    assert (near - exact).norm() < 0.05 * exact.norm()
    assert (near - exact).norm() < 0.3 * (far - exact).norm()


def test_performer_decodes_with_a_state_and_repeats_itself_after_loading(tmp_path):
    model, ids = llama("kexue_performer"), tokens(2, 40)
    whole = model(ids).logits
    cache = LinearAttentionState.for_model(model)
    parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 20), (20, 21), (21, 40))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    assert not any("projection" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="kexue_performer").eval()
    assert torch.equal(loaded(ids).logits, whole)
    assert torch.equal(copy.deepcopy(model)(ids).logits, whole)
    model.config.performer_seed = 1
    assert not torch.equal(model(ids).logits, whole)


def test_performer_layers_have_directions_of_their_own():
    model = llama("kexue_performer")
    model(tokens(1, 5))
    first, second = (layer.self_attn.__dict__["_kexue_favor"][1].projection for layer in model.model.layers)
    assert not torch.equal(first, second)


def test_performer_ignores_padding_and_trains():
    model, ids = llama("kexue_performer").train(), tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :8] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(ids, attention_mask=mask, position_ids=positions).logits
    alone = model(ids[1:, 8:]).logits
    torch.testing.assert_close(padded[1, 8:], alone[0], rtol=1e-4, atol=1e-4)
    padded[1, 8:].square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
