"""Residual attention scores (RealFormer): every layer adds its scores to those of the layers before.

Source: 科学空间 8027 (RealFormer:把残差转移到Attention矩阵上面去); He et al., https://arxiv.org/abs/2012.11747.

    A_n = Q_n K_n^T / sqrt(d) + A_(n-1),   A_0 = 0,   O_n = softmax(A_n + mask) V_n        head by head

The mask is applied at every layer and never becomes part of A. The gradient flows through the sum. What differs from
the published code and the libraries, which keep a (T, S) matrix for every layer and head:

- ``residual_attention`` needs the last layer only, where sum_l Q_l K_l^T = [Q_1|...|Q_n] [K_1|...|K_n]^T;
- ``residual_attention_stack`` runs all layers tile by tile and keeps no matrix at all;
- ``ResidualScores`` is for networks, where Q_(n+1) depends on O_n: one matrix for all layers together, and in the
  backward pass A_(n-1) = A_n - Q_n K_n^T / sqrt(d) is recovered instead of having been kept.

``mode="qk_residual"`` is the article's other proposal, sums of q and of k instead of the scores: not the same function
(it has cross terms), but of linear memory in any implementation of attention.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kexue._checks import check_choice, check_int, check_real
from kexue._tensors import check_float, compute_dtype
from kexue.attention._score_ops import Stack, Step, TracedStep, new_scores, parent_of, release

__all__ = ["ResidualScores", "residual_attention", "residual_attention_stack", "residual_attention_step"]

MODES = ("auto", "mask", "concat", "qk_residual")
BUDGET = 2**28  # bytes of scores that mode "auto" keeps for the backward pass


def _check_heads(q: Any, k: Any, v: Any, layer: str = "") -> None:
    """Raise unless q (B, H, T, D), k (B, H, S, D) and v (B, H, S, E) fit each other."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_float(f"{name}{layer}", x, 4)
        if x.dtype != q.dtype or x.device != q.device:
            raise TypeError(
                f"{name}{layer} must have the dtype and device of q, {q.dtype} on {q.device}; "
                f"got {x.dtype} on {x.device}"
            )
    for name, x in (("k", k), ("v", v)):
        if x.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"{name}{layer} must have the batch and heads of q, {tuple(q.shape[:2])}; got {tuple(x.shape[:2])}"
            )
    if k.shape[3] != q.shape[3] or not q.shape[3]:
        raise ValueError(f"k{layer} must have the width of q, {q.shape[3]}, above 0; got {k.shape[3]}")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v{layer} must have as many keys as k, {k.shape[2]}; got {v.shape[2]}")


def _check_list(name: str, xs: Any) -> list[Tensor]:
    if isinstance(xs, Tensor) or not isinstance(xs, Sequence):
        raise TypeError(f"{name} must be a list of tensors, one for each layer; got {type(xs).__name__}")
    if not xs:
        raise ValueError(f"{name} must hold a tensor for one layer at least; got an empty list")
    return list(xs)


def _check_layers(qs: Any, ks: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Raise unless the lists are equally long and their tensors have equal shapes."""
    qs, ks = _check_list("qs", qs), _check_list("ks", ks)
    if len(qs) != len(ks):
        raise ValueError(f"qs and ks must hold equally many layers; got {len(qs)} and {len(ks)}")
    for name, xs, what in (("q", qs, "heads and queries"), ("k", ks, "heads and keys")):
        for n, x in enumerate(xs, 1):
            check_float(f"{name} of layer {n}", x, 4)
            if x.shape != xs[0].shape:
                raise ValueError(
                    f"all layers need the same {what}, (B, H, T, D): {name} of layer 1 has shape {tuple(xs[0].shape)}, "
                    f"of layer {n} {tuple(x.shape)}"
                )
    return qs, ks


def _check_options(q: Tensor, k: Tensor, causal: bool, scale: float | None) -> float:
    """Check causality against the lengths; the scale to use."""
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"causal attention needs as many keys as queries, {q.shape[2]}; got {k.shape[2]}")
    if scale is None:
        return float(q.shape[3]) ** -0.5
    check_real("scale", scale)
    return float(scale)


def _check_mask(name: str, mask: Any, batch: int, keys: int) -> Tensor | None:
    """The (B, 1, 1, S) form of a key padding mask."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor (True = takes part); got {getattr(mask, 'dtype', mask)}")
    if tuple(mask.shape) != (batch, keys):
        raise ValueError(f"{name} must have shape (B, S) = {(batch, keys)}; got {tuple(mask.shape)}")
    return mask[:, None, None, :]


def _without_padding(x: Tensor, keep: Tensor | None) -> Tensor:
    """Zero where nothing is looked at: whatever stands in the padding, even NaN, must not get out."""
    return x if keep is None else torch.where(keep.transpose(2, 3), x, 0.0)


def _finite_padding(k: Tensor, keep: Tensor | None) -> Tensor:
    """Zero for NaN and infinity in padded keys, which would reach the gradient of q as 0 times these numbers.

    Finite numbers stay: the scores that are handed on are not masked.
    """
    return k if keep is None else torch.where(keep.transpose(2, 3), k, torch.nan_to_num(k, 0.0, 0.0, 0.0))


def residual_attention(
    qs: Sequence[Tensor],
    ks: Sequence[Tensor],
    v: Tensor,
    mode: str = "auto",
    key_padding_mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    mean: bool = False,
    detach_scores: bool = False,
    budget: int = BUDGET,
) -> Tensor:
    """Attention of the last layer with the sum of all layers' scores: softmax(sum_l Q_l K_l^T / sqrt(d)) V.

    For the outputs of all layers, :func:`residual_attention_stack` does the work of all in one pass.

    Args:
        qs: Queries of each layer, first layer first, each (B, H, T, D); floating, computed in float32 (float64 stays).
        ks: Keys of each layer, each (B, H, S, D), with as many heads as the queries.
        v: Values of the last layer, (B, H, S, E).
        mode: "concat": the scores are computed tile by tile, again in the backward pass; memory linear in T and S.
            "mask": the same, but one B H T S matrix of probabilities is kept for the backward pass, whatever the
            number of layers, which spares computing them again. "auto": "mask" if that matrix fits ``budget``, else
            "concat". "qk_residual": the scores of the summed queries and summed keys, another function.
        key_padding_mask: (B, S) bool, True = takes part.
        causal: Query i sees the keys up to i + S - T.
        scale: Factor on q·k; None is 1/sqrt(D).
        mean: The scores are divided by the number of layers.
        detach_scores: The scores of earlier layers count as constants: no gradient for their q and k.
        budget: Bytes that "auto" may keep.

    Returns:
        (B, H, T, E) in the dtype of the inputs. A row without any key is 0. Differentiable once.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: No layers, lists of unequal length, layers that differ in heads, queries or keys.

    Reference:
        https://spaces.ac.cn/archives/8027

    Example:
        >>> q, k, v = torch.ones(1, 1, 1, 4), torch.eye(4)[None, None], torch.tensor([[[[1.0], [2.0], [3.0], [4.0]]]])
        >>> residual_attention([q, q], [k, k], v)  # every key scores 2/sqrt(4): the plain average
        tensor([[[[2.5000]]]])
    """
    check_choice("mode", mode, MODES)
    check_int("budget", budget, 0)
    qs, ks = _check_layers(qs, ks)
    q, k = qs[-1], ks[-1]
    _check_heads(q, k, v)
    for n, (a, b) in enumerate(zip(qs, ks, strict=True), 1):
        _check_heads(a, b, v, f" of layer {n}")
    factor = _check_options(q, k, causal, scale)
    keep = _check_mask("key_padding_mask", key_padding_mask, k.shape[0], k.shape[2])
    if detach_scores:
        qs, ks = [x.detach() for x in qs[:-1]] + [q], [x.detach() for x in ks[:-1]] + [k]
    if mean:
        factor /= len(qs)
    if mode == "qk_residual":
        dtype = compute_dtype(q)
        # one by one: the gradients of a sum over a stack would be views of one and the same memory
        q, k = (functools.reduce(torch.add, [x.to(dtype) for x in xs]) for xs in (qs, ks))
        v_in = v.to(q.dtype)
    else:
        q, k = (torch.cat(xs, -1) if len(xs) > 1 else xs[0] for xs in (qs, ks))
        v_in = v
    size = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * compute_dtype(q).itemsize
    kept = mode == "mask" or (mode == "auto" and size <= budget)
    k, v_in = _without_padding(k, keep), _without_padding(v_in, keep)
    (out,) = Stack.apply(keep, (causal, factor, False), False, kept, q, k, v_in)
    return out.to(v.dtype)


def residual_attention_stack(
    qs: Sequence[Tensor],
    ks: Sequence[Tensor],
    vs: Sequence[Tensor],
    key_padding_mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    mean: bool = False,
    detach_scores: bool = False,
) -> list[Tensor]:
    """Outputs of all layers, O_n = softmax(sum of the scores of layers 1 to n) V_n, without any (T, S) matrix.

    Cost linear in the number of layers; beside inputs, outputs and gradients a few MiB, at any length. For layers whose
    queries and keys are known together; in a network, where they come one after another, use :class:`ResidualScores`.

    Args:
        qs: Queries of each layer, first layer first, each (B, H, T, D).
        ks: Keys of each layer, each (B, H, S, D).
        vs: Values of each layer, each (B, H, S, E).
        key_padding_mask: (B, S) bool, True = takes part.
        causal: Query i sees the keys up to i + S - T.
        scale: Factor on q·k; None is 1/sqrt(D).
        mean: Layer n uses the mean of the scores of layers 1 to n instead of their sum.
        detach_scores: The scores of earlier layers count as constants.

    Returns:
        A list of (B, H, T, E). Rows without any key are 0. Differentiable once.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: No layers, lists of unequal length, layers that differ in heads, queries or keys.

    Reference:
        https://spaces.ac.cn/archives/8027

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 5, 4).unbind(0)
        >>> outs = residual_attention_stack([q, q], [k, k], [v, v])
        >>> torch.allclose(outs[1], residual_attention([q, q], [k, k], v))
        True
    """
    qs, ks = _check_layers(qs, ks)
    vs = _check_list("vs", vs)
    if len(vs) != len(qs):
        raise ValueError(f"vs must hold as many layers as qs, {len(qs)}; got {len(vs)}")
    for n, (q, k, v) in enumerate(zip(qs, ks, vs, strict=True), 1):
        _check_heads(q, k, v, f" of layer {n}")
        if q.dtype != qs[0].dtype:
            raise TypeError(f"all layers need one dtype; q of layer 1 has {qs[0].dtype}, of layer {n} {q.dtype}")
    factor = _check_options(qs[0], ks[0], causal, scale)
    keep = _check_mask("key_padding_mask", key_padding_mask, ks[0].shape[0], ks[0].shape[2])
    ks, vs = ([_without_padding(x, keep) for x in xs] for xs in (ks, vs))
    return list(Stack.apply(keep, (causal, factor, mean), detach_scores, False, *qs, *ks, *vs))


def residual_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prev_scores: Tensor | None = None,
    *,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    mean_over: int = 1,
    detach_scores: bool = False,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """One layer: add its scores to those of the layers before, and attend with the sum.

    The scores of a layer are let go of once the next step has been given them; the backward pass recovers them.
    :class:`ResidualScores` also spares allocating them for each layer.

    Args:
        q: Queries, (B, H, T, D).
        k: Keys, (B, H, S, D).
        v: Values, (B, H, S, E).
        prev_scores: (B, H, T, S), what the step of the layer before returned; None starts.
        key_padding_mask: (B, S) bool, True = takes part. Applied to a copy, never part of the returned scores; only NaN
            and infinity in padded keys count as 0 there.
        causal: Query i sees the keys up to i + S - T.
        scale: Factor on q·k; None is 1/sqrt(D).
        mean_over: The softmax is taken of the scores divided by this; the number of layers so far gives their mean.
        detach_scores: The previous scores count as a constant.
        dropout: Share of the attention probabilities that are dropped.

    Returns:
        The output (B, H, T, E) in the dtype of the inputs, rows without any key 0, and the summed scores before mask
        and softmax (B, H, T, S), float32 (float64 for float64 inputs). Differentiable once.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Shapes that do not fit; ``prev_scores`` of other heads, queries or keys.
        RuntimeError: In the backward pass, if the returned scores were modified in place.

    Reference:
        https://spaces.ac.cn/archives/8027

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 5, 4).unbind(0)
        >>> o1, scores = residual_attention_step(q, k, v)
        >>> o2, scores = residual_attention_step(q, k, v, scores)
        >>> torch.allclose(o2, residual_attention([q, q], [k, k], v))
        True
    """
    _check_heads(q, k, v)
    factor = _check_options(q, k, causal, scale)
    check_int("mean_over", mean_over, 1)
    _check_dropout(dropout)
    keep = _check_mask("key_padding_mask", key_padding_mask, k.shape[0], k.shape[2])
    if prev_scores is not None:
        check_float("prev_scores", prev_scores, 4)
        shape = (*q.shape[:3], k.shape[2])
        if tuple(prev_scores.shape) != shape:
            raise ValueError(f"prev_scores must have shape (B, H, T, S) = {shape}; got {tuple(prev_scores.shape)}")
    k, v = _finite_padding(k, keep), _without_padding(v, keep)
    options = (causal, factor, mean_over, float(dropout))
    if torch.compiler.is_compiling():
        prev = prev_scores.detach() if prev_scores is not None and detach_scores else prev_scores
        out, second = TracedStep.apply(q, k, v, prev, keep, _seed() if dropout else None, options)
        return out, second
    scores = new_scores(q, k)
    before = None if prev_scores is None else prev_scores.detach().to(scores.dtype).reshape(scores.shape)
    parent = parent_of(prev_scores)
    prev = prev_scores.detach() if prev_scores is not None and detach_scores else prev_scores
    seed = int(_seed()) if dropout else 0
    out, second = Step.apply(q, k, v, prev, keep, before, scores, parent, False, options, seed, True)
    if parent is not None and second.grad_fn is not None:
        release(parent)  # the new step recovers its scores if need be
    return out, second


def _seed() -> Tensor:
    return torch.randint(2**62, ())


def _check_dropout(dropout: Any) -> None:
    check_real("dropout", dropout, minimum=0.0)
    if dropout >= 1:
        raise ValueError(f"dropout must be below 1; got {dropout!r}")


class ResidualScores:
    """The running sum of scores during one forward pass of a network: ``step`` is the attention of one layer.

    All layers share one (T, S) matrix per head, in inference as in training, and their backward passes another one;
    an implementation that keeps the probabilities of L layers holds L. Make a new object, or call :meth:`reset`, for
    each forward pass and for each kind of attention (self, cross). A step may run again in the backward pass only
    together with all others: checkpointing single layers would add to a finished sum.

    Args:
        causal: Query i sees the keys up to i + S - T.
        scale: Factor on q·k; None is 1/sqrt(D).
        mean: Layer n uses the mean of the scores of layers 1 to n instead of their sum.
        detach_scores: The scores of earlier layers count as constants.
        dropout: Share of the attention probabilities that are dropped.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: A value out of range.

    Reference:
        https://spaces.ac.cn/archives/8027

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 5, 4).unbind(0)
        >>> scores = ResidualScores()
        >>> o1, o2 = scores.step(q, k, v), scores.step(q, k, v)
        >>> torch.allclose(o2, residual_attention([q, q], [k, k], v)), len(scores)
        (True, 2)
    """

    def __init__(
        self,
        *,
        causal: bool = False,
        scale: float | None = None,
        mean: bool = False,
        detach_scores: bool = False,
        dropout: float = 0.0,
    ) -> None:
        if scale is not None:
            check_real("scale", scale)
        _check_dropout(dropout)
        self.causal, self.scale, self.mean = causal, scale, mean
        self.detach_scores, self.dropout = detach_scores, float(dropout)
        self.reset()

    def reset(self) -> None:
        """Forget the layers so far; what a backward pass needs of them stays with its graph."""
        self._layers = 0
        self._matrix: Tensor | None = None  # (G, T, S)
        self._token: Tensor | None = None  # ties the layers' nodes together; while tracing, the scores themselves
        self._shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        self._whole, self._torn = False, False

    def __len__(self) -> int:
        return self._layers

    @property
    def keys(self) -> int | None:
        """Number of keys of the layers so far; None before the first."""
        return self._shapes[1][2] if self._layers else None

    def step(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Attention of the next layer.

        Args:
            q: Queries, (B, H, T, D).
            k: Keys, (B, H, S, D).
            v: Values, (B, H, S, E).
            key_padding_mask: (B, S) bool, True = takes part.

        Returns:
            (B, H, T, E) in the dtype of the inputs; rows without any key are 0.

        Raises:
            TypeError: Wrong kind of argument.
            ValueError: Heads, queries or keys differ from the layers before.
            RuntimeError: A step before this one failed half-way.
        """
        _check_heads(q, k, v)
        factor = _check_options(q, k, self.causal, self.scale)
        keep = _check_mask("key_padding_mask", key_padding_mask, k.shape[0], k.shape[2])
        k, v = _finite_padding(k, keep), _without_padding(v, keep)
        return self.attend(q, k, v, keep, self.causal, factor, self.dropout, whole=not self.causal)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keep: Tensor | None,
        causal: bool,
        scale: float,
        dropout: float,
        whole: bool,
    ) -> Tensor:
        """:meth:`step` with the options of one layer, for code that has checked them.

        Args:
            q: Queries, (B, H, T, D).
            k: Keys, (B, H, S, D).
            v: Values, (B, H, S, E).
            keep: (B, 1 or H, 1 or T, S) bool, True = takes part.
            causal: Query i sees the keys up to i + S - T, among those of ``keep``.
            scale: Factor on q·k.
            dropout: Share of the probabilities that are dropped.
            whole: Layers with ``causal=False`` may follow. Fixed by the first layer.

        Returns:
            (B, H, T, E).

        Raises:
            ValueError: Shapes differ from the layers before, or a layer sees keys whose scores were not summed.
            RuntimeError: A step before this one failed half-way.
        """
        if self._torn:
            raise RuntimeError("a layer failed half-way through its scores; call reset() before the next forward pass")
        shapes = (tuple(q.shape), tuple(k.shape))
        if self._layers == 0:
            self._shapes, self._whole = shapes, whole
        elif self._shapes != shapes:
            raise ValueError(
                "all layers need the same heads, queries and keys: q and k of layer 1 have shapes "
                f"{self._shapes[0]} and {self._shapes[1]}, of layer {self._layers + 1} {shapes[0]} and {shapes[1]}"
            )
        if not causal and not self._whole:
            raise ValueError("layer 1 was causal and summed no scores of future keys; a later layer wants to see them")
        options = (causal, scale, self._layers + 1 if self.mean else 1, dropout)
        token = self._token
        prev = token.detach() if token is not None and self.detach_scores else token
        if torch.compiler.is_compiling():
            out, self._token = TracedStep.apply(q, k, v, prev, keep, _seed() if dropout else None, options)
            self._layers += 1
            return out
        before, parent = self._matrix, None if token is None else token.grad_fn
        # The matrix is taken over from the layer before, unless that one could not get its scores back.
        taken = before is not None and (parent is None or release(parent))
        scores = before if before is not None and taken else new_scores(q, k)
        self._torn = True
        seed = int(_seed()) if dropout else 0
        out, self._token = Step.apply(q, k, v, prev, keep, before, scores, parent, True, options, seed, self._whole)
        self._matrix, self._torn, self._layers = scores, False, self._layers + 1
        return out
