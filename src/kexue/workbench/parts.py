"""The files of a workspace and the objects they hold: the one place that knows what lies where."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kexue.words import Tokenizer
from kexue.workbench.ranking import Ranker
from kexue.workbench.signals import Signals
from kexue.workbench.store import DocumentStore
from kexue.workbench.tokens import Ragged, TokenizedCorpus

if TYPE_CHECKING:
    from kexue.models import BagEncoder
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
REPORT = "report.html"
TRAINING = "training"
CURVE = "training.json"


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that the corpus was read with."""
    return Tokenizer.from_config(json.loads((folder / TOKENIZER).read_text(encoding="utf-8")))


@dataclass
class Parts:
    """Everything that answers a query, loaded (large arrays stay on disk until they are used)."""

    store: DocumentStore
    tokenizer: Tokenizer
    tokens: TokenizedCorpus
    encoder: BagEncoder
    ranker: Ranker
    signals: Signals
    words: PMIEmbedding | None
    surface: dict[str, str]

    @classmethod
    def load(cls, folder: Path) -> Parts:
        """Open the files of a finished workspace."""
        from kexue.models import BagEncoder
        from kexue.words import PMIEmbedding

        tokenizer = load_tokenizer(folder)
        return cls(
            tokenizer=tokenizer,
            tokens=TokenizedCorpus.load(folder / TOKENS),
            encoder=BagEncoder.load(folder / ENCODER),
            ranker=Ranker.load(folder / RANKER),
            signals=Signals.load(folder / SIGNALS),
            words=PMIEmbedding.load(folder / WORDS) if (folder / WORDS).exists() else None,
            surface=json.loads((folder / SURFACE).read_text(encoding="utf-8")),
            store=DocumentStore(folder / DOCUMENTS),  # last: it is open, and the others may be damaged
        )

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
        rows = [self.tokens.lookup(self.tokenizer(text)) for text in texts]
        return np.asarray(self.encoder.encode_ids(Ragged.from_rows(rows)))
