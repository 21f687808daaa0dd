"""Explanations of texts: what adds up, targets, baselines, models of several kinds, pages."""

import random
import warnings
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from kexue._transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    find_class,
)
from kexue.explain import TextExplanations, explain_pair, explain_text
from kexue.models import KexueConfig, KexueForCausalLM, KexueForMaskedLM, KexueForTextAutoencoding
from kexue.reproduce._review_classifier import batch, review, train
from kexue.reproduce._review_classifier import tokenizer as character_tokenizer

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "the", "cat", "dog", "sees", "likes"]
WORDS += ["a", "bird", "river", "good", "bad", "book"]
TEXTS = ["the cat sees a bird", "good book", "the dog likes the bad river"]


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "mask", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def bert(labels=3, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=64, num_labels=labels, initializer_range=0.3, **options,
            )
        )  # fmt: skip


def language_model(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=len(WORDS), n_embd=32, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2,
                    bos_token_id=1, eos_token_id=2,
                )
            )  # fmt: skip
        kinds = {"causal": KexueForCausalLM, "bidirectional": KexueForMaskedLM, "diagonal": KexueForTextAutoencoding}
        config = KexueConfig(
            len(WORDS), hidden_size=32, num_layers=2, num_heads=2, attn_mode=kind, position="learned", max_position=32,
            mask_token_id=3, initializer_range=0.2,
        )  # fmt: skip
        return kinds[kind](config)


def ids_of(tokenizer, text):
    return torch.tensor([tokenizer(text)["input_ids"]])


def test_scores_add_up_to_the_change_of_the_logit(tokenizer):
    model = bert().train()
    found = explain_text(model, tokenizer, TEXTS)
    assert model.training
    model.eval()
    for text, one in zip(TEXTS, found, strict=True):
        ids = ids_of(tokenizer, text)
        logits = model(ids).logits[0]
        assert one.tokens == ["[CLS]", *text.split(), "[SEP]"]
        assert one.fixed == [True, *[False] * len(text.split()), True]
        assert one.target_ids == [int(logits.argmax())]
        assert one.value == pytest.approx(float(logits.max()), abs=1e-5)
        empty = torch.where(torch.tensor([one.fixed]), ids, 0)
        expected = (logits - model(empty).logits[0])[one.target_ids[0]]
        assert one.change == pytest.approx(float(expected), abs=1e-5)
        assert float(one.scores.sum()) == pytest.approx(one.change, abs=2e-3)
        assert one.scores[0] == one.scores[-1] == 0
        assert one.converged


def test_texts_alone_and_together_are_explained_alike(tokenizer):
    model = bert()
    together = explain_text(model, tokenizer, [*TEXTS, TEXTS[0]], target=1)
    for text, one in zip(TEXTS, together, strict=False):
        alone = explain_text(model, tokenizer, text, target=1)[0]
        torch.testing.assert_close(alone.scores, one.scores, rtol=1e-3, atol=1e-4)
    assert torch.equal(together[0].scores, together[3].scores)


@pytest.mark.parametrize("output", ["logit", "log_prob", "prob"])
def test_outputs_and_against(tokenizer, output):
    model = bert().eval()
    found = explain_text(model, tokenizer, TEXTS, target=2, against=0, output=output, tol=1e-4)
    change = {"logit": lambda z: z, "log_prob": lambda z: z.log_softmax(-1), "prob": lambda z: z.softmax(-1)}[output]
    for text, one in zip(TEXTS, found, strict=True):
        z = change(model(ids_of(tokenizer, text)).logits[0])
        assert one.value == pytest.approx(float(z[2] - z[0]), abs=1e-5)
        assert (one.target, one.against) == ("LABEL_2", "LABEL_0")
        assert "rather than LABEL_0" in one.headline
    named = explain_text(model, tokenizer, TEXTS, target="LABEL_2", against=["LABEL_0"] * 3, output=output, tol=1e-4)
    assert torch.equal(named[1].scores, found[1].scores)
    single = explain_text(bert(1), tokenizer, "good book", output=output)[0]
    logit = bert(1).eval()(ids_of(tokenizer, "good book")).logits[0, 0]
    expected = {"logit": logit, "log_prob": logit.sigmoid().log(), "prob": logit.sigmoid()}[output]
    assert single.value == pytest.approx(float(expected), abs=1e-5)


def test_reductions(tokenizer):
    model = bert()
    signed, l2, largest = (explain_text(model, tokenizer, TEXTS[0], reduce=r)[0].scores for r in ("sum", "l2", "max"))
    assert (l2 >= largest).all()
    assert (largest >= 0).all()
    assert (signed.abs() <= l2 * 32**0.5 + 1e-6).all()


def test_baselines(tokenizer):
    model = bert()
    zero = explain_text(model, tokenizer, TEXTS[0], "zero", target=0)[0]
    assert zero.baseline == "zero"
    assert zero.scores[0] != 0  # [CLS] is scaled too
    table = model.get_input_embeddings().weight
    for name, row in (("pad", table[0]), ("mask", table[3]), ("mean", table.mean(0))):
        named = explain_text(model, tokenizer, TEXTS[0], name, target=0)[0]
        given = explain_text(model, tokenizer, TEXTS[0], row.detach(), target=0)[0]
        torch.testing.assert_close(named.scores, given.scores)
        assert (named.baseline, given.baseline) == (name, "given")
        assert named.scores[0] == 0


@pytest.mark.parametrize("kind", ["gpt2", "causal"])
def test_causal_models_explain_a_continuation(tokenizer, kind):
    model = language_model(kind).eval()
    found = explain_text(model, tokenizer, TEXTS, target="a bird", tol=1e-4)
    for text, one in zip(TEXTS, found, strict=True):
        ids = ids_of(tokenizer, text)[:, :-1]  # without [SEP]
        whole = torch.cat([ids, torch.tensor([[10, 11]])], 1)
        log_p = model(whole).logits.log_softmax(-1)
        n = ids.shape[1]
        assert one.value == pytest.approx(float(log_p[0, n - 1, 10] + log_p[0, n, 11]), abs=1e-5)
        assert one.tokens == ["[CLS]", *text.split()]
        assert float(one.scores.sum()) == pytest.approx(one.change, abs=1e-3)
        assert one.output == "log_prob"
    best = explain_text(model, tokenizer, TEXTS[0])[0]
    assert best.target_ids == [int(model(ids_of(tokenizer, TEXTS[0])[:, :-1]).logits[0, -1].argmax())]
    pair = explain_text(model, tokenizer, TEXTS[0], target="cat", against="a bird", tol=1e-4)[0]
    sides = [explain_text(model, tokenizer, TEXTS[0], target=t, tol=1e-4)[0] for t in ("cat", "a bird")]
    torch.testing.assert_close(pair.scores, sides[0].scores - sides[1].scores, rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", ["bidirectional", "diagonal"])
def test_masked_models_explain_a_masked_place(tokenizer, kind):
    model = language_model(kind).eval()
    found = explain_text(model, tokenizer, ["the cat [MASK] a bird", "[MASK] good [MASK]"], target=["sees", "cat dog"])
    ids = ids_of(tokenizer, "the cat [MASK] a bird")
    log_p = model(ids, torch.ones_like(ids)).logits.log_softmax(-1)
    assert found[0].value == pytest.approx(float(log_p[0, 3, 8]), abs=1e-5)
    assert found[0].fixed == [True, False, False, True, False, False, True]
    assert float(found[1].scores.sum()) == pytest.approx(found[1].change, abs=2e-3)
    assert explain_text(model, tokenizer, "the [MASK]")[0].target_ids != []
    with pytest.raises(ValueError, match=r"write \[MASK\] there"):
        explain_text(model, tokenizer, "the cat")
    with pytest.raises(ValueError, match="1 tokens.*'cat dog' has 2"):
        explain_text(model, tokenizer, "the [MASK]", target="cat dog")


def test_decoders_that_classify_need_no_padding_token(tokenizer):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=32, num_labels=2)
        model = find_class("GPT2ForSequenceClassification")(config).eval()
    model.config.pad_token_id = None
    found = explain_text(model, tokenizer, TEXTS, target=1)
    assert model.config.pad_token_id is None
    for text, one in zip(TEXTS, found, strict=True):
        assert one.value == pytest.approx(float(model(ids_of(tokenizer, text)).logits[0, 1]), abs=1e-5)


def test_models_that_do_not_see_scale_get_another_baseline(tokenizer):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = find_class("LlamaConfig")(
            vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            intermediate_size=128, pad_token_id=0,
        )  # fmt: skip
        model = find_class("LlamaForSequenceClassification")(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p *= 5
    with pytest.warns(UserWarning, match="was taken instead"):
        found = explain_text(model, tokenizer, TEXTS, "zero")
    assert {one.baseline for one in found} <= {"pad", "mask"}
    assert all(one.converged for one in found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explain_text(model, tokenizer, TEXTS, "mask")


@pytest.mark.slow
def test_a_saturated_classifier_is_explained_on_every_text():
    model = train(60, 0, layers=2, width=64)
    draw = random.Random(1)
    reviews = [review(draw, i % 2) for i in range(6)]
    labels = batch(reviews)[2].tolist()
    found = explain_text(model, character_tokenizer(), [one.text for one in reviews], "zero", target=labels)
    for one, made in zip(reviews, found, strict=True):
        assert made.converged
        assert made.gap < 1e-3
        assert made.tokens == ["[CLS]", *one.text, "[SEP]"]


def test_page_and_figure(tokenizer, tmp_path):
    found = explain_text(bert(), tokenizer, ["the <b>cat</b> & a  bird", "good"], target=0)
    page = found.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert "&lt;b&gt;cat&lt;/b&gt;" in page
    assert "<b>" not in page
    assert "[CLS]" not in page
    assert "".join(token for token, _ in found[0].shown()) == "the <b>cat</b> & a  bird"
    assert max(abs(strength) for _, strength in found[0].shown()) == 1
    found.plot().savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    assert found[0].to_dict()["tokens"][0]["special"] is True
    assert len(found[:1]) == 1
    assert len(explain_text(bert(), tokenizer, [])) == 0


def test_colours_of_texts_can_be_compared(tokenizer):
    long, nothing = explain_text(bert(), tokenizer, ["the cat sees a bird", "good"], target=0)
    both = TextExplanations([long, replace(nothing, scores=nothing.scores * 0 + 1e-4)])
    assert both.scale == long.scores[1:-1].abs().max()
    assert both[1].scale == 0.1  # hardly any change: no full colour on its own either
    assert max(abs(strength) for _, strength in both[1].shown()) == pytest.approx(1e-3)
    assert both.to_html().count("<span style") == 5


def test_bytes_of_one_character_are_one_piece(tokenizer):
    (one,) = explain_text(bert(), tokenizer, "good", target=0)
    made = replace(
        one, text="书 a", tokens=["书", "书", "书", "a"], scores=torch.tensor([0.5, -1.0, 2.0, 0.25]),
        fixed=[False] * 4, spans=[(0, 1), (0, 1), (0, 1), (2, 3)],
    )  # fmt: skip
    assert made.pieces == [("书", 1.5), (" ", 0.0), ("a", 0.25)]
    assert replace(made, scores=made.scores.abs(), reduce="max").pieces[0] == ("书", 2.0)


def test_every_class(tokenizer):
    model = bert()
    found = explain_text(model, tokenizer, TEXTS[:2], every_class=True)
    assert [one.target_ids for one in found] == [[0], [1], [2]] * 2
    assert [one.text for one in found] == [TEXTS[0]] * 3 + [TEXTS[1]] * 3
    alone = explain_text(model, tokenizer, TEXTS[1], target=2)[0]
    torch.testing.assert_close(found[5].scores, alone.scores, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="target must be None, got 1"):
        explain_text(model, tokenizer, TEXTS, every_class=True, target=1)
    with pytest.raises(ValueError, match="has no classes"):
        explain_text(language_model("gpt2"), tokenizer, TEXTS, every_class=True)


def test_another_baseline_with_two_classes():
    model = find_class("LlamaForSequenceClassification")
    config = find_class("LlamaConfig")(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        num_labels=3, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    reader = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model(config)
    with pytest.warns(UserWarning, match="next to the baseline 'zero'"):
        found = explain_text(model, reader, TEXTS, "zero", target=0, against=2)
    assert all(one.against == "LABEL_2" and one.baseline != "zero" for one in found)


def test_what_a_model_cannot_read(tokenizer):
    with pytest.raises(ValueError, match="at most 8 tokens.*got 22 of.*max_length=8"):
        explain_text(bert(max_position_embeddings=8), tokenizer, "good " * 20)
    assert len(explain_text(bert(max_position_embeddings=8), tokenizer, "good " * 20, max_length=8)[0].tokens) == 8
    with pytest.raises(ValueError, match="33 tokens|must fit into the 32 positions"):
        explain_text(language_model("gpt2"), tokenizer, "good " * 28, target="bad " * 5)
    small = bert()
    small.set_input_embeddings(torch.nn.Embedding(14, 32))
    with pytest.raises(ValueError, match="has 14 tokens; it makes the id 15"):
        explain_text(small, tokenizer, "a book")
    with torch.random.fork_rng():
        tags = find_class("BertForTokenClassification")(bert().config)
    with pytest.raises(ValueError, match="one row of scores for a text"):
        explain_text(tags, tokenizer, "a [MASK]")


def test_lone_surrogates_can_be_written(tokenizer, tmp_path):
    found = explain_text(bert(), tokenizer, "good \udce9 book")
    assert found[0].text == "good ? book"
    found.to_html(tmp_path / "page.html")


def test_a_model_without_a_known_name_is_left_as_it_was(tokenizer):
    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm, self.drop = torch.nn.Embedding(16, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout()

        def get_input_embeddings(self):
            return self.table

        def forward(self, input_ids):
            return self.drop(self.norm(self.table(input_ids).mean(1)))[:, :2]

    model = Noisy()
    state = torch.get_rng_state()
    explain_text(model, tokenizer, TEXTS)
    assert torch.equal(state, torch.get_rng_state())
    assert int(model.norm.num_batches_tracked) == 0
    assert model.drop.training


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"texts": 3}, TypeError, "int"),
        ({"texts": ["a", 3]}, TypeError, "entry 1"),
        ({"model": 3}, TypeError, "model"),
        ({"tokenizer": 3}, TypeError, "tokenizer"),
        ({"model": torch.nn.Linear(2, 2)}, ValueError, "get_input_embeddings"),
        ({"baseline": "none"}, ValueError, "'none'"),
        ({"baseline": torch.zeros(3)}, ValueError, r"\(32,\); got \(3,\)"),
        ({"output": "odds"}, ValueError, "'odds'"),
        ({"reduce": "mean"}, ValueError, "'mean'"),
        ({"target": 3}, ValueError, r"\[0, 3\); got 3"),
        ({"target": "LABEL_9"}, ValueError, "'LABEL_0', 'LABEL_1', 'LABEL_2'; got 'LABEL_9'"),
        ({"target": [0]}, ValueError, "list of 3"),
        ({"max_length": 0}, ValueError, "max_length"),
    ],
)
def test_bad_input_is_rejected(tokenizer, change, error, message):
    given = {"model": bert(), "tokenizer": tokenizer, "texts": TEXTS} | change
    with pytest.raises(error, match=message):
        explain_text(given.pop("model"), given.pop("tokenizer"), given.pop("texts"), **given)


def test_pairs_of_tokens_add_up_to_the_cosine():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gru = torch.nn.GRU(6, 8, batch_first=True)
        a, b = torch.randn(4, 6), torch.randn(3, 6)

    def encode(e):
        return gru(e)[1][0]

    found = explain_pair(encode, a, b, tol=1e-4)
    z = [torch.nn.functional.normalize(encode(e[None]), dim=1)[0].detach().double() for e in (a, b)]
    assert found.pairs.shape == (4, 3)
    assert found.cosine == pytest.approx(float(z[0] @ z[1]), abs=1e-6)
    assert float(found.pairs.sum()) + found.rest == pytest.approx(found.cosine, abs=1e-3)
    assert found.converged
    swapped = explain_pair(encode, b, a, tol=1e-4)
    torch.testing.assert_close(swapped.pairs, found.pairs.T, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="5 and 6"):
        explain_pair(encode, a[:, :5], b)
    with pytest.raises(ValueError, match="at least one token"):
        explain_pair(encode, a[:0], b)
    with pytest.raises(ValueError, match=r"vectors \(2, D\)"):
        explain_pair(lambda e: e, a, b)
