"""Per-example gradients of one layer, kept as inputs and output gradients instead of as a Jacobian.

A layer that multiplies its input a (T positions, width i) by a weight leaves, for an example, the gradient
sum_t d_t a_t^T, where d is the gradient with respect to the layer's output. Inner products of two examples then need no
such matrix ("layered Gram"):

    <sum_t d_t a_t^T, sum_u e_u b_u^T> = sum_tu (d_t . e_u) (a_t . b_u)

and a bias adds 1 to a_t . b_u. Whether the matrix or the Gram is cheaper depends on the sizes; :func:`inner` counts.
Letters: k steps of the path, q points of the quadrature on one step, R rows (examples), C output gradients per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F


@dataclass
class Side:
    """What the test points, or the training examples, left at one layer.

    Attributes:
        a: Inputs (k, q, R, T, i); of an embedding the ids (k, q, R, T).
        d: Output gradients (k, q, C, R, T, o), weighted by the quadrature.
        constant: The inputs do not depend on the parameters: they are the same for all k and q.
    """

    a: Tensor
    d: Tensor
    constant: bool = False

    @property
    def rows(self) -> int:
        """Number of gradients per step: C R."""
        return self.d.shape[2] * self.d.shape[3]

    def averaged(self) -> Side:
        """With constant inputs the quadrature is a sum of output gradients alone."""
        if not self.constant or self.a.shape[1] == 1:
            return self
        return Side(self.a[:, :1], self.d.sum(1, keepdim=True), True)


class Layer:
    """A module whose parameters have a layer form; ``names`` are those that are trained, in the order of the parts."""

    has_gram = False

    def __init__(self, module: Any, names: dict[str, str]) -> None:
        self.module = module
        self.weight, self.bias = "weight" in names, "bias" in names
        self.names = [names[key] for key in ("weight", "bias") if key in names]

    def accepts(self, a: Tensor, z: Tensor) -> bool:
        """Whether the rows of input and output are the same and come first."""
        return z.dim() > 1 and a.shape[:1] == z.shape[:1]

    def inputs(self, a: Tensor) -> Tensor:
        """(K, R, t, *rest) where the module got (R t, *rest) -> (K, R, T, i)."""
        raise NotImplementedError

    def outputs(self, d: Tensor) -> Tensor:
        """(K, R, t, *rest) where the module returned (R t, *rest) -> (K, R, T, o)."""
        raise NotImplementedError

    def width(self, z: tuple[int, ...]) -> int:
        """o, from the shape of an output behind the rows."""
        return max(1, z[-1])

    def plain(self, a: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        """What the module computes, with other parameters."""
        raise NotImplementedError

    def stacked(self, a: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        """The same for K parameters (K, ...) at once: a (K R t, ...), the first point's rows first -> (K, R t, ...)."""
        split = a.unflatten(0, (len(weight), -1))
        return vmap(self.plain, (0, 0, None if bias is None else 0))(split, weight, bias)

    def unstacked(self, z: Tensor, a: Tensor) -> Tensor:
        """What :meth:`stacked` made of ``a``, in the shape of the module's output."""
        return z.flatten(0, 1)

    def weight_gradients(self, side: Side) -> Tensor:
        """(k, C R, p): gradients of the weight, summed over positions and quadrature."""
        raise NotImplementedError

    def cross(self, a: Tensor, b: Tensor) -> Tensor:
        """(P, i), (Q, i) -> (P, Q): inner products of inputs."""
        raise NotImplementedError

    def gradients(self, side: Side) -> list[Tensor]:
        """(k, C R, p) for each parameter."""
        parts = [self.weight_gradients(side)] if self.weight else []
        if self.bias:
            k = side.d.shape[0]
            parts.append(side.d.sum((1, 4)).reshape(k, side.rows, -1))
        return parts


class Dense(Layer):
    """``nn.Linear``."""

    has_gram = True

    def inputs(self, a: Tensor) -> Tensor:
        return a.flatten(2, -2)

    def outputs(self, d: Tensor) -> Tensor:
        return d.flatten(2, -2)

    def plain(self, a: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        return F.linear(a, weight, bias)

    def stacked(self, a: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        flat = a.unflatten(0, (len(weight), -1)).flatten(1, -2)
        return flat @ weight.mT if bias is None else torch.baddbmm(bias[:, None], flat, weight.mT)

    def unstacked(self, z: Tensor, a: Tensor) -> Tensor:
        return z.view(*a.shape[:-1], z.shape[-1])

    def weight_gradients(self, side: Side) -> Tensor:
        a, d = side.a, side.d
        k, q, c, r, t, o = d.shape
        if c * o == 1 and t == 1:  # one output: the products themselves, added up in place
            total = a[:, 0] * d[:, 0, 0]
            for point in range(1, q):
                total.addcmul_(a[:, point], d[:, point, 0])
            return total[:, :, 0]
        left = d.permute(0, 3, 2, 5, 1, 4).reshape(k * r, c * o, q * t)
        right = a.permute(0, 2, 1, 3, 4).reshape(k * r, q * t, a.shape[-1])
        made = (left @ right).view(k, r, c, o * a.shape[-1])
        return made.transpose(1, 2).reshape(k, c * r, -1)

    def cross(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b.mT


class Convolution(Dense):
    """``nn.Conv1d`` and ``nn.Conv2d`` of one group: a Linear on patches, one position per patch."""

    def accepts(self, a: Tensor, z: Tensor) -> bool:
        return super().accepts(a, z) and a.dim() == len(self.module.kernel_size) + 2

    def plain(self, a: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        return self.module._conv_forward(a, weight, bias)

    def stacked(self, a: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        return Layer.stacked(self, a, weight, bias)

    def unstacked(self, z: Tensor, a: Tensor) -> Tensor:
        return Layer.unstacked(self, z, a)

    def inputs(self, a: Tensor) -> Tensor:
        conv = self.module
        flat = a.flatten(0, 2)
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        flat = F.pad(flat, conv._reversed_padding_repeated_twice, mode=mode)
        kernel, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
        if flat.dim() == 3:
            flat, one = flat[:, :, None], (1,)
            kernel, stride, dilation = one + kernel, one + stride, one + dilation
        patches = F.unfold(flat, kernel, dilation, 0, stride).mT
        return patches.reshape(*a.shape[:2], -1, patches.shape[-1])

    def outputs(self, d: Tensor) -> Tensor:
        return d.flatten(4).mT.flatten(2, 3)

    def width(self, z: tuple[int, ...]) -> int:
        return max(1, z[0])


class Table(Layer):
    """``nn.Embedding``: a Linear on one-hot vectors that are never made."""

    has_gram = True

    def inputs(self, a: Tensor) -> Tensor:
        return a.flatten(2)

    def outputs(self, d: Tensor) -> Tensor:
        return d.flatten(2, -2)

    def plain(self, a: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        return F.embedding(a, weight, self.module.padding_idx)

    def weight_gradients(self, side: Side) -> Tensor:
        ids, d = side.a, side.d
        k, q, c, r, t, o = d.shape
        table = self.module
        made = d.new_zeros(k * c * r, table.num_embeddings, o)
        place = ids[:, :, None].expand(k, q, c, r, t).permute(0, 2, 3, 1, 4).reshape(k * c * r, q * t, 1)
        rows = d.permute(0, 2, 3, 1, 4, 5).reshape(k * c * r, q * t, o)
        made.scatter_add_(1, place.long().expand(-1, -1, o), rows)
        if table.padding_idx is not None:
            made[:, table.padding_idx] = 0
        return made.view(k, c * r, -1)

    def cross(self, a: Tensor, b: Tensor) -> Tensor:
        same = a[:, None] == b
        if self.module.padding_idx is not None:
            same &= (a != self.module.padding_idx)[:, None]
        return same.to(self.module.weight.dtype)


class Scale(Layer):
    """``nn.LayerNorm`` and ``nn.GroupNorm``: normalised inputs times a weight, plus a bias."""

    def plain(self, a: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        norm = self.module
        if isinstance(norm, nn.GroupNorm):
            return F.group_norm(a, norm.num_groups, weight, bias, norm.eps)
        return F.layer_norm(a, norm.normalized_shape, weight, bias, norm.eps)

    def inputs(self, a: Tensor) -> Tensor:
        return self.outputs(self.plain(a.flatten(0, 2), None, None).view(a.shape))

    def outputs(self, d: Tensor) -> Tensor:
        if isinstance(self.module, nn.GroupNorm):
            return d.unsqueeze(-1).flatten(4).mT.flatten(2, 3)
        return d.flatten(-len(self.module.normalized_shape)).flatten(2, -2)

    def weight_gradients(self, side: Side) -> Tensor:
        a, d = side.a, side.d
        made = torch.einsum("kqrti,kqcrti->kcri", a, d)
        return made.reshape(d.shape[0], side.rows, -1)


def layer_of(module: nn.Module, names: dict[str, str]) -> Layer | None:
    """The layer form of a module, or None.

    Args:
        module: Any module; only exact types count, as a subclass may compute something else.
        names: Attribute -> full name of its trainable parameters.
    """
    if set(module._parameters) - {"weight", "bias"} or not names:  # parametrised in some other way
        return None
    kind = type(module)
    if kind is nn.Linear:
        return Dense(module, names)
    if kind in (nn.Conv1d, nn.Conv2d) and module.groups == 1:
        return Convolution(module, names)
    if kind is nn.Embedding and not (module.scale_grad_by_freq or module.max_norm is not None):
        return Table(module, names)
    if kind in (nn.LayerNorm, nn.GroupNorm):
        return Scale(module, names)
    return None


def inner(layer: Layer, test: Side, train: Side, total: bool) -> Tensor:
    """Inner products of the gradients of all test points with those of all training examples at one layer.

    Args:
        layer: The layer.
        test: Of k steps and q points.
        train: Of the same k steps, q = 1.
        total: Sum over the steps (the training examples are the same in each).

    Returns:
        (C M, C' N) if total, else (k, C M, C' N).
    """
    test = test.averaged()
    k, q, c, m, t, o = test.d.shape
    c2, n, u = train.d.shape[2:5]
    fixed = total and test.constant and train.constant
    if not layer.weight or not layer.has_gram or _matrix_is_cheaper(layer, test, train, fixed):
        return pairs(layer.gradients(test), layer.gradients(train), total)
    d, e = test.d.reshape(k, -1, o), train.d.reshape(k, -1, o)
    a = test.a.reshape(k, q * m * t, *test.a.shape[4:])
    b = train.a.reshape(k, n * u, *train.a.shape[4:])

    def product(step: int, of_gradients: Tensor) -> Tensor:  # one step at a time: it stays in the cache
        of_gradients = of_gradients.view(q, c, m, t, c2, n, u)
        of_inputs = layer.cross(a[step], b[step]).view(q, 1, m, t, 1, n, u)
        if layer.bias:  # (x + 1) y without a pass of its own
            of_gradients.addcmul_(of_gradients, of_inputs)
        else:
            of_gradients.mul_(of_inputs)
        summed = [dim for dim, size in ((0, q), (3, t), (6, u)) if size != 1]
        return (of_gradients.sum(summed) if summed else of_gradients).reshape(c * m, c2 * n)

    if fixed:  # one matrix of products of inputs serves all steps
        return product(0, torch.addbmm(d.new_zeros(()), d, e.mT))
    steps = (product(step, d[step] @ e[step].mT) for step in range(k))
    if not total:
        return torch.stack(list(steps))
    out = next(steps)
    for more in steps:
        out += more
    return out


def _matrix_is_cheaper(layer: Layer, test: Side, train: Side, fixed: bool) -> bool:
    """Whether gradients as matrices need fewer operations than the layered Gram."""
    _, q, c, m, t, o = test.d.shape
    c2, n, u = train.d.shape[2:5]
    size = layer.module.weight.shape[0] if isinstance(layer, Table) else layer.module.weight[0].numel()
    matrix = c * m * c2 * n * size * o + (c * m * q * t + c2 * n * u) * size * o
    positions = q * t * u
    gram = positions * c * m * c2 * n * o
    if not fixed:  # products of inputs, and about ten operations' time to read and write each product
        gram += positions * (m * n * size + 10 * c * m * c2 * n)
    return bool(matrix < gram)


def pairs(left: list[Tensor], right: list[Tensor], total: bool) -> Tensor:
    """Sum over the parameters of (k, P, p) (k, Q, p)^T."""
    out: Tensor | None = None
    for x, y in zip(left, right, strict=True):
        if total:
            out = torch.addbmm(x.new_zeros(()) if out is None else out, x, y.mT)
        else:
            out = x @ y.mT if out is None else out.baddbmm_(x, y.mT)
    if out is None:
        raise ValueError("no gradients to multiply")
    return out
