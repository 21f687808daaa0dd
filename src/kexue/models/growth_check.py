"""Measuring whether a grown model computes the same function; the method is in ``growth.py``."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kexue._checks import check_choice
from kexue._transformers import PreTrainedModel

__all__ = ["GrowthReport", "verify_growth"]

EXACT = 1e-9  # relative difference in float64 up to which two functions count as the same
MARGIN = 4.0  # the grown model may differ by so many times what rounding makes: it rounds other numbers, and more
DRAWS = 4  # times that rounding is tried: one draw may move the two outputs of a classifier by little, by chance


@dataclass(frozen=True)
class GrowthReport:
    """Difference between a model and its grown version, both computed in float64.

    Attributes:
        max_abs: Largest difference of any output.
        max_rel: The same, divided by the largest finite value of that output.
        dtype_limited: The difference is above 1e-9 (relative), and number formats explain it: either it falls below
            that if the casts to float32 inside the models, as in the RMSNorm of Llama, are left out; or what remains is
            no more than what rounding the weights of the small model to their own dtype once more would make.
        max_abs_uncast: Largest difference with the casts left out.
        rounding: Largest change of the small model's outputs if its weights are moved by half a unit in the last place
            of their dtype, at random, casts left out; 0 if it was not needed.
        outputs: Names of the outputs that were compared.
    """

    max_abs: float
    max_rel: float
    dtype_limited: bool
    max_abs_uncast: float = math.nan
    rounding: float = 0.0
    outputs: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = ", ".join(self.outputs) or "outputs"
        text = f"{names}: largest difference {self.max_abs:.2e}, {self.max_rel:.2e} of the largest value"
        if self.dtype_limited and self.rounding > 0:
            text += f"; rounding the weights explains it, which alone makes {self.rounding:.2e}"
        elif self.dtype_limited:
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
    inputs = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    inputs = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    if keep:
        with _KeepFloat64():
            output = model(**inputs)
    else:
        output = model(**inputs)
    return {k: v.detach() for k, v in output.items() if isinstance(v, Tensor) and v.is_floating_point()}


def _align(small: Tensor, big: Tensor, length: str) -> tuple[Tensor, Tensor]:
    """Hidden states of the large model hold copies, a, a, b, b, and perhaps fills.

    ``length``: "copy"; "orthogonal", the length of the vector is the same; "mean square", the mean square is, as norms
    without a gain have it.
    """
    if small.shape == big.shape:
        return small, big
    d, copies = small.shape[-1], big.shape[-1] // max(1, small.shape[-1])
    if small.shape[:-1] != big.shape[:-1] or copies < 1:
        raise ValueError(
            f"outputs must have the same shape, or a larger last axis; got {tuple(small.shape)} and {tuple(big.shape)}"
        )
    scale = {"copy": 1.0, "orthogonal": copies**-0.5, "mean square": (big.shape[-1] / max(1, copies * d)) ** 0.5}
    return small[..., None] * scale[length], big[..., : copies * d].unflatten(-1, (d, copies))


def _difference(small: dict[str, Tensor], big: dict[str, Tensor], length: str) -> tuple[float, float]:
    """Largest absolute difference, and relative to the largest finite value of the same output; NaN counts as inf."""
    largest, relative = 0.0, 0.0
    for name, value in small.items():
        # The pooler's output is behind a tanh, which no convention scales
        x, y = _align(value, big[name], length if name == "last_hidden_state" else "copy")
        if not y.numel():
            continue
        gap = torch.where(x == y, 0.0, (x - y).abs())
        gap = torch.where(x.isnan() & y.isnan(), 0.0, torch.where(gap.isnan(), torch.inf, gap))
        top, scale = float(gap.max()), float(x.abs().where(x.isfinite(), 0.0).max())  # -inf bans a token: no scale
        largest = max(largest, top)
        relative = max(relative, top / scale if scale > 0 else (0.0 if top == 0 else torch.inf))
    return largest, relative


def _double(model: Any) -> Any:
    made = copy.deepcopy(model).double().eval()
    for module in made.modules():
        if getattr(module, "reorder_and_upcast_attn", False):
            module.reorder_and_upcast_attn = False  # GPT-2: the same scores, but in float32 or not at all
    return made


def _rounded(model: Any, seed: int) -> Any:
    """A float64 copy whose weights are moved by half a unit in the last place of their own dtype."""
    made = _double(model)
    generator = torch.Generator().manual_seed(seed)
    for (_, old), (_, new) in zip(model.named_parameters(), made.named_parameters(), strict=True):
        signs = torch.randint(0, 2, new.shape, generator=generator, dtype=torch.int8).to(new.device) - 0.5
        new.mul_(signs.mul_(torch.finfo(old.dtype).eps).add_(1.0))
    return made


def _check_ids(model: Any, ids: Any) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = f"one of {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"input_ids must be a tensor of integers (int64 or int32); got {got}")
    if ids.dim() < 2 or not ids.numel():
        raise ValueError(f"input_ids must be (B, T) and hold a token at least; got shape {tuple(ids.shape)}")
    low, high, size = int(ids.min()), int(ids.max()), model.get_input_embeddings().num_embeddings
    if low < 0 or high >= size:
        raise ValueError(f"input_ids must be from 0 to {size - 1}, the vocabulary of the model; got {low} to {high}")


def verify_growth(model: Any, big: Any, input_ids: Tensor, *, convention: str = "copy", **inputs: Any) -> GrowthReport:
    """Compare a model with its grown version on a batch, in float64 and without dropout.

    Works on copies, which need the memory of both models in float64; the models keep everything, their training flags
    too. All floating tensors that the model returns are compared, tuples of them (``output_hidden_states``) are not;
    the hidden states of models without a head copy by copy.

    Args:
        model: The small model.
        big: The grown one.
        input_ids: (B, T) token ids, (B, choices, T) for multiple choice; not empty.
        convention: That of :func:`kexue.models.grow`; matters for hidden states only.
        **inputs: More arguments of the forward pass, such as ``attention_mask``.

    Returns:
        The differences; ``str`` of it is a sentence.

    Raises:
        TypeError: Not two transformers models, or input_ids that is no tensor of integers.
        ValueError: Models of different classes, outputs whose shapes do not fit, or input_ids of another shape, empty,
            or outside the vocabulary.

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
    _check_ids(model, input_ids)
    check_choice("convention", convention, ("copy", "orthogonal"))
    length = "mean square" if getattr(model.config, "model_type", None) == "gau_alpha" else convention
    given = {"input_ids": input_ids, **inputs, "return_dict": True}
    results: list[dict[bool, dict[str, Tensor]]] = []
    with torch.no_grad():
        for one in (model, big):
            double = _double(one)
            results.append({keep: _outputs(double, given, keep) for keep in (False, True)})
            del double
        small, large = results
        if not small[False] or set(small[False]) != set(large[False]):
            raise ValueError(
                f"both models must give the same outputs; got {sorted(small[False])} and {sorted(large[False])}"
            )
        max_abs, max_rel = _difference(small[False], large[False], length)
        uncast_abs, uncast_rel = _difference(small[True], large[True], length)
        limited, rounding = max_rel > EXACT and uncast_rel <= EXACT, 0.0
        weights = [p.dtype for one in (model, big) for p in one.parameters()]
        if max_rel > EXACT and not limited and any(torch.finfo(dtype).bits < 64 for dtype in weights):
            for seed in range(DRAWS):
                moved = _difference(small[True], _outputs(_rounded(model, seed), given, True), "copy")
                rounding = max(rounding, moved[0])
                limited = uncast_rel <= MARGIN * moved[1]
                if limited:
                    break
    return GrowthReport(max_abs, max_rel, limited, uncast_abs, rounding if limited else 0.0, tuple(small[False]))
