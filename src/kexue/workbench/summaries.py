"""Learn to summarise from one's own pairs of a text and its summary, and summarise: ``kexue summarize``.

    read -> pairs held out -> summarizer trained on the others -> compared with the opening and TextRank on those

An interrupted or killed run goes on where it was; the model that stood there before is untouched until the new one
takes its place.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kexue import __version__
from kexue._checks import check_choice, check_int, check_real
from kexue._files import write_json
from kexue.corpus import Document, DocumentReader, read_documents
from kexue.workbench.build import explained
from kexue.workbench.errors import WorkspaceError
from kexue.workbench.manifest import NAME
from kexue.workbench.summary_evaluation import baselines, evaluate_summaries, usual_pieces
from kexue.workbench.summary_extract import summarize_by_model
from kexue.workbench.summary_pairs import Pair, read_pairs
from kexue.workbench.summary_text import METHODS, Summary, check_request, unwrapped
from kexue.workbench.targets import begin, check_free, locked, marked, publish, resolved

if TYPE_CHECKING:
    from kexue.tasks import Summarizer

__all__ = [
    "MANIFEST",
    "METHODS",
    "SummaryModel",
    "SummarySettings",
    "open_summarizer",
    "summarize_files",
    "train_summaries",
]

MANIFEST = "summaries.json"  # beside what Summarizer saves
_LANGUAGES = ("auto", "zh", "en")
_FEWEST = 5  # held-out pairs below which no figure means anything


@dataclass(frozen=True)
class SummarySettings:
    """What can be chosen; equal settings and pairs give equal models on one machine.

    Args:
        language: Where texts are cut into pieces: "zh", "en" or "auto".
        extract_only: True: summaries are pieces of the text; False: a generator rewrites them; "auto": the generator,
            if it is better on pairs that are held out for that.
        folds: Parts of the pairs that are extracted by models of the other parts.
        epochs: Passes over the pairs.
        encoder: Features of the pieces: "hash", or the folder of a local BERT checkpoint.
        held_out: Share of the pairs that nothing is learned from, on which the model is compared with others.
        seed: Seed of everything random.

    Raises:
        ValueError: A value out of range.

    Example:
        >>> SummarySettings().folds
        5
    """

    language: str = "auto"
    extract_only: str | bool = "auto"
    folds: int = 5
    epochs: int = 20
    encoder: str = "hash"
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("language", self.language, _LANGUAGES)
        if not isinstance(self.extract_only, bool) and self.extract_only != "auto":
            raise ValueError(f"extract_only must be True, False or 'auto'; got {self.extract_only!r}")
        check_int("folds", self.folds, 2)
        check_int("epochs", self.epochs, 1)
        if self.encoder != "hash" and not Path(self.encoder).is_dir():
            raise ValueError(f"encoder must be 'hash' or the folder of a BERT checkpoint; got {self.encoder!r}")
        check_real("held_out", self.held_out, minimum=0.0)
        if self.held_out > 0.5:
            raise ValueError(f"held_out must be at most 0.5; got {self.held_out}")
        check_int("seed", self.seed, 0)
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2 ** 63; got {self.seed}")


def hold_out(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """The pairs to learn from and those held out; none of these if too few would be left to learn from or to measure.

    Pairs with the same text or the same summary stand on one side.
    """
    least = 5 * _FEWEST
    if not share or len(pairs) < least:
        return list(pairs), []
    count = max(round(share * len(pairs)), _FEWEST)
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    held: set[int] = set()
    texts: set[str] = set()
    summaries: set[str] = set()
    for i in order[:count]:
        held.add(i)
        texts.add(pairs[i].text)
        summaries.add(pairs[i].summary)
    # What repeats a held-out text or summary would be learned by heart; it goes, unless it is held out itself.
    rest = [
        pair
        for i, pair in enumerate(pairs)
        if i not in held and pair.text not in texts and pair.summary not in summaries
    ]
    return (rest, [pairs[i] for i in sorted(held)]) if len(rest) >= least - _FEWEST else (list(pairs), [])


def train_summaries(
    corpus: Iterable[Pair] | str | Path | Sequence[str | Path],
    out: str | Path,
    settings: SummarySettings | None = None,
    *,
    force: bool = False,
    read_options: Mapping[str, Any] | None = None,
    log: Callable[[str], None] | None = None,
) -> Path:
    """Train a summarizer; called again after an interruption, it continues.

    Args:
        corpus: Paths, or :class:`~kexue.workbench.summary_pairs.Pair` objects.
        out: The new folder.
        settings: What can be chosen.
        force: Replace a model of summaries that stands at ``out``.
        read_options: As for :func:`~kexue.workbench.summary_pairs.read_pairs`.
        log: Takes a line about each step.

    Returns:
        The folder of the finished model.

    Raises:
        WorkspaceError: ``out`` exists and is not to be replaced, or another run is writing it.
        ValueError: A setting out of range, or too few pairs.
        KeyboardInterrupt: After Ctrl-C, when everything is saved.
    """
    settings, say = settings or SummarySettings(), log or (lambda line: None)
    target = resolved(out)
    partial = target.with_name(f".{target.name}.partial")
    with locked(target), explained(partial):
        check_free(target, MANIFEST, "model of summaries", force)
        pairs, left_out = _pairs(corpus, dict(read_options or {}))
        for line in left_out[:5]:
            say(f"left out  {line}")
        if len(left_out) > 5:
            say(f"left out  {len(left_out) - 5:,} more")
        train, held = hold_out(pairs, settings.held_out, settings.seed)
        different = len({unwrapped(pair.text) for pair in train})
        if different < 2:
            raise ValueError(f"a summarizer is learned from at least two pairs of different texts; got {different}")
        kept = f"; {len(held):,} held out" if held else "; too few to hold any out" if settings.held_out else ""
        if repeated := len(pairs) - len(train) - len(held):
            kept += f", {repeated:,} that repeat their text or summary not learned from"
        say(f"read      pairs {len(pairs):,}{kept}")
        digest = hashlib.sha256()
        for pair in pairs:
            digest.update(repr((pair.text, pair.summary)).encode("utf-8", "replace"))
        key = {"kexue": __version__, "settings": asdict(settings), "pairs": digest.hexdigest()}
        begin(partial, key, "pairs", say)
        folds = min(settings.folds, different)
        model = fitted(train, settings, folds, partial / "training")
        generator = "used" if model.uses_generator_ else "not used"
        say(f"train     pairs {len(train):,}, folds {folds}, epochs {settings.epochs}; generator {generator}")
        rows = compared(model, train, held) if held else []
        if rows:
            say("evaluate  held-out pairs: " + ", ".join(f"{row['name']} {row['main']:.3f}" for row in rows))
        figures = {"pairs": len(pairs), "held-out pairs": len(held), "generator": generator}
        finished = partial / "model"
        shutil.rmtree(finished, ignore_errors=True)
        model.save(finished)
        write_json(finished / MANIFEST, {"format": 1, **key, "figures": figures, "evaluation": rows})
        publish(finished, target, partial)
    return target


def _pairs(corpus: Any, options: dict[str, Any]) -> tuple[list[Pair], list[str]]:
    given: list[Any] = [corpus] if isinstance(corpus, str | Path) else list(corpus)
    if given and all(isinstance(item, Pair) for item in given):
        if options:
            raise ValueError(f"options of the reader are for paths; got {', '.join(options)} with pairs")
        return [pair for pair in given if pair.text.strip() and pair.summary.strip()], []
    if not given or not all(isinstance(item, str | Path) for item in given):
        raise TypeError(f"corpus must be paths or Pair objects, at least one; got {given[:1]!r}")
    return read_pairs(given, **options)


def fitted(
    pairs: Sequence[Pair], settings: SummarySettings, folds: int, checkpoint: Path, encoder: Any = None
) -> Summarizer:
    """A summarizer trained on pairs, going on where an earlier run into ``checkpoint`` was.

    Args:
        pairs: What it learns from.
        settings: How.
        folds: Instead of that of the settings.
        checkpoint: Folder of the run.
        encoder: Instead of that of the settings.
    """
    from kexue.tasks import Summarizer

    model = Summarizer(
        language=settings.language, extract_only=settings.extract_only, folds=folds, epochs=settings.epochs,
        encoder=encoder or settings.encoder, random_state=settings.seed,
    )  # fmt: skip
    model.fit([unwrapped(p.text) for p in pairs], [p.summary for p in pairs], checkpoint=checkpoint)
    return model


def compared(
    model: Summarizer, train: Sequence[Pair], held: Sequence[Pair], others: Mapping[str, Sequence[str]] | None = None
) -> list[dict[str, Any]]:
    """The summarizer beside what learns nothing, on held-out pairs; see :func:`evaluate_summaries`."""
    texts, references = [pair.text for pair in held], [pair.summary for pair in held]
    found = baselines(texts, model.language, usual_pieces([pair.summary for pair in train], model.language))
    found |= {name: list(summaries) for name, summaries in (others or {}).items()}
    found["summarizer"] = list(model.predict([unwrapped(text) for text in texts]))
    return evaluate_summaries(found, references, model.unit_)


class CanSummarize(Protocol):
    """A :class:`SummaryModel` or a :class:`~kexue.workbench.Workspace`."""

    def summary(
        self, text: str, length: int | None = None, *, pieces: int | None = None, method: str = "auto"
    ) -> Summary:
        """Summarise a text."""


class SummaryModel:
    """A model that ``kexue summarize train`` made.

    Args:
        folder: Its folder.

    Attributes:
        info: Settings, figures and evaluation of the training.
        estimator: The fitted :class:`kexue.tasks.Summarizer`.

    Raises:
        WorkspaceError: There is no model, or it cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        from kexue.tasks import Summarizer

        self.folder = Path(folder)
        path = marked(self.folder, MANIFEST, "model of summaries", "kexue summarize train PAIRS --out DIR")
        try:
            self.info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if self.info["format"] != 1:
                raise ValueError(f"format {self.info['format']!r}, expected 1")
            self.info["figures"], self.info["evaluation"]
            self.estimator = Summarizer.load(self.folder)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise WorkspaceError(f"{self.folder} cannot be read ({error}); train it again") from error

    def summary(
        self, text: str, length: int | None = None, *, pieces: int | None = None, method: str = "auto"
    ) -> Summary:
        """Summarise a text.

        Args:
            text: The text.
            length: Most characters; None: as was learned. At least one piece is taken.
            pieces: Most pieces; None: as was learned.
            method: "auto" or "trained".

        Raises:
            ValueError: ``method="vectors"``, which needs a workspace.
        """
        check_request(text, length, pieces, method)
        if method == "vectors":
            raise ValueError(f"{self.folder} is a trained model, which has no vectors; method must be auto or trained")
        return summarize_by_model(self.estimator, text, length, pieces)


def open_summarizer(folder: str | Path) -> CanSummarize:
    """The model or workspace of a folder.

    Raises:
        WorkspaceError: It is neither, or cannot be read.
    """
    from kexue.workbench.workspace import Workspace

    path = Path(folder)
    if (path / MANIFEST).is_file() and not (path / NAME).is_file():
        return SummaryModel(path)
    if (path / NAME).is_file():
        return Workspace.open(path)
    what = "does not exist" if not path.exists() else "is a file" if path.is_file() else "is neither of the two"
    raise WorkspaceError(
        f"{path} {what}; expected a model made by `kexue summarize train PAIRS --out DIR` or a workspace made by "
        "`kexue build --out DIR`"
    )


def summarize_files(
    summarizer: CanSummarize,
    paths: Sequence[str | Path],
    *,
    length: int | None = None,
    pieces: int | None = None,
    method: str = "auto",
    read_options: Mapping[str, Any] | None = None,
    log: Callable[[str], None] | None = None,
) -> Iterator[tuple[str, Summary]]:
    """Summaries of files as they are read: one for a text, one for each record of other formats.

    Args:
        summarizer: What :func:`open_summarizer` gave.
        paths: Files and folders.
        length: As for :meth:`SummaryModel.summary`.
        pieces: As there.
        method: As there, or "vectors" of a workspace.
        read_options: As for :func:`kexue.corpus.read_documents`.
        log: Takes a line about what was left out.

    Yields:
        Id and summary; a record without text is left out.

    Raises:
        FileNotFoundError: A path does not exist; nothing is summarised then.
        ValueError: What cannot be read, unless ``read_options`` has ``on_error="skip"`` and something else can.
    """
    options = {"split": "file", "max_chars": None, **(read_options or {})}
    readers = [read_documents(path, **options) for path in paths]
    found = False
    for reader in readers:
        last = reader is readers[-1]
        for document in _read(reader, options.get("on_error") == "skip" and (found or not last)):
            found = True
            yield document.id, summarizer.summary(document.text, length, pieces=pieces, method=method)
        if log is not None:
            for where, why in reader.skipped[:5]:
                log(f"left out: {where}: {why}")
            if reader.skipped_count > 5:
                log(f"left out: {reader.skipped_count - 5:,} more")


def _read(reader: DocumentReader, lenient: bool) -> Iterator[Document]:
    """The documents of a reader; if that is lenient, also none."""
    try:
        yield from reader
    except ValueError:
        if not lenient:
            raise
