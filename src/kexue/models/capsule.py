"""Capsule layers routed by K-means (胶囊与 K-Means).

Source: 科学空间 5112 (再来一顿贺岁宴:从K-Means到Capsule), code bojone/Capsule; the layer is that of Sabour, Frosst and
Hinton 2017 (arXiv 1710.09829).

Soft K-means with d(u, v) = -<u, v / |v|> gives c_ij = softmax over j of <u_ij, v_j / |v_j|> and v_j parallel to the
sum of c_ij u_ij, taken as that sum: more members make a longer centre. So, for votes u_ij = u_i W_j,

    v_j <- sum_i u_ij / k,   then r - 1 times   v_j <- sum_i softmax_j <u_ij, v_j / |v_j|> u_ij,   then squash(v_j)

Logits are replaced, not accumulated, and squashing comes once, at the end. What we do differently: masks; with shared
weights the votes are never built, since <u_i W_j, v> = <u_i, W_j v>; and the backward pass is ours (see
``_capsule_kernel``), which keeps the inputs and the r sums and nothing of the size of the votes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kexue._checks import check_choice, check_int, check_real
from kexue._tensors import check_float, compute_dtype
from kexue.models._capsule_kernel import SQUASH_EPS, Route, lengths

__all__ = ["Capsule", "CapsulePooler", "capsule_routing", "squash"]

ROUTINGS = ("kmeans", "hinton", "squash")


def squash(v: Tensor, kappa: float = 0.5, dim: int = -1) -> Tensor:
    """Shorten vectors to a length in [0, 1) that says how sure they are: |v|^2 / (kappa + |v|^2) in the same direction.

    Args:
        v: Vectors along ``dim``, any shape; fp16 and bf16 are computed in float32.
        kappa: Squared length that becomes 1/2. 0.5 is the article's choice, which lengthens short vectors; 1 Hinton's.
        dim: Axis of the vectors.

    Returns:
        Same shape and dtype. The squared norm has 1e-7 added inside the root, so that 0 has a gradient.

    Raises:
        TypeError: ``v`` is not a floating tensor, ``kappa`` not a number, ``dim`` not an integer.
        ValueError: ``kappa`` is not positive.
        IndexError: ``v`` has no axis ``dim``.

    Example:
        >>> squash(torch.tensor([3.0, 4.0]), kappa=1.0)
        tensor([0.5769, 0.7692])
    """
    check_float("v", v)
    check_real("kappa", kappa, above=0.0)
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an integer; got {dim!r} of type {type(dim).__name__}")
    if not -v.dim() <= dim < v.dim():
        raise IndexError(f"dim must be an axis of v, whose shape is {tuple(v.shape)}; got {dim}")
    x = v.to(compute_dtype(v))
    m = lengths(x, SQUASH_EPS, dim)
    return (x / (kappa / m + m)).to(v.dtype)


def _check_options(routings: Any, routing: Any, kappa: Any, temperature: Any) -> None:
    check_int("routings", routings, 1)
    check_choice("routing", routing, ROUTINGS)
    check_real("kappa", kappa, above=0.0)
    check_real("temperature", temperature, above=0.0)
    check_real("temperature", temperature, minimum=1e-30)  # as far as float32 reaches


def _check_mask(mask: Any, shape: tuple[int, ...]) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, True = takes part; got {found}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"mask must have shape {shape}, one entry for each input; got {tuple(mask.shape)}")


def _route(
    x: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    capsules: int,
    routings: int,
    routing: str,
    kappa: float,
    temperature: float,
    hard: bool,
    detach: bool,
    return_coupling: bool,
) -> Any:
    """The checked call, x (..., n, i) with a weight or votes (..., n, k, o) without."""
    inner = x.shape[-2:] if weight is not None else x.shape[-3:]
    leading = x.shape[: x.dim() - len(inner)]
    dtype = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    batch = leading.numel()  # not -1, which is ambiguous for empty tensors
    flat_mask = None if mask is None else mask.reshape(batch, inner[0])
    v, c = Route.apply(
        x.reshape(batch, *inner), weight, flat_mask, int(capsules), int(routings), routing, 1.0 / float(temperature),
        bool(hard), bool(detach), bool(return_coupling),
    )  # fmt: skip
    # kappa belongs to the article's rule; the published forms of the two others have 1 everywhere
    v = squash(v, kappa if routing == "kmeans" else 1.0).to(dtype).reshape(*leading, *v.shape[1:])
    if not return_coupling:
        return v
    c = c.to(dtype).reshape(*leading, *c.shape[1:])
    return v, c.detach() if hard or detach or routings == 1 else c


def capsule_routing(
    votes: Tensor,
    routings: int = 3,
    routing: str = "kmeans",
    *,
    mask: Tensor | None = None,
    kappa: float = 0.5,
    temperature: float = 1.0,
    hard: bool = False,
    detach_routing: bool = False,
    return_coupling: bool = False,
) -> Any:
    """Group votes into capsules by agreement.

    Args:
        votes: (..., n, k, d), the vote of each of n inputs for each of k capsules.
        routings: Number of weighted sums r, at least 1; 1 is the plain average over the capsules.
        routing: "kmeans": the article's rule; "squash": replaced logits, squashed centres (article 4819); "hinton":
            accumulated logits, squashed centres (the paper's, which hardens with r).
        mask: (..., n) bool, True = takes part. What stands at other places does not matter.
        kappa: Constant of the final :func:`squash` of "kmeans"; the two other rules have 1 inside and at the end.
        temperature: Logits are divided by it; the K of K-means is its inverse.
        hard: Every input gives all its weight to the best capsule, the first of equal ones (K-means proper). The
            coefficients then have no gradient.
        detach_routing: Treat the coefficients as constants in the backward pass.
        return_coupling: Also return the coefficients of the last sum.

    Returns:
        (..., k, d) in the dtype of the votes, with lengths in [0, 1); with ``return_coupling`` also (..., n, k), whose
        rows sum to 1, or are 0 where the mask is False. An example without inputs gives zeros. Differentiable once.

    Raises:
        TypeError: Votes that are no floating tensor, a mask that is not bool, a setting of the wrong kind.
        ValueError: Fewer than 3 axes, no capsule, r < 1, a mask of another shape, an unknown rule, or a constant
            that is not positive.

    Reference:
        https://spaces.ac.cn/archives/5112

    Example:
        >>> votes = torch.tensor([[[4.0, 0.0], [0.0, 1.0]], [[4.0, 0.0], [0.0, 1.0]]])  # both prefer the first
        >>> v, c = capsule_routing(votes, return_coupling=True)
        >>> c
        tensor([[0.9526, 0.0474],
                [0.9526, 0.0474]])
    """
    check_float("votes", votes)
    if votes.dim() < 3:
        raise ValueError(f"votes must have shape (..., inputs, capsules, width); got {tuple(votes.shape)}")
    if votes.shape[-2] < 1:
        raise ValueError(f"votes must be for at least 1 capsule; got shape {tuple(votes.shape)}")
    _check_options(routings, routing, kappa, temperature)
    _check_mask(mask, tuple(votes.shape[:-2]))
    return _route(
        votes, None, mask, votes.shape[-2], routings, routing, kappa, temperature, hard, detach_routing, return_coupling
    )


class Capsule(nn.Module):
    """A layer of capsules over a set of input vectors.

    With shared weights (default) inputs of any number are taken, as positions of a text or of a feature map, and the
    votes (B, n, k, d) are never built, and nothing of the size of n is kept between the passes. With dense weights
    every input has its own matrices, and votes exist for one input or for a block of examples at a time. In float32 on
    a CPU the passes are compiled on first use (some seconds, kept on disk), and use torch's number of threads.

    Args:
        d_in: Width of the inputs.
        num_capsules: k, number of capsules.
        dim_capsule: d, their width.
        routings: r, number of weighted sums, at least 1.
        share_weights: One matrix for each capsule; False: one for each pair of input and capsule.
        routing: "kmeans", "squash" or "hinton", see :func:`capsule_routing`.
        kappa: Constant of the final squash, "kmeans" only.
        num_inputs: n, needed with dense weights; when given with shared weights, other numbers are refused as well.
        temperature: Logits are divided by it.
        detach_routing: No gradient through the coefficients.

    Attributes:
        weight: (d_in, k * d), or dense (n, d_in, k * d); Glorot uniform on (d_in, k * d).

    Raises:
        TypeError: A setting of the wrong kind.
        ValueError: A size below 1, dense weights without ``num_inputs``, an unknown rule, a constant not positive.

    Reference:
        https://spaces.ac.cn/archives/5112

    Example:
        >>> layer = Capsule(8, num_capsules=3, dim_capsule=4)
        >>> v, c = layer(torch.randn(2, 5, 8), return_coupling=True)
        >>> v.shape, c.shape
        (torch.Size([2, 3, 4]), torch.Size([2, 5, 3]))
    """

    def __init__(
        self,
        d_in: int,
        num_capsules: int,
        dim_capsule: int,
        routings: int = 3,
        share_weights: bool = True,
        routing: str = "kmeans",
        kappa: float = 0.5,
        num_inputs: int | None = None,
        *,
        temperature: float = 1.0,
        detach_routing: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("d_in", d_in), ("num_capsules", num_capsules), ("dim_capsule", dim_capsule)):
            check_int(name, value, 1)
        if num_inputs is not None:
            check_int("num_inputs", num_inputs, 1)
        _check_options(routings, routing, kappa, temperature)
        if not share_weights and num_inputs is None:
            raise ValueError("num_inputs must be given with share_weights=False; got None")
        self.d_in, self.num_capsules, self.dim_capsule = int(d_in), int(num_capsules), int(dim_capsule)
        self.routings, self.routing, self.kappa = int(routings), routing, float(kappa)
        self.share_weights, self.num_inputs = bool(share_weights), num_inputs
        self.temperature, self.detach_routing = float(temperature), bool(detach_routing)
        shape = (self.d_in, self.num_capsules * self.dim_capsule)
        self.weight = nn.Parameter(torch.empty(shape if share_weights else (int(num_inputs or 1), *shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights again."""
        bound = (6.0 / (self.weight.shape[-2] + self.weight.shape[-1])) ** 0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def extra_repr(self) -> str:
        """What print shows."""
        inputs = f", num_inputs={self.num_inputs}" if self.num_inputs is not None else ""
        return (
            f"d_in={self.d_in}, num_capsules={self.num_capsules}, dim_capsule={self.dim_capsule}, "
            f"routings={self.routings}, routing={self.routing!r}, share_weights={self.share_weights}{inputs}"
        )

    def forward(self, u: Tensor, mask: Tensor | None = None, return_coupling: bool = False, hard: bool = False) -> Any:
        """Capsules of each example.

        Args:
            u: (..., n, d_in).
            mask: (..., n) bool, True = takes part.
            return_coupling: Also return the last coefficients.
            hard: See :func:`capsule_routing`.

        Returns:
            (..., k, d); with ``return_coupling`` also (..., n, k). An example that is masked everywhere gives zeros.

        Raises:
            TypeError: ``u`` is no floating tensor, or the mask not bool.
            ValueError: Another width or number of inputs, or a mask of another shape.
        """
        check_float("u", u)
        if u.dim() < 2 or u.shape[-1] != self.d_in:
            raise ValueError(f"u must have shape (..., inputs, {self.d_in}); got {tuple(u.shape)}")
        if self.num_inputs is not None and u.shape[-2] != self.num_inputs:
            raise ValueError(f"u must hold {self.num_inputs} inputs (num_inputs); got {u.shape[-2]}")
        _check_mask(mask, tuple(u.shape[:-1]))
        return _route(
            u, self.weight, mask, self.num_capsules, self.routings, self.routing, self.kappa, self.temperature,
            hard, self.detach_routing, return_coupling,
        )  # fmt: skip


class CapsulePooler(nn.Module):
    """A classification head for texts: one capsule for each label, whose length is the label's score.

    Takes the hidden states of any transformers model and its attention mask. Several labels may be present at once, so
    train with :func:`kexue.losses.capsule_margin_loss`; scores above 1/2 say that a label is there.

    Args:
        hidden_size: Width of the hidden states.
        num_labels: Number of labels.
        dim_capsule: Width of a capsule.
        routings: Number of weighted sums.
        kappa: Constant of the final squash.

    Attributes:
        capsule: The :class:`Capsule` layer.

    Raises:
        TypeError: A setting of the wrong kind.
        ValueError: A size below 1, ``kappa`` not positive.

    Reference:
        https://spaces.ac.cn/archives/5112

    Example:
        >>> head = CapsulePooler(hidden_size=16, num_labels=4)
        >>> head(torch.randn(2, 7, 16), torch.ones(2, 7, dtype=torch.long)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self, hidden_size: int, num_labels: int, *, dim_capsule: int = 16, routings: int = 3, kappa: float = 0.5
    ) -> None:
        super().__init__()
        check_int("hidden_size", hidden_size, 1)
        check_int("num_labels", num_labels, 1)
        self.capsule = Capsule(hidden_size, num_labels, dim_capsule, routings, kappa=kappa)

    def forward(self, last_hidden_state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Scores (B, C) in [0, 1).

        Args:
            last_hidden_state: (B, T, D).
            attention_mask: (B, T), bool, or integers with 0 = padding as tokenizers give; None: all tokens.

        Raises:
            TypeError: Hidden states that are no floating tensor, a mask of floating numbers.
            ValueError: Another width, a mask of another shape.
        """
        mask = attention_mask
        if isinstance(mask, Tensor) and mask.dtype != torch.bool:
            if mask.is_floating_point() or mask.is_complex():
                raise TypeError(f"attention_mask must be bool or integers; got dtype {mask.dtype}")
            mask = mask != 0
        v = self.capsule(last_hidden_state, mask)
        return torch.linalg.vector_norm(v, dim=-1, dtype=compute_dtype(v)).to(v.dtype)
