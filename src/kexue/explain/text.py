"""Integrated gradients of texts (文本的积分梯度): which tokens made a model say what it says.

Source: 科学空间 7533 (积分梯度:一种新颖的神经网络可视化方法); see ``attribution.py`` for the method.

The path runs through the word embeddings alone: positions and segments stay. The score of a token is the sum of the
attributions of its embedding (``reduce="sum"``: the scores add up to the change of the output), their L2 norm or the
largest of them (the two measures of the article, without a sign).

What differs here: the article scales all embeddings from zero, [CLS] and [SEP] too. The default baseline leaves special
tokens as they are and replaces the others by [PAD], so that no share goes to tokens that nobody wrote. Texts are run in
groups of equal length: nothing is ever padded, no model can trip over padding, and nothing is computed for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kexue._checks import check_choice, check_int, check_real
from kexue._tensors import compute_dtype
from kexue.explain._evaluations import quiet
from kexue.explain._text_models import Encoded, TextModel, check_output
from kexue.explain._text_result import TextExplanation, TextExplanations
from kexue.explain.attribution import IntegratedGradients, attribute

__all__ = ["explain_text"]

REDUCE = ("sum", "l2", "max")
NAMES = ("zero", "pad", "mask", "mean")
_SCORES = 1 << 25  # numbers of a vocabulary's scores at a time


@torch.inference_mode(False)
def explain_text(
    model: Any,
    tokenizer: Any,
    texts: str | Iterable[str],
    baseline: Any = "pad",
    output: str = "logit",
    reduce: str = "sum",
    *,
    target: Any = None,
    against: Any = None,
    every_class: bool = False,
    method: str = "adaptive",
    tol: float = 1e-3,
    max_evals: int = 200,
    n: int | None = None,
    max_length: int | None = None,
    block: int = 128,
) -> TextExplanations:
    """Say which tokens of texts speak for the output of a model, and which against it.

    Args:
        model: A model of transformers, or of this package, with a head: it classifies texts, predicts the next token
            (causal), or fills in masked places (the text must have some). It is run in evaluation mode and left as it
            was.
        tokenizer: Its tokenizer.
        texts: B texts.
        baseline: What the tokens are compared with. "pad", "mask": the embedding of that token, "mean": the mean of the
            table; a number, or an embedding (D,). Special tokens keep their own with all of these. "zero": everything
            is scaled from zero, special tokens too, as in the article. Without a [PAD] (a [MASK]), "pad" means "mask"
            and then "mean". If the output of a text changes next to the baseline only (models that normalise embeddings
            do not see their scale), the next one of these is taken, with a warning.
        output: Of a classifier "logit", "log_prob" or "prob". A language model's logits have no zero of their own: of
            "logit" it gives the log-probability too.
        reduce: From the attributions of an embedding to the score of its token: "sum", "l2" or "max".
        target: What is explained, one for all texts or a list with one for each; None: the most probable. Of a
            classifier a class, by number or name. Of a language model a token id, or text: the sum of the
            log-probabilities of its tokens, one after another behind the text, or at the masked places.
        against: The same; its output is subtracted: why ``target`` rather than this.
        every_class: Explain all C classes of a classifier: C explanations of the first text, then C of the second ...
        method: As in :func:`kexue.explain.integrated_gradients`.
        tol: As there.
        max_evals: As there.
        n: As there.
        max_length: Tokens of a text that are read; None: all.
        block: Points that the model gets at a time.

    Returns:
        A :class:`TextExplanations`, one :class:`TextExplanation` for each text (and class).

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: A choice that does not exist, a text without tokens or with more than the model can read, a target
            that the model does not have, a model that is none of these.

    Reference:
        https://spaces.ac.cn/archives/7533

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> from kexue.models import KexueConfig, KexueForSequenceClassification
        >>> words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3, "book": 4}, "[UNK]"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
        >>> _ = torch.manual_seed(0)
        >>> model = KexueForSequenceClassification(KexueConfig(5, hidden_size=16, num_layers=1, num_heads=2))
        >>> e = explain_text(model, tokenizer, ["good book"], target=1)
        >>> e[0].tokens, bool(e[0].converged), bool((e[0].scores.sum() - e[0].change).abs() < 1e-3)
        (['good', 'book'], True, True)
    """
    check_choice("reduce", reduce, REDUCE)
    output = check_output(output)
    _check_baseline(baseline)
    if max_length is not None:
        check_int("max_length", max_length, 1)
    check_int("block", block, 1)
    listed = _check_texts(texts)
    if not isinstance(every_class, bool):
        raise TypeError(f"every_class must be a bool; got {every_class!r}")
    if every_class and target is not None:
        raise ValueError(f"every_class explains all classes; target must be None, got {target!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    with quiet([model]):
        reader = TextModel(model, tokenizer)
        if every_class:
            classes = reader.count_classes()
            target = list(range(classes)) * len(listed)
            listed = [text for text in listed for _ in range(classes)]
            if isinstance(against, list | tuple | Tensor):
                raise ValueError("against must be one class for all texts where every_class explains all classes")
        encoded = [reader.encode(text, max_length) for text in listed]
        targets, others = (_each(name, one, len(listed)) for name, one in (("target", target), ("against", against)))
        jobs = _Jobs(reader, encoded, output, targets, others)
        settings = {"method": method, "tol": tol, "max_evals": max_evals, "n": n, "block": block}
        made: list[TextExplanation | None] = [None] * len(listed)
        moved: list[tuple[str, str]] = []
        stuck = 0
        for rows in jobs.groups():
            left, names = rows, _candidates(baseline, reader)
            while left:
                name = names.pop(0)
                result = jobs.run(left, name, settings)
                jumps = result.at_baseline.tolist()
                again = [k for k, jump in enumerate(jumps) if jump and names and not isinstance(name, Tensor | float)]
                for k, row in enumerate(left):
                    if k not in again:
                        made[row] = jobs.explanation(row, k, result, name, reduce)
                        stuck += jumps[k]
                moved += [(name, names[0]) for _ in again]
                left = [left[k] for k in again]
    if moved:
        warnings.warn(
            f"{len(moved)} times the output jumped next to the baseline {moved[0][0]!r}, as in a model that does not "
            f"see the scale of its embeddings; {moved[0][1]!r} was taken instead",
            stacklevel=3,
        )
    if stuck:
        warnings.warn(
            f"{stuck} of {len(listed)} texts: the output changes next to the baseline only; the scores describe that "
            "jump. Take another baseline",
            stacklevel=3,
        )
    return TextExplanations([one for one in made if one is not None])


def _check_texts(texts: Any) -> list[str]:
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Iterable):
        raise TypeError(f"texts must be strings; got {type(texts).__name__}")
    listed = list(texts)
    for place, text in enumerate(listed):
        if not isinstance(text, str):
            raise TypeError(f"texts must be strings; entry {place} is {text!r} of type {type(text).__name__}")
    return listed


def _check_baseline(baseline: Any) -> None:
    if isinstance(baseline, str):
        check_choice("baseline", baseline, NAMES)
    elif not isinstance(baseline, Tensor):
        check_real("baseline", baseline)
    elif not baseline.is_floating_point() or not bool(torch.isfinite(baseline).all()):
        raise ValueError("baseline must hold finite floating numbers")


def _each(name: str, chosen: Any, count: int) -> list[Any]:
    """The choice for each text."""
    if isinstance(chosen, Tensor):
        chosen = chosen.tolist()
    if not isinstance(chosen, list | tuple):
        return [chosen] * count
    if len(chosen) != count:
        raise ValueError(f"{name} must be one choice or a list of {count}, one for each text; got {len(chosen)}")
    return list(chosen)


def _candidates(baseline: Any, reader: TextModel) -> list[Any]:
    """The baseline and what takes its place where the model does not see the scale of its embeddings."""
    if not isinstance(baseline, str):
        return [baseline if isinstance(baseline, Tensor) else float(baseline)]
    has = {"zero": True, "pad": reader.has(reader.pad_id), "mask": reader.has(reader.mask_id), "mean": True}
    return [name for name in NAMES[NAMES.index(baseline) :] if has[name]]


class _Jobs:
    """Texts grouped so that a group is one call of :func:`kexue.explain.integrated_gradients`.

    Args:
        reader: The model.
        encoded: The texts.
        output: What of a classifier is explained.
        targets: What the user chose, for each text.
        others: What is subtracted.
    """

    def __init__(
        self, reader: TextModel, encoded: list[Encoded], output: str, targets: list[Any], others: list[Any]
    ) -> None:
        self.reader, self.encoded, self.output = reader, encoded, output
        self.given = [self._resolved("target", i, one) for i, one in enumerate(targets)]
        self.others = [self._resolved("against", i, one) for i, one in enumerate(others)]
        self.found: dict[int, list[int]] = {}

    def _resolved(self, name: str, row: int, chosen: Any) -> Any:
        """Words as ids, a class as a list of its number."""
        if chosen is None:
            return None
        if self.reader.kind == "classes":
            return [self.reader.class_number(name, chosen)]
        words = self.reader.word_ids(name, chosen)
        most = self.reader.most
        if self.reader.kind == "next" and most is not None and len(self.encoded[row].ids) + len(words) - 1 > most:
            raise ValueError(
                f"{name} of {len(words)} tokens behind a text of {len(self.encoded[row].ids)} must fit into the {most} "
                "positions of the model"
            )
        places = len(self.encoded[row].places)
        if self.reader.kind == "masked" and len(words) != places:
            raise ValueError(
                f"{name} must have {places} tokens, one for each masked place of {self.encoded[row].text!r}; "
                f"{chosen!r} has {len(words)}"
            )
        return words

    def groups(self) -> list[list[int]]:
        """Rows with equal numbers of tokens, places and chosen words."""
        found: dict[Any, list[int]] = {}
        for row, one in enumerate(self.encoded):
            chosen = (self.given[row], self.others[row])
            sizes = [len(words) if isinstance(words, list) else words is None for words in chosen]
            key = (len(one.ids), len(one.places), one.types is None, *sizes)
            found.setdefault(key, []).append(row)
        return list(found.values())

    def run(self, rows: list[int], baseline: Any, settings: dict[str, Any]) -> IntegratedGradients:
        """Explain a group."""
        reader, device = self.reader, self.reader.device
        some = [self.encoded[row] for row in rows]
        ids = torch.tensor([one.ids for one in some], device=device)
        types = None if some[0].types is None else torch.tensor([one.types for one in some], device=device)
        e = reader.embed(ids)
        start = self._baseline(baseline, e, torch.tensor([one.fixed for one in some], device=device))
        if reader.kind == "classes":
            return self._classes(rows, e, start, ids, types, settings)
        places = torch.tensor([one.places for one in some], device=device)
        given = [self.given[row] for row in rows]
        words = reader.best_words(e, ids, types, places) if given[0] is None else torch.tensor(given, device=device)
        for row, chosen in zip(rows, words.tolist(), strict=True):
            self.found[row] = chosen
        other = [self.others[row] for row in rows]
        against = None if other[0] is None else torch.tensor(other, device=device)
        probable = self.output == "prob"

        def f(e: Tensor, ids: Tensor, types: Any, places: Tensor, words: Tensor, against: Any) -> Tensor:
            scores = reader.word_scores(e, ids, types, places, words)
            scores = scores.exp() if probable else scores
            if against is None:
                return scores
            less = reader.word_scores(e, ids, types, places, against)
            return scores - (less.exp() if probable else less)

        width = ids.shape[1] * int(getattr(reader.config, "vocab_size", reader.embedding.weight.shape[0]))
        shared = settings | {"block": max(1, min(settings["block"], _SCORES // max(1, width)))}
        return attribute(f, e, start, None, args=(ids, types, places, words, against), **shared)

    def _classes(
        self, rows: list[int], e: Tensor, start: Tensor, ids: Tensor, types: Tensor | None, settings: dict[str, Any]
    ) -> IntegratedGradients:
        reader, output = self.reader, self.output
        chosen: list[Any] = []
        for wanted in (self.given, self.others):
            numbers = [None if wanted[row] is None else wanted[row][0] for row in rows]
            chosen.append(None if numbers[0] is None else torch.tensor(numbers))

        def f(e: Tensor, ids: Tensor, types: Any) -> Tensor:
            return reader.class_scores(e, ids, types, output)

        result = attribute(f, e, start, chosen[0], against=chosen[1], args=(ids, types), **settings)
        for row, column in zip(rows, result.target.tolist(), strict=True):  # type: ignore[union-attr]
            self.found[row] = [column]
        return result

    def _baseline(self, baseline: Any, e: Tensor, fixed: Tensor) -> Tensor:
        """(B, T, D)."""
        table = self.reader.embedding.weight.detach()
        if isinstance(baseline, str):
            if baseline == "zero":
                return torch.zeros_like(e)
            if baseline == "mean":
                one = table.to(compute_dtype(table)).mean(0).to(table.dtype)
            else:
                number = self.reader.mask_id if baseline == "mask" else self.reader.pad_id
                one = self.reader.embed(torch.tensor([number], device=table.device))[0]
        elif isinstance(baseline, Tensor):
            if tuple(baseline.shape) != (e.shape[-1],):
                raise ValueError(f"baseline must be an embedding ({e.shape[-1]},); got {tuple(baseline.shape)}")
            one = baseline.to(e)
        else:
            one = e.new_full((e.shape[-1],), baseline)
        return torch.where(fixed[..., None], e, one)

    def explanation(self, row: int, k: int, result: IntegratedGradients, baseline: Any, reduce: str) -> TextExplanation:
        """What was found for a text, the k-th of its group."""
        one, reader = self.encoded[row], self.reader
        shares = result.attributions[k]
        if reduce == "sum":
            scores = shares.sum(-1)
        else:
            scores = shares.norm(dim=-1) if reduce == "l2" else shares.abs().amax(-1)
        target, against = self.found[row], self.others[row]
        return TextExplanation(
            text=one.text,
            tokens=one.tokens,
            scores=scores.detach().double().cpu(),
            fixed=one.fixed,
            spans=one.spans,
            target=reader.label(target),
            target_ids=target,
            against=None if against is None else reader.label(against),
            value=float(result.value[k]),
            change=float(result.change[k]),
            gap=float(result.gap[k]),
            error=float(result.error[k]),
            converged=bool(result.converged[k]),
            baseline=baseline if isinstance(baseline, str) else "given",
            output="log_prob" if reader.kind != "classes" and self.output == "logit" else self.output,
            reduce=reduce,
        )
