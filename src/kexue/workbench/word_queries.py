"""Questions about words to whatever has word vectors: a word model, a workspace, or a word2vec file.

A workspace works with stems; they are looked up by any form of a word and shown as the form that is usual in the text.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kexue._checks import check_int
from kexue.workbench.errors import WorkspaceError
from kexue.workbench.manifest import NAME as MANIFEST
from kexue.workbench.word_model import WordModel, is_model
from kexue.workbench.word_tokens import WordTokenizer, without_characters

if TYPE_CHECKING:
    from kexue.words import PMIEmbedding
    from kexue.workbench.parts import Parts

Ranked = list[tuple[str, float]]


class WordTable:
    """Word vectors and how their words are typed and shown. Use :meth:`open` or :meth:`of_parts`.

    Args:
        vectors: The vectors.
        tokenize: Cuts a typed word or text into words as the vectors know them.
        surface: Word -> the form in which it is shown.
        seen: Words of the corpus, also those too rare for a vector.
        close: Called by :meth:`close`.
        cut: Cuts a text into words for :meth:`keywords`, each once; None takes ``tokenize``.

    Example:
        >>> from kexue.words import CooccurrenceCounter, PMIEmbedding
        >>> texts = ["the cat drinks milk", "the dog drinks water", "the cat and the dog sleep"] * 5
        >>> counts = CooccurrenceCounter(window=3, min_count=1).fit(texts)
        >>> table = WordTable(PMIEmbedding(dim=4, reg=0.01, x_max=10).fit(counts))
        >>> table.related("Cat", k=1)[0][0] in {"milk", "sleep", "and"}
        True
    """

    def __init__(
        self,
        vectors: PMIEmbedding,
        tokenize: Callable[[str], Sequence[str]] | None = None,
        surface: Mapping[str, str] | None = None,
        seen: Container[str] = (),
        close: Callable[[], None] | None = None,
        cut: Callable[[str], Sequence[str]] | None = None,
    ) -> None:
        self.vectors = vectors
        self._tokenize = tokenize or _typed(vectors)
        self._cut = cut or self._tokenize
        self._surface = surface or {}
        self._seen = seen
        self._close = close

    @classmethod
    def open(cls, where: str | os.PathLike[str]) -> WordTable:
        """Open the word vectors of a word model, a workspace or a word2vec file.

        Raises:
            WorkspaceError: There is nothing of the kind, or it has no word vectors.
            ValueError: The file is no word2vec file.
        """
        path = Path(where)
        if is_model(path):
            model = WordModel.open(path)
            vectors = model.vectors
            spaces = model.notes["vectors"].get("settings", {}).get("tokenizer") == "spaces"
            return cls(vectors, None if spaces else model.tokenizer(part="vectors"))
        if path.is_file():
            from kexue.words import PMIEmbedding

            return cls(PMIEmbedding.load_word2vec_format(path))
        if (path / MANIFEST).is_file() or not path.exists():
            from kexue.workbench.workspace import Workspace

            if not path.exists():
                raise WorkspaceError(f"{where} does not exist; expected a word model, a workspace or a word2vec file")
            workspace = Workspace.open(path)
            return cls.of_parts(workspace._parts, workspace.close)
        raise WorkspaceError(f"{where} is neither a word model nor a workspace, nor a word2vec file")

    @classmethod
    def of_parts(cls, parts: Parts, close: Callable[[], None] | None = None) -> WordTable:
        """The words of a workspace.

        Raises:
            KeyError: Its corpus was too small for word vectors.
        """
        if parts.words is None:
            raise KeyError("this workspace has no word vectors: its corpus is too small")
        tokenizer = parts.tokenizer

        def cut(text: str) -> list[str]:
            # The characters of a word, which search wants beside it, would outweigh the word.
            tokens = tokenizer(text)
            return tokens if tokenizer.segmenter is None else without_characters(tokens, True)

        return cls(parts.words, tokenizer, parts.surface, parts.tokens.ids, close, cut)

    def close(self) -> None:
        """Close the files of a workspace."""
        if self._close is not None:
            self._close()

    def __enter__(self) -> WordTable:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def find(self, word: str) -> str:
        """The word of the table that a typed word stands for.

        Raises:
            KeyError: It is unknown, in which case the message names similar ones, or too rare to have a vector.
        """
        if not isinstance(word, str):
            raise TypeError(f"the word must be a str; got {word!r} of type {type(word).__name__}")
        folded = unicodedata.normalize("NFKC", word).casefold()
        tokens = self._tokenize(word)
        whole = [token for token in tokens if all(part in token for part in tokens)]  # not a part instead of the word
        candidates = [word, folded, *whole]
        known = self.vectors.vocabulary_
        chosen = next((candidate for candidate in candidates if candidate in known), None)
        if chosen is not None:
            return chosen
        if any(candidate in self._seen for candidate in candidates):
            raise KeyError(f"{word!r} stands too seldom in this corpus to have a vector of its own")
        if not whole and any(token in known for token in tokens):
            parts = ", ".join(dict.fromkeys(self._surface.get(token, token) for token in tokens if token in known))
            raise KeyError(f"{word!r} is not one word here; known parts of it: {parts}")
        self.vectors.index(word)  # raises, with suggestions
        raise KeyError(f"{word!r} is not in the vocabulary")

    def related(self, word: str, k: int = 10) -> Ranked:
        """Words that occur together with ``word`` more often than chance: ``(word, cosine)``, best first."""
        check_int("k", k, 1)
        if parts := self.parts_of(word):
            return self._shown(self.vectors.analogy(parts, [], k=k))
        return self._shown(self.vectors.related(self.find(word), k=k))

    def parts_of(self, word: str) -> list[str]:
        """The words that a typed word consists of, if it is several and each is known; else nothing.

        :meth:`related` answers for their sum: in this model the mutual information of a set is the sum of its words'.
        """
        try:
            self.find(word)
        except KeyError:
            parts = list(dict.fromkeys(self._cut(word)))
            return parts if len(parts) > 1 and all(part in self.vectors.vocabulary_ for part in parts) else []
        return []

    def similar(self, word: str, k: int = 10, n_context: int = 10_000) -> Ranked:
        """Words that could stand in the place of ``word``: ``(word, correlation)``, best first.

        Args:
            word: A word.
            k: Number of results.
            n_context: How many frequent words are the context: 10 000 finds similar meaning, 500 similar grammar.
        """
        return self._shown(self.vectors.similar(self.find(word), k=k, n_context=n_context))

    def analogy(self, positive: Sequence[str], negative: Sequence[str] = (), k: int = 10) -> Ranked:
        """Words closest to the sum of ``positive`` less that of ``negative``: ``(word, cosine)``, best first."""
        plus, minus = [self.find(word) for word in positive], [self.find(word) for word in negative]
        return self._shown(self.vectors.analogy(plus, minus, k=k))

    def keywords(self, text: str, k: int = 10) -> Ranked:
        """The words of a text that say most about it: ``(word, score)``, best first; empty if none is known."""
        return self._shown(self.vectors.keywords(self._cut(text), k=k))

    def _shown(self, found: Ranked) -> Ranked:
        return [(self._surface.get(word, word), float(score)) for word, score in found]


def _typed(vectors: PMIEmbedding) -> Callable[[str], list[str]]:
    """How text is cut for a table that was made from pieces between white space, or comes from elsewhere."""

    def tokenize(text: str) -> list[str]:
        pieces = text.split()
        if any(piece in vectors for piece in pieces):
            return pieces
        from kexue.words import Segmenter

        # The table itself is the only vocabulary there is, and its order all that is known of frequency.
        size = len(vectors.vocabulary_)
        words = {word: 1 + size // rank for rank, word in enumerate(vectors.vocabulary_, 1) if word}
        return WordTokenizer(Segmenter(words))(text)

    return tokenize
