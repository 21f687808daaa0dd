"""Reading files of weights that somebody else wrote, without running anything in them."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["megatron_files", "read_json", "read_weights", "weights_of_folder"]

_RANK = re.compile(r"mp_rank_(\d+)(?:_model_states\.pt)?")
_ITERATION = re.compile(r"(?:iter_0*|global_step)?(\d+)")
_INSIDE = ("model_optim_rng.pt", "model_states.pt", "model_rng.pt")  # of a folder mp_rank_XX
_MARKERS = ("latest_checkpointed_iteration.txt", "latest")
_FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@contextlib.contextmanager
def _state_of_numpy() -> Iterator[None]:
    """Allow plain numpy arrays, as training scripts save the state of numpy's random numbers beside the weights."""
    core: Any = importlib.import_module("numpy._core.multiarray")
    kinds = {type(np.dtype(c)) for c in "?bBhHiIlLqQfd"}
    allowed: list[Any] = [np.ndarray, np.dtype, *kinds, core._reconstruct]
    allowed.append((core._reconstruct, "numpy.core.multiarray._reconstruct"))  # its name before numpy 2
    with torch.serialization.safe_globals(allowed):
        yield


def read_weights(path: str | os.PathLike[str], mmap: bool = True) -> Any:
    """What a .safetensors or a torch file holds; the latter with weights_only, on the CPU.

    Args:
        path: The file.
        mmap: Leave the tensors on disk until they are used, where the format allows it.

    Raises:
        FileNotFoundError: There is none.
        ValueError: Another kind of file, a damaged one, or a pickle with anything but tensors and plain containers,
            which is refused and not run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file or is damaged: {error}") from None
    packed = zipfile.is_zipfile(path)  # before torch 1.6 files were bare pickles, which cannot be mapped
    try:
        with _state_of_numpy():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and packed)
    except pickle.UnpicklingError as error:
        what = re.search(r"(?:GLOBAL|global|class|function)[:\s]+(?:GLOBAL )?([A-Za-z_][\w.]*\.\w+)", str(error))
        holds = f"it holds {what[1]}, something" if what else "it is no torch file, or holds something"
        raise ValueError(
            f"{path} is refused: {holds} other than tensors and plain containers, and unpickling that can run code. "
            "Save the state dict alone, best as safetensors"
        ) from None
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        reason = re.split(r"(?<=[^.])\. |\n", str(error))[0]
        raise ValueError(f"{path} is no file of weights that torch can read: {type(error).__name__} {reason}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(value).__name__}")
    return value


def weights_of_folder(folder: Path, mmap: bool = True) -> dict[str, Any]:
    """The state dict of a folder that transformers' ``save_pretrained`` wrote, from one file or several."""
    name = next((n for n in _FOLDER_FILES if (folder / n).is_file()), None)
    if name is None:
        raise ValueError(f"{folder} has no weights; expected one of {', '.join(_FOLDER_FILES)}")
    if not name.endswith(".json"):
        return _state_dict(folder / name, mmap)
    places = read_json(folder / name).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        raise ValueError(f"{folder / name} must map names of tensors to files under weight_map")
    merged: dict[str, Any] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:  # nothing outside of the folder
            raise ValueError(f"{folder / name} must name files beside it; got {file!r}")
        merged |= _state_dict(folder / file, mmap)
    if missing := sorted(set(places) - set(merged)):
        raise ValueError(f"the files of {folder / name} lack {', '.join(missing[:4])}")
    return merged


def _state_dict(path: Path, mmap: bool) -> dict[str, Any]:
    value = read_weights(path, mmap)
    if not isinstance(value, Mapping):
        raise ValueError(f"{path} must hold a dict of tensors; got {type(value).__name__}")
    return dict(value)


def megatron_files(folder: Path) -> list[Path]:
    """The files of all model-parallel ranks below a folder, in order.

    Raises:
        ValueError: None, a gap in the ranks, or several iterations with nothing that says which is meant.
    """
    ranks: dict[int, Path] = {}
    for entry in sorted(folder.iterdir()):
        if not (match := _RANK.fullmatch(entry.name)):
            continue
        found = entry
        if entry.is_dir():
            inside = [entry / name for name in _INSIDE if (entry / name).is_file()] or sorted(entry.glob("*.pt"))
            if len(inside) != 1:
                raise ValueError(f"{entry} must hold one file of weights; got {len(inside)}")
            found = inside[0]
        if int(match[1]) in ranks:
            raise ValueError(f"{folder} has two entries of rank {int(match[1])}")
        ranks[int(match[1])] = found
    if ranks:
        missing = sorted(set(range(max(ranks) + 1)) - set(ranks))
        if missing:
            raise ValueError(f"{folder} has ranks {sorted(ranks)}; missing: {missing[:8]}")
        return [ranks[n] for n in sorted(ranks)]
    return megatron_files(_iteration(folder))


def _iteration(folder: Path) -> Path:
    """The folder of one iteration."""
    for name in _MARKERS:
        if (folder / name).is_file():
            said = (folder / name).read_text(encoding="utf-8", errors="replace").strip()
            names = (said, f"iter_{int(said):07}" if said.isdecimal() else said)
            if said and Path(said).name == said:
                for candidate in names:
                    if (folder / candidate).is_dir() and said not in (".", ".."):
                        return folder / candidate
            raise ValueError(f"{folder / name} names the iteration {said[:40]!r}, which has no folder beside it")
    numbered = [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and _is_iteration(entry)]
    if len(numbered) != 1:
        found = f"{len(numbered)} iterations ({', '.join(e.name for e in numbered[:4])})" if numbered else "neither"
        raise ValueError(f"{folder} must hold a config.json, files mp_rank_XX, or one iteration of them; got {found}")
    return numbered[0]


def _is_iteration(folder: Path) -> bool:
    inside = any(_RANK.fullmatch(entry.name) for entry in folder.iterdir())
    return bool(_ITERATION.fullmatch(folder.name) or folder.name == "release") and inside
