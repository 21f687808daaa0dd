"""The tokenizer of CPM-LM, with spaces and line breaks kept (CPM 分词器).

Source: Scientific Spaces article 7912; the CPM-LM release (TsinghuaAI/CPM-1-Generate), whose list has 30000 pieces.

Formula. encode: cut the text into words (jieba), write " " as U+2582 and a line break as U+2583, join the words with
one space, encode by the unigram model of sentencepiece. decode: decode the pieces, drop every space, write U+2582 as
" " and U+2583 as a line break. The first ids are <unk> 0, <s> 1, </s> 2, U+2583 or <cls> 3, <sep> 4, <pad> 5, <mask> 6,
<eod> 7.

What we do differently, and why:
- Two files were published: in the older one id 3 is <cls> and stands for the line break, which is no piece of its own.
  Both give the same ids here, in both directions; the ports need a patch by hand for the older one.
- transformers' CpmTokenizer collapses white space before it is mapped, so that line breaks, on which few-shot prompts
  stop, are lost, and it appends ids outside the embedding. Here every id is a row of the word list.
- What the rules cannot keep (tabs, U+2582 itself, characters without a piece, full-width forms) is lost silently in
  every port; ``strict`` and :func:`kexue.generation.check_roundtrip` tell.
- Words are cut by a jieba dictionary of our own, since ids must not depend on what else the process has done to the
  shared one, and stretches between punctuation marks are remembered: prompts repeat most of theirs.
"""

from __future__ import annotations

import functools
import importlib
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kexue.generation.roundtrip import check_roundtrip
from kexue.words._jieba import jieba_dictionary

__all__ = ["CPMTokenizer"]

SPACE, NEWLINE = "\u2582", "\u2583"
_MARKS = str.maketrans({" ": SPACE, "\n": NEWLINE})
_SPECIALS = ("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>")
_REMEMBERED, _LONGEST = 1 << 16, 64  # stretches of text, and the characters of each: some tens of MB at most


def _needed(name: str) -> Any:
    """A module of the extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"CPMTokenizer needs {name}, which comes with the extra zh: pip install 'kexue[zh]' ({error})"
        ) from error


@functools.lru_cache(_REMEMBERED)
def _marked(stretch: str) -> str:
    """One stretch cut into words, marked and joined."""
    return " ".join(word.translate(_MARKS) for word in jieba_dictionary()[0].cut(stretch, cut_all=False))


def presplit(text: str) -> str:
    """The text as sentencepiece gets it. jieba cuts each of these stretches by itself, so that nothing changes."""
    borders = jieba_dictionary()[1]
    stretches = (s for s in borders.split(text) if s)
    return " ".join(_marked(s) if len(s) <= _LONGEST else _marked.__wrapped__(s) for s in stretches)


class CPMTokenizer:
    """Tokenizer of CPM-LM from its sentencepiece file; texts come back with their spaces and line breaks.

    The ids are those of the official code. No special tokens are added. Needs the extra ``zh`` (jieba, sentencepiece).
    Objects can be pickled and used from several threads.

    Args:
        model_file: The file ``chinese_vocab.model``, of either published version.
        strict: Raise when a text cannot be given back exactly, instead of losing part of it.
        cut: Another cutter of words, text -> words, whose concatenation is the text, for example ``jieba.cut`` with
            words of your own; None is jieba with its own dictionary. The ids depend on it, so that a trained model
            wants the one that it was trained with.

    Attributes:
        vocab_size: Number of pieces; every id is below it.
        space_token_id: Id of the mark of a space.
        newline_token_id: Id of the mark of a line break, on which few-shot answers stop.
        unk_token_id, bos_token_id, eos_token_id, cls_token_id, sep_token_id, pad_token_id, mask_token_id, eod_token_id:
            Ids of <unk>, <s>, </s>, <cls>, <sep>, <pad>, <mask>, <eod>; None where the file has no such piece.

    Raises:
        ImportError: jieba or sentencepiece is not installed.
        FileNotFoundError: There is no such file.
        TypeError: Wrong kind of argument.
        ValueError: No sentencepiece file, or one without the marks of spaces and line breaks.

    Reference:
        Scientific Spaces 7912, https://spaces.ac.cn/archives/7912

    Example:
        >>> import io, sentencepiece, tempfile
        >>> model = io.BytesIO()  # a tiny word list with the layout of the released one
        >>> sentencepiece.SentencePieceTrainer.train(
        ...     sentence_iterator=iter(["狗 ▂ dog ▃ 猫 ▂ cat ▃"] * 9), model_writer=model, vocab_size=40,
        ...     unk_id=0, bos_id=1, eos_id=2, pad_id=-1, hard_vocab_limit=False, minloglevel=2,
        ...     user_defined_symbols=["▃", "<sep>", "<pad>", "<mask>", "<eod>"])
        >>> with tempfile.NamedTemporaryFile(suffix=".model") as file:
        ...     _ = file.write(model.getvalue()), file.flush()
        ...     tokenizer = CPMTokenizer(file.name)
        >>> ids = tokenizer.encode("狗 dog\\n")
        >>> ids[-1] == tokenizer.newline_token_id == 3
        True
        >>> tokenizer.decode(ids)
        '狗 dog\\n'
    """

    def __init__(
        self,
        model_file: str | os.PathLike[str],
        *,
        strict: bool = False,
        cut: Callable[[str], Iterable[str]] | None = None,
    ) -> None:
        if not isinstance(model_file, str | os.PathLike):
            raise TypeError(f"model_file must be a path; got {type(model_file).__name__}")
        if cut is not None and not callable(cut):
            raise TypeError(f"cut must be callable or None; got {type(cut).__name__}")
        sentencepiece = _needed("sentencepiece")
        if cut is None:
            _needed("jieba")
        with open(model_file, "rb") as file:
            proto = file.read()
        if not proto:  # sentencepiece would take it for no model at all
            raise ValueError(f"{model_file} is no sentencepiece model: it is empty")
        self.model_file, self.strict, self.cut = os.fspath(model_file), bool(strict), cut
        try:
            self._pieces: Any = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError as error:
            raise ValueError(f"{model_file} is no sentencepiece model or is damaged: {error}") from None
        self._number()

    def _number(self) -> None:
        """Ids of the marks and of the special pieces, and what each id is decoded as."""
        pieces = self._pieces
        self.vocab_size = int(pieces.vocab_size())
        self._table = [str(pieces.id_to_piece(i)) for i in range(self.vocab_size)]
        known = {piece: i for i, piece in enumerate(self._table)}
        ids = {name: known.get(name) for name in _SPECIALS}
        self.unk_token_id: int = int(pieces.unk_id())
        self.bos_token_id, self.eos_token_id, self.cls_token_id = ids["<s>"], ids["</s>"], ids["<cls>"]
        self.sep_token_id, self.pad_token_id = ids["<sep>"], ids["<pad>"]
        self.mask_token_id, self.eod_token_id = ids["<mask>"], ids["<eod>"]
        newline = known.get(NEWLINE, self.cls_token_id)
        if SPACE not in known or newline is None:
            lacking = "U+2582, the mark of a space" if SPACE not in known else "both U+2583 and <cls>"
            raise ValueError(
                f"{self.model_file} is no word list of CPM: of its {self.vocab_size} pieces none is {lacking}"
            )
        self.space_token_id, self.newline_token_id = known[SPACE], newline
        self._newline_is_piece = NEWLINE in known
        self._table[newline] = NEWLINE
        self._silent = {i for i in ids.values() if i is not None and i not in (newline, self.unk_token_id)}

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"CPMTokenizer({self.model_file!r}, vocab_size={self.vocab_size}, strict={self.strict})"

    def __call__(self, texts: str | Iterable[str], strict: bool | None = None) -> list[list[int]]:
        """Encode several texts, as ``generate_fast`` wants them.

        Args:
            texts: Texts; a single one counts as a list of one.
            strict: As in :meth:`encode`.

        Returns:
            One list of ids for each text.

        Raises:
            TypeError: Something that is no text.
            ValueError: As in :meth:`encode`.
        """
        return [self.encode(text, strict) for text in ([texts] if isinstance(texts, str) else texts)]

    def encode(self, text: str, strict: bool | None = None) -> list[int]:
        """Ids of a text, without special tokens.

        Args:
            text: Any text; the empty one has no ids.
            strict: Raise if :meth:`decode` would not give the text back; None is what the object was made with.

        Raises:
            TypeError: ``text`` is no string.
            ValueError: It holds half of a surrogate pair, or something would be lost and ``strict`` holds.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string; got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text must be valid Unicode; character {error.start} is half of a surrogate pair"
            ) from None
        ids = self._ids(self._split(text))
        if (self.strict if strict is None else strict) and self.decode(ids) != text:
            raise ValueError(f"the text cannot be given back exactly: {'; '.join(check_roundtrip(text, self).losses)}")
        return ids

    def _split(self, text: str) -> str:
        if self.cut is None:
            return presplit(text)
        return " ".join(word.translate(_MARKS) for word in self.cut(text))

    def _ids(self, marked: str) -> list[int]:
        ids: list[int] = self._pieces.encode(marked)
        if self._newline_is_piece or NEWLINE not in marked:
            return ids
        # The mark is unknown to this file. Neighbouring unknown characters make one piece, so count the marks in it.
        found: list[int] = []
        for number, piece in zip(ids, self._pieces.encode(marked, out_type=str), strict=True):
            if number != self.unk_token_id or NEWLINE not in piece:
                found.append(number)
                continue
            for n, other in enumerate(piece.split(NEWLINE)):
                found += [self.newline_token_id] * (n > 0) + [number] * (other != "")
        return found

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of one row of ids.

        <unk> becomes sentencepiece's mark of an unknown piece, "⁇". Of the other special pieces those that the file
        declares as control characters (<s> and </s> always) become nothing, the rest are written as they are called.

        Args:
            ids: Ids: a list, a one-dimensional tensor or array.
            skip_special_tokens: Drop every special piece but <unk> and the line break.

        Raises:
            TypeError: Something that is no integer.
            ValueError: An id that no piece has.
        """
        rows = ids.tolist() if hasattr(ids, "tolist") else ids
        if isinstance(rows, str) or not isinstance(rows, Iterable):
            raise TypeError(f"ids must be a sequence of integers; got {type(ids).__name__}")
        pieces = []
        for value in rows:
            try:
                number = operator.index(value)
            except TypeError:
                raise TypeError(f"ids must be integers; got {value!r}") from None
            if not 0 <= number < self.vocab_size:
                raise ValueError(f"ids must be in [0, {self.vocab_size}); got {number}")
            if not (skip_special_tokens and number in self._silent):
                pieces.append(self._table[number])
        text: str = self._pieces.decode(pieces) if pieces else ""
        return text.replace(" ", "").replace(SPACE, " ").replace(NEWLINE, "\n")

    def batch_decode(self, rows: Sequence[Iterable[int]], skip_special_tokens: bool = False) -> list[str]:
        """The texts of several rows of ids, as :meth:`decode` gives them."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def check_roundtrip(self, text: str) -> Any:
        """Whether the text comes back, and what is lost: :func:`kexue.generation.check_roundtrip` of this tokenizer."""
        return check_roundtrip(text, self)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "proto": self._pieces.serialized_model_proto(),
            "model_file": self.model_file,
            "strict": self.strict,
            "cut": self.cut,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.model_file, self.strict, self.cut = state["model_file"], state["strict"], state["cut"]
        self._pieces = _needed("sentencepiece").SentencePieceProcessor(model_proto=state["proto"])
        self._number()
