"""Heads of the Kexue stack that judge whole texts: next sentences, classification, several objectives at once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue._tensors import compute_dtype
from kexue.models.configuration import KexueConfig, check_objectives
from kexue.models.heads import (
    HeadedModel,
    KexueOutput,
    LanguageHead,
    LanguageModel,
    check_labels,
    mean_loss,
    refuse_mode,
    shift_labels,
)
from kexue.models.stack import wants_dict

__all__ = ["KexueForNextSentence", "KexueForPreTraining", "KexueForSequenceClassification", "Pooler", "first_tokens"]


class Pooler(nn.Module):
    """The hidden state of the first token of each text, through a dense layer and tanh."""

    def __init__(self, config: KexueConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        return self.dense(x).tanh()


def first_tokens(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(B, T, D) or packed (N, D) -> (B, D)."""
    if cu_seqlens is None:
        if x.shape[1] == 0:
            raise ValueError("every text must have at least one token; got length 0")
        return x[:, 0]
    if x.shape[0] == 0 or bool((cu_seqlens[1:] == cu_seqlens[:-1]).any()):
        raise ValueError("every text must have at least one token; got an empty one in cu_seqlens")
    return x[cu_seqlens[:-1].long()]


class KexueForNextSentence(HeadedModel):
    """Whether the second text of a pair follows the first one (next sentence prediction).

    Args:
        config: A bidirectional :class:`KexueConfig`, with ``type_vocab_size=2`` to tell the texts apart.

    Example:
        >>> config = KexueConfig(vocab_size=50, hidden_size=16, num_layers=2, num_heads=4, type_vocab_size=2)
        >>> model = KexueForNextSentence(config).eval()
        >>> ids, segments = torch.tensor([[2, 4, 3, 7, 3]]), torch.tensor([[0, 0, 0, 1, 1]])
        >>> model(ids, token_type_ids=segments).logits.shape  # index 0: it follows
        torch.Size([1, 2])
    """

    def __init__(self, config: KexueConfig) -> None:
        super().__init__(config)
        refuse_mode(self, config, ("bidirectional",))
        self.pooler = Pooler(config)
        self.next_sentence = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_logits: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Scores (B, 2) of each pair.

        Args:
            input_ids: As in :meth:`KexueModel.forward`, as all arguments that are not named here.
            attention_mask: As above.
            token_type_ids: 0 for the first text, 1 for the second.
            position_ids: As above.
            inputs_embeds: As above.
            labels: (B,), 0 = the second text follows the first, 1 = it does not, -100 = does not count.
            return_logits: None: always, they are two numbers a pair.
            cu_seqlens: As above.
            output_attentions: As above.
            output_hidden_states: As above.
            return_dict: As above.
            num_items_in_batch: As in :meth:`KexueForMaskedLM.forward`.
            **kwargs: As above.

        Returns:
            A :class:`KexueOutput`.

        Raises:
            TypeError: Wrong kind of argument.
            ValueError: As in :meth:`KexueModel.forward`, or labels of another shape or that are not 0, 1 or -100.
        """
        outputs = self.kexue(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, cu_seqlens=cu_seqlens,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=True, **kwargs,
        )  # fmt: skip
        logits = self.next_sentence(self.pooler(first_tokens(outputs.last_hidden_state, cu_seqlens)))
        loss = count = None
        if labels is not None:
            loss, count = _class_loss(logits, labels, num_items_in_batch)
        output = KexueOutput(
            loss=loss, logits=None if return_logits is False else logits, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions, num_items=count,
        )  # fmt: skip
        return output if wants_dict(self.config, return_dict) else output.to_tuple()


def _class_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of (B, C) scores, and the number of labels that count."""
    if isinstance(labels, Tensor) and labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    labels = check_labels("labels", labels, logits.shape[:1])
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (labels != -100) & ((labels < 0) | (labels >= logits.shape[1]))
        if bool(wrong.any()):
            raise ValueError(f"labels must be in [0, {logits.shape[1]}) or -100; got {int(labels[wrong][0])}")
    count = (labels != -100).sum()
    scores = logits.to(compute_dtype(logits))
    total = F.cross_entropy(scores, labels, reduction="sum", ignore_index=-100)
    return mean_loss(total, count, num_items_in_batch), count


class KexueForSequenceClassification(HeadedModel):
    """Classes of texts, of one or several labels each, or numbers.

    The text's vector is the first token's through the pooler, in causal models the last token's.

    Args:
        config: A :class:`KexueConfig`; ``num_labels`` and ``problem_type`` are transformers' keys.

    Example:
        >>> config = KexueConfig(vocab_size=50, hidden_size=16, num_layers=2, num_heads=4, num_labels=3)
        >>> model = KexueForSequenceClassification(config).eval()
        >>> model(torch.tensor([[2, 4, 7, 3]]), labels=torch.tensor([1])).logits.shape
        torch.Size([1, 3])
    """

    def __init__(self, config: KexueConfig) -> None:
        super().__init__(config)
        refuse_mode(self, config, ("bidirectional", "causal"))
        self.pooler = Pooler(config) if config.attn_mode == "bidirectional" else None
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_logits: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Scores (B, C) of each text.

        Args:
            input_ids: As in :meth:`KexueModel.forward`, as all arguments that are not named here.
            attention_mask: As above.
            token_type_ids: As above.
            position_ids: As above.
            inputs_embeds: As above.
            labels: (B,) classes; (B, C) zeros and ones for several labels; (B,) or (B, C) numbers for a regression.
                Which it is says ``config.problem_type``, else ``num_labels`` (1: regression) and the dtype.
            return_logits: None: always.
            cu_seqlens: As above.
            output_attentions: As above.
            output_hidden_states: As above.
            return_dict: As above.
            num_items_in_batch: As in :meth:`KexueForMaskedLM.forward`; (B, C) labels are B C items.
            **kwargs: As above.

        Returns:
            A :class:`KexueOutput`.

        Raises:
            TypeError: Wrong kind of argument.
            ValueError: As in :meth:`KexueModel.forward`, or labels that do not fit.
        """
        outputs = self.kexue(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, cu_seqlens=cu_seqlens,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=True, **kwargs,
        )  # fmt: skip
        x = outputs.last_hidden_state
        if self.pooler is not None:
            pooled = self.pooler(first_tokens(x, cu_seqlens))
        else:
            first_tokens(x, cu_seqlens)  # refuses empty texts
            pooled = self._last_tokens(x, input_ids, attention_mask, cu_seqlens)
        logits = self.classifier(F.dropout(pooled, self.config.dropout, self.training))
        loss = count = None
        if labels is not None:
            loss, count = self._loss(logits, labels, num_items_in_batch)
        output = KexueOutput(
            loss=loss, logits=None if return_logits is False else logits, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions, num_items=count,
        )  # fmt: skip
        return output if wants_dict(self.config, return_dict) else output.to_tuple()

    def _last_tokens(
        self, x: Tensor, input_ids: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        if cu_seqlens is not None:
            return x[cu_seqlens[1:].long() - 1]
        if mask is None and input_ids is not None and self.config.pad_token_id is not None:
            mask = input_ids != self.config.pad_token_id
        if mask is None:
            return x[:, -1]
        order = torch.arange(x.shape[1], device=x.device)
        last = torch.where(mask != 0, order, 0).amax(1)
        return x[torch.arange(x.shape[0], device=x.device), last]

    def _loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels must be a tensor; got {type(labels).__name__}")
        kind = self.config.problem_type
        if kind is None:
            if self.config.num_labels == 1:
                kind = "regression"
            else:
                kind = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        if kind == "single_label_classification":
            return _class_loss(logits, labels, num_items_in_batch)
        scores = logits.to(compute_dtype(logits))
        target = labels.to(scores.dtype)
        if kind == "regression" and target.dim() == 1:
            target = target.unsqueeze(1)
        if target.shape != scores.shape:
            raise ValueError(f"labels must have shape {tuple(scores.shape)} for {kind}; got {tuple(labels.shape)}")
        count = torch.tensor(target.numel(), device=labels.device)
        distance = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
        return mean_loss(distance(scores, target, reduction="sum"), count, num_items_in_batch), count


class KexueForPreTraining(LanguageModel):
    """Several objectives at once, their weighted losses summed: of tokens ("mlm" or "clm") and of pairs ("nsp").

    Args:
        config: A :class:`KexueConfig`.
        objectives: Weights; None: those of the configuration. The model's copy of the configuration keeps them.

    Example:
        >>> config = KexueConfig(50, hidden_size=16, num_layers=2, num_heads=4, mask_token_id=4, type_vocab_size=2)
        >>> model = KexueForPreTraining(config, objectives={"mlm": 1.0, "nsp": 0.5}).eval()
        >>> ids, labels = torch.tensor([[2, 4, 3, 7, 3]]), torch.tensor([[-100, 9, -100, -100, -100]])
        >>> output = model(ids, labels=labels, next_sentence_label=torch.tensor([0]))
        >>> output.next_sentence_logits.shape
        torch.Size([1, 2])
    """

    accepts_loss_kwargs = False  # the two losses are means of different numbers of items

    def __init__(self, config: KexueConfig, objectives: Mapping[str, float] | None = None) -> None:
        if objectives is not None:
            config = copy.deepcopy(config)  # other models may be built from the same one
            config.objectives = check_objectives(objectives, config.attn_mode)
        super().__init__(config)
        refuse_mode(self, config, ("bidirectional", "causal"))
        masked = config.attn_mode == "bidirectional"
        bias = masked if config.head_bias is None else config.head_bias
        self.lm_head = LanguageHead(config, masked and config.head_transform, bias)
        self.pooler = Pooler(config)
        self.next_sentence = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        return_logits: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Scores of tokens and pairs, and the weighted sum of the losses whose labels are given.

        Args:
            input_ids: As in :meth:`KexueModel.forward`, as all arguments that are not named here.
            attention_mask: As above.
            token_type_ids: As above.
            position_ids: As above.
            inputs_embeds: As above.
            labels: As in :class:`KexueForMaskedLM`, in "causal" mode as in :class:`KexueForCausalLM`.
            next_sentence_label: (B,), 0 = the second text follows the first.
            return_logits: Scores of tokens; None: only without ``labels``.
            cu_seqlens: As above.
            output_attentions: As above.
            output_hidden_states: As above.
            return_dict: As above.
            **kwargs: As above.

        Returns:
            A :class:`KexueOutput`; its ``num_items`` counts the labels of tokens, if there are any, else the pairs.

        Raises:
            TypeError: Wrong kind of argument.
            ValueError: As in :meth:`KexueModel.forward`, or labels that do not fit.
        """
        outputs = self.kexue(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, cu_seqlens=cu_seqlens,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=True, **kwargs,
        )  # fmt: skip
        x = outputs.last_hidden_state
        weights, language = self.config.objectives, "clm" if self.config.attn_mode == "causal" else "mlm"
        loss = count = None
        if labels is not None:
            labels = check_labels("labels", labels, x.shape[:-1])
            if language == "clm":
                labels = shift_labels(labels, self.config.pad_token_id, input_ids, attention_mask, cu_seqlens)
            count = (labels != -100).sum()
            loss = weights.get(language, 0.0) * mean_loss(self.lm_head.loss(x, labels), count)
        pairs = self.next_sentence(self.pooler(first_tokens(x, cu_seqlens)))
        if next_sentence_label is not None:
            part, number = _class_loss(pairs, next_sentence_label)
            part = weights.get("nsp", 0.0) * part
            loss, count = (part, number) if loss is None else (loss + part, count)
        wanted = labels is None if return_logits is None else return_logits
        output = KexueOutput(
            loss=loss, logits=self.lm_head(x) if wanted else None, next_sentence_logits=pairs,
            hidden_states=outputs.hidden_states, attentions=outputs.attentions, num_items=count,
        )  # fmt: skip
        return output if wants_dict(self.config, return_dict) else output.to_tuple()
