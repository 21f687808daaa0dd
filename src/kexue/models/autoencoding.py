"""The one-pass masked language model (单次前向的 MLM, T-TA): every token predicted from all the others at once.

Source: 科学空间 7661 (修改Transformer结构,设计一个更快更好的MLM模型); Shin, Lee, Yoon, Jung, "Fast and Accurate Deep
Bidirectional Language Representations for Unsupervised Learning", ACL 2020; streams and mask: :mod:`one_pass`.

    loss = - 1/N sum over the N real tokens of log p(x_i | x without i)
    pseudo-log-likelihood of a text = sum_i log p(x_i | x without i)

An ordinary masked model is trained on 15 % of the tokens of a pass, and scores a text of T tokens in T passes; this one
is trained on all and scores in one. The price: keys and values are those of the embeddings in every layer.
What differs from the published code: the mean is over real tokens, not over batch times length with padding; the
scores of the vocabulary exist in chunks only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kexue._checks import check_int
from kexue.losses import linear_cross_entropy
from kexue.models._scoring import check_ids, check_mask, evaluating
from kexue.models.configuration import KexueConfig
from kexue.models.heads import KexueOutput, LanguageHead, LanguageModel, check_labels, mean_loss, refuse_mode
from kexue.models.stack import wants_dict
from kexue.models.suggestions import Suggestion, special_ids, suggestions

__all__ = ["KexueForTextAutoencoding"]


class KexueForTextAutoencoding(LanguageModel):
    """Predicts each token from all the others in one pass (one-pass masked language model, T-TA).

    Args:
        config: A :class:`KexueConfig` with ``attn_mode="diagonal"`` and a ``mask_token_id``. ``bos_key=False`` takes
            the start key away: the only token of a text is then predicted from its position alone.
            ``self_visible=True`` lets tokens see themselves, for fine-tuning; then nothing here is a likelihood.

    Example:
        >>> config = KexueConfig(50, hidden_size=16, num_layers=2, num_heads=4, attn_mode="diagonal", mask_token_id=4)
        >>> model = KexueForTextAutoencoding(config).eval()
        >>> ids, mask = torch.tensor([[7, 8, 9], [5, 6, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
        >>> model(ids, mask, labels=ids).num_items.item()  # the loss is the mean over five tokens
        5
        >>> model.token_log_probs(ids, mask).shape
        torch.Size([2, 3])
        >>> len(model.suggest(ids, top_k=3, attention_mask=mask)[1])  # one for each token, largest gain first
        2
    """

    def __init__(self, config: KexueConfig) -> None:
        refuse_mode(self, config, ("diagonal",))
        super().__init__(config)
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
        """Scores of all tokens at all positions, or the loss.

        Args:
            input_ids: As in :meth:`KexueModel.forward`, as all arguments that are not named here.
            attention_mask: As above.
            token_type_ids: As above.
            position_ids: As above.
            inputs_embeds: As above.
            labels: Ids to be predicted, usually ``input_ids`` itself; -100 and padding: no loss. With corrupted
                ``input_ids`` this is masked language modelling on all tokens.
            return_logits: None: only without ``labels``.
            cu_seqlens: As above.
            output_attentions: As above; the first of the K keys is the start key, if there is one.
            output_hidden_states: As above.
            return_dict: As above.
            num_items_in_batch: As in :meth:`KexueForMaskedLM.forward`.
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
            padding = None
            if attention_mask is not None:
                padding = attention_mask == 0
            elif input_ids is not None and cu_seqlens is None and self.config.pad_token_id is not None:
                padding = input_ids == self.config.pad_token_id
            labels = labels if padding is None else labels.masked_fill(padding, -100)
            count = (labels != -100).sum()
            loss = mean_loss(self.lm_head.loss(x, labels), count, num_items_in_batch)
        wanted = labels is None if return_logits is None else return_logits
        output = KexueOutput(
            loss=loss, logits=self.lm_head(x) if wanted else None, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions, num_items=count,
        )  # fmt: skip
        return output if wants_dict(self.config, return_dict) else output.to_tuple()

    def token_log_probs(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """Log p of each token given all the others, in one pass and without dropout; no gradient.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, T), 1 or True = takes part; None: all but ``pad_token_id``.
            **inputs: Further inputs of the forward pass, such as ``position_ids``.

        Returns:
            (B, T), 0 at padding; float32, or float64 for a float64 model.

        Raises:
            TypeError: Wrong kind of argument.
            ValueError: Shapes that do not fit, ids outside the vocabulary, or a model whose tokens see themselves.
        """
        real, x = self._states(input_ids, attention_mask, inputs)
        labels = input_ids.long().masked_fill(~real, -100)
        decoder = self.lm_head.decoder
        with torch.no_grad():
            rows = self.lm_head.features(x[real])
            losses = linear_cross_entropy(rows, decoder.weight, labels[real], decoder.bias, reduction="none")
        return losses.new_zeros(input_ids.shape).masked_scatter(real, -losses)

    def pseudo_log_likelihood(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Tensor
    ) -> Tensor:
        """Sum of :meth:`token_log_probs` over the real tokens of each text, for scoring and reranking.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, T), 1 or True = takes part; None: all but ``pad_token_id``.
            **inputs: Further inputs of the forward pass.

        Returns:
            (B,), 0 for a text without tokens.

        Raises:
            TypeError: Wrong kind of argument.
            ValueError: As in :meth:`token_log_probs`.
        """
        return self.token_log_probs(input_ids, attention_mask, **inputs).sum(1)

    def suggest(
        self,
        input_ids: Tensor,
        top_k: int = 5,
        attention_mask: Tensor | None = None,
        *,
        special: Iterable[int] | None = None,
        min_gain: float = -math.inf,
        **inputs: Tensor,
    ) -> list[list[Suggestion]]:
        """What the model would rather read at each position: a check of spelling and fluency in one pass.

        Special tokens (those of the configuration, [MASK] and ``special``) are never suggested, and nothing is
        suggested where one of them stands, except for [MASK], which is there to be filled.

        Args:
            input_ids: (B, T) token ids.
            top_k: Other tokens per position.
            attention_mask: (B, T), 1 or True = takes part; None: all but ``pad_token_id``.
            special: Ids of further special tokens, such as [CLS] and [SEP].
            min_gain: Positions whose best candidate gains less, in nats, are left out; 0 leaves those where another
                token is at least as probable as the one that stands there.
            **inputs: Further inputs of the forward pass.

        Returns:
            For each text its suggestions, largest gain first.

        Raises:
            TypeError: Wrong kind of argument.
            ValueError: As in :meth:`token_log_probs`, ``top_k`` below 1, a special id outside the vocabulary, or a
                ``min_gain`` that is not a number.
        """
        check_int("top_k", top_k, 1)
        if isinstance(min_gain, bool) or not isinstance(min_gain, int | float):
            raise TypeError(f"min_gain must be a number; got {min_gain!r}")
        if math.isnan(min_gain):
            raise ValueError(f"min_gain must be a number; got {min_gain!r}")
        never, silent = special_ids(self.config, special, self.config.mask_token_id)
        real, x = self._states(input_ids, attention_mask, inputs)
        if silent:
            real = real & ~torch.isin(input_ids, input_ids.new_tensor(sorted(silent)))
        places = [(int(b), int(t)) for b, t in real.nonzero().tolist()]
        with torch.no_grad():
            rows = self.lm_head.features(x[real])
        decoder = self.lm_head.decoder
        return suggestions(
            rows, decoder.weight, decoder.bias, places, input_ids[real].long(), len(input_ids), top_k, never, min_gain
        )

    def _states(self, input_ids: Tensor, attention_mask: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Which tokens are real, (B, T) bool, and the hidden states of a pass without dropout and gradient."""
        if self.config.self_visible:
            raise ValueError(
                "tokens of this model see themselves (self_visible=True), so that it gives no likelihood; set "
                "model.config.self_visible = False"
            )
        check_ids(input_ids, self.config.vocab_size)
        real = check_mask(attention_mask, input_ids)
        if real is None:
            pad = self.config.pad_token_id
            real = torch.ones_like(input_ids, dtype=torch.bool) if pad is None else input_ids != pad
        with torch.no_grad(), evaluating(self):
            return real, self.kexue(input_ids, real, **inputs, return_dict=True).last_hidden_state
