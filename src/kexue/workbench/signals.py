"""Related documents: several weak signals, each a ranking, joined by weighted reciprocal ranks.

    score(j) = sum over signals of  weight / (20 + rank of j in this signal)

Ranks make signals comparable that have no common scale. The signals:

- ``words``: cosine of sublinear tf-idf;
- ``meaning``: cosine of the document vectors;
- ``name``: cosine of tf-idf over the character 2- to 5-grams of names (``argmin`` is near ``nanargmin``);
- ``mentions``: documents whose name this text uses, rare names first; ``mentioned``: the other way round;
- ``order``: the nearest ones in the same container, as an author put them.

A signal that the corpus does not have is off, and ``used`` says so. Two signals are cosines of text; a corpus without
names and order is ranked by these two.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue._checks import check_int
from kexue._files import atomic_path, map_tensors, write_json
from kexue.models._bags import count_words
from kexue.words._numba import compiled
from kexue.workbench.ranking import top_k
from kexue.workbench.tokens import TokenizedCorpus, concatenate

FORMAT = 1
WEIGHTS = {"words": 1.0, "meaning": 1.5, "name": 1.5, "mentions": 1.0, "mentioned": 1.0, "order": 1.0}
OFFSET, DEPTH = 20, 200
NAMESAKES = 20  # a name that more documents bear points nowhere


class Signals:
    """All signals of a corpus, ready to be asked for the neighbours of any document.

    Args:
        arrays: What :meth:`build` computes.
        vectors: What :func:`kexue.workbench.encoder.text_vectors` gives, ``(N, D)``, or None.

    Attributes:
        used: Signal -> whether the corpus has it.

    Example:
        >>> from kexue.workbench.tokens import Ragged
        >>> rows = Ragged.from_rows([[0, 1], [1, 2], [1, 0, 2]])
        >>> none, blank = Ragged.from_rows([[], [], []]), np.full(3, -1, np.int32)
        >>> fields = (none, rows, none, none, blank, [""] * 3, blank, blank)
        >>> signals = Signals.build(TokenizedCorpus(list("abc"), np.array([2, 3, 2]), *fields), None)
        >>> [name for name, on in signals.used.items() if on], signals.similar(0, 1)[0][0]
        (['words'], 2)
    """

    def __init__(self, arrays: dict[str, NDArray[Any]], vectors: NDArray[np.float32] | None) -> None:
        self.arrays = arrays
        self.vectors = vectors
        self.documents = len(arrays["parent"])
        self.norms = None if vectors is None else np.maximum(np.linalg.norm(vectors, axis=1), 1e-12).astype(np.float32)
        self.used = {
            "words": len(arrays["words.rows"]) > 0,
            "meaning": vectors is not None,
            "name": len(arrays["name.rows"]) > 0,
            "mentions": len(arrays["mentions.rows"]) > 0,
            "mentioned": len(arrays["mentions.rows"]) > 0,
            "order": bool((arrays["parent"] >= 0).any()),
        }

    @classmethod
    def build(cls, corpus: TokenizedCorpus, vectors: NDArray[np.float32] | None) -> Signals:
        """Compute the signals that ``corpus`` has.

        Args:
            corpus: The documents.
            vectors: Their text vectors, ``(N, D)``, or None to leave out ``meaning``.
        """
        if vectors is not None and len(vectors) != len(corpus):
            raise ValueError(f"vectors must have one row for each of the {len(corpus)} documents; got {len(vectors)}")
        import scipy.sparse as sp

        words = _tfidf(corpus)
        names = _name_grams(corpus) if corpus.flags.get("names") else sp.csr_array((len(corpus), 0), dtype=np.float32)
        links = (
            _mentions(corpus)
            if corpus.flags.get("names")
            else sp.csr_array((len(corpus), len(corpus)), dtype=np.float32)
        )
        parent = corpus.parent if corpus.flags.get("order") else np.full(len(corpus), -1, np.int32)
        arrays = {"parent": np.ascontiguousarray(parent), "position": np.ascontiguousarray(corpus.position)}
        for name, matrix in (("words", words), ("name", names), ("mentions", links)):
            arrays |= _pack(name, matrix)
            arrays |= _pack(f"{name}.by_column", sp.csr_array(matrix.T))
        return cls(arrays, vectors)

    def scores(self, i: int) -> dict[str, NDArray[np.float32]]:
        """Signal -> scores of all documents for document ``i``; only signals that are on."""
        check_int("i", i, 0)
        if i >= self.documents:
            raise ValueError(f"i must be below {self.documents}; got {i}")
        found: dict[str, NDArray[np.float32]] = {}
        for name in ("words", "name"):
            if self.used[name]:
                found[name] = self._product(name, i)
        if self.vectors is not None and self.norms is not None:
            found["meaning"] = (self.vectors @ (self.vectors[i] / self.norms[i])) / self.norms
        if self.used["mentions"]:
            found["mentions"] = self._row("mentions", i)
            found["mentioned"] = self._row("mentions.by_column", i)
        parent = self.arrays["parent"]
        if self.used["order"] and parent[i] >= 0:
            distance = np.abs(self.arrays["position"].astype(np.float32) - float(self.arrays["position"][i]))
            found["order"] = np.where(parent == parent[i], 1 / (1 + distance), 0).astype(np.float32)
        return found

    def similar(self, i: int, k: int = 10) -> list[tuple[int, float, dict[str, float]]]:
        """The documents nearest to document ``i``, best first.

        Args:
            i: Its number.
            k: How many.

        Returns:
            For each one its number, score and the signals that speak for it with their values: cosines for ``words``,
            ``meaning``, ``name``; weight of the names for ``mentions``, ``mentioned``; 1 / (1 + distance) for
            ``order``.
        """
        check_int("k", k, 1)
        signals = self.scores(i)
        total = np.zeros(self.documents, np.float32)
        ranked: dict[str, NDArray[np.int64]] = {}
        for name, scores in signals.items():
            scores[i] = -np.inf
            order = top_k(scores, DEPTH + 1)
            ranked[name] = order = order[scores[order] > 0][:DEPTH]
            total[order] += np.float32(WEIGHTS[name]) / (OFFSET + np.arange(len(order), dtype=np.float32))
        best = top_k(total, k)
        best = best[total[best] > 0]
        return [
            (int(j), float(total[j]), {n: round(float(s[j]), 4) for n, s in signals.items() if j in ranked[n]})
            for j in best
        ]

    def _row(self, name: str, i: int) -> NDArray[np.float32]:
        starts, rows, values = (self.arrays[f"{name}.{part}"] for part in ("starts", "rows", "values"))
        out = np.zeros(self.documents, np.float32)
        out[rows[starts[i] : starts[i + 1]]] = values[starts[i] : starts[i + 1]]
        return out

    def _product(self, name: str, i: int) -> NDArray[np.float32]:
        starts, columns, values = (self.arrays[f"{name}.{part}"] for part in ("starts", "rows", "values"))
        out = np.zeros(self.documents, np.float32)
        here = slice(int(starts[i]), int(starts[i + 1]))
        turned, rows, entries = (self.arrays[f"{name}.by_column.{part}"] for part in ("starts", "rows", "values"))
        _accumulate(columns[here], values[here], turned, rows, entries, out)
        return out

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``signals.safetensors``, ``signals.vectors.npy`` and, last, ``signals.json`` into ``folder``."""
        from safetensors.numpy import save_file

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        with atomic_path(target / "signals.safetensors") as temporary:
            save_file(self.arrays, temporary)
        if self.vectors is not None:
            with atomic_path(target / "signals.vectors.npy") as temporary, open(temporary, "wb") as file:
                np.save(file, self.vectors, allow_pickle=False)
        write_json(target / "signals.json", {"format": FORMAT, "documents": self.documents, "used": self.used})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], mmap: bool = True) -> Signals:
        """Read what :meth:`save` wrote; with ``mmap`` the arrays stay on disk until used.

        Raises:
            ValueError: The folder holds no signals, or those of another format version.
        """
        source = Path(folder)
        if not (source / "signals.json").exists():
            raise ValueError(f"{source} holds no signals: signals.json is missing")
        head = json.loads((source / "signals.json").read_text(encoding="utf-8"))
        if head.get("format") != FORMAT:
            raise ValueError(f"{source / 'signals.json'}: expected format {FORMAT}, got {head.get('format')!r}")
        vectors = None
        if head["used"]["meaning"]:
            path = source / "signals.vectors.npy"
            vectors = np.asarray(np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False))
        return cls(map_tensors(source / "signals.safetensors", mmap), vectors)


def _pack(name: str, matrix: Any) -> dict[str, NDArray[Any]]:
    return {
        f"{name}.starts": matrix.indptr.astype(np.int64),
        f"{name}.rows": matrix.indices.astype(np.int32),
        f"{name}.values": matrix.data.astype(np.float32),
    }


@compiled()
def _accumulate(columns, values, starts, rows, entries, out):  # type: ignore[no-untyped-def]
    for t in range(len(columns)):
        factor = values[t]
        for p in range(starts[columns[t]], starts[columns[t] + 1]):
            out[rows[p]] += factor * entries[p]


def _normalised(matrix: Any) -> Any:
    import scipy.sparse as sp

    length = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
    return sp.csr_array(sp.diags_array((1 / np.maximum(length, 1e-12)).astype(np.float32)) @ matrix)


def _tfidf(corpus: TokenizedCorpus) -> Any:
    import scipy.sparse as sp

    text, size = concatenate(corpus.head, corpus.body), len(corpus.vocabulary)
    ids, weights, offsets = count_words(np.ascontiguousarray(text.values), text.offsets, size)
    df = np.bincount(ids, minlength=size)
    idf = (np.log((1 + len(corpus)) / (1 + df)) + 1).astype(np.float32)
    return _normalised(sp.csr_array((weights * idf[ids], ids, offsets), shape=(len(corpus), size)))


def _name_grams(corpus: TokenizedCorpus) -> Any:
    import scipy.sparse as sp
    from sklearn.feature_extraction.text import TfidfVectorizer

    grams = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, dtype=np.float32)
    try:
        matrix = grams.fit_transform(corpus.labels)
    except ValueError:  # no name has two characters
        return sp.csr_array((len(corpus), 0), dtype=np.float32)
    # The commonest grams (``get_``) belong to thousands of names: slow, and worth nothing.
    common = np.bincount(matrix.indices, minlength=matrix.shape[1]) > max(200, len(corpus) // 10)
    keep = sp.diags_array((~common).astype(np.float32))
    pruned = sp.csr_array(matrix @ keep)
    pruned.eliminate_zeros()
    return _normalised(pruned)


def _mentions(corpus: TokenizedCorpus) -> Any:
    """Row i: the documents whose name the text of i uses, weighted by the rarity of the word and of its bearers."""
    import scipy.sparse as sp

    n, size = len(corpus), len(corpus.vocabulary)
    text = concatenate(corpus.head, corpus.body)
    ids, _, offsets = count_words(np.ascontiguousarray(text.values), text.offsets, size)
    uses = sp.csr_array((np.ones(len(ids), np.float32), ids, offsets), shape=(n, size))
    df = np.bincount(ids, minlength=size)
    bearers = np.bincount(corpus.own[corpus.own >= 0], minlength=size)
    named = np.flatnonzero(corpus.own >= 0)
    named = named[(bearers[corpus.own[named]] <= NAMESAKES) & (df[corpus.own[named]] <= max(20, n // 50))]
    word = corpus.own[named]
    weight = np.log((1 + n) / (1 + df[word])) / np.sqrt(bearers[word])
    target = sp.csr_array((weight.astype(np.float32), (word, named)), shape=(size, n))
    links = (uses @ target).tocoo()
    # A document that uses its own name points at nothing by it, its namesakes included.
    other = corpus.own[links.row] != corpus.own[links.col]
    return sp.csr_array((links.data[other], (links.row[other], links.col[other])), shape=(n, n), dtype=np.float32)
