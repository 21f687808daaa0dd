"""Loading of models with a next-sentence head and of their tokenizers, and the check that the head is there."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

HINT = (
    "next-sentence scoring needs a model that was trained with a next-sentence head on a pooled [CLS]: "
    "BertForNextSentencePrediction, BertForPreTraining and their kin (ERNIE, MobileBERT, Megatron-BERT), "
    "KexueForNextSentence. RoBERTa, ALBERT, ELECTRA and ModernBERT were not; an NLI model or a masked-LM prompt does "
    "the same work with them"
)


def load_model(model: Any) -> nn.Module:
    """The model: itself, or from a folder with all the weights that next-sentence scoring needs.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: The kind of model has no next-sentence head, or its weights are not in the folder.
        TypeError: Neither a path nor a module.
    """
    if isinstance(model, nn.Module):
        return model
    if not isinstance(model, str | os.PathLike):
        raise TypeError(f"model must be the path of a model or a torch module; got {type(model).__name__}")
    folder = Path(model)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model must be a folder with config.json and weights; got {str(model)!r}")
    importlib.import_module("kexue.models.family")  # makes the Auto classes know the Kexue models
    from kexue._transformers import AutoConfig, AutoModelForNextSentencePrediction

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        loaded, report = AutoModelForNextSentencePrediction.from_pretrained(
            folder, config=config, local_files_only=True, output_loading_info=True
        )
    except (ValueError, KeyError) as error:  # a kind of model that the class does not know
        raise ValueError(
            f"{folder} cannot be loaded as a next-sentence model ({_first_line(error)}); {HINT}"
        ) from error
    kinds = getattr(config, "architectures", None) or []
    _check_objectives(config, kinds)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} weights, among them {missing[0]} (architecture "
            f"{', '.join(kinds or ['unknown'])}); {HINT}"
        )
    return loaded.eval()


def load_tokenizer(tokenizer: Any, model: Any) -> Any:
    """The tokenizer: itself, or from a folder (that of the model if none is given).

    Raises:
        ValueError: None with a model that is no path, one without [CLS] or [SEP], or a folder without one.
    """
    if tokenizer is None and not isinstance(model, str | os.PathLike):
        raise ValueError("tokenizer is needed with a model object (only a model's folder brings its own); got None")
    if tokenizer is None or isinstance(tokenizer, str | os.PathLike):
        from kexue._transformers import AutoTokenizer

        folder = Path(model if tokenizer is None else tokenizer)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (ValueError, OSError, KeyError) as error:
            raise ValueError(f"{folder} holds no tokenizer that can be loaded ({_first_line(error)})") from error
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes of a folder without one
            raise ValueError(f"{folder} holds no tokenizer: its vocabulary would be {len(tokenizer)} special tokens")
    if not callable(tokenizer):
        raise TypeError(f"tokenizer must be a tokenizer of transformers or a path; got {type(tokenizer).__name__}")
    for name in ("cls_token_id", "sep_token_id"):
        if getattr(tokenizer, name, None) is None:
            raise ValueError(f"a pair is [CLS] a [SEP] b [SEP]; the tokenizer {type(tokenizer).__name__} has no {name}")
    return tokenizer


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__


def _check_objectives(config: Any, kinds: Sequence[str]) -> None:
    """A Kexue model of several objectives has the head also when next sentences were none of them."""
    objectives, kind = getattr(config, "objectives", None), next((k for k in kinds if "ForPreTraining" in k), None)
    if kind is not None and isinstance(objectives, Mapping) and not objectives.get("nsp"):
        raise ValueError(f"{kind} was pretrained on {dict(objectives)}, without next sentences; {HINT}")


def check_head(model: nn.Module) -> None:
    """Raise ValueError for a model without next-sentence head or pooler, or whose head was not trained."""
    from kexue._transformers import PreTrainedModel

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module; got {type(model).__name__}")
    name = type(model).__name__
    if next(model.parameters(), None) is None:
        raise ValueError(f"{name} has no parameters")
    if not isinstance(model, PreTrainedModel):
        return  # a module of the user's: its output is checked
    names = [kind.__name__ for kind in type(model).__mro__]
    head = getattr(getattr(model, "cls", None), "seq_relationship", getattr(model, "next_sentence", None))
    if not any("ForNextSentence" in kind or ("ForPreTraining" in kind and head is not None) for kind in names):
        raise ValueError(f"{name} has no next-sentence head; {HINT}")
    _check_objectives(model.config, names)
    base = getattr(model, model.base_model_prefix, None)
    if base is not None and getattr(base, "pooler", base) is None:
        raise ValueError(f"{name} was made without a pooler (add_pooling_layer=False); {HINT}")
