"""Prefix language model (前缀语言模型, UniLM): reads a source from both sides and writes a target after it.

Source: UniLM (Dong et al., arXiv 1905.03197), as used in 科学空间 8046 (SPACES:“抽取-生成”式长文本摘要); pointers:
Vinyals et al., arXiv 1506.03134, and See et al., arXiv 1704.04368.

    [CLS] source [SEP] [CLS] target [SEP]        segments 0 ... 0 1 ... 1, from the second [CLS] on
    position i sees j  if  cumsum(segments)[j] <= cumsum(segments)[i]
    h = hidden state,  f = transform(h)
    score of token v   = logsumexp of  <f, E_v>  and, for every source position j that holds v,
                         <Q f, K f_j> / sqrt(D) + c_m + p_b(j) + r [v stands in the target already]
                         m = 0, 1, 2 tokens before j that equal the latest ones of the target; b(j): half octave of j
    O, B, I logits     = C f                     (not copied, copied, copied and continuing the span)

Token scores use the table of embeddings E. The second [CLS] predicts the first token of the target, so that decoding
begins with a token that training has seen in this place.

What we do differently, and why: the pointer term. A model that is trained from scratch on a thousand pairs has no time
to learn how a token of the source comes out of the decoder; pointed at, it needs not be in a trained row of E at all.
The learned numbers c (c_0 = 0), p and r say at once what attention takes thousands of steps to find out: where a copied
run goes on, that summaries begin where their sources do, and that they do not say the same twice.
``pointer=False`` in the configuration leaves it out. Positions are counted without padding, so padding may stand
anywhere, between source and target as well; rotary positions have no limit of length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue._checks import check_int
from kexue._tensors import compute_dtype
from kexue.losses import sparse_cross_entropy
from kexue.models.configuration import KexueConfig
from kexue.models.heads import KexueOutput, LanguageHead, LanguageModel, check_labels, mean_loss, refuse_mode
from kexue.models.stack import check_range, wants_dict

__all__ = ["KexueForPrefixLM", "Memory", "PrefixLMOutput"]

FOLLOW, AGAIN = (2.0, 3.0), -1.0  # c and r at the start
OCTAVES = 12
_REFUSED = ("inputs_embeds", "past_key_values", "use_cache")


@dataclass
class PrefixLMOutput(KexueOutput):
    """What :class:`KexueForPrefixLM` returns: a KexueOutput with the logits of copying.

    Args:
        copy_logits: (B, T, 3) of O, B, I: those of a source position are about its own token, those of a target
            position about the token that follows.

    Example:
        >>> PrefixLMOutput(copy_logits=torch.zeros(1, 4, 3)).copy_logits.shape
        torch.Size([1, 4, 3])
    """

    copy_logits: Tensor | None = None


@dataclass
class Memory:
    """What is pointed at: the source as the pointer sees it.

    Args:
        keys: (B, S, D).
        mask: (B, S) bool, the tokens that exist.
        tokens: (B, S) distinct ids of each row, filled up with the first of them.
        place: (B, S) where the id of each position stands in ``tokens``.
        before: (B, S, 2) the one and the two ids before each; -1 where there is none, or the mark that begins it.
        ids: (B, S), -1 where there is none.
        half_octave: (B, S), the class of each position by its distance from the beginning.
    """

    keys: Tensor
    mask: Tensor
    tokens: Tensor
    place: Tensor
    before: Tensor
    ids: Tensor
    half_octave: Tensor

    def select(self, rows: Tensor) -> Memory:
        """The memory of these rows."""
        return Memory(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


class KexueForPrefixLM(LanguageModel):
    """Writes a text after a source that it reads from both sides; predicts besides which tokens are copied.

    Args:
        config: A :class:`KexueConfig` with ``attn_mode="prefix"``; ``type_vocab_size=2`` embeds the segments.

    Example:
        >>> config = KexueConfig(50, 16, 2, 4, attn_mode="prefix", position="rope", type_vocab_size=2)
        >>> model = KexueForPrefixLM(config).eval()
        >>> ids = torch.tensor([[2, 7, 8, 3, 2, 8, 3]])  # [CLS] 7 8 [SEP] [CLS] 8 [SEP]
        >>> segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
        >>> model(ids, token_type_ids=segments, labels=ids).num_items.item()  # 8 and [SEP]
        2
        >>> model(ids, token_type_ids=segments).copy_logits.shape
        torch.Size([1, 7, 3])
    """

    def __init__(self, config: KexueConfig) -> None:
        super().__init__(config)
        refuse_mode(self, config, ("prefix",))
        self.lm_head = LanguageHead(config, config.head_transform, config.head_bias is not False)
        width = config.hidden_size
        self.copy_head = nn.Linear(width, 3)
        self.query = nn.Linear(width, width, bias=False) if config.pointer else None
        self.key = nn.Linear(width, width, bias=False) if config.pointer else None
        self.follow = nn.Parameter(torch.tensor(FOLLOW)) if config.pointer else None
        self.again = nn.Parameter(torch.tensor(AGAIN)) if config.pointer else None
        self.where = nn.Parameter(torch.zeros(OCTAVES * 2)) if config.pointer else None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        top_k: int | None = None,
        return_logits: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Scores of the next token at all positions, or the loss over the target; and the logits of copying.

        Args:
            input_ids: (B, T) source and target; the target may be noisy.
            attention_mask: (B, T), as in :meth:`KexueModel.forward`, as all arguments that are not named here.
            token_type_ids: (B, T), 0 for the source, 1 from the second [CLS] on.
            position_ids: As above.
            labels: (B, T) clean ids, not shifted; a token is predicted if it and the one before it have segment 1.
                -100 and padding: no loss.
            top_k: Sparse cross entropy over so many logits; None: dense.
            return_logits: None: only without ``labels``.
            output_attentions: As above.
            output_hidden_states: As above.
            return_dict: As above.
            num_items_in_batch: Number of labels in all batches whose gradients are added up.
            **kwargs: As above.

        Returns:
            A :class:`PrefixLMOutput`.

        Raises:
            TypeError: Wrong kind of argument.
            ValueError: As in :meth:`KexueModel.forward`, labels of another shape or outside the vocabulary (checked on
                the CPU), a cache or ``inputs_embeds``.
        """
        if top_k is not None:
            check_int("top_k", top_k, 1)
        for name in _REFUSED:
            value = kwargs.pop(name, None)
            if value is not None and value is not False:
                raise ValueError(f"input_ids must be whole rows, since the pointer reads them; got {name}")
        if getattr(attention_mask, "ndim", 2) != 2:
            raise ValueError(f"attention_mask must have shape (B, T); got {tuple(attention_mask.shape)}")  # type: ignore[union-attr]
        outputs = self.kexue(
            input_ids, attention_mask, token_type_ids, position_ids, output_attentions=output_attentions,
            output_hidden_states=output_hidden_states, return_dict=True, **kwargs,
        )  # fmt: skip
        features = self.lm_head.features(outputs.last_hidden_state)
        there = self._there(input_ids, attention_mask)
        target = torch.zeros_like(there) if token_type_ids is None else token_type_ids.bool()
        predicted = there & target
        memory = self.remember(input_ids, features, there & ~target)
        loss = count = None
        if labels is not None:
            labels = check_labels("labels", labels, features.shape[:-1])
            check_range("labels", labels.masked_fill(labels == -100, 0), self.config.vocab_size)
            labels = labels[:, 1:].masked_fill(~(predicted[:, 1:] & predicted[:, :-1]), -100)
            labels = F.pad(labels, (0, 1), value=-100)
            count = (labels != -100).sum()
            loss = mean_loss(
                self._loss(features, memory, input_ids, predicted, labels, top_k), count, num_items_in_batch
            )
        wanted = labels is None if return_logits is None else return_logits
        logits = None
        if wanted:
            logits = self.scores(features, memory, latest(input_ids), said_so_far(memory, input_ids, predicted))
        output = PrefixLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions, num_items=count, copy_logits=self.copy_head(features),
        )  # fmt: skip
        return output if wants_dict(self.config, return_dict) else output.to_tuple()

    def _there(self, ids: Any, mask: Any) -> Tensor:
        if mask is not None:
            return mask != 0
        pad = self.config.pad_token_id
        return torch.ones_like(ids, dtype=torch.bool) if pad is None else ids != pad

    def remember(self, input_ids: Any, features: Tensor, mask: Tensor) -> Memory | None:
        """The source as the pointer sees it; None without a pointer.

        Args:
            input_ids: (B, T).
            features: (B, T, D), what the decoder is applied to.
            mask: (B, T) bool, the tokens of the source.
        """
        if self.key is None:
            return None
        last = input_ids.shape[1]
        if not torch.compiler.is_compiling() and mask.numel():
            places = torch.arange(1, last + 1, device=mask.device)
            last = max(1, int((mask.any(0) * places).amax()))  # the rest is target
        ids, mask = input_ids[:, :last].long(), mask[:, :last]
        ids = torch.where(mask, ids, ids[:, :1])
        ordered, order = ids.sort(dim=1, stable=True)
        rank = (ordered != _earlier(ordered, 1, -1)).cumsum(1) - 1
        place = torch.zeros_like(rank).scatter(1, order, rank)
        tokens = ordered[:, :1].expand_as(ordered).scatter(1, rank, ordered)
        count = mask.cumsum(1)
        inner = ids.masked_fill(~mask | (count == 1), -1)
        before = torch.stack([_earlier(inner, 1, -1), _earlier(inner, 2, -1)], -1)
        octave = (2 * count.clamp(min=1).to(torch.float32).log2()).long().clamp(max=2 * OCTAVES - 1)
        keys = self.key(features[:, :last])
        return Memory(keys, mask, tokens, place, before, ids.masked_fill(~mask, -1), octave)

    def scores(self, features: Tensor, memory: Memory | None, written: Tensor, said: Tensor) -> Tensor:
        """Scores of the next token.

        Args:
            features: (B, T, D), of target positions.
            memory: Of the same B rows.
            written: (B, T, 2) the latest id at each position and the one before it.
            said: (B, T, S) bool, whether the token of a source position stands in the target up to each position.

        Returns:
            (B, T, V), float32 for lower precision with a pointer.
        """
        plain = self.lm_head.decoder(features)
        if memory is None or self.query is None:
            return plain
        pointed = self._pointed(features, memory, written, said)
        shape = pointed.shape
        return _joined(plain, pointed, memory.place[:, None].expand(shape), memory.tokens[:, None].expand(shape))

    def _pointed(self, features: Tensor, memory: Memory, written: Tensor, said: Tensor) -> Tensor:
        """(B, T, S) scores of the source positions, -inf where there is no token."""
        scores = self.query(features) @ memory.keys.transpose(1, 2)  # type: ignore[misc]
        scores = scores.to(compute_dtype(scores)) / math.sqrt(features.shape[-1])
        one = written[..., None, 0] == memory.before[:, None, :, 0]
        two = one & (written[..., None, 1] == memory.before[:, None, :, 1])
        first, second = self.follow.to(scores.dtype).unbind()  # type: ignore[union-attr]
        scores = scores + torch.where(two, second, torch.where(one, first, 0.0))
        scores = scores + self.where.to(scores.dtype)[memory.half_octave][:, None]  # type: ignore[union-attr]
        scores = scores + torch.where(said, self.again.to(scores.dtype), 0.0)  # type: ignore[union-attr]
        return scores.masked_fill(~memory.mask[:, None], -torch.inf)

    def _loss(
        self,
        features: Tensor,
        memory: Memory | None,
        input_ids: Any,
        target: Tensor,
        labels: Tensor,
        top_k: int | None,
    ) -> Tensor:
        """Sum over the positions that have a label; only those are decoded, but for a compiler, which wants sizes."""
        if torch.compiler.is_compiling():
            said = said_so_far(memory, input_ids, target)
            scores, wanted = self.scores(features, memory, latest(input_ids), said).flatten(0, 1), labels.flatten()
        else:
            row, column = (labels != -100).nonzero(as_tuple=True)
            scores, wanted = self.lm_head.decoder(features[row, column]), labels[row, column]
            if memory is not None:
                first = int(column.amin()) if len(column) else 0
                said = said_so_far(memory, input_ids[:, first:], target[:, first:])
                pointed = self._pointed(features[:, first:], memory, latest(input_ids)[:, first:], said)
                pointed = pointed[row, column - first]
                scores = _joined(scores, pointed, memory.place[row], memory.tokens[row])
        if top_k is None:
            return F.cross_entropy(scores.to(compute_dtype(scores)), wanted, reduction="sum")
        return sparse_cross_entropy(scores, wanted, k=top_k, reduction="sum")


def latest(ids: Any) -> Tensor:
    """(B, T) ids -> (B, T, 2) each with the one before it; -2 where there is none."""
    return torch.stack([ids.long(), _earlier(ids.long(), 1, -2)], -1)


def _earlier(x: Tensor, steps: int, value: int) -> Tensor:
    """(B, T) what stands so many steps before each; ``value`` where there is nothing."""
    return F.pad(x, (steps, 0), value=value)[:, : x.shape[1]]


def said_so_far(memory: Memory | None, ids: Any, target: Tensor) -> Any:
    """(B, T, S) bool, whether the token of a source position stands among the target's up to each position."""
    if memory is None:
        return None
    found = (ids[:, :, None] == memory.ids[:, None]) & target[:, :, None]
    return found.cumsum(1, dtype=torch.int32) > 0


def _joined(plain: Tensor, pointed: Tensor, place: Tensor, tokens: Tensor) -> Tensor:
    """Logsumexp of the plain score of a token and of the scores of its positions.

    Args:
        plain: (..., V).
        pointed: (..., S), -inf where nothing may be pointed at.
        place: (..., S), where the token of a position stands in ``tokens``.
        tokens: (..., S), distinct tokens; others are repeated and have no position.
    """
    if not pointed.shape[-1]:
        return plain
    top = pointed.detach().amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    mass = torch.zeros_like(pointed).scatter_add(-1, place, (pointed - top).exp())
    tiny = torch.finfo(mass.dtype).tiny
    seen = mass > tiny
    lifted = torch.where(seen, mass, 1.0).log() + top
    old = plain.to(pointed.dtype)
    # differences instead of sums: tokens that stand several times in the list get their difference once, the rest 0
    change = torch.where(seen, F.softplus(lifted - old.gather(-1, tokens)), 0.0)
    return old.scatter_add(-1, tokens, change)
