"""Answers from the parts of a workspace: by meaning and words, by relation, by word."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue._checks import check_int
from kexue.workbench.parts import Parts
from kexue.workbench.passage import best_passage, surface_forms, whole_words
from kexue.workbench.ranking import NAME_PART, TEXT_PART
from kexue.workbench.tokens import split_head

_QUERY_LIMIT = 20_000  # characters; the rest of a longer query is not looked at
_SIGNALS = {
    "words": "shared words",
    "meaning": "similar meaning",
    "name": "similar name",
    "mentions": "is mentioned",
    "mentioned": "mentions it",
    "order": "stands near",
}
_HIGHEST = 1.0 + TEXT_PART + NAME_PART  # the most that a document can score by known words and meaning


@dataclass(frozen=True)
class Hit:
    """One result.

    Attributes:
        id: Id of the document.
        score: Higher is better; comparable within one answer only.
        title: Title, or the first line.
        passage: The piece of text that answers best.
        evidence: Why: ``words`` that matched, ``similarity`` (cosine) and ``lexical`` for a search, the signals and
            their ranks for related documents, and ``spans``, the matched pieces of ``passage``.
    """

    id: str
    score: float
    title: str
    passage: str
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-compatible dict."""
        return asdict(self)

    def explain(self) -> str:
        """Say in one line why the document was found."""
        parts = []
        if self.evidence.get("words"):
            parts.append("words: " + ", ".join(self.evidence["words"][:8]))
        if "similarity" in self.evidence:
            parts.append(f"similarity {self.evidence['similarity']:.2f}")
        for name, value in self.evidence.get("signals", {}).items():
            parts.append(f"{_SIGNALS.get(name, name)} {value:.2f}")
        return "; ".join(parts)


class Searcher:
    """Answers queries from the parts of a workspace.

    Args:
        parts: What :meth:`Parts.load` returned.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return len(self._parts.store)

    def encode(self, texts: Iterable[str]) -> NDArray[np.float32]:
        """Vectors of texts, rows of length 1 (or 0 for a text without a known word), shape ``(N, D)``."""
        return self._parts.encode([_check_query(text, empty=True) for text in texts])

    def search(self, query: str, k: int = 10) -> list[Hit]:
        """Find documents by meaning and words.

        Args:
            query: Words or a question; everything in it is text, there is no query syntax. At most the first
                20 000 characters count.
            k: Number of results.

        Returns:
            At most ``k`` hits, best first; none if no word of the query is known.

        Raises:
            TypeError: ``query`` is not a string.
            ValueError: ``query`` is blank, or ``k`` is below 1.
        """
        query = _check_query(query)
        check_int("k", k, 1)
        parts = self._parts
        tokens = parts.tokenizer(query)
        ids = parts.tokens.lookup(tokens)
        vector = parts.encode_ids([ids])[0]
        found: dict[int, tuple[float, dict[str, Any]]] = {}
        for row, score, part in zip(*parts.ranker.search(ids, vector, k), strict=True):
            words = [parts.tokens.vocabulary[word] for word in part["words"]]
            words.sort(key=lambda word: (-parts.weight(word), word))
            evidence = {"words": words, "similarity": part["cosine"], "lexical": part["lexical"]}
            found[int(row)] = (float(score), evidence)
        self._add_rare(tokens, ids, vector, found)
        forms = surface_forms(query, parts.tokenizer)
        for _, part in found.values():
            told = parts.telling({word: parts.weight(word) for word in part["words"]})
            part["words"] = whole_words(forms.get(word, word) for word in told)
        weights = parts.telling({token: parts.weight(token) for token in tokens})
        best = sorted(found.items(), key=lambda item: (-item[1][0], item[0]))[:k]
        return self._hits([(row, score, part) for row, (score, part) in best], weights)

    def _add_rare(
        self,
        tokens: list[str],
        ids: NDArray[np.int32],
        vector: NDArray[np.float32],
        found: dict[int, tuple[float, dict[str, Any]]],
    ) -> None:
        """Let words count that stand in a single document, which the models do not know.

        Such a word adds its share of the query's weight (idf) times the most that a document can score otherwise.
        """
        parts = self._parts
        rare = [token for token in dict.fromkeys(tokens) if token not in parts.tokens.ids]
        if not rare:
            return
        total = sum(parts.weight(token) for token in dict.fromkeys(tokens)) or 1.0
        scores, lexical, _ = parts.ranker.scores(ids, vector)
        for token in rare[:64]:
            for row, _ in parts.store.keywords([token], 5):
                if row not in found:
                    found[row] = (float(scores[row]), {"words": [], "lexical": float(lexical[row])})
                score, part = found[row]
                part["words"] = [token, *part["words"]]
                found[row] = (score + _HIGHEST * parts.weight(token) / total, part)

    def similar(self, identifier: str, k: int = 10) -> list[Hit]:
        """Find documents related to a document.

        Args:
            identifier: Id of a document of the workspace.
            k: Number of results.

        Returns:
            At most ``k`` hits, best first, the document itself left out.

        Raises:
            KeyError: there is no such document; the message names similar ids.
        """
        if not isinstance(identifier, str):
            raise TypeError(f"the id must be a str; got {identifier!r} of type {type(identifier).__name__}")
        check_int("k", k, 1)
        parts = self._parts
        row = parts.store.row(identifier)
        if row is None:
            close = parts.store.like(identifier.strip()) if identifier.strip() else []
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise KeyError(f"no document has the id {identifier!r}{hint}")
        best = parts.signals.similar(row, k)
        shared = self._topic(row)
        hits = []
        for other, score, why in best:
            there = self._words_of(int(other))
            words = [parts.surface.get(word, word) for word in shared if word in there][:8]
            hits.append((int(other), float(score), {"words": words, "signals": why}))
        return self._hits(hits, shared)

    def _topic(self, row: int) -> dict[str, float]:
        """The most telling words of a document, to show where a related one speaks of the same."""
        counts = self._words_of(row)
        # Numbers are rare and say nothing; a word that comes often says what the document is about.
        words = [word for word in whole_words(counts) if not any(character.isdigit() for character in word)]
        weights = {word: self._parts.weight(word) * (1 + math.log(counts[word])) for word in words}
        return dict(sorted(weights.items(), key=lambda item: (-item[1], item[0]))[:40])

    def _words_of(self, row: int) -> dict[str, int]:
        """Word -> how often it stands in the document."""
        tokens = self._parts.tokens
        ids, counts = np.unique(np.concatenate([tokens.head[row], tokens.body[row]]), return_counts=True)
        return dict(zip((tokens.vocabulary[i] for i in ids), counts.tolist(), strict=True))

    def words(self, word: str, k: int = 10) -> list[tuple[str, float]]:
        """Words that occur together with ``word`` more often than chance.

        Args:
            word: A word of the corpus, in any case.
            k: Number of words.

        Returns:
            ``(word, cosine)`` pairs, best first.

        Raises:
            KeyError: the word is not known, in which case the message names similar ones, or is too rare.
        """
        from kexue.workbench.word_queries import WordTable

        return WordTable.of_parts(self._parts).related(word, k)

    def _hits(self, best: list[tuple[int, float, dict[str, Any]]], weights: Mapping[str, float]) -> list[Hit]:
        documents = self._parts.store.fetch([row for row, _, _ in best])
        hits = []
        for (_, score, evidence), document in zip(best, documents, strict=True):
            head, body = split_head(document.title, document.text, True)
            title = head or document.title.strip()
            passage, spans = best_passage(body.strip(), weights, self._parts.tokenizer)
            hits.append(Hit(document.id, score, title, passage, {**evidence, "spans": [list(span) for span in spans]}))
        return hits


def _check_query(query: Any, empty: bool = False) -> str:
    if not isinstance(query, str):
        raise TypeError(f"the query must be a str; got {query!r} of type {type(query).__name__}")
    if not empty and not query.strip():
        raise ValueError("the query is empty; expected at least one word")
    return query[:_QUERY_LIMIT].replace("\0", " ")
