"""Lossless growth (无损放大): a larger Transformer that computes the same function as the small one.

Source: 科学空间 8444 (我们可以无损放大一个Transformer模型吗(一)), which grows the width by repetition; the rules for
any activation, tied heads, rotary positions, more heads, uneven widths and depth are derived here.

    residual vector     R x: every coordinate k times, a, a, b, b
    layer that reads    columns repeated and divided by k, so that the k copies give what one gave
    norm                gain and bias repeated; mean and variance of copies are those of one, eps stays
    more heads          whole heads tiled, h1, h2, h1, h2 (of keys and values too, so that queries find theirs)
    wider heads         q and k times k^(-1/4): k q . k / sqrt(k d); with RoPE pair i moves to pair k i, where its
                        frequency recurs, the others are 0, and q and k take k^(1/4)
    tied head           the last norm's gain and bias divided by k: the head is the repeated embedding
    width q d + r       q copies and r fills that hold the mean (LayerNorm) or 0 (RMSNorm); gain * s, eps * s^2,
                        s = sqrt(q d / D). Heads and inner neurons may be copied unevenly: copies share the output
    depth               Pre-LN: blocks whose output layers are 0, spread evenly
    noise               added to what reads copies, with sum 0 over them: same function, different gradients

What differs from the article: residual vectors are not divided by sqrt(k) (``convention="orthogonal"`` does that), so
that eps and activations need no care; the exact rule under RoPE; its remark on one more division at the head of BERT
is dropped, since LayerNorm ignores it; the model is built without values and each tensor is written once, by strides.
Copying coordinates unevenly, as bert2BERT does, is not exact under a norm and is not offered.

Without noise copies get equal gradients and stay equal; dropout separates them as well. What is 0 for lack of a source
(new coordinates under RoPE, fills of RMSNorm) starts to learn with noise only. Weight decay treats k copies of w / k
otherwise than w: later training differs from that of the small model.
"""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kexue._checks import check_choice, check_int, check_real
from kexue._transformers import PretrainedConfig, PreTrainedModel
from kexue.attention._hf_linear import NAMES as FEATURE_MAPS
from kexue.models._growth_plans import FAMILIES, Family, Growth, Options, Parts, Rule, measure
from kexue.models._growth_rules import Recipe
from kexue.models.extension import RECORD
from kexue.models.positions import HierarchicalPositionEmbedding

__all__ = ["GrowthPlan", "grow", "plan_growth"]


@dataclass(frozen=True)
class GrowthPlan:
    """What :func:`grow` does, before any value is read.

    Attributes:
        config: Configuration of the grown model.
        model_class: Class of both models.
        tensors: Recipe of every parameter of the grown model by name, in order; tied ones once.
        aliases: Other names of tied parameters -> the name in ``tensors``.
        notes: In what the grown function differs, if only by eps; empty where it does not.
        growth: Sizes and scales.
    """

    config: Any
    model_class: type
    tensors: dict[str, Recipe]
    aliases: dict[str, str]
    notes: tuple[str, ...]
    growth: Growth

    def build(self) -> Any:
        """The grown model on the meta device: no memory, no values, no random numbers."""
        return _build(self.model_class, self.config)


def _build(model_class: type, config: Any) -> Any:
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def _check_options(
    width: Any, hidden_size: Any, intermediate_size: Any, depth: Any, heads: Any, noise: Any, exact: Any,
    convention: Any, rope: Any,
) -> Options:  # fmt: skip
    if isinstance(width, float):
        raise ValueError(f"width must be a whole number; got {width!r}. For other ratios give hidden_size")
    for name, value in (("width", width), ("hidden_size", hidden_size), ("intermediate_size", intermediate_size),
                        ("depth", depth)):  # fmt: skip
        if value is not None:
            check_int(name, value, 1)
    check_choice("heads", heads, ("more", "wider"))
    check_choice("convention", convention, ("copy", "orthogonal"))
    check_choice("rope", rope, ("stride", "pair"))
    check_real("noise", noise, minimum=0.0)
    if not isinstance(exact, bool):
        raise TypeError(f"exact must be True or False; got {exact!r}")
    sizes = [None if value is None else int(value) for value in (width, hidden_size, intermediate_size, depth)]
    return Options(sizes[0], sizes[1], sizes[2], sizes[3], heads, exact, convention, rope)


def _family(config: Any) -> Family:
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise ValueError(f"only these families can be grown: {', '.join(FAMILIES)}; got {kind!r}")
    if getattr(config, "add_cross_attention", False):
        raise ValueError("a model with cross-attention cannot be grown: the width of what it reads is not its own")
    family = FAMILIES[kind]
    if not isinstance(getattr(config, family.activation), str):
        raise ValueError(f"{family.activation} must be the name of an elementwise function; got "
                         f"{getattr(config, family.activation)!r}")  # fmt: skip
    return family


def _names(model: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Parameters by name, shared ones once; and the other names of these."""
    first: dict[int, str] = {}
    parameters, aliases = {}, {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            aliases[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
            parameters[name] = parameter
    return parameters, aliases


def _check_names(model: Any, parameters: dict[str, Any], aliases: dict[str, str], expected: Any) -> None:
    """The model must be what its configuration describes."""
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"quantised weights cannot be grown: {name} is {parameter.dtype}")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise ValueError("a quantised model cannot be grown; load it without quantization_config")
    for name, module in model.named_modules():
        if isinstance(module, HierarchicalPositionEmbedding):
            raise ValueError(f"{name} has tied positions ({RECORD}): grow first and extend_positions then, or save the "
                             "model and load it, which unties them")  # fmt: skip
    wanted, shared = _names(expected)
    extra, missing = sorted(set(parameters) - set(wanted)), sorted(set(wanted) - set(parameters))
    renamed = set(extra) <= set(shared) and set(missing) <= set(aliases)  # shared here and not there, or the reverse
    if aliases != shared and renamed:
        raise ValueError(
            f"shared parameters must be those of the configuration, {shared or 'none'}; got {aliases or 'none'} (is "
            "tie_word_embeddings right?)"
        )
    if extra or missing:
        raise ValueError(
            f"{type(model).__name__} must have the parameters that its configuration describes; "
            f"unknown: {', '.join(extra) or 'none'}; missing: {', '.join(missing) or 'none'} (adapters have to be "
            "merged first)"
        )
    buffers = sorted(set(model.state_dict()) - set(expected.state_dict()))
    if buffers:
        raise ValueError(f"{type(model).__name__} has tensors that its configuration does not describe: "
                         f"{', '.join(buffers)}")  # fmt: skip


def _drop_absent(model: Any, big: Any) -> None:
    """Parts that this instance was built without, such as the pooler of ``BertModel(add_pooling_layer=False)``."""
    others = dict(big.named_modules())
    for name, module in model.named_modules():
        other = others.get(name)
        for child in () if other is None else list(other._modules):
            if getattr(module, child, other) is None:
                setattr(other, child, None)


def plan_growth(
    model: Any,
    width: int | None = None,
    *,
    heads: str = "more",
    depth: int | None = None,
    noise: float = 0.0,
    exact: bool = True,
    convention: str = "copy",
    rope: str = "stride",
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    model_class: type | None = None,
) -> GrowthPlan:
    """Recipes for every tensor of the grown model; reads names and shapes only.

    Args:
        model: A model, of any device, or a configuration.
        width: As in :func:`grow`, like all that follow.
        heads: See there.
        depth: See there.
        noise: See there.
        exact: See there.
        convention: See there.
        rope: See there.
        hidden_size: See there.
        intermediate_size: See there.
        model_class: Class of the model, if ``model`` is a configuration.

    Returns:
        The plan. ``plan.tensors[name].write(source, out, generator)`` fills one tensor.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: As in :func:`grow`.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> plan = plan_growth(GPT2Config(n_layer=1), model_class=GPT2LMHeadModel)
        >>> plan.tensors["transformer.h.0.mlp.c_fc.weight"].shape
        (1536, 6144)
    """
    options = _check_options(width, hidden_size, intermediate_size, depth, heads, noise, exact, convention, rope)
    if isinstance(model, PretrainedConfig):
        if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
            raise TypeError(f"model_class must be a class of transformers models; got {model_class!r}")
        _family(model)
        model = _build(model_class, model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel; got {type(model).__name__}")
    config = model.config
    family = _family(config)
    parameters, aliases = _names(model)
    expected = _build(type(model), config)
    _drop_absent(model, expected)
    _check_names(model, parameters, aliases, expected)

    prefix = f"{model.base_model_prefix}."
    table = next(iter(parameters))  # the word embeddings come first in all families
    tied = any(target == table for target in aliases.values())
    names = {name.removeprefix(prefix) for name in parameters}
    predicts = any(name.startswith(("cls.predictions.", "lm_head.")) for name in names)
    parts = Parts(prefix, tied, "pooler.dense.weight" in names, predicts)
    growth = measure(family, config, options, parts)
    _check_structure(model, growth)
    family.build(growth)
    big = _build(type(model), growth.config)
    _drop_absent(model, big)
    tensors = _recipes(growth, parameters, big, float(noise))
    unused = set(parameters) - {recipe.source for recipe in tensors.values()}
    if unused or _names(big)[1] != aliases:
        raise ValueError(f"{type(model).__name__} cannot be grown: {', '.join(sorted(unused)) or 'tied parameters'} "
                         "would be lost")  # fmt: skip
    return GrowthPlan(growth.config, type(model), tensors, aliases, tuple(growth.notes), growth)


def _check_structure(model: Any, growth: Growth) -> None:
    """Cases in which the function cannot stay the same."""
    family, options, config = growth.family, growth.options, growth.config
    if options.exact and options.rope == "pair" and family.rotary and options.heads == "wider":
        raise ValueError("rope='pair' changes the frequencies that pairs are turned with, so it is not exact; take "
                         "rope='stride', or exact=False")  # fmt: skip
    if growth.layers[1] > growth.layers[0] and not family.pre_norm:
        if options.exact:
            raise ValueError(
                f"{config.model_type} cannot get deeper exactly: its norms come after the residual sum, and a norm "
                "does not keep what another one has scaled. With exact=False the stack of layers is repeated"
            )
        growth.notes.append("the stack of layers is repeated: the function changes")
    if hasattr(model, "multiple_choice_head") and not (config.summary_use_proj and config.summary_proj_to_labels):
        raise ValueError("the head of multiple choice must give labels: summary_use_proj and summary_proj_to_labels "
                         "must be True, as its output is the hidden state otherwise")  # fmt: skip
    if growth.head_dim[1] > growth.head_dim[0]:
        kind = getattr(model.config, "_attn_implementation", None)
        if kind in FEATURE_MAPS:
            if options.exact:
                raise ValueError(f"heads='wider' is not exact with the attention {kind!r}, whose feature map reads the "
                                 "entries of a head one by one; take heads='more', or exact=False")  # fmt: skip
            growth.notes.append(f"{kind} maps the entries of wider heads to other features: the function changes")
        if family.rotary:
            _check_frequencies(model, growth)


def _check_frequencies(model: Any, growth: Growth) -> None:
    """Pair i of a head must be turned as pair k i of the wider one."""
    if growth.head_dim[0] % 2:
        raise ValueError(f"head_dim must be even; got {growth.head_dim[0]}")
    kind = model.config.rope_parameters["rope_type"]
    if growth.options.rope == "pair":
        growth.notes.append("pairs are turned with other frequencies than before: the function changes")
        return
    same = kind not in ("dynamic", "longrope")  # these depend on the length of the text, and on the width otherwise
    if same:
        module: Any = next(type(m) for m in model.modules() if hasattr(m, "inv_freq"))
        with torch.device("cpu"):
            old, new = (module(config=copy.deepcopy(config)) for config in (model.config, growth.config))
        turned = new.inv_freq[:: growth.head_dim[1] // growth.head_dim[0]]
        same = torch.allclose(turned, old.inv_freq, rtol=1e-6, atol=0)
        same = same and new.attention_scaling == old.attention_scaling
    if not same:
        raise ValueError(
            f"heads='wider' is not exact with rotary positions of type {kind!r}, whose frequencies depend on the width "
            "of a head in another way; take heads='more'"
        )


def _source_name(growth: Growth, name: str) -> tuple[str, str, bool]:
    """Of a name in the grown model: its source, the name under which rules know it, whether its layer is inserted."""
    family = growth.family
    match = re.match(rf"((?:{re.escape(growth.parts.prefix)})?{re.escape(family.layer)}\.)(\d+)(\..*)$", name)
    if match is None:
        return name, name.removeprefix(growth.parts.prefix), False
    layer = int(match[2])
    if family.pre_norm:
        source, inserted = growth.layer_map()[layer]
    else:
        source, inserted = layer % growth.layers[0], False
    return f"{match[1]}{source}{match[3]}", f"{family.layer}.*{match[3]}", inserted


def _recipes(growth: Growth, parameters: dict[str, Any], big: Any, noise: float) -> dict[str, Recipe]:
    """One for every parameter of the grown model, whose shape it must give."""
    family, rules = growth.family, growth.rules
    made: dict[str, Recipe] = {}
    for name, parameter in _names(big)[0].items():
        source, key, inserted = _source_name(growth, name)
        rule: Rule | None = rules.get(name.removeprefix(growth.parts.prefix)) or rules.get(key)
        if rule is None or source not in parameters:
            raise ValueError(f"there is no rule for the parameter {name} of {type(big).__name__}")
        zero = inserted and any(key.startswith(f"{family.layer}.*.{part}.") for part in family.outputs)
        recipe = growth.recipe(rule, source, tuple(parameters[source].shape), noise, 0.0 if zero else 1.0)
        if recipe.shape != tuple(parameter.shape):
            raise ValueError(f"{name} of {type(big).__name__} has shape {tuple(parameter.shape)} by the grown "
                             f"configuration, {recipe.shape} by the rules")  # fmt: skip
        made[name] = recipe
    return made


def grow(
    model: Any,
    width: int | None = None,
    *,
    heads: str = "more",
    depth: int | None = None,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    exact: bool = True,
    convention: str = "copy",
    rope: str = "stride",
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
) -> Any:
    """A larger model of the same class with the same outputs; :func:`kexue.models.verify_growth` measures it.

    For BERT, RoBERTa (also CamemBERT, XLM-R), GPT-2, Llama and GAU-alpha, with any head of transformers. The model is
    not touched. Memory: the grown model, and at most a few MB beside it. Rounding: every value is computed in float32
    (float64 of float64) and rounded once to the dtype of its source, so growth by 2 or 4 is exact in bf16 too, while
    w / 3 is off by half a unit in the last place, as noise is.

    Args:
        model: The small model, transformers' PreTrainedModel.
        width: Factor of all widths; 1 alone gives an exact copy. Default 2, or 1 if ``depth``, ``hidden_size`` or
            ``intermediate_size`` is given.
        heads: "more" heads of the same width, or the same number of "wider" ones.
        depth: Number of layers of the grown model. Exact with Pre-LN (GPT-2, Llama) and GAU-alpha.
        noise: Symmetry breaking: standard deviation of noise as a part of that of each weight, with sum 0 over the
            copies of an input. 0.01 to 0.1 are sensible; 0: copies stay copies in training without dropout.
        generator: Source of the noise, of any device.
        exact: Raise where the function cannot stay the same. False: approximate instead, with a warning.
        convention: "copy", or "orthogonal": residual vectors divided by sqrt(k), which keeps their length, and eps by
            k. The head of BERT needs the old eps, so it is off by O(eps) there.
        rope: With wider heads and rotary positions: "stride" is exact, "pair" (the article's, with ``exact=False``)
            nearly.
        hidden_size: Instead of ``width``: any larger width, if heads divide it. Not exact for BERT and RoBERTa unless
            it is a multiple.
        intermediate_size: Any larger inner width; default: grows as the hidden size does.

    Returns:
        The grown model: same class, dtypes, devices, training flags, ties and generation settings.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Another family, sizes that shrink or that heads do not divide, nothing to grow, parameters that the
            configuration does not describe (adapters, pruned heads, quantised weights, shared ones), cross-attention,
            or a case that cannot be exact.

    Reference:
        https://spaces.ac.cn/archives/8444

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from kexue.models import verify_growth
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=8))
        >>> big = grow(model, width=2, depth=3)
        >>> big.config.n_embd, big.config.n_head, big.config.n_layer
        (32, 4, 3)
        >>> verify_growth(model, big, torch.arange(8)[None]).max_abs < 1e-12
        True
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel; got {type(model).__name__}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator; got {type(generator).__name__}")
    plan = plan_growth(
        model, width, heads=heads, depth=depth, noise=noise, exact=exact, convention=convention, rope=rope,
        hidden_size=hidden_size, intermediate_size=intermediate_size,
    )  # fmt: skip
    parameters = dict(model.named_parameters())
    absent = [name for name, parameter in parameters.items() if parameter.is_meta]
    if absent:
        raise ValueError(f"the model has no values on the meta device: {', '.join(absent[:4])}; load it first")
    if plan.notes and (not exact or plan.growth.eps_error > 1e-9):
        warnings.warn(f"growth of {plan.model_class.__name__}: {'; '.join(plan.notes)}", stacklevel=2)
    big = plan.build()
    _drop_absent(model, big)
    aliases: dict[str, list[str]] = {}
    for alias, name in plan.aliases.items():
        aliases.setdefault(name, []).append(alias)
    for name, recipe in plan.tensors.items():
        source = parameters[recipe.source]
        out = torch.empty(recipe.shape, dtype=source.dtype, device=source.device)
        recipe.write(source, out, generator)
        made = nn.Parameter(out, requires_grad=source.requires_grad)
        for place in (name, *aliases.get(name, ())):
            parent, _, attribute = place.rpartition(".")
            setattr(big.get_submodule(parent), attribute, made)
    _restore_buffers(model, big, plan.growth)
    _restore_state(model, big, plan.growth)
    return big


def _restore_buffers(model: Any, big: Any, growth: Growth) -> None:
    """Buffers depend on the configuration alone: those of the small model, or computed again."""
    old = dict(model.named_buffers())
    for name, buffer in list(big.named_buffers()):
        parent, _, attribute = name.rpartition(".")
        module = big.get_submodule(parent)
        source = old[_source_name(growth, name)[0]]
        if source.shape == buffer.shape:
            value = source.clone()
        else:  # rotary frequencies of a wider head
            with torch.device("cpu"):
                value = getattr(type(module)(config=copy.deepcopy(big.config)), attribute)
            value = value.to(source.device, source.dtype)
        module._buffers[attribute] = value


def _restore_state(model: Any, big: Any, growth: Growth) -> None:
    modules = dict(model.named_modules())
    for name, module in big.named_modules():
        module.training = modules[_source_name(growth, f"{name}.")[0].removesuffix(".")].training
    if getattr(model, "generation_config", None) is not None:
        big.generation_config = copy.deepcopy(model.generation_config)
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        big.gradient_checkpointing_enable()
