"""Heads of the Kexue stack that predict tokens: masked and causal language models.

The decoder shares its weight with the token embeddings. When labels are given, the head runs on the rows that have one,
in chunks (:func:`kexue.losses.linear_cross_entropy`): at a mask rate of 15 % that is a seventh of the work, and the
(B, T, V) scores exist only if asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kexue._transformers import Cache, GenerationMixin, ModelOutput
from kexue.losses import linear_cross_entropy
from kexue.models.configuration import KexueConfig
from kexue.models.stack import KexueModel, KexuePreTrainedModel, activation, indices, make_norm, wants_dict

__all__ = [
    "HeadedModel",
    "KexueForCausalLM",
    "KexueForMaskedLM",
    "KexueOutput",
    "LanguageHead",
    "LanguageModel",
    "check_labels",
    "mean_loss",
    "refuse_mode",
    "shift_labels",
]


@dataclass
class KexueOutput(ModelOutput):
    """What the heads return.

    Args:
        loss: Scalar, if labels were given: the mean over labels that count, 0 if none does.
        logits: (B, T, V) scores of tokens, (B, C) of classes; None if not asked for.
        next_sentence_logits: (B, 2), of :class:`KexueForPreTraining`; index 0 = the second text follows the first.
        past_key_values: Cache of a causal model.
        hidden_states: As in :class:`KexueModel`.
        attentions: As in :class:`KexueModel`.
        num_items: Number of labels that the loss is the mean of.

    Example:
        >>> KexueOutput(loss=torch.tensor(1.0)).loss.item()
        1.0
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    next_sentence_logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    num_items: Tensor | None = None


class LanguageHead(nn.Module):
    """Hidden states to scores of tokens; the decoder's weight is tied to the embeddings by the model.

    Args:
        config: A :class:`KexueConfig`.
        transform: A dense layer, activation and norm before the decoder.
        bias: Bias of the decoder.
    """

    def __init__(self, config: KexueConfig, transform: bool, bias: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.dense = nn.Linear(width, width) if transform else None
        self.activation = activation(config)
        self.norm = make_norm(config) if transform else None
        self.decoder = nn.Linear(width, config.vocab_size, bias=bias)
        self.decoder.decodes = True  # type: ignore[assignment]  # its starting weights are those of embeddings

    def features(self, x: Tensor) -> Tensor:
        """What the decoder is applied to, (..., D)."""
        return x if self.dense is None else self.norm(self.activation(self.dense(x)))  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self.decoder(self.features(x))

    def loss(self, x: Tensor, labels: Tensor, reduction: str = "sum") -> Tensor:
        """Cross entropy of (..., D) against labels (...), -100 = does not count; the head runs on the others only."""
        if reduction == "sum" and not torch.compiler.is_compiling():
            kept = labels != -100
            x, labels = x[kept], labels[kept]
        return linear_cross_entropy(
            self.features(x), self.decoder.weight, labels, self.decoder.bias, reduction=reduction
        )


def check_labels(name: str, labels: Any, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Labels as int64; raise unless they are integers of the shape."""
    labels = indices(name, labels).long()
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}; got {tuple(labels.shape)}")
    return labels


def mean_loss(total: Tensor, count: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The mean over the labels that count, or over those of the whole accumulated batch."""
    if num_items_in_batch is None:
        return total / count.clamp(min=1)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


class HeadedModel(KexuePreTrainedModel):
    """A model with a stack named ``kexue``."""

    accepts_loss_kwargs = True  # transformers' trainer passes num_items_in_batch

    def __init__(self, config: KexueConfig) -> None:
        super().__init__(config)
        self.kexue = KexueModel(config)

    def get_input_embeddings(self) -> nn.Module:
        """The table of token embeddings."""
        return self.kexue.embeddings.token

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table of token embeddings."""
        self.kexue.embeddings.token = value  # type: ignore[assignment]


class LanguageModel(HeadedModel):
    """A model whose head is a decoder, tied to the embeddings."""

    # What old versions of transformers iterate over, and the map that version 5 wants
    _tied_weights_keys = {"lm_head.decoder.weight": "kexue.embeddings.token.weight"}  # noqa: RUF012
    lm_head: LanguageHead

    def get_output_embeddings(self) -> nn.Module:
        """The decoder."""
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the decoder."""
        new_embeddings.decodes = True  # type: ignore[assignment]
        self.lm_head.decoder = new_embeddings


class KexueForMaskedLM(LanguageModel):
    """Predicts tokens from both sides (masked language model).

    Args:
        config: A :class:`KexueConfig`; ``head_transform`` and ``head_bias`` shape the head.

    Example:
        >>> config = KexueConfig(vocab_size=50, hidden_size=16, num_layers=2, num_heads=4, mask_token_id=4)
        >>> model = KexueForMaskedLM(config).eval()
        >>> ids, labels = torch.tensor([[2, 4, 7, 3]]), torch.tensor([[-100, 9, -100, -100]])
        >>> output = model(ids, labels=labels)
        >>> output.logits is None, output.num_items.item()  # only the row that has a label was decoded
        (True, 1)
        >>> model(ids).logits.shape
        torch.Size([1, 4, 50])
    """

    def __init__(self, config: KexueConfig) -> None:
        super().__init__(config)
        refuse_mode(self, config, ("bidirectional",))
        self.lm_head = LanguageHead(config, config.head_transform, config.head_bias is not False)
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
        """Scores of all tokens at all positions, or the loss at those that have a label.

        Args:
            input_ids: As in :meth:`KexueModel.forward`, as all arguments that are not named here.
            attention_mask: As above.
            token_type_ids: As above.
            position_ids: As above.
            inputs_embeds: As above.
            labels: Ids to be predicted, shaped as ``input_ids``, -100 where nothing is.
            return_logits: None: only without ``labels``.
            cu_seqlens: As above.
            output_attentions: As above.
            output_hidden_states: As above.
            return_dict: As above.
            num_items_in_batch: Number of labels in all batches whose gradients are added up; the loss is the sum over
                this batch divided by it. None: the labels of this batch.
            **kwargs: As above.

        Returns:
            A :class:`KexueOutput`.

        Raises:
            TypeError: Wrong kind of argument.
            ValueError: As in :meth:`KexueModel.forward`, or labels of another shape or outside the vocabulary.
        """
        outputs = self.kexue(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, cu_seqlens=cu_seqlens,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=True, **kwargs,
        )  # fmt: skip
        x = outputs.last_hidden_state
        loss = count = None
        if labels is not None:
            labels = check_labels("labels", labels, x.shape[:-1])
            count = (labels != -100).sum()
            loss = mean_loss(self.lm_head.loss(x, labels), count, num_items_in_batch)
        wanted = labels is None if return_logits is None else return_logits
        output = KexueOutput(
            loss=loss, logits=self.lm_head(x) if wanted else None, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions, num_items=count,
        )  # fmt: skip
        return output if wants_dict(self.config, return_dict) else output.to_tuple()


class KexueForCausalLM(LanguageModel, GenerationMixin):
    """Predicts each token from those before it (causal language model); has transformers' ``generate``.

    Args:
        config: A :class:`KexueConfig` with ``attn_mode="causal"``.

    Example:
        >>> config = KexueConfig(50, hidden_size=16, num_layers=2, num_heads=4, attn_mode="causal")
        >>> model = KexueForCausalLM(config).eval()
        >>> ids = torch.tensor([[2, 4, 7, 3]])
        >>> model(ids, labels=ids).num_items.item()  # the first token is not predicted
        3
        >>> model.generate(ids, max_new_tokens=2, do_sample=False).shape
        torch.Size([1, 6])
    """

    def __init__(self, config: KexueConfig) -> None:
        super().__init__(config)
        refuse_mode(self, config, ("causal",))
        self.lm_head = LanguageHead(config, False, config.head_bias is True)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        return_logits: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Scores of the next token at all positions, or the loss.

        Args:
            input_ids: As in :meth:`KexueModel.forward`, as all arguments that are not named here.
            attention_mask: As above.
            token_type_ids: As above.
            position_ids: As above.
            inputs_embeds: As above.
            past_key_values: As above.
            use_cache: As above.
            labels: Shaped as ``input_ids``, not shifted (``labels=input_ids`` is meant); -100 and padding: no loss.
            return_logits: None: only without ``labels``.
            cu_seqlens: As above; no text predicts the first token of the next one.
            output_attentions: As above.
            output_hidden_states: As above.
            return_dict: As above.
            logits_to_keep: Scores of the last so many positions only, or of these positions; 0: of all.
            num_items_in_batch: As in :meth:`KexueForMaskedLM.forward`.
            **kwargs: As above.

        Returns:
            A :class:`KexueOutput`.

        Raises:
            TypeError: Wrong kind of argument.
            ValueError: As in :meth:`KexueModel.forward`, or labels of another shape or outside the vocabulary.
        """
        outputs = self.kexue(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, past_key_values, use_cache,
            cu_seqlens, output_attentions, output_hidden_states, True, **kwargs,
        )  # fmt: skip
        x = outputs.last_hidden_state
        loss = count = None
        if labels is not None:
            labels = check_labels("labels", labels, x.shape[:-1])
            labels = shift_labels(labels, self.config.pad_token_id, input_ids, attention_mask, cu_seqlens)
            count = (labels != -100).sum()
            loss = mean_loss(self.lm_head.loss(x, labels), count, num_items_in_batch)
        logits = None
        if labels is None if return_logits is None else return_logits:
            if isinstance(logits_to_keep, int):
                kept = slice(-logits_to_keep if logits_to_keep else None, None)
            else:
                kept = logits_to_keep  # type: ignore[assignment]
            logits = self.lm_head(x[kept] if cu_seqlens is not None else x[:, kept])
        output = KexueOutput(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions, num_items=count,
        )  # fmt: skip
        return output if wants_dict(self.config, return_dict) else output.to_tuple()


def shift_labels(
    labels: Tensor, pad: int | None, input_ids: Tensor | None, attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """The label of each position's successor; -100 where there is none, or one of the two is padding."""
    padded = None
    if attention_mask is not None and attention_mask.dim() == 2:
        padded = attention_mask[:, attention_mask.shape[1] - labels.shape[1] :] == 0  # with a cache it is longer
    elif attention_mask is None and pad is not None and input_ids is not None and cu_seqlens is None:
        padded = input_ids == pad
    if padded is not None:
        labels = labels.masked_fill(padded, -100)
    shifted = torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], -100)], -1)
    if padded is not None:
        shifted = shifted.masked_fill(padded, -100)
    if cu_seqlens is not None:
        ends = cu_seqlens[1:].long() - 1
        shifted = shifted.index_fill(0, ends[ends >= 0], -100)
    return shifted


def refuse_mode(model: Any, config: KexueConfig, modes: tuple[str, ...]) -> None:
    """Raise ValueError unless the configuration has one of the modes."""
    if config.attn_mode not in modes:
        wanted = " or ".join(map(repr, modes))
        raise ValueError(f"{type(model).__name__} needs attn_mode={wanted}; got {config.attn_mode!r}")
