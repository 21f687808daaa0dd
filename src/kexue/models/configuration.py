"""The configuration of the one Transformer stack that hosts every objective of this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kexue._checks import check_choice, check_int, check_real
from kexue._transformers import PretrainedConfig

__all__ = ["KexueConfig"]

ATTENTION_MODES = ("bidirectional", "causal", "prefix", "diagonal")
POSITIONS = ("learned", "rope")
NORMS = ("layer", "rms")
ACTIVATIONS = ("gelu", "gelu_tanh", "swiglu", "relu", "silu")
OBJECTIVES = ("mlm", "clm", "nsp")


class KexueConfig(PretrainedConfig):
    """Sizes and switches of a Kexue model. The switches are independent of each other.

    The defaults are those of a small pre-norm encoder; :func:`from_bert` and :func:`from_gpt2` set the switches that
    make the stack compute what BERT and GPT-2 compute.

    Args:
        vocab_size: V.
        hidden_size: D, a multiple of ``num_heads``.
        num_layers: L.
        num_heads: H.
        attn_mode: "bidirectional"; "causal": a token sees itself and what comes before; "prefix": the tokens of segment
            0 see each other, those after them what comes before, see :class:`KexueForPrefixLM`; "diagonal": every token
            is predicted from all the others in one pass, see :class:`KexueForTextAutoencoding`.
        position: "learned": a table of ``max_position`` rows; "rope": rotary positions in every layer.
        max_position: Largest length with learned positions; rotary positions have no limit.
        mask_token_id: Id of [MASK]; needed by "diagonal".
        intermediate_size: Inner width of the feed-forward layers; None: 4 D.
        norm: "layer" or "rms".
        act: "gelu", "gelu_tanh", "relu", "silu", or "swiglu" (a gated feed-forward layer with three matrices).
        post_norm: Norms after the residual sums, as in BERT; False: before the sub-layers and after the last layer.
        embedding_norm: A norm on the embeddings; None: as ``post_norm``, in "diagonal" mode always.
        type_vocab_size: Number of segments; 0: no segment embeddings.
        bias: Biases of the linear maps inside the stack.
        head_transform: Dense layer, activation and norm between the stack and the decoder of masked models.
        head_bias: Bias of the decoder; None: of masked models only.
        dropout: Of embeddings and of the outputs of sub-layers.
        attention_dropout: Of attention weights.
        norm_eps: Of the norms.
        rope_base: Of the geometric series of the angles of rotary positions.
        initializer_range: Standard deviation of the starting weights; None: 1 / sqrt(inputs) for linear maps, those
            that end a sub-layer divided by sqrt(2 L), and 0.02 for embeddings.
        self_visible: Of "diagonal": drop the mask of the diagonal, for fine-tuning.
        bos_key: Of "diagonal": a learned key that every token sees, also where there is no other token.
        pointer: Of "prefix": tokens of the source get a second score, by which they are pointed at.
        objectives: Weights of the losses that :class:`KexueForPreTraining` sums, of "mlm" or "clm", and "nsp".
        tie_word_embeddings: The decoder's weight is the table of token embeddings.
        pad_token_id: Id of padding; without an ``attention_mask`` these tokens take no part. None: all tokens do.
        bos_token_id: Id that begins a text.
        eos_token_id: Id that ends a text.
        **kwargs: Passed on to transformers (``num_labels``, ``id2label``, ...).

    Raises:
        TypeError: A size that is no integer, a rate that is no number.
        ValueError: A value out of range, or ``hidden_size`` that ``num_heads`` does not divide.

    Example:
        >>> config = KexueConfig(vocab_size=100, hidden_size=64, num_layers=2, num_heads=4)
        >>> config.intermediate_size, config.num_hidden_layers  # transformers' names work as well
        (256, 2)
    """

    model_type = "kexue"
    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "max_position_embeddings": "max_position",
        "hidden_act": "act",
        "layer_norm_eps": "norm_eps",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
    }
    # What the trainer of transformers must not take for predictions
    keys_to_ignore_at_inference = ["num_items", "past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 30000,
        hidden_size: int = 256,
        num_layers: int = 6,
        num_heads: int = 8,
        attn_mode: str = "bidirectional",
        position: str = "learned",
        max_position: int = 512,
        mask_token_id: int | None = None,
        *,
        intermediate_size: int | None = None,
        norm: str = "layer",
        act: str = "gelu",
        post_norm: bool = False,
        embedding_norm: bool | None = None,
        type_vocab_size: int = 0,
        bias: bool = True,
        head_transform: bool = True,
        head_bias: bool | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        norm_eps: float = 1e-5,
        rope_base: float = 10000.0,
        initializer_range: float | None = None,
        self_visible: bool = False,
        bos_key: bool = True,
        pointer: bool = True,
        objectives: Mapping[str, float] | None = None,
        tie_word_embeddings: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        given = {name: kwargs.pop(name) for name in tuple(kwargs) if name in self.attribute_map}
        num_layers = given.get("num_hidden_layers", num_layers)
        num_heads = given.get("num_attention_heads", num_heads)
        max_position = given.get("max_position_embeddings", max_position)
        act, norm_eps = given.get("hidden_act", act), given.get("layer_norm_eps", norm_eps)
        dropout = given.get("hidden_dropout_prob", dropout)
        attention_dropout = given.get("attention_probs_dropout_prob", attention_dropout)
        sizes = {
            "vocab_size": vocab_size, "hidden_size": hidden_size, "num_layers": num_layers, "num_heads": num_heads,
            "max_position": max_position,
        }  # fmt: skip
        for name, value in sizes.items():
            check_int(name, value, 1)
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads = {num_heads}; got {hidden_size}")
        if position == "rope" and hidden_size // num_heads % 2:
            raise ValueError(
                f"the width of a head must be even for rotary positions; got {hidden_size} / {num_heads} = "
                f"{hidden_size // num_heads}"
            )
        check_int("type_vocab_size", type_vocab_size, 0)
        if intermediate_size is not None:
            check_int("intermediate_size", intermediate_size, 1)
        check_choice("attn_mode", attn_mode, ATTENTION_MODES)
        check_choice("position", position, POSITIONS)
        check_choice("norm", norm, NORMS)
        check_choice("act", act, ACTIVATIONS)
        for name, rate in (("dropout", dropout), ("attention_dropout", attention_dropout)):
            check_real(name, rate, minimum=0.0)
            if rate >= 1:
                raise ValueError(f"{name} must be below 1; got {rate!r}")
        check_real("norm_eps", norm_eps, above=0.0)
        check_real("rope_base", rope_base, above=1.0)
        if initializer_range is not None:
            check_real("initializer_range", initializer_range, above=0.0)
        mask_token_id = _token("mask_token_id", mask_token_id, vocab_size)
        pad_token_id = _token("pad_token_id", pad_token_id, vocab_size)
        if attn_mode == "diagonal" and mask_token_id is None:
            raise ValueError(
                "attn_mode='diagonal' needs mask_token_id, the token that stands at every position to be predicted; "
                "got None"
            )
        self.vocab_size, self.hidden_size = int(vocab_size), int(hidden_size)
        self.num_layers, self.num_heads = int(num_layers), int(num_heads)
        self.attn_mode, self.position, self.max_position = attn_mode, position, int(max_position)
        self.mask_token_id = mask_token_id
        self.intermediate_size = 4 * self.hidden_size if intermediate_size is None else int(intermediate_size)
        self.norm, self.act, self.post_norm = norm, act, bool(post_norm)
        normed = self.post_norm or attn_mode == "diagonal"
        self.embedding_norm = normed if embedding_norm is None else bool(embedding_norm)
        self.type_vocab_size, self.bias = int(type_vocab_size), bool(bias)
        self.head_transform = bool(head_transform)
        self.head_bias = None if head_bias is None else bool(head_bias)
        self.dropout, self.attention_dropout, self.norm_eps = float(dropout), float(attention_dropout), float(norm_eps)
        self.rope_base = float(rope_base)
        self.initializer_range = None if initializer_range is None else float(initializer_range)
        self.self_visible, self.bos_key, self.pointer = bool(self_visible), bool(bos_key), bool(pointer)
        self.objectives = check_objectives(objectives, attn_mode)
        self.use_cache = bool(kwargs.pop("use_cache", True))  # read by transformers' generate
        # Set as well as passed on: transformers 5 no longer keeps all of them itself.
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        self.tie_word_embeddings = bool(tie_word_embeddings)
        kwargs.setdefault("is_decoder", attn_mode == "causal")
        kwargs |= {
            "pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id,
            "tie_word_embeddings": self.tie_word_embeddings,
        }  # fmt: skip
        super().__init__(**kwargs)


def _token(name: str, token: int | None, vocab_size: int) -> int | None:
    if token is None:
        return None
    check_int(name, token, 0)
    if token >= vocab_size:
        raise ValueError(f"{name} must be inside the vocabulary, below {vocab_size}; got {token}")
    return int(token)


def check_objectives(objectives: Any, attn_mode: str) -> dict[str, float]:
    """Weights of the objectives as a dict; None: the language objective of the mode, and next sentences."""
    language = "clm" if attn_mode in ("causal", "prefix") else "mlm"
    if objectives is None:
        return {language: 1.0} if attn_mode in ("prefix", "diagonal") else {language: 1.0, "nsp": 1.0}
    if not isinstance(objectives, Mapping) or not objectives:
        raise ValueError(f"objectives must be a non-empty dict of weights; got {objectives!r}")
    for name, weight in objectives.items():
        check_choice("the name of an objective", name, OBJECTIVES)
        check_real(f"the weight of {name!r}", weight, minimum=0.0)
    other = "mlm" if language == "clm" else "clm"
    if other in objectives:
        raise ValueError(f"attn_mode={attn_mode!r} has the objective {language!r}; got {other!r}")
    if not any(weight > 0 for weight in objectives.values()):
        raise ValueError(f"objectives must have a positive weight; got {dict(objectives)}")
    return {name: float(weight) for name, weight in objectives.items()}
