"""Pairs of sentences for next sentence prediction (下一句预测), as a function of (seed, step, rank).

    [CLS] A [SEP] B [SEP]    label 0: B follows A in its document;  label 1: B is a random sentence of another document

Source: BERT (arXiv 1810.04805); index 0 is "is next" there and in transformers. A pair with label 0 never crosses the
end of a document, one with label 1 always does. Every sentence that has a successor is A once in each epoch.

What we do differently: a pair that is too long loses the beginning of A and the end of B, so that what stands next to
each other stays; and pairs can be packed into one stream, each of them a text of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kexue._checks import check_int, check_real
from kexue.training._token_ids import check_id, join, ranges
from kexue.training.order import batch_indices, numpy_generator

__all__ = ["NextSentencePairs"]


class NextSentencePairs:
    """Batches of pairs for :func:`kexue.training.fit`.

    Args:
        documents: Documents, each a sequence of sentences, each a sequence of token ids without special ones.
        batch_size: Pairs of one batch, over all ranks.
        max_length: Longest pair with its three special tokens.
        cls_token_id: Id of [CLS].
        sep_token_id: Id of [SEP].
        pad_token_id: Id of padding.
        vocab_size: Size of the vocabulary, to refuse ids outside of it here and not on the GPU.
        negatives: Share of pairs whose second sentence comes from another document.
        seed: Seed of order and negatives.
        rank: See :func:`kexue.training.batch_indices`; without it, ``fit`` gives each process batches of its own.
        world: As above.
        drop_last: As above.
        packed: One stream (N,) with ``cu_seqlens`` and ``position_ids`` instead of padded rows (B, T).
        pad_to_multiple_of: Round the length T of a batch up, so that few shapes occur.
        labels: Name of the labels; :class:`kexue.models.KexueForPreTraining` and transformers' BertForPreTraining call
            them ``next_sentence_label``.

    Raises:
        TypeError: Ids that are no integers.
        ValueError: An empty sentence, no document with two sentences, one document only while ``negatives`` > 0, or a
            setting out of range.

    Example:
        >>> documents = [[[11, 12], [13, 14], [15]], [[21], [22, 23]]]
        >>> pairs = NextSentencePairs(
        ...     documents, batch_size=3, max_length=8, cls_token_id=2, sep_token_id=3, pad_token_id=0, seed=1
        ... )
        >>> batch = pairs(0)
        >>> batch["input_ids"].shape, sorted(batch)
        (torch.Size([3, 7]), ['attention_mask', 'input_ids', 'labels', 'token_type_ids'])
    """

    def __init__(
        self,
        documents: Sequence[Sequence[Any]],
        batch_size: int,
        *,
        max_length: int,
        cls_token_id: int,
        sep_token_id: int,
        pad_token_id: int,
        vocab_size: int | None = None,
        negatives: float = 0.5,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        packed: bool = False,
        pad_to_multiple_of: int = 1,
        labels: str = "labels",
    ) -> None:
        check_int("max_length", max_length, 5)  # three special tokens and one of each sentence
        check_int("pad_to_multiple_of", pad_to_multiple_of, 1)
        check_real("negatives", negatives, minimum=0.0)
        if negatives > 1:
            raise ValueError(f"negatives must be at most 1; got {negatives!r}")
        self.cls = check_id("cls_token_id", cls_token_id, vocab_size)
        self.sep = check_id("sep_token_id", sep_token_id, vocab_size)
        self.pad = check_id("pad_token_id", pad_token_id, vocab_size)
        counts = np.array([len(document) for document in documents], np.int64)
        sentences = [sentence for document in documents for sentence in document]
        self._tokens, self._sizes = join("sentences", sentences, vocab_size)
        document = np.repeat(np.arange(len(counts)), counts)
        if len(empty := np.flatnonzero(self._sizes == 0)):
            where = int(document[empty[0]])
            number = int(empty[0] - counts[:where].sum())
            raise ValueError(f"sentences must not be empty; got an empty one at documents[{where}][{number}]")
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._first = np.flatnonzero(document[1:] == document[:-1])  # sentences that have a successor
        if not len(self._first):
            raise ValueError(f"a document with at least two sentences is needed; got {len(counts)} without")
        if negatives > 0 and int((counts > 0).sum()) < 2:
            raise ValueError("negatives need a second document; got one. Set negatives=0, or give more documents")
        ends = np.cumsum(counts)
        self._document = np.stack([(ends - counts)[document], counts[document]])  # first sentence and size
        self.max_length = int(max_length)
        self.negatives = float(negatives)
        self.seed = seed
        self.rank = rank
        self.packed = packed
        self.multiple = int(pad_to_multiple_of)
        self.labels = labels
        self._order = (batch_size, len(self._first), rank, world, drop_last)
        batch_indices(seed, 0, *self._order)  # bad settings show here

    def __len__(self) -> int:
        """Pairs of an epoch."""
        return len(self._first)

    def pairs(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Numbers of the first and second sentences of a step, counted over all documents, and the labels."""
        first = self._first[batch_indices(self.seed, step, *self._order)]
        generator = numpy_generator(self.seed, step, self.rank)
        labels = (generator.random(len(first)) < self.negatives).astype(np.int64)
        second = first + 1
        begin, size = self._document[:, first]
        # A number among the sentences outside of the document; those behind it are counted on.
        other = generator.integers(0, np.maximum(len(self._sizes) - size, 1))
        other = np.where(other >= begin, other + size, other)
        return first, np.where(labels == 1, other, second), labels

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        """The batch of a step."""
        first, second, labels = self.pairs(step)
        budget = self.max_length - 3
        size_a, size_b = self._sizes[first], self._sizes[second]
        keep_a = np.where(
            size_a + size_b > budget, np.minimum(size_a, np.maximum(budget - size_b, budget - budget // 2)), size_a
        )
        keep_b = np.minimum(size_b, budget - keep_a)
        lengths = keep_a + keep_b + 3
        if self.packed:
            bounds = np.concatenate([[0], np.cumsum(lengths)])
            begin, shape = bounds[:-1], [int(bounds[-1])]
        else:
            width = -(-int(lengths.max(initial=0)) // self.multiple) * self.multiple
            begin, shape = np.arange(len(first)) * width, [len(first), width]
        ids = np.full(math.prod(shape), self.pad, np.int64)
        segments = np.zeros(math.prod(shape), np.int64)
        ids[begin] = self.cls
        ids[begin + 1 + keep_a] = self.sep
        ids[begin + lengths - 1] = self.sep
        in_a, in_b = ranges(keep_a), ranges(keep_b)
        from_a = np.repeat(self._starts[first] + size_a - keep_a, keep_a) + in_a
        from_b = np.repeat(self._starts[second], keep_b) + in_b
        ids[np.repeat(begin + 1, keep_a) + in_a] = self._tokens[from_a]
        ids[np.repeat(begin + 2 + keep_a, keep_b) + in_b] = self._tokens[from_b]
        segments[np.repeat(begin + 2 + keep_a, keep_b + 1) + ranges(keep_b + 1)] = 1
        batch = {
            "input_ids": torch.from_numpy(ids.reshape(shape)),
            "token_type_ids": torch.from_numpy(segments.reshape(shape)),
            self.labels: torch.from_numpy(labels),
        }
        if self.packed:
            batch["cu_seqlens"] = torch.from_numpy(bounds.astype(np.int32))
            batch["position_ids"] = torch.from_numpy(ranges(lengths))
        else:
            mask = np.arange(shape[1]) < lengths[:, None]
            batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        return batch
