"""What geometric word vectors answer: related and similar words, analogies, key words, sentence vectors, importance."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import NotFittedError

from kexue._checks import check_choice, check_int
from kexue.words._text import Tokenize, check_words

if TYPE_CHECKING:
    import torch

Ranked = list[tuple[str, float]]


class WordQueries:
    """Methods on a fitted table of word vectors (``vocabulary_`` and ``vectors_``); a base of PMIEmbedding."""

    vocabulary_: list[str]
    vectors_: npt.NDArray[Any]

    def __contains__(self, word: object) -> bool:
        return word in self._index()

    def __getitem__(self, word: str) -> npt.NDArray[Any]:
        return self.vectors_[self.index(word)]

    def index(self, word: str) -> int:
        """Number of a word.

        Raises:
            KeyError: The word is not in the vocabulary; the message suggests words that are.
        """
        found = self._index().get(word)
        if found is None:
            raise KeyError(self._unknown(word))
        return found

    def related(self, word: str, k: int = 20, metric: str = "cosine", ignore_smallest: int = 0) -> Ranked:
        """Words that occur together with a word.

        Args:
            word: A word of the vocabulary.
            k: How many, at least 1.
            metric: "cosine" (more stable) or "pmi" (the inner product: the modelled pointwise mutual information).
            ignore_smallest: Leave out this many words of smallest norm (stop words, whose direction is chance).

        Returns:
            (word, score), best first, without the word itself.
        """
        check_choice("metric", metric, ("cosine", "pmi"))
        check_int("ignore_smallest", ignore_smallest, 0)
        number = self.index(word)
        left_out = [number]
        if ignore_smallest:
            left_out += np.argsort(self._norms(), kind="stable")[:ignore_smallest].tolist()
        return self._ranked(self._scores(self.vectors_[number], metric), k, left_out)

    def similar(self, word: str, k: int = 20, n_context: int = 10_000) -> Ranked:
        """Words that could stand in the place of a word: Pearson correlation of their relations to the frequent words.

        Args:
            word: A word of the vocabulary.
            k: How many, at least 1.
            n_context: How many of the most frequent words are the context, at least 2: 10 000 finds words of similar
                meaning, 500 words of similar grammar. With fewer than D + 1 the form is singular and its null space
                does not count.

        Returns:
            (word, correlation), best first, without the word itself.
        """
        check_int("n_context", n_context, 2)
        number = self.index(word)
        table = self._similarity_table(min(n_context, len(self.vocabulary_)))
        return self._ranked(table @ table[number], k, [number])

    def analogy(
        self,
        positive: Sequence[str],
        negative: Sequence[str] = (),
        k: int = 10,
        exclude_inputs: bool = True,
        normalize: bool = False,
    ) -> Ranked:
        """Words closest (cosine) to sum(positive) - sum(negative): airport + train - plane.

        Args:
            positive: Words to add, at least one.
            negative: Words to subtract.
            k: How many, at least 1.
            exclude_inputs: Leave out the given words.
            normalize: Add unit vectors, as word2vec's tools do, instead of the vectors themselves.

        Returns:
            (word, cosine), best first.
        """
        numbers, query = self._combination(positive, negative, normalize)
        return self._ranked(self._scores(query, "cosine"), k, numbers if exclude_inputs else [])

    def analogy_rank(
        self, expected: str, positive: Sequence[str], negative: Sequence[str] = (), normalize: bool = False
    ) -> int:
        """Rank (1 = first) of the expected word among the answers of :meth:`analogy`, the inputs left out."""
        numbers, query = self._combination(positive, negative, normalize)
        target = self.index(expected)
        if target in numbers:
            raise ValueError(f"the expected word {expected!r} is one of the inputs")
        scores = self._scores(query, "cosine")
        scores[numbers] = -np.inf
        return int(np.sum(scores > scores[target])) + 1

    def keywords(self, tokens: Sequence[str] | str, k: int = 5, metric: str = "pmi") -> Ranked:
        """Words of a sentence that say most about it: argmax of <sum of all its vectors, vector of the word>.

        Args:
            tokens: Words (or a text, split at white space); unknown ones are skipped, every occurrence counts.
            k: How many, at least 1.
            metric: "pmi" (the article's inner product) or "cosine".

        Returns:
            (word, score), best first; empty when no word is known.
        """
        check_choice("metric", metric, ("cosine", "pmi"))
        check_int("k", k, 1)
        numbers = self._numbers(tokens)
        if not numbers:
            return []
        unique = list(dict.fromkeys(numbers))
        query = self.vectors_[numbers].sum(0)
        scores = self._scores(query, metric, unique)
        order = np.argsort(-scores, kind="stable")[:k]
        return [(self.vocabulary_[unique[i]], float(scores[i])) for i in order]

    def sentence_vector(self, tokens: Sequence[str] | str) -> npt.NDArray[Any]:
        """Sum of the vectors of all known words of a sentence, (D,); zeros when there is none."""
        numbers = self._numbers(tokens)
        return self.vectors_[numbers].sum(0)

    def sentence_vectors(self, sentences: Iterable[Sequence[str] | str]) -> npt.NDArray[Any]:
        """Sums of word vectors, (N, D), a row for each sentence.

        Args:
            sentences: Token lists (or texts, split at white space).

        Raises:
            TypeError: A single string, or something that holds no sentences.
        """
        if isinstance(sentences, str) or not isinstance(sentences, Iterable):
            raise TypeError(f"expected an iterable of token lists; got {type(sentences).__name__}")
        self._check_fitted()
        rows = [self.sentence_vector(tokens) for tokens in sentences]
        return np.array(rows, self.vectors_.dtype).reshape(len(rows), self.vectors_.shape[1])

    def sentence_similarity(
        self, first: Sequence[str] | str, second: Sequence[str] | str, metric: str = "cosine"
    ) -> float:
        """How much two sentences have to do with each other.

        Args:
            first: Words (or a text, split at white space).
            second: Likewise.
            metric: "cosine", 0 when a sentence has no known word; or "pmi", ln r(first, second).
        """
        check_choice("metric", metric, ("cosine", "pmi"))
        a, b = self.sentence_vector(first), self.sentence_vector(second)
        product = float(a @ b)
        if metric == "pmi":
            return product
        scale = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
        return product / scale if scale else 0.0

    def importance(self, word: str) -> float:
        """Norm of a word's vector: among frequent words it is small for stop words and large for informative ones."""
        return float(self._norms()[self.index(word)])

    def to_torch(self, freeze: bool = True) -> torch.nn.Embedding:
        """The table as ``torch.nn.Embedding`` (a copy); rows in the order of ``vocabulary_``.

        Args:
            freeze: Whether the weights take no gradient.
        """
        self._check_fitted()
        import torch  # only here: the room works without torch

        return torch.nn.Embedding.from_pretrained(torch.from_numpy(self.vectors_.copy()), freeze=freeze)

    def _tokenizer(self) -> Tokenize | None:
        return None

    def _check_fitted(self) -> None:
        if not hasattr(self, "vectors_"):
            raise NotFittedError(f"this {type(self).__name__} has not been fitted; call fit(X) or load(path) first")

    def _forget(self) -> None:
        """Drop what was derived from an older table."""
        for name in ("_numbers_of_words", "_norm_table", "_similar_table"):
            if hasattr(self, name):
                delattr(self, name)

    def _index(self) -> dict[str, int]:
        self._check_fitted()
        if not hasattr(self, "_numbers_of_words"):
            self._numbers_of_words = {word: k for k, word in enumerate(self.vocabulary_)}
        return self._numbers_of_words

    def _norms(self) -> npt.NDArray[Any]:
        self._check_fitted()
        if not hasattr(self, "_norm_table"):
            self._norm_table = np.linalg.norm(self.vectors_, axis=1)
        return self._norm_table

    def _similarity_table(self, n_context: int) -> npt.NDArray[Any]:
        """Unit rows whose inner products are the correlations; kept for the last ``n_context``."""
        kept = getattr(self, "_similar_table", None)
        if kept is None or kept[0] != n_context:
            context = self.vectors_[:n_context].astype(np.float64)
            context -= context.mean(0)
            values, axes = np.linalg.eigh(context.T @ context)
            table = self.vectors_ @ (axes * np.sqrt(np.clip(values, 0.0, None))).astype(self.vectors_.dtype)
            kept = (n_context, table / _positive(np.linalg.norm(table, axis=1))[:, None])
            self._similar_table = kept
        return kept[1]

    def _numbers(self, tokens: Sequence[str] | str) -> list[int]:
        index = self._index()
        if isinstance(tokens, str):
            split = self._tokenizer()
            tokens = tokens.split() if split is None else split(tokens)
        elif not isinstance(tokens, Iterable):
            raise TypeError(f"expected a sequence of words; got {type(tokens).__name__}")
        return [index[word] for word in check_words(tokens, "tokens") if word in index]

    def _combination(
        self, positive: Sequence[str], negative: Sequence[str], normalize: bool
    ) -> tuple[list[int], npt.NDArray[Any]]:
        for name, words in (("positive", positive), ("negative", negative)):
            if isinstance(words, str):
                raise TypeError(f"{name} must be a sequence of words; got the str {words!r}")
        if not len(positive):
            raise ValueError("positive must hold at least one word; got none")
        numbers = [self.index(word) for word in [*positive, *negative]]
        rows = self.vectors_[numbers]
        if normalize:
            rows = rows / _positive(self._norms()[numbers])[:, None]
        return numbers, rows[: len(positive)].sum(0) - rows[len(positive) :].sum(0)

    def _scores(self, query: npt.NDArray[Any], metric: str, numbers: list[int] | None = None) -> npt.NDArray[Any]:
        table, norms = self.vectors_, self._norms()
        if numbers is not None:
            table, norms = table[numbers], norms[numbers]
        scores = table @ query
        if metric == "cosine":
            scores = scores / _positive(norms * np.linalg.norm(query))
        return scores

    def _ranked(self, scores: npt.NDArray[Any], k: int, left_out: Sequence[int]) -> Ranked:
        check_int("k", k, 1)
        allowed = np.ones(len(scores), bool)
        allowed[list(left_out)] = False
        numbers = np.flatnonzero(allowed)
        values = scores[numbers]
        if k < len(values):  # sort the best only
            best = np.argpartition(-values, k - 1)[:k]
            numbers, values = numbers[best], values[best]
        order = np.lexsort((numbers, -values))
        return [(self.vocabulary_[numbers[i]], float(values[i])) for i in order]

    def _unknown(self, word: object) -> str:
        text = f"{word!r} is not in the vocabulary of {len(self.vocabulary_)} words"
        if not isinstance(word, str) or not word:
            return text
        folded = word.casefold()
        same = [other for other in self.vocabulary_ if other.casefold() == folded]
        # difflib is slow: it sees frequent words with an equal first or last letter only.
        near = (other for other in self.vocabulary_ if other[:1] == word[:1] or other[-1:] == word[-1:])
        candidates = [other for other, _ in zip(near, range(5000), strict=False)]
        close = same or difflib.get_close_matches(word, candidates, n=3)
        return text + (f"; did you mean {', '.join(map(repr, close[:3]))}?" if close else "")


def _positive(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The values with 1 in place of 0, to divide by."""
    return np.where(values > 0, values, 1).astype(values.dtype)
