r"""Subword tokenizers learnt from one's own text (字节回退的 BPE): every text comes back from its ids exactly.

Byte pair encoding over pieces that no token crosses: an ideograph or kana alone (so that a model can be asked about a
single character, and spelling mistakes of characters are single tokens), a run of letters with the space before it, up
to three digits, a run of punctuation, white space. Characters that are too rare for the vocabulary are written as their
UTF-8 bytes; there is no unknown token that would lose them.

What transformers' own recipes lose: white space (WordPiece), full-width forms (NFKC), rare characters ([UNK]).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from kexue._checks import check_int

__all__ = ["SPECIAL_TOKENS", "train_tokenizer"]

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
_SINGLE = r"[\p{Han}\p{Hiragana}\p{Katakana}]"
# The Onigurama classes that the tokenizers library knows; spaces stand at the start of what follows them.
_PIECES = "|".join(
    (
        _SINGLE,
        rf" ?(?:(?!{_SINGLE})[\p{{L}}\p{{M}}])+",
        r" ?\p{N}{1,3}",
        r" ?[^\s\p{L}\p{M}\p{N}]+",
        r"\s+(?!\S)",
        r"\s+",
        r".",
    )
)
_CHUNK = 1 << 16  # characters: the trainer holds a piece of text at a time


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 8000, *, min_count: int = 2, max_length: int = 512, progress: bool = False
) -> Any:
    """Learn a byte pair encoding.

    Args:
        texts: Strings, read once.
        vocab_size: Largest number of tokens, with the 5 special ones and 256 for bytes; a small corpus gives fewer.
        min_count: Pairs that occur less often are not joined.
        max_length: ``model_max_length`` of the result, where a caller asks for truncation.
        progress: Show the bars of the tokenizers library.

    Returns:
        transformers' PreTrainedTokenizerFast: [PAD], [UNK], [CLS], [SEP], [MASK] have ids 0 to 4; a text becomes
        ``[CLS] text [SEP]``, a pair ``[CLS] text [SEP] other [SEP]`` with segments 0 and 1. Without special tokens,
        ``decode(encode(text)) == text``.

    Raises:
        TypeError: ``texts`` is one string, or holds something else.
        ValueError: ``vocab_size`` leaves no room for letters, or there is no text at all.

    Example:
        >>> tokenizer = train_tokenizer(["the cat and the hat", "科学空间 the end"] * 4, 300)
        >>> tokenizer.tokenize("the cat 科学")
        ['the', ' cat', ' ', '科', '学']
        >>> ids = tokenizer("龍 🐉", add_special_tokens=False).input_ids  # never seen
        >>> tokenizer.decode(ids)
        '龍 🐉'
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from kexue._transformers import PreTrainedTokenizerFast

    if isinstance(texts, str | bytes):
        raise TypeError(f"texts must be an iterable of strings; got one {type(texts).__name__}")
    least = len(SPECIAL_TOKENS) + len(_BYTES) + 1
    check_int("vocab_size", vocab_size, least)
    check_int("min_count", min_count, 1)
    check_int("max_length", max_length, 2)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    room = vocab_size - len(_BYTES)
    trainer = trainers.BpeTrainer(
        vocab_size=room,
        min_frequency=min_count,
        show_progress=progress,
        special_tokens=list(SPECIAL_TOKENS),
        limit_alphabet=max(room - len(SPECIAL_TOKENS), 1) if room < 1000 else room * 3 // 4,
        max_token_length=32,
    )
    counter = _Counted(texts)
    tokenizer.train_from_iterator(counter, trainer)
    if not counter.characters:
        raise ValueError("texts must hold at least one character; got none")
    value = json.loads(tokenizer.to_str())
    learnt = sorted(value["model"]["vocab"], key=value["model"]["vocab"].__getitem__)
    tokens = [*SPECIAL_TOKENS, *_BYTES, *(token for token in learnt if token not in SPECIAL_TOKENS)]
    value["model"] |= {
        "vocab": {token: number for number, token in enumerate(tokens)},
        "byte_fallback": True,
        "unk_token": "[UNK]",
    }
    tokenizer = Tokenizer.from_str(json.dumps(value))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    first, last = SPECIAL_TOKENS[2], SPECIAL_TOKENS[3]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(token, SPECIAL_TOKENS.index(token)) for token in (first, last)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token=first,
        sep_token=last,
        mask_token="[MASK]",
        bos_token=first,
        eos_token=last,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


class _Counted:
    """Texts in parts that fit into memory, and how many characters they had."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = texts
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            if not isinstance(text, str):
                raise TypeError(f"texts must hold strings; got {type(text).__name__}")
            # A lone half of a surrogate pair has no UTF-8 form; the library that counts could not take it.
            clean = text.encode("utf-8", "replace").decode("utf-8") if not text.isascii() else text
            self.characters += len(clean)
            for start in range(0, len(clean), _CHUNK):
                yield clean[start : start + _CHUNK]
