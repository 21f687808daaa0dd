"""The logits of a batch of pairs, by the fast path where a class is known and by the model's own forward otherwise."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kexue._checks import check_choice
from kexue.tasks._cls_forward import ClsForward, Head, cls_forward, head_of
from kexue.tasks._nsp_int8 import quantized
from kexue.tasks._nsp_loading import HINT, check_head

#: Token ids and segment ids of a pair.
Pair = tuple[Sequence[int], Sequence[int]]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; the modules' modes are put back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class NextSentenceModel:
    """Logits of pairs of token ids, by the fast path where the class is known and by the model's forward otherwise.

    Args:
        model: A module with a next-sentence head; it is not changed.
        precision: None computes as the model is; "bf16" and "int8" use a copy.
        device: None stays where the model is; another one uses a copy there.
        fast: False always calls the model's own forward.

    Attributes:
        engine: "fast" or "plain".
        max_positions: Longest pair, or None.
    """

    def __init__(self, model: nn.Module, precision: str | None, device: Any, fast: bool) -> None:
        if precision is not None:
            check_choice("precision", precision, ("bf16", "int8"))
        check_head(model)
        names = inspect.signature(model.forward).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in names.values())
        if "input_ids" not in names and not takes_any:
            raise ValueError(f"{type(model).__name__}.forward takes no input_ids; {HINT}")
        own = not _is_pretrained(model)
        # Padding needs a mask; a model that takes none (FNet mixes all positions) gets equal lengths only.
        self.pads = "attention_mask" in names or (takes_any and own)
        self._options: dict[str, Any] = {} if own and "return_dict" not in names else {"return_dict": True}
        if "next_sentence_label" in names and "return_logits" in names:
            self._options["return_logits"] = False  # of tokens
        config = getattr(model, "config", None)
        self.max_positions: int | None = _positions(config)
        self.takes_segments = "token_type_ids" in names or takes_any
        self.segments = self.takes_segments and int(getattr(config, "type_vocab_size", 2) or 0) >= 2
        if not self.segments:
            warnings.warn(
                f"{type(model).__name__} has no segment embeddings; only [SEP] tells it where the second text begins, "
                "and a model that was trained with segments scores everything high without them",
                UserWarning,
                stacklevel=3,
            )
        table: Any = getattr(model, "get_input_embeddings", lambda: None)()
        self.vocab_size: int | None = getattr(table, "num_embeddings", None)
        if device is not None and torch.device(device) != next(model.parameters()).device:
            model = copy.deepcopy(model).to(device)
        self.model = model
        self._fast: ClsForward | None = None
        self._head: Head | None = None
        self._fast = self._verified(cls_forward(model) if fast else None)
        if precision == "bf16":
            self._head = copy.deepcopy(head_of(model))  # stays as it is
            self.model = copy.deepcopy(model).to(torch.bfloat16)
        elif precision == "int8":
            self.model = quantized(model, self._fast.blocks[-1].folded if self._fast and self._fast.blocks else ())
        if precision is not None and self._fast is not None:
            self._fast = cls_forward(self.model)
        self.device = next(self.model.parameters()).device

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fast": self._fast is not None}  # its parts are functions of the model

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fast = cls_forward(self.model) if state["_fast"] else None

    @property
    def engine(self) -> str:
        """Which of the two forwards is used."""
        return "plain" if self._fast is None else "fast"

    @property
    def packed(self) -> ClsForward | None:
        """The fast forward, or None."""
        return self._fast

    def _verified(self, quick: ClsForward | None) -> ClsForward | None:
        """Run two pairs, which shows logits that are none; the fast path must agree with them to be returned."""
        self.device = next(self.model.parameters()).device
        ids = torch.arange(1, 8).remainder(self.vocab_size or 8).tolist()[: self.max_positions]
        pairs: list[Pair] = [(ids[:n], [0] * (n - n // 2) + [1] * (n // 2)) for n in (len(ids) // 2 + 1, len(ids))]
        own = np.concatenate([self.logits([pair]) for pair in pairs])
        if quick is None:
            return None
        with evaluating(self.model):
            lengths = [len(pair[0]) for pair in pairs]
            found = quick(*self.stream(pairs, lengths), lengths).double().cpu().numpy()
        difference = float(np.abs(found - own).max())
        low = next(self.model.parameters()).dtype in (torch.bfloat16, torch.float16)
        if difference <= (3e-2 if low else 1e-3) * max(1.0, float(np.abs(own).max())):
            return quick
        warnings.warn(
            f"the fast forward of {type(self.model).__name__} differs from the model's own by {difference:.2g}, so its "
            "own is used, which is slower; fast=False chooses it",
            UserWarning,
            stacklevel=4,
        )
        return None

    def logits(self, pairs: Sequence[Pair]) -> NDArray[np.float64]:
        """Logits (N, 2) of pairs (ids, segments), sorted by length.

        The memory of a batch is that of its tokens; the caller cuts the work into batches.

        Raises:
            ValueError: Logits of another shape, or not finite.
        """
        lengths = [len(ids) for ids, _ in pairs]
        with evaluating(self.model):
            if self._head is not None:
                out = self._head(self.states(pairs))
            elif self._fast is None:
                out = self._plain(pairs, lengths)
            else:
                out = self._fast(*self.stream(pairs, lengths), lengths)
            if out.dim() != 2 or out.shape != (len(pairs), 2):
                raise ValueError(
                    f"a next-sentence head gives logits ({len(pairs)}, 2) for {len(pairs)} pairs; "
                    f"{type(self.model).__name__} gave {tuple(out.shape)}; {HINT}"
                )
            found = out.double().cpu().numpy()
        if not np.isfinite(found).all():
            place = int(np.flatnonzero(~np.isfinite(found).all(1))[0])
            raise ValueError(
                f"the model's next-sentence logits must be finite; got {found[place].tolist()} for a pair of "
                f"{lengths[place]} tokens (weights that are not finite, or numbers beyond float16)"
            )
        return found

    def states(self, pairs: Sequence[Pair]) -> Tensor:
        """What the pooler reads: the last state of [CLS] of each pair, (N, D), without gradients.

        The pairs must be sorted by length.

        Raises:
            ValueError: The model has no pooler that is known.
        """
        head = head_of(self.model)
        if head is None:
            raise ValueError(f"{type(self.model).__name__} has no pooler that is known; few_shot='all' trains it whole")
        lengths = [len(ids) for ids, _ in pairs]
        with evaluating(self.model):
            if self._fast is not None:
                return self._fast.states(*self.stream(pairs, lengths), lengths)
            seen: list[Tensor] = []
            hook = head.pooler.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            try:
                self._plain(pairs, lengths)
            finally:
                hook.remove()
            return torch.cat([x[:, 0] if x.dim() == 3 else x for x in seen])

    def stream(self, pairs: Sequence[Pair], lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, positions and segments of the pairs one after the other, (M,) each."""
        ids = np.concatenate([np.asarray(ids, np.int64) for ids, _ in pairs])
        segments = np.concatenate([np.asarray(segments, np.int64) for _, segments in pairs]) * self.segments
        starts = np.cumsum(lengths) - lengths
        positions = np.arange(len(ids)) - np.repeat(starts, lengths)
        a, b, c = (torch.from_numpy(x).to(self.device) for x in (ids, positions, segments))
        return a, b, c

    def padded(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """The pairs as a padded batch of input_ids, token_type_ids and attention_mask."""
        longest = max(len(ids) for ids, _ in pairs)
        ids = np.zeros((len(pairs), longest), np.int64)  # any id: the mask hides it
        segments, mask = np.zeros_like(ids), np.zeros_like(ids)
        for row, (own, kind) in enumerate(pairs):
            ids[row, : len(own)], segments[row, : len(own)], mask[row, : len(own)] = own, kind, 1
        batch = {"input_ids": ids}
        if self.takes_segments:
            batch["token_type_ids"] = segments * self.segments
        if self.pads:
            batch["attention_mask"] = mask
        return {name: torch.from_numpy(x).to(self.device) for name, x in batch.items()}

    def _plain(self, pairs: Sequence[Pair], lengths: Sequence[int]) -> Tensor:
        if not self.pads and len(set(lengths)) > 1:
            parts = {n: [k for k, length in enumerate(lengths) if length == n] for n in sorted(set(lengths))}
            order = np.argsort(np.concatenate(list(parts.values())), kind="stable")
            return torch.cat([self._plain([pairs[k] for k in rows], [n] * len(rows)) for n, rows in parts.items()])[
                order
            ]
        return self.forward(self.padded(pairs))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The model's own logits (B, 2) of a padded batch."""
        model: Any = self.model
        if type(model).__module__.startswith("transformers.") and "ForPreTraining" in type(model).__name__:
            # without the scores of all tokens over the vocabulary, which nobody reads
            pooled = getattr(model, model.base_model_prefix)(**batch, return_dict=True).pooler_output
            logits: Tensor = model.cls.seq_relationship(pooled)
            return logits
        outputs = model(**batch, **self._options)
        for name in ("next_sentence_logits", "seq_relationship_logits", "logits"):
            found = getattr(outputs, name, None)
            if isinstance(found, Tensor):
                return found
        raise ValueError(f"{type(model).__name__} returns no next-sentence logits; {HINT}")


def _is_pretrained(model: nn.Module) -> bool:
    from kexue._transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def _positions(config: Any) -> int | None:
    for name in ("max_position_embeddings", "max_position"):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    return None


def log_odds(logits: NDArray[np.float64], is_next_index: int) -> NDArray[np.float64]:
    """Log-odds ln P(IsNext) - ln P(NotNext), (N,): unlike the softmax, a difference of logits does not saturate."""
    return logits[:, is_next_index] - logits[:, 1 - is_next_index]
