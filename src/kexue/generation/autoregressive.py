"""A language model as a proposal (自回归模型作为提议分布): texts drawn from left to right.

Source: 科学空间 8062 (【搜出来的文本】(一)从文本生成到搜索采样).

    q(x) = prod_t p(x_t | x_<t) p(end | x)       for texts below the greatest length n; at n the text is cut: no end

With :class:`kexue.generation.RejectionSampler` and a target p(x) chi(x) the acceptance is the probability that the
model fulfils the constraint by itself, which falls exponentially with every keyword: the reason for Markov chains.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kexue._checks import check_int
from kexue.generation._states import Ids, as_states, evaluation, forward_options, logits_of
from kexue.generation.ngram_lm import NGramLM
from kexue.generation.targets import Target

__all__ = ["AutoregressiveProposal"]


class AutoregressiveProposal:
    """Draws of a language model, as a proposal for rejection and importance sampling.

    Args:
        lm: A causal language model with BOS and EOS, or an :class:`NGramLM`.
        max_length: Longer texts are cut here, at least 1.
        bos_id: As for :class:`Target`.
        eos_id: As for :class:`Target`.
        tokenizer: As for :class:`Target`.

    Raises:
        TypeError: Another kind of model.
        ValueError: A model without BOS or EOS: it cannot begin or end a text.

    Example:
        >>> lm = NGramLM(np.log([[0.5, 0.2, 0.3], [0.6, 0.1, 0.3], [0.4, 0.5, 0.1]]))
        >>> q = AutoregressiveProposal(lm, max_length=3)
        >>> q.log_prob([(0, 1), (0, 1, 0)]).exp()  # .4 x .2 x .3 (end); .4 x .2 x .6, cut
        tensor([0.0240, 0.0480], dtype=torch.float64)
        >>> len(q.sample((5,)))
        5
    """

    def __init__(
        self,
        lm: nn.Module | NGramLM,
        max_length: int = 32,
        *,
        bos_id: int | str | None = "auto",
        eos_id: int | str | None = "auto",
        tokenizer: Any = None,
    ) -> None:
        check_int("max_length", max_length, 1)
        if not isinstance(lm, nn.Module | NGramLM):
            raise TypeError(f"lm must be a causal language model or an NGramLM; got {type(lm).__name__}")
        self.lm, self.max_length = lm, max_length
        self.bos_id: int | None = None
        self.end: int
        self.vocab_size: int | None
        if isinstance(lm, NGramLM):
            self.end = self.vocab_size = lm.vocab_size
        else:
            ends = Target(lm, tokenizer=tokenizer, bos_id=bos_id, eos_id=eos_id)
            if ends.bos_id is None or ends.eos_id is None:
                raise ValueError(f"the model needs BOS and EOS; got bos_id={ends.bos_id}, eos_id={ends.eos_id}")
            self.bos_id, self.end, self.vocab_size = ends.bos_id, ends.eos_id, ends.vocab_size

    def _next(self, texts: list[Ids]) -> Tensor:
        """(N, V) log-probabilities of the token after texts of equal length, the end among them."""
        if isinstance(self.lm, NGramLM):
            lead = (self.end,) * (self.lm.order - 1)
            rows = [self.lm.table[(*lead, *text)[len(text) :]] for text in texts]
            return torch.from_numpy(np.stack(rows))
        device = next((p.device for p in self.lm.parameters()), torch.device("cpu"))
        ids = torch.tensor([(self.bos_id, *text) for text in texts], device=device)
        logits = logits_of(self.lm(ids, **forward_options(self.lm)))[:, -1]
        return logits.double().log_softmax(-1).cpu()

    def sample(self, shape: tuple[int, ...] = ()) -> list[Ids]:
        """Draw texts; torch's global generator is the source.

        Args:
            shape: (n,), the number of texts.

        Returns:
            n id tuples without BOS and EOS.

        Raises:
            ValueError: A shape that is not (n,).
        """
        if len(shape) != 1:
            raise ValueError(f"shape must be (n,), the number of texts; got {tuple(shape)}")
        check_int("shape", shape[0], 0)
        texts: list[Ids] = [()] * shape[0]
        open_ = list(range(shape[0]))
        with torch.no_grad():
            for _ in range(self.max_length):
                if not open_:
                    break
                law = self._evaluated([texts[i] for i in open_]).exp()
                drawn = torch.multinomial(law, 1)[:, 0].tolist()
                for i, token in zip(open_, drawn, strict=True):
                    if token != self.end:
                        texts[i] = (*texts[i], token)
                open_ = [i for i, token in zip(open_, drawn, strict=True) if token != self.end]
        return texts

    def log_prob(self, x: Any) -> Tensor:
        """Log-probabilities of texts.

        Args:
            x: N id sequences.

        Returns:
            (N,) float64; -inf for a text that is too long or holds the end.

        Raises:
            ValueError: An id outside the vocabulary.
        """
        texts = as_states(x)
        highest = max((max(text) for text in texts if text), default=-1)
        if self.vocab_size is not None and highest >= self.vocab_size:
            raise ValueError(f"token ids must be below the size of the vocabulary, {self.vocab_size}; got {highest}")
        total = torch.zeros(len(texts), dtype=torch.float64)
        with torch.no_grad():
            for t in range(self.max_length):
                rows = [i for i, text in enumerate(texts) if len(text) >= t]
                if not rows:
                    break
                law = self._evaluated([texts[i][:t] for i in rows])
                tokens = [texts[i][t] if len(texts[i]) > t else self.end for i in rows]
                total[rows] += law[torch.arange(len(rows)), tokens]
        wrong = [len(text) > self.max_length or self.end in text for text in texts]
        return total.masked_fill(torch.tensor(wrong, dtype=torch.bool), -torch.inf)

    def _evaluated(self, texts: list[Ids]) -> Tensor:
        if isinstance(self.lm, NGramLM):
            return self._next(texts)
        with evaluation(self.lm):
            return self._next(texts)
