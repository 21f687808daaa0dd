"""Checkpoints that are complete or absent.

A checkpoint is written into ``step-N.tmp/``, every file is flushed to disk, the folder is renamed to ``step-N/``, and
``latest`` (a text file with the folder's name) is replaced by an atomic rename. A process that dies at any moment
leaves the earlier checkpoints as they were. ``step-N/`` holds

    model.safetensors   the model's state_dict; a tensor that has several names (tied weights) is stored once
    optimizer.pt        a list with the state_dict of each optimizer, read with ``weights_only=True``
    rng.pt              states of the global generators of torch, CUDA, numpy and Python, as tensors and plain values
    checkpoint.json     format version, step, loss, settings, names of tied weights, size and CRC-32 of the other files

Order and noise are functions of (seed, step, rank), see order.py: a run does not depend on the states of the
generators, which are kept for what a callback draws after its step. There is no gradient scaler, since bfloat16 and
float32 need none. Each file is serialised in memory first (two times the weights for Adam), so that a full disk is an
OSError of a plain write. With several processes the checkpoint is that of one: rank 0 writes the whole state, which any
number of processes continues, with either strategy.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer

from kexue._files import atomic_path, fsync_directory
from kexue.training.order import random_states
from kexue.training.processes import Processes
from kexue.training.strategies import is_spread, spread_like, whole

__all__ = ["Checkpoint", "DamagedCheckpointError", "load_checkpoint", "newest_checkpoint", "save_checkpoint"]

FORMAT = 1
_MODEL, _OPTIMIZER, _RNG, _META = "model.safetensors", "optimizer.pt", "rng.pt", "checkpoint.json"


class DamagedCheckpointError(ValueError):
    """A checkpoint that is incomplete or altered.

    Example:
        >>> issubclass(DamagedCheckpointError, ValueError)
        True
    """


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`load_checkpoint` returns.

    Args:
        path: The folder.
        step: Steps that are done.
        loss: Loss of the last of them.
        config: Settings of the run, as plain JSON values.
        model: State dict of the model, on the CPU.
        optimizers: State dict of each optimizer.
        rng: States of the global generators; None in a checkpoint that was written without them.

    Example:
        >>> Checkpoint(Path("run/step-1"), 1, 0.5, {}, {"weight": torch.ones(1, 2)}, []).restore(nn.Linear(2, 1), [])
        Traceback (most recent call last):
        ...
        ValueError: run/step-1 does not fit the model or its optimizers: ... Missing key(s) in state_dict: "bias"...
    """

    path: Path
    step: int
    loss: float
    config: dict[str, Any]
    model: dict[str, torch.Tensor]
    optimizers: list[dict[str, Any]]
    rng: dict[str, Any] | None = None

    def restore(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Load the states; every weight has to fit.

        Args:
            model: Module of the same kind.
            optimizers: As many optimizers, over the same parameters, as were saved.

        Raises:
            ValueError: A name, a shape or the number of optimizers differs.
        """
        if len(optimizers) != len(self.optimizers):
            raise ValueError(f"{self.path} holds {len(self.optimizers)} optimizers; got {len(optimizers)}")
        try:
            own = model.state_dict()
            model.load_state_dict({k: spread_like(v, own[k]) if k in own else v for k, v in self.model.items()})
            for optimizer, state in zip(optimizers, self.optimizers, strict=True):
                optimizer.load_state_dict(_spread_state(state, optimizer))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{self.path} does not fit the model or its optimizers: {error}") from error


def _spread_state(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """The state with the tensors that belong to a sharded parameter sharded like it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    keys = [key for group in state["param_groups"] for key in group["params"]]
    by_key = dict(zip(keys, parameters, strict=False))  # load_state_dict names groups that do not fit
    return state | {
        "state": {
            key: {
                name: spread_like(value, by_key[key])
                if isinstance(value, torch.Tensor) and key in by_key and value.shape == by_key[key].shape
                else value
                for name, value in entry.items()
            }
            for key, entry in state["state"].items()
        }
    }


def _numbered(folder: Path) -> dict[int, Path]:
    """Finished checkpoints of a run by step, newest first."""
    found = {int(m[1]): p for p in folder.iterdir() if (m := re.fullmatch(r"step-(\d+)", p.name)) and p.is_dir()}
    return dict(sorted(found.items(), reverse=True))


def remove_unfinished(folder: Path) -> None:
    """Delete what a run that died while writing has left."""
    for path in list(folder.iterdir()):
        if re.fullmatch(r"step-\d+\.tmp", path.name):
            shutil.rmtree(path)
        elif re.fullmatch(r"\.(latest|metrics\.jsonl)\.\w+\.tmp", path.name):  # from kexue._files.atomic_path
            path.unlink()


def remove_all(folder: Path) -> None:
    """Delete the checkpoints of a run."""
    remove_unfinished(folder)
    (folder / "latest").unlink(missing_ok=True)
    for path in _numbered(folder).values():
        shutil.rmtree(path)


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint is made of, on the CPU."""

    tensors: dict[str, torch.Tensor]
    tied: dict[str, str]
    optimizers: list[dict[str, Any]]


def snapshot(model: nn.Module, optimizers: Sequence[Optimizer], keep: bool = True) -> Snapshot:
    """Whole state of model and optimizers; all ranks have to call it.

    Args:
        model: The model.
        optimizers: Its optimizers.
        keep: False on the ranks that only lend their parts.
    """
    tensors, tied = _model_tensors(model, keep)
    states = [_on_host(optimizer.state_dict(), keep) for optimizer in optimizers]
    return Snapshot(tensors, tied, states)


def _on_host(value: Any, keep: bool) -> Any:
    """Nested dicts and lists with every sharded tensor put together."""
    if isinstance(value, Mapping):
        return {key: _on_host(entry, keep) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_host(entry, keep) for entry in value)
    if isinstance(value, torch.Tensor) and (full := whole(value)) is not value:
        return full.cpu() if keep else None
    return value


def _model_tensors(model: nn.Module, keep: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors to store, and further names of tensors that are stored already."""
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"state_dict entries must be tensors to be saved; {name!r} is {type(value).__name__}")
        identity: tuple[Any, ...] = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if is_spread(value):
            identity = (id(value),)  # the part on this rank may be empty
        if value.numel() and identity in names:
            tied[name] = names[identity]
            continue
        names[identity] = name
        full = whole(value.detach())
        if not keep:
            continue
        stored = full.cpu().contiguous()
        if stored.untyped_storage().data_ptr() in storages:
            stored = stored.clone()  # another part of a storage that is stored under another name
        storages.add(stored.untyped_storage().data_ptr())
        tensors[name] = stored
    return tensors, tied


def _write(path: Path, content: bytes) -> dict[str, int]:
    """Write and flush one file; returns what is needed to recognise damage."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "crc32": zlib.crc32(content)}


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    step: int,
    loss: float,
    config: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write ``folder/step-<step>`` and delete all but the ``keep`` newest checkpoints up to it.

    Args:
        folder: Folder of the run; it must exist.
        model: Module whose state_dict is stored.
        optimizers: Optimizers whose states are stored.
        step: Steps that are done.
        loss: Loss of the last step.
        config: Settings, JSON values only.
        keep: How many checkpoints stay.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: It could not be written (disk full, no permission). Nothing half-written is left, and the earlier
            checkpoints are intact.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_checkpoint(folder, nn.Linear(2, 1), [], step=3, loss=0.5, config={"seed": 0})
        ...     print(path.name, sorted(p.name for p in path.iterdir()), load_checkpoint(path).config)
        step-3 ['checkpoint.json', 'model.safetensors', 'optimizer.pt', 'rng.pt'] {'seed': 0}
    """
    return write_snapshot(folder, snapshot(model, optimizers), step=step, loss=loss, config=config, keep=keep)


def write_snapshot(
    folder: str | os.PathLike[str],
    state: Snapshot,
    *,
    step: int,
    loss: float,
    config: Mapping[str, Any],
    keep: int,
) -> Path:
    """The part of :func:`save_checkpoint` that one rank does."""
    folder = Path(folder)
    final, temporary = folder / f"step-{step}", folder / f"step-{step}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        content = safetensors.torch.save(state.tensors, metadata={"format": "pt"})
        files = {_MODEL: _write(temporary / _MODEL, content)}
        for name, value in ((_OPTIMIZER, state.optimizers), (_RNG, random_states())):
            buffer = io.BytesIO()
            torch.save(value, buffer)
            files[name] = _write(temporary / name, buffer.getvalue())
        meta = {"format": FORMAT, "step": step, "loss": loss, "config": config, "tied": state.tied, "files": files}
        _write(temporary / _META, (json.dumps(meta, ensure_ascii=False, indent=2) + "\n").encode())
        fsync_directory(temporary)
        if final.exists():  # a damaged one, or the run was told to repeat the step
            shutil.rmtree(final)
        os.rename(temporary, final)
        fsync_directory(folder)
        with atomic_path(folder / "latest") as pointer:
            pointer.write_text(final.name + "\n", encoding="utf-8")
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        earlier = next(
            (f"the last complete checkpoint is {p}" for p in _numbered(folder).values()), "there is none yet"
        )
        raise OSError(
            error.errno,
            f"cannot write the checkpoint of step {step} ({error.strerror or error}); {earlier}",
            str(final),
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    done = [number for number in _numbered(folder) if number <= step]  # above it: damaged ones that are still to come
    for number in done[keep:]:
        shutil.rmtree(folder / f"step-{number}", ignore_errors=True)
    return final


def _verified(path: Path, files: Mapping[str, Any], name: str) -> bytes:
    content = (path / name).read_bytes()
    expected = files[name]
    if len(content) != expected["bytes"]:
        raise DamagedCheckpointError(f"{path}: {name} has {len(content)} bytes instead of {expected['bytes']}")
    if zlib.crc32(content) != expected["crc32"]:
        raise DamagedCheckpointError(f"{path}: the checksum of {name} is wrong")
    return content


def _unpickled(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read and verify one checkpoint.

    Args:
        path: A folder ``step-N``.

    Returns:
        Its content, on the CPU.

    Raises:
        DamagedCheckpointError: A file is missing, truncated or altered.
        ValueError: It was written in another format version.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     load_checkpoint(save_checkpoint(folder, nn.Linear(2, 1), [], step=3, loss=0.5, config={})).step
        3
    """
    path = Path(path)
    try:
        meta = json.loads((path / _META).read_bytes())
        version = meta["format"]
        if version != FORMAT:
            raise ValueError(
                f"{path} has checkpoint format {version!r}; this version of kexue reads format {FORMAT}. Continue with "
                "the version that wrote it, or start over in another folder"
            )
        model = safetensors.torch.load(_verified(path, meta["files"], _MODEL))
        model.update({name: model[first] for name, first in meta["tied"].items()})
        optimizers = _unpickled(_verified(path, meta["files"], _OPTIMIZER))
        rng = _unpickled(_verified(path, meta["files"], _RNG)) if _RNG in meta["files"] else None
        return Checkpoint(path, int(meta["step"]), float(meta["loss"]), dict(meta["config"]), model, optimizers, rng)
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{path}: {Path(str(error.filename)).name} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path}: {_META} cannot be read ({error!r})") from error
    except (SafetensorError, RuntimeError, pickle.UnpicklingError) as error:
        raise DamagedCheckpointError(f"{path}: its content is not what this format holds ({error})") from error


def newest_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint | None:
    """Newest usable checkpoint of a run; a damaged one is passed over with a warning.

    Args:
        folder: Folder of the run.

    Returns:
        The checkpoint, or None when there is no usable one.

    Raises:
        ValueError: The newest one was written in another format version.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(newest_checkpoint(folder))
        None
    """
    for path in _numbered(Path(folder)).values():
        try:
            return load_checkpoint(path)
        except DamagedCheckpointError as error:
            warnings.warn(f"damaged checkpoint: {error}; falling back to the one before it, if any", stacklevel=3)
    return None


def sent(checkpoint: Checkpoint | None, processes: Processes) -> Checkpoint | None:
    """Rank 0's checkpoint on every rank; its tensors travel one by one."""
    if processes.world == 1:
        return checkpoint
    here = None if checkpoint is None else dict(vars(checkpoint))
    tensors: list[torch.Tensor] = []
    there = processes.share(_without_tensors(here, tensors))
    if there is None:
        return None
    rest = iter(tensors)

    def fill(value: Any) -> Any:
        if isinstance(value, _Blank):
            tensor = next(rest) if processes.rank == 0 else torch.empty(value.shape, dtype=value.dtype)
            return processes.broadcast_(tensor)
        if isinstance(value, Mapping):
            return {key: fill(entry) for key, entry in value.items()}
        return type(value)(map(fill, value)) if isinstance(value, (list, tuple)) else value

    return Checkpoint(**fill(there))


@dataclass(frozen=True)
class _Blank:
    """Stands for a tensor that is sent separately."""

    shape: torch.Size
    dtype: torch.dtype


def _without_tensors(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _Blank(value.shape, value.dtype)
    if isinstance(value, Mapping):
        return {key: _without_tensors(entry, tensors) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_without_tensors(entry, tensors) for entry in value)
    return value
