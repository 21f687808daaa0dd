"""Log-odds that one text follows another (下一句预测的对数几率), for many pairs at once.

Source: NSP-BERT (Scientific Spaces article 8671). A pair is [CLS] a [SEP] b [SEP] with segment ids 0 and 1; with logits
l of the next-sentence head the score is

    z = l[IsNext] - l[NotNext] = ln P(IsNext) - ln P(NotNext)

What we do differently, and why:
- log-odds instead of probabilities: the softmax of a trained head saturates above .99 and ties.
- Each text and each prompt is tokenised once; the pairs are concatenations of ids. The published code encodes the whole
  data set again for every label.
- All pairs are sorted by length and go through the model without padding, see :mod:`kexue.tasks._cls_forward`.
- Only the text is ever cut. A tokenizer's ``truncation=True`` cuts the longer of the two, which may be the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue._checks import check_choice, check_int
from kexue._progress import Bar, progress
from kexue.tasks._nsp_loading import load_model, load_tokenizer
from kexue.tasks._nsp_model import NextSentenceModel, log_odds
from kexue.tasks._prompts import check_texts

#: [CLS], [SEP] and [SEP].
SPECIALS = 3


class NextSentenceScorer:
    """A next-sentence model with its tokenizer, ready to score pairs of texts.

    Args:
        model: Folder of a saved model, or a module with a next-sentence head (BERT, ERNIE, MobileBERT, Megatron-BERT,
            FNet, Kexue; ForNextSentencePrediction or ForPreTraining). A module is not changed.
        tokenizer: Tokenizer with [CLS] and [SEP], or its folder; None takes the one in the model's folder.
        max_length: Tokens of a pair with the three special ones; the model's own limit if that is smaller.
        batch_tokens: Tokens in one batch, which bounds the memory.
        is_next_index: Which logit means IsNext: 0 in BERT's convention; some checkpoints have it at 1.
        precision: None computes as the model is; "bf16" and "int8" (CPU, weights and activations) use a copy.
        device: None stays where the model is; otherwise a copy goes there.
        fast: False always calls the model's own forward. True takes the fast path for the classes it knows (BERT,
            ERNIE, Megatron-BERT, Kexue), compared with the model's own forward here.

    Attributes:
        engine: "fast" or "plain": what is used.
        max_length: The limit that holds.

    Raises:
        ValueError: No next-sentence head, pooler or segment ids, weights missing in the folder, a tokenizer without
            special ids, logits that are not finite, or a setting out of range.
        TypeError: An argument of the wrong kind.
        FileNotFoundError: No such folder.

    Example:
        >>> from kexue._transformers import BertConfig, BertForNextSentencePrediction
        >>> from kexue.words import Segmenter
        >>> tokenizer = Segmenter({"good": 3, "food": 3, "music": 2}).to_hf_tokenizer()
        >>> config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> scorer = NextSentenceScorer(BertForNextSentencePrediction(config), tokenizer)
        >>> scorer.engine, scorer.pairs(["good food", ""], ["music", "food"]).shape
        ('fast', (2,))
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        max_length: int = 128,
        batch_tokens: int = 1024,
        is_next_index: int = 0,
        precision: str | None = None,
        device: Any = None,
        fast: bool = True,
    ) -> None:
        check_int("max_length", max_length, SPECIALS + 2)
        check_int("batch_tokens", batch_tokens, 1)
        check_int("is_next_index", is_next_index, 0)
        if is_next_index > 1:
            raise ValueError(f"is_next_index must be 0 or 1; got {is_next_index}")
        if not isinstance(fast, bool):
            raise TypeError(f"fast must be True or False; got {fast!r}")
        self.tokenizer = load_tokenizer(tokenizer, model)
        self.model = NextSentenceModel(load_model(model), precision, device, fast)
        limit = self.model.max_positions
        self.max_length = int(max_length) if limit is None else min(int(max_length), limit)
        self.batch_tokens, self.is_next_index = int(batch_tokens), int(is_next_index)
        self._cls, self._sep = int(self.tokenizer.cls_token_id), int(self.tokenizer.sep_token_id)
        self._check_ids([[self._cls, self._sep]], lambda _: "its special tokens")

    @property
    def engine(self) -> str:
        """Which forward is used, "fast" or "plain"."""
        return self.model.engine

    def encode(self, texts: Any, name: str = "texts") -> list[list[int]]:
        """Token ids of each text, without special tokens and uncut.

        Raises:
            TypeError: Not a list of str.
            ValueError: The tokenizer gives an id that the model has no embedding for.
        """
        found = check_texts(name, texts)
        if not found:
            return []
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        ids = [[int(x) for x in row] for row in self.tokenizer(found, add_special_tokens=False, **options)["input_ids"]]
        self._check_ids(ids, lambda row: f"{name}[{row}]")
        return ids

    def _check_ids(self, ids: list[list[int]], where: Callable[[int], str]) -> None:
        size = self.model.vocab_size
        if size is None:
            return
        for row, own in enumerate(ids):
            if own and not 0 <= min(own) <= max(own) < size:
                raise ValueError(
                    f"the tokenizer gives id {max(own)} for {where(row)}, the model has {size} embeddings: they do not "
                    "belong together"
                )

    def pairs(
        self, first: Any, second: Any, cut: str = "longest", show_progress: bool | None = None
    ) -> NDArray[np.float64]:
        """Log-odds that ``second[i]`` follows ``first[i]``, (N,).

        Args:
            first: N texts.
            second: N texts.
            cut: Which side is shortened when a pair is longer than ``max_length``: "first", "second", or "longest",
                token by token the longer one, as tokenizers do. The start of a text stays.
            show_progress: None shows a bar if standard error is a terminal.

        Raises:
            ValueError: Lists of different lengths, or the side that must not be cut leaves no room.
        """
        check_choice("cut", cut, ("first", "second", "longest"))
        a, b = self.encode(first, "first"), self.encode(second, "second")
        if len(a) != len(b):
            raise ValueError(f"first and second must have the same length; got {len(a)} and {len(b)}")
        room = self.max_length - SPECIALS
        for row in range(len(a)):
            n, m = cut_lengths(len(a[row]), len(b[row]), room, cut, f"pair {row}")
            a[row], b[row] = a[row][:n], b[row][:m]
        return self.score_ids(a, b, show_progress)

    def table(
        self, texts: Any, prompts: Any, prefix: bool = True, show_progress: bool | None = None
    ) -> NDArray[np.float64]:
        """Log-odds of every text with every prompt, (N, P).

        Args:
            texts: N texts; cut at the end where a pair is longer than ``max_length``.
            prompts: P prompts, never cut.
            prefix: True puts the prompt first, False the text.
            show_progress: None shows a bar if standard error is a terminal.

        Raises:
            ValueError: A prompt has no tokens, or leaves no room for the text.
        """
        if not isinstance(prefix, bool | np.bool_):
            raise TypeError(f"prefix must be True or False; got {prefix!r}")
        given, found = check_texts("prompts", prompts), check_texts("texts", texts)
        heads = self.encode(given, "prompts")
        self.check_prompts(heads, given)
        out = np.empty((len(found), len(heads)))
        step = max(1, 65536 // max(1, len(heads)))  # texts at once: bounds the lists, and sorts within many pairs
        with progress("scoring", len(found) * len(heads), show_progress) as bar:
            for start in range(0, len(found), step):
                bodies = self.encode(found[start : start + step])
                a: list[list[int]] = []
                b: list[list[int]] = []
                for body in bodies:
                    for head in heads:
                        text = body[: self.max_length - SPECIALS - len(head)]
                        a.append(head if prefix else text)
                        b.append(text if prefix else head)
                out[start : start + step] = self._score(a, b, bar).reshape(-1, len(heads))
        return out

    def check_prompts(self, heads: Sequence[Sequence[int]], prompts: Sequence[str]) -> None:
        """Raise ValueError for a prompt without tokens or one that leaves no room for a text."""
        for ids, prompt in zip(heads, prompts, strict=True):
            if not ids:
                raise ValueError(f"the prompt {prompt!r} has no tokens")
            if len(ids) + SPECIALS >= self.max_length:
                raise ValueError(
                    f"the prompt {prompt[:60]!r} has {len(ids)} tokens; with {SPECIALS} special ones it leaves no room "
                    f"for a text in max_length={self.max_length}"
                )

    def score_ids(
        self, first: Sequence[Sequence[int]], second: Sequence[Sequence[int]], show_progress: bool | None = None
    ) -> NDArray[np.float64]:
        """Log-odds of pairs of token ids without special tokens, (N,).

        Raises:
            ValueError: Different numbers of them, or a pair longer than ``max_length``.
        """
        if len(first) != len(second):
            raise ValueError(f"first and second must have the same length; got {len(first)} and {len(second)}")
        for row, (a, b) in enumerate(zip(first, second, strict=True)):
            if len(a) + len(b) + SPECIALS > self.max_length:
                raise ValueError(
                    f"pair {row} has {len(a) + len(b) + SPECIALS} tokens; expected at most max_length={self.max_length}"
                )
        with progress("scoring", len(first), show_progress) as bar:
            return self._score(first, second, bar)

    def _score(self, first: Sequence[Sequence[int]], second: Sequence[Sequence[int]], bar: Bar) -> NDArray[np.float64]:
        scores = np.empty(len(first))
        lengths = np.array([len(a) + len(b) + SPECIALS for a, b in zip(first, second, strict=True)], np.int64)
        for rows in self.batches(lengths):
            logits = self.model.logits([self.join(first[row], second[row]) for row in rows])
            scores[rows] = log_odds(logits, self.is_next_index)
            bar.advance(len(rows))
        return scores

    def join(self, first: Sequence[int], second: Sequence[int]) -> tuple[list[int], list[int]]:
        """Ids and segment ids of one pair, with the special tokens."""
        ids = [self._cls, *first, self._sep, *second, self._sep]
        return ids, [0] * (len(first) + 2) + [1] * (len(second) + 1)

    def batches(self, lengths: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Rows of each batch, by length; of equal lengths neighbours stay together, as they share tokens."""
        order = np.argsort(lengths, kind="stable")
        packed = self.model.packed is not None
        start = tokens = 0
        for end, length in enumerate(lengths[order]):
            tokens = tokens + length if packed else (end - start + 1) * length  # padded to the longest, this one
            if tokens > self.batch_tokens and end > start:
                yield order[start:end]
                start, tokens = end, length
        if len(order):
            yield order[start:]


def cut_lengths(first: int, second: int, room: int, cut: str, name: str) -> tuple[int, int]:
    """How many tokens of each side stay; see :meth:`NextSentenceScorer.pairs`."""
    if first + second <= room:
        return first, second
    if cut == "longest":
        small = min(first, second, room // 2)
        return (small, room - small) if first <= second else (room - small, small)
    kept = second if cut == "first" else first
    if kept >= room:
        other = "second" if cut == "first" else "first"
        raise ValueError(f"{name}: {other} has {kept} tokens and leaves no room for {cut} in {room}")
    return (room - kept, kept) if cut == "first" else (kept, room - kept)
