"""What PathKernel checks at the door: the model, the examples and the targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

__all__ = ["check_inputs", "check_model", "check_rows", "check_targets"]


def _random(module: nn.Module) -> str | None:
    """What is random in a module, as words, if it is."""
    if not module.training:
        return None
    if isinstance(module, _DropoutNd) and module.p > 0:
        return f"p={module.p:g}"
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention) and module.dropout > 0:
        return f"dropout={module.dropout:g}"
    if isinstance(module, nn.RReLU):
        return "a random slope"
    return None


def check_model(model: Any) -> None:
    """Raise unless the model can be explained: see :class:`kexue.explain.PathKernel`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    for name, module in model.named_modules():
        label = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{label} couples the examples of a batch; call model.eval(), or use another normalisation"
            )
        if isinstance(module, _InstanceNorm) and module.training and module.track_running_stats:
            raise ValueError(f"{label} changes its statistics in training; call model.eval()")
        random = _random(module)
        if random is not None:
            raise ValueError(f"{label} is random in training mode ({random}); call model.eval()")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ValueError(f"{label} must have dense gradients, sparse=False; got sparse=True")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise ValueError(f"{label} changes its weight when it is read; got max_norm={module.max_norm:g}")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("model must have a parameter with requires_grad; got none")
    for name, p in trained.items():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(f"parameter {name} is not initialized; run the model once before")
    kinds = {(p.dtype, p.device) for p in trained.values()}
    if len(kinds) > 1 or next(iter(kinds))[0] not in (torch.float32, torch.float64):
        got = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise TypeError(f"the trained parameters must all be float32 or all float64, on one device; got {got}")


def check_inputs(name: str, x: Any, model: nn.Module, like: Tensor | None = None) -> None:
    """Raise unless ``x`` is a finite tensor (N, ...) that fits the model and, if given, the rows of ``like``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got {x.layout}")
    if x.dim() == 0 or (like is not None and x.shape[1:] != like.shape[1:]):
        expected = "(N, ...)" if like is None else f"(N, {', '.join(map(str, like.shape[1:]))})"
        raise ValueError(f"{name} must have the shape {expected}; got {tuple(x.shape)}")
    parameter = next(p for p in model.parameters() if p.requires_grad)
    if x.is_complex() or (x.is_floating_point() and x.dtype != parameter.dtype):
        raise TypeError(f"{name} must be {parameter.dtype}, like the model's parameters, or integer; got {x.dtype}")
    if like is not None and x.dtype != like.dtype:
        raise TypeError(f"{name} must be {like.dtype}, like the training examples; got {x.dtype}")
    if x.device != parameter.device:
        raise ValueError(f"{name} must be on {parameter.device}, like the model; got {x.device}")
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} must be finite; got {int((~torch.isfinite(x)).sum())} values that are not")


@torch.no_grad()
def check_rows(model: nn.Module, x: Tensor) -> None:
    """Raise ValueError if the model cannot run, outputs are random, or those of an example depend on the others."""
    rows = x[:32]
    try:
        out = model(rows)
    except (RuntimeError, IndexError) as error:
        got = f"{tuple(rows.shape)} of {rows.dtype}"
        raise ValueError(f"X must be inputs that the model can take; got {got}, on which it fails: {error}") from error
    if not isinstance(out, Tensor):
        raise TypeError(f"the model must return a tensor; got {type(out).__name__}")
    if not torch.equal(out, model(rows)):
        raise ValueError("the model must be deterministic; two runs on the same examples gave different outputs")
    if len(rows) > 1 and out.dim() and out.is_floating_point():
        close = torch.finfo(out.dtype).eps ** 0.5
        for row in (0, len(rows) - 1):  # a recurrent layer along the wrong axis leaves the first as it is
            among, alone = out[row : row + 1].reshape(-1), model(rows[row : row + 1]).reshape(-1)
            if among.shape != alone.shape or not torch.allclose(among, alone, rtol=close, atol=close):
                raise ValueError(
                    "the output of an example must not depend on the others; it changes when it is run alone"
                )


def check_targets(loss: str, y: Any, x: Tensor, width: int, squeezed: bool, dtype: torch.dtype) -> Tensor:
    """The targets as (N, C) in the dtype of the outputs; one-hot for "ce"."""
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a tensor; got {type(y).__name__}")
    if y.device != x.device:
        raise ValueError(f"y must be on {x.device}, like X; got {y.device}")
    n = len(x)
    if loss == "ce":
        if width < 2:
            raise ValueError(f"loss 'ce' needs outputs (N, C) with C >= 2; the model has {width}")
        if y.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
            raise TypeError(f"y must be integer class indices for 'ce'; got {y.dtype}")
        if y.shape != (n,):
            raise ValueError(f"y must have the shape ({n},) for 'ce'; got {tuple(y.shape)}")
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= width:
            raise ValueError(f"y must be in [0, {width}) for 'ce'; got {low} to {high}")
        return torch.nn.functional.one_hot(y.long(), width).to(dtype)
    if not y.is_floating_point():
        raise TypeError(f"y must be floating for {loss!r}; got {y.dtype}")
    shapes = [(n,), (n, 1)] if squeezed else [(n, width)]
    if tuple(y.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"y must have the shape {expected}, as the outputs; got {tuple(y.shape)}")
    if not bool(torch.isfinite(y).all()):
        raise ValueError(f"y must be finite; got {int((~torch.isfinite(y)).sum())} values that are not")
    if loss == "bce" and not bool(((y >= 0) & (y <= 1)).all()):
        raise ValueError(f"y must be in [0, 1] for 'bce'; got {float(y.min()):g} to {float(y.max()):g}")
    return y.detach().reshape(n, -1).to(dtype, copy=True)
