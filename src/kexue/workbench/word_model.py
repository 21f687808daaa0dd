"""A word model: a folder with what was learned about the words of a text, one part after the other.

    segmenter.json   the vocabulary            made by `kexue words vocabulary`
    phrases.json     phrases                   `kexue words phrases`
    templates.json   sentence templates        `kexue words templates`
    parses.jsonl     the parsed sentences      `kexue words parse`
    vectors/         word vectors              `kexue words vectors`
    model.json       format version; how each part was made
    report.html      all of it for reading

Each command adds a part or replaces one. The folder is exchanged as a whole (unchanged files are linked, not copied),
so that whatever happens there stands either the model of before or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from kexue import __version__
from kexue._files import recover_directory, replace_directory, write_json
from kexue.workbench.errors import WorkspaceError
from kexue.workbench.lexicon import SEGMENTER, load_segmenter
from kexue.workbench.manifest import NAME as MANIFEST
from kexue.workbench.word_tokens import WordTokenizer, split_spaces

if TYPE_CHECKING:
    from kexue.words import PMIEmbedding, Segmenter

FORMAT, VERSION = "kexue.word_model", 1
NOTES, REPORT = "model.json", "report.html"
FILES = {
    "vocabulary": SEGMENTER,
    "phrases": "phrases.json",
    "templates": "templates.json",
    "parses": "parses.jsonl",
    "vectors": "vectors",
}
_MADE_BY = {"parses": "parse"}


class WordModel:
    """Open a word model and use its parts. Use :meth:`open`, or :meth:`writing` to add a part.

    Attributes:
        folder: Where it lies.
        notes: Part -> how it was made: settings, corpus, figures, seconds.

    Example:
        >>> import pathlib, tempfile
        >>> from kexue.words import Segmenter
        >>> folder = pathlib.Path(tempfile.mkdtemp()) / "model"
        >>> with WordModel.writing(folder) as model:
        ...     model.put("vocabulary", Segmenter({"平方": 2, "根": 1}).save, {"settings": {}})
        >>> WordModel.open(folder).tokenizer()("平方根")
        ['平方', '根']
    """

    def __init__(self, folder: Path, notes: Mapping[str, Mapping[str, Any]]) -> None:
        self.folder = folder
        self.notes: dict[str, dict[str, Any]] = {name: dict(note) for name, note in notes.items()}

    def __repr__(self) -> str:
        return f"WordModel({str(self.folder)!r}, parts={', '.join(self.notes) or 'none'})"

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> WordModel:
        """Open a model that exists.

        Raises:
            WorkspaceError: It does not exist, is something else, of another version, or damaged.
        """
        path = Path(folder).resolve()
        recover_directory(path)
        if not is_model(path):
            what = "is not a word model" if path.exists() else "does not exist"
            raise WorkspaceError(
                f"{folder} {what}{_what_else(path)}; expected a folder made by `kexue words vocabulary` or its like"
            )
        try:
            value = json.loads((path / NOTES).read_text(encoding="utf-8"))
            version, notes = value["version"], value["parts"]
            if not isinstance(notes, dict):
                raise TypeError("parts is no object")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WorkspaceError(f"{path / NOTES} is damaged ({error}); make the model again") from None
        if version != VERSION:
            raise WorkspaceError(
                f"{folder} has word model format {version!r} (written by kexue {value.get('kexue', '?')}); this is "
                f"kexue {__version__}, which reads format {VERSION}"
            )
        missing = [FILES[name] for name in notes if name in FILES and not (path / FILES[name]).exists()]
        if missing:
            raise WorkspaceError(f"{folder} is damaged: {missing[0]} is missing; make that part again")
        return cls(path, notes)

    @classmethod
    @contextmanager
    def writing(cls, folder: str | os.PathLike[str]) -> Iterator[WordModel]:
        """Open a model to add parts to it, or begin a new one; nothing appears before the first part is complete.

        Raises:
            WorkspaceError: Something else stands there, or another command is writing into it.
        """
        path = Path(folder).resolve()
        if not path.name or path.is_mount():
            raise WorkspaceError(
                f"cannot make a word model at {path}, which cannot be replaced; give a folder inside it"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise WorkspaceError(
                f"another command is writing into {folder} (it holds {lock.lock_file}); wait for it"
            ) from None
        try:
            recover_directory(path)
            if path.exists() and not is_model(path) and not (path.is_dir() and not any(path.iterdir())):
                raise WorkspaceError(
                    f"{folder} exists and is not a word model{_what_else(path)}, so it is not touched; choose another"
                )
            shutil.rmtree(_staging(path), ignore_errors=True)
            yield cls.open(path) if is_model(path) else cls(path, {})
        finally:
            lock.release()

    def put(self, part: str, save: Callable[[Path], Any], note: Mapping[str, Any]) -> None:
        """Add or replace a part.

        Args:
            part: One of :data:`FILES`.
            save: Writes the part to the path that it is given.
            note: How it was made.
        """
        staging = _staging(self.folder)
        shutil.rmtree(staging, ignore_errors=True)
        try:
            if self.folder.is_dir():
                shutil.copytree(self.folder, staging, copy_function=_link)
            else:
                staging.mkdir()
            target = staging / FILES[part]
            if target.is_dir():
                shutil.rmtree(target)
            target.unlink(missing_ok=True)
            save(target)
            notes = {name: self.notes[name] for name in FILES if name in self.notes and name != part}
            notes[part] = {"kexue": __version__, **note}
            notes = {name: notes[name] for name in FILES if name in notes}
            write_json(staging / NOTES, {"format": FORMAT, "version": VERSION, "kexue": __version__, "parts": notes})
            if self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()
            replace_directory(staging, self.folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        self.notes = notes
        for name in ("segmenter", "vectors", "phrases", "templates"):
            self.__dict__.pop(name, None)

    def need(self, part: str) -> Path:
        """The path of a part.

        Raises:
            WorkspaceError: The model does not have it; the message says which command makes it.
        """
        if part not in self.notes:
            raise WorkspaceError(
                f"{self.folder} has no {part}; make them with `kexue words {_MADE_BY.get(part, part)} CORPUS --out "
                f"{self.folder}`"
            )
        return self.folder / FILES[part]

    @cached_property
    def segmenter(self) -> Segmenter | None:
        """The vocabulary as a segmenter, or None."""
        return load_segmenter(self.need("vocabulary")) if "vocabulary" in self.notes else None

    @cached_property
    def vectors(self) -> PMIEmbedding:
        """The word vectors; WorkspaceError if there are none."""
        from kexue.words import PMIEmbedding

        return PMIEmbedding.load(self.need("vectors"))

    @cached_property
    def phrases(self) -> Any:
        """The fitted PhraseMiner; WorkspaceError if there is none."""
        from kexue.words import PhraseMiner

        return PhraseMiner.load(self.need("phrases"))

    @cached_property
    def templates(self) -> Any:
        """The fitted TemplateMiner; WorkspaceError if there is none."""
        from kexue.words import TemplateMiner

        return TemplateMiner.load(self.need("templates"))

    def tokenizer(self, kind: str | None = None, part: str | None = None) -> Callable[[str], list[str]]:
        """What cuts text into the words that the parts of this model are made of.

        Args:
            kind: "words", "spaces" or "characters"; None takes that of ``part``.
            part: The part whose tokenizer is asked for; None takes words.
        """
        if kind is None:
            kind = self.notes.get(part or "", {}).get("settings", {}).get("tokenizer", "words")
        if kind == "spaces":
            return split_spaces
        return WordTokenizer(self.segmenter if kind == "words" else None)

    def lexicon(self) -> str | None:
        """A digest of the vocabulary, to tell which parts were made with an earlier one."""
        path = self.folder / SEGMENTER
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if "vocabulary" in self.notes else None

    def stale(self) -> list[str]:
        """Parts that were made with another vocabulary than the one the model has now."""
        now = self.lexicon()
        return [
            name
            for name, note in self.notes.items()
            if note.get("settings", {}).get("tokenizer") == "words" and note["settings"].get("lexicon") != now
        ]


def is_model(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a folder with a word model (of any version)."""
    file = Path(path) / NOTES
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and value.get("format") == FORMAT


def _what_else(path: Path) -> str:
    if (path / MANIFEST).is_file():
        return " but a workspace of `kexue build`"
    return " but a file" if path.is_file() else ""


def _staging(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _link(source: str, target: str) -> None:
    """A second name for a file that is never changed in place; a copy where the file system has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
