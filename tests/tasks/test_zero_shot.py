"""The classifier: prompts, calibration, sanity pairs, few shots, scikit-learn's contract, bad input."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from kexue.tasks import NextSentenceScorer, NSPZeroShotClassifier
from kexue.tasks._prompts import build_prompts, fill
from tasks.nsp_models import VOCABULARY, bert, kexue, tokenizer

TOK = tokenizer()
LABELS = ["sports", "food", "money"]
TEXTS = ["the cup goal ball", "soup rice 😀", "", "这是一则财经新闻", "bank rate tax " * 40]


def classifier(model=None, labels=LABELS, template="this is {} news", **options):
    options = {"tokenizer": TOK, "sanity_pairs": [], **options}
    return NSPZeroShotClassifier(bert() if model is None else model, labels, template, **options)


class Overlap(torch.nn.Module):
    """A next-sentence model whose log-odds are known: words that both texts share, times 4, minus 2 and a bias."""

    def __init__(self, index=0, bias=0.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(4.0))
        self.index, self.bias = index, bias

    def forward(self, input_ids, token_type_ids, attention_mask):
        rows = []
        for ids, kinds, mask in zip(input_ids, token_type_ids, attention_mask, strict=True):
            first, second = (set(ids[(kinds == kind) & (mask == 1)].tolist()) - {1, 2, 3} for kind in (0, 1))
            rows.append(self.scale * len(first & second) - 2 + self.bias)
        odds = torch.stack(rows)
        logits = torch.stack([odds, torch.zeros_like(odds)], 1)
        return type("Output", (), {"logits": logits if self.index == 0 else logits.flip(1)})()


class TestScores:
    @pytest.mark.parametrize("prefix", [True, False])
    def test_decision_function_is_the_log_odds_of_each_prompt(self, prefix):
        clf = classifier(prefix=prefix).fit()
        expected = NextSentenceScorer(bert(), TOK).table(TEXTS, [f"this is {x} news" for x in LABELS], prefix)
        np.testing.assert_array_equal(clf.decision_function(TEXTS), expected)
        assert clf.decision_function(TEXTS).shape == (5, 3)
        assert clf.predict(TEXTS).tolist() == [LABELS[k] for k in expected.argmax(1)]
        np.testing.assert_allclose(
            clf.predict_proba(TEXTS), np.exp(expected) / np.exp(expected).sum(1, keepdims=True), rtol=1e-12
        )
        assert clf.score(TEXTS, clf.predict(TEXTS)) == 1.0

    def test_the_result_is_the_label_that_a_known_model_prefers(self):
        clf = classifier(Overlap(), labels={"a": "goal", "b": "soup", "c": "bank"}, template="{}").fit()
        assert clf.predict(["the goal", "soup rice", "a bank"]).tolist() == ["a", "b", "c"]
        assert clf.decision_function(["the goal"]).tolist() == [[2.0, -2.0, -2.0]]

    def test_columns_are_in_the_order_of_the_labels(self):
        there, back = (classifier(labels=names).fit() for names in (LABELS, LABELS[::-1]))
        assert there.classes_.tolist() == LABELS
        np.testing.assert_array_equal(there.decision_function(TEXTS), back.decision_function(TEXTS)[:, ::-1])
        assert there.predict(TEXTS).tolist() == back.predict(TEXTS).tolist()

    def test_two_labels_give_two_columns(self):
        assert classifier(labels=LABELS[:2]).fit().decision_function(TEXTS).shape == (5, 2)

    def test_several_prompts_of_a_label_are_averaged(self):
        labels = {"a": ["goal", "ball", "cup"], "b": "soup", 3: ["bank", "tax"]}
        clf = classifier(labels=labels, template=["{}", "about {label}"]).fit()
        assert clf.prompts_[:4] == ["goal", "about goal", "ball", "about ball"]
        table = NextSentenceScorer(bert(), TOK).table(TEXTS, clf.prompts_)
        expected = np.stack([table[:, :6].mean(1), table[:, 6:8].mean(1), table[:, 8:].mean(1)], 1)
        np.testing.assert_allclose(clf.decision_function(TEXTS), expected, rtol=1e-12, atol=1e-12)
        assert clf.classes_.tolist() == ["a", "b", 3]

    def test_labels_keep_their_type(self):
        clf = classifier(labels={1: "goal", 0: "soup"}).fit()
        assert clf.predict(TEXTS).dtype.kind == "i"
        assert set(clf.predict(TEXTS).tolist()) <= {0, 1}

    @pytest.mark.parametrize("kind", [np.int32, np.int64, np.float64, np.bool_, np.str_])
    def test_labels_from_an_array_of_labels_are_those_of_scikit_learn(self, kind):
        y = np.array([0, 1], kind)
        clf = classifier(labels=dict(zip(y, ("goal", "soup"), strict=True))).fit()
        assert clf.classes_.dtype.kind == y.dtype.kind
        assert clf.score(["the goal", "soup"], y) in (0, 0.5, 1)

    def test_saturated_probabilities_do_not_tie(self):
        clf = classifier(Overlap(bias=60.0), labels={"one": "soup", "two": "soup rice"}, template="{}").fit()
        assert clf.predict(["soup rice"]).tolist() == ["two"]
        assert np.isfinite(clf.predict_log_proba(["soup rice"])).all()

    def test_no_texts(self):
        clf = classifier().fit()
        assert clf.predict([]).shape == (0,)
        assert clf.decision_function([]).shape == (0, 3)
        assert clf.predict_proba([]).shape == (0, 3)

    def test_arrays_and_series_are_texts(self):
        clf = classifier().fit()
        for texts in (np.array(TEXTS), np.array(TEXTS, object), tuple(TEXTS)):
            np.testing.assert_array_equal(clf.decision_function(texts), clf.decision_function(TEXTS))


class TestCalibration:
    def test_the_mean_of_unlabelled_texts_is_taken_off(self):
        plain, other = classifier().fit(), classifier(calibrate=True).fit(TEXTS[:3])
        prior = plain.decision_function(TEXTS[:3]).mean(0)
        np.testing.assert_allclose(other.prior_, prior, rtol=1e-12)
        np.testing.assert_allclose(other.decision_function(TEXTS), plain.decision_function(TEXTS) - prior, atol=1e-12)
        assert plain.prior_.tolist() == [0, 0, 0]

    def test_it_mends_a_prompt_that_always_scores_high(self):
        class Biased(Overlap):
            def forward(self, input_ids, **inputs):
                output = super().forward(input_ids, **inputs)
                soup = (input_ids == TOK.convert_tokens_to_ids("soup")).any(1)
                output.logits = output.logits + torch.stack([9.0 * soup, 0.0 * soup], 1)
                return output

        texts = ["goal cup", "rice", "goal", "rice food"]
        labels = {"sports": "goal", "food": "soup rice"}
        wrong = classifier(Biased(), labels=labels, template="{}").fit()
        right = classifier(Biased(), labels=labels, template="{}", calibrate=True).fit(texts)
        assert wrong.predict(texts).tolist() == ["food"] * 4
        assert right.predict(texts).tolist() == ["sports", "food", "sports", "food"]

    def test_it_needs_texts(self):
        with pytest.raises(ValueError, match="calibrate=True needs unlabelled texts"):
            classifier(calibrate=True).fit()
        with pytest.raises(ValueError, match="at least one text"):
            classifier(calibrate=True).fit([])


class TestSanityPairs:
    PAIRS = (("the cup goal", "goal cup"), ("soup rice", "cook soup rice"), ("bank rate", "tax rate bank"))

    def check(self, model, **options):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            classifier(model, **{"sanity_pairs": list(self.PAIRS), **options}).fit()
        return [str(w.message) for w in seen if "reversed" in str(w.message)]

    def test_a_reversed_head_is_a_warning_that_names_the_other_index(self):
        assert self.check(Overlap(0)) == []
        (message,) = self.check(Overlap(1))
        assert "is_next_index=1" in message
        (message,) = self.check(Overlap(0), is_next_index=1)
        assert "is_next_index=0" in message
        assert self.check(Overlap(1), is_next_index=1) == []

    def test_a_low_level_with_the_right_order_is_no_warning(self):
        assert self.check(Overlap(0, bias=-30.0)) == []

    def test_a_head_that_says_no_to_everything_is_a_warning(self):
        class No(Overlap):
            def forward(self, **inputs):
                output = super().forward(**inputs)
                output.logits = output.logits * 0 + torch.tensor([-5.0, 0.0])
                return output

        assert len(self.check(No())) == 1
        assert len(self.check(No(), sanity_pairs=None)) == 1  # the prompts, as the tokenizer knows neither language
        assert self.check(No(), sanity_pairs=[]) == []

    def test_one_pair_is_enough(self):
        assert len(self.check(Overlap(1), sanity_pairs=[self.PAIRS[1]])) == 1
        assert self.check(Overlap(0), sanity_pairs=[self.PAIRS[1]]) == []

    def test_pairs_that_count_as_following_are_no_warning_though_others_score_higher(self):
        twice = [(a, b) for (a, _), (_, b) in zip(self.PAIRS, self.PAIRS[1:] + self.PAIRS[:1], strict=True)]
        assert self.check(Overlap(0, bias=3.0), sanity_pairs=twice) == []
        assert len(self.check(Overlap(0), sanity_pairs=twice)) == 1

    def test_untrained_models_are_no_warning(self):
        for seed in range(5):
            assert self.check(bert(seed, factor=1.0), sanity_pairs=None) == []

    def test_built_in_pairs_are_used_with_a_tokenizer_that_knows_them(self):
        from kexue.tasks._sanity import BUILT_IN

        for group in BUILT_IN:
            words = sorted({w for pair in group for text in pair for w in TOK.backend_tokenizer.normalizer
                            .normalize_str(text).replace(",", " , ").replace(".", " . ").split()})  # fmt: skip
            seen = []

            class Watch(Overlap):
                def forward(self, input_ids, seen=seen, **inputs):
                    seen.append(int(input_ids.max()))
                    return super().forward(input_ids, **inputs)

            classifier(Watch(), sanity_pairs=None, tokenizer=tokenizer([*LABELS, "this", "is", "news", *words])).fit()
            assert max(seen) > 12, "the sentences were read"

    def test_bad_pairs(self):
        for pairs, kind in (("ab", TypeError), (3, TypeError), ([("a",)], ValueError), ([("a", 3)], TypeError)):
            with pytest.raises(kind, match="sanity_pairs must"):
                classifier(sanity_pairs=pairs).fit()


class TestFewShot:
    X = ("cup ball", "goal team", "soup rice", "cook food", "bank tax", "rate stock")
    Y = ("sports", "sports", "food", "food", "money", "money")

    @pytest.mark.slow
    @pytest.mark.parametrize("make", [bert, kexue])
    @pytest.mark.parametrize(("how", "lr"), [("head", 3e-2), ("all", 3e-3)])
    def test_training_learns_the_shots_and_leaves_the_model_alone(self, make, how, lr):
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = make(0) if make is kexue else bert(0, factor=12.0, **still)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        clf = classifier(model, few_shot=how, few_shot_steps=100, few_shot_lr=lr, show_progress=False)
        assert clf.fit(self.X, self.Y) is clf
        assert clf.score(self.X, self.Y) >= 5 / 6
        assert classifier(model).fit().score(self.X, self.Y) < 5 / 6
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        tuned = clf.scorer_.model.model.state_dict()
        changed = {name for name in before if not torch.equal(before[name], tuned[name])}
        heads = {name for name in before if "pooler" in name or "seq_rel" in name or "next_sentence" in name}
        assert changed == heads if how == "head" else changed > heads

    @pytest.mark.parametrize("how", ["head", "all"])
    def test_it_is_deterministic_and_a_seed_changes_it(self, how):
        model = bert(hidden_dropout_prob=0.1)

        def scores(seed):
            clf = classifier(model, few_shot=how, few_shot_steps=3, random_state=seed, few_shot_lr=1e-3)
            return clf.fit(self.X, self.Y).decision_function(TEXTS)

        torch.manual_seed(5)
        first = scores(0)
        state = torch.get_rng_state()
        assert np.array_equal(first, scores(0))
        assert torch.equal(state, torch.get_rng_state())
        assert how == "head" or not np.array_equal(first, scores(1))

    def test_the_loss_is_the_next_sentence_cross_entropy_and_so_is_its_gradient(self):
        from torch.nn import functional as F

        from kexue.tasks._few_shot import head_loss

        model = bert().double()
        states = torch.randn(6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        gold = torch.tensor([True, False, False, False, True, False])
        for index in (0, 1):
            loss = head_loss(model, index)(gold=gold, states=states)
            logits = model.cls.seq_relationship(model.bert.pooler(states[:, None]))
            target = torch.where(gold, index, 1 - index)
            each = F.cross_entropy(logits, target, reduction="none")
            expected = (each[gold].mean() + each[~gold].mean()) / 2
            torch.testing.assert_close(loss, expected)
            parameters = [*model.bert.pooler.parameters(), *model.cls.parameters()]
            grads = [torch.autograd.grad(x, parameters, retain_graph=True) for x in (loss, expected)]
            for a, b in zip(*grads, strict=True):
                torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("how", ["head", "all"])
    def test_frozen_models_and_low_precision_work_too(self, how):
        model = bert().requires_grad_(False)
        clf = classifier(model, few_shot=how, few_shot_steps=2, precision="int8").fit(self.X, self.Y)
        assert np.isfinite(clf.decision_function(TEXTS)).all()
        assert not any(p.requires_grad for p in model.parameters())

    def test_labels_without_few_shot_change_nothing(self):
        np.testing.assert_array_equal(
            classifier().fit(self.X, self.Y).decision_function(TEXTS), classifier().fit().decision_function(TEXTS)
        )

    def test_bad_shots(self):
        for X, y, text in (
            (None, None, "needs texts and labels"), (self.X, None, "needs texts and labels"),
            (self.X, self.Y[:3], "got 6 and 3"), (self.X, ("tax",) * 6, "got 'tax'"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=text):
                classifier(few_shot="head").fit(X, y)
        for name, value, kind in (
            ("few_shot", "some", ValueError), ("few_shot_steps", 0, ValueError), ("few_shot_lr", 0, ValueError),
            ("random_state", -1, ValueError), ("random_state", 1.5, TypeError),
        ):  # fmt: skip
            with pytest.raises(kind, match=name):
                classifier(**{"few_shot": "head", name: value}).fit(self.X, self.Y)


class TestScikitLearn:
    def test_clone_params_and_repr(self):
        clf = classifier(prefix=False, max_length=32)
        again = clone(clf)
        assert again.get_params()["max_length"] == 32
        assert again.get_params()["labels"] == LABELS
        assert again.set_params(prefix=True).prefix is True
        assert not hasattr(again, "classes_")
        np.testing.assert_array_equal(again.set_params(prefix=False).fit().predict(TEXTS), clf.fit().predict(TEXTS))
        assert "NSPZeroShotClassifier" in repr(clf)

    def test_nothing_is_checked_before_fit(self):
        clf = NSPZeroShotClassifier(labels=3, template=None, max_length="long", is_next_index=7)
        assert clf.get_params()["max_length"] == "long"
        with pytest.raises(NotFittedError):
            classifier().predict(TEXTS)

    @pytest.mark.slow
    def test_pipelines_cross_validation_and_grids(self, tmp_path):
        bert().save_pretrained(tmp_path)
        TOK.save_pretrained(tmp_path)
        clf = NSPZeroShotClassifier(str(tmp_path), LABELS, sanity_pairs=[])
        X = np.array(["the cup", "soup", "bank", "goal", "rice", "tax"] * 2)
        y = np.array(LABELS * 4)
        pipe = make_pipeline(FunctionTransformer(lambda texts: [text.upper() for text in texts]), clf)
        assert pipe.fit(X).predict(X).shape == (12,)
        assert pipe.score(X, y) == clf.fit().score(X, y)
        scores = cross_val_score(clf, X, y, cv=2)
        assert scores.mean() == pytest.approx(clf.score(X, y))
        assert cross_val_predict(clf, X, y, cv=2).tolist() == clf.predict(X).tolist()
        grid = GridSearchCV(clf, {"prefix": [True, False]}, cv=2).fit(X, y)
        assert set(grid.best_params_) == {"prefix"}

    def test_a_fitted_classifier_can_be_pickled(self):
        clf = classifier(calibrate=True).fit(TEXTS)
        again = pickle.loads(pickle.dumps(clf))
        np.testing.assert_array_equal(again.decision_function(TEXTS), clf.decision_function(TEXTS))

    def test_tags_say_text_and_no_target(self):
        tags = classifier().__sklearn_tags__()
        assert tags.input_tags.string
        assert not tags.input_tags.two_d_array
        assert not tags.target_tags.required
        assert tags.classifier_tags is not None


class TestBadInput:
    def test_labels_and_prompts(self):
        for labels, template, kind, text in (
            (None, "{}", ValueError, "at least 2 labels"),
            ([], "{}", ValueError, "got 0"),
            (["one"], "{}", ValueError, "got 1"),
            ("sports", "{}", TypeError, "labels"),
            (3, "{}", TypeError, "labels"),
            (["a", 3], "{}", TypeError, "entry 1"),
            (["a", None], "{}", TypeError, "entry 1"),
            (["a", ""], "{}", ValueError, "empty"),
            (["a", "  "], "about {}", ValueError, "empty"),
            (["a", "a"], "{}", ValueError, "duplicate label 'a'"),
            ({"a": "x", "b": "x"}, "{}", ValueError, "duplicate prompt 'x'"),
            ({"a": ["x", "x"], "b": "y"}, "{}", ValueError, "duplicate prompt"),
            ({"a": [], "b": "y"}, "{}", ValueError, "at least one word"),
            ({"a": 3, "b": "y"}, "{}", TypeError, "labels"),
            (["a", "b"], "no place", ValueError, "needs a place"),
            (["a", "b"], ["{}", "{}"], ValueError, "duplicate prompt"),
            (["a", "b"], [], ValueError, "template"),
            (["a", "b"], 3, TypeError, "template"),
        ):
            with pytest.raises(kind, match=text):
                classifier(labels=labels, template=template).fit()

    def test_braces_in_labels_are_left_alone(self):
        assert fill("a {} b {label}", "{}") == "a {} b {}"
        assert build_prompts(["{label}", "{x}"], "is {}")[1] == ["is {label}", "is {x}"]

    def test_a_prompt_too_long_for_the_budget(self):
        with pytest.raises(ValueError, match="max_length=8"):
            classifier(max_length=8, template="this is news about {} and").fit()
        assert classifier(max_length=8, template="is {}").fit().predict(TEXTS).shape == (5,)

    def test_prompts_that_the_tokenizer_cannot_tell_apart_are_a_warning(self):
        with pytest.warns(UserWarning, match="'dogs' and 'cats' cannot be told apart"):
            classifier(labels=["dogs", "cats"]).fit()

    def test_texts_and_flags(self):
        clf = classifier().fit()
        for X in ("one text", None, 3, [3], ["a", None], [b"a"], [["a"]]):
            with pytest.raises(TypeError, match="X must be"):
                clf.predict(X)
        with pytest.raises(ValueError, match="one dimension"):
            clf.predict(np.array([["a"], ["b"]]))
        with pytest.raises(ValueError, match="at least one text"):
            classifier().fit([])
        for name, value in (("prefix", "yes"), ("calibrate", 1)):
            with pytest.raises(TypeError, match=name):
                classifier(**{name: value}).fit()
        with pytest.raises(ValueError, match="is_next_index"):
            classifier(is_next_index=2).fit()
        with pytest.raises(ValueError, match="tokenizer is needed"):
            classifier(tokenizer=None).fit()
        with pytest.raises(TypeError, match="model"):
            classifier(model=3, tokenizer=TOK).fit()

    def test_hostile_texts(self):
        clf = classifier().fit()
        texts = ["\x00\x01", "😀" * 1000, "a" * 100000, "[SEP] [CLS] [MASK]", "体育" * 500, "\n\t ", "é́́́", "\ud800"[:0]]
        scores = clf.decision_function(texts)
        assert np.isfinite(scores).all()
        np.testing.assert_allclose(scores[5], clf.decision_function([""])[0], atol=1e-5)

    def test_a_tokenizer_that_is_larger_than_the_model(self):
        large = tokenizer([*"abcdefghijklmnopqrstuvwxyz", *[f"w{k}" for k in range(VOCABULARY)]])
        clf = classifier(tokenizer=large, labels=["a", "b"], template="{}").fit()
        with pytest.raises(ValueError, match="embeddings"):
            clf.predict([f"w{VOCABULARY - 1}"])
