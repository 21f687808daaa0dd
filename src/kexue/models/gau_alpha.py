"""GAU-α (GAU-alpha): an encoder of gated attention units with entropy-invariant softmax, as transformers models.

Source: 科学空间 9052 (GAU-α:尝鲜体验快好省的下一代Attention), 9019; the released model and its PyTorch port, whose
checkpoints load here: same config keys, same parameter names, decoder tied to the word embeddings, no transform and no
bias in it.

    x_0 = RMS(token + segment embedding)      x_l = RMS(x_{l-1} + dropout(GAU(x_{l-1})))      logits = x_L E^T

RMS divides by the root mean square (eps 1e-12) and has no parameters; there is no position table (RoPE in every unit),
no bias, no offset of queries and keys. Weights start from a truncated normal of standard deviation
1.1368 / sqrt(h) L^(-1/3) before truncation at 2 of them (1.1368 makes up for the truncation), h the inputs of a layer,
the rows of a table, the columns if these are above 10000 or below 10.

What differs from the port: padding is excluded exactly instead of by -1e4, which was then multiplied by log n and let
padded keys in at short lengths; log n is taken of at least 16 tokens, as in the author's later code
(``attention_min_length=2`` gives the port's scale from 2 tokens on); scores exist in tiles only; any length works, not
512 tokens at most; no loss over no labels is 0, not NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue._checks import check_choice, check_int, check_real
from kexue._tensors import check_float, compute_dtype
from kexue._transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    BaseModelOutput,
    MaskedLMOutput,
    PretrainedConfig,
    PreTrainedModel,
)
from kexue.attention.gated_attention import (
    NORMALIZATIONS,
    GatedAttentionUnit,
    ScaleOffset,
    check_dropout,
    check_padding_mask,
)

__all__ = ["GAUAlphaConfig", "GAUAlphaForMaskedLM", "GAUAlphaModel"]

_NORMALIZATION_NAMES = {"squared_relu": "relu2_n"}  # the port's name


class GAUAlphaConfig(PretrainedConfig):
    """Sizes and options of a GAU-α model; the defaults are those of the released one.

    Args:
        vocab_size: V.
        hidden_size: D.
        intermediate_size: E, width of gate and values.
        num_hidden_layers: Number L of gated attention units; two of them do the work of an attention and an FFN layer.
        attention_key_size: s, even.
        hidden_dropout_prob: Dropout of the embeddings and of the output of each unit.
        attention_probs_dropout_prob: Dropout of attention weights.
        pad_token_id: Id of padding; without an ``attention_mask`` these tokens are hidden. None: no token is.
        type_vocab_size: Number of segments.
        layer_norm_eps: Added to the mean square.
        normalization: Of the attention, as in :class:`kexue.attention.GatedAttentionUnit` ("squared_relu", the port's
            name of "relu2_n", is understood).
        use_bias: Biases of the linear maps, and offsets of queries and keys.
        attention_base: Length at which "softmax_plus" is softmax.
        attention_min_length: "softmax_plus" counts at least this many tokens.
        tie_word_embeddings: The decoder's weight is the table of word embeddings.
        hidden_act: "swish" or "silu", two names of the same function; there is no other.
        attention_scale: True; there is no other.
        embedding_size: None or ``hidden_size``; there is no other.
        **kwargs: Passed on to transformers.

    Raises:
        TypeError: A size that is no integer.
        ValueError: A value out of range or not supported.

    Example:
        >>> GAUAlphaConfig(vocab_size=100, num_hidden_layers=2).intermediate_size
        1536
    """

    model_type = "gau_alpha"

    def __init__(
        self,
        vocab_size: int = 12000,
        hidden_size: int = 768,
        intermediate_size: int = 1536,
        num_hidden_layers: int = 24,
        attention_key_size: int = 128,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        pad_token_id: int | None = 0,
        type_vocab_size: int = 2,
        layer_norm_eps: float = 1e-12,
        normalization: str = "softmax_plus",
        use_bias: bool = False,
        attention_base: float = 512.0,
        attention_min_length: int = 16,
        tie_word_embeddings: bool = True,
        hidden_act: str = "swish",
        attention_scale: bool = True,
        embedding_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        sizes = {
            "vocab_size": vocab_size, "hidden_size": hidden_size, "intermediate_size": intermediate_size,
            "num_hidden_layers": num_hidden_layers, "attention_key_size": attention_key_size,
            "type_vocab_size": type_vocab_size,
        }  # fmt: skip
        for name, value in sizes.items():
            check_int(name, value, 1)
        if attention_key_size % 2:
            raise ValueError(f"attention_key_size must be even, rotations act on pairs; got {attention_key_size}")
        check_dropout("hidden_dropout_prob", hidden_dropout_prob)
        check_dropout("attention_probs_dropout_prob", attention_probs_dropout_prob)
        check_real("layer_norm_eps", layer_norm_eps, above=0.0)
        check_real("attention_base", attention_base, above=1.0)
        check_int("attention_min_length", attention_min_length, 2)
        normalization = _NORMALIZATION_NAMES.get(normalization, normalization)
        check_choice("normalization", normalization, NORMALIZATIONS)
        check_choice("hidden_act", hidden_act, ("swish", "silu"))
        if attention_scale is not True:
            raise ValueError(f"attention_scale must be True (scores are divided by sqrt(s)); got {attention_scale!r}")
        if embedding_size not in (None, hidden_size):
            raise ValueError(f"embedding_size must be hidden_size, {hidden_size}, or None; got {embedding_size!r}")
        if pad_token_id is not None:
            check_int("pad_token_id", pad_token_id, 0)
            if pad_token_id >= vocab_size:
                raise ValueError(f"pad_token_id must be below vocab_size, {vocab_size}; got {pad_token_id}")
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.attention_key_size = num_hidden_layers, attention_key_size
        self.hidden_dropout_prob, self.attention_probs_dropout_prob = hidden_dropout_prob, attention_probs_dropout_prob
        self.type_vocab_size, self.layer_norm_eps, self.normalization = type_vocab_size, layer_norm_eps, normalization
        self.use_bias, self.attention_base, self.attention_min_length = use_bias, attention_base, attention_min_length
        self.hidden_act, self.attention_scale, self.embedding_size = hidden_act, attention_scale, embedding_size
        self.pad_token_id, self.tie_word_embeddings = pad_token_id, tie_word_embeddings
        kwargs |= {"pad_token_id": pad_token_id, "tie_word_embeddings": tie_word_embeddings}
        super().__init__(**kwargs)


def _root_mean_square_norm(x: Tensor, eps: float) -> Tensor:
    """Divide by sqrt(mean x^2 + eps), without parameters."""
    y = x.to(compute_dtype(x))
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class _Embeddings(nn.Module):
    def __init__(self, config: GAUAlphaConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.eps, self.dropout = config.layer_norm_eps, config.hidden_dropout_prob

    def forward(self, words: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """(B, T, D) word vectors and (B, T) segments -> (B, T, D)."""
        table = self.token_type_embeddings
        segments = table.weight[0] if token_type_ids is None else table(token_type_ids)
        return F.dropout(_root_mean_square_norm(words + segments, self.eps), self.dropout, self.training)


class _Layer(nn.Module):
    def __init__(self, config: GAUAlphaConfig) -> None:
        super().__init__()
        self.gau = GatedAttentionUnit(
            config.hidden_size,
            config.intermediate_size / config.hidden_size,
            config.attention_key_size,
            config.normalization,
            bias=config.use_bias,
            offset=config.use_bias,
            attention_dropout=config.attention_probs_dropout_prob,
            base=config.attention_base,
            min_length=config.attention_min_length,
        )
        self.eps, self.dropout = config.layer_norm_eps, config.hidden_dropout_prob

    def forward(self, x: Tensor, mask: Tensor | None, matrix: bool) -> tuple[Tensor, Tensor | None]:
        """The next hidden states and, if asked for, the weights (B, 1, T, T)."""
        out, weights = self.gau.attend(x, mask) if matrix else (self.gau(x, mask), None)
        out = _root_mean_square_norm(x + F.dropout(out, self.dropout, self.training), self.eps)
        return out, None if weights is None else weights[:, None]


class _Encoder(nn.Module):
    def __init__(self, config: GAUAlphaConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, mask: Tensor | None, matrices: bool, states: bool) -> tuple[Any, ...]:
        """The last hidden states; all of them, or None; the weights of all layers, or None."""
        hidden, weights = [x], []
        for layer in self.layer:
            if self.gradient_checkpointing and self.training:
                x, matrix = self._gradient_checkpointing_func(layer.__call__, x, mask, matrices)  # type: ignore[operator]
            else:
                x, matrix = layer(x, mask, matrices)
            if states:
                hidden.append(x)
            weights.append(matrix)
        return x, tuple(hidden) if states else None, tuple(weights) if matrices else None


class _GAUAlphaPreTrainedModel(PreTrainedModel):
    config_class = GAUAlphaConfig
    base_model_prefix = "gau_alpha"
    supports_gradient_checkpointing = True
    _no_split_modules = ["_Layer"]  # noqa: RUF012
    # The trainer divides the loss by accumulated steps itself: no forward here takes the number of items.
    accepts_loss_kwargs = False

    def _init_weights(self, module: nn.Module) -> None:
        """Start values; transformers keeps torch's init functions from touching parameters that were loaded."""
        if isinstance(module, nn.Linear | nn.Embedding):
            rows, columns = module.weight.shape
            if isinstance(module, nn.Linear):
                rows, columns = columns, rows  # kernels are counted as (inputs, outputs)
            width = columns if rows > 10000 or rows < 10 else rows
            std = 1.13684723 / width**0.5 * self.config.num_hidden_layers ** (-1 / 3)
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            loaded = getattr(module.weight, "_is_hf_initialized", False)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None and not loaded:
                nn.init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, ScaleOffset):
            nn.init.ones_(module.weight)
        bias = getattr(module, "bias", None)
        if isinstance(module, nn.Linear | ScaleOffset) and bias is not None:
            nn.init.zeros_(bias)


class GAUAlphaModel(_GAUAlphaPreTrainedModel):
    """GAU-α without a head.

    Args:
        config: A :class:`GAUAlphaConfig`.

    Example:
        >>> config = GAUAlphaConfig(20, 16, 32, 2, 8)
        >>> model = GAUAlphaModel(config).eval()
        >>> model(torch.tensor([[2, 3, 4, 0]])).last_hidden_state.shape  # the last token is padding
        torch.Size([1, 4, 16])
    """

    def __init__(self, config: GAUAlphaConfig) -> None:
        super().__init__(config)
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of word embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table of word embeddings."""
        self.embeddings.word_embeddings = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Hidden states of a batch.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, T), 1 or True = takes part; None: all but ``pad_token_id``.
            token_type_ids: (B, T) segments; None: 0.
            inputs_embeds: (B, T, D) instead of ``input_ids``.
            output_attentions: Also the attention weights (B, 1, T, T) of each layer; memory O(T^2).
            output_hidden_states: Also the L + 1 hidden states.
            return_dict: False: a tuple.

        Returns:
            transformers' BaseModelOutput.

        Raises:
            TypeError: Wrong kind of argument.
            ValueError: Not exactly one of ``input_ids`` and ``inputs_embeds``, or shapes that do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"exactly one of input_ids and inputs_embeds must be given; got {given}")
        if input_ids is not None:
            if input_ids.dim() != 2:
                raise ValueError(f"input_ids must be (B, T); got shape {tuple(input_ids.shape)}")
            words = self.embeddings.word_embeddings(input_ids)
            if attention_mask is None and self.config.pad_token_id is not None:
                attention_mask = input_ids != self.config.pad_token_id
        else:
            check_float("inputs_embeds", inputs_embeds, 3)
            words = inputs_embeds
            if words.shape[2] != self.config.hidden_size:  # type: ignore[union-attr]
                raise ValueError(
                    f"inputs_embeds must be (B, T, {self.config.hidden_size}); got {tuple(words.shape)}"  # type: ignore[union-attr]
                )
        shape = (words.shape[0], words.shape[1])
        if attention_mask is not None:
            attention_mask = check_padding_mask("attention_mask", attention_mask, shape)
        if token_type_ids is not None and tuple(token_type_ids.shape) != shape:
            raise ValueError(f"token_type_ids must have shape {shape}; got {tuple(token_type_ids.shape)}")
        config = self.config
        matrices = config.output_attentions if output_attentions is None else output_attentions
        states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        x = self.embeddings(words, token_type_ids)
        last, hidden, weights = self.encoder(x, attention_mask, bool(matrices), bool(states))
        output = BaseModelOutput(last_hidden_state=last, hidden_states=hidden, attentions=weights)
        return output if _wants_dict(config, return_dict) else output.to_tuple()


def _wants_dict(config: Any, return_dict: bool | None) -> bool:
    return bool(getattr(config, "return_dict", True) if return_dict is None else return_dict)


class _Predictions(nn.Module):
    def __init__(self, config: GAUAlphaConfig) -> None:
        super().__init__()
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class _MaskedLMHead(nn.Module):
    def __init__(self, config: GAUAlphaConfig) -> None:
        super().__init__()
        self.predictions = _Predictions(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, V)."""
        return self.predictions.decoder(x)


class GAUAlphaForMaskedLM(_GAUAlphaPreTrainedModel):
    """GAU-α that predicts tokens, by a decoder tied to the word embeddings.

    Args:
        config: A :class:`GAUAlphaConfig`.

    Example:
        >>> model = GAUAlphaForMaskedLM(GAUAlphaConfig(20, 16, 32, 2, 8)).eval()
        >>> ids = torch.tensor([[2, 3, 4, 5]])
        >>> labels = torch.tensor([[-100, 7, -100, -100]])  # -100: no prediction counts
        >>> output = model(ids, labels=labels)
        >>> output.logits.shape, output.loss.shape
        (torch.Size([1, 4, 20]), torch.Size([]))
    """

    # What old versions of transformers iterate over, and the map that version 5 wants
    _tied_weights_keys = {"cls.predictions.decoder.weight": "gau_alpha.embeddings.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: GAUAlphaConfig) -> None:
        super().__init__(config)
        self.gau_alpha = GAUAlphaModel(config)
        self.cls = _MaskedLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The decoder."""
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the decoder."""
        self.cls.predictions.decoder = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Scores of all tokens at all positions, and the loss.

        Args:
            input_ids: As in :meth:`GAUAlphaModel.forward`.
            attention_mask: As in :meth:`GAUAlphaModel.forward`.
            token_type_ids: As in :meth:`GAUAlphaModel.forward`.
            inputs_embeds: As in :meth:`GAUAlphaModel.forward`.
            labels: (B, T) ids to be predicted, -100 where nothing is.
            output_attentions: As in :meth:`GAUAlphaModel.forward`.
            output_hidden_states: As in :meth:`GAUAlphaModel.forward`.
            return_dict: As in :meth:`GAUAlphaModel.forward`.

        Returns:
            transformers' MaskedLMOutput; the loss is the mean over labels that count, 0 if none does.

        Raises:
            TypeError: Wrong kind of argument.
            ValueError: As in :meth:`GAUAlphaModel.forward`, or labels of another shape.
        """
        outputs = self.gau_alpha(
            input_ids, attention_mask, token_type_ids, inputs_embeds, output_attentions, output_hidden_states, True
        )
        logits = self.cls(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            if labels.shape != logits.shape[:2]:
                raise ValueError(f"labels must have shape {tuple(logits.shape[:2])}; got {tuple(labels.shape)}")
            scores = logits.to(compute_dtype(logits)).flatten(0, 1)
            total = F.cross_entropy(scores, labels.flatten(), reduction="sum", ignore_index=-100)
            loss = total / (labels != -100).sum().clamp(min=1)
        output = MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return output if _wants_dict(self.config, return_dict) else output.to_tuple()


# Whoever has imported this module can load a saved model through AutoModel as well.
AutoConfig.register(GAUAlphaConfig.model_type, GAUAlphaConfig, exist_ok=True)
AutoModel.register(GAUAlphaConfig, GAUAlphaModel, exist_ok=True)
AutoModelForMaskedLM.register(GAUAlphaConfig, GAUAlphaForMaskedLM, exist_ok=True)
