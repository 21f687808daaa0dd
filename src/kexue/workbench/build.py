"""Build a workspace step by step, in a temporary sibling folder that becomes the workspace when it is complete.

    read -> tokenise -> count -> vectors -> encoder -> index -> evaluate -> summaries -> report

Each finished step is noted in ``state.json``. A build that was interrupted or killed goes on after its last finished
step, inside the encoder's training after its last checkpoint. The workspace that stood there before is untouched until
the new one takes its place.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from kexue import __version__
from kexue._checks import check_int
from kexue._files import recover_directory, replace_directory, write_json
from kexue.corpus import Document, installed_documentation, read_documents
from kexue.workbench import parts, steps
from kexue.workbench.errors import WorkspaceError
from kexue.workbench.lexicon import check_choice_of_words, digest_of_words
from kexue.workbench.manifest import NAME, Manifest
from kexue.workbench.targets import locked

STATE = "state.json"
STATE_FORMAT = 1
# How SQLite, safetensors and numpy, which pass no error number on, say that there is no space.
_FULL = re.compile(r"is full|No space left on device|quota exceeded|\d+ requested and \d+ written", re.I)
STEPS: tuple[tuple[str, Callable[[steps.Context], dict[str, Any]]], ...] = (
    ("tokenise", steps.tokenise),
    ("count", steps.count),
    ("vectors", steps.vectors),
    ("encoder", steps.encoder),
    ("index", steps.index),
    ("evaluate", steps.evaluate),
    ("summaries", steps.summaries),
    ("report", steps.report),
)


@dataclass(frozen=True)
class Settings:
    """What can be chosen about a build; equal settings and corpus give equal figures.

    Args:
        seed: Seed of everything random.
        dim: Width of the document vectors.
        epochs: Passes over the corpus while training the encoder; None lets the size of the corpus decide.
        word_dim: Width of the word vectors.
        window: Words on each side that count as context.
        min_count: Words that occur less often get no word vector; None lets the size of the corpus decide.
        evaluate: Also run the full evaluation, which trains two more encoders.
        words: Where the words of scripts without spaces come from: "auto" (discovered, if at least 5 % of the letters
            belong to such scripts), "discover", "characters", "spaces" (the text is cut into words already), or the
            path of a segmenter or word model.
    """

    seed: int = 0
    dim: int = 256
    epochs: int | None = None
    word_dim: int = 128
    window: int = 10
    min_count: int | None = None
    evaluate: bool = False
    words: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", check_choice_of_words(self.words))
        check_int("seed", self.seed, 0)
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2 ** 32; got {self.seed}")
        for name in ("dim", "word_dim"):
            check_int(name, getattr(self, name), 2)
        check_int("window", self.window, 1)
        for name in ("min_count", "epochs"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)


@dataclass
class _State:
    """Which steps of a partial build are finished."""

    key: str
    fingerprint: str
    source: str
    figures: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> _State | None:
        try:
            value = json.loads((folder / STATE).read_text(encoding="utf-8"))
            return cls(**value["state"]) if value["format"] == STATE_FORMAT else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, folder: Path) -> None:
        write_json(folder / STATE, {"format": STATE_FORMAT, "state": asdict(self)})


def build(
    corpus: Iterable[Document] | str | Path | Iterable[str | Path] | None,
    out: str | Path,
    settings: Settings | None = None,
    *,
    force: bool = False,
    packages: Iterable[str] | None = None,
    read_options: dict[str, Any] | None = None,
    log: Callable[[str], None] | None = None,
) -> Path:
    """Build a workspace; see :meth:`kexue.workbench.Workspace.build` for the arguments.

    Returns:
        The folder of the finished workspace.
    """
    settings = settings or Settings()
    say = log or (lambda line: None)
    target = Path(out).resolve()  # behind a link: the folder itself is replaced, and locked under one name
    if not target.name or target.is_mount():
        raise WorkspaceError(f"cannot build a workspace at {target}, which cannot be replaced; give a folder inside it")
    with locked(target):
        return _build_locked(corpus, target, settings, force, packages, read_options or {}, say)


def _build_locked(
    corpus: Any,
    target: Path,
    settings: Settings,
    force: bool,
    packages: Iterable[str] | None,
    read_options: dict[str, Any],
    say: Callable[[str], None],
) -> Path:
    recover_directory(target)
    occupied = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if occupied and not force:
        raise WorkspaceError(f"{target} exists; choose another folder, or --force to replace it by the new build")
    if occupied and not (target / NAME).is_file():
        raise WorkspaceError(
            f"{target} is not a kexue workspace, so --force does not replace it; choose another folder"
        )
    partial = target.with_name(f".{target.name}.partial")
    documents, source, fingerprint = open_corpus(corpus, packages, read_options)
    # Another version may compute a step otherwise, so it does not go on with what this one has begun.
    settled = [__version__, asdict(settings), digest_of_words(settings.words), source, read_options]
    key = hashlib.sha256(json.dumps(settled, default=str).encode()).hexdigest()
    with explained(partial):
        state = _prepare(partial, key, fingerprint, say)
        state = _read(partial, state, documents, source, key, fingerprint, say)
        context = steps.Context(folder=partial, settings=settings, figures=state.figures, timings=state.timings)
        for name, step in STEPS:
            if name in state.figures:
                say(f"{name:9} done before: {steps.summary(state.figures[name])}")
                continue
            with steps.measured(state.timings, name):
                figures = step(context)
            state.figures[name] = figures
            state.save(partial)
            say(f"{name:9} {steps.summary(figures)}  [{state.timings[name]['cpu_seconds']:.1f} CPU s]")
        return _finish(partial, target, settings, state)


def open_corpus(
    corpus: Any, packages: Iterable[str] | None, read_options: dict[str, Any]
) -> tuple[Iterable[Document], str, str | None]:
    """The documents, what they are in words, and a fingerprint if there is one without reading them."""
    if corpus is None:
        chosen = sorted(packages) if packages is not None else None
        found = installed_documentation(chosen)
        what = "the documentation of " + (", ".join(chosen) if chosen else "the installed packages")
        return found, what, found.fingerprint()
    if packages is not None:
        raise ValueError(f"packages={list(packages)!r} chooses among the installed documentation; it needs corpus=None")
    if isinstance(corpus, str | Path):
        corpus = [corpus]
    if isinstance(corpus, list | tuple) and corpus and all(isinstance(item, str | Path) for item in corpus):
        read = read_documents([Path(item) for item in corpus], **read_options)
        return read, ", ".join(str(item) for item in corpus), read.fingerprint()
    if isinstance(corpus, dict | bytes) or not isinstance(corpus, Iterable):
        raise TypeError(f"corpus must be paths, an iterable of Document, or None; got {type(corpus).__name__}")
    return corpus, "documents given by the program", None


def _prepare(partial: Path, key: str, fingerprint: str | None, say: Callable[[str], None]) -> _State | None:
    """The state of an unfinished build of the same corpus with the same settings, or None after cleaning up."""
    state = _State.load(partial)
    if state is not None and state.key == key and fingerprint in (None, state.fingerprint):
        return state
    if partial.exists():
        if state is not None:
            say("an unfinished build of another corpus, other settings or another version was found; starting over")
        shutil.rmtree(partial)
    partial.mkdir()
    return None


def _read(
    partial: Path,
    state: _State | None,
    documents: Iterable[Document],
    source: str,
    key: str,
    fingerprint: str | None,
    say: Callable[[str], None],
) -> _State:
    """Copy the documents into the store, unless an earlier build has done so."""
    if state is not None and fingerprint is not None and "read" in state.figures:
        say(f"read      done before: {steps.summary(state.figures['read'])}")
        return state
    fresh = _State(key=key, fingerprint=fingerprint or "", source=source)
    with steps.measured(fresh.timings, "read"):
        figures, content = steps.read(partial, documents)
    if fingerprint is None:
        # Documents that come from a program have to be read to know whether they are the same as before.
        fresh.fingerprint = content
        if state is not None and state.fingerprint == content:
            if "tokenise" in state.figures:
                del state.figures["tokenise"]  # the word index lay in the file that was just written anew
            state.timings.update(fresh.timings)
            fresh = state
        elif state is not None:
            say("an unfinished build of another corpus was found; starting over")
            _remove_all_but(partial, parts.DOCUMENTS)
    fresh.figures["read"] = figures
    fresh.save(partial)
    say(f"read      {steps.summary(figures)}  [{fresh.timings['read']['cpu_seconds']:.1f} CPU s]")
    return fresh


def _remove_all_but(folder: Path, kept: str) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != kept:
            path.unlink()


def _finish(partial: Path, target: Path, settings: Settings, state: _State) -> Path:
    steps.clean(partial)
    manifest = Manifest(
        settings=asdict(settings),
        fingerprint=state.fingerprint,
        source=state.source,
        figures=state.figures,
        timings=state.timings,
    )
    manifest.write(partial, leave_out=(STATE,))
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    replace_directory(partial, target)
    (target / STATE).unlink(missing_ok=True)  # only now: until here a killed build finds all its steps finished
    return target


@contextmanager
def explained(partial: Path) -> Any:
    """Turn a full disk into a message that says what is kept."""
    try:
        yield
    except (OSError, sqlite3.OperationalError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if not full and not _FULL.search(str(error)):
            raise
        raise WorkspaceError(
            f"the disk is full ({error}); nothing that stood there before was touched. Finished steps are kept in "
            f"{partial}: free some space and run the same command again to continue"
        ) from error
