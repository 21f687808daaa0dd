"""Checkpoints that are complete or absent.

A checkpoint is written into ``step-N.tmp/``, every file is flushed to disk, the folder is renamed to ``step-N/``, and
``latest`` (a text file with the folder's name) is replaced by an atomic rename. A process that dies at any moment
leaves the earlier checkpoints as they were. ``step-N/`` holds

    model.safetensors   the model's state_dict; a tensor that has several names (tied weights) is stored once
    optimizer.pt        a list with the state_dict of each optimizer, read with ``weights_only=True``
    checkpoint.json     format version, step, loss, settings, names of tied weights, size and CRC-32 of the other files

No state of a random generator is among them: the order and the noise of a step are functions of (seed, step, rank),
see order.py. Each file is serialised in memory first (up to the optimizer's state once more, two times the weights for
Adam), so that a full disk is an OSError of a plain write and not a half-translated error of a serialisation library.
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

__all__ = ["Checkpoint", "DamagedCheckpointError", "load_checkpoint", "newest_checkpoint", "save_checkpoint"]

FORMAT = 1
_MODEL, _OPTIMIZER, _META = "model.safetensors", "optimizer.pt", "checkpoint.json"


class DamagedCheckpointError(ValueError):
    """A checkpoint that is incomplete or altered.

    Args:
        message: What is wrong.

    Example:
        >>> raise DamagedCheckpointError("run/step-20: optimizer.pt is missing")
        Traceback (most recent call last):
        ...
        kexue.training.checkpoint.DamagedCheckpointError: run/step-20: optimizer.pt is missing
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

    Example:
        >>> checkpoint = Checkpoint(Path("run/step-1"), 1, 0.5, {}, {"weight": torch.ones(1, 2)}, [])
        >>> model = nn.Linear(2, 1, bias=False)
        >>> checkpoint.restore(model, [])
        >>> model.weight.tolist()
        [[1.0, 1.0]]
    """

    path: Path
    step: int
    loss: float
    config: dict[str, Any]
    model: dict[str, torch.Tensor]
    optimizers: list[dict[str, Any]]

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
            model.load_state_dict(self.model, strict=True)
            for optimizer, state in zip(optimizers, self.optimizers, strict=True):
                optimizer.load_state_dict(state)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{self.path} does not fit the model or its optimizers: {error}") from error


def _numbered(folder: Path) -> dict[int, Path]:
    """Finished checkpoints of a run by step, newest first."""
    found = {int(m[1]): p for p in folder.iterdir() if (m := re.fullmatch(r"step-(\d+)", p.name)) and p.is_dir()}
    return dict(sorted(found.items(), reverse=True))


def remove_unfinished(folder: Path) -> None:
    """Delete what a run that died while writing has left."""
    for path in folder.glob("step-*.tmp"):
        if re.fullmatch(r"step-\d+\.tmp", path.name):
            shutil.rmtree(path)


def remove_all(folder: Path) -> None:
    """Delete the checkpoints of a run."""
    remove_unfinished(folder)
    (folder / "latest").unlink(missing_ok=True)
    for path in _numbered(folder).values():
        shutil.rmtree(path)


def _model_tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors to store, and further names of tensors that are stored already."""
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"state_dict entries must be tensors to be saved; {name!r} is {type(value).__name__}")
        identity = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and identity in names:
            tied[name] = names[identity]
            continue
        names[identity] = name
        stored = value.detach().cpu().contiguous()
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
        >>> model = nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_checkpoint(folder, model, [], step=3, loss=0.5, config={"seed": 0})
        ...     print(path.name, sorted(p.name for p in path.iterdir()), load_checkpoint(path).config)
        step-3 ['checkpoint.json', 'model.safetensors', 'optimizer.pt'] {'seed': 0}
    """
    folder = Path(folder)
    final, temporary = folder / f"step-{step}", folder / f"step-{step}.tmp"
    try:
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
        tensors, tied = _model_tensors(model)
        files = {_MODEL: _write(temporary / _MODEL, safetensors.torch.save(tensors, metadata={"format": "pt"}))}
        buffer = io.BytesIO()
        torch.save([optimizer.state_dict() for optimizer in optimizers], buffer)
        files[_OPTIMIZER] = _write(temporary / _OPTIMIZER, buffer.getvalue())
        meta = {"format": FORMAT, "step": step, "loss": loss, "config": config, "tied": tied, "files": files}
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
        ...     path = save_checkpoint(folder, nn.Linear(2, 1), [], step=3, loss=0.5, config={})
        ...     checkpoint = load_checkpoint(path)
        >>> checkpoint.step, sorted(checkpoint.model)
        (3, ['bias', 'weight'])
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
        content = io.BytesIO(_verified(path, meta["files"], _OPTIMIZER))
        optimizers = torch.load(content, map_location="cpu", weights_only=True)
        return Checkpoint(path, int(meta["step"]), float(meta["loss"]), dict(meta["config"]), model, optimizers)
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
        ...     for step in (1, 2):
        ...         path = save_checkpoint(folder, nn.Linear(2, 1), [], step=step, loss=0.5, config={})
        ...     newest_checkpoint(folder).step
        2
    """
    for path in _numbered(Path(folder)).values():
        try:
            return load_checkpoint(path)
        except DamagedCheckpointError as error:
            warnings.warn(f"damaged checkpoint: {error}; falling back to the one before it", stacklevel=3)
    return None
