"""The kernels of ``_score_kernel.py`` as autograd Functions; opaque operators while torch.compile traces.

A step saves its q, k and v. Its scores are let go as soon as the next step has taken over: the backward pass gets them
back by subtraction, A_(l-1) = A_l - scale Q_l K_l^T, in the pass over the tiles that it makes anyway, and where that
would lose digits, or the steps are not run in reverse order, by summing the earlier products again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kexue._tensors import compute_dtype, once_differentiable
from kexue.attention._score_kernel import flat, stack_backward, stack_forward, step_backward, step_forward

# Subtraction rounds a score a to eps |a|. The scores are summed again once the sizes of a chain of subtractions add up
# to this: a relative error of the probabilities of at most 2048 eps = 1.2e-4 in float32, far less as a rule.
LARGEST_LOSS = 2048.0


@torch.library.custom_op(
    "kexue::residual_stack",
    mutates_args=(),
    schema="(Tensor[] qs, Tensor[] ks, Tensor[] vs, Tensor? keep, bool causal, float scale, bool mean) -> Tensor[]",
)
def _stack_op(*args: Any) -> list[Tensor]:
    return stack_forward(*args)


@_stack_op.register_fake
def _(qs, ks, vs, keep, causal, scale, mean):  # type: ignore[no-untyped-def]
    return [q.new_empty(*q.shape[:3], v.shape[3]) for q, v in zip(qs, vs, strict=True)]


@torch.library.custom_op(
    "kexue::residual_stack_backward",
    mutates_args=(),
    schema=(
        "(Tensor[] qs, Tensor[] ks, Tensor[] vs, Tensor[] grads, Tensor? keep, bool causal, float scale, bool mean,"
        " bool detach) -> Tensor[]"
    ),
)
def _stack_backward_op(*args: Any) -> list[Tensor]:
    return stack_backward(*args)


@_stack_backward_op.register_fake
def _(qs, ks, vs, grads, keep, causal, scale, mean, detach):  # type: ignore[no-untyped-def]
    return [x.new_empty(x.shape) for x in (*qs, *ks, *vs)]


class Stack(torch.autograd.Function):
    """All layers in one pass over the tiles; ``keep_scores`` (one layer) saves its probabilities for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        keep: Tensor | None,
        options: tuple[bool, float, bool],
        detach: bool,
        keep_scores: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        layers = len(tensors) // 3
        qs, ks, vs = tensors[:layers], tensors[layers : 2 * layers], tensors[2 * layers :]
        ctx.options, ctx.detach = options, detach
        if torch.compiler.is_compiling():
            ctx.save_for_backward(keep, None, *tensors)
            return tuple(_stack_op(list(qs), list(ks), list(vs), keep, *options))
        ctx.set_materialize_grads(False)
        kept = None
        if keep_scores and any(ctx.needs_input_grad):
            batch, heads, rows, _ = qs[0].shape
            kept = qs[0].new_empty(batch * heads, rows, ks[0].shape[2], dtype=compute_dtype(*qs))
        ctx.save_for_backward(keep, kept, *tensors)
        with torch.autocast(qs[0].device.type, enabled=False):
            return tuple(stack_forward(qs, ks, vs, keep, *options, kept=kept))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        keep, kept, *tensors = ctx.saved_tensors
        causal, scale, mean = ctx.options
        layers = len(tensors) // 3
        qs, ks, vs = tensors[:layers], tensors[layers : 2 * layers], tensors[2 * layers :]
        if torch.compiler.is_compiling():
            found = _stack_backward_op(qs, ks, vs, list(grads), keep, *ctx.options, ctx.detach)
        else:
            with torch.autocast(qs[0].device.type, enabled=False):
                found = stack_backward(qs, ks, vs, grads, keep, causal, scale, mean, ctx.detach, kept)
        needs = ctx.needs_input_grad[4:]
        return (None, None, None, None, *(x if need else None for x, need in zip(found, needs, strict=True)))


@torch.library.custom_op(
    "kexue::residual_step",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? prev, Tensor? keep, bool causal, float scale, int layers,"
        " float dropout, Tensor? seed) -> (Tensor, Tensor)"
    ),
)
def _step_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prev: Tensor | None,
    keep: Tensor | None,
    causal: bool,
    scale: float,
    layers: int,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    scores = new_scores(q, k)
    before = None if prev is None else prev.to(scores.dtype).reshape(scores.shape)
    number = 0 if seed is None else int(seed)
    out = step_forward(q, k, v, before, scores, keep, causal, scale, layers, dropout, number, True)
    return out, scores.view(*q.shape[:3], k.shape[2])


@_step_op.register_fake
def _(q, k, v, prev, keep, causal, scale, layers, dropout, seed):  # type: ignore[no-untyped-def]
    scores = q.new_empty(*q.shape[:3], k.shape[2], dtype=compute_dtype(q))
    return q.new_empty(*q.shape[:3], v.shape[3]), scores


@torch.library.custom_op(
    "kexue::residual_step_backward",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor scores, Tensor grad, Tensor grad_scores, Tensor? keep, bool causal,"
        " float scale, int layers, float dropout, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _step_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    grad: Tensor,
    grad_scores: Tensor,
    keep: Tensor | None,
    causal: bool,
    scale: float,
    layers: int,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = scores.reshape(-1, *scores.shape[2:])
    d = grad_scores.reshape(a.shape).clone()
    number = 0 if seed is None else int(seed)
    dq, dk, dv, _ = step_backward(
        q, k, v, a, grad, d, keep, causal, scale, layers, dropout, number, False, True, None
    )  # fmt: skip
    return dq, dk, dv, d.view(scores.shape)


@_step_backward_op.register_fake
def _(q, k, v, scores, grad, grad_scores, keep, causal, scale, layers, dropout, seed):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape) for x in (q, k, v, scores))


class TracedStep(torch.autograd.Function):
    """A step while torch.compile traces: the scores of each layer are saved for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prev: Tensor | None,
        keep: Tensor | None,
        seed: Tensor | None,
        options: tuple[bool, float, int, float],
    ) -> tuple[Tensor, Tensor]:
        out, scores = _step_op(q, k, v, prev, keep, *options, seed)
        ctx.save_for_backward(q, k, v, scores, keep, seed)
        ctx.options, ctx.given = options, None if prev is None else prev.dtype
        return out, scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_scores: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, scores, keep, seed = ctx.saved_tensors
        dq, dk, dv, d = _step_backward_op(q, k, v, scores, grad, grad_scores, keep, *ctx.options, seed)
        return dq, dk, dv, None if ctx.given is None else d.to(ctx.given), None, None, None


def new_scores(q: Tensor, k: Tensor) -> Tensor:
    """An uninitialised (G, T, S) matrix of scores."""
    return q.new_empty(q.shape[0] * q.shape[1], q.shape[2], k.shape[2], dtype=compute_dtype(q))


class Step(torch.autograd.Function):
    """One layer. The second output is the scores, or with ``shared`` an empty token that ties the layers together.

    With ``shared`` the scores stay in one matrix of the caller that every layer adds to, and their gradient in another
    that the layers hand down. Attributes of ctx, which is the node of the graph:

        parent    the node of the layer before; None: there is none, or it has no gradient
        scores    (G, T, S) of this layer, None once the next layer has taken over
        handed    the same, recovered by the next layer's backward pass; belongs to this node alone
        d         gradient of the scores from later layers, with ``shared``
        loss      what recovering ``handed`` has cost, see LARGEST_LOSS
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prev: Tensor | None,
        keep: Tensor | None,
        before: Tensor | None,
        scores: Tensor,
        parent: Any,
        shared: bool,
        options: tuple[bool, float, int, float],
        seed: int,
        whole: bool,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(q.device.type, enabled=False):
            out = step_forward(q, k, v, before, scores, keep, *options, seed, whole)
        second = q.new_empty(0, dtype=scores.dtype) if shared else scores.view(*q.shape[:3], k.shape[2])
        if any(ctx.needs_input_grad):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(q, k, v, keep)
            ctx.options, ctx.seed, ctx.shared, ctx.whole = options, seed, shared, whole
            ctx.given = None if prev is None else prev.dtype
            ctx.parent, ctx.scores, ctx.version = parent, scores, scores._version
            ctx.handed, ctx.d, ctx.loss = None, None, 0.0
            ctx.rebuildable = before is None or parent is not None
        return out, second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_second: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, keep = ctx.saved_tensors
        causal, scale, over, dropout = ctx.options
        scores, owned = _own_scores(ctx)
        fresh = grad_second is None
        if ctx.shared:
            d = ctx.d if ctx.d is not None else torch.empty_like(scores)
        elif grad_second is None:
            d = torch.empty_like(scores)
        else:
            d = grad_second.reshape(scores.shape).clone(memory_format=torch.contiguous_format)
        ctx.d = ctx.handed = None
        parent = ctx.parent
        before = None
        if parent is not None and parent.scores is None:
            before = scores if owned else torch.empty_like(scores)
            if ctx.scores is before:
                ctx.scores = None  # it is about to become the parent's
        with torch.autocast(q.device.type, enabled=False):
            *grads, largest = step_backward(
                q, k, v, scores, grad, d, keep, causal, scale, over, dropout, ctx.seed, fresh, ctx.whole, before
            )
        if ctx.shared and ctx.rebuildable:
            ctx.scores = None
        if before is not None:
            loss = ctx.loss + float(largest)
            if loss < LARGEST_LOSS:  # False for NaN, too
                parent.handed, parent.loss = before, loss
        if ctx.shared and parent is not None:
            parent.d = d
        d_prev = None
        if ctx.needs_input_grad[3]:
            d_prev = d.new_zeros(0) if ctx.shared else d.view(*q.shape[:3], k.shape[2]).to(ctx.given)
        needs = ctx.needs_input_grad
        made = [x if need else None for x, need in zip(grads, needs, strict=False)]
        return (*made, d_prev, *(None for _ in range(8)))


def parent_of(prev_scores: Tensor | None) -> Any:
    """The node of the step that returned these scores, None if they come from anywhere else or were modified."""
    node: Any = None if prev_scores is None else prev_scores.grad_fn
    if prev_scores is None or not isinstance(node, Step._backward_cls) or prev_scores.output_nr != 1:
        return None
    return node if not node.shared and prev_scores._version == node.version else None


def release(node: Any) -> bool:
    """Let go of the scores of a node; False if it could not get them back."""
    if node.rebuildable:
        node.scores = None
    return bool(node.rebuildable)


def _own_scores(node: Any) -> tuple[Tensor, bool]:
    """The scores of a node, and whether they may be overwritten."""
    if node.scores is not None:
        if node.scores._version != node.version and not node.shared:
            raise RuntimeError("the scores returned by residual_attention_step were modified in place after the call")
        return node.scores, node.shared and node.rebuildable
    if node.handed is not None:
        return node.handed, True
    node.loss = 0.0
    return _rebuilt(node), True


def _rebuilt(node: Any) -> Tensor:
    """The scores of a node from the products of its layer and the earlier ones."""
    chain: list[Any] = []
    while node is not None and node.scores is None:
        chain.append(node)
        node = node.parent
    total = torch.zeros_like(new_scores(*chain[0].saved_tensors[:2])) if node is None else node.scores.clone()
    for link in reversed(chain):
        q, k = (flat(x, total.dtype) for x in link.saved_tensors[:2])
        total.baddbmm_(q, k.transpose(1, 2), alpha=link.options[1])
    return total
