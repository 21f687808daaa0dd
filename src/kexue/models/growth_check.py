"""Measuring whether a grown model computes the same function; the method is in ``growth.py``."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kexue._transformers import PreTrainedModel

__all__ = ["GrowthReport", "verify_growth"]

EXACT = 1e-9  # relative difference in float64 up to which two functions count as the same


@dataclass(frozen=True)
class GrowthReport:
    """Difference between a model and its grown version, both computed in float64.

    Attributes:
        max_abs: Largest difference of any output.
        max_rel: The same, divided by the largest output.
        dtype_limited: The difference is above 1e-9 (relative) only because the models cast to float32 inside, as the
            RMSNorm of Llama does: it falls below that if these casts are left out.
        max_abs_uncast: Largest difference with the casts left out.
        outputs: Names of the outputs that were compared.
    """

    max_abs: float
    max_rel: float
    dtype_limited: bool
    max_abs_uncast: float
    outputs: tuple[str, ...]

    def __str__(self) -> str:
        names = ", ".join(self.outputs)
        text = f"{names}: largest difference {self.max_abs:.2e}, {self.max_rel:.2e} of the largest value"
        if self.dtype_limited:
            text += f"; the models' own casts to float32 cause it, {self.max_abs_uncast:.2e} without them"
        elif not self.max_rel <= EXACT:
            text += "; not the same function"
        return text


class _KeepFloat64(TorchFunctionMode):
    """Leave out casts of float64 tensors to float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def _outputs(model: Any, inputs: dict[str, Any], keep: bool) -> dict[str, Tensor]:
    """All floating outputs, by name."""
    if keep:
        with _KeepFloat64():
            output = model(**inputs)
    else:
        output = model(**inputs)
    return {k: v.detach() for k, v in output.items() if isinstance(v, Tensor) and v.is_floating_point()}


def _align(small: Tensor, big: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states of the large model hold copies, a, a, b, b, and perhaps fills."""
    if small.shape == big.shape:
        return small, big
    d, copies = small.shape[-1], big.shape[-1] // max(1, small.shape[-1])
    if small.shape[:-1] != big.shape[:-1] or copies < 1:
        raise ValueError(f"outputs must have the same shape, or a larger last axis; got {tuple(small.shape)} and "
                         f"{tuple(big.shape)}")  # fmt: skip
    return small[..., None], big[..., : copies * d].unflatten(-1, (d, copies))


def _difference(small: dict[str, Tensor], big: dict[str, Tensor]) -> tuple[float, float]:
    """Largest absolute difference, and relative to the largest value of the same output; NaN counts as infinite."""
    largest, relative = 0.0, 0.0
    for name, value in small.items():
        x, y = _align(value, big[name])
        if not y.numel():
            continue
        gap = torch.where(x == y, torch.zeros_like(y), (x - y).abs())
        gap = torch.where(gap.isnan(), torch.full_like(gap, torch.inf), gap)
        gap = torch.where(x.isnan() & y.isnan(), torch.zeros_like(gap), gap)
        top, scale = float(gap.max()), float(x.abs().max())
        largest = max(largest, top)
        relative = max(relative, top / scale if scale > 0 else (0.0 if top == 0 else torch.inf))
    return largest, relative


def verify_growth(model: Any, big: Any, input_ids: Tensor, **inputs: Any) -> GrowthReport:
    """Compare a model with its grown version on a batch, in float64 and without dropout.

    Works on copies, which need the memory of both models in float64; the models keep everything, their training flags
    too. All floating outputs are compared; hidden states (of models without a head) copy by copy.

    Args:
        model: The small model.
        big: The grown one.
        input_ids: (B, T) token ids.
        **inputs: More arguments of the forward pass, such as ``attention_mask``.

    Returns:
        The differences; ``str`` of it is a sentence.

    Raises:
        TypeError: Not two transformers models, or input_ids that is no tensor of integers.
        ValueError: Models of different classes, or outputs whose shapes do not fit.

    Example:
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> from kexue.models import grow
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
        >>> model = BertForMaskedLM(BertConfig(**sizes))
        >>> verify_growth(model, grow(model), torch.tensor([[1, 2, 3]])).max_rel < 1e-9
        True
    """
    for name, value in (("model", model), ("big", big)):
        if not isinstance(value, PreTrainedModel):
            raise TypeError(f"{name} must be a transformers PreTrainedModel; got {type(value).__name__}")
    if type(model) is not type(big):
        raise ValueError(f"both models must have the same class; got {type(model).__name__} and {type(big).__name__}")
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point():
        raise TypeError(f"input_ids must be a tensor of integers; got {type(input_ids).__name__}")
    results: list[dict[bool, dict[str, Tensor]]] = []
    with torch.no_grad():
        for one in (model, big):
            double = copy.deepcopy(one).double().eval()
            for module in double.modules():
                if getattr(module, "reorder_and_upcast_attn", False):
                    module.reorder_and_upcast_attn = False  # GPT-2: the same scores, but in float32 or not at all
            given = {"input_ids": input_ids, **inputs, "return_dict": True}
            given = {k: v.to(double.device) if isinstance(v, Tensor) else v for k, v in given.items()}
            given = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}
            results.append({keep: _outputs(double, given, keep) for keep in (False, True)})
            del double
    small, large = results
    if not small[False] or set(small[False]) != set(large[False]):
        raise ValueError(
            f"both models must give the same outputs; got {sorted(small[False])} and {sorted(large[False])}"
        )
    max_abs, max_rel = _difference(small[False], large[False])
    uncast_abs, uncast_rel = _difference(small[True], large[True])
    limited = max_rel > EXACT and uncast_rel <= EXACT
    return GrowthReport(max_abs, max_rel, limited, uncast_abs, tuple(small[False]))
