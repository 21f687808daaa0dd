"""The folder of a fitted :class:`kexue.adversarial.BiGANQP`: ``bigan_qp.json``, ``weights.safetensors``."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import nn

from kexue._files import recover_directory, replaced_folder, write_json
from kexue.adversarial.networks import bigan_networks

if TYPE_CHECKING:
    from kexue.adversarial.bigan_qp import BiGANQP

FORMAT, KIND, HEAD, WEIGHTS = 1, "bigan-qp", "bigan_qp.json", "weights.safetensors"
_PARTS = ("generator", "encoder", "critic")
_BROKEN = (KeyError, TypeError, AttributeError, RuntimeError, OSError, ValueError, SafetensorError)


class _Stored(nn.Module):
    def __init__(self, networks: Any, codes: torch.Tensor) -> None:
        super().__init__()
        self.generator, self.encoder, self.critic = networks
        self.register_buffer("codes", codes)


def save(model: BiGANQP, folder: str | os.PathLike[str]) -> None:
    """Write the folder, replacing an earlier one in one step."""
    params = {k: _plain(v) for k, v in model.get_params(deep=False).items() if k not in _PARTS}
    networks = (model.generator_, model.encoder_, model.critic_)
    head = {
        "format": FORMAT,
        "kind": KIND,
        "own": model._own,
        "networks": [type(m).__name__ for m in networks],
        "shape": list(model.shape_),
        "codes": list(model.codes_.shape),
        "params": params,
        "history": model.history_,
    }
    with replaced_folder(folder, HEAD, "saved BiGAN-QP") as target:
        save_model(_Stored(networks, torch.from_numpy(model.codes_)), str(target / WEIGHTS))
        write_json(target / HEAD, head)


def _plain(value: Any) -> Any:
    """A setting as JSON; a metric of the user's own matters for further training only."""
    if isinstance(value, tuple | list):
        return [_plain(x) for x in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if isinstance(value, str | int | float | None) else None


def load(cls: type[Any], folder: str | os.PathLike[str], given: tuple[Any, Any, Any]) -> Any:
    """Read the folder."""
    source = Path(folder).absolute()
    recover_directory(source)
    head = _head(source)
    try:
        params = {k: tuple(v) if isinstance(v, list) else v for k, v in head["params"].items()}
        params["metric"] = params["metric"] or "l1"
        model = cls(**params)
        shape = tuple(int(size) for size in head["shape"])
        if head["own"]:
            if any(m is not None for m in given):
                raise ValueError("this folder holds its own networks; load it without them")
            with torch.random.fork_rng(devices=[]):
                networks: Any = bigan_networks(shape, int(head["codes"][1]))
        else:
            if not all(isinstance(m, nn.Module) for m in given):
                raise ValueError(f"the networks are the caller's own ({', '.join(head['networks'])}); give all three")
            networks = copy.deepcopy(given)
            model.generator, model.encoder, model.critic = given
        like = next(networks[0].parameters())
        stored = _Stored(networks, torch.empty(*map(int, head["codes"]), dtype=like.dtype))
        weights = load_file(source / WEIGHTS)
        missing, unexpected = stored.load_state_dict(weights, strict=False)
        shared = {name for name in missing if _has_twin(stored, name, weights)}
        if set(missing) - shared or unexpected:
            raise ValueError(f"missing weights {sorted(set(missing) - shared)}, unexpected ones {unexpected}")
        model.generator_, model.encoder_, model.critic_ = (m.eval() for m in networks)
        model._own, model.shape_, model.history_ = bool(head["own"]), shape, dict(head["history"])
        model.n_features_in_, model.codes_ = int(np.prod(shape)), stored.codes.numpy()  # type: ignore[operator]
    except _BROKEN as error:
        raise ValueError(f"{source} holds no complete BiGAN-QP: {error}") from None
    return model


def _has_twin(module: nn.Module, name: str, weights: dict[str, torch.Tensor]) -> bool:
    """Whether a tensor is stored under another name, as it is shared."""
    state = module.state_dict(keep_vars=True)
    return any(state[other] is state[name] for other in weights if other in state)


def _head(folder: Path) -> dict[str, Any]:
    path = folder / HEAD
    if not path.is_file():
        raise ValueError(f"{folder} holds no saved BiGAN-QP ({HEAD} is missing)")
    try:
        head: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version, kind = head["format"], head["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from None
    if kind != KIND or version != FORMAT:
        raise ValueError(f"{path} must be {KIND} of format {FORMAT}; got {kind!r} of format {version!r}")
    return head
