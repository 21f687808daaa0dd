"""Probe (信号与梯度探针): how large signal and gradient are at each module of a model, before training it.

Sources: 科学空间 8620 (浅谈Transformer的初始化、参数化与标准化), 8747 (模型优化漫谈:BERT的初始标准差为什么是0.02?).

For the output y of each module, over all its entries,

    rms_out = sqrt(mean(y^2)),   rms_grad = sqrt(mean((dL/dy)^2)),   gain = rms_out / rms_out of what came before,

and for each attention, with weights p of a query over its keys, the entropy -sum p log p in nats (at most log S for S
visible keys), mean over heads, queries that take part and batch.

Profilers in use log norms of parameter gradients after ``backward``. Here the gradients of the OUTPUTS are taken, which
is what the theory of initialization speaks of, by one ``torch.autograd.grad`` towards all outputs: no parameter gets a
gradient, none is even computed. Attention is watched in the calls of torch (see ``_attention_watch.py``) instead of
asking models for ``output_attentions``: it works for fused kernels, for any model, and the forward pass stays the same
to the last bit.
"""

from __future__ import annotations

import copy
import inspect
from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from kexue._checks import check_int
from kexue.models._as_found import as_found, fixed_random_state, tensors_in
from kexue.models._probe_record import Call, Recorder, first_float, rms
from kexue.models._probe_report import ProbeReport

__all__ = ["ProbeReport", "probe"]


def probe(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    training: bool | None = None,
    seed: int = 0,
) -> ProbeReport:
    """Scale of output and gradient, growth and entropy of attention, for every module of a model.

    One forward and one backward pass (without gradients of parameters). Model, gradients, flags, buffers and random
    states are as before afterwards, also after an error. Memory: that of a training step, and the gradients of all
    outputs at once.

    A row is one call of a module (the model itself has one only if it has no submodules that are called, or computes
    attention itself). The second call of the same module is called "name#2". Modules without a floating output have no
    row, nor have modules that are not called. An output with several tensors counts by its first floating one.

    ``gain``: for a member of an ``nn.ModuleList`` or ``nn.Sequential`` (a block) rms_out against that of the member
    before it, so that the product of the gains is the growth of the whole; for the first one, for members that read the
    same tensor as the one before, and for all other modules, rms_out against the rms of the module's first floating
    argument; None without one.

    ``rms_grad`` is None where no gradient arrives: unused outputs, and what runs under ``torch.no_grad``. ``rms_out``
    counts all entries, padding too; ``attention_entropy`` leaves out queries that are padding (by ``attention_mask``
    and ``decoder_attention_mask`` of the batch, else as far as the mask of the attention tells). It is None for modules
    that compute no attention themselves and for attention without weights (linear attention, kernels other than torch's
    own).

    The gradient is that of: ``loss(output)`` if given; ``output.loss``, if the batch has labels; an output that is a
    scalar; otherwise of the inner product of the main output (the first floating tensor) with a random direction, drawn
    from ``seed``, of rms 1 (0 at padding), so that ``rms_grad`` reads as growth from the output back. A mean square
    would say nothing: behind a normalization it is constant.

    Args:
        model: Any module; wrappers of torch.compile and DistributedDataParallel are looked through.
        batch: A tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
        loss: Output of the model -> scalar tensor.
        training: True or False to run in that mode, None as the model is. Dropout, if on, is drawn from ``seed``.
        seed: Of dropout and of the direction.

    Returns:
        A :class:`ProbeReport`.

    Raises:
        TypeError: Not a module, or one of TorchScript, which takes no hooks (inside a model it has no row); a loss that
            is not callable or gives no floating tensor.
        ValueError: A batch without tensors or with an empty one, lazy or meta parameters, no floating output, a loss
            that is no scalar, checkpoints with use_reentrant=True inside the model.

    Reference:
        https://spaces.ac.cn/archives/8620, https://spaces.ac.cn/archives/8747

    Example:
        >>> layers = [torch.nn.Linear(64, 64, bias=False) for _ in range(3)]
        >>> for layer in layers:
        ...     _ = torch.nn.init.orthogonal_(layer.weight, gain=0.5)
        >>> report = probe(torch.nn.Sequential(*layers), torch.randn(8, 64))
        >>> [(row["name"], round(row["gain"], 4), round(row["rms_grad"], 4)) for row in report.rows]
        [('0', 0.5, 0.25), ('1', 0.5, 0.5), ('2', 0.5, 1.0)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be callable, output -> scalar tensor; got {type(loss).__name__}")
    if training is not None and not isinstance(training, bool):
        raise TypeError(f"training must be True, False or None; got {training!r}")
    check_int("seed", seed, 0)
    model = _unwrapped(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model must take hooks, which compiled TorchScript does not; got {type(model).__name__}")
    _check_parameters(model)
    _check_batch(batch)
    held = [*model.parameters(), *model.buffers(), *tensors_in(batch)]
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        fixed_random_state(seed, held),
        as_found(model, training),
    ):
        return _run(model, batch, loss, seed)


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile
        if isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _check_parameters(model: nn.Module) -> None:
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(p):
            raise ValueError(f"lazy parameters must have been created by a first call; got {name} without a shape")
        if p.is_meta:
            raise ValueError(f"parameters must hold numbers; got {name} on the meta device")


def _check_batch(batch: Any) -> None:
    found = list(tensors_in(batch))
    if not found:
        raise ValueError(
            f"batch must be a tensor, a tuple or list of arguments or a mapping of keyword arguments, with at least "
            f"one tensor; got {type(batch).__name__} without any"
        )
    for x in found:
        if x.numel() == 0:
            raise ValueError(f"batch must not be empty; got a tensor of shape {tuple(x.shape)}")


def _copied_cache(cache: Any) -> Any:
    """A copy of a cache of transformers, whose tensors may belong to a graph."""
    layers = [layer for part in (cache, *vars(cache).values()) for layer in getattr(part, "layers", ())]
    held = [x for layer in layers for x in vars(layer).values() if isinstance(x, Tensor)]
    return copy.deepcopy(cache, {id(x): x.detach().clone() for x in held})


def _copied(value: Any, memo: dict[int, Tensor]) -> Any:
    """The batch with copies of its tensors, the first floating one with a gradient; equal objects stay equal."""
    if isinstance(value, Tensor):
        if id(value) not in memo:
            first = value.is_floating_point() and not any(x.is_floating_point() for x in memo.values())
            twin = value.detach().clone()
            memo[id(value)] = twin.requires_grad_().clone() if first else twin  # no leaf: the model may write to it
        return memo[id(value)]
    if isinstance(value, Mapping):
        items = {key: _copied(item, memo) for key, item in value.items()}
        return items if isinstance(value, dict | UserDict) and not hasattr(value, "to_tuple") else type(value)(**items)
    if hasattr(value, "get_seq_length"):  # a cache of keys and values, which the model extends
        return _copied_cache(value)
    if type(value) in (tuple, list):
        return type(value)(_copied(item, memo) for item in value)
    return value


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), _copied(batch, {})
    if isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence):
        return tuple(_copied(list(batch), {})), {}
    return (_copied(batch, {}),), {}


def _token_masks(model: nn.Module, args: Any, kwargs: Any) -> tuple[Tensor | None, Tensor | None]:
    """Which tokens take part, (B, T) bool, by the batch's masks: of the encoder or only part, and of the decoder."""
    try:
        given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        given = {}
    given = {**given, **given.get("kwargs", {}), **kwargs}
    pairs = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    masks = []
    for name in ("attention_mask", "decoder_attention_mask" if pairs else "attention_mask"):
        mask = given.get(name)
        masks.append(mask.detach() != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None)
    return masks[0], masks[1]


def _target(output: Any, loss: Callable[[Any], Tensor] | None, mask: Tensor | None, seed: int) -> tuple[Tensor, Any]:
    """What is differentiated, and its upstream gradient: None for a scalar."""
    if loss is not None:
        value: Any = loss(output)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"loss must give a floating tensor; got {got}")
    else:
        value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"the loss must be a scalar; got shape {tuple(value.shape)}")
        return value.reshape(()), None
    main = first_float(output)
    if main is None:
        raise ValueError(f"the model gave no floating tensor to be differentiated; got {type(output).__name__}")
    if main.dim() == 0:
        return main, None
    direction = torch.randn(main.shape, generator=torch.Generator().manual_seed(seed))
    if mask is not None and main.dim() == 3 and mask.shape == main.shape[:2] and bool(mask.any()):
        direction = direction.masked_fill(~mask.cpu()[..., None], 0.0)
    direction /= rms(direction) or 1.0
    return main, direction.to(main.device, main.dtype)


def _run(model: nn.Module, batch: Any, loss: Callable[[Any], Tensor] | None, seed: int) -> ProbeReport:
    args, kwargs = _arguments(batch)
    masks = _token_masks(model, args, kwargs)
    recorder = Recorder(model, masks)
    with recorder.record():
        output = model(*args, **kwargs)
    target, upstream = _target(output, loss, masks[1], seed)
    calls = [call for call in recorder.calls if call.rms_out is not None or call.mean_entropy is not None]
    below = [call for call in calls if call.depth]
    calls = [call for call in calls if call.depth or not below or call.mean_entropy is not None]
    gradients = _gradients(target, upstream, calls)
    value = float(target.detach()) if upstream is None else None
    return _report(model, calls, gradients, value)


def _gradients(target: Tensor, upstream: Tensor | None, calls: list[Call]) -> dict[Call, float | None]:
    """Root mean square of the gradient of each call's output; calls without one are left out."""
    reached = [call for call in calls if call.edge is not None]
    if not reached or not target.requires_grad:
        return {}
    edges = [call.edge for call in reached]
    try:
        found = torch.autograd.grad(target, edges, upstream, allow_unused=True)  # type: ignore[arg-type]
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ValueError(
            "checkpoints inside the model must be made with use_reentrant=False to be probed; got use_reentrant=True"
        ) from error
    return {call: rms(g) for call, g in zip(reached, found, strict=True) if g is not None}


def _report(
    model: nn.Module, calls: list[Call], gradients: dict[Call, float | None], value: float | None
) -> ProbeReport:
    rows, times = [], dict[str, int]()
    for call in calls:
        times[call.name] = times.get(call.name, 0) + 1
        rows.append(
            {
                "name": call.name if times[call.name] == 1 else f"{call.name}#{times[call.name]}",
                "rms_out": call.rms_out,
                "rms_grad": gradients.get(call),
                "gain": call.gain,
                "attention_entropy": call.mean_entropy,
            }
        )
    outer = ["" if call.stack is None or call.inside else call.stack[0] or "layers" for call in calls]
    brief = [bool(o) or not call.inside or call.mean_entropy is not None for o, call in zip(outer, calls, strict=True)]
    return ProbeReport(rows, value, type(model).__name__, tuple(outer), tuple(brief))
