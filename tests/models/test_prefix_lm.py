"""The prefix language model: who sees whom, the cache, the scores and their gradients."""

from __future__ import annotations

import pytest
import torch

from kexue.models import KexueConfig, KexueForCausalLM, KexueForPrefixLM, KexueForPreTraining, KexueModel
from reference.spaces_gen import joined_scores, visible

SIZES = {"vocab_size": 30, "hidden_size": 16, "num_layers": 2, "num_heads": 4}
SEGMENTS = [0, 0, 0, 0, 1, 1, 1]
IDS = [1, 7, 8, 2, 1, 8, 2]


def make(kind=KexueForPrefixLM, **options):
    torch.manual_seed(0)
    config = KexueConfig(**({"attn_mode": "prefix", "position": "rope", "type_vocab_size": 2} | SIZES | options))
    return kind(config).double().eval()


def batch():
    return torch.tensor([IDS]), torch.tensor([SEGMENTS])


@pytest.mark.parametrize("eager", [False, True])
def test_each_position_sees_exactly_what_the_prefix_mask_lets_through(eager):
    model, (ids, segments) = make(KexueModel, num_layers=1), batch()
    if eager:
        weights = model(ids, token_type_ids=segments, output_attentions=True).attentions[0][0, 0]
        seen = weights > 0
    else:
        vectors = model.get_input_embeddings()(ids).detach().requires_grad_()
        out = model(inputs_embeds=vectors, token_type_ids=segments).last_hidden_state[0]
        rows = [
            torch.autograd.grad(out[i] @ torch.arange(16.0).double(), vectors, retain_graph=True)[0][0]
            for i in range(len(IDS))
        ]
        seen = torch.stack([row.abs().sum(-1) > 0 for row in rows])
    expected = [[visible(SEGMENTS, i, j) for j in range(len(IDS))] for i in range(len(IDS))]
    assert seen.tolist() == expected


def test_without_segments_all_tokens_see_each_other():
    prefix, both = make(KexueModel), make(KexueModel, attn_mode="bidirectional")
    both.load_state_dict(prefix.state_dict())
    ids = torch.tensor([IDS, IDS[::-1]])
    torch.testing.assert_close(prefix(ids).last_hidden_state, both(ids).last_hidden_state)


def test_with_everything_in_the_target_the_stack_is_causal():
    prefix, causal = make(KexueModel), make(KexueModel, attn_mode="causal")
    causal.load_state_dict(prefix.state_dict())
    ids, ones = torch.tensor([IDS]), torch.ones(1, len(IDS), dtype=torch.long)
    torch.testing.assert_close(
        prefix(ids, token_type_ids=ones).last_hidden_state, causal(ids, token_type_ids=ones).last_hidden_state
    )


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("place", [0, 3, 4, 7], ids=["left", "inside", "between", "right"])
def test_padding_changes_nothing_wherever_it_stands(position, place):
    model, (ids, segments) = make(position=position), batch()
    labels = ids.clone()
    pad = lambda x, value: torch.cat([x[:, :place], torch.full((1, 2), value), x[:, place:]], 1)  # noqa: E731
    mask = pad(torch.ones_like(ids), 0)
    plain = model(ids, token_type_ids=segments, labels=labels, return_logits=True)
    for filler in (0, 8):
        padded = model(
            pad(ids, filler), mask, pad(segments, 0 if place < 4 else 1), labels=pad(labels, filler), return_logits=True
        )
        if place in (0, 4, 7):  # inside a text, tokens that follow each other are no longer neighbours
            torch.testing.assert_close(padded.loss, plain.loss)
            kept = mask[0].bool()
            torch.testing.assert_close(padded.logits[:, kept], plain.logits)
            torch.testing.assert_close(padded.copy_logits[:, kept], plain.copy_logits)
        else:
            hidden = model.kexue(pad(ids, filler), mask, pad(segments, 0)).last_hidden_state[:, mask[0].bool()]
            torch.testing.assert_close(hidden, model.kexue(ids, None, segments).last_hidden_state)


def test_a_row_of_a_batch_equals_the_row_alone():
    model, (ids, segments) = make(pad_token_id=0), batch()
    other, kinds = torch.tensor([[1, 9, 2, 1, 9, 4, 3, 2, 5]]), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    fill = lambda x: torch.nn.functional.pad(x, (0, 2))  # noqa: E731
    both = model(torch.cat([fill(ids), other]), token_type_ids=torch.cat([fill(segments), kinds]))
    torch.testing.assert_close(both.logits[:1, :7], model(ids, token_type_ids=segments).logits)
    torch.testing.assert_close(both.logits[1:], model(other, token_type_ids=kinds).logits)


def test_the_cache_gives_what_the_whole_text_gives():
    model, (ids, segments) = make(KexueModel, position="learned"), batch()
    whole = model(ids, token_type_ids=segments).last_hidden_state
    for cut in (4, 5, 6):
        first = model(ids[:, :cut], token_type_ids=segments[:, :cut], use_cache=True)
        rest = model(ids[:, cut:], past_key_values=first.past_key_values)  # segments after a cache are 1
        torch.testing.assert_close(torch.cat([first.last_hidden_state, rest.last_hidden_state], 1), whole)


def test_the_cache_of_padded_sources_gives_what_each_alone_gives():
    model = make(KexueModel)
    sources, target = [[1, 7, 2], [1, 5, 6, 4, 2]], torch.tensor([[1, 9, 8]])
    ids = torch.tensor([[1, 7, 2, 0, 0], sources[1]])
    mask = ids != 0
    first = model(ids, mask, use_cache=True)
    after = model(target.expand(2, -1), torch.nn.functional.pad(mask, (0, 3), value=True),
                  past_key_values=first.past_key_values).last_hidden_state  # fmt: skip
    for row, source in enumerate(sources):
        alone = torch.cat([torch.tensor([source]), target], 1)
        segments = (torch.arange(alone.shape[1]) >= len(source)).long()[None]
        torch.testing.assert_close(after[row], model(alone, token_type_ids=segments).last_hidden_state[0, -3:])


@pytest.mark.parametrize("source", [[1, 7, 8, 2], [1, 8, 8, 8, 9, 2], [1, 2], [1, 5, 7, 8, 9, 7, 8, 4, 2]])
def test_the_scores_are_the_sum_of_decoder_and_pointers(source):
    model, target = make(), [1, 7, 8, 9, 2]
    model.follow.data = torch.tensor([0.7, 1.9], dtype=torch.float64)
    model.where.data = torch.randn(24, dtype=torch.float64)
    ids = torch.tensor([source + target])
    segments = torch.tensor([[0] * len(source) + [1] * len(target)])
    logits = model(ids, token_type_ids=segments).logits[0, len(source) :]
    x = model.kexue(ids, None, segments).last_hidden_state[0]
    features = model.lm_head.features(x)
    plain = features @ model.lm_head.decoder.weight.T + model.lm_head.decoder.bias
    for t in range(len(target)):
        i = len(source) + t
        pointed = (model.key.weight @ features[: len(source)].T).T @ (model.query.weight @ features[i]) / 4
        expected = joined_scores(
            plain[i].detach().numpy(), pointed.detach().numpy(), source, target[: t + 1], (0.7, 1.9), -1.0,
            model.where.tolist(),
        )  # fmt: skip
        torch.testing.assert_close(logits[t], torch.from_numpy(expected))


@pytest.mark.parametrize("top_k", [None, 3])
def test_the_loss_is_that_of_the_target_and_reads_the_clean_labels(top_k):
    model, (ids, segments) = make(), batch()
    noisy = ids.clone()
    noisy[0, 5] = 7
    out = model(noisy, token_type_ids=segments, labels=ids, top_k=top_k, return_logits=True)
    rows = out.logits[0, 4:6]  # the second [CLS] predicts 8, its successor predicts [SEP]
    wanted = ids[0, 5:7]
    kept = rows if top_k is None else rows.topk(top_k, -1).values
    expected = (kept.logsumexp(-1) - rows.gather(1, wanted[:, None])[:, 0]).mean()
    torch.testing.assert_close(out.loss, expected)
    assert out.num_items == 2


@pytest.mark.parametrize("top_k", [None, 3])
def test_every_gradient_agrees_with_differences(top_k):
    model, (ids, segments) = make(hidden_size=4, num_layers=1, num_heads=1, vocab_size=9, intermediate_size=4), batch()
    copy = torch.tensor([0, 1, 2, 0, 1, 0, 0])

    def loss():
        out = model(ids, token_type_ids=segments, labels=ids, top_k=top_k)
        return out.loss + torch.nn.functional.cross_entropy(out.copy_logits[0], copy)

    loss().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        direction = torch.randn_like(p)
        with torch.no_grad():
            step = 1e-6
            p += step * direction
            up = loss()
            p -= 2 * step * direction
            down = loss()
            p += step * direction
        torch.testing.assert_close(
            (p.grad * direction).sum(),
            (up - down) / (2 * step),
            rtol=1e-5,
            atol=1e-7,
            msg=lambda m, name=name: f"{name}: {m}",
        )


@pytest.mark.parametrize("segment", [0, 1])
def test_the_segments_of_padding_do_not_matter(segment):
    model, (ids, segments) = make(), batch()
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0]])
    kept = mask[0].bool()
    spread, kinds = torch.full((1, 12), 9), torch.full((1, 12), segment)
    spread[:, kept], kinds[:, kept] = ids, segments
    hidden = model.kexue(spread, mask, kinds).last_hidden_state[:, kept]
    torch.testing.assert_close(hidden, model.kexue(ids, None, segments).last_hidden_state)


@pytest.mark.parametrize("pointer", [True, False])
def test_empty_rows_sources_and_batches(pointer):
    model, (ids, segments) = make(pointer=pointer), batch()
    without = model(ids, token_type_ids=torch.ones_like(ids), labels=ids, return_logits=True)
    features = model.lm_head.features(model.kexue(ids, None, torch.ones_like(ids)).last_hidden_state)
    torch.testing.assert_close(without.logits, model.lm_head.decoder(features))  # nothing can be pointed at
    without.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    for rows, length in ((0, 7), (1, 0), (1, 1), (0, 0)):
        out = model(ids[:rows, :length], token_type_ids=segments[:rows, :length], labels=ids[:rows, :length])
        assert out.loss == 0
        logits = model(ids[:rows, :length], token_type_ids=segments[:rows, :length]).logits
        assert logits.shape == (rows, length, 30)


@pytest.mark.parametrize("top_k", [None, 3])
def test_compiled_in_one_graph_it_gives_the_same(top_k):
    model, (ids, segments) = make(), batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    arguments = {"token_type_ids": segments, "labels": ids, "top_k": top_k, "return_logits": True}
    out, expected = compiled(ids, **arguments), model(ids, **arguments)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.logits, expected.logits)


@pytest.mark.parametrize("pointer", [True, False])
def test_under_autocast_the_loss_is_summed_in_float32(pointer):
    model, (ids, segments) = make(pointer=pointer).float(), batch()
    expected = model(ids, token_type_ids=segments, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, token_type_ids=segments, labels=ids).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)


def test_a_row_that_predicts_nothing_has_loss_0_and_a_gradient():
    model, (ids, _) = make(), batch()
    out = model(ids, labels=ids)
    out.loss.backward()
    assert out.loss == 0
    assert out.num_items == 0


@pytest.mark.parametrize("pointer", [True, False])
def test_lower_precision_is_summed_in_float32(pointer):
    model, (ids, segments) = make(pointer=pointer), batch()
    expected = model(ids, token_type_ids=segments, labels=ids).loss
    low = make(pointer=pointer).bfloat16()(ids, token_type_ids=segments, labels=ids)
    assert low.loss.dtype == torch.float32
    torch.testing.assert_close(low.loss.double(), expected, rtol=0.05, atol=0.05)


def test_a_saved_model_comes_back(tmp_path):
    model, (ids, segments) = make(pointer=True, type_vocab_size=0).float(), batch()
    model.save_pretrained(tmp_path)
    loaded = KexueForPrefixLM.from_pretrained(tmp_path).eval()
    assert loaded.lm_head.decoder.weight is loaded.kexue.embeddings.token.weight
    assert torch.equal(loaded(ids, token_type_ids=segments).logits, model(ids, token_type_ids=segments).logits)


def test_the_pointer_can_be_left_out():
    model, (ids, segments) = make(pointer=False), batch()
    out = model(ids, token_type_ids=segments)
    x = model.kexue(ids, None, segments).last_hidden_state
    torch.testing.assert_close(out.logits, model.lm_head(x))
    assert not any("query" in name or "follow" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x, s: m(x, token_type_ids=s * 2), ValueError, r"token_type_ids must be in \[0, 2\); got 2"),
        (lambda m, x, s: m(x, token_type_ids=s, labels=x[:, :3]), ValueError, r"labels must have shape \(1, 7\)"),
        (lambda m, x, s: m(x, token_type_ids=s, labels=x, top_k=0), ValueError, "top_k"),
        (lambda m, x, s: m(x, token_type_ids=s, labels=x + 30), ValueError, r"labels must be in \[0, 30\); got 38"),
        (lambda m, x, s: m(inputs_embeds=m.get_input_embeddings()(x)), ValueError, "whole rows.* got inputs_embeds"),
        (lambda m, x, s: m(x, use_cache=True), ValueError, "whole rows.* got use_cache"),
        (
            lambda m, x, s: m(x, past_key_values=m.kexue(x, use_cache=True).past_key_values),
            ValueError, "whole rows.* got past_key_values",
        ),
        (lambda m, x, s: m(x, x.new_ones(1, 1, 7, 7).bool()), ValueError, r"attention_mask must have shape \(B, T\)"),
        (lambda m, x, s: m(x, token_type_ids=s.double()), TypeError, "token_type_ids"),
        (lambda m, x, s: m.kexue(x[0], cu_seqlens=torch.tensor([0, 7])), ValueError, "takes no packed input"),
        (
            lambda m, x, s: m.kexue(
                x, token_type_ids=s * 0, past_key_values=m.kexue(x, use_cache=True).past_key_values
            ),
            ValueError, "after a cache all token_type_ids must be 1",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(make(), *batch())


def test_other_heads_refuse_the_mode_and_this_one_refuses_other_modes():
    with pytest.raises(ValueError, match="KexueForPrefixLM needs attn_mode='prefix'; got 'causal'"):
        make(attn_mode="causal")
    for kind in (KexueForCausalLM, KexueForPreTraining):
        with pytest.raises(ValueError, match="got 'prefix'"):
            make(kind)
