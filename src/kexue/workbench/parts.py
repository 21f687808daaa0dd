"""The files of a workspace and the objects they hold: the one place that knows what lies where."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from kexue._files import map_tensors
from kexue.models._bags import count_words, sum_rows
from kexue.words import Tokenizer
from kexue.workbench.errors import WorkspaceError
from kexue.workbench.ranking import Ranker
from kexue.workbench.signals import Signals
from kexue.workbench.store import DocumentStore
from kexue.workbench.tokens import Ragged, TokenizedCorpus

if TYPE_CHECKING:
    from kexue.tasks import Summarizer
    from kexue.words import PMIEmbedding

DOCUMENTS = "documents.sqlite"
TOKENIZER = "tokenizer.json"
TOKENS = "tokens"
SURFACE = "surface.json"
COUNTS = "counts.safetensors"
WORDS = "words"
ENCODER = "encoder"
SIGNALS = "signals"
RANKER = "ranker"
SUMMARIZER = "summarizer"
REPORT = "report.html"
TRAINING = "training"
CURVE = "training.json"


# What reading files can raise whose content is not what was written.
DAMAGE = (OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, SafetensorError)


def damaged(folder: Path, error: Exception) -> WorkspaceError:
    """The error to raise for a workspace whose files cannot be read."""
    if isinstance(error, WorkspaceError):
        return error
    return WorkspaceError(
        f"{folder} is damaged ({error}); build it again with `kexue build ... --out {folder} --force`"
    )


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that the corpus was read with."""
    return Tokenizer.from_config(json.loads((folder / TOKENIZER).read_text(encoding="utf-8")))


class Parts:
    """Everything that answers a query. Large arrays stay on disk until they are used.

    Queries are encoded without torch, and the word vectors, which bring scikit-learn, are loaded when they are first
    asked for: a search from the command line should not wait for either.

    Args:
        folder: The folder of a finished workspace.

    Attributes:
        store: The documents.
        tokenizer: The tokenizer that they were read with.
        tokens: The documents as ids.
        ranker: Answers queries.
        signals: Tells which documents are related.
        surface: Stem -> the form in which it is shown.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = DocumentStore(folder / DOCUMENTS)
        self.tokenizer = load_tokenizer(folder)
        self.tokens = TokenizedCorpus.load(folder / TOKENS)
        self.ranker = Ranker.load(folder / RANKER)
        self.signals = Signals.load(folder / SIGNALS)
        self.surface: dict[str, str] = dict(json.loads((folder / SURFACE).read_text(encoding="utf-8")))
        weights = map_tensors(folder / ENCODER / "encoder.safetensors")
        self._table, self._scale = weights["table"], np.exp(weights["log_weight"])
        if self._table.shape[:1] != (len(self.tokens.vocabulary),) or self._scale.shape != self._table.shape[:1]:
            raise ValueError(
                f"{folder / ENCODER}: expected a vector and a weight for each of {len(self.tokens.vocabulary)} words, "
                f"got shapes {self._table.shape} and {self._scale.shape}"
            )

    @classmethod
    def load(cls, folder: Path) -> Parts:
        """Open the files of a finished workspace."""
        return cls(folder)

    @cached_property
    def words(self) -> PMIEmbedding | None:
        """The word vectors; None for a corpus that is too small for them."""
        from kexue.words import PMIEmbedding

        try:
            return PMIEmbedding.load(self.folder / WORDS) if (self.folder / WORDS).exists() else None
        except DAMAGE as error:
            raise damaged(self.folder, error) from error

    @cached_property
    def summarizer(self) -> Summarizer | None:
        """What was learned from texts with summaries; None if that did not pay or an earlier version built this."""
        if not (self.folder / SUMMARIZER).exists():
            return None
        from kexue.tasks import Summarizer
        from kexue.workbench.summary_vectors import piece_features

        try:
            head = json.loads((self.folder / SUMMARIZER / "summarizer.json").read_text(encoding="utf-8"))
            # The first builds with a summarizer did not show it the vectors
            return Summarizer.load(self.folder / SUMMARIZER, piece_features(self) if head["callable"] else None)
        except DAMAGE as error:
            raise damaged(self.folder, error) from error

    def weight(self, token: str) -> float:
        """Inverse document frequency of a token; an unknown one counts as standing in one document."""
        number = self.tokens.ids.get(token)
        df = 1 if number is None else int(self.tokens.df[number])
        return math.log(1 + len(self.tokens) / df)

    def telling(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Leave out words that stand in more than a fifth of the documents, unless there are no others."""
        bound = math.log(1 + 5)
        return {word: weight for word, weight in weights.items() if weight >= bound} or dict(weights)

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of texts, shape ``(N, D)``."""
        return self.encode_ids([self.tokens.lookup(self.tokenizer(text)) for text in texts])

    def encode_ids(self, rows: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        """Vectors of rows of ids, as :meth:`kexue.models.BagEncoder.encode_ids` gives them, shape ``(N, D)``."""
        text = Ragged.from_rows(rows)
        ids, weights, offsets = count_words(text.values, text.offsets, len(self._scale))
        out = np.zeros((len(text), self._table.shape[1]), np.float32)
        sum_rows(ids, weights, offsets, self._table, self._scale, out)
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), np.float32(1e-12))
