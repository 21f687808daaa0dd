"""Initialisation of whole models (整个模型的初始化), by the name of a scheme.

Source: 科学空间 8620 (浅谈Transformer的初始化、参数化与标准化); DeepNorm: https://arxiv.org/abs/2203.00555; Fixup:
https://arxiv.org/abs/1901.09321; the GPT-2 and T5 schemes as in transformers.

The parameters are sorted by ``_roles.py``; a scheme here says which std each sort gets. Biases become 0 and gains of
norms 1 in all of them; buffers stay as they are. A plan of all parameters is made and checked before the first
number is drawn, so that a refused model is unchanged.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kexue._checks import check_choice
from kexue.models._activations import Activation
from kexue.models._roles import Piece, Use, collect
from kexue.models._sampling import check_generator, check_target
from kexue.models._schemes import SCHEMES, DeepNormConstants, Draw, Scheme, deepnorm_constants
from kexue.models.initialization import check_distribution, draw_
from kexue.models.parameterization import NTKLinear

__all__ = ["DeepNormConstants", "InitRow", "deepnorm_constants", "initialization_plan", "initialize_model"]


class InitRow(NamedTuple):
    """What one parameter, or one part of a fused one, gets.

    Attributes:
        name: Name of the parameter; parts as "name (query)".
        rule: In words.
        std: Standard deviation that will be realised; 0 for constants.
    """

    name: str
    rule: str
    std: float


class _Job(NamedTuple):
    parameter: nn.Parameter
    use: Use
    draws: list[tuple[Piece | None, Draw]]
    padding: set[int]  # rows that stay 0, of every table that the parameter is


def _key(p: Tensor) -> tuple[Any, ...]:
    """The memory of a parameter: equal for tied ones, be they one object or two views."""
    return (p.device, p.data_ptr())


def _draws(scheme: Scheme, uses: list[Use]) -> tuple[Use, list[tuple[Piece | None, Draw]]]:
    """The use that decides about a parameter, and what it gets."""
    kinds = {use.kind for use in uses}
    for kind in ("ntk", "table"):  # a tied head follows its table
        chosen = next((use for use in uses if use.kind == kind), None)
        if chosen is not None and kinds <= {"ntk", "table", "matrix"}:
            if scheme.converts:  # every use must be one that can be converted
                for use in uses:
                    for piece in use.pieces:
                        scheme.matrix(use, piece)
            return chosen, [(None, Draw(1.0, "N(0, 1) of NTKLinear") if kind == "ntk" else scheme.table(chosen))]
    if len(kinds) > 1:
        raise ValueError(f"{uses[0].name} is tied to {uses[1].name}, which is used in another way")
    use = uses[0]
    if use.kind == "constant":
        return use, [(None, Draw(0.0, f"{use.constant:g}", constant=use.constant))]
    if scheme.converts:  # nothing depends on the fans: fused matrices in one go, as when they are NTK layers already
        return use, [(None, scheme.matrix(use, use.pieces[0]))]
    return use, [(piece, scheme.matrix(use, piece)) for piece in use.pieces]


def _plan(
    model: nn.Module, name: str, generator: torch.Generator | None, unknown: str, options: dict[str, Any]
) -> tuple[Scheme, list[_Job]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    check_choice("scheme", name, tuple(SCHEMES))
    check_choice("unknown", unknown, ("error", "leave"))
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in SCHEMES[name].options:
            reads = ", ".join(SCHEMES[name].options) or "no options"
            raise ValueError(f"scheme {name!r} does not read {key}; it reads {reads}")
    for path, p in model.named_parameters():
        if torch.nn.parameter.is_lazy(p):
            raise ValueError(f"{path} has no shape yet; run the model once before")
        check_target(path, p)
        check_generator(generator, p.device)
    uses = collect(model)
    groups: dict[tuple[Any, ...], list[Use]] = {}
    for use in uses:
        groups.setdefault(_key(_parameter(use)), []).append(use)
    strange = [use.name for use in uses if use.kind == "unknown"]
    if strange and unknown == "error":
        raise ValueError(
            f"no rule knows {', '.join(strange)}; pass unknown='leave' to leave them as they are and set them yourself"
        )
    tied = any({"table", "matrix"} <= {use.kind for use in group} for group in groups.values())
    scheme = SCHEMES[name](model, uses, tied, given)
    jobs = []
    for group in groups.values():
        if any(use.kind in ("unknown", "fixed") for use in group):
            continue
        use, draws = _draws(scheme, group)
        p = _parameter(use)
        for _, draw in draws:
            if draw.std:
                check_distribution(draw.distribution, draw.std, 2.0, p.dtype)
        padding = {use.padding for use in group if use.padding is not None}
        jobs.append(_Job(p, use, draws, padding))
    return scheme, jobs


def _parameter(use: Use) -> nn.Parameter:
    found = use.owner._parameters[use.name.rpartition(".")[2]]
    if found is None:
        raise RuntimeError(f"{use.name} is gone")  # collect lists what is there
    return found


def initialization_plan(
    model: nn.Module,
    scheme: str = "lecun",
    *,
    mode: str | None = None,
    nonlinearity: str | Activation | None = None,
    distribution: str | None = None,
    std: float | None = None,
    factor: float | None = None,
    qk_split: str | None = None,
    post_norm: bool | None = None,
    unknown: str = "error",
) -> list[InitRow]:
    """What :func:`initialize_model` would do with the same arguments; changes nothing.

    Args:
        model: As there.
        scheme: As there.
        mode: As there.
        nonlinearity: As there.
        distribution: As there.
        std: As there.
        factor: As there.
        qk_split: As there.
        post_norm: As there.
        unknown: As there.

    Returns:
        A row (name, rule, std) for each parameter, three for a fused one; tied parameters once.

    Raises:
        TypeError, ValueError: As there.

    Example:
        >>> for row in initialization_plan(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8)), "he"):
        ...     print(f"{row.name:9} {row.rule:25} {row.std:.4f}")
        0.weight  1 / (fan_in 4 x 0.5)      0.7071
        0.bias    0                         0.0000
        1.weight  1                         0.0000
        1.bias    0                         0.0000
    """
    options = {
        "mode": mode, "nonlinearity": nonlinearity, "distribution": distribution, "std": std, "factor": factor,
        "qk_split": qk_split, "post_norm": post_norm,
    }  # fmt: skip
    _, jobs = _plan(model, scheme, None, unknown, options)
    rows = []
    for job in jobs:
        for piece, draw in job.draws:
            part = f" ({piece.role})" if piece is not None and piece.length is not None else ""
            rows.append(InitRow(job.use.name + part, draw.rule, draw.std))
    return rows


@torch.no_grad()
def initialize_model(
    model: nn.Module,
    scheme: str = "lecun",
    generator: torch.Generator | None = None,
    *,
    mode: str | None = None,
    nonlinearity: str | Activation | None = None,
    distribution: str | None = None,
    std: float | None = None,
    factor: float | None = None,
    qk_split: str | None = None,
    post_norm: bool | None = None,
    unknown: str = "error",
) -> nn.Module:
    """Give all parameters of a model new values, in place.

    For models of plain torch modules (Linear, convolutions, Embedding, norms, MultiheadAttention, PReLU, NTKLinear,
    ScheduledResidual) and of transformers. Biases become 0, gains of norms 1 (0 where the norm adds 1), rows of
    ``padding_idx`` 0. Fused query-key-value matrices are initialised by thirds, tied tensors once, frozen ones too.
    Buffers stay, and so do frozen tables of sines and cosines (positions of Marian, RoFormer, Whisper).

    Args:
        model: The model; its parameters must have memory (see ``torch.nn.Module.to_empty``).
        scheme: "lecun" 1/fan_in, "xavier" 2/(fan_in + fan_out), "he" 2/fan_in (in every matrix, whatever it reads):
            truncated normals of that variance, look-ups 1 (width^(-1/2) for all tables if one is tied to a head).
            "t5": transformers' T5, see ``qk_split``. Models that divide scores by sqrt(d) keep q like k, and get
            width^(-1/2) for tables if one is tied to a head, since only T5 divides the hidden states before it.
            "bert": cut at two std, std before truncation (.0176 comes out of .02). "gpt2": normal, output projections
            of residual branches times (branches)^(-1/2), the (2L)^(-1/2) of GPT-2.
            "deepnorm": Xavier-normal with gain beta (:func:`deepnorm_constants`) on v, o and the FFN, for Post-LN
            blocks. The other half, LN(alpha x + F(x)), is the model's: no model of torch or transformers has alpha.
            "fixup": last matrix of each branch and untied heads 0, the other matrices of branches He times
            (branches)^(-1/2), the rest He. Its scalar biases and multipliers, and having no norms, are the model's.
            "ntk": N(0, 1); each ``nn.Linear`` (and Conv1D of GPT-2) is replaced by an :class:`kexue.models.NTKLinear`
            around the same Parameters.
        generator: Source of randomness, on the device of the parameters.
        mode: lecun, xavier, he: mean of the fans, as in :func:`kexue.models.fan`.
        nonlinearity: lecun, xavier, he: what the matrices read, as in :func:`kexue.models.variance_scaling_`.
        distribution: lecun, xavier, he: "truncated_normal" (default), "normal" or "uniform".
        std: gpt2, bert: instead of .02.
        factor: t5: on all stds; default ``config.initializer_factor``, else 1.
        qk_split: t5, for attention that does not divide its scores by sqrt(d): "q" (default) puts d^(-1/2) on q,
            "both" d^(-1/4) on q and on k.
        post_norm: deepnorm: True vouches that blocks of a class that is not known here are Post-LN.
        unknown: What becomes of parameters that no rule knows (scales, recurrent weights, fused experts): "error" or
            "leave".

    Returns:
        The model.

    Raises:
        TypeError: Wrong kind of argument; parameters that are not floating.
        ValueError: Unknown scheme; an option that the scheme does not read; parameters that no rule knows (named), that
            are empty or on the meta device; deepnorm with Pre-LN blocks; ntk with matrices other than those of linear
            layers. The model is unchanged then.

    Reference:
        https://spaces.ac.cn/archives/8620

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256))
        >>> model = initialize_model(model, "he", torch.Generator().manual_seed(0))
        >>> [f"{float(model[i].weight.detach().var()) * n:.1f}" for i, n in ((0, 256), (2, 512))]
        ['2.0', '2.0']
    """
    options = {
        "mode": mode, "nonlinearity": nonlinearity, "distribution": distribution, "std": std, "factor": factor,
        "qk_split": qk_split, "post_norm": post_norm,
    }  # fmt: skip
    made, jobs = _plan(model, scheme, generator, unknown, options)
    for parameter, _, draws, padding in jobs:
        for piece, draw in draws:
            w = parameter.detach() if piece is None else piece.of(parameter.detach())
            if draw.std:
                draw_(w, draw.std, draw.distribution, 2.0, generator)
            else:
                w.fill_(draw.constant)
        for row in padding:
            parameter[row].zero_()
    return _converted(model) if made.converts else model


def _converted(model: nn.Module) -> nn.Module:
    """The model with an NTKLinear around the same parameters in the place of every nn.Linear and Conv1D."""
    if NTKLinear.can_replace(model):
        return NTKLinear.from_linear(model)
    new: dict[nn.Module, NTKLinear] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() hides the second name of a shared layer
            if child is not None and NTKLinear.can_replace(child):
                setattr(parent, name, new.setdefault(child, NTKLinear.from_linear(child)))
    return model
