"""Train a model of sentence similarity on one's own groups of sentences, and ask it: ``kexue similarity``.

    read -> groups held out -> encoder trained as a classifier over the other groups -> threshold -> index of all texts

An interrupted or killed run goes on where it was; the model that stood there before is untouched until the new one
takes its place.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kexue import __version__
from kexue._checks import check_choice, check_int, check_real
from kexue._files import write_json
from kexue.corpus import CorpusError, Document, read_documents
from kexue.tasks import SentenceSimilarity
from kexue.tasks._similarity_training import usual_epochs
from kexue.workbench.build import explained
from kexue.workbench.errors import WorkspaceError
from kexue.workbench.targets import begin, check_free, locked, marked, publish, resolved

__all__ = ["MANIFEST", "Match", "SimilarityModel", "SimilaritySettings", "read_groups", "train_similarity"]

MANIFEST = "training.json"  # beside what SentenceSimilarity saves
KINDS = ("softmax", "am", "arc", "simpler_a")
_FEWEST = 5  # held-out groups with two sentences below which no figure means anything
_BATCH = 100
_RANKING = ("top1", "top5", "top10", "mean_rank")
_THRESHOLD = ("best_threshold", "best_coverage", "best_precision", "best_f1")


@dataclass(frozen=True)
class SimilaritySettings:
    """What can be chosen; equal settings and sentences give equal models on one machine.

    Args:
        kind: Margin of the classifier: "softmax" (none), "am", "arc" or "simpler_a".
        epochs: Passes over the sentences; None: 20, of a small file more, so that there are 400 steps.
        dim: Width of the vectors.
        max_length: Characters of a sentence that are read.
        min_count: Characters seen less often are unknown; None: 5, of a small file less.
        held_out: Share of the groups that the encoder never sees, on which it is measured and its threshold set.
        seed: Seed of everything random.

    Raises:
        ValueError: A value out of range.

    Example:
        >>> SimilaritySettings().kind
        'am'
    """

    kind: str = "am"
    epochs: int | None = None
    dim: int = 128
    max_length: int = 32
    min_count: int | None = None
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        if self.epochs is not None:
            check_int("epochs", self.epochs, 1)
        check_int("dim", self.dim, 1)
        check_int("max_length", self.max_length, 1)
        if self.min_count is not None:
            check_int("min_count", self.min_count, 1)
        check_real("held_out", self.held_out, minimum=0.0)
        if self.held_out > 0.5:
            raise ValueError(f"held_out must be at most 0.5; got {self.held_out}")
        check_int("seed", self.seed, 0)


class Match(NamedTuple):
    """A sentence that answers a query.

    Args:
        text: The sentence.
        score: Cosine.
        id: Its id in the file it came from.
        group: Its group.
    """

    text: str
    score: float
    id: str
    group: str


def read_groups(paths: Sequence[str | Path], read_options: dict[str, Any] | None = None) -> list[Document]:
    """Sentences with their groups, from JSON lines (id, text, labels: the group is the first) or tables.

    A table without a header (``text<TAB>group``) is read by the order of its columns.

    Args:
        paths: Files or folders.
        read_options: As for :func:`kexue.corpus.read_documents`.

    Returns:
        Documents, each with its group as ``labels[0]``; blank texts are left out.

    Raises:
        CorpusError: A file that cannot be read.
        ValueError: Sentences without a group, or no sentence at all.
    """
    options = dict(read_options or {})
    files = [Path(path) for path in paths]
    if not {"text_column", "label_column"} & options.keys() and all(_two_bare_columns(path, options) for path in files):
        options |= {"text_column": "1", "label_column": "2"}
    documents = list(read_documents(files, **options))
    lost = [document.id for document in documents if not document.labels]
    if lost:
        raise ValueError(
            f"every sentence needs a group: labels[0] in JSON lines, a column named group or label in a table (or "
            f"label_column), or lines text<TAB>group in a .tsv file; {len(lost):,} of {len(documents):,} have none, "
            f"the first is {lost[0]!r}"
        )
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise ValueError(f"no sentence in {', '.join(map(str, files))}")
    return documents


def _two_bare_columns(path: Path, options: dict[str, Any]) -> bool:
    """Whether the file is a table of two columns without a header."""
    try:
        next(iter(read_documents([path], **options | {"on_error": "raise"})), None)
    except CorpusError as error:
        return error.reason.endswith("Columns found: '1', '2'")
    return False


def _held_groups(documents: Sequence[Document], settings: SimilaritySettings) -> set[str]:
    """Groups of at least two sentences that are held out; none if too few would be left to measure or to train on."""
    sizes = Counter(document.labels[0] for document in documents)
    several = sorted(group for group, size in sizes.items() if size > 1)
    count = max(round(settings.held_out * len(several)), _FEWEST)
    if not settings.held_out or len(several) < 5 * _FEWEST:
        return set()
    return set(random.Random(settings.seed).sample(several, count))


def train_similarity(
    corpus: Iterable[Document] | str | Path | Sequence[str | Path],
    out: str | Path,
    settings: SimilaritySettings | None = None,
    *,
    force: bool = False,
    read_options: dict[str, Any] | None = None,
    progress: bool | None = None,
    log: Callable[[str], None] | None = None,
) -> Path:
    """Train a model of sentence similarity; called again after an interruption, it continues.

    Args:
        corpus: Paths, or documents whose first label is their group.
        out: The new folder.
        settings: What can be chosen.
        force: Replace a model of sentence similarity that stands at ``out``.
        read_options: As for :func:`kexue.corpus.read_documents`.
        progress: Show bars; None: if standard error is a terminal.
        log: Takes a line about each step.

    Returns:
        The folder of the finished model.

    Raises:
        WorkspaceError: ``out`` exists and is not to be replaced, or another run is writing it.
        ValueError: A setting out of range, sentences without a group, or fewer than two groups.
        KeyboardInterrupt: After Ctrl-C, when everything is saved.
    """
    settings, say = settings or SimilaritySettings(), log or (lambda line: None)
    target = resolved(out)
    partial = target.with_name(f".{target.name}.partial")
    with locked(target), explained(partial):
        check_free(target, MANIFEST, "model of sentence similarity", force)
        if isinstance(corpus, str | Path):
            corpus = [corpus]
        given = list(corpus)
        if all(isinstance(item, Document) for item in given):
            documents = _checked(given)  # type: ignore[arg-type]
        else:
            documents = read_groups(given, read_options)  # type: ignore[arg-type]
        groups = {document.labels[0] for document in documents}
        if len(groups) < 2:
            raise ValueError(f"similarity is learned from at least two groups of sentences; got {len(groups)}")
        held = _held_groups(documents, settings)
        train = [document for document in documents if document.labels[0] not in held]
        kept = f"; {len(held):,} groups held out" if held else "; too few groups to hold any out"
        say(f"read      sentences {len(documents):,}, groups {len(groups):,}{kept if settings.held_out else ''}")
        digest = hashlib.sha256()
        for document in documents:
            digest.update(repr((document.text, document.labels[0])).encode("utf-8", "replace"))
        key = {"kexue": __version__, "settings": asdict(settings), "sentences": digest.hexdigest()}
        begin(partial, key, "sentences", say)
        passes = settings.epochs or usual_epochs(len(train), _BATCH)
        model = SentenceSimilarity(
            kind=settings.kind, d=settings.dim, maxlen=settings.max_length, min_count=settings.min_count, epochs=passes,
            batch_size=_BATCH, random_state=settings.seed, show_progress=progress,
        )  # fmt: skip
        rest = [document for document in documents if document.labels[0] in held]
        say(f"train     {passes} passes over {len(train):,} sentences in {len(groups) - len(held):,} groups")
        model.fit(
            [document.text for document in train],
            [document.labels[0] for document in train],
            validation=([d.text for d in rest], [d.labels[0] for d in rest]) if held else None,
            checkpoint=partial / "training",
            checkpoint_every=100,
        )
        figures: dict[str, Any] = {"sentences": len(documents), "groups": len(groups), "held-out groups": len(held)}
        encoder: Any = model.encoder_
        figures |= {"passes": passes, "characters": len(encoder.vocab)}
        if (report := model.validation_) is not None:
            figures |= {name: round(report[name], 4) for name in (*_RANKING, *_THRESHOLD)}
            say(
                f"evaluate  unseen groups: top-1 {report['top1']:.3f}, top-5 {report['top5']:.3f}; from a cosine of "
                f"{report['best_threshold']:.2f} on, {report['best_coverage']:.0%} are answered, "
                f"{report['best_precision']:.0%} of them rightly"
            )
        model.index([document.text for document in documents], [document.id for document in documents])
        say(f"index     {len(documents):,} sentences")
        finished = partial / "model"
        shutil.rmtree(finished, ignore_errors=True)
        model.save(finished)
        names = [document.labels[0] for document in documents]
        write_json(finished / MANIFEST, {"format": 1, **key, "figures": figures, "groups": names})
        publish(finished, target, partial)
    return target


def _checked(documents: list[Document]) -> list[Document]:
    for document in documents:
        if not document.labels:
            raise ValueError(f"the first label of a document is its group; document {document.id!r} has none")
    kept = [document for document in documents if document.text.strip()]
    if not kept:
        raise ValueError("corpus must hold sentences; got none")
    return kept


class SimilarityModel:
    """A model that ``kexue similarity train`` made.

    Args:
        folder: Its folder.

    Attributes:
        info: Settings and figures of the training.
        estimator: The fitted :class:`kexue.tasks.SentenceSimilarity`.

    Raises:
        WorkspaceError: There is no model, or it cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = marked(self.folder, MANIFEST, "model of sentence similarity", "kexue similarity train FILE --out DIR")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            self._groups: list[str] = found.pop("groups")
            self.info: dict[str, Any] = found
            self.estimator = SentenceSimilarity.load(self.folder)
            if len(self._groups) != len(self.estimator.texts_):
                raise ValueError(f"{len(self.estimator.texts_)} sentences, but {len(self._groups)} groups")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise WorkspaceError(f"{self.folder} cannot be read ({error}); train it again") from error

    @property
    def threshold(self) -> float | None:
        """The cosine that served the held-out groups best; None if none were held out."""
        return self.estimator.threshold_

    def query(self, text: str, k: int = 10, threshold: float | None = None) -> list[Match]:
        """The nearest sentences.

        Args:
            text: The query.
            k: Most results.
            threshold: Least cosine; None: all.

        Returns:
            Nearest first.

        Raises:
            TypeError: The query is not a str.
            ValueError: k below 1.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str; got {type(text).__name__}")
        places, scores = self.estimator.search([text], k, threshold)
        texts, ids = self.estimator.texts_, self.estimator.ids_
        return [
            Match(texts[place], float(score), ids[place], self._groups[place])
            for place, score in zip(places[0].tolist(), scores[0], strict=True)
            if place >= 0
        ]
