"""Answers from examples in the prompt (少样本提示).

Source: Scientific Spaces article 7912: lines "question answer" teach CPM-LM a task without training.

Formula: the prompt is one line ``question + sep + answer`` for each example and ``query + sep`` at the end; the model
goes on until it ends the line, and what stands before the line break is the answer.

What we do differently, and why:
- Greedy decoding unless asked otherwise: where only the answer matters, sampling adds noise (the article says the same
  and advises beam search, here ``beams``). Its own examples sample with ``top_p=0.95, temperature=1``.
- Several queries share their examples, so that the engine computes those once.
- A tokenizer that loses line breaks is refused: no answer would end, and the examples would run into each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from kexue._checks import check_int

__all__ = ["few_shot"]


def few_shot(
    lm: Any,
    tok: Any,
    examples: Iterable[tuple[str, str]],
    query: str | Sequence[str],
    sep: str = " ",
    *,
    instruction: str = "",
    max_new_tokens: int = 16,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_return: int = 1,
    beams: int = 1,
    seed: int = 0,
    **options: Any,
) -> Any:
    """Answer a query after the pattern of some examples.

    Args:
        lm: A causal language model with ``generate_fast``, as :func:`kexue.generation.load_causal_lm` returns.
        tok: A tokenizer with ``encode`` and ``decode`` that keeps line breaks, as
            :class:`kexue.generation.CPMTokenizer`.
        examples: Pairs (question, answer); none at all asks without examples.
        query: The question, or several.
        sep: What stands between question and answer.
        instruction: A text before the examples, on lines of its own.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the most probable token; above, tokens are drawn.
        top_p: Draw from the most probable tokens that together have this probability.
        num_return: Answers for each query; several want a temperature above 0.
        beams: Above 1: beam search of this width; not together with a temperature.
        seed: Of the draws.
        **options: Passed on to ``lm.generate_fast``, as ``top_k``, ``length_penalty`` or ``quantize``.

    Returns:
        The answer: str; a list of them if ``num_return`` is above 1. For several queries a list of that.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: A line break inside an example or a query, a tokenizer that loses line breaks, ids that the model
            does not know, or what ``generate_fast`` refuses, as a prompt beyond the model's context.

    Example:
        >>> class Letters:  # the id of a character is its code point
        ...     def encode(self, text):
        ...         return [ord(c) for c in text]
        ...     def decode(self, ids):
        ...         return "".join(map(chr, ids))
        >>> class Upper:  # a "model" that answers with capitals
        ...     def generate_fast(self, prompts, max_new_tokens, **options):
        ...         lines = ["".join(map(chr, p)).splitlines()[-1] for p in prompts]
        ...         return [[ord(c) for c in line.strip().upper() + "\\n..."] for line in lines]
        >>> few_shot(Upper(), Letters(), examples=[("dog", "DOG")], query="cat")
        'CAT'
    """
    queries = [query] if isinstance(query, str) else list(query)
    check_int("max_new_tokens", max_new_tokens, 1)
    check_int("num_return", num_return, 1)
    check_int("beams", beams, 1)
    if beams > 1 and temperature > 0:
        raise ValueError(f"beams draw nothing: they want temperature=0; got beams={beams}, temperature={temperature}")
    lines = _lines(examples, sep)
    for text in queries:
        _check_line("query", text)
    if not isinstance(instruction, str):
        raise TypeError(f"instruction must be a string; got {type(instruction).__name__}")
    head = instruction + "\n" * (instruction != "" and not instruction.endswith("\n")) + "".join(lines)
    stops = _line_ends(tok)
    prompts = [_ids(tok, head + text + sep) for text in queries]
    _check_ids(lm, prompts)
    settings = {"temperature": temperature, "top_p": top_p, "num_return": num_return, "seed": seed, **options}
    if beams > 1:  # a model of somebody else need not know the word
        settings["beams"] = beams
    rows = lm.generate_fast(prompts, max_new_tokens=max_new_tokens, stop_ids=sorted(stops), **settings)
    answers = [_answer(tok, row, stops) for row in rows]
    per_query = [answers[n * num_return : (n + 1) * num_return] for n in range(len(queries))]
    out = [group[0] if num_return == 1 else group for group in per_query]
    return out[0] if isinstance(query, str) else out


def _check_line(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a string; got {text!r} of type {type(text).__name__}")
    if "\n" in text:
        raise ValueError(f"{name} must be one line, as a line break ends an answer; got {text!r}")


def _lines(examples: Any, sep: Any) -> list[str]:
    if not isinstance(sep, str):
        raise TypeError(f"sep must be a string; got {type(sep).__name__}")
    if isinstance(examples, str) or not isinstance(examples, Iterable):
        raise TypeError(f"examples must be a list of pairs of strings; got {type(examples).__name__}")
    lines = []
    for pair in examples:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"examples must be pairs (question, answer); got {pair!r}")
        for part in pair:
            _check_line("an example", part)
        lines.append(f"{pair[0]}{sep}{pair[1]}\n")
    return lines


def _ids(tok: Any, text: str) -> list[int]:
    try:
        ids = tok.encode(text, add_special_tokens=False)  # transformers' would end the prompt with one
    except TypeError:
        ids = tok.encode(text)
    return [int(i) for i in getattr(ids, "ids", ids)]  # those of the package tokenizers stand in an attribute


def _line_ends(tok: Any) -> set[int]:
    """Ids that end an answer: of the line break, and of the end of a text."""
    ends = set()
    for text in ("\n", "a\n"):
        ids = _ids(tok, text)
        if ids and "\n" in tok.decode(ids[-1:]):
            ends.add(ids[-1])
    if not ends:
        raise ValueError(f"{type(tok).__name__} gives a line break no id that is decoded as one; few_shot needs it")
    for name in ("newline_token_id", "eod_token_id", "eos_token_id"):
        number = getattr(tok, name, None)
        if isinstance(number, int) and not isinstance(number, bool):
            ends.add(number)
    return ends


def _check_ids(lm: Any, prompts: list[list[int]]) -> None:
    size = getattr(getattr(lm, "config", None), "vocab_size", None)
    largest = max((max(ids) for ids in prompts if ids), default=-1)
    if isinstance(size, int) and largest >= size:
        raise ValueError(f"the tokenizer gives id {largest}, the model has {size} tokens: they do not belong together")


def _answer(tok: Any, row: Iterable[int], stops: set[int]) -> str:
    ids = []
    for number in row:
        if number in stops:
            break
        ids.append(int(number))
    text: str = tok.decode(ids) if ids else ""
    return text.split("\n", 1)[0].strip()
