"""Causal language models with fast decoding (快速解码): greedy, sampling and beams over batches of prompts.

Source: 科学空间 7912 (跟风玩玩目前最大的中文GPT2模型). Greedy tokens are those of transformers' ``generate``. What is
different from it: prompts of different lengths are one batch without padding, and a row's output is what it is alone;
equal prompts, and what all prompts begin with, are computed once; rows that have ended cost no time; a row's random
numbers depend on the seed and the number of the row only; on a CPU a step is one compiled call, in float32 or with
int8 matrices.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from kexue._checks import check_int
from kexue.generation.beams import search_beams
from kexue.generation.continuation import Options, check_prompts, continue_prompts
from kexue.generation.decoding import Decoder
from kexue.models import KexueForCausalLM, from_gpt2

__all__ = ["CausalLM", "generate_fast", "stream"]


class CausalLM(KexueForCausalLM):
    """A :class:`kexue.models.KexueForCausalLM` with fast decoding; its files are the same, and load as either.

    Args:
        config: A :class:`kexue.models.KexueConfig` with ``attn_mode="causal"``.

    Example:
        >>> from kexue.models import KexueConfig
        >>> config = KexueConfig(30, hidden_size=16, num_layers=1, num_heads=2, attn_mode="causal")
        >>> lm = CausalLM(config)
        >>> rows = lm.generate_fast([[3, 4, 5], [6]], max_new_tokens=4, top_p=0.9, num_return=2, seed=1)
        >>> [len(row) for row in rows]
        [4, 4, 4, 4]
    """

    @classmethod
    def of(cls, model: Any) -> CausalLM:
        """A model as a CausalLM.

        Args:
            model: A KexueForCausalLM, whose modules are shared, not copied; or transformers' GPT2LMHeadModel, whose
                weights are copied.

        Raises:
            TypeError: Another kind of model.
        """
        if isinstance(model, cls):
            return model
        model = _kexue(model)
        with torch.device("meta"):
            made = cls(model.config)
        made.kexue, made.lm_head = model.kexue, model.lm_head
        made.generation_config = model.generation_config
        return made.train(model.training)

    def generate_fast(
        self,
        prompts: Any,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        no_repeat_ngram: int = 0,
        stop_ids: Iterable[int] = (),
        num_return: int = 1,
        seed: int = 0,
        quantize: str | None = None,
        beams: int = 1,
        length_penalty: float = 1.0,
    ) -> list[list[int]]:
        """Continue prompts; see :func:`generate_fast`."""
        return generate_fast(
            self, prompts, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, no_repeat_ngram,
            stop_ids, num_return, seed, quantize, beams, length_penalty,
        )  # fmt: skip

    def stream(self, prompts: Any, max_new_tokens: int = 64, **options: Any) -> Iterator[tuple[int, int]]:
        """Continue prompts and yield tokens as they come; see :func:`stream`."""
        return stream(self, prompts, max_new_tokens, **options)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as a KexueForCausalLM.

        Args:
            save_directory: Folder.
            *args: As in transformers.
            **kwargs: As in transformers.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        self.config.architectures = [KexueForCausalLM.__name__]
        if kwargs.get("is_main_process", True):
            self.config.save_pretrained(save_directory)


def generate_fast(
    model: Any,
    prompts: Any,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
    stop_ids: Iterable[int] = (),
    num_return: int = 1,
    seed: int = 0,
    quantize: str | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
) -> list[list[int]]:
    """Continue prompts.

    Memory: 2 L D numbers for each token of each row (keys and values), and with int8 one byte for each weight beside
    the model's own.

    Args:
        model: A :class:`kexue.models.KexueForCausalLM`, or transformers' GPT2LMHeadModel (converted at every call).
            Dropout is off, whatever the model's mode.
        prompts: List of non-empty lists of token ids.
        max_new_tokens: Tokens to append at most.
        temperature: Divides the logits; 0: always the most probable token (greedy).
        top_k: Draw from the k most probable tokens only; 0: all. For this and what follows see
            :mod:`kexue.generation.filters`.
        top_p: Draw from the fewest tokens of at least this probability.
        min_p: Draw from tokens of at least this probability relative to the most probable one.
        repetition_penalty: Above 1: tokens that occurred, in the prompt as well, become less probable.
        no_repeat_ngram: n-grams of this length do not occur twice; 0: they may.
        stop_ids: Tokens that end a row; the one that does stands at its end.
        num_return: Rows for each prompt; with beams the best ones.
        seed: Of the random numbers; row r draws from a generator keyed by (seed, r).
        quantize: None, or "int8": matrices rounded to int8 with one scale a row. On a CPU fewer bytes are read for
            each token; elsewhere, and for other dtypes than float32, it changes the values only.
        beams: Above 1: beam search over the filtered distribution instead of drawing.
        length_penalty: alpha of the score of beams, sum of log-probabilities / length^alpha.

    Returns:
        ``len(prompts) * num_return`` lists of new tokens, those of a prompt one after the other.

    Raises:
        TypeError: Another kind of model, prompts that are no lists of ids, options of the wrong kind.
        ValueError: Options out of range; an empty prompt; an id outside the vocabulary; prompt and new tokens longer
            than the table of learned positions; logits that are NaN, or all excluded.

    Reference: 科学空间 7912.

    Example:
        >>> from kexue.models import KexueConfig
        >>> config = KexueConfig(30, hidden_size=16, num_layers=1, num_heads=2, attn_mode="causal")
        >>> model = KexueForCausalLM(config)
        >>> one, other = generate_fast(model, [[3, 4, 5], [6]], max_new_tokens=3, temperature=0)
        >>> other == generate_fast(model, [[6]], max_new_tokens=3, temperature=0)[0]
        True
    """
    options = Options(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, no_repeat_ngram, _stops(stop_ids),
        num_return, seed, quantize, beams, length_penalty,
    )  # fmt: skip
    decoder, rows = _prepare(model, prompts, options)
    if decoder is None:
        return [[] for _ in range(len(rows) * num_return)]
    if beams > 1:
        return search_beams(decoder, rows, options)
    out: list[list[int]] = [[] for _ in range(len(rows) * num_return)]
    for row, token in continue_prompts(decoder, rows, options):
        out[row].append(token)
    return out


def stream(model: Any, prompts: Any, max_new_tokens: int = 64, **options: Any) -> Iterator[tuple[int, int]]:
    """Continue prompts and yield tokens as they come.

    Args:
        model: As in :func:`generate_fast`.
        prompts: As in :func:`generate_fast`.
        max_new_tokens: As in :func:`generate_fast`.
        **options: As in :func:`generate_fast`, without ``beams``: what beams have in common is known at the end only.

    Returns:
        Iterator over ``(row, token)``: each step gives a token for each row that has not ended.

    Raises:
        TypeError: As in :func:`generate_fast`, at the call.
        ValueError: As in :func:`generate_fast`; arguments are checked at the call, not at the first token.

    Example:
        >>> from kexue.models import KexueConfig
        >>> config = KexueConfig(30, hidden_size=16, num_layers=1, num_heads=2, attn_mode="causal")
        >>> [row for row, token in stream(KexueForCausalLM(config), [[3, 4], [5]], max_new_tokens=2)]
        [0, 1, 0, 1]
    """
    options["stop_ids"] = _stops(options.get("stop_ids", ()))
    chosen = Options(max_new_tokens, **options)
    if chosen.beams != 1:
        raise ValueError(f"beams cannot be streamed, they are known at the end only; got beams={chosen.beams!r}")
    decoder, rows = _prepare(model, prompts, chosen)
    return iter(()) if decoder is None else continue_prompts(decoder, rows, chosen)


def _prepare(model: Any, prompts: Any, options: Options) -> tuple[Decoder | None, list[list[int]]]:
    """Check everything; the decoder, or None if there is nothing to be done."""
    model = _kexue(model)
    vocabulary = model.kexue.embeddings.token.num_embeddings
    options.check(vocabulary)
    position = model.kexue.embeddings.position
    limit = None if position is None else position.num_embeddings
    rows = check_prompts(prompts, vocabulary, limit, options.max_new_tokens)
    if not rows or not options.max_new_tokens:
        return None, rows
    longest = max(map(len, rows)) + options.max_new_tokens
    return Decoder(model, options.quantize == "int8", limit=longest), rows


def _kexue(model: Any) -> KexueForCausalLM:
    """The model itself, or a GPT-2 converted."""
    if isinstance(model, KexueForCausalLM):
        return model
    from kexue._transformers import GPT2LMHeadModel

    if isinstance(model, GPT2LMHeadModel):
        made = from_gpt2(model.state_dict(), model.config)
        if isinstance(made, KexueForCausalLM):
            return made
    raise TypeError(f"model must be a KexueForCausalLM or a GPT2LMHeadModel; got {type(model).__name__}")


def _stops(stop_ids: Any) -> frozenset[int]:
    if isinstance(stop_ids, str | bytes) or not hasattr(stop_ids, "__iter__"):
        raise TypeError(f"stop_ids must be a list of token ids; got {stop_ids!r}")
    ids = list(stop_ids.tolist() if hasattr(stop_ids, "tolist") else stop_ids)
    for token in ids:
        check_int("a stop id", token, 0)
    return frozenset(int(token) for token in ids)
