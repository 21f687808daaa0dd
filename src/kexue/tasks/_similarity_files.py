"""The folder of a trained :class:`kexue.tasks.SentenceSimilarity`.

``similarity.json`` (settings), ``encoder/``, and if texts are stored ``index.json``, ``index.safetensors`` and, for an
approximate index, ``index.usearch``. No pickle anywhere.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_model, save_model
from torch import nn

from kexue._files import recover_directory, replaced_folder, write_json
from kexue.models.char_gru import CharGRUEncoder, read_head
from kexue.tasks._text_encoders import text_encoder
from kexue.tasks._vector_index import VectorIndex

if TYPE_CHECKING:
    from kexue.tasks.sentence_similarity import SentenceSimilarity

_BROKEN = (KeyError, TypeError, AttributeError, RuntimeError, OSError, UnicodeDecodeError, json.JSONDecodeError)
FORMAT, KIND, HEAD = 1, "sentence-similarity", "similarity.json"


def save(model: SentenceSimilarity, folder: str | os.PathLike[str]) -> None:
    """Write the folder, replacing an earlier one in one step."""
    own = isinstance(model.encoder_, CharGRUEncoder)
    params = {k: _plain(v) for k, v in model.get_params(deep=False).items() if k != "encoder"}
    stored = hasattr(model, "_index")
    head = {
        "format": FORMAT,
        "kind": KIND,
        "encoder": "char-gru" if own else type(model.encoder_).__name__,
        "width": model._width,
        "groups": _named(model.classes_),
        "threshold": model.threshold_,
        "validation": model.validation_,
        "texts": len(model.texts_) if stored else None,
        "approximate": stored and not model._index.exact,
        "params": params,
    }
    with replaced_folder(folder, HEAD, "saved sentence similarity") as target:
        encoder: Any = model.encoder_
        if own:
            encoder.save(target / "encoder")
        else:
            (target / "encoder").mkdir()
            save_model(encoder, str(target / "encoder" / "encoder.safetensors"))
        if stored:
            write_json(target / "index.json", {"texts": model.texts_, "ids": model.ids_})
            save_file({"vectors": model._index.vectors}, target / "index.safetensors")
            if not model._index.exact:
                model._index.save_graph(target / "index.usearch")
        write_json(target / HEAD, head)


def _named(groups: list[Any]) -> list[Any]:
    """The groups, or their numbers if JSON would not give the same back."""
    return groups if all(type(group) in (str, int, bool, type(None)) for group in groups) else list(range(len(groups)))


def _plain(value: Any) -> Any:
    """A setting as JSON. A function as kind and a tensor as margin have none: they matter for further training only."""
    if isinstance(value, tuple | list):
        return [_plain(x) for x in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if isinstance(value, str | int | float | None) else None


def load(cls: type[Any], folder: str | os.PathLike[str], encoder: Any) -> Any:
    """Read the folder."""
    source = Path(folder).absolute()
    recover_directory(source)
    head = read_head(source / HEAD, KIND, FORMAT)
    try:
        params = {k: tuple(v) if isinstance(v, list) else v for k, v in head["params"].items()}
        params["kind"] = params["kind"] or "am"
        model = cls(**params)
        module = _encoder(source / "encoder", head["encoder"], encoder, model.maxlen)
        model.encoder_, model._text_encoder = module.module.eval(), module
        model._width, model.classes_ = int(head["width"]), list(head["groups"])
        model.threshold_, model.validation_, model.losses_ = head["threshold"], head["validation"], []
        model.encoder = encoder if encoder is not None else module.module
        if head["texts"] is not None:
            _load_index(model, source, head)
    except (*_BROKEN, SafetensorError) as error:
        raise ValueError(f"{source} holds no complete sentence similarity: {error}") from None
    return model


def _encoder(folder: Path, kind: str, given: Any, maxlen: int) -> Any:
    if kind == "char-gru":
        if given is not None:
            raise ValueError("this folder holds its own CharGRUEncoder; load it without encoder=")
        return text_encoder(CharGRUEncoder.load(folder), maxlen)
    if given is None:
        raise ValueError(f"the encoder {kind} is the caller's own; load with encoder=, one of the same shape")
    face = text_encoder(copy.deepcopy(given), maxlen)
    module: nn.Module = face.module
    load_model(module, folder / "encoder.safetensors", strict=True)
    return face


def _load_index(model: Any, source: Path, head: dict[str, Any]) -> None:
    content = json.loads((source / "index.json").read_text(encoding="utf-8"))
    vectors = load_file(source / "index.safetensors")["vectors"]
    texts, ids = content["texts"], content["ids"]
    expected = (head["texts"], model._width)
    if vectors.shape != expected or len(texts) != len(ids) or len(texts) != len(vectors):
        raise ValueError(
            f"{source}: expected {expected[0]} stored texts of width {expected[1]}; got {len(texts)} texts, "
            f"{len(ids)} ids and vectors {vectors.shape}"
        )
    approximate = bool(head["approximate"]) and importlib.util.find_spec("usearch") is not None
    graph = source / "index.usearch" if approximate else None
    model._store(texts, ids, VectorIndex(np.ascontiguousarray(vectors), approximate, graph))
