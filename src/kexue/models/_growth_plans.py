"""Which rule grows which tensor, for every supported family. Only configurations and shapes are read, never values.

Notation of the rules: the residual vector of the grown model is c R x (R: copies, and fills where the width is no
multiple), a norm gives nu R y, the value heads give tau copies of v. ``convention="copy"`` is c = nu = tau = 1,
"orthogonal" 1 / sqrt(k), k copies. s = sqrt(k d / D) makes up for the fills inside a norm.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kexue.models._growth_rules import Axis, Factor, Recipe, fills, keep, repeat, stride, tile

__all__ = ["FAMILIES", "Family", "Growth", "Options", "Parts", "Rule", "measure"]


Pair = tuple[int, int]  # in the small model and in the grown one


@dataclass(frozen=True)
class Options:
    """The arguments of ``grow``, checked one by one."""

    width: int | None
    hidden_size: int | None
    intermediate_size: int | None
    depth: int | None
    heads: str
    exact: bool
    convention: str
    rope: str


@dataclass(frozen=True)
class Parts:
    """What a model has.

    Attributes:
        prefix: Of the names of the base model in a model with a head, with its dot.
        tied: The output layer is the table of word embeddings.
        pooled: There is a pooler, which classifiers read then.
        predicts: There is an output layer over tokens.
    """

    prefix: str
    tied: bool
    pooled: bool
    predicts: bool


@dataclass(frozen=True)
class Rule:
    """Axes (None: an axis that stays as it is), factor, and the axis that is read."""

    axes: tuple[Axis | None, ...]
    scale: float = 1.0
    inputs: int | None = None


@dataclass
class Growth:
    """Sizes before and after, scales, and the rules that families add to."""

    family: Family
    config: Any
    options: Options
    parts: Parts
    hidden: Pair
    inner: Pair
    layers: Pair
    heads: Pair = (1, 1)
    groups: Pair = (1, 1)
    head_dim: Pair = (1, 1)
    notes: list[str] = field(default_factory=list)
    eps_error: float = 0.0  # largest change of an eps that the configuration cannot follow
    rules: dict[str, Rule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        small, big = self.hidden
        self.copies = big // small
        self.ratio = math.sqrt(self.copies * small / big)  # s
        scale = self.copies**-0.5 if self.options.convention == "orthogonal" else 1.0
        self.stream_scale = self.norm_scale = self.value_scale = scale  # c, nu, tau
        self.stream = Axis.of(fills(small, big, self.family.fill))
        self.neurons = Axis.of(repeat(*self.inner))

    # Rules by kind of layer

    def embedding(self, name: str, scale: float | None = None) -> None:
        """A table whose rows are added to the stream."""
        scale = self.stream_scale if scale is None else scale
        self.rules[f"{name}.weight"] = Rule((None, self.stream), scale)

    def norm(self, name: str, scale: float | None = None, fill: tuple[str, float] = ("value", 1.0)) -> None:
        """Gain and bias of a norm of the stream. ``fill``: the gain of the fills, which are 0 when normalised."""
        scale = self.norm_scale if scale is None else scale
        (part,) = self.stream.parts
        self.rules[f"{name}.weight"] = Rule((Axis.of(part[0].filled(*fill)),), scale * self.ratio)
        bias = ("mean", 1.0) if fill[0] == "mean" else ("value", 0.0)
        self.rules[f"{name}.bias"] = Rule((Axis.of(part[0].filled(*bias)),), scale)

    def linear(
        self, name: str, rows: Axis | None, columns: Axis, scale: float = 1.0, reads: float = 1.0, conv: bool = False
    ) -> None:
        """A layer that reads ``columns``, scaled by ``reads``, and gives ``rows`` times ``scale``."""
        axes = (rows, columns.averaged())
        self.rules[f"{name}.weight"] = Rule(axes[::-1] if conv else axes, scale / reads, 0 if conv else 1)
        self.rules[f"{name}.bias"] = Rule((rows,), scale)

    def reader(self, name: str, rows: Axis | None, scale: float = 1.0, conv: bool = False) -> None:
        """A layer that reads what a norm of the stream gives."""
        self.linear(name, rows, self.stream, scale, self.norm_scale, conv)

    def writer(self, name: str, columns: Axis, reads: float = 1.0, conv: bool = False) -> None:
        """A layer whose output is added to the stream."""
        self.linear(name, self.stream, columns, self.stream_scale, reads, conv)

    # Attention

    def score_scale(self, scaled: bool = True) -> float:
        """Factor of q and of k that makes up for the other 1 / sqrt(head_dim)."""
        small, big = self.head_dim
        return (big / small) ** 0.25 if scaled else 1.0

    def head_axes(self, inside: Factor, grouped: bool) -> Axis:
        """Whole heads tiled; ``grouped``: heads of keys and values, of which the queries share each."""
        groups = tile(*self.groups)
        shared = self.heads[0] // self.groups[0]
        return Axis.of(groups, inside) if grouped else Axis.of(groups, keep(shared), inside)

    def attention_axes(self, scaled: bool = True) -> tuple[Axis, Axis, Axis, Axis]:
        """Rows of q, k and v, and the axis that the output layer reads."""
        inside = repeat(*self.head_dim)
        q = k = inside.shared_product(self.score_scale(scaled))
        if self.family.rotary and self.head_dim[0] < self.head_dim[1]:
            times, pairs = self.head_dim[1] // self.head_dim[0], self.head_dim[0] // 2
            if self.options.rope == "pair":
                turned = repeat(pairs, pairs * times).shared_product(self.score_scale())
                axes = [self._rotary(turned, False), self._rotary(turned, True)]
            else:
                turned = stride(pairs, times).shared_product(self.score_scale())
                # Nothing is read from the new coordinates of k, as those of q are 0: noise may stand there.
                axes = [self._rotary(turned, False), self._rotary(turned.spare(), True)]
            return axes[0], axes[1], self.head_axes(inside, True), self.head_axes(inside, False)
        return (
            self.head_axes(q, False),
            self.head_axes(k, True),
            self.head_axes(inside, True),
            self.head_axes(inside, False),
        )

    def _rotary(self, pairs: Factor, grouped: bool) -> Axis:
        (part,) = self.head_axes(keep(1), grouped).parts
        return Axis.of(*part[:-1], keep(2), pairs)  # half-split: coordinate i turns with i + d / 2

    # The output

    def final_scale(self) -> float:
        """Scale nu of the norm before a tied head: the embedding is c R E, so that k c nu must be 1."""
        return 1 / (self.copies * self.stream_scale) if self.parts.tied else self.norm_scale

    def scale_eps(self, factor: float) -> None:
        """Let the norms add eps to a mean square that is ``factor`` times the old one."""
        key = self.family.eps
        if factor != 1:
            setattr(self.config, key, getattr(self.config, key) * factor)

    def note_eps(self, factor: float, text: str) -> None:
        """A norm whose eps should be another, by ``factor``, than the one of the grown configuration."""
        gap = abs(factor - 1) * float(getattr(self.config, self.family.eps))
        if gap > 0:
            self.eps_error = max(self.eps_error, gap)
            self.notes.append(f"{text}, so the outputs differ by O({gap:.1e})")

    def layer_map(self) -> list[tuple[int, bool]]:
        """Source of every layer, and whether it is inserted as the identity: spread evenly, after its source."""
        small, big = self.layers
        sources = [j * small // big for j in range(big)]
        return [(i, j > 0 and sources[j - 1] == i) for j, i in enumerate(sources)]

    def recipe(self, rule: Rule, source: str, shape: tuple[int, ...], noise: float, scale: float = 1.0) -> Recipe:
        """The rule for a tensor of this shape."""
        if len(rule.axes) != len(shape):
            raise ValueError(f"{source} must have {len(rule.axes)} axes; got shape {shape}")
        axes = tuple(Axis.of(keep(n)) if a is None else a for a, n in zip(rule.axes, shape, strict=True))
        made = Recipe(source, axes, rule.scale * scale, rule.inputs, noise)
        if made.source_shape != shape:
            raise ValueError(
                f"{source} must have shape {made.source_shape} by the configuration; got {shape} (pruned heads, or "
                "layers that were exchanged?)"
            )
        return made


@dataclass(frozen=True)
class Family:
    """How the configuration names things, and what adds the rules.

    Attributes:
        hidden: Key of the configuration, as the next three and ``activation``.
        inner: Width of the feed-forward layers.
        layers: Their number.
        eps: Of all norms.
        layer: Where the layers stand in the base model.
        fill: What fills are: the "mean" (LayerNorm), or a "value", 0 (RMSNorm).
        build: Adds the rules.
        outputs: Layers whose output is added to the stream, by their name in a layer: those that are 0 if inserted.
        activation: Name of the activation.
        heads: Number of heads; None: one head of keys, whose width stays.
        groups: Number of heads of keys and values; None: as many as of queries, and their width follows.
        pre_norm: A layer whose outputs are 0 is the identity.
        rotary: Queries and keys are turned by pairs, half-split.
    """

    hidden: str
    inner: str
    layers: str
    eps: str
    layer: str
    fill: str
    build: Callable[[Growth], None]
    outputs: tuple[str, ...]
    activation: str
    heads: str | None = None
    groups: str | None = None
    pre_norm: bool = True
    rotary: bool = False


def _bert(g: Growth, roberta: bool = False) -> None:
    if g.hidden[1] % g.hidden[0]:
        if g.options.exact:
            raise ValueError(
                f"{g.config.model_type} cannot be grown exactly from hidden_size {g.hidden[0]} to {g.hidden[1]}, which "
                "is no multiple: its norms come after the residual sum, and fills would have to hold the mean of a "
                "norm's output, which no norm gives. Take a multiple, or exact=False for an approximation"
            )
        g.notes.append("fills hold the mean of the biases, not of the norm's output: the function changes")
        fill = ("mean", 1.0)
    else:
        fill = ("value", 1.0)
    # All norms of the stream see c R x; the one of the prediction head sees plain activations.
    g.scale_eps((g.stream_scale * g.ratio) ** 2)
    for name in ("word", "position", "token_type"):
        g.embedding(f"embeddings.{name}_embeddings")
    g.norm("embeddings.LayerNorm", fill=fill)
    q, k, v, context = g.attention_axes()
    layer = "encoder.layer.*"
    g.reader(f"{layer}.attention.self.query", q)
    g.reader(f"{layer}.attention.self.key", k)
    g.reader(f"{layer}.attention.self.value", v, g.value_scale)
    g.writer(f"{layer}.attention.output.dense", context, g.value_scale)
    g.norm(f"{layer}.attention.output.LayerNorm", fill=fill)
    g.reader(f"{layer}.intermediate.dense", g.neurons)
    g.writer(f"{layer}.output.dense", g.neurons)
    g.norm(f"{layer}.output.LayerNorm", fill=fill)

    pooled = Axis.of(repeat(*g.hidden))
    g.reader("pooler.dense", pooled)
    for name in ("qa_outputs", *(() if g.parts.pooled else ("classifier",))):
        g.reader(name, None)
    for name in ("cls.seq_relationship", *(("classifier",) if g.parts.pooled else ())):
        g.linear(name, None, pooled)
    if roberta:
        g.reader("classifier.dense", pooled)
        g.linear("classifier.out_proj", None, pooled)
        dense, norm, decoder, bias = "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"
    else:
        head = "cls.predictions"
        dense, norm = f"{head}.transform.dense", f"{head}.transform.LayerNorm"
        decoder, bias = f"{head}.decoder", f"{head}.bias"
    g.linear(dense, g.stream, g.stream, 1.0, g.norm_scale)
    g.norm(norm, g.final_scale(), ("value", 0.0))
    g.linear(decoder, None, g.stream, 1.0, g.final_scale())
    g.rules[bias] = Rule((None,))
    if g.parts.predicts:
        text = "the norm of the prediction head keeps the scale of its input, but eps is one value for all norms"
        g.note_eps((g.stream_scale * g.ratio) ** -2, text)


def _roberta(g: Growth) -> None:
    _bert(g, roberta=True)


def _gpt2(g: Growth) -> None:
    g.scale_eps((g.stream_scale * g.ratio) ** 2)
    g.embedding("wte")
    g.embedding("wpe")
    q, k, v, context = g.attention_axes(bool(g.config.scale_attn_weights))
    g.norm("h.*.ln_1")
    v = v.scaled(g.value_scale)
    g.reader("h.*.attn.c_attn", Axis.joined([q, k, v]), conv=True)
    if g.config.scale_attn_by_inverse_layer_idx:
        for j, (i, _) in enumerate(g.layer_map()):  # scores are divided by the number of the layer
            g.reader(f"h.{j}.attn.c_attn", Axis.joined([q.scaled((j + 1) / (i + 1)), k, v]), conv=True)
    g.writer("h.*.attn.c_proj", context, g.value_scale, conv=True)
    g.norm("h.*.ln_2")
    g.reader("h.*.mlp.c_fc", g.neurons, conv=True)
    g.writer("h.*.mlp.c_proj", g.neurons, conv=True)
    _final(g, "ln_f", ("lm_head", "score", "classifier", "qa_outputs", "multiple_choice_head.summary"))


def _llama(g: Growth) -> None:
    g.scale_eps((g.stream_scale * g.ratio) ** 2)
    g.embedding("embed_tokens")
    q, k, v, context = g.attention_axes()
    layer = "layers.*"
    g.norm(f"{layer}.input_layernorm")
    g.reader(f"{layer}.self_attn.q_proj", q)
    g.reader(f"{layer}.self_attn.k_proj", k)
    g.reader(f"{layer}.self_attn.v_proj", v, g.value_scale)
    g.writer(f"{layer}.self_attn.o_proj", context, g.value_scale)
    g.norm(f"{layer}.post_attention_layernorm")
    g.reader(f"{layer}.mlp.gate_proj", g.neurons)
    g.reader(f"{layer}.mlp.up_proj", g.neurons)
    g.writer(f"{layer}.mlp.down_proj", g.neurons)
    _final(g, "norm", ("lm_head", "score", "qa_outputs"))


def _final(g: Growth, norm: str, heads: tuple[str, ...]) -> None:
    """The last norm of a Pre-LN model and whatever reads it, which is not always the tied head alone."""
    g.norm(norm, g.final_scale())
    for name in heads:
        g.linear(name, None, g.stream, 1.0, g.final_scale())


def _gau(g: Growth) -> None:
    if g.options.convention != "copy":
        raise ValueError("GAU-alpha's norms have no gain, which fixes the scale: convention must be 'copy'; got "
                         f"{g.options.convention!r}")  # fmt: skip
    if g.options.heads == "wider":
        raise ValueError("GAU-alpha has one head of keys, attention_key_size wide, which stays: heads must be 'more'")
    # A norm without gain divides by s what has fills: the stream is R x / s from the first norm on.
    g.stream_scale = g.norm_scale = 1 / g.ratio
    # logits = (R x / s) . (e R E) must be x . E
    table = g.ratio / g.copies if g.parts.tied else 1 / g.ratio
    g.scale_eps((table * g.ratio) ** 2)
    g.note_eps((table * g.ratio) ** -2, "the embeddings shrink and eps with them, but eps is one value for all norms")
    g.embedding("embeddings.word_embeddings", table)
    g.embedding("embeddings.token_type_embeddings", table)
    layer = "encoder.layer.*.gau"
    key = Axis.of(keep(int(g.config.attention_key_size)))
    g.reader(f"{layer}.i_dense", Axis.joined([g.neurons, g.neurons, key]))
    for name in ("q", "k"):
        g.rules[f"{layer}.{name}_scaleoffset.weight"] = g.rules[f"{layer}.{name}_scaleoffset.bias"] = Rule((None,))
    g.writer(f"{layer}.o_dense", g.neurons)
    g.reader("cls.predictions.decoder", None)
    if g.layers[1] > g.layers[0]:
        # x / sqrt(mean x^2 + eps) has a mean square of 1 - eps / mean x^2, and is divided by its root again
        g.note_eps(2.0, "an inserted layer normalises once more what has length 1 up to eps")


_BERT = {
    "hidden": "hidden_size", "inner": "intermediate_size", "layers": "num_hidden_layers", "eps": "layer_norm_eps",
    "heads": "num_attention_heads", "layer": "encoder.layer", "fill": "mean", "activation": "hidden_act",
    "outputs": (), "pre_norm": False,
}  # fmt: skip
_ROBERTA = Family(**_BERT, build=_roberta)  # type: ignore[arg-type]

FAMILIES: dict[str, Family] = {
    "bert": Family(**_BERT, build=_bert),  # type: ignore[arg-type]
    "roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "gpt2": Family(
        hidden="n_embd", inner="n_inner", layers="n_layer", eps="layer_norm_epsilon", heads="n_head", layer="h",
        fill="mean", build=_gpt2, outputs=("attn.c_proj", "mlp.c_proj"), activation="activation_function",
    ),
    "llama": Family(
        hidden="hidden_size", inner="intermediate_size", layers="num_hidden_layers", eps="rms_norm_eps",
        heads="num_attention_heads", groups="num_key_value_heads", layer="layers", fill="value",
        build=_llama, outputs=("self_attn.o_proj", "mlp.down_proj"), activation="hidden_act", rotary=True,
    ),
    "gau_alpha": Family(
        hidden="hidden_size", inner="intermediate_size", layers="num_hidden_layers", eps="layer_norm_eps",
        layer="encoder.layer", fill="value", build=_gau, outputs=("gau.o_dense",), activation="hidden_act",
    ),
}  # fmt: skip


def measure(family: Family, config: Any, options: Options, parts: Parts) -> Growth:
    """Sizes of the grown model; ``config`` is copied.

    Raises:
        ValueError: Sizes that shrink, that heads do not divide, or nothing to grow.
    """
    config = copy.deepcopy(config)
    d = int(getattr(config, family.hidden))
    f = getattr(config, family.inner)
    f = 4 * d if f is None else int(f)
    layers = int(getattr(config, family.layers))
    width = options.width
    if width is None:
        given = (options.depth, options.hidden_size, options.intermediate_size)
        width = 2 if all(value is None for value in given) else 1
        big = width * d if options.hidden_size is None else options.hidden_size
    else:
        big = width * d
        if options.hidden_size not in (None, big):
            raise ValueError(f"width={width} makes hidden_size {big}; got hidden_size={options.hidden_size} as well")
    inner = -(-f * big // d) if options.intermediate_size is None else options.intermediate_size
    depth = layers if options.depth is None else options.depth
    for name, old, new in (("hidden_size", d, big), ("intermediate_size", f, inner), ("depth", layers, depth)):
        if new < old:
            raise ValueError(f"{name} must be at least {old}, that of the model (nothing can shrink); got {new}")
    if (d, f, layers) == (big, inner, depth) and options.width is None:
        raise ValueError(f"nothing to grow: the model has hidden_size {d}, intermediate_size {f} and {layers} layers "
                         "already; give width=2, hidden_size, intermediate_size or depth")  # fmt: skip
    one: Pair = (1, 1)
    sizes = (one, one, one) if family.heads is None else _heads(family, config, options, d, big)
    growth = Growth(family, config, options, parts, (d, big), (f, inner), (layers, depth), *sizes)
    if family.inner != "n_inner" or config.n_inner is not None or inner != 4 * big:
        setattr(config, family.inner, inner)
    setattr(config, family.hidden, big)
    setattr(config, family.layers, depth)
    if getattr(config, "embedding_size", None) == d and config.model_type == "gau_alpha":
        config.embedding_size = big
    if family.heads is not None:
        setattr(config, family.heads, growth.heads[1])
    if family.groups is not None:
        setattr(config, family.groups, growth.groups[1])
        config.head_dim = growth.head_dim[1]
    return growth


def _heads(family: Family, config: Any, options: Options, d: int, big: int) -> tuple[Pair, Pair, Pair]:
    """Numbers of heads, of heads of keys, and width of a head: before and after."""
    heads = int(getattr(config, family.heads))  # type: ignore[arg-type]
    groups = heads if family.groups is None else int(getattr(config, family.groups))
    free = family.groups is not None  # the width of a head does not follow from the others
    head_dim = int(config.head_dim) if free else d // heads
    if options.heads == "more":
        wanted = (groups * big, d) if free else (big, head_dim * (heads // groups))
        if wanted[0] % wanted[1] or big % (wanted[0] // wanted[1] * (heads // groups)):
            raise ValueError(
                f"hidden_size {big} cannot be shared by whole copies of the {heads} heads of width {head_dim}"
                + (f", {groups} of keys" if groups != heads else "")
                + (
                    f"; take a multiple of {d // math.gcd(d, groups)}"
                    if free
                    else f"; take a multiple of {head_dim}, or heads='wider'"
                )
            )
        new = wanted[0] // wanted[1]
        return (heads, new * (heads // groups)), (groups, new), (head_dim, head_dim)
    if big % (d if family.rotary else heads):
        raise ValueError(
            f"heads='wider' keeps {heads} heads, so hidden_size must be a multiple of "
            f"{f'{d}, for rotary frequencies to recur' if family.rotary else heads}; got {big}"
        )
    wide = head_dim * (big // d) if family.rotary else big // heads
    return (heads, heads), (groups, groups), (head_dim, wide)
