"""Conditionals p(x_i | the rest) of a masked language model, at a few positions of each text of a batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kexue._checks import check_int, check_real
from kexue.generation._states import as_ids, forward_options, logits_of

SPECIAL = ("bos", "eos", "cls", "sep", "pad", "mask", "unk")


def special_ids(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Ids that are no text: those that the tokenizer or the configuration names, and [unused...]."""
    found: set[int] = set()
    for source in (getattr(model, "config", None), tokenizer):
        for name in SPECIAL:
            token = getattr(source, f"{name}_token_id", None)
            found.update([token] if isinstance(token, int) else token if isinstance(token, list) else [])
    found.update(getattr(tokenizer, "all_special_ids", None) or [])
    vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
    found.update(number for token, number in vocabulary.items() if token.startswith("[unused"))
    return frozenset(found)


class Conditionals:
    """Log-probabilities at chosen positions, from a masked model (positions masked) or a one-pass model (not masked).

    Args:
        model: Module whose forward gives logits (B, T, V).
        tokenizer: Names special ids, or None.
        mask_id: Id of [MASK], or None: that of the configuration or the tokenizer.
        temperature: Logits are divided by it, above 0.
        top_k: Only so many of the likeliest tokens; 0: all.
        ban: "special", or ids that are never drawn. The mask never is.
    """

    def __init__(
        self, model: Any, tokenizer: Any, mask_id: int | None, temperature: float, top_k: int, ban: Any
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"mlm must be a module whose forward gives logits; got {type(model).__name__}")
        check_real("temperature", temperature, above=0.0)
        check_int("top_k", top_k, 0)
        self.model, self.temperature, self.top_k = model, float(temperature), top_k
        config = getattr(model, "config", None)
        self.one_pass = getattr(config, "attn_mode", None) == "diagonal"
        if self.one_pass and getattr(config, "self_visible", False):
            raise ValueError("a one-pass model with self_visible=True sees the token it predicts: no conditionals")
        self.limit = getattr(config, "max_position_embeddings", None)
        if getattr(config, "position", None) == "rope":
            self.limit = None
        size = getattr(config, "vocab_size", None)
        if not isinstance(size, int):
            raise ValueError("mlm must have config.vocab_size, the number of tokens that its logits stand for")
        self.vocab_size = size
        for source in (config, tokenizer):
            if mask_id is None:
                mask_id = getattr(source, "mask_token_id", None)
        if mask_id is None and not self.one_pass:
            raise ValueError("the id of [MASK] is needed: mask_token_id=..., tokenizer=... or config.mask_token_id")
        if mask_id is not None:
            check_int("mask_token_id", mask_id, 0)
            if mask_id >= self.vocab_size:
                raise ValueError(
                    f"mask_token_id must be below the size of the vocabulary, {self.vocab_size}; got {mask_id}"
                )
        self.mask_id = mask_id
        self.special = special_ids(model, tokenizer) | ({mask_id} if mask_id is not None else set())
        if isinstance(ban, str):
            if ban != "special":
                raise ValueError(f"ban must be 'special' or a list of ids; got {ban!r}")
            banned = set(self.special)
        else:
            banned = set(as_ids(ban, "ban"))
            if banned and max(banned) >= self.vocab_size:
                raise ValueError(
                    f"banned ids must be below the size of the vocabulary, {self.vocab_size}; got {max(banned)}"
                )
            banned |= {mask_id} if mask_id is not None else set()
        self.banned = frozenset(token for token in banned if token < self.vocab_size)
        self.allowed = tuple(token for token in range(self.vocab_size) if token not in self.banned)
        if not self.allowed:
            raise ValueError(f"ban leaves no token of the vocabulary of {self.vocab_size}")
        pad = getattr(config, "pad_token_id", None)
        self.pad_id = pad if isinstance(pad, int) else 0
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._ban = torch.zeros(self.vocab_size, dtype=torch.bool, device=self.device)
        self._ban[list(self.banned)] = True
        self._options = forward_options(model)

    def log_probs(self, ids: Tensor, real: Tensor, positions: Tensor, unfilled: Tensor | None = None) -> Tensor:
        """Conditionals after bans, top-k and temperature.

        Args:
            ids: (C, T).
            real: (C, T) bool, False at padding.
            positions: (C, k) places that are predicted together: a masked model sees none of their tokens.
            unfilled: (C, T) bool: places that hold no token yet.

        Returns:
            (C, k, V) log-probabilities, float32 at least.
        """
        if self.one_pass:
            if unfilled is not None:  # such a model has never seen [MASK] as a token: it is left out, as padding
                real = real & ~unfilled.scatter(1, positions, False)
        else:
            ids = ids.scatter(1, positions, self.mask_id)  # type: ignore[arg-type]
            if unfilled is not None:
                ids = ids.masked_fill(unfilled, self.mask_id)  # type: ignore[arg-type]
        options = dict(self._options)
        if not bool(real.all()) or bool((ids == self.pad_id).any()):
            options["attention_mask"] = real.long()
        logits = self._selected(ids, positions, options)
        logits = logits.to(torch.float32 if logits.dtype in (torch.float16, torch.bfloat16) else logits.dtype)
        logits = (logits / self.temperature).masked_fill(self._ban, -math.inf)
        if 0 < self.top_k < len(self.allowed):
            # The k-th largest logit; where several equal it, the smaller ids stay.
            kept = torch.sort(logits, dim=-1, descending=True, stable=True).indices[..., : self.top_k]
            outside = torch.ones_like(logits, dtype=torch.bool).scatter(-1, kept, False)
            logits = logits.masked_fill(outside, -math.inf)
        return logits.log_softmax(-1)

    def _selected(self, ids: Tensor, positions: Tensor, options: dict[str, Any]) -> Tensor:
        """Logits at the positions, (C, k, V). The decoder is run on these rows only where the model has one."""
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        decoder = getattr(self.model, "get_output_embeddings", lambda: None)()
        done = False

        def cut(_: nn.Module, args: tuple[Any, ...]) -> Any:
            nonlocal done
            if len(args) == 1 and isinstance(args[0], Tensor) and args[0].shape[:2] == ids.shape:
                done = True
                return (args[0][rows, positions],)
            return None

        handle = decoder.register_forward_pre_hook(cut) if isinstance(decoder, nn.Module) else None
        try:
            logits = logits_of(self.model(ids, **options))
        finally:
            if handle is not None:
                handle.remove()
        return logits if done else logits[rows, positions]


def pick(log_probs: Tensor, u: Tensor) -> Tensor:
    """Inverse transform of uniform numbers u (...) through log-probabilities (..., V), edges in float64."""
    edges = log_probs.double().exp().cumsum(-1)
    goal = (u * edges[..., -1])[..., None]
    chosen = torch.searchsorted(edges, goal, right=True).clamp_(max=log_probs.shape[-1] - 1)
    # u * total may round up to the total: then the last edge is passed, and its token may be one that is banned.
    likeliest = log_probs.argmax(-1, keepdim=True)
    impossible = log_probs.gather(-1, chosen) == -math.inf
    return torch.where(impossible, likeliest, chosen)[..., 0]
