"""Ranking for a query: BM25 over texts and over names as impact matrices, fused with the encoder's cosine.

    score = (BM25 text + 2 x BM25 name) / (its maximum over the corpus) + query . document vector

What BM25 gives a word in a document does not depend on the query, so it is computed once and stored by word; a query
gathers the rows of its words: exact, and as long as its posting lists. With document vectors from
:func:`kexue.workbench.encoder.document_vectors` the second term is 3 x cosine with the text + 2 x cosine with the name.

Where only a part of the documents has a title, the titles are left out of both terms: otherwise documents would win
merely because they have one. There a title that contains all words of the query adds up to 10, by the share (idf) of
the title that the query makes up. Where titles are text, only the title that has just the words of the query adds 10:
who types a title wants that document.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue._checks import check_int
from kexue._files import atomic_path, map_tensors, write_json
from kexue.words._numba import compiled
from kexue.workbench.tokens import Ragged, TokenizedCorpus, concatenate

FORMAT = 1
TEXT_PART, NAME_PART = 3.0, 2.0  # of a document's vector: its text with its name, and its name alone
NAME_WEIGHT = 2.0
WHOLE_TITLE = 10.0
NOISE = 0.1 * TEXT_PART  # unrelated documents have cosines around 0
TELLING = 1 + math.log(5)  # idf of a word that stands in a fifth of the documents
K1, B = 1.5, 0.75
TITLE_PARTS = ("starts", "rows", "idf", "mass", "sizes")


@dataclass(frozen=True)
class Impacts:
    """BM25 by word: postings of word w are ``rows[starts[w]:starts[w + 1]]``, their scores ``scores[...]``."""

    starts: NDArray[np.int64]
    rows: NDArray[np.int32]
    scores: NDArray[np.float32]

    @classmethod
    def build(cls, text: Ragged, size: int, k1: float = K1, b: float = B) -> Impacts:
        """Compute all impacts.

        Args:
            text: Documents as ids.
            size: Number of words V.
            k1: Saturation of repeated words.
            b: Strength of the correction for length.

        Example:
            >>> impacts = Impacts.build(Ragged.from_rows([[0, 1], [1]]), 2)
            >>> impacts.starts.tolist(), impacts.rows.tolist(), bool(impacts.scores[0] > impacts.scores[1])
            ([0, 1, 3], [0, 0, 1], True)
        """
        import scipy.sparse as sp

        n = len(text)
        counts = sp.csr_array((np.ones(len(text.values), np.float32), text.values, text.offsets), (n, size), copy=True)
        counts.sum_duplicates()
        length = text.lengths / max(float(text.lengths.mean()), 1e-9)
        by_word = counts.tocsc()
        df = np.diff(by_word.indptr)
        idf = np.log(1 + (n - df + 0.5) / (df + 0.5))
        tf = by_word.data
        scores = tf * (k1 + 1) / (tf + k1 * (1 - b + b * length[by_word.indices])) * np.repeat(idf, df)
        return cls(by_word.indptr.astype(np.int64), by_word.indices.astype(np.int32), scores.astype(np.float32))

    def scores_of(self, words: NDArray[Any], n: int) -> NDArray[np.float32]:
        """Scores of all n documents for distinct ``words``."""
        out = np.zeros(n, np.float32)
        _gather(np.asarray(words, np.int64), self.starts, self.rows, self.scores, out)
        return out


@compiled()
def _gather(words, starts, rows, scores, out):  # type: ignore[no-untyped-def]
    for word in words:
        for t in range(starts[word], starts[word + 1]):
            out[rows[t]] += scores[t]


@dataclass(frozen=True)
class Titles:
    """Which titles contain all words of a query, and how much of the title they are.

    Args:
        starts: Titles that contain word w are ``rows[starts[w]:starts[w + 1]]``, ``(V + 1,)``.
        rows: Document numbers, ascending for each word.
        idf: Weight of each word, ``(V,)``.
        mass: Sum of the weights of the telling words of each title, of all its words if it has none, ``(N,)``.
        sizes: How many different words each title has, ``(N,)``.
    """

    starts: NDArray[np.int64]
    rows: NDArray[np.int32]
    idf: NDArray[np.float32]
    mass: NDArray[np.float32]
    sizes: NDArray[np.int32]

    @classmethod
    def build(cls, corpus: TokenizedCorpus) -> Titles:
        """Index the heads of a corpus.

        Example:
            >>> heads, none = Ragged.from_rows([[0, 1], [1]]), Ragged.from_rows([[], []])
            >>> blank = np.full(2, -1, np.int32)
            >>> corpus = TokenizedCorpus(["a", "b"], np.ones(2), heads, none, none, none, blank, ["", ""], blank, blank)
            >>> rows, share = Titles.build(corpus).containing(np.array([1]))
            >>> rows.tolist(), share.tolist()
            ([0, 1], [0.5, 1.0])
        """
        import scipy.sparse as sp

        size, documents = len(corpus.vocabulary), len(corpus)
        idf = (np.log((1 + documents) / (1 + np.asarray(corpus.df))) + 1).astype(np.float32)
        document = np.repeat(np.arange(documents, dtype=np.int32), corpus.head.lengths)
        pairs = sp.coo_array((np.ones(len(document), np.float32), (corpus.head.values, document)), (size, documents))
        held = sp.csr_array(pairs)  # adds up repeated words
        held.sort_indices()
        weight = np.repeat(idf, np.diff(held.indptr))
        telling = np.bincount(held.indices, np.where(weight >= TELLING, weight, 0), documents)
        every = np.bincount(held.indices, weight, documents)
        mass = np.where(telling > 0, telling, every).astype(np.float32)
        sizes = np.bincount(held.indices, minlength=documents).astype(np.int32)
        return cls(held.indptr.astype(np.int64), held.indices.astype(np.int32), idf, mass, sizes)

    def containing(self, words: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Documents whose title contains all of the distinct ``words``, and the share of the title that these are.

        Words that stand in more than a fifth of the documents count only if there are no others.
        """
        telling = words[self.idf[words] >= TELLING]
        words = telling if len(telling) else words
        found = self._with_all(words)
        return found, np.minimum(self.idf[words].sum() / self.mass[found], 1)

    def equal(self, words: NDArray[np.int64]) -> NDArray[np.int32]:
        """Documents whose title consists of the distinct ``words``, in any order."""
        found = self._with_all(words)
        return found[self.sizes[found] == len(words)]

    def _with_all(self, words: NDArray[np.int64]) -> NDArray[np.int32]:
        postings = [self.rows[self.starts[word] : self.starts[word + 1]] for word in words]
        postings.sort(key=len)
        found = postings[0] if postings else self.rows[:0]
        for other in postings[1:]:
            if not len(found):
                break
            found = np.intersect1d(found, other, assume_unique=True)
        return found


def heads_are_text(corpus: TokenizedCorpus) -> bool:
    """Whether heads are searched like text: when 9 of 10 documents have one, or none has, or they are first lines.

    A first line is a part of the text: to leave it out would hide it from every query.
    """
    if not corpus.flags.get("titles", True):
        return True
    share = float((corpus.head.lengths > 0).mean())
    return share >= 0.9 or share == 0


class Ranker:
    """Rank documents for queries.

    Args:
        text: BM25 of the texts.
        names: BM25 of the names; no postings where names say nothing.
        vectors: Document vectors ``(N, D)``, or None for lexical ranking only.
        titles: What stands in the titles; None without titles.
        documents: How many there are; needed without vectors.
        titles_are_text: Whether titles belong to ``text`` as well.

    Example:
        >>> rows, none, blank = Ragged.from_rows([[0, 1], [1, 2]]), Ragged.from_rows([[], []]), np.full(2, -1, np.int32)
        >>> corpus = TokenizedCorpus(["a", "b", "c"], np.ones(3), none, rows, none, none, blank, ["", ""], blank, blank)
        >>> order, scores, parts = Ranker.build(corpus, None).search(np.array([2]), None, k=2)
        >>> order.tolist(), parts[0]["words"]
        ([1], [2])
    """

    def __init__(
        self,
        text: Impacts,
        names: Impacts,
        vectors: NDArray[np.float32] | None,
        titles: Titles | None = None,
        documents: int | None = None,
        titles_are_text: bool = True,
    ) -> None:
        self.text, self.names, self.vectors, self.titles = text, names, vectors, titles
        self.titles_are_text = titles_are_text
        self.documents = len(vectors) if vectors is not None else int(documents or 0)

    @classmethod
    def build(cls, corpus: TokenizedCorpus, vectors: NDArray[np.float32] | None, heads: bool | None = None) -> Ranker:
        """Index a corpus.

        Args:
            corpus: Documents as ids.
            vectors: What :func:`document_vectors` gives with the same ``heads``.
            heads: Whether heads are searched as text; None asks :func:`heads_are_text`.
        """
        if vectors is not None and len(vectors) != len(corpus):
            raise ValueError(f"vectors must have one row for each of the {len(corpus)} documents; got {len(vectors)}")
        heads = heads_are_text(corpus) if heads is None else heads
        size = len(corpus.vocabulary)
        text = concatenate(corpus.head, corpus.body) if heads else corpus.body
        titles = Titles.build(corpus) if len(corpus.head.values) else None
        return cls(Impacts.build(text, size), Impacts.build(corpus.last, size), vectors, titles, len(corpus), heads)

    def scores(
        self, words: NDArray[Any], query_vector: NDArray[np.float32] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Scores of all documents: total, lexical part in [0, 1], vector part; each ``(N,)``."""
        distinct = np.unique(np.asarray(words, np.int64))
        lexical = self.text.scores_of(distinct, self.documents)
        lexical += NAME_WEIGHT * self.names.scores_of(distinct, self.documents)
        top = float(lexical.max(initial=0))
        if top > 0:
            lexical /= top
        meaning = np.zeros(self.documents, np.float32)
        if self.vectors is not None and query_vector is not None:
            meaning = self.vectors @ np.asarray(query_vector, np.float32)
        total = lexical + meaning
        if self.titles is not None and len(distinct):
            if self.titles_are_text:
                total[self.titles.equal(distinct)] += WHOLE_TITLE
            else:
                rows, share = self.titles.containing(distinct)
                total[rows] += WHOLE_TITLE * share
        return total, lexical, meaning

    def search(
        self, tokens: NDArray[Any], query_vector: NDArray[np.float32] | None, k: int = 10
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], list[dict[str, Any]]]:
        """The best documents for a query.

        Args:
            tokens: Ids of the query's known words.
            query_vector: Its vector of length 1 (or 0), ``(D,)``; None ranks by words only.
            k: How many.

        Returns:
            Indices best first (ties: lower index), their scores, and for each a dict with ``lexical`` (in [0, 1]),
            ``cosine`` (the vector part divided by its largest possible value) and ``words`` (ids that matched).
            Documents that share neither a word with the query nor a cosine above .1 are left out.
        """
        check_int("k", k, 1)
        total, lexical, meaning = self.scores(tokens, query_vector)
        order = top_k(total, k)
        order = order[(lexical[order] > 0) | (total[order] > NOISE)]
        distinct = np.unique(np.asarray(tokens, np.int64))
        matched = {int(i): [int(w) for w in distinct if self._has(int(w), int(i))] for i in order}
        parts = [
            {
                "lexical": float(lexical[i]),
                "cosine": float(meaning[i]) / max(float(np.linalg.norm(self.vectors[i])), TEXT_PART)
                if self.vectors is not None
                else 0.0,
                "words": matched[int(i)],
            }
            for i in order
        ]
        return order, total[order], parts

    def _has(self, word: int, row: int) -> bool:
        for field in (self.text, self.names, self.titles):
            if field is None:
                continue
            begin, end = field.starts[word], field.starts[word + 1]
            place = begin + np.searchsorted(field.rows[begin:end], row)
            if place < end and field.rows[place] == row:
                return True
        return False

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``ranker.safetensors``, ``vectors.npy`` and ``ranker.json``."""
        from safetensors.numpy import save_file

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        arrays = {
            f"{name}.{part}": np.ascontiguousarray(getattr(getattr(self, name), part))
            for name in ("text", "names")
            for part in ("starts", "rows", "scores")
        }
        if self.titles is not None:
            arrays |= {f"titles.{part}": getattr(self.titles, part) for part in TITLE_PARTS}
        with atomic_path(target / "ranker.safetensors") as temporary:
            save_file(arrays, temporary)
        if self.vectors is not None:
            with atomic_path(target / "vectors.npy") as temporary, open(temporary, "wb") as file:
                np.save(file, self.vectors, allow_pickle=False)
        head = {
            "format": FORMAT,
            "documents": self.documents,
            "vectors": self.vectors is not None,
            "text": self.titles_are_text,
        }
        write_json(target / "ranker.json", head)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], mmap: bool = True) -> Ranker:
        """Read what :meth:`save` wrote; with ``mmap`` the arrays stay on disk until used."""
        source = Path(folder)
        if not (source / "ranker.json").exists():
            raise ValueError(f"{source} holds no ranking: ranker.json is missing")
        head = json.loads((source / "ranker.json").read_text(encoding="utf-8"))
        if head.get("format") != FORMAT:
            raise ValueError(f"{source / 'ranker.json'}: expected format {FORMAT}, got {head.get('format')!r}")
        arrays = map_tensors(source / "ranker.safetensors", mmap)
        text, names = (
            Impacts(*(arrays[f"{f}.{part}"] for part in ("starts", "rows", "scores"))) for f in ("text", "names")
        )
        vectors = None
        if head["vectors"]:
            vectors = np.asarray(np.load(source / "vectors.npy", mmap_mode="r" if mmap else None, allow_pickle=False))
        titles = Titles(*(arrays[f"titles.{part}"] for part in TITLE_PARTS)) if "titles.rows" in arrays else None
        return cls(text, names, vectors, titles, head["documents"], head["text"])


def top_k(scores: NDArray[Any], k: int) -> NDArray[np.int64]:
    """Indices of the k largest, best first, ties by index.

    Example:
        >>> top_k(np.array([1.0, 3.0, 3.0, 2.0]), 3).tolist()
        [1, 2, 3]
    """
    k = min(k, len(scores))
    if k == 0:
        return np.empty(0, np.int64)
    bound = np.partition(scores, -k)[-k]
    candidates = np.flatnonzero(scores >= bound)
    return candidates[np.argsort(-scores[candidates], kind="stable")][:k]
