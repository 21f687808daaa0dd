"""The scorer: values against the slow reference and the models' own forwards, cutting, batches, bad input."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AlbertConfig,
    AlbertForPreTraining,
    BertConfig,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    ElectraConfig,
    ElectraForPreTraining,
    RobertaConfig,
    RobertaForMaskedLM,
)

from kexue.models import KexueForPreTraining
from kexue.tasks import NextSentenceScorer
from kexue.tasks._cls_forward import cls_forward
from kexue.tasks.next_sentence import cut_lengths
from reference.nsp_zero_shot import bert_logits
from reference.nsp_zero_shot import table as reference_table
from tasks.nsp_models import VOCABULARY, WORDS, bert, families, kexue, tokenizer

TOK = tokenizer()
TEXTS = [
    "the cup goal ball",
    "soup rice",
    "",
    "the team cooks rice and the ball is about the cup 体育 财经新闻 很好",
    "bank",
    "unheard of 😀 words",
    "stock " * 30,
]
PROMPTS = ["this is sports news", "food", "这是一则财经新闻"]
FAMILIES = families()


def peer(model, texts, prompts, prefix=True, room=64):
    """transformers alone, one pair at a time."""
    out = np.empty((len(texts), len(prompts)))
    for row, text in enumerate(texts):
        for column, prompt in enumerate(prompts):
            first, second = (prompt, text) if prefix else (text, prompt)
            side = "only_second" if prefix else "only_first"
            options = {"return_token_type_ids": True, "return_tensors": "pt"}  # by default this tokenizer gives none
            # lists: given as a str, an empty second text would count as none
            batch = TOK([first], [second], truncation=side, max_length=room, **options)
            batch = {name: value for name, value in batch.items() if name != "attention_mask"}
            with torch.no_grad():
                outputs = model(**batch)
            names = ("next_sentence_logits", "seq_relationship_logits", "logits")
            logits = next(x for x in (getattr(outputs, name, None) for name in names) if x is not None)
            out[row, column] = float(logits[0, 0] - logits[0, 1])
    return out


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("batch_tokens", [1, 100, 10000])
def test_scores_are_those_of_transformers_one_pair_at_a_time(name, prefix, batch_tokens):
    model, known = FAMILIES[name]
    scorer = NextSentenceScorer(model, TOK, batch_tokens=batch_tokens)
    assert scorer.engine == ("fast" if known else "plain")
    expected = peer(model, TEXTS, PROMPTS, prefix)
    got = scorer.table(TEXTS, PROMPTS, prefix)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    slow = NextSentenceScorer(model, TOK, batch_tokens=batch_tokens, fast=False)
    np.testing.assert_allclose(slow.table(TEXTS, PROMPTS, prefix), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 1e-6


@pytest.mark.parametrize("layers", [1, 2])
def test_scores_are_those_of_the_reference_in_float64(layers):
    model = bert(num_hidden_layers=layers).double()
    scorer = NextSentenceScorer(model, TOK)
    for prefix in (True, False):
        expected = reference_table(model, TOK, TEXTS[:3], PROMPTS, prefix)
        np.testing.assert_allclose(scorer.table(TEXTS[:3], PROMPTS, prefix), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@settings(max_examples=20)
@given(st.data())
def test_any_pairs_of_ids_in_any_order_and_batch(data):
    lengths = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)
    first, second = (data.draw(st.lists(lengths, min_size=4, max_size=4)) for _ in range(2))
    model = bert(hidden_size=8, num_attention_heads=2, intermediate_size=8).double()
    scorer = NextSentenceScorer(model, TOK, batch_tokens=data.draw(st.integers(1, 80)))
    expected = [
        np.subtract(*bert_logits(model, [2, *a, 3, *b, 3], [0] * (len(a) + 2) + [1] * (len(b) + 1)))
        for a, b in zip(first, second, strict=True)
    ]
    np.testing.assert_allclose(scorer.score_ids(first, second), expected, rtol=1e-9, atol=1e-9)


def test_a_score_does_not_depend_on_the_rest_of_the_batch():
    scorer = NextSentenceScorer(bert().double(), TOK)
    whole = scorer.table(TEXTS, PROMPTS)
    for row in range(len(TEXTS)):
        np.testing.assert_allclose(scorer.table(TEXTS[row : row + 1], PROMPTS), whole[row : row + 1], atol=1e-12)
    order = [4, 2, 6, 0, 1, 5, 3]
    np.testing.assert_allclose(scorer.table([TEXTS[k] for k in order], PROMPTS), whole[order], atol=1e-12)


def test_equal_calls_give_equal_bits():
    scorer = NextSentenceScorer(bert(), TOK)
    assert np.array_equal(scorer.table(TEXTS, PROMPTS), scorer.table(TEXTS, PROMPTS))


def test_no_texts_give_an_empty_table():
    scorer = NextSentenceScorer(bert(), TOK)
    assert scorer.table([], PROMPTS).shape == (0, 3)
    assert scorer.pairs([], []).shape == (0,)


def test_the_other_index_turns_the_sign():
    one, other = (NextSentenceScorer(bert(), TOK, is_next_index=index) for index in (0, 1))
    np.testing.assert_array_equal(one.table(TEXTS, PROMPTS), -other.table(TEXTS, PROMPTS))


def test_the_model_is_not_changed_and_needs_no_eval():
    model = bert(hidden_dropout_prob=0.5).train()
    model.bert.pooler.eval()
    before = copy.deepcopy(model.state_dict())
    expected = NextSentenceScorer(copy.deepcopy(model).eval(), TOK).table(TEXTS, PROMPTS)
    for fast in (True, False):
        scorer = NextSentenceScorer(model, TOK, fast=fast)
        np.testing.assert_allclose(scorer.table(TEXTS, PROMPTS), expected, atol=1e-5)
    assert model.training
    assert model.bert.encoder.training
    assert not model.bert.pooler.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_weights_loaded_later_are_the_ones_that_count():
    model = bert(0)
    scorer = NextSentenceScorer(model, TOK)
    model.load_state_dict(bert(1).state_dict())
    np.testing.assert_allclose(scorer.table(TEXTS, PROMPTS), peer(bert(1), TEXTS, PROMPTS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", [None, "bf16", "int8"])
def test_pickled_and_copied_scorers_have_models_of_their_own(precision):
    scorer = NextSentenceScorer(bert(), TOK, precision=precision)
    expected = scorer.table(TEXTS, PROMPTS)
    for other in (pickle.loads(pickle.dumps(scorer)), copy.deepcopy(scorer)):
        assert other.engine == "fast"
        np.testing.assert_array_equal(other.table(TEXTS, PROMPTS), expected)
        with torch.no_grad():
            for parameter in other.model.model.parameters():
                parameter.zero_()
        assert not np.array_equal(other.table(TEXTS, PROMPTS), expected)
        np.testing.assert_array_equal(scorer.table(TEXTS, PROMPTS), expected)


class TestPrecision:
    @pytest.mark.parametrize("fast", [True, False])
    @pytest.mark.parametrize(("precision", "limit"), [("bf16", 0.05), ("int8", 0.1)])
    @pytest.mark.parametrize("make", [bert, kexue])
    def test_low_precision_is_close_and_leaves_the_model_alone(self, make, precision, limit, fast):
        model = make()
        exact = NextSentenceScorer(model, TOK).table(TEXTS, PROMPTS)
        scorer = NextSentenceScorer(model, TOK, precision=precision, fast=fast)
        assert scorer.engine == ("fast" if fast else "plain")
        difference = scorer.table(TEXTS, PROMPTS) - exact
        assert 0 < np.abs(difference).max() < limit * max(1, np.abs(exact).max())
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert not any("Int8" in type(m).__name__ for m in model.modules())

    def test_int8_does_not_depend_on_the_batch(self):
        scorer = NextSentenceScorer(bert(), TOK, precision="int8")
        np.testing.assert_allclose(scorer.table(TEXTS[:1], PROMPTS), scorer.table(TEXTS, PROMPTS)[:1], atol=1e-5)

    def test_bf16_does_not_tie_candidates_by_rounding_the_logits(self):
        scorer = NextSentenceScorer(bert(), TOK, precision="bf16")
        words = WORDS[:20]
        assert len(np.unique(scorer.table(["the cup"], words))) == len(words)

    def test_half_precision_models_work_as_they_are(self):
        exact = NextSentenceScorer(bert(), TOK).table(TEXTS, PROMPTS)
        low = NextSentenceScorer(bert().to(torch.bfloat16), TOK)
        assert low.engine == "fast"
        assert np.abs(low.table(TEXTS, PROMPTS) - exact).max() < 0.1 * np.abs(exact).max()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_models_do_not_tie_candidates_by_rounding_the_logits(self, dtype):
        scorer = NextSentenceScorer(bert(factor=3.0).to(dtype), TOK)
        assert len(np.unique(scorer.table(["the cup"], WORDS[:20]))) == 20

    @pytest.mark.parametrize("fast", [True, False])
    @pytest.mark.parametrize("precision", ["bf16", "int8"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_low_precision_of_models_of_any_dtype(self, dtype, precision, fast):
        exact = NextSentenceScorer(bert(), TOK).table(TEXTS, PROMPTS)
        got = NextSentenceScorer(bert().to(dtype), TOK, precision=precision, fast=fast).table(TEXTS, PROMPTS)
        assert np.abs(got - exact).max() < 0.1 * max(1, np.abs(exact).max())


class TestFastPath:
    def test_hooks_adapters_and_other_attentions_take_the_plain_path(self):
        hooked = bert()
        hooked.bert.encoder.layer[0].register_forward_hook(lambda *_: None)
        adapted = bert()

        class Adapter(torch.nn.Linear):
            pass

        old = adapted.bert.encoder.layer[1].attention.self.key
        adapted.bert.encoder.layer[1].attention.self.key = Adapter(old.in_features, old.out_features)
        subclass = type("Mine", (BertForNextSentencePrediction,), {})(bert().config)
        other = bert()
        other.config._attn_implementation = "something_else"
        decoder = bert(is_decoder=True)
        for model in (hooked, adapted, subclass, other, decoder, kexue(position="rope")):
            assert cls_forward(model) is None
        assert cls_forward(bert()) is not None

    def test_an_adapter_in_an_inner_layer_stays_on_the_fast_path_and_counts(self):
        class Adapter(torch.nn.Linear):
            def forward(self, x):
                return super().forward(x) + x.roll(1, -1)

        model = bert()
        old = model.bert.encoder.layer[0].attention.self.key
        model.bert.encoder.layer[0].attention.self.key = Adapter(old.in_features, old.out_features)
        scorer = NextSentenceScorer(model, TOK)
        assert scorer.engine == "fast"
        np.testing.assert_allclose(scorer.table(TEXTS, PROMPTS), peer(model, TEXTS, PROMPTS), rtol=1e-4, atol=1e-5)

    def test_a_forward_that_was_changed_is_noticed_when_the_model_is_loaded(self):
        model = bert()
        layer = model.bert.encoder.layer[0]
        forward = layer.forward
        layer.forward = lambda x, *args, **kwargs: forward(2 * x, *args, **kwargs)
        with pytest.warns(UserWarning, match="fast forward"):
            scorer = NextSentenceScorer(model, TOK)
        assert scorer.engine == "plain"
        np.testing.assert_allclose(scorer.table(TEXTS, PROMPTS), peer(model, TEXTS, PROMPTS), rtol=1e-4, atol=1e-5)


class TestPairs:
    def test_log_odds_of_pairs(self):
        model = bert()
        got = NextSentenceScorer(model, TOK).pairs(TEXTS, TEXTS[::-1])
        for row, (a, b) in enumerate(zip(TEXTS, TEXTS[::-1], strict=True)):
            np.testing.assert_allclose(got[row], peer(model, [b], [a])[0, 0], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("a", "b"), [(50, 3), (3, 50), (30, 30), (31, 30), (30, 31), (29, 90), (90, 29)])
    def test_the_longer_side_is_cut_as_tokenizers_do(self, a, b):
        first, second = (" ".join((WORDS[:20] * 9)[:n]) for n in (a, b))
        ids = TOK(first, second, truncation="longest_first", max_length=64, return_token_type_ids=True)
        n, m = cut_lengths(a, b, 61, "longest", "")
        assert n + m <= 61
        assert [n + 2, m + 1] == [ids["token_type_ids"].count(kind) for kind in (0, 1)]

    def test_only_the_given_side_is_cut(self):
        assert cut_lengths(80, 20, 61, "first", "") == (41, 20)
        assert cut_lengths(20, 80, 61, "second", "") == (20, 41)
        assert cut_lengths(20, 20, 61, "first", "") == (20, 20)
        scorer = NextSentenceScorer(bert(), TOK)
        for cut, lists in (("first", (["the"], ["cup " * 70])), ("second", (["cup " * 70], ["the"]))):
            with pytest.raises(ValueError, match="no room"):
                scorer.pairs(*lists, cut=cut)

    def test_lists_may_be_read_only_once(self):
        scorer = NextSentenceScorer(bert(), TOK)
        expected = scorer.table(TEXTS, PROMPTS)
        np.testing.assert_array_equal(scorer.table(iter(TEXTS), iter(PROMPTS)), expected)

    def test_bad_lists(self):
        scorer = NextSentenceScorer(bert(), TOK)
        with pytest.raises(ValueError, match=r"entry 1 of texts has a lone surrogate at place 2"):
            scorer.table(["a", "a \ud800"], PROMPTS)
        with pytest.raises(ValueError, match="got 1 and 2"):
            scorer.pairs(["a"], ["a", "b"])
        with pytest.raises(ValueError, match="got 1 and 0"):
            scorer.score_ids([[1]], [])
        with pytest.raises(ValueError, match="expected at most max_length=64"):
            scorer.score_ids([[5] * 60], [[5] * 2])
        with pytest.raises(ValueError, match="'both'"):
            scorer.pairs(["a"], ["a"], cut="both")
        for texts in ("a text", None, 3, [None], [b"bytes"], [float("nan")], {"a": 1}):
            with pytest.raises(TypeError, match="first must be"):
                scorer.pairs(texts, ["a"])
        with pytest.raises(ValueError, match=r"got shape \(1, 1\)"):
            scorer.pairs(np.array([["a"]]), ["a"])


class TestBadModels:
    def test_models_without_a_next_sentence_head_are_refused_with_a_hint(self):
        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = BertConfig(vocab_size=VOCABULARY, **small)
        wrong = [
            BertModel(config),
            BertForMaskedLM(config),
            BertForSequenceClassification(config),
            RobertaForMaskedLM(RobertaConfig(vocab_size=VOCABULARY, **small)),
            AlbertForPreTraining(AlbertConfig(vocab_size=VOCABULARY, embedding_size=8, **small)),
            ElectraForPreTraining(ElectraConfig(vocab_size=VOCABULARY, embedding_size=8, **small)),
        ]
        for model in wrong:
            with pytest.raises(ValueError, match=rf"{type(model).__name__} has no next-sentence head.*KexueForNext"):
                NextSentenceScorer(model, TOK)

    def test_a_model_without_a_pooler_is_refused(self):
        model = bert()
        model.bert.pooler = None
        with pytest.raises(ValueError, match="pooler"):
            NextSentenceScorer(model, TOK)

    def test_logits_of_another_shape_or_not_finite_are_refused(self):
        model = bert()
        model.cls.seq_relationship = torch.nn.Linear(32, 3)
        with pytest.raises(ValueError, match=r"gave \(1, 3\)"):
            NextSentenceScorer(model, TOK)
        model = bert()
        with torch.no_grad():
            model.bert.encoder.layer[0].output.dense.bias[0] = float("nan")
        with pytest.raises(ValueError, match="finite"):
            NextSentenceScorer(model, TOK)

    def test_logits_that_stop_being_finite_later_are_refused(self):
        model = bert()
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight[TOK.convert_tokens_to_ids("soup")] = float("nan")
        for fast in (True, False):
            scorer = NextSentenceScorer(model, TOK, fast=fast)
            assert np.isfinite(scorer.table(["the cup"], PROMPTS)).all()
            with pytest.raises(ValueError, match="logits must be finite; got .*nan"):
                scorer.table(["the cup", "soup"], PROMPTS)

    def test_a_model_that_was_pretrained_without_next_sentences_is_refused(self, tmp_path):
        model = kexue(kind=KexueForPreTraining, objectives={"mlm": 1.0})
        with pytest.raises(ValueError, match="KexueForPreTraining was pretrained on .*mlm.*without next sentences"):
            NextSentenceScorer(model, TOK)
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="without next sentences"):
            NextSentenceScorer(tmp_path, TOK)

    def test_a_module_that_takes_no_ids_is_refused(self):
        with pytest.raises(ValueError, match=r"Linear.forward takes no input_ids.*next-sentence"):
            NextSentenceScorer(torch.nn.Linear(2, 2), TOK)

    def test_a_module_of_the_users_needs_a_forward_with_two_logits_only(self):
        class Mine(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.table = torch.nn.Embedding(VOCABULARY, 2)

            def forward(self, input_ids, token_type_ids, attention_mask):
                values = self.table(input_ids) * (attention_mask * (1 + token_type_ids))[..., None]
                return type("Output", (), {"logits": values.sum(1)})()

        torch.manual_seed(0)
        model = Mine()
        scorer = NextSentenceScorer(model, TOK)
        assert scorer.engine == "plain"
        value = model.table.weight.detach()[:, 0] - model.table.weight.detach()[:, 1]
        ids = {w: TOK.convert_tokens_to_ids(w) for w in ("the", "cup")}
        expected = value[2] + value[ids["the"]] + value[3] + 2 * value[ids["cup"]] + 2 * value[3]
        np.testing.assert_allclose(scorer.pairs(["the"], ["cup"]), [float(expected)], rtol=1e-5)

    def test_a_model_without_segments_is_a_warning(self):
        with pytest.warns(UserWarning, match="no segment embeddings"):
            scorer = NextSentenceScorer(bert(type_vocab_size=1), TOK)
        assert np.isfinite(scorer.table(TEXTS, PROMPTS)).all()
        with pytest.warns(UserWarning, match="no segment embeddings"):
            NextSentenceScorer(kexue(type_vocab_size=0), TOK, fast=False).table(TEXTS, PROMPTS)

    def test_tokenizers_that_do_not_fit(self):
        with pytest.raises(ValueError, match="tokenizer is needed"):
            NextSentenceScorer(bert())
        with pytest.raises(ValueError, match="cls_token_id"):
            NextSentenceScorer(bert(), tokenizer(special=False))
        with pytest.raises(TypeError, match="tokenizer"):
            NextSentenceScorer(bert(), 3)
        large = NextSentenceScorer(bert(), tokenizer([*WORDS, "late"]))
        with pytest.raises(ValueError, match=rf"id {VOCABULARY} for texts\[1\].*{VOCABULARY} embeddings"):
            large.table(["the", "late"], PROMPTS)

    def test_settings_out_of_range(self):
        for name, value, kind in (
            ("max_length", 4, ValueError), ("max_length", 9.5, TypeError), ("batch_tokens", 0, ValueError),
            ("is_next_index", 2, ValueError), ("is_next_index", -1, ValueError), ("is_next_index", True, TypeError),
            ("precision", "fp8", ValueError), ("fast", 1, TypeError),
        ):  # fmt: skip
            with pytest.raises(kind, match=name):
                NextSentenceScorer(bert(), TOK, **{name: value})
        with pytest.raises(TypeError, match="prefix"):
            NextSentenceScorer(bert(), TOK).table(["a"], PROMPTS, prefix="yes")
        for model in (3, None, [bert()]):
            with pytest.raises((TypeError, ValueError), match="model|tokenizer"):
                NextSentenceScorer(model, TOK)


class TestCutting:
    def test_the_prompt_is_never_cut(self):
        model, text = bert(), "stock " * 500
        scorer = NextSentenceScorer(model, TOK)
        for prefix in (True, False):
            np.testing.assert_allclose(
                scorer.table([text], PROMPTS, prefix), peer(model, [text], PROMPTS, prefix), rtol=1e-4, atol=1e-5
            )

    def test_a_smaller_limit_holds_and_the_models_own_caps_it(self):
        model = bert()
        scorer = NextSentenceScorer(model, TOK, max_length=12)
        assert (scorer.max_length, NextSentenceScorer(model, TOK, max_length=512).max_length) == (12, 64)
        np.testing.assert_allclose(
            scorer.table(TEXTS, PROMPTS[:2]), peer(model, TEXTS, PROMPTS[:2], room=12), rtol=1e-4, atol=1e-5
        )

    def test_prompts_without_room_or_tokens_are_refused(self):
        scorer = NextSentenceScorer(bert(), TOK)
        scorer.table(["the"], ["cup " * 60])
        with pytest.raises(ValueError, match=r"has 61 tokens.*max_length=64"):
            scorer.table(["the"], ["food", "cup " * 61])
        with pytest.raises(ValueError, match="no tokens"):
            scorer.table(["the"], ["food", " "])


class TestFolders:
    @pytest.mark.parametrize("name", ["bert", "bert for pretraining", "ernie", "kexue", "kexue for pretraining"])
    def test_a_saved_model_gives_the_same_scores(self, name, tmp_path):
        model = FAMILIES[name][0]
        model.save_pretrained(tmp_path)
        TOK.save_pretrained(tmp_path)
        expected = NextSentenceScorer(model, TOK).table(TEXTS, PROMPTS)
        for path in (tmp_path, str(tmp_path)):
            np.testing.assert_allclose(NextSentenceScorer(path).table(TEXTS, PROMPTS), expected, rtol=1e-5, atol=1e-6)

    def test_a_checkpoint_without_the_head_or_pooler_is_refused(self, tmp_path):
        config = bert().config
        for number, kind in enumerate((BertForMaskedLM, BertModel)):
            kind(config).save_pretrained(tmp_path / str(number))
            TOK.save_pretrained(tmp_path / str(number))
            with pytest.raises(ValueError, match=rf"lacks .* weights.*{kind.__name__}"):
                NextSentenceScorer(tmp_path / str(number))

    def test_another_kind_of_model_is_refused_with_a_hint(self, tmp_path):
        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        RobertaForMaskedLM(RobertaConfig(vocab_size=VOCABULARY, **small)).save_pretrained(tmp_path)
        TOK.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="next-sentence"):
            NextSentenceScorer(tmp_path)

    def test_missing_folders_and_tokenizers(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            NextSentenceScorer(tmp_path / "nowhere", TOK)
        bert().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="no tokenizer"):
            NextSentenceScorer(tmp_path)
        NextSentenceScorer(tmp_path, TOK)

    def test_a_tokenizer_of_bert_from_a_vocabulary_file(self, tmp_path):
        vocabulary = tmp_path / "vocab.txt"
        vocabulary.write_text("\n".join(TOK.convert_ids_to_tokens(range(VOCABULARY))), encoding="utf-8")
        other = BertTokenizer(str(vocabulary))
        model = bert()
        np.testing.assert_allclose(
            NextSentenceScorer(model, other).table(TEXTS, PROMPTS),
            NextSentenceScorer(model, TOK).table(TEXTS, PROMPTS),
            rtol=1e-6,
        )


def test_pretraining_models_do_not_score_the_vocabulary():
    model = bert(kind=FAMILIES["bert for pretraining"][0].__class__)
    scorer = NextSentenceScorer(model, TOK, fast=False)
    model.cls.predictions.forward = None  # would fail if it were called
    assert np.isfinite(scorer.table(TEXTS, PROMPTS)).all()
    other = FAMILIES["kexue for pretraining"][0]
    assert isinstance(other, KexueForPreTraining)
    scorer = NextSentenceScorer(copy.deepcopy(other), TOK, fast=False)
    scorer.model.model.lm_head.forward = None
    assert np.isfinite(scorer.table(TEXTS, PROMPTS)).all()
