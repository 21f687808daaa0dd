"""Layerwise learning rates by rescaled parameters (参数缩放), for optimizers that have one rate for everything.

Source: 科学空间 6418, "让Keras更酷一些!":分层的学习率和自由的梯度. A weight is stored as phi and used as
theta = lam * phi, with phi = theta / lam at the start. Then a step with rate alpha on phi changes theta as a step with
another rate would:

    SGD, with momentum or Nesterov     alpha * lam^2      so lam = sqrt(a) gives the rate a * alpha
    Adam, AdamW, RMSprop, Lion         alpha * lam        so lam = a

In torch, groups of parameters (:func:`param_groups`) do this exactly for every optimizer; prefer them. What is here
keeps the article's method for code that owns its optimizer. It is exact up to rounding under two conditions:

- eps: phi's gradient is lam times that of theta, so the optimizer's eps acts as eps / lam. Use eps * lam.
- Decay: with decoupled decay (AdamW, Lion) phi needs weight_decay * a, as does the L2 penalty of SGD; the L2 penalty of
  Adam and RMSprop needs weight_decay * a^2.

Clipping by the norm of all gradients sees lam times theirs. Optimizers that look at norms of weights or updates (LAMB,
LARS, Muon, Adafactor) follow neither rule and are refused. What we do differently: the tensors stay the same
Parameter objects, lam is part of the state_dict, applying it twice multiplies, and it can be undone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kexue._checks import check_real

__all__ = ["scale_lr_", "unscale_lr_"]

_POWER = {"sgd": 0.5, "momentum": 0.5, "nesterov": 0.5, "adam": 1.0, "adamw": 1.0, "rmsprop": 1.0, "lion": 1.0}


class _Scale(nn.Module):
    """theta = lam * phi. lam is a Python number, so that no change of dtype rounds it; it is saved in float64."""

    def __init__(self, multiplier: float, power: float) -> None:
        super().__init__()
        self.multiplier, self.power = multiplier, power
        self.stored = False  # phi is in place: a tied tensor must be divided once

    @property
    def lam(self) -> float:
        return self.multiplier**self.power

    def forward(self, phi: Tensor) -> Tensor:
        return phi * self.multiplier**self.power

    def right_inverse(self, theta: Tensor) -> Tensor:
        return theta if self.stored else theta / self.lam

    def extra_repr(self) -> str:
        return f"multiplier={self.multiplier:g}, lam={self.lam:g}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "multiplier"] = torch.tensor(self.multiplier, dtype=torch.float64)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        saved = state_dict.get(prefix + "multiplier")
        if saved is None:
            missing_keys.append(prefix + "multiplier")
        else:
            self.multiplier = float(saved)


def _fits(p: Tensor, lam: float) -> bool:
    """Whether p / lam neither overflows nor loses digits to underflow."""
    with torch.no_grad():
        if not p.is_floating_point() or not p.numel():
            return p.is_floating_point()
        lost = (p / lam * lam - p).abs().max()
        return not bool(lost > 4 * torch.finfo(p.dtype).eps * p.abs().max())


def _places(module: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter, _Scale | None]]:
    """Every use of a parameter: its module and name there, the tensor, and the scale that it has."""
    found: list[tuple[nn.Module, str, nn.Parameter, _Scale | None]] = []
    for owner in module.modules():
        if isinstance(owner, parametrize.ParametrizationList):
            continue
        for name, p in owner.named_parameters(recurse=False):
            found.append((owner, name, p, None))
        for name, chain in getattr(owner, "parametrizations", {}).items():
            ours = [part for part in chain if isinstance(part, _Scale)]
            if ours:
                found.append((owner, name, chain.original, ours[0]))
            else:
                kinds = ", ".join(type(part).__name__ for part in chain)
                raise ValueError(f"{name!r} has another parametrization ({kinds}); remove it, or use param_groups")
    return found


def scale_lr_(module: nn.Module, multiplier: float, optimizer: str = "adam") -> nn.Module:
    """Let a module learn at ``multiplier`` times the rate, by rescaling its parameters in place.

    The module computes the same function as before, up to rounding. Its parameters appear as
    ``parametrizations.<name>.original`` (phi) in ``named_parameters()`` and the state_dict, beside
    ``parametrizations.<name>.0.multiplier``; ``module.<name>`` reads and writes theta. They are the same Parameter
    objects as before. Call it before the optimizer takes a step: state that it has belongs to theta. Weights with the
    plain names load before this call, or after :func:`unscale_lr_`.

    Applied twice, the multipliers multiply. Frozen parameters and buffers are left alone. A tensor that is used in
    several places must have all of them inside ``module``; a use outside would see phi.

    Args:
        module: Module whose parameters, those of its submodules included, are rescaled.
        multiplier: Rate relative to that of other parameters, above 0; for 0 use ``requires_grad_(False)``.
        optimizer: Kind of the optimizer: "sgd", "momentum" or "nesterov" (lam is the root of ``multiplier``); "adam",
            "adamw", "rmsprop" or "lion" (lam is ``multiplier``). For exactness pass it eps * lam and the weight decay
            that the head of this file names.

    Returns:
        The module.

    Raises:
        TypeError: ``module`` is not a Module or ``multiplier`` is not a number.
        ValueError: ``multiplier`` is not positive and finite; a kind of optimizer for which neither rule holds; nothing
            to train; a weight with another parametrization, or scaled for another kind of optimizer; phi does not fit
            the dtype. The module is unchanged then.

    Reference:
        https://spaces.ac.cn/archives/6418

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> before = layer.weight.detach().clone()
        >>> _ = scale_lr_(layer, 0.25, optimizer="sgd")
        >>> torch.equal(layer.weight, before), torch.equal(layer.parametrizations.weight.original, 2 * before)
        (True, True)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> torch.optim.SGD(layer.parameters(), lr=1.0).step()
        >>> torch.allclose(layer.weight, before - 0.25)
        True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module; got {type(module).__name__}")
    check_real("multiplier", multiplier, above=0.0)
    if optimizer not in _POWER:
        raise ValueError(
            f"optimizer must be one of {', '.join(map(repr, _POWER))}; got {optimizer!r}. Others follow neither rule: "
            "use param_groups"
        )
    power, a = _POWER[optimizer], float(multiplier)
    places = [place for place in _places(module) if place[2].requires_grad]
    if not places:
        raise ValueError(f"the module has no parameter that requires a gradient; got {type(module).__name__}")
    for owner, name, p, known in places:
        if known is not None and known.power != power:
            raise ValueError(f"{name!r} of {type(owner).__name__} is scaled for another kind of optimizer already")
        if not _fits(p, a**power):
            raise ValueError(f"{name!r} of {type(owner).__name__} divided by {a**power:g} does not fit {p.dtype}")
    scales: dict[Tensor, _Scale] = {}
    for owner, name, p, known in places:
        if p in scales:
            if known is None:
                parametrize.register_parametrization(owner, name, scales[p])
        elif known is None:
            scales[p] = _Scale(a, power)
            parametrize.register_parametrization(owner, name, scales[p])
            scales[p].stored = True
        else:
            scales[p] = known
            known.stored = True
            with torch.no_grad():
                p.div_(a**power)
            known.multiplier *= a
    for scale in scales.values():
        scale.stored = False
    return module


def unscale_lr_(module: nn.Module) -> nn.Module:
    """Undo :func:`scale_lr_`: the parameters hold theta under their plain names again.

    Args:
        module: Module in which parameters are scaled.

    Returns:
        The module.

    Raises:
        TypeError: ``module`` is not a Module.
        ValueError: Nothing in it is scaled.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> before = layer.weight.detach().clone()
        >>> _ = unscale_lr_(scale_lr_(layer, 0.5))
        >>> torch.equal(layer.weight, before), sorted(layer.state_dict())
        (True, ['bias', 'weight'])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module; got {type(module).__name__}")
    scaled = [place for place in _places(module) if place[3] is not None]
    if not scaled:
        raise ValueError(f"nothing in the module is scaled; got {type(module).__name__}")
    done: set[Tensor] = set()
    for owner, name, p, scale in scaled:
        if scale is None:
            continue
        if p not in done:
            done.add(p)
            with torch.no_grad():
                p.copy_(scale(p))
        # Removing would multiply once more, and tied tensors once for each use: phi is theta already.
        scale.multiplier = 1.0
        parametrize.remove_parametrizations(owner, name, leave_parametrized=True)
    return module
