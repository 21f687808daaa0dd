"""What each parameter of a model is for: matrices with their fans, tables, norms, biases, and their place in a block.

Modules are told apart by their type; what a matrix does in a Transformer block (query, FFN output, ...) by its name,
for the names that torch and transformers use. A block is the innermost numbered module that holds the output
projections of an attention and of an FFN.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from kexue.attention.gated_attention import ScaleOffset
from kexue.models._norms import is_norm, neutral_gain
from kexue.models.initialization import fans
from kexue.models.parameterization import NTKLinear, ScheduledResidual, is_conv1d
from kexue.models.positions import HierarchicalPositionEmbedding


@dataclass(frozen=True)
class Piece:
    """A matrix, or the part of a fused one that makes queries, keys or values."""

    role: str
    fan_in: int
    fan_out: int
    dim: int = 0
    start: int = 0
    length: int | None = None  # None: the whole parameter

    def of(self, w: Tensor) -> Tensor:
        """The part of the parameter."""
        return w if self.length is None else w.narrow(self.dim, self.start, self.length)


@dataclass(frozen=True)
class Use:
    """One place where a module uses a parameter.

    Attributes:
        name: Name of the parameter in the model.
        kind: "matrix", "table", "ntk", "constant", "fixed" (stays as it is) or "unknown".
        pieces: Of a matrix.
        constant: Of kind "constant".
        width: Of a table: size of a row.
        padding: Of a table: the row that stays 0.
        relative: A table of biases of attention scores.
        block: Name of the block; None outside of blocks.
        head: A matrix that makes logits.
        owner: The module.
        parent: The module around it.
    """

    name: str
    kind: str
    owner: nn.Module
    parent: nn.Module
    pieces: tuple[Piece, ...] = ()
    constant: float = 0.0
    width: int = 1
    padding: int | None = None
    relative: bool = False
    block: str | None = None
    head: bool = False


@dataclass
class Stack:
    """Blocks that follow one another.

    Attributes:
        blocks: Their names.
        branches: Number of residual branches.
        cross: Whether the blocks attend to another stack.
        repeats: How often the blocks are run (ALBERT runs one many times).
    """

    blocks: list[str] = field(default_factory=list)
    branches: int = 0
    cross: bool = False
    repeats: int = 1


def names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


_LEAVES = {
    "query": "query q_proj q q_lin q_attn query_proj to_q",
    "key": "key k_proj k k_lin key_proj to_k",
    "value": "value v_proj v v_lin value_proj to_v",
    "qkv": "c_attn query_key_value qkv_proj Wqkv qkv",
    "attention_out": "out_proj o_proj o out_lin",
    "ffn_in": "fc1 linear1 wi wi_0 wi_1 up_proj gate_proj gate_up_proj c_fc dense_h_to_4h lin1 fc_in w1 w3 Wi ffn",
    "ffn_out": "fc2 linear2 wo down_proj dense_4h_to_h lin2 fc_out w2 ffn_output",
}
ROLE_OF_LEAF = {leaf: role for role, leaves in _LEAVES.items() for leaf in leaves.split()}
HEADS = names(
    "lm_head generator_lm_head vocab_projector embed_out classifier classification_head score qa_outputs "
    "seq_relationship decoder"
)
CROSS = names("multihead_attn encoder_attn EncDecAttention crossattention")
# Look-ups that are no module of their own: vectors that a model adds to its input or puts in front of it (ViT)
VECTORS = re.compile(r"(cls|class|mask|dist|distillation|register)_(tokens?|embedding)|pos(ition)?_embed(ding)?s?")


def role_of(path: str) -> str:
    """What the matrix of a module does in its block, by the module's name."""
    *above, leaf = path.split(".")
    parent, grand = (["", "", *above])[-1], (["", "", *above])[-2]
    if leaf in ("c_proj", "Wo"):  # GPT-2 and ModernBERT name both outputs alike
        return "attention_out" if "att" in parent else "ffn_out"
    if leaf == "dense":
        if parent == "output":
            return "attention_out" if "att" in grand.lower() else "ffn_out"
        return "ffn_in" if parent == "intermediate" else "attention_out" if "att" in parent.lower() else "other"
    return ROLE_OF_LEAF.get(leaf, "other")


def is_head(path: str) -> bool:
    """Whether the matrix of a module makes logits, by the module's name."""
    *above, leaf = path.split(".")
    return leaf in HEADS or (leaf == "out_proj" and bool(above) and above[-1] in HEADS)


def _thirds(role: str, shape: tuple[int, ...], transposed: bool) -> tuple[Piece, ...]:
    """The pieces of a matrix (out, in) or, transposed, (in, out)."""
    fan_in, fan_out = fans(shape, 1, transposed)
    parts = ("query", "key", "value")[-(fan_out // fan_in) :] if role == "qkv" else ()
    if fan_out not in (2 * fan_in, 3 * fan_in) or not parts:  # with fewer key heads the sizes are not known here
        return (Piece("other" if role == "qkv" else role, fan_in, fan_out),)
    return tuple(Piece(n, fan_in, fan_in, int(transposed), i * fan_in, fan_in) for i, n in enumerate(parts))


def _has_gain(module: nn.Module) -> bool:
    """Whether the module is a norm, or the scale and offset of a gated attention unit, whose gain starts at 1 too."""
    return is_norm(module) or isinstance(module, ScaleOffset)


@torch.no_grad()
def _is_fixed_code(table: Tensor) -> bool:
    """Whether a table is a code of sines and cosines that is not trained: rows of length sqrt(D / 2) (or 0).

    Marian, Pegasus, RoFormer and Whisper hold such codes of positions as frozen parameters.
    """
    if table.requires_grad:
        return False
    squares = table.float().square().sum(-1) / (table.shape[-1] / 2)
    used = squares[squares > 0]
    return bool(used.numel() and ((used - 1).abs() < 0.01).all())  # a rounding to bfloat16 is below .004


def _table(p: Tensor, **what: Any) -> dict[str, Any]:
    return {"kind": "fixed"} if _is_fixed_code(p) else {"kind": "table", "width": p.shape[-1], **what}


def _direct(module: nn.Module, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(attribute, what it is) of each parameter that the module itself holds."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    leaf = path.split(".")[-1]
    for name, p in own.items():
        shape = tuple(p.shape)
        zero = {"kind": "constant", "constant": 0.0}
        if isinstance(module, nn.MultiheadAttention) and name.endswith("proj_weight"):
            if name == "in_proj_weight":
                pieces = _thirds("qkv", shape, False)
            else:
                pieces = _thirds({"q": "query", "k": "key", "v": "value"}[name[0]], shape, False)
            yield name, {"kind": "matrix", "pieces": pieces}
        elif isinstance(module, nn.MultiheadAttention):
            yield name, zero  # in_proj_bias, bias_k, bias_v
        elif isinstance(module, NTKLinear) and name == "weight":
            yield name, {"kind": "ntk"}
        elif isinstance(module, nn.Linear) and name == "weight":
            yield name, {"kind": "matrix", "pieces": _thirds(role_of(path), shape, False), "head": is_head(path)}
        elif is_conv1d(module) and name == "weight":
            yield name, {"kind": "matrix", "pieces": _thirds(role_of(path), shape, True)}
        elif isinstance(module, _ConvNd) and name == "weight":
            both = fans(shape, module.groups, isinstance(module, _ConvTransposeNd))
            yield name, {"kind": "matrix", "pieces": (Piece("other", *both),)}
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag | HierarchicalPositionEmbedding) and name == "weight":
            relative = "relative" in leaf and "bias" in leaf
            yield name, _table(p, padding=module.padding_idx, relative=relative)
        elif _has_gain(module) and name in ("weight", "gamma", "scale"):
            yield name, {"kind": "constant", "constant": neutral_gain(module, name, p)}
        elif isinstance(module, ScheduledResidual) and name == "alpha":
            yield name, zero
        elif isinstance(module, nn.PReLU):
            yield name, {"kind": "constant", "constant": 0.25}
        elif re.search(r"(^|_)(bias|beta)$", name) and p.dim() == 1:
            yield name, zero
        elif VECTORS.fullmatch(name) and shape:
            yield name, _table(p)
        else:
            yield name, {"kind": "unknown"}


def collect(model: nn.Module) -> list[Use]:
    """Every use of every parameter, tied ones at each of their places, in the order of the modules."""
    uses = []
    for path, module in model.named_modules(remove_duplicate=False):
        parent = model.get_submodule(path.rpartition(".")[0])
        for name, what in _direct(module, path):
            uses.append(Use(name=f"{path}.{name}" if path else name, owner=module, parent=parent, **what))
    blocks = _block_names(uses)
    placed = []
    for use in uses:
        inside = [b for b in blocks if use.name.startswith(f"{b}." if b else "")]
        block = max(inside, key=len, default=None)
        if block is None and use.kind == "matrix":
            use = replace(use, pieces=tuple(replace(p, role=_outside(p.role)) for p in use.pieces))
        placed.append(replace(use, block=block, head=use.head and block is None))
    return placed


def _outside(role: str) -> str:
    return role if role in ("query", "key", "value") else "other"


def _block_names(uses: list[Use]) -> set[str]:
    """Innermost modules with a number for a name that hold both outputs; the model itself if there is none."""
    held: dict[str, set[str]] = {}
    for use in uses:
        roles = {piece.role for piece in use.pieces}
        parts = use.name.split(".")
        for end in [0, *(i + 1 for i, part in enumerate(parts) if part.isdigit())]:
            held.setdefault(".".join(parts[:end]), set()).update(roles)
    both = {name for name, roles in held.items() if {"attention_out", "ffn_out"} <= roles}
    return {b for b in both if not any(o != b and o.startswith(f"{b}." if b else "") for o in both)}


def stacks(model: nn.Module, uses: list[Use]) -> dict[str, Stack]:
    """The stacks of blocks, by the name of what holds the blocks."""
    found: dict[str, Stack] = {}
    branches = set()
    for use in uses:
        if use.block is None:
            continue
        stack = found.setdefault(use.block.rpartition(".")[0], Stack())
        if use.block not in stack.blocks:
            stack.blocks.append(use.block)
        branch = use.name.partition(".experts.")[0]  # the experts of a layer make one branch
        if branch not in branches and any(piece.role in ("attention_out", "ffn_out") for piece in use.pieces):
            branches.add(branch)
            stack.branches += 1
        stack.cross |= bool(CROSS & set(use.name.split(".")))
    for name, stack in found.items():
        if name.endswith("albert_layers"):
            layers = setting(model, "num_hidden_layers", len(stack.blocks))
            stack.repeats = max(1, layers // len(stack.blocks))
    return found


def setting(model: nn.Module, name: str, default: Any) -> Any:
    """The value that the outermost configuration with such an entry gives; a model may be wrapped in another module."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return next((getattr(config, name) for config in configs if hasattr(config, name)), default)


def stack_of(use: Use) -> str | None:
    """Name of the stack that holds the use."""
    return None if use.block is None else use.block.rpartition(".")[0]


def unscaled_head_size(use: Use) -> int | None:
    """Size of a head of the attention around a matrix if it does not divide its scores (T5 and its kin)."""
    size = getattr(use.parent, "key_value_proj_dim", None)
    return size if isinstance(size, int) and getattr(use.parent, "scaling", 1.0) == 1.0 else None
