"""The folder of a trained :class:`kexue.tasks.Summarizer`.

``summarizer.json`` (settings and what was learned besides weights), ``labelers.safetensors`` and, if summaries are
generated, ``generator/``. No pickle anywhere.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kexue._checks import check_choice
from kexue._files import recover_directory, replaced_folder, write_json
from kexue.models.char_gru import read_head
from kexue.tasks._piece_features import PieceEncoder
from kexue.tasks._summary_selection import Selection
from kexue.tasks.gated_conv import GatedConvLabeler

if TYPE_CHECKING:
    from kexue.tasks.summarizer import Summarizer

FORMAT, KIND, HEAD = 1, "summarizer", "summarizer.json"
_BROKEN = (KeyError, TypeError, AttributeError, RuntimeError, OSError, ValueError)


def save(model: Summarizer, folder: str | os.PathLike[str]) -> None:
    """Write the folder, replacing an earlier one in one step."""
    params = {k: _plain(v) for k, v in model.get_params(deep=False).items() if k != "generator"}
    if params["encoder"] is not None:
        params["encoder"] = model._encode.encoder  # a folder as an absolute path
    head = {
        "format": FORMAT,
        "kind": KIND,
        "params": params,
        "callable": callable(model.encoder),
        "probe": model._encode.probe,
        "unit": model.unit_,
        "separators": model._separators,
        "width": model._labelers[0].input_size,
        "hidden_size": model._labelers[0].project.out_features,
        "labelers": len(model._labelers),
        "epochs": model.epochs_,
        "length": model.length_,
        "threshold": model.threshold_,
        "generates": model._generator is not None,
        "scores": model.scores_,
        "scored_on": model.scored_on_,
        "out_of_fold_extracts": model.out_of_fold_extracts_,
    }
    with replaced_folder(folder, HEAD, "saved summarizer") as target:
        _save_labelers(model._labelers, target / "labelers.safetensors")
        if model._generator is not None:
            model._generator.save(target / "generator")
        write_json(target / HEAD, head)


def _save_labelers(labelers: list[GatedConvLabeler], path: Path) -> None:
    weights = {f"{k}.{name}": v for k, labeler in enumerate(labelers) for name, v in labeler.state_dict().items()}
    save_file({name: v.contiguous() for name, v in weights.items()}, path)


def _load_labelers(path: Path, count: int, width: int, hidden_size: int) -> list[GatedConvLabeler]:
    weights = load_file(path)
    labelers = []
    for k in range(count):
        labeler = GatedConvLabeler(width, hidden_size)
        labeler.load_state_dict({name: weights.pop(f"{k}.{name}") for name in labeler.state_dict()})
        labelers.append(labeler.eval())
    if weights or not labelers:
        raise ValueError(f"{path} holds other weights than those of {count} labellers: {sorted(weights)}")
    return labelers


def _plain(value: Any) -> Any:
    """A setting as JSON; a function and a splitter have none and matter for further training only."""
    if isinstance(value, tuple | list):
        return [_plain(x) for x in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value if isinstance(value, str | int | float | None) else None


def load(cls: type[Any], folder: str | os.PathLike[str], encoder: Any) -> Any:
    """Read the folder."""
    source = Path(folder).absolute()
    recover_directory(source)
    head = read_head(source / HEAD, KIND, FORMAT)
    if head.get("callable") and encoder is None:
        raise ValueError(f"the encoder of {source} is the caller's own function; load with encoder=")
    try:
        model = _read(cls, source, head)
    except (*_BROKEN, SafetensorError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{source} holds no complete summarizer: {why}") from None
    if encoder is not None:
        model.encoder = encoder
    try:
        model._encode = PieceEncoder(model.encoder, int(head["width"]), head.get("probe"))
    except ValueError as error:
        hint = "" if model.encoder == "hash" else "; if the checkpoint has moved, load with encoder=FOLDER"
        raise ValueError(f"{source}: {error}{hint}") from error
    return model


def _read(cls: type[Any], source: Path, head: dict[str, Any]) -> Any:
    """The model without its encoder."""
    params = {k: tuple(v) if isinstance(v, list) else v for k, v in head["params"].items()}
    params["folds"] = 5 if params["folds"] is None else params["folds"]
    model = cls(**params)
    check_choice("unit", head["unit"], ("char", "word"))
    model.unit_, model.scores_, model.scored_on_ = head["unit"], dict(head["scores"]), head["scored_on"]
    separators = head["separators"]
    model._separators = separators if isinstance(separators, str) else tuple(separators)
    model.epochs_, model.out_of_fold_extracts_ = list(head["epochs"]), head["out_of_fold_extracts"]
    model._selection = Selection(float(head["length"]), float(head["threshold"]))
    model.length_, model.threshold_ = model._selection.length, model._selection.threshold
    path = source / "labelers.safetensors"
    model._labelers = _load_labelers(path, int(head["labelers"]), int(head["width"]), int(head["hidden_size"]))
    model.uses_generator_, model._generator = bool(head["generates"]), None
    if model.uses_generator_:
        from kexue.tasks.summary_generator import SummaryGenerator  # imports transformers: seconds

        model._generator = SummaryGenerator.load(source / "generator")
    return model
