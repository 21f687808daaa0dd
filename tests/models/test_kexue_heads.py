from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kexue.models import (
    KexueConfig,
    KexueForCausalLM,
    KexueForMaskedLM,
    KexueForNextSentence,
    KexueForPreTraining,
    KexueForSequenceClassification,
)
from reference.kexue_stack import masked_loss

SIZES = {"vocab_size": 23, "hidden_size": 12, "num_layers": 2, "num_heads": 3, "max_position": 16}
ALL = [
    KexueForMaskedLM, KexueForCausalLM, KexueForNextSentence, KexueForPreTraining, KexueForSequenceClassification,
]  # fmt: skip


def make(kind, dtype=torch.float64, **options):
    torch.manual_seed(0)
    mode = "causal" if kind is KexueForCausalLM else "bidirectional"
    config = KexueConfig(**({"attn_mode": mode, "type_vocab_size": 2, "num_labels": 4} | SIZES | options))
    model = kind(config).eval().to(torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.to(dtype)


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(23, (3, 7), generator=g)
    mask = torch.arange(7) < torch.tensor([7, 4, 2])[:, None]
    labels = torch.randint(23, (3, 7), generator=g).masked_fill(torch.rand(3, 7, generator=g) < 0.5, -100)
    return ids, mask, labels


@pytest.mark.parametrize("form", [("layer", "gelu", False), ("rms", "silu", True)])
def test_masked_loss_and_every_gradient_are_those_of_the_reference(form):
    norm, act, post = form
    model = make(KexueForMaskedLM, norm=norm, act=act, post_norm=post)
    ids, _, labels = (x[0] for x in batch())
    p = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    theirs = masked_loss(model.config, p, ids, labels)
    ours = model(ids[None], labels=labels[None]).loss
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, p[name].grad, rtol=1e-9, atol=1e-10, msg=name)


def test_masked_loss_is_the_cross_entropy_of_the_scores():
    model, (ids, mask, labels) = make(KexueForMaskedLM), batch()
    labels = labels.masked_fill(~mask, -100)
    out = model(ids, mask, labels=labels, return_logits=True)
    theirs = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(out.loss, theirs)
    assert out.num_items == (labels != -100).sum()
    with_, without = (
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        for loss in (F.cross_entropy(model(ids, mask).logits.flatten(0, 1), labels.flatten()), out.loss)
    )
    for a, b in zip(with_, without, strict=True):
        torch.testing.assert_close(a, b)


def test_causal_loss_shifts_and_skips_padding():
    model, (ids, mask, _) = make(KexueForCausalLM), batch()
    out = model(ids, mask, labels=ids, return_logits=True)
    scores = out.logits[:, :-1].flatten(0, 1)
    wanted = ids.masked_fill(~mask, -100)[:, 1:].flatten()
    torch.testing.assert_close(out.loss, F.cross_entropy(scores, wanted))
    assert out.num_items == 6 + 3 + 1
    alone = sum(model(ids[i : i + 1, :n], labels=ids[i : i + 1, :n]).loss * (n - 1) for i, n in enumerate((7, 4, 2)))
    torch.testing.assert_close(out.loss, alone / 10)


@pytest.mark.parametrize("kind", [KexueForCausalLM, KexueForPreTraining])
@pytest.mark.parametrize("given", [True, False])
def test_padding_on_the_left_predicts_nothing(kind, given):
    model, (ids, _, _) = make(kind, attn_mode="causal", pad_token_id=0), batch()
    ids = ids.clamp(min=1)
    right = torch.nn.functional.pad(ids, (0, 3))
    left = right.roll(3, 1)
    masks = ((left != 0).long(), (right != 0).long()) if given else (None, None)
    a, b = model(left, masks[0], labels=left), model(right, masks[1], labels=right)
    assert a.num_items == b.num_items == 18
    torch.testing.assert_close(a.loss, b.loss)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_labels_of_every_width(dtype):
    ids, _, labels = batch()
    follows = torch.tensor([0, 1, -100])
    for kind in (KexueForMaskedLM, KexueForCausalLM):
        model = make(kind)
        assert torch.equal(model(ids, labels=labels.to(dtype)).loss, model(ids, labels=labels).loss)
    for kind in (KexueForNextSentence, KexueForSequenceClassification):
        model = make(kind)
        assert torch.equal(model(ids, labels=follows.to(dtype)).loss, model(ids, labels=follows).loss)


@pytest.mark.parametrize("kind", [KexueForMaskedLM, KexueForCausalLM])
def test_packed_loss_is_the_padded_one(kind):
    model, (ids, mask, labels) = make(kind), batch()
    labels = labels.masked_fill(~mask, -100)
    bounds = torch.tensor([0, 7, 11, 13])
    padded, packed = model(ids, mask, labels=labels), model(ids[mask], labels=labels[mask], cu_seqlens=bounds)
    assert padded.num_items == packed.num_items
    torch.testing.assert_close(padded.loss, packed.loss)


@pytest.mark.parametrize("kind", [KexueForMaskedLM, KexueForCausalLM, KexueForPreTraining])
def test_scores_exist_only_if_asked_for(kind):
    model, (ids, _, labels) = make(kind), batch()
    labels = labels.clone()
    labels[0, 1] = 5
    assert model(ids).logits.shape == (3, 7, 23)
    assert model(ids, labels=labels).logits is None
    assert model(ids, labels=labels, return_logits=True).logits.shape == (3, 7, 23)
    assert model(ids, return_logits=False).logits is None


class Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.sizes.append((x.numel(), tuple(x.shape)))
        return out


@pytest.mark.parametrize("kind", [KexueForMaskedLM, KexueForCausalLM])
def test_the_loss_never_holds_the_scores_of_a_batch(kind):
    vocabulary, tokens = 30000, 600
    torch.manual_seed(0)
    mode = "causal" if kind is KexueForCausalLM else "bidirectional"
    model = kind(KexueConfig(vocabulary, hidden_size=4, num_layers=1, num_heads=1, attn_mode=mode, max_position=tokens))
    ids = torch.randint(vocabulary, (1, tokens))
    with Largest() as seen:
        model(ids, labels=ids).loss.backward()
    assert max(seen.sizes)[0] <= (1 << 25) // 4 < tokens * vocabulary


@pytest.mark.parametrize("kind", ALL)
def test_no_label_that_counts_is_a_loss_of_zero(kind):
    model, (ids, _, labels) = make(kind), batch()
    shape = (3,) if kind in (KexueForNextSentence, KexueForSequenceClassification) else labels.shape
    out = model(ids, labels=torch.full(shape, -100))
    assert out.loss.item() == 0
    out.loss.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("kind", [KexueForMaskedLM, KexueForCausalLM, KexueForNextSentence])
def test_the_number_of_items_of_an_accumulated_batch(kind):
    model, (ids, _, labels) = make(kind), batch()
    if kind is KexueForNextSentence:
        labels = torch.tensor([0, 1, 1])
    whole = model(ids, labels=labels)
    parts = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=whole.num_items).loss for i in range(3)]
    torch.testing.assert_close(sum(parts), whole.loss)


def test_next_sentences():
    model, (ids, mask, _) = make(KexueForNextSentence), batch()
    segments = (torch.arange(7) > 2).long().expand(3, 7)
    out = model(ids, mask, segments, labels=torch.tensor([0, 1, -100]))
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[:2], torch.tensor([0, 1])))
    assert out.num_items == 2
    packed = model(
        ids[mask], token_type_ids=segments[mask], cu_seqlens=torch.tensor([0, 7, 11, 13]), return_logits=True
    )
    torch.testing.assert_close(packed.logits, out.logits)


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_classification_of_all_kinds(mode):
    model, (ids, mask, _) = make(KexueForSequenceClassification, attn_mode=mode), batch()
    logits = model(ids, mask).logits
    alone = torch.cat([model(ids[i : i + 1, :n]).logits for i, n in enumerate((7, 4, 2))])
    torch.testing.assert_close(logits, alone)
    packed = model(ids[mask], cu_seqlens=torch.tensor([0, 7, 11, 13])).logits
    torch.testing.assert_close(packed, alone)
    classes, several = torch.tensor([0, 3, 1]), torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    torch.testing.assert_close(model(ids, mask, labels=classes).loss, F.cross_entropy(logits, classes))
    torch.testing.assert_close(
        model(ids, mask, labels=several).loss, F.binary_cross_entropy_with_logits(logits, several.double())
    )
    numbers = torch.tensor([0.5, 1.5, -1.0])
    regression = make(KexueForSequenceClassification, attn_mode=mode, num_labels=1)
    theirs = F.mse_loss(regression(ids, mask).logits[:, 0], numbers.double())
    torch.testing.assert_close(regression(ids, mask, labels=numbers).loss, theirs)


def test_pretraining_sums_weighted_losses():
    model, (ids, mask, labels) = make(KexueForPreTraining, objectives={"mlm": 0.5, "nsp": 2.0}), batch()
    labels = labels.masked_fill(~mask, -100)
    follows = torch.tensor([0, 1, 1])
    both = model(ids, mask, labels=labels, next_sentence_label=follows, return_logits=True)
    tokens = F.cross_entropy(both.logits.flatten(0, 1), labels.flatten())
    pairs = F.cross_entropy(both.next_sentence_logits, follows)
    torch.testing.assert_close(both.loss, 0.5 * tokens + 2 * pairs)
    torch.testing.assert_close(model(ids, mask, labels=labels).loss, 0.5 * tokens)
    torch.testing.assert_close(model(ids, mask, next_sentence_label=follows).loss, 2 * pairs)
    assert model(ids).loss is None


def test_pretraining_takes_its_objectives_as_an_argument_and_keeps_them(tmp_path):
    config = KexueConfig(**SIZES)
    model = KexueForPreTraining(config, objectives={"mlm": 1.0, "nsp": 0.25})
    model.save_pretrained(tmp_path)
    again = KexueForPreTraining.from_pretrained(tmp_path)
    assert again.config.objectives == {"mlm": 1.0, "nsp": 0.25}
    causal = KexueForPreTraining(KexueConfig(**SIZES, attn_mode="causal"), {"clm": 1.0})
    ids = torch.zeros(2, 5, dtype=torch.long)
    assert causal(ids, labels=ids).num_items == 8


def test_objectives_as_an_argument_leave_other_models_of_the_configuration_alone():
    config = KexueConfig(**SIZES)
    first = KexueForPreTraining(config, objectives={"mlm": 1.0})
    KexueForPreTraining(config, objectives={"mlm": 1.0, "nsp": 2.0})
    assert first.config.objectives == {"mlm": 1.0}
    assert config.objectives == {"mlm": 1.0, "nsp": 1.0}
    assert first.config is first.kexue.config


@pytest.mark.parametrize("kind", ALL)
def test_saving_loading_and_the_auto_classes(kind, tmp_path):
    import transformers

    auto = {
        KexueForMaskedLM: "AutoModelForMaskedLM",
        KexueForCausalLM: "AutoModelForCausalLM",
        KexueForNextSentence: "AutoModelForNextSentencePrediction",
        KexueForPreTraining: "AutoModelForPreTraining",
        KexueForSequenceClassification: "AutoModelForSequenceClassification",
    }[kind]
    model, (ids, _, _) = make(kind, torch.float32), batch()
    model.save_pretrained(tmp_path)
    again = getattr(transformers, auto).from_pretrained(tmp_path).eval()
    assert type(again) is kind
    assert torch.equal(again(ids).logits, model(ids).logits)
    if hasattr(model, "lm_head"):
        assert again.lm_head.decoder.weight is again.kexue.embeddings.token.weight
    stack = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(stack.embeddings.token.weight, model.kexue.embeddings.token.weight)


def test_untied_and_resized_tables(tmp_path):
    model, (ids, _, _) = make(KexueForMaskedLM, torch.float32, tie_word_embeddings=False), batch()
    assert model.lm_head.decoder.weight is not model.kexue.embeddings.token.weight
    model.save_pretrained(tmp_path)
    assert torch.equal(KexueForMaskedLM.from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)
    tied = make(KexueForMaskedLM, torch.float32)
    old = tied(ids).logits
    tied.resize_token_embeddings(30)
    assert tied.config.vocab_size == 30
    assert tied.lm_head.decoder.weight is tied.kexue.embeddings.token.weight
    torch.testing.assert_close(tied(ids).logits[..., :23], old)


def test_generation_agrees_with_scoring_the_whole_text():
    model, (ids, _, _) = make(KexueForCausalLM, torch.float32), batch()
    out = model.generate(ids[:, :4], max_new_tokens=8, do_sample=False)
    for t in range(4, 12):
        assert torch.equal(model(out[:, :t]).logits[:, -1].argmax(-1), out[:, t])
    assert torch.equal(model.generate(ids[:, :4], max_new_tokens=8, do_sample=False, use_cache=False), out)
    assert torch.equal(
        model.generate(ids[:, :4], max_new_tokens=8, do_sample=False, cache_implementation="static"), out
    )
    assert model(ids, logits_to_keep=2).logits.shape == (3, 2, 23)


@pytest.mark.parametrize("labels", [torch.tensor([0.5, 1.5, -1.0]), torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 1]])])
def test_the_number_of_items_of_numbers_and_several_labels(labels):
    classes = 1 if labels.dim() == 1 else 3
    model, (ids, _, _) = make(KexueForSequenceClassification, num_labels=classes), batch()
    whole = model(ids, labels=labels)
    assert whole.num_items == labels.numel()
    parts = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=labels.numel()) for i in range(3)]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)


def test_the_trainer_of_transformers_runs_and_accumulates_exactly(tmp_path):
    from transformers import Trainer, TrainingArguments

    ids, mask, labels = batch()
    rows = [
        {"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in zip(ids, mask.long(), labels, strict=True)
    ]
    losses = []
    for size, accumulate in ((3, 1), (1, 3)):
        model = make(KexueForMaskedLM, torch.float32)
        arguments = TrainingArguments(
            str(tmp_path / str(size)), per_device_train_batch_size=size, gradient_accumulation_steps=accumulate,
            max_steps=2, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, logging_steps=1, seed=1,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        assert "eval_loss" in trainer.evaluate()
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        (KexueForMaskedLM, {"labels": torch.zeros(3, 6, dtype=torch.long)}, ValueError, r"\(3, 7\).*\(3, 6\)"),
        (KexueForMaskedLM, {"labels": torch.zeros(3, 7)}, TypeError, "integers"),
        (KexueForMaskedLM, {"labels": torch.full((3, 7), 23)}, ValueError, "23"),
        (KexueForCausalLM, {"labels": torch.full((3, 7), -2)}, ValueError, "-2"),
        (KexueForNextSentence, {"labels": torch.full((3,), 2)}, ValueError, "2"),
        (KexueForNextSentence, {"labels": torch.zeros(2, dtype=torch.long)}, ValueError, r"\(3,\)"),
        (KexueForSequenceClassification, {"labels": torch.full((3,), 4)}, ValueError, "4"),
        (KexueForSequenceClassification, {"labels": torch.zeros(3, 3)}, ValueError, r"\(3, 4\)"),
        (KexueForSequenceClassification, {"labels": [0, 1, 2]}, TypeError, "list"),
        (KexueForNextSentence, {"labels": [0, 1, 1]}, TypeError, "list"),
        (KexueForPreTraining, {"next_sentence_label": torch.zeros(3)}, TypeError, "integers"),
    ],
)
def test_bad_labels(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        make(kind)(batch()[0], **arguments)


def test_modes_that_a_head_does_not_have():
    with pytest.raises(ValueError, match=r"attn_mode='causal'; got 'bidirectional'"):
        KexueForCausalLM(KexueConfig(**SIZES))
    with pytest.raises(ValueError, match="got 'causal'"):
        KexueForMaskedLM(KexueConfig(**SIZES, attn_mode="causal"))
    with pytest.raises(ValueError, match="at least one token"):
        make(KexueForNextSentence)(torch.zeros(2, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one token"):
        make(KexueForNextSentence)(torch.zeros(2, dtype=torch.long), cu_seqlens=torch.tensor([0, 2, 2]))
