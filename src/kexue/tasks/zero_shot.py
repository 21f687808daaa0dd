"""Zero-shot classification by next sentence prediction (NSP-BERT,NSP 零样本分类).

Source: Scientific Spaces article 8671; Sun et al. 2021, "NSP-BERT: A Prompt-based Few-Shot Learner Through an Original
Pre-training Task", arXiv 2109.03564.

Every label becomes a prompt t_k ("This is sports news."), and a next-sentence head, as pretrained, ranks them:

    z_k = l[IsNext] - l[NotNext]  of  [CLS] t_k [SEP] x [SEP]   (prefix; suffix: [CLS] x [SEP] t_k [SEP])
    label = argmax_k z_k

What we do differently, and why:
- The order is that of the log-odds; the published probabilities saturate above .99 and tie.
- Index 0 means IsNext, as in BERT. A published tool had it reversed and worked at chance, so pairs with a known answer
  are scored when the model is loaded, and an order that seems reversed is a warning.
- Segment ids are 0 and 1 whatever the tokenizer returns: a pair without them scores high with every prompt.
- Only the text is cut to fit, never the prompt.
- Optional calibration: some prompts score high with anything. Their mean log-odds over unlabelled texts are taken off.
- All N K pairs are one length-sorted stream without padding, where the published code goes over the data once for each
  label in batches padded to a fixed length. See :mod:`kexue.tasks.next_sentence`.
"""

from __future__ import annotations

import warnings
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from kexue._checks import check_choice, check_int, check_real
from kexue.tasks._few_shot import few_shot_model
from kexue.tasks._nsp_loading import load_model
from kexue.tasks._prompts import build_prompts, check_texts
from kexue.tasks._sanity import check_order
from kexue.tasks.next_sentence import NextSentenceScorer


class NSPZeroShotClassifier(ClassifierMixin, BaseEstimator):
    """Classify texts by ranking a prompt for each label with a next-sentence head; no labelled text is needed.

    ``fit()`` loads the model and checks labels and prompts. ``fit(X)`` gives it unlabelled texts, which calibration
    uses; ``fit(X, y)`` gives labels, which only ``few_shot`` uses, so that scikit-learn's cross-validation measures the
    zero-shot classifier as it is.

    Args:
        model: Folder of a model with a next-sentence head, or a module (with ``tokenizer``), which is not changed.
        labels: The labels, at least 2: a list of str, or a mapping label -> word or list of words to put into the
            template (their log-odds are averaged). The columns of every result are in this order.
        template: Text with a place ``{}`` or ``{label}``; or a list of them, whose log-odds are averaged.
        prefix: True puts the prompt before the text, False after it. Which is better depends on the data; the paper
            chose it on a development set and used True for six of seven tasks.
        calibrate: Take off each label's mean log-odds over the texts of ``fit(X)``.
        tokenizer: Tokenizer with [CLS] and [SEP], or its folder; None: the one in the model's folder.
        max_length: Tokens of a pair, with the three special ones; the model's limit if that is smaller. Longer texts
            are cut at their end.
        batch_tokens: Tokens in one batch; bounds the memory.
        is_next_index: Which logit means IsNext, 0 or 1.
        sanity_pairs: Pairs (first, second) of texts that follow each other, to check ``is_next_index`` with; None:
            built-in ones; an empty list: no check.
        precision: None: as the model is; "bf16" or "int8" (CPU): faster and approximate, in a copy.
        device: None: where the model is; otherwise a copy goes there.
        few_shot: False, or train on ``fit(X, y)``, in a copy of the model: "head", the pooler and the next-sentence map
            (fast: the states of [CLS] are computed once); "all", everything.
        few_shot_steps: Steps of 8 texts with all their prompts.
        few_shot_lr: Learning rate; None: 1e-3 for "head", 5e-5 for "all".
        random_state: Seed of the few-shot training.
        show_progress: None shows a bar if standard error is a terminal.

    Attributes:
        classes_: The labels, (K,).
        prompts_: All prompts.
        scorer_: The :class:`NextSentenceScorer` in use; ``scorer_.engine`` tells "fast" from "plain",
            ``scorer_.model.model`` is the model.
        prior_: What calibration takes off, (K,); zeros without it.

    Raises:
        ValueError: In ``fit``: a model without next-sentence head or pooler, fewer than 2 labels, empty or duplicate
            labels or prompts, a template without a place, a prompt that leaves no room for a text, calibration without
            texts, few-shot training without labels, settings out of range.
        TypeError: In ``fit`` and ``predict``: texts that are not a list of str, arguments of the wrong kind.

    Reference:
        Scientific Spaces, article 8671; Sun et al. 2021, arXiv 2109.03564.

    Example:
        >>> from kexue._transformers import BertConfig, BertForNextSentencePrediction
        >>> from kexue.words import Segmenter
        >>> tokenizer = Segmenter({"the": 9, "cup": 3, "soup": 3, "sports": 2, "food": 2, "news": 2}).to_hf_tokenizer()
        >>> config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> model = BertForNextSentencePrediction(config)  # random weights; a trained one comes as a path
        >>> clf = NSPZeroShotClassifier(model, ["sports", "food"], "{} news", tokenizer=tokenizer).fit()
        >>> clf.prompts_, clf.decision_function(["the cup", "the soup", ""]).shape
        (['sports news', 'food news'], (3, 2))
    """

    def __init__(
        self,
        model: Any = None,
        labels: Any = None,
        template: Any = "{}",
        prefix: bool = True,
        calibrate: bool = False,
        *,
        tokenizer: Any = None,
        max_length: int = 128,
        batch_tokens: int = 1024,
        is_next_index: int = 0,
        sanity_pairs: Any = None,
        precision: str | None = None,
        device: Any = None,
        few_shot: Any = False,
        few_shot_steps: int = 100,
        few_shot_lr: float | None = None,
        random_state: int = 0,
        show_progress: bool | None = None,
    ) -> None:
        self.model = model
        self.labels = labels
        self.template = template
        self.prefix = prefix
        self.calibrate = calibrate
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.batch_tokens = batch_tokens
        self.is_next_index = is_next_index
        self.sanity_pairs = sanity_pairs
        self.precision = precision
        self.device = device
        self.few_shot = few_shot
        self.few_shot_steps = few_shot_steps
        self.few_shot_lr = few_shot_lr
        self.random_state = random_state
        self.show_progress = show_progress

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = False
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        return tags

    def fit(self, X: Any = None, y: Any = None) -> Self:
        """Load the model and check everything; calibrate or tune if asked for.

        Args:
            X: Unlabelled texts for ``calibrate=True``, texts of the few shots; otherwise not used.
            y: Their labels for ``few_shot``; otherwise not used.
        """
        for name in ("prefix", "calibrate"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise TypeError(f"{name} must be True or False; got {getattr(self, name)!r}")
        if self.few_shot is not False:
            check_choice("few_shot", self.few_shot, ("head", "all"))
        classes, prompts, owners = build_prompts(self.labels, self.template)
        texts = None if X is None else check_texts("X", X)
        if texts is not None and not texts:
            raise ValueError("X must hold at least one text; got none (fit() needs no texts at all)")
        if self.calibrate and texts is None:
            raise ValueError("calibrate=True needs unlabelled texts: fit(X); got none")
        scorer = self._scorer(load_model(self.model), None if self.few_shot else self.precision)
        scorer.check_prompts(scorer.encode(prompts, "prompts"), prompts)
        self._warn_of_ties(scorer, prompts, owners, classes)
        check_order(scorer, self.sanity_pairs, prompts)
        if self.few_shot:
            model = self._tuned(scorer, texts, y, classes, prompts, owners)
            scorer = self._scorer(model, self.precision)
        self.scorer_, self.classes_, self.prompts_, self._owners = scorer, classes, prompts, owners
        self.prior_ = np.zeros(len(classes))
        if self.calibrate:
            self.prior_ = self._log_odds(texts).mean(0)
        return self

    def _scorer(self, model: Any, precision: str | None) -> NextSentenceScorer:
        tokenizer = self.model if self.tokenizer is None and not hasattr(self.model, "parameters") else self.tokenizer
        return NextSentenceScorer(
            model, tokenizer, max_length=self.max_length, batch_tokens=self.batch_tokens,
            is_next_index=self.is_next_index, precision=precision, device=self.device,
        )  # fmt: skip

    @staticmethod
    def _warn_of_ties(scorer: NextSentenceScorer, prompts: list[str], owners: NDArray[np.int64], classes: Any) -> None:
        names, seen = classes.tolist(), {}  # type: ignore[var-annotated]
        for number, ids in enumerate(scorer.encode(prompts, "prompts")):
            other = seen.setdefault(tuple(ids), number)
            if owners[other] != owners[number]:
                warnings.warn(
                    f"{prompts[other]!r} and {prompts[number]!r} are the same tokens to the tokenizer, so the labels "
                    f"{names[owners[other]]!r} and {names[owners[number]]!r} cannot be told apart by them",
                    UserWarning,
                    stacklevel=3,
                )
                return

    def _tuned(
        self, scorer: NextSentenceScorer, texts: Any, y: Any, classes: Any, prompts: list[str], owners: Any
    ) -> Any:
        if texts is None or y is None:
            raise ValueError(f"few_shot={self.few_shot!r} needs texts and labels: fit(X, y); got none")
        given = list(y)
        if len(given) != len(texts):
            raise ValueError(f"X and y must have the same length; got {len(texts)} and {len(given)}")
        place = {label: number for number, label in enumerate(classes.tolist())}
        unknown = next((label for label in given if label not in place), None)
        if unknown is not None:
            raise ValueError(f"y must hold labels out of {list(place)}; got {unknown!r}")
        check_int("few_shot_steps", self.few_shot_steps, 1)
        check_int("random_state", self.random_state, 0)
        lr = {"head": 1e-3, "all": 5e-5}[self.few_shot] if self.few_shot_lr is None else self.few_shot_lr
        check_real("few_shot_lr", lr, above=0.0)
        return few_shot_model(
            scorer, texts, np.array([place[label] for label in given], np.int64), prompts, owners,
            prefix=bool(self.prefix), whole=self.few_shot == "all", steps=self.few_shot_steps, lr=lr,
            seed=int(self.random_state), show_progress=self.show_progress,
        )  # fmt: skip

    def _log_odds(self, texts: Any) -> NDArray[np.float64]:
        """Mean over the prompts of each label, (N, K)."""
        table = self.scorer_.table(texts, self.prompts_, bool(self.prefix), self.show_progress)
        count = len(self.classes_)
        if len(self.prompts_) == count:
            return table
        sums = np.zeros((len(table), count))
        np.add.at(sums.T, self._owners, table.T)
        return sums / np.bincount(self._owners, minlength=count)

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Log-odds that text and prompt belong together, less ``prior_``.

        Args:
            X: N texts.

        Returns:
            (N, K), also for two labels; columns as in ``classes_``.
        """
        check_is_fitted(self, "scorer_")
        return self._log_odds(check_texts("X", X)) - self.prior_

    def predict_log_proba(self, X: Any) -> NDArray[np.float64]:
        """Logarithm of :meth:`predict_proba`."""
        return log_softmax(self.decision_function(X), axis=1)

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Probability of each label if exactly one prompt is next: the softmax of the log-odds.

        With independent q_k = P(IsNext | x, t_k), P(only k) is proportional to q_k / (1 - q_k) = exp(z_k).

        Args:
            X: N texts.

        Returns:
            (N, K), rows sum to 1.
        """
        return np.exp(self.predict_log_proba(X))

    def predict(self, X: Any) -> NDArray[Any]:
        """The label whose prompt has the largest log-odds; of equal ones the first.

        Args:
            X: N texts.

        Returns:
            (N,).
        """
        scores = self.decision_function(X)
        return self.classes_[scores.argmax(1)] if len(scores) else self.classes_[:0]
