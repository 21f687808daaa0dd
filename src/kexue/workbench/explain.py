"""Open a model of a folder and explain what it says about texts: see :func:`kexue.explain.explain_text`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kexue.workbench.errors import WorkspaceError
from kexue.workbench.similarity import MANIFEST

if TYPE_CHECKING:
    from kexue.explain import PairExplanation, TextExplanations

__all__ = ["SimilarityPairs", "explain_similarity", "explain_texts", "is_similarity", "open_model"]


def is_similarity(folder: str | Path) -> bool:
    """Whether the folder holds a model that ``kexue similarity train`` made."""
    return (Path(folder) / MANIFEST).is_file() and not (Path(folder) / "config.json").is_file()


def open_model(folder: str | Path) -> tuple[Any, Any]:
    """The model and the tokenizer of a folder, as ``save_pretrained`` or ``kexue pretrain`` wrote them.

    Raises:
        WorkspaceError: It is missing, damaged, or holds a model that is not explained.
    """
    path = Path(folder)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("config.json holds no object")
    except (OSError, ValueError) as error:
        what = "does not exist" if not path.exists() else f"holds no model that can be read ({error})"
        raise WorkspaceError(f"{path} {what}; give a folder with a transformers model and its tokenizer") from None
    names = config.get("architectures") or [""]
    from kexue._transformers import (
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        PreTrainedTokenizerFast,
        show_loading,
    )

    kind: Any
    name = str(names[0])
    if config.get("model_type") == "kexue":
        import kexue.models

        modes = {"causal": "KexueForCausalLM", "diagonal": "KexueForTextAutoencoding"}
        name = name or modes.get(config.get("attn_mode", ""), "KexueForMaskedLM")
        kind = getattr(kexue.models, name, None)
    elif "SequenceClassification" in name:
        kind = AutoModelForSequenceClassification
    elif "CausalLM" in name or "LMHead" in name:
        kind = AutoModelForCausalLM
    else:
        kind = AutoModelForMaskedLM if "MaskedLM" in name else None
    if kind is None:
        raise WorkspaceError(
            f"{path} must hold a model for sequence classification, causal or masked language modelling; got {name!r}"
        )
    reader = PreTrainedTokenizerFast if config.get("model_type") == "kexue" else AutoTokenizer
    show_loading(False)
    try:
        tokenizer = reader.from_pretrained(path, local_files_only=True)
        model, report = kind.from_pretrained(path, local_files_only=True, output_loading_info=True)
    except Exception as error:  # transformers raises what its parts raise
        raise WorkspaceError(f"{path} cannot be read: {error}") from error
    if report["missing_keys"]:
        raise WorkspaceError(f"{path} is damaged: it lacks {sorted(report['missing_keys'])[0]}")
    return model.eval(), tokenizer


def explain_texts(folder: str | Path, texts: Sequence[str], **options: Any) -> TextExplanations:
    """Explain what the model of a folder says about texts.

    Args:
        folder: A transformers model for sequence classification, causal or masked language modelling with its
            tokenizer, or a model of ``kexue pretrain``.
        texts: The texts.
        **options: As for :func:`kexue.explain.explain_text`.

    Raises:
        WorkspaceError: The folder holds no such model.
        ValueError: As :func:`kexue.explain.explain_text`.
    """
    from kexue.explain import explain_text

    model, tokenizer = open_model(folder)
    return explain_text(model, tokenizer, list(texts), **options)


@dataclass(frozen=True)
class SimilarityPairs:
    """Why two sentences are similar.

    Attributes:
        first: Characters of the one, as the model reads them.
        second: Of the other.
        found: What each pair of them adds to the cosine.
    """

    first: str
    second: str
    found: PairExplanation

    def strongest(self, k: int) -> list[tuple[int, int, float]]:
        """The k pairs of largest size: place in ``first``, place in ``second``, what they add."""
        flat = self.found.pairs.flatten()
        order = flat.abs().argsort(descending=True)[:k].tolist()
        width = self.found.pairs.shape[1]
        return [(i // width, i % width, float(flat[i])) for i in order]


def explain_similarity(folder: str | Path, first: str, second: str, tol: float = 1e-3) -> SimilarityPairs:
    """Explain the cosine of two sentences by pairs of their characters.

    Args:
        folder: A model of ``kexue similarity train``.
        first: A sentence.
        second: Another.
        tol: As for :func:`kexue.explain.explain_pair`.

    Raises:
        WorkspaceError: There is no such model.
    """
    from kexue.explain import explain_pair
    from kexue.workbench.similarity import SimilarityModel

    estimator = SimilarityModel(folder).estimator
    encoder: Any = estimator.encoder_
    texts = [text[: encoder.maxlen] for text in estimator._prepared([first, second])]
    a, b = (encoder.embedding(encoder.lookup([text]))[0].detach() for text in texts)

    def encode(e: Any) -> Any:
        return encoder.gru(e)[1][0]

    return SimilarityPairs(texts[0], texts[1], explain_pair(encode, a, b, tol=tol))
