"""What may stand in a hole of a sentence: the candidates of CGMH, drawn from a function of the context alone.

For a hole with left and right context the proposal is

    q(y) = (1 - eps) q_K(y) + eps / V,    q_K(y) proportional to w(y) over the K best y by r(y),

with r and w functions of the context, never of the token that stood there. So q(y <- x) and q(x <- y) of a replacement
are two entries of one vector, every token of the allowed vocabulary has a positive probability for eps > 0, and the
reverse of each move is what the acceptance says it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kexue.generation._edits import Batch, Floats, Ints
from kexue.generation._mlm import Conditionals
from kexue.generation._states import Ids, evaluation, forward_options, logits_of
from kexue.generation.ngram_lm import NGramLM

Context = tuple[Ids, Ids]


class Ranker(Protocol):
    """Scores of the allowed tokens in the holes of N sentences."""

    def __call__(self, hole: Batch, position: Ints, rows: Ints | None) -> Tensor:
        """(N, V') log-scores, V' allowed tokens; ``rows``: which chains they belong to, None outside a run."""
        ...


@dataclass
class Candidates:
    """q of N holes.

    Attributes:
        columns: (N, K) columns of the allowed vocabulary.
        log_p: (N, K) log q_K, normalised over the K.
        size: V', the number of allowed tokens.
        eps: Share of the uniform law.
    """

    columns: Ints
    log_p: Floats
    size: int
    eps: float

    def log_q(self, column: Ints) -> Floats:
        """(N,) log q of one token for each hole; -inf for a column of -1, a token that is not allowed."""
        mine = np.where(self.columns == column[:, None], np.exp(self.log_p), 0.0).sum(1)
        mixed = (1.0 - self.eps) * mine + self.eps / self.size
        with np.errstate(divide="ignore"):
            return np.where(column < 0, -np.inf, np.log(mixed))

    def draw(self, mix: Floats, uniform: Floats) -> Ints:
        """(N,) columns from q: ``mix`` decides between the two parts, ``uniform`` within the part."""
        total = np.exp(self.log_p).cumsum(1)
        rank = (total <= (uniform * total[:, -1])[:, None]).sum(1)  # inverse transform on the sums as they were rounded
        best = self.columns[np.arange(len(rank)), np.minimum(rank, total.shape[1] - 1)]
        return np.where(mix < self.eps, np.minimum((uniform * self.size).astype(np.int64), self.size - 1), best)

    def dense(self) -> Floats:
        """(N, V') log q."""
        full = np.zeros((len(self.columns), self.size))
        np.put_along_axis(full, self.columns, np.exp(self.log_p), 1)
        with np.errstate(divide="ignore"):
            return np.log((1.0 - self.eps) * full + self.eps / self.size)


def select(
    ranks: Tensor, count: int, eps: float, reweight: Callable[[Ints], Floats] | None = None, stable: bool = False
) -> Candidates:
    """The ``count`` best of each row.

    Args:
        ranks: (N, V') log-scores; -inf is a token that the context excludes.
        count: K.
        eps: Share of the uniform law.
        reweight: ``columns (N, K) -> (N, K)`` log-weights within the candidates; None: the scores themselves.
        stable: Equal scores in order of the columns. It costs a sort; without it ``topk`` decides, row by row.
    """
    size = ranks.shape[1]
    if count >= size:
        columns = np.broadcast_to(np.arange(size), tuple(ranks.shape)).copy()
        best = ranks
    elif stable:
        best, index = ranks.sort(dim=1, descending=True, stable=True)
        best, columns = best[:, :count], index[:, :count].cpu().numpy()
    else:
        best, index = ranks.topk(count, dim=1)
        columns = index.cpu().numpy()
    weights = best.double().cpu().numpy() if reweight is None else reweight(columns)
    top = weights.max(1, keepdims=True)
    # A context that excludes every candidate says nothing: all of them alike.
    shifted = np.where(np.isfinite(top), weights - np.where(np.isfinite(top), top, 0.0), 0.0)
    with np.errstate(divide="ignore"):
        log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return Candidates(columns, log_p, size, eps)


def contexts_of(hole: Batch, position: Ints) -> list[Context]:
    """(left, right) of each hole as tuples."""
    return [(row[:i], row[i + 1 :]) for row, i in zip(hole.tuples(), position.tolist(), strict=True)]


class FunctionRanker:
    """Scores from a function of the user.

    Args:
        function: ``list of (left, right) -> (N, V)`` log-scores, one column for each token id.
        vocab: Allowed ids.
    """

    def __init__(self, function: Callable[[list[Context]], Any], vocab: Ints) -> None:
        self.function, self.vocab = function, vocab

    def __call__(self, hole: Batch, position: Ints, rows: Ints | None) -> Tensor:
        scores = torch.as_tensor(np.asarray(self.function(contexts_of(hole, position)), dtype=np.float64))
        if scores.dim() != 2 or scores.shape[0] != len(hole) or scores.shape[1] <= int(self.vocab.max()):
            raise ValueError(
                f"proposal must return scores of shape ({len(hole)}, V) with V above the largest allowed id, "
                f"{int(self.vocab.max())}; got {tuple(scores.shape)}"
            )
        return _checked(scores[:, torch.from_numpy(self.vocab)])


class SentenceRanker:
    """Scores of the whole sentence with each allowed token in the hole, for targets that have no conditionals.

    Args:
        log_p: ``list of ids -> (N,)``.
        vocab: Allowed ids.
    """

    def __init__(self, log_p: Callable[[list[Ids]], NDArray[np.float64]], vocab: Ints) -> None:
        self.log_p, self.vocab = log_p, vocab

    def __call__(self, hole: Batch, position: Ints, rows: Ints | None) -> Tensor:
        texts = [(*left, v, *right) for left, right in contexts_of(hole, position) for v in self.vocab.tolist()]
        scores = np.asarray(self.log_p(texts), dtype=np.float64).reshape(len(hole), len(self.vocab))
        return _checked(torch.from_numpy(scores))


def _checked(scores: Tensor) -> Tensor:
    if bool((scores.isnan() | (scores == torch.inf)).any()):
        raise ValueError("the proposal gives NaN or +inf as the score of a token; expected finite numbers or -inf")
    return scores


class MaskedRanker:
    """Scores from a masked language model (or a one-pass one), one forward pass for all holes.

    Args:
        mlm: Module whose ``forward(input_ids)`` gives logits (B, T, V).
        mask_token_id: Token that stands in the hole.
        vocab: Allowed ids.
        prefix: Ids before every text, such as [CLS].
        suffix: Ids after every text, such as [SEP].
    """

    def __init__(
        self, mlm: nn.Module, mask_token_id: int, vocab: Ints, prefix: Sequence[int] = (), suffix: Sequence[int] = ()
    ) -> None:
        self.mlm, self.mask, self.prefix, self.suffix = mlm, mask_token_id, tuple(prefix), tuple(suffix)
        self.vocab = torch.from_numpy(vocab)
        self.device = next((p.device for p in mlm.parameters()), torch.device("cpu"))
        sized = isinstance(getattr(getattr(mlm, "config", None), "vocab_size", None), int)
        takes_mask = "attention_mask" in inspect.signature(mlm.forward).parameters
        self._fast = Conditionals(mlm, None, mask_token_id, 1.0, 0, ()) if sized and takes_mask else None

    def __call__(self, hole: Batch, position: Ints, rows: Ints | None) -> Tensor:
        before, index = len(self.prefix), np.arange(len(hole))
        lengths = hole.lengths + before + len(self.suffix)
        width = int(lengths.max())
        ids = np.full((len(hole), width), self.mask, np.int64)
        ids[:, :before] = self.prefix
        inner = int(hole.lengths.max())
        ids[:, before : before + inner] = hole.ids[:, :inner]
        ids[index, before + position] = self.mask
        for offset, token in enumerate(self.suffix):
            ids[index, before + hole.lengths + offset] = token
        place = torch.from_numpy(position + before).to(self.device)
        tokens = torch.from_numpy(ids).to(self.device)
        real = torch.from_numpy(np.arange(width) < lengths[:, None]).to(self.device)
        with torch.inference_mode(), evaluation(self.mlm):
            if self._fast is not None:
                scores = self._fast.log_probs(tokens, real, place[:, None])[:, 0]
            else:
                scores = self._by_length(tokens, place, lengths)
        return _checked(scores[:, self.vocab.to(self.device)])

    def _by_length(self, tokens: Tensor, place: Tensor, lengths: Ints) -> Tensor:
        """For a model that knows no padding: texts of one length at a time."""
        found: dict[int, Tensor] = {}
        options = forward_options(self.mlm)
        for length in np.unique(lengths).tolist():
            some = np.flatnonzero(lengths == length)
            chosen = torch.from_numpy(some).to(self.device)
            logits = logits_of(self.mlm(tokens[chosen, :length], **options))
            values = logits[torch.arange(len(some), device=self.device), place[chosen]].log_softmax(-1)
            found.update(zip(some.tolist(), values, strict=True))
        return torch.stack([found[row] for row in range(len(lengths))])


class CausalRanker:
    """Scores p(y | what stands before the hole) from the target's own causal model.

    Within a run they come from the hidden states that the scorer keeps; elsewhere from a forward pass.

    Args:
        lm: Module whose ``forward(input_ids)`` gives logits (B, T, V).
        bos_id: Token before every text; None: nothing is known of the first token.
        vocab: Allowed ids.
    """

    def __init__(self, lm: nn.Module, bos_id: int | None, vocab: Ints) -> None:
        self.lm, self.head = lm, () if bos_id is None else (bos_id,)
        self.vocab = torch.from_numpy(vocab)
        self.kept: Callable[[Ints, Ints], Tensor] | None = None

    def __call__(self, hole: Batch, position: Ints, rows: Ints | None) -> Tensor:
        if rows is not None and self.kept is not None:
            found = self.kept(rows, position)
            return _checked(found[:, self.vocab.to(found.device)])
        texts = [(*self.head, *left) for left, _ in contexts_of(hole, position)]
        device = next((p.device for p in self.lm.parameters()), torch.device("cpu"))
        scores = torch.zeros((len(texts), len(self.vocab)), device=device)
        some = [i for i, text in enumerate(texts) if text]
        if some:
            longest = max(len(texts[i]) for i in some)
            ids = torch.tensor([texts[i] + (0,) * (longest - len(texts[i])) for i in some], device=device)
            last = torch.tensor([len(texts[i]) - 1 for i in some], device=device)
            with torch.inference_mode(), evaluation(self.lm):
                mask = {"attention_mask": torch.arange(longest, device=device) <= last[:, None]}
                takes = "attention_mask" in inspect.signature(self.lm.forward).parameters
                logits = logits_of(self.lm(ids, **(mask if takes else {}), **forward_options(self.lm)))
                rows_ = logits[torch.arange(len(some), device=device), last].float().log_softmax(-1)
            scores[some] = rows_[:, self.vocab.to(device)]
        return _checked(scores)


class TableRanker:
    """Scores p(y | the n - 1 words before the hole) of an n-gram table; the candidates are reweighted by the sentence.

    Args:
        lm: The model.
        vocab: Allowed ids.
    """

    reweights = True

    def __init__(self, lm: NGramLM, vocab: Ints) -> None:
        self.lm, self.vocab = lm, vocab

    def __call__(self, hole: Batch, position: Ints, rows: Ints | None) -> Tensor:
        reach, begin = self.lm.order - 1, self.lm.vocab_size
        scores = np.empty((len(hole), len(self.vocab)))
        for k, (left, _) in enumerate(contexts_of(hole, position)):
            history = ((begin,) * reach + left)[-reach:]
            scores[k] = self.lm.table[history][self.vocab]
        return torch.from_numpy(scores)
