import pytest
import torch
from torch.nn import functional as F

from kexue.models import KexueConfig, KexueForMaskedLM, KexueForTextAutoencoding, KexueModel
from models.one_pass_models import MASK, VARIANTS, VOCABULARY, build, stack_parameters, texts
from reference import one_pass_mlm as reference

MASKS = {
    "full": torch.ones(3, 7, dtype=torch.bool),
    "right": torch.arange(7)[None] < torch.tensor([[7], [4], [1]]),
    "left and holes": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0]]).bool(),
}


def expected_states(model, ids, mask, segments=None):
    plain = reference.OnePass(stack_parameters(model), model.config)
    rows = [None] * len(ids) if segments is None else segments.tolist()
    return torch.stack([plain.text(ids[b].tolist(), mask[b].tolist(), None, rows[b]) for b in range(len(ids))])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("padding", MASKS)
def test_states_loss_and_every_gradient_equal_the_reference(name, padding):
    model, ids, mask = build(**VARIANTS[name]), texts(), MASKS[padding]
    segments = texts(seed=2) % 2 if name == "segments" else None
    states = expected_states(model, ids, mask, segments)
    logits = model.lm_head(states)
    losses = F.cross_entropy(logits[mask], ids[mask], reduction="none")
    output = model(ids, mask, token_type_ids=segments, labels=ids, return_logits=True)
    torch.testing.assert_close(model.kexue(ids, mask, segments).last_hidden_state, states)
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.loss, losses.mean())
    assert output.num_items == mask.sum()
    parameters = list(model.parameters())
    got = torch.autograd.grad(output.loss, parameters)
    for parameter, a, b in zip(parameters, got, torch.autograd.grad(losses.mean(), parameters), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, p=parameter: f"{tuple(p.shape)}: {text}")
    scores = torch.zeros(ids.shape, dtype=torch.float64).masked_scatter(mask, -losses.detach())
    torch.testing.assert_close(model.token_log_probs(ids, mask, **_segments(segments)), scores)
    torch.testing.assert_close(model.pseudo_log_likelihood(ids, mask, **_segments(segments)), scores.sum(1))


def _segments(segments):
    return {} if segments is None else {"token_type_ids": segments}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("padding", MASKS)
def test_a_token_has_no_influence_on_its_own_prediction_to_the_last_bit(name, layers, padding):
    model, ids, mask = build(dtype=torch.float32, num_layers=layers, **VARIANTS[name]), texts(), MASKS[padding]
    before = model(ids, mask).logits.detach()
    moved = 0.0
    for i in range(7):
        for token in (0, MASK, 29):
            other = ids.clone()
            other[:, i] = token
            after = model(other, mask).logits.detach()
            assert torch.equal(after[:, i], before[:, i])
            changed = mask[:, i] & (ids[:, i] != token)
            moved = max(moved, float((after - before).abs()[changed].max()) if changed.any() else 0.0)
    assert moved > 1e-3  # it does have influence on the others


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_gradient_of_a_prediction_at_its_own_embedding_is_exactly_0(name, dtype):
    model, mask = build(dtype=dtype, **VARIANTS[name]), MASKS["right"]
    words = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    logits = model(inputs_embeds=words, attention_mask=mask).logits
    for i in range(7):
        (grad,) = torch.autograd.grad(logits[:, i].float().square().sum(), words, retain_graph=True)
        assert not grad[:, i].any()
        assert not grad[~mask].any()  # padding has none on anything
        assert grad[0].any()


def test_long_texts_do_not_leak_either():
    """torch's kernel takes 512 keys at a time."""
    model = build(dtype=torch.float32, num_layers=2, max_position=600)
    ids = texts(1, 600)
    before = model(ids).logits
    for i in (0, 255, 511, 512, 599):
        other = ids.clone()
        other[:, i] = 29 - other[:, i] + 5
        assert torch.equal(model(other).logits[:, i], before[:, i])


def test_visible_self_leaks_and_gives_no_likelihood():
    model, ids = build(self_visible=True), texts()
    torch.testing.assert_close(model.kexue(ids).last_hidden_state, expected_states(model, ids, MASKS["full"]))
    other = ids.clone()
    other[:, 3] = (other[:, 3] + 1) % VOCABULARY
    assert not torch.equal(model(other).logits[:, 3], model(ids).logits[:, 3])
    with pytest.raises(ValueError, match="tokens of this model see themselves"):
        model.token_log_probs(ids)
    hidden = build(self_visible=False)
    assert set(hidden.state_dict()) == set(model.state_dict())  # the mask is no parameter


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_and_batching_change_nothing(name):
    model, ids, mask = build(**VARIANTS[name]), texts(), MASKS["right"]
    output = model(ids, mask).logits
    for b, length in enumerate((7, 4, 1)):
        torch.testing.assert_close(output[b, :length], model(ids[b : b + 1, :length]).logits[0])
    noise = torch.where(mask, ids, texts(seed=8))
    assert torch.equal(model(noise, mask).logits[mask], output[mask])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("lengths", [[7, 4, 1], [3, 3, 3], [5], [2, 0, 6], []])
def test_packed_texts_give_what_padded_ones_give(name, lengths):
    model = build(**VARIANTS[name])
    rows = [texts(1, n, seed=n)[0] for n in lengths]
    packed = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    output = model(packed, cu_seqlens=bounds, labels=packed, return_logits=True)
    alone = [model(row[None]).logits[0] for row in rows if len(row)]
    assert output.num_items == sum(lengths)
    if alone:
        torch.testing.assert_close(output.logits, torch.cat(alone))
        torch.testing.assert_close(output.loss, F.cross_entropy(torch.cat(alone), packed))
        positions = torch.cat([torch.arange(n) for n in lengths])
        again = model(packed, cu_seqlens=bounds, position_ids=positions).logits
        assert torch.equal(again, output.logits)
    words = model.kexue.embeddings.token(packed).detach().requires_grad_()
    logits = model(inputs_embeds=words, cu_seqlens=bounds).logits
    for i in range(len(packed)):
        (grad,) = torch.autograd.grad(logits[i].sum(), words, retain_graph=True)
        assert not grad[i].any()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_single_token_and_a_text_of_padding(name):
    model = build(**VARIANTS[name])
    one = model(torch.tensor([[7]])).logits
    assert torch.isfinite(one).all()
    assert torch.equal(
        one, model(torch.tensor([[9]])).logits
    )  # what is expected at a position of which nothing is known
    hidden = model(texts(), MASKS["left and holes"], labels=texts())
    assert torch.isfinite(hidden.loss)
    parameters = list(model.parameters())
    nothing = model(texts(), torch.zeros(3, 7), labels=texts())
    assert nothing.loss == 0
    assert nothing.num_items == 0
    for loss in (hidden.loss, nothing.loss, model(torch.tensor([[7]]), labels=torch.tensor([[7]])).loss):
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        assert all(g is None or torch.isfinite(g).all() for g in grads)


def test_without_a_start_key_a_single_token_is_predicted_from_its_position_alone():
    model = build(bos_key=False)
    x = model.kexue.embeddings(model.kexue.embeddings.token.weight[MASK].view(1, 1, -1), torch.tensor([0]), None)
    for layer in model.kexue.layers:
        x = x + layer.attention.out.bias
        x = x + layer.feed_forward(layer.feed_forward_norm(x))
    torch.testing.assert_close(model(torch.tensor([[7]])).logits, model.lm_head(model.kexue.final_norm(x)))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("name", ["plain", "no start key", "rope"])
def test_no_texts_and_no_tokens(shape, name):
    model, ids = build(**VARIANTS[name]), torch.zeros(shape, dtype=torch.long)
    assert model(ids).logits.shape == (*shape, VOCABULARY)
    assert model(ids, labels=ids).loss == 0
    assert model.token_log_probs(ids).shape == shape
    assert torch.equal(model.pseudo_log_likelihood(ids), torch.zeros(shape[0], dtype=torch.float64))
    assert model.suggest(ids) == [[]] * shape[0]


def test_corrupted_input_with_the_true_labels_is_masked_language_modelling_on_all_tokens():
    model, ids = build(), texts()
    corrupted = torch.where(texts(seed=5) % 3 == 0, MASK, ids)
    logits = model(corrupted).logits
    expected = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    torch.testing.assert_close(model(corrupted, labels=ids).loss, expected)
    some = ids.masked_fill(texts(seed=6) % 2 == 0, -100)
    expected = F.cross_entropy(logits.flatten(0, 1), some.flatten())
    torch.testing.assert_close(model(corrupted, labels=some).loss, expected)


def test_padding_never_counts_whether_said_by_a_mask_or_by_the_padding_token():
    model, ids, mask = build(pad_token_id=0), texts(), MASKS["right"]
    ids = ids.masked_fill(~mask, 0)
    said, found = model(ids, mask, labels=ids), model(ids, labels=ids)
    assert said.num_items == found.num_items == 12
    assert torch.equal(said.loss, found.loss)
    assert torch.equal(model.token_log_probs(ids), model.token_log_probs(ids, mask))
    for kind in (mask.long(), mask.double()):
        assert torch.equal(model(ids, kind, labels=ids).loss, said.loss)


def test_scores_have_no_dropout_and_leave_the_mode_alone():
    model, ids = build(dropout=0.4, attention_dropout=0.4), texts()
    expected = model.token_log_probs(ids)
    model.train()
    assert torch.equal(model.token_log_probs(ids), expected)
    assert model.training
    assert not expected.requires_grad


def test_dropout_draws_one_mask_for_the_sources_and_another_for_the_queries():
    model = build(dropout=0.5, noise=0.0, position="rope").train()
    seen = {}
    for number, layer in enumerate(model.kexue.layers):
        layer.register_forward_pre_hook(lambda _, args, n=number: seen.update({n: (args[0], args[3])}))
    model(texts())
    sources = []
    for number, layer in enumerate(model.kexue.layers):  # back from the values of each layer to what they are made of
        weight, bias = layer.attention.qkv.weight[32:], layer.attention.qkv.bias[32:]
        sources.append((seen[number][1].flatten(2) - bias) @ torch.linalg.inv(weight).T)
    torch.testing.assert_close(sources[1], sources[0])
    torch.testing.assert_close(sources[2], sources[0])
    missing = sources[0].abs() < 1e-9
    assert 0.3 < missing.double().mean() < 0.7
    queries, _ = seen[0]
    assert queries.shape == (3, 7, 16)
    dropped = queries == 0
    assert 0.3 < dropped.double().mean() < 0.7
    assert not torch.equal(dropped, missing[:, 1:])
    assert not torch.equal(dropped[0], dropped[1])  # its own draw for each text
    # Without position vectors all rows of Q_0 would be equal but for the draw
    assert not torch.equal(dropped[0, 0], dropped[0, 1])
    torch.manual_seed(1)
    first = model(texts(), labels=texts()).loss
    torch.manual_seed(1)
    assert torch.equal(model(texts(), labels=texts()).loss, first)
    assert not torch.equal(model(texts(), labels=texts()).loss, first)


def test_leak_also_absent_while_dropping():
    model, ids = build(dtype=torch.float32, dropout=0.3, attention_dropout=0.3).train(), texts()
    torch.manual_seed(2)
    before = model(ids).logits
    other = ids.clone()
    other[:, 2] = (other[:, 2] + 3) % VOCABULARY
    torch.manual_seed(2)
    assert torch.equal(model(other).logits[:, 2], before[:, 2])


@pytest.mark.parametrize("name", ["plain", "no start key", "rope", "post-norm"])
@pytest.mark.parametrize("padding", ["full", "right"])
def test_attention_weights_have_no_diagonal_and_explain_the_output(name, padding):
    model, ids, mask = build(**VARIANTS[name]), texts(), MASKS[padding]
    output = model(ids, mask, output_attentions=True, output_hidden_states=True)
    first = int(model.config.bos_key)
    assert len(output.attentions) == 3
    torch.testing.assert_close(output.logits, model(ids, mask).logits)
    for weights in output.attentions:
        assert weights.shape == (3, 2, 7, 7 + first)
        assert not weights[..., first:].diagonal(dim1=-2, dim2=-1).any()
        assert not weights[..., first:].masked_select(~mask[:, None, None]).any()
        total = weights.sum(-1)
        empty = (total == 0)[2, 0, 0]  # the single token of the third text
        assert empty == (padding == "right" and not first)
        torch.testing.assert_close(total[total > 0], torch.ones_like(total[total > 0]))
    assert [h.shape for h in output.hidden_states] == [(3, 7, 16)] * 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model, ids = build(), texts()
    model.train()
    expected = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(ids, labels=ids).loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))


def test_saving_and_loading_gives_the_same_model(tmp_path):
    for number, name in enumerate(VARIANTS):
        model = build(dtype=torch.float32, **VARIANTS[name])
        model.save_pretrained(tmp_path / str(number))
        again, report = KexueForTextAutoencoding.from_pretrained(tmp_path / str(number), output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(again(texts()).logits, model(texts()).logits)
        assert again.lm_head.decoder.weight is again.kexue.embeddings.token.weight


def test_weights_of_a_masked_model_fit():
    """The names are those of the stack, so that a masked model can be where training starts."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_layers": 3, "num_heads": 2, "mask_token_id": MASK}
    masked = KexueForMaskedLM(KexueConfig(**sizes, max_position=40, embedding_norm=True))
    model = build(bos_key=False, dtype=torch.float32)
    model.load_state_dict(masked.state_dict(), strict=True)
    assert torch.isfinite(model(texts()).logits).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_close_to_float64(dtype):
    model, ids, mask = build(dtype=dtype), texts(), MASKS["right"]
    exact = build(dtype=dtype).double()
    low, high = model(ids, mask, labels=ids), exact(ids, mask, labels=ids)
    assert low.loss.dtype == torch.float32
    assert abs(low.loss.item() - high.loss.item()) < (0.1 if dtype == torch.bfloat16 else 0.02)
    got = model.token_log_probs(ids, mask)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact.token_log_probs(ids, mask), rtol=0.1, atol=0.3)


@pytest.mark.slow
def test_the_pass_compiles():
    torch.compiler.reset()
    model, ids, mask = build(), texts(), MASKS["right"]
    compiled = torch.compile(lambda i, m: model(i, m).logits, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, mask), model(ids, mask).logits)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m(texts(1, 41)), ValueError, "at most max_position = 40"),
        (lambda m: m(texts() + 40), ValueError, r"input_ids must be in \[0, 30\)"),
        (lambda m: m(texts(), torch.ones(3, 6)), ValueError, r"attention_mask must have shape \(3, 7\)"),
        (lambda m: m(texts(), torch.ones(3, 1, 7, 7, dtype=torch.bool)), ValueError, "attention_mask must be"),
        (lambda m: m(texts(), labels=texts(3, 6)), ValueError, r"labels must have shape \(3, 7\)"),
        (lambda m: m(texts(), labels=texts().double()), TypeError, "labels must be a tensor of integers"),
        (lambda m: m(texts(), labels=texts() + 40), ValueError, r"labels must be in \[0, 30\)"),
        (lambda m: m(texts().double()), TypeError, "input_ids must be a tensor of integers"),
        (lambda m: m(texts(), use_cache=True), ValueError, "only attn_mode='causal' has a cache"),
        (lambda m: m.token_log_probs(texts()[0]), ValueError, r"input_ids must be \(B, T\); got shape \(7,\)"),
        (lambda m: m.token_log_probs([[1]]), TypeError, "input_ids must be a tensor; got list"),
        (lambda m: m.token_log_probs(texts() - 9), ValueError, r"input_ids must be in \[0, 30\); got values from -4"),
        (lambda m: m.pseudo_log_likelihood(texts(), torch.full((3, 7), 0.5)), ValueError, "1 .takes part. and 0 only"),
        (lambda m: m.suggest(texts(), 0), ValueError, "top_k must be at least 1"),
        (lambda m: m.suggest(texts(), 1.5), TypeError, "top_k must be an integer"),
        (lambda m: m.suggest(texts(), special=[30]), ValueError, "special_ids must be below vocab_size, 30; got 30"),
        (lambda m: m.suggest(texts(), min_gain=float("nan")), ValueError, "min_gain must be a number; got nan"),
        (lambda m: m.suggest(texts(), min_gain="0"), TypeError, "min_gain must be a number"),
    ],
)
def test_bad_input_is_rejected(call, error, words):
    with pytest.raises(error, match=words):
        call(build())


def test_bad_configurations_are_rejected():
    with pytest.raises(ValueError, match="needs mask_token_id"):
        KexueConfig(VOCABULARY, attn_mode="diagonal")
    with pytest.raises(ValueError, match="mask_token_id must be inside the vocabulary, below 30; got 30"):
        KexueConfig(VOCABULARY, attn_mode="diagonal", mask_token_id=30)
    with pytest.raises(ValueError, match="KexueForTextAutoencoding needs attn_mode='diagonal'; got 'bidirectional'"):
        KexueForTextAutoencoding(KexueConfig(VOCABULARY, mask_token_id=MASK))
    model = KexueModel(KexueConfig(VOCABULARY, 16, 1, 2, attn_mode="diagonal", mask_token_id=MASK))
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="has an attention of its own, .* got 'flex_attention'"):
        model(texts())


def test_inputs_are_not_changed():
    model, ids, mask = build(pad_token_id=0), texts(), MASKS["right"].long()
    labels = ids.clone()
    copies = [x.clone() for x in (ids, mask, labels)]
    model(ids, mask, labels=labels)
    model.token_log_probs(ids, mask)
    model.suggest(ids, attention_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip((ids, mask, labels), copies, strict=True))
