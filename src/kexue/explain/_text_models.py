"""What :func:`kexue.explain.explain_text` knows of models and tokenizers: ids, embeddings, outputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kexue._checks import check_choice, check_int
from kexue._tensors import compute_dtype

__all__ = ["OUTPUTS", "Encoded", "TextModel"]

OUTPUTS = ("logit", "log_prob", "prob")
_POSITIONS = (
    "position_embeddings",
    "embed_positions",
    "position_embedding",
    "position",
    "wpe",
)  # names of tables with an end


@dataclass
class Encoded:
    """A text as the model reads it.

    Attributes:
        text: The text.
        ids: Its T ids.
        types: Segments of the T tokens; None: the tokenizer makes none.
        spans: Characters of each token; (0, 0) for those that are not in the text. None: the tokenizer does not say.
        tokens: The T tokens as they are shown.
        fixed: For each token, whether it is none of the text's own: special tokens, and places to be filled in.
        places: Positions of the outputs that are predicted; empty for classes.
    """

    text: str
    ids: list[int]
    types: list[int] | None
    spans: list[tuple[int, int]] | None
    tokens: list[str]
    fixed: list[bool]
    places: list[int]


class TextModel:
    """A model that classifies texts, continues them or fills in their masked places.

    Args:
        model: A transformers model with a head.
        tokenizer: Its tokenizer.

    Attributes:
        kind: "classes", "next" or "masked".
        embedding: The table of word embeddings.
        labels: Names of the classes; empty for the other kinds.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        if not callable(tokenizer):
            raise TypeError(f"tokenizer must be a tokenizer of transformers; got {type(tokenizer).__name__}")
        self.model, self.tokenizer = model, tokenizer
        find: Any = getattr(model, "get_input_embeddings", None)
        table = find() if find is not None else None
        if not isinstance(table, nn.Module) or not isinstance(getattr(table, "weight", None), Tensor):
            raise ValueError(
                f"model must have get_input_embeddings(), which returns its word embeddings; {type(model).__name__} "
                f"{'has none' if find is None else f'returns {type(table).__name__}'}"
            )
        self.embedding: Any = table
        self.config: Any = getattr(model, "config", None)
        if getattr(self.config, "is_encoder_decoder", False):
            raise ValueError("model must be an encoder or a decoder; encoder-decoder models are not explained")
        self.takes = set(inspect.signature(model.forward).parameters)
        self.special = {
            getattr(tokenizer, f"{name}_token_id", None) for name in ("cls", "sep", "bos", "eos", "pad")
        } - {None}
        self.mask_id = getattr(tokenizer, "mask_token_id", None)
        self.pad_id = getattr(tokenizer, "pad_token_id", None)
        self.most = self._most()
        self.classes: int | None = None  # how many the model has, when that is known
        self.kind = self._kind()
        names = getattr(self.config, "id2label", None) or {}
        self.labels = {int(i): str(name) for i, name in names.items()} if self.kind == "classes" else {}

    @property
    def device(self) -> torch.device:
        """Where the embeddings are."""
        return self.embedding.weight.device

    def _kind(self) -> str:
        name = type(self.model).__name__
        if "SequenceClassification" in name:
            return "classes"
        mode = getattr(self.config, "attn_mode", None)
        if mode == "causal" or "CausalLM" in name or "LMHead" in name:
            return "next"
        if mode in ("bidirectional", "diagonal") or "MaskedLM" in name:
            return "masked"
        with torch.no_grad():
            out = self.logits(torch.zeros(1, 3, dtype=torch.long, device=self.device), None)
        if out.dim() == 3 and 2 * out.shape[-1] < self.embedding.weight.shape[0]:
            raise ValueError(
                "model must have one row of scores for a text, or scores of its "
                f"{self.embedding.weight.shape[0]} tokens; {name} returns {tuple(out.shape)} for 3 tokens"
            )
        if out.dim() == 3:
            generates = getattr(self.model, "can_generate", lambda: False)
            return "next" if generates() else "masked"
        return "classes"

    def _most(self) -> int | None:
        """How many tokens fit into the table of positions; None: there is no such table."""
        for name, module in self.model.named_modules():
            last = name.rpartition(".")[2]
            if isinstance(module, nn.Embedding) and last in _POSITIONS:
                # The first ones may not be of use: those of RoBERTa start behind the number of the padding token.
                unused = 0 if module.padding_idx is None else module.padding_idx + 1
                return module.num_embeddings - max(unused, int(getattr(module, "offset", 0)))
        return None

    def has(self, number: int | None) -> bool:
        """Whether there is such a token, and an embedding of it."""
        return number is not None and 0 <= number < len(self.embedding.weight)

    def count_classes(self) -> int:
        """Number of classes."""
        if self.kind != "classes":
            raise ValueError(f"{type(self.model).__name__} has no classes; it predicts tokens")
        if self.classes is None:
            with torch.no_grad():
                self.classes = self.logits(torch.zeros(1, 1, dtype=torch.long, device=self.device), None).shape[-1]
        return self.classes

    # --- reading ----------------------------------------------------------------------------------------------------

    def encode(self, text: str, max_length: int | None) -> Encoded:
        """Read a text.

        Raises:
            ValueError: It has no token, or no place to be filled in.
        """
        options: dict[str, Any] = {"truncation": True, "max_length": max_length} if max_length is not None else {}
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        clean = text.encode("utf-8", "replace").decode("utf-8")
        made = (
            self.tokenizer(clean, return_offsets_mapping=True, **options) if fast else self.tokenizer(clean, **options)
        )
        ids = [int(i) for i in made["input_ids"]]
        types = [int(i) for i in made["token_type_ids"]] if "token_type_ids" in made else None
        spans = [(int(a), int(b)) for a, b in made["offset_mapping"]] if fast else None
        if self.kind == "next":  # what ends a text would end it before the continuation
            while len(ids) > 1 and ids[-1] in self.special:
                ids.pop()
        if self.most is not None and len(ids) > self.most:
            raise ValueError(
                f"a text must have at most {self.most} tokens, which are the positions of the model; got {len(ids)} of "
                f"{text[:40]!r}...; max_length={self.most} reads its beginning"
            )
        if ids and not self.has(max(ids)):
            raise ValueError(
                f"the tokenizer must be that of the model, which has {len(self.embedding.weight)} tokens; it makes the "
                f"id {max(ids)} of {text[:40]!r}"
            )
        if not ids:
            raise ValueError(f"a text must have at least one token; got {text!r}")
        names = self.tokenizer.convert_ids_to_tokens(ids)
        tokens = [str(name) for name in names]
        if spans is not None:
            tokens = [clean[a:b] if b > a else name for (a, b), name in zip(spans, tokens, strict=False)]
        places = []
        if self.kind == "masked":
            places = [i for i, one in enumerate(ids) if one == self.mask_id]
            if not places:
                mask = getattr(self.tokenizer, "mask_token", None)
                raise ValueError(
                    f"a masked language model is asked about a place that is to be filled in: write {mask} there; got "
                    f"{text!r}"
                )
        elif self.kind == "next":
            places = [len(ids) - 1]
        fixed = [one in self.special or (self.kind == "masked" and one == self.mask_id) for one in ids]
        return Encoded(
            clean,
            ids,
            types[: len(ids)] if types else None,
            spans[: len(ids)] if spans else None,
            tokens,
            fixed,
            places,
        )

    def word_ids(self, name: str, word: Any) -> list[int]:
        """Ids of a chosen token or continuation: an id or a text."""
        if isinstance(word, str):
            found = [int(i) for i in self.tokenizer(word, add_special_tokens=False)["input_ids"]]
            if not found:
                raise ValueError(f"{name} must be a text with at least one token; got {word!r}")
            return found
        check_int(name, word, 0)
        size = self.embedding.weight.shape[0]
        if int(word) >= size:
            raise ValueError(f"{name} must be a token id in [0, {size}) or a text; got {word}")
        return [int(word)]

    def class_number(self, name: str, chosen: Any) -> int:
        """Number of a class that is chosen by number or name."""
        if isinstance(chosen, str):
            for number, label in self.labels.items():
                if label == chosen:
                    return number
            if not (chosen.isascii() and chosen.isdecimal()):
                known = ", ".join(map(repr, self.labels.values())) or "the numbers of the classes"
                raise ValueError(f"{name} must be one of {known}; got {chosen!r}")
            chosen = int(chosen)
        check_int(name, chosen, 0)
        classes = self.count_classes()
        if chosen >= classes:
            raise ValueError(f"{name} must be in [0, {classes}); got {chosen}")
        return int(chosen)

    def label(self, ids: Sequence[int]) -> str:
        """A class or tokens in words."""
        if self.kind == "classes":
            return self.labels.get(ids[0], str(ids[0]))
        return str(self.tokenizer.decode(list(ids)))

    # --- running ----------------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """Word embeddings (B, T, D), as the model reads them."""
        with torch.no_grad():
            return self.embedding(ids)

    @contextmanager
    def _embedded(self, e: Tensor | None) -> Iterator[None]:
        """Inside, the model reads these embeddings instead of those of its ids."""
        if e is None:
            yield
            return
        calls = []

        def replace(module: Any, inputs: Any, output: Any) -> Tensor:
            calls.append(tuple(output.shape))
            return e

        handle = self.embedding.register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()
        if len(calls) != 1 or calls[0] != tuple(e.shape):
            raise ValueError(
                f"the model must read its word embeddings once, for all tokens {tuple(e.shape)}; it read {calls}"
            )

    def logits(self, ids: Tensor, e: Tensor | None, types: Tensor | None = None, last: int | None = None) -> Tensor:
        """The model's scores (N, C) or (N, T, V), for ids (N, T) with the embeddings e (N, T, D).

        Args:
            ids: For what the model derives from them, such as positions.
            e: Embeddings; None: those of the ids.
            types: Segments.
            last: Only the last positions are needed.
        """
        given: dict[str, Any] = {"input_ids": ids}
        if "attention_mask" in self.takes:
            given["attention_mask"] = torch.ones_like(ids)
        if types is not None and "token_type_ids" in self.takes:
            given["token_type_ids"] = types
        if "use_cache" in self.takes:
            given["use_cache"] = False
        if last is not None and "logits_to_keep" in self.takes:
            given["logits_to_keep"] = last
        with self._embedded(e), self._padded():
            out = self.model(**given)
        found = out if isinstance(out, Tensor) else getattr(out, "logits", None)
        if found is None and isinstance(out, tuple) and out:
            found = out[0]
        if not isinstance(found, Tensor) or found.dim() not in (2, 3):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(out).__name__
            raise ValueError(f"the model must return logits (N, C) or (N, T, V); got {shape}")
        return found[:, -last:] if last is not None and found.dim() == 3 else found

    @contextmanager
    def _padded(self) -> Iterator[None]:
        """Decoders that classify refuse several texts without a padding token; here no text is ever padded."""
        if self.config is None or getattr(self.config, "pad_token_id", 0) is not None:
            yield
            return
        self.config.pad_token_id = -1
        try:
            yield
        finally:
            self.config.pad_token_id = None

    def class_scores(self, e: Tensor, ids: Tensor, types: Tensor | None, output: str) -> Tensor:
        """(N, C) scores of the classes."""
        out = self.logits(ids, e, types)
        if out.dim() != 2:
            raise ValueError(f"a classifier must return logits (N, C); got {tuple(out.shape)}")
        out = out.to(compute_dtype(out))
        if output == "logit":
            return out
        several = getattr(self.config, "problem_type", None) == "multi_label_classification"
        if several or out.shape[1] == 1:
            return out.sigmoid() if output == "prob" else nn.functional.logsigmoid(out)
        return out.softmax(1) if output == "prob" else out.log_softmax(1)

    def word_scores(self, e: Tensor, ids: Tensor, types: Tensor | None, places: Tensor, words: Tensor) -> Tensor:
        """(N,) log-probability of words (N, m): at the masked places, or one after another behind the text."""
        if self.kind == "masked":
            log_p = self._log_probs(self.logits(ids, e, types), places)
            return log_p.gather(2, words[..., None])[..., 0].sum(1)
        more = words[:, :-1]
        if more.shape[1]:
            e = torch.cat([e, self.embed(more).to(e.dtype)], 1)
            ids = torch.cat([ids, more], 1)
            types = None if types is None else torch.cat([types, types[:, -1:].expand_as(more)], 1)
        last = words.shape[1]
        out = self.logits(ids, e, types, last)
        log_p = out.to(compute_dtype(out)).log_softmax(-1)
        return log_p.gather(2, words[..., None])[..., 0].sum(1)

    def best_words(self, e: Tensor, ids: Tensor, types: Tensor | None, places: Tensor) -> Tensor:
        """(N, m) the most probable words."""
        with torch.no_grad():
            if self.kind == "masked":
                out = self.logits(ids, e, types)
                return self._log_probs(out, places).argmax(-1)
            return self.logits(ids, e, types, 1).argmax(-1)

    @staticmethod
    def _log_probs(out: Tensor, places: Tensor) -> Tensor:
        picked = out.gather(1, places[..., None].expand(-1, -1, out.shape[-1]))
        return picked.to(compute_dtype(out)).log_softmax(-1)


def check_output(output: str) -> str:
    """The name of an output as it is used here."""
    if isinstance(output, str):
        output = output.replace("-", "_")
    check_choice("output", output, OUTPUTS)
    return output
