"""The schemes: which std each sort of parameter gets. ``schemes.py`` applies them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from kexue._checks import check_choice, check_int, check_real
from kexue.models._activations import Activation, moments
from kexue.models._roles import Piece, Stack, Use, names, setting, stack_of, stacks, unscaled_head_size
from kexue.models._sampling import truncated_std
from kexue.models.initialization import DISTRIBUTIONS, MEANS, mean_of_fans
from kexue.models.parameterization import NTKLinear

# Blocks of transformers, by the name of their class.
POST_NORM = names(
    "BertLayer RobertaLayer XLMRobertaLayer CamembertLayer ElectraLayer MPNetLayer DebertaLayer DebertaV2Layer "
    "AlbertLayer ErnieLayer RoFormerLayer TransformerBlock BartEncoderLayer BartDecoderLayer MarianEncoderLayer "
    "MarianDecoderLayer"
)
PRE_NORM = names(
    "GPT2Block LlamaDecoderLayer T5Block MT5Block UMT5Block LongT5Block MistralDecoderLayer Qwen2DecoderLayer "
    "Qwen3DecoderLayer GemmaDecoderLayer Phi3DecoderLayer GPTNeoXLayer BloomBlock ViTLayer ModernBertEncoderLayer "
    "XLMRobertaXLLayer MBartEncoderLayer MBartDecoderLayer PegasusEncoderLayer PegasusDecoderLayer"
)


class DeepNormConstants(NamedTuple):
    """alpha multiplies the residual, beta is the gain of v, o and the FFN; None where there is no such stack."""

    encoder_alpha: float | None
    encoder_beta: float | None
    decoder_alpha: float | None
    decoder_beta: float | None


@dataclass(frozen=True)
class Draw:
    """What a parameter gets: random numbers of this std, or a constant (std 0)."""

    std: float
    rule: str
    distribution: str = "normal"
    constant: float = 0.0


def deepnorm_constants(encoder_layers: int, decoder_layers: int = 0) -> DeepNormConstants:
    """DeepNorm's alpha and beta: x <- LN(alpha x + F(x)), Xavier with gain beta on v, o and the FFN.

    Args:
        encoder_layers: N, layers of the encoder; 0 for a decoder alone.
        decoder_layers: M, layers of the decoder; 0 for an encoder alone.

    Returns:
        One stack of L layers: alpha = (2L)^(1/4), beta = (8L)^(-1/4). Both: encoder alpha = .81 (N^4 M)^(1/16),
        beta = .87 (N^4 M)^(-1/16); decoder alpha = (3M)^(1/4), beta = (12M)^(-1/4).

    Raises:
        TypeError: Not integers.
        ValueError: A negative number, or no layers at all.

    Reference:
        https://arxiv.org/abs/2203.00555

    Example:
        >>> deepnorm_constants(8).encoder_alpha
        2.0
    """
    check_int("encoder_layers", encoder_layers, 0)
    check_int("decoder_layers", decoder_layers, 0)
    n, m = int(encoder_layers), int(decoder_layers)
    if not n + m:
        raise ValueError("encoder_layers or decoder_layers must be at least 1; got 0 and 0")
    alone = ((2 * (n + m)) ** 0.25, (8 * (n + m)) ** -0.25)
    if not m:
        return DeepNormConstants(*alone, None, None)
    if not n:
        return DeepNormConstants(None, None, *alone)
    both = float(n) ** 4 * m
    return DeepNormConstants(0.81 * both ** (1 / 16), 0.87 * both ** (-1 / 16), (3 * m) ** 0.25, (12 * m) ** -0.25)


class Scheme:
    """Which std each sort of parameter gets: ``matrix`` for each piece, ``table`` for look-ups."""

    options: tuple[str, ...] = ()  # keywords that the scheme reads
    converts = False  # nn.Linear becomes NTKLinear

    def __init__(self, model: nn.Module, uses: list[Use], tied: bool, options: dict[str, Any]) -> None:
        self.model, self.tied, self.stacks = model, tied, stacks(model, uses)
        self.set(**options)

    def set(self) -> None:
        """Take the options."""

    def matrix(self, use: Use, piece: Piece) -> Draw:
        raise NotImplementedError

    def table(self, use: Use) -> Draw:
        """Look-ups have fan_in 1; a table that is a head as well, and its neighbours, are scaled for the logits."""
        if use.relative:
            return Draw(0.0, "relative bias: 0")
        if self.tied:
            return Draw(use.width**-0.5, "look-up, head tied: width^(-1/2)", self.tables)
        return Draw(1.0, "look-up: 1", self.tables)

    tables = "normal"

    def branch(self, use: Use) -> Stack | None:
        """The stack around a use."""
        name = stack_of(use)
        return None if name is None else self.stacks[name]


class _SecondMoment(Scheme):
    """sigma^2 = 1 / (M E[f(z)^2])."""

    options = ("mode", "nonlinearity", "distribution")
    defaults = ("fan_in", "linear")

    def set(
        self,
        mode: str | None = None,
        nonlinearity: str | Activation | None = None,
        distribution: str | None = None,
    ) -> None:
        self.mode = self.defaults[0] if mode is None else mode
        check_choice("mode", self.mode, tuple(MEANS))
        reads = self.defaults[1] if nonlinearity is None else nonlinearity
        self.moment = moments(reads)[1]
        self.tables = "truncated_normal" if distribution is None else distribution
        check_choice("distribution", self.tables, DISTRIBUTIONS)

    def matrix(self, use: Use, piece: Piece) -> Draw:
        mean = mean_of_fans(piece.fan_in, piece.fan_out, self.mode)
        return Draw((mean * self.moment) ** -0.5, f"1 / ({self.mode} {mean:g} x {self.moment:.4g})", self.tables)


class _Xavier(_SecondMoment):
    defaults = ("arithmetic", "linear")


class _He(_SecondMoment):
    defaults = ("fan_in", "relu")


class _T5(Scheme):
    """As transformers initialises T5; other models, which divide their scores, keep q like k."""

    options = ("qk_split", "factor")

    def set(self, qk_split: str | None = None, factor: float | None = None) -> None:
        self.split = "q" if qk_split is None else qk_split
        check_choice("qk_split", self.split, ("q", "both"))
        self.factor = setting(self.model, "initializer_factor", 1.0) if factor is None else factor
        check_real("factor", self.factor, above=0.0)
        self.is_t5 = any(unscaled_head_size(Use("", "", m, m)) for m in self.model.modules())

    def matrix(self, use: Use, piece: Piece) -> Draw:
        std, rule = piece.fan_in**-0.5, "fan_in^(-1/2)"
        size = unscaled_head_size(use)
        if size and piece.role == "query" and self.split == "q":
            std, rule = std * size**-0.5, f"(fan_in x {size})^(-1/2), scores are not divided"
        elif size and piece.role in ("query", "key") and self.split == "both":
            std, rule = std * size**-0.25, f"fan_in^(-1/2) x {size}^(-1/4), scores are not divided"
        elif self.is_t5 and use.name.endswith("lm_head.weight"):
            std, rule = 1.0, "untied head: 1"
        return Draw(self.factor * std, rule)

    def table(self, use: Use) -> Draw:
        if use.relative:
            width: Any = getattr(use.parent, "d_model", None) or setting(self.model, "hidden_size", 1)
            return Draw(self.factor * float(width) ** -0.5, "relative bias: d_model^(-1/2)")
        if self.tied and not self.is_t5:  # T5 divides the hidden states before a tied head, others do not
            return Draw(self.factor * use.width**-0.5, "embedding, head tied: width^(-1/2)")
        return Draw(self.factor, "embedding: 1")


class _DeepNorm(Scheme):
    """Xavier-normal, gain beta on v, o and the FFN."""

    options = ("post_norm",)

    def set(self, post_norm: bool | None = None) -> None:
        if post_norm not in (None, True):
            raise ValueError(f"post_norm must be True or None; got {post_norm!r}")
        if not self.stacks:
            raise ValueError(f"deepnorm needs Transformer blocks; {type(self.model).__name__} has none that is known")
        for stack in self.stacks.values():
            for name in stack.blocks:
                _check_post_norm(name, self.model.get_submodule(name), bool(post_norm))
        lengths = {name: len(stack.blocks) * stack.repeats for name, stack in self.stacks.items()}
        encoders = [name for name, stack in self.stacks.items() if not stack.cross]
        decoders = [name for name, stack in self.stacks.items() if stack.cross]
        if len(encoders) > 1 or len(decoders) > 1:
            raise ValueError(f"deepnorm takes one encoder and one decoder; got the stacks {', '.join(lengths)}")
        self.beta: dict[str, float] = {}
        if encoders:
            found = deepnorm_constants(lengths[encoders[0]], lengths[decoders[0]] if decoders else 0)
            self.beta[encoders[0]] = float(found.encoder_beta or 0)
        for name in decoders:  # with cross-attention: three branches in a layer, whatever the encoder
            self.beta[name] = float(deepnorm_constants(1, lengths[name]).decoder_beta or 0)

    def matrix(self, use: Use, piece: Piece) -> Draw:
        std, stack = (2 / (piece.fan_in + piece.fan_out)) ** 0.5, stack_of(use)
        if stack is not None and piece.role in ("value", "attention_out", "ffn_in", "ffn_out"):
            beta = self.beta[stack]
            return Draw(std * beta, f"Xavier x beta {beta:.4g}")
        return Draw(std, "Xavier")

    def table(self, use: Use) -> Draw:
        return Draw(0.0, "relative bias: 0") if use.relative else Draw(use.width**-0.5, "width^(-1/2)")


def _check_post_norm(name: str, block: nn.Module, vouched: bool) -> None:
    kind = type(block).__name__
    ours = type(block).__module__.startswith("transformers.")  # somebody else's TransformerBlock may be anything
    flags = ("norm_first", "normalize_before", "do_layer_norm_before")
    if any(getattr(block, flag, False) for flag in flags) or (ours and kind in PRE_NORM):
        raise ValueError(f"deepnorm needs Post-LN blocks, LN(alpha x + F(x)); {name or 'the model'} ({kind}) is Pre-LN")
    known = isinstance(block, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) or (ours and kind in POST_NORM)
    if not known and not vouched:
        raise ValueError(
            f"deepnorm needs Post-LN blocks and cannot tell for {name or 'the model'} ({kind}); "
            "pass post_norm=True if they are"
        )


class _Fixup(Scheme):
    """Branches end in 0 and are scaled down by their number."""

    def set(self) -> None:
        if not self.stacks:
            raise ValueError(
                f"fixup needs Transformer blocks to find residual branches; {type(self.model).__name__} has none that "
                "is known"
            )

    def matrix(self, use: Use, piece: Piece) -> Draw:
        he, stack = (2 / piece.fan_in) ** 0.5, self.branch(use)
        if use.head:
            return Draw(0.0, "classifier: 0")
        if stack is None:
            return Draw(he, "He")
        if piece.role in ("attention_out", "ffn_out"):
            return Draw(0.0, "last of its branch: 0")
        branches = stack.branches * stack.repeats
        return Draw(he * branches**-0.5, f"He x {branches}^(-1/2)")

    def table(self, use: Use) -> Draw:
        return Draw(0.0, "relative bias: 0") if use.relative else Draw(use.width**-0.5, "width^(-1/2)")


class _GPT2(Scheme):
    """N(0, .02^2), residual output projections times (2L)^(-1/2)."""

    options = ("std",)

    def set(self, std: float | None = None) -> None:
        self.std = 0.02 if std is None else std
        check_real("std", self.std, above=0.0)

    def matrix(self, use: Use, piece: Piece) -> Draw:
        stack = self.branch(use)
        if stack is not None and piece.role in ("attention_out", "ffn_out"):
            branches = stack.branches * stack.repeats
            return Draw(self.std * branches**-0.5, f"{self.std:g} x {branches}^(-1/2)")
        return Draw(self.std, f"{self.std:g}")

    def table(self, use: Use) -> Draw:
        return Draw(self.std, f"{self.std:g}")


class _BERT(_GPT2):
    """A normal of std .02 that is cut at two std and not corrected: .0176 comes out."""

    def matrix(self, use: Use, piece: Piece) -> Draw:
        return Draw(self.std * truncated_std(2.0), f"{self.std:g} before truncation", "truncated_normal")

    def table(self, use: Use) -> Draw:
        return Draw(self.std * truncated_std(2.0), f"{self.std:g} before truncation", "truncated_normal")


class _NTK(Scheme):
    """N(0, 1) everywhere, the scale in the layer."""

    converts = True

    def set(self) -> None:
        for path, module in self.model.named_modules():
            if unscaled_head_size(Use("", "", module, module)):
                raise ValueError(f"ntk needs attention that divides its scores by sqrt(d); {path} does not")

    def matrix(self, use: Use, piece: Piece) -> Draw:
        if not NTKLinear.can_replace(use.owner):
            kind = type(use.owner).__name__
            raise ValueError(f"ntk can convert nn.Linear and transformers' Conv1D; {use.name} belongs to {kind}")
        return Draw(1.0, "N(0, 1), the layer becomes NTKLinear")

    def table(self, use: Use) -> Draw:
        return Draw(0.0, "relative bias: 0") if use.relative else Draw(1.0, "look-up: 1")


SCHEMES: dict[str, type[Scheme]] = {
    "lecun": _SecondMoment,
    "xavier": _Xavier,
    "he": _He,
    "t5": _T5,
    "deepnorm": _DeepNorm,
    "fixup": _Fixup,
    "gpt2": _GPT2,
    "bert": _BERT,
    "ntk": _NTK,
}
