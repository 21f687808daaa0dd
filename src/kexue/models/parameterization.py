"""Parameterization (参数化): activations of second moment 1, a residual that grows in, and NTK layers.

Source: 科学空间 8620 (浅谈Transformer的初始化、参数化与标准化).

    unit activation        f(x) / sqrt(E[f(z)^2]), z ~ N(0, 1); centred: (f(x) - E f) / sqrt(Var f)
    scheduled residual     x + alpha_t F(x), alpha_t not trained: from 0 by a fixed small step to 1, then frozen
    ReZero (SkipInit)      the same with alpha trained from 0
    NTK parameterization   y = x W^T / sqrt(m) + b, W ~ N(0, 1), m = fan_in

What differs from the article: it gives the constant of sigmoid and of SELU, here any function's moments are computed
(``_activations.py``); alpha follows an integer count of steps, since 1 + 1e-4 is 1 in bfloat16; a forward that is
run again by gradient checkpointing counts once and sees the alpha of its first run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kexue._checks import check_int, check_real
from kexue._tensors import check_float, compute_dtype
from kexue.models._activations import Activation, activation, moments
from kexue.models._sampling import check_generator, check_target, fill_normal

__all__ = ["NTKLinear", "ScheduledResidual", "unit_activation"]


class UnitActivation(nn.Module):
    """(f(x) - shift) * scale; f itself is a submodule if it is one."""

    def __init__(self, f: str | Activation, shift: float, scale: float) -> None:
        super().__init__()
        self.f = activation(f)
        self.name = f if isinstance(f, str) else getattr(f, "__name__", type(f).__name__)
        self.shift, self.scale = shift, scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        return (y - self.shift) * self.scale if self.shift else y * self.scale

    def extra_repr(self) -> str:
        """What print shows."""
        return f"{self.name}, shift={self.shift:.7g}, scale={self.scale:.7g}"


def unit_activation(nonlinearity: str | Activation, center: bool = False) -> nn.Module:
    """An activation that keeps the second moment of a standard normal input at 1.

    For functions that no variance of the weights holds there, like tanh and sigmoid. Layers that read it are
    initialised as if they read no activation (LeCun).

    Args:
        nonlinearity: Name or function, as in :func:`kexue.models.variance_scaling_`.
        center: Subtract E[f(z)] first, so that the mean becomes 0 and the variance 1.

    Returns:
        A module: a tensor of any shape in, one of the same shape out. It holds no parameters of its own.

    Raises:
        TypeError: Neither a name nor a function.
        ValueError: Unknown name; a function that is constant (with ``center``) or 0.

    Reference:
        https://spaces.ac.cn/archives/8620

    Example:
        >>> unit_activation("sigmoid")
        UnitActivation(sigmoid, shift=0, scale=1.846229)
        >>> float(unit_activation("sigmoid", center=True)(torch.zeros(())))
        0.0
    """
    if not isinstance(center, bool):
        raise TypeError(f"center must be True or False; got {center!r}")
    mean, second = moments(nonlinearity)
    shift = mean if center else 0.0
    variance = second - shift * shift
    if variance <= 1e-12 * second:
        raise ValueError(f"nonlinearity must not be constant with center=True; got variance {variance:.1g}")
    return UnitActivation(nonlinearity, shift, 1 / math.sqrt(variance))


def _in_backward() -> bool:
    """Whether autograd is running: gradient checkpointing runs a forward again from there."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class ScheduledResidual(nn.Module):
    """x + alpha F(x) with an alpha that rises from 0 by itself, or is trained from 0 (ReZero).

    At the start the layer is the identity. Each forward in training mode uses the current alpha and then raises it:
    the n-th one sees min((n - 1) step, final). Evaluation uses it and leaves it. With gradient accumulation each
    forward counts, so divide ``step`` by the number of forwards in an optimizer step. An alpha that was set by hand
    rises from there.

    alpha and the count are buffers: in the state dict, equal on all ranks of DDP, kept by ``torch.compile``. Gradient
    checkpointing runs the forward again during the backward pass; that run does not count and sees the alpha of
    the latest forward, which is that of its first run if each forward is followed by its backward (two forwards before
    one backward: one step less for the first of them; under ``torch.compile`` of checkpointed regions the second run
    is not noticed, use ``learnable=True`` or no checkpointing there).

    Args:
        branch: F: a module that returns a tensor of the shape of its first input.
        step: Rise of alpha per forward.
        final: Where alpha stops, 1 in the article.
        learnable: alpha is a Parameter of shape () instead; ``step`` and ``final`` are not used.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: step or final not above 0.

    Reference:
        https://spaces.ac.cn/archives/8620

    Example:
        >>> layer = ScheduledResidual(torch.nn.Linear(4, 4), step=0.25)
        >>> x = torch.randn(2, 4)
        >>> bool((layer(x) == x).all()), float(layer.alpha)
        (True, 0.25)
    """

    alpha: Tensor
    count: Tensor
    previous: Tensor

    def __init__(self, branch: nn.Module, step: float = 1e-4, final: float = 1.0, learnable: bool = False) -> None:
        super().__init__()
        if not isinstance(branch, nn.Module):
            raise TypeError(f"branch must be a torch.nn.Module; got {type(branch).__name__}")
        check_real("step", step, above=0.0)
        check_real("final", final, above=0.0)
        if not isinstance(learnable, bool):
            raise TypeError(f"learnable must be True or False; got {learnable!r}")
        self.branch = branch
        self.step, self.final, self.learnable = float(step), float(final), learnable
        if learnable:
            self.alpha = nn.Parameter(torch.zeros(()))
        else:
            self.register_buffer("alpha", torch.zeros(()))
            # Counted in integers: alpha itself may be bfloat16, where a small step is lost, and sums of steps drift.
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))
            self.register_buffer("previous", torch.zeros(()), persistent=False)

    def extra_repr(self) -> str:
        """What print shows."""
        return "learnable=True" if self.learnable else f"step={self.step:g}, final={self.final:g}"

    @torch.no_grad()
    def _advance(self) -> Tensor:
        """Give the alpha of this forward and raise it for the next one."""
        if not self.training:
            return self.alpha.clone()
        if _in_backward():
            return self.previous.clone()
        self.previous.copy_(self.alpha)
        alpha = self.alpha.clone()
        ours = alpha == self._after(self.count)
        self.count.add_(1)
        by_hand = (alpha.to(compute_dtype(alpha)) + self.step).clamp(max=self.final)
        self.alpha.copy_(torch.where(ours, self._after(self.count), by_hand.to(alpha.dtype)))
        return alpha

    def _after(self, count: Tensor) -> Tensor:
        """The alpha that follows so many forwards."""
        alpha = (count.to(compute_dtype(self.alpha)) * self.step).clamp(max=self.final)
        return alpha.to(self.alpha.dtype)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Add alpha F(x, *args, **options) to x (...)."""
        alpha = self.alpha if self.learnable else self._advance()
        out = self.branch(x, *args, **options)
        if not isinstance(out, Tensor):
            raise TypeError(f"branch must return a tensor; got {type(out).__name__}")
        if out.shape != x.shape:
            raise ValueError(f"branch must keep the shape of its input, {tuple(x.shape)}; got {tuple(out.shape)}")
        return x + alpha.to(x.dtype) * out


def is_conv1d(module: nn.Module) -> bool:
    """Conv1D of transformers, a linear layer with a weight (in, out); known by name, as importing it takes seconds."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


class NTKLinear(nn.Module):
    """y = x W^T / sqrt(m) + b with W ~ N(0, 1): every parameter is of order 1, so that one larger rate suits all.

    At the start the same function as ``nn.Linear`` with LeCun's variance 1/m. Training differs: the effective rate on
    W / sqrt(m) is 1/m of the given one under SGD and 1/sqrt(m) of it under Adam.

    Args:
        in_features: m.
        out_features: n.
        bias: Add b, which starts at 0.
        device: Where the parameters live.
        dtype: Of the parameters.
        generator: Source of randomness.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: A size below 1.

    Reference:
        https://spaces.ac.cn/archives/8620

    Example:
        >>> layer = NTKLinear(256, 128)
        >>> layer(torch.randn(10, 256)).shape, layer.weight.shape
        (torch.Size([10, 128]), torch.Size([128, 256]))
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_int("in_features", in_features, 1)
        check_int("out_features", out_features, 1)
        if not isinstance(bias, bool):
            raise TypeError(f"bias must be True or False; got {bias!r}")
        self.in_features, self.out_features = int(in_features), int(out_features)
        self.transposed = False
        self.weight = nn.Parameter(torch.empty(self.out_features, self.in_features, device=device, dtype=dtype))
        made = nn.Parameter(torch.zeros(self.out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", made)
        if not self.weight.is_meta:
            self.reset_parameters(generator)

    @staticmethod
    def can_replace(module: nn.Module) -> bool:
        """Whether :meth:`from_linear` takes the module: nn.Linear itself, no subclass, or transformers' Conv1D."""
        return type(module) is nn.Linear or is_conv1d(module)

    @classmethod
    def from_linear(cls, linear: nn.Module) -> NTKLinear:
        """Build the layer of the same sizes around the SAME parameters, whose values are not changed.

        So the function is another one: that of ``linear`` divided by sqrt(m), but for the bias. Around a Conv1D the
        weight stays (in, out).
        """
        if not cls.can_replace(linear):
            raise TypeError(f"linear must be an nn.Linear or a Conv1D of transformers; got {type(linear).__name__}")
        weight: Any = linear.weight
        m, n = weight.shape if is_conv1d(linear) else weight.shape[::-1]
        made = cls(m, n, bias=False, device="meta")
        made.weight, made.bias, made.transposed = weight, linear.bias, is_conv1d(linear)  # type: ignore[assignment]
        return made.train(linear.training)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """W ~ N(0, 1), b = 0."""
        check_target("weight", self.weight)
        check_generator(generator, self.weight.device)
        fill_normal(self.weight, 1.0, generator)
        if self.bias is not None:
            self.bias.zero_()

    def extra_repr(self) -> str:
        """What print shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., m) to (..., n)."""
        check_float("x", x)
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have shape (..., {self.in_features}); got {tuple(x.shape)}")
        flat = x.reshape(-1, self.in_features)
        # the factor is applied by the matrix product itself: no pass over x or W, nothing rounded twice
        start = self.weight.new_zeros(()) if self.bias is None else self.bias
        weight = self.weight if self.transposed else self.weight.mT
        out = torch.addmm(start, flat, weight, alpha=self.in_features**-0.5)
        return out.view(*x.shape[:-1], self.out_features)
