"""A finished workspace: search, related documents, related words, figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kexue import __version__
from kexue._files import recover_directory
from kexue.workbench.manifest import MEASURED, Manifest, tables
from kexue.workbench.parts import DAMAGE, Parts, damaged
from kexue.workbench.search import Searcher

if TYPE_CHECKING:
    from kexue.corpus import Document
    from kexue.workbench.summary_text import Summary


class Workspace(Searcher):
    """What ``kexue build`` made: open it, ask it.

    Args:
        folder: The folder of the workspace. Use :meth:`open` or :meth:`build`.

    Example:
        >>> import tempfile, os
        >>> from kexue.corpus import Document
        >>> texts = ["cats purr and sleep", "dogs bark at cats", "cars need petrol", "petrol and oil for cars"]
        >>> corpus = [Document(str(i), text) for i, text in enumerate(texts)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     workspace = Workspace.build(corpus, os.path.join(folder, "pets"), epochs=2)
        ...     [hit.id for hit in workspace.search("barking dogs", k=1)]
        ['1']
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        recover_directory(self.folder)
        self.manifest, parts = _load(self.folder)
        super().__init__(parts)

    @classmethod
    def build(
        cls,
        corpus: Iterable[Document] | str | Path | Iterable[str | Path] | None = None,
        out: str | Path = "workspace",
        *,
        force: bool = False,
        packages: Iterable[str] | None = None,
        evaluate: bool = False,
        seed: int = 0,
        epochs: int | None = None,
        dim: int = 256,
        words: str = "auto",
        read_options: Mapping[str, Any] | None = None,
        log: Callable[[str], None] | None = None,
    ) -> Workspace:
        """Build a workspace and open it.

        Args:
            corpus: Documents, a path or several paths (see :func:`kexue.corpus.read_documents`), or None for the
                documentation of the installed packages.
            out: The new folder. A build that was interrupted continues when it is called again with the same arguments.
            force: Replace ``out`` when the new build is complete; without it an existing folder is refused.
            packages: With ``corpus=None``, the packages whose documentation is read.
            evaluate: Also run the full evaluation, which trains two more encoders on halves of the corpus.
            seed: Seed of everything random: equal corpus, settings and machine give equal figures.
            epochs: Passes of the encoder over the corpus; None lets its size decide.
            dim: Width of the document vectors.
            words: Where the words of scripts without spaces come from: "auto" discovers them if at least 5 % of the
                letters belong to such scripts; "discover" does always; "characters" takes characters and pairs of them;
                "spaces" is for text that is cut into words already; else the path of a segmenter or word model.
            read_options: Passed to :func:`kexue.corpus.read_documents`.
            log: Called with one line for each finished step.

        Returns:
            The opened workspace.

        Raises:
            WorkspaceError: ``out`` exists, another build into it is running, or the disk is full.
            ValueError: the corpus holds no documents, or two with the same id.
        """
        from kexue.workbench.build import Settings
        from kexue.workbench.build import build as build_workspace

        settings = Settings(seed=seed, epochs=epochs, dim=dim, evaluate=evaluate, words=words)
        folder = build_workspace(
            corpus,
            out,
            settings,
            force=force,
            packages=packages,
            read_options=dict(read_options or {}),
            log=log,
        )
        return cls(folder)

    @classmethod
    def open(cls, folder: str | Path) -> Workspace:
        """Open a finished workspace.

        Args:
            folder: What was given as ``out`` to the build.

        Raises:
            WorkspaceError: the folder is missing, not a workspace, of another version, or damaged; the message says
                which and what to do.
        """
        return cls(folder)

    def summarize(
        self, text: str, length: int | None = None, *, pieces: int | None = None, method: str = "auto"
    ) -> str:
        """Summarise a text by pieces of it; :meth:`summary` also tells where they stand.

        Args:
            text: The text.
            length: Most characters; None: as was learned, or a fifth of the text, at least 200 and at most 600. At
                least one piece is taken.
            pieces: Most pieces; None: as many as fit.
            method: "trained" is what the build learned from texts that bring their own summaries (documentation does),
                kept only if it was better than the vectors on modules that were held back;
                "vectors" takes the sentences that are nearest to the whole text and do not repeat each other, and
                favours the opening; "auto" is the first if there is one and the text is of the kind of language
                that it learned from (words with spaces between them, or Chinese), else the second.

        Returns:
            The summary; empty only if the text is blank.

        Raises:
            TypeError: The text is not a str.
            ValueError: ``method="trained"`` without anything learned, a length or a number of pieces below 1.
        """
        return self.summary(text, length, pieces=pieces, method=method).text

    def summary(
        self, text: str, length: int | None = None, *, pieces: int | None = None, method: str = "auto"
    ) -> Summary:
        """Summarise a text as :meth:`summarize` does, and tell which pieces of it were taken."""
        from kexue.workbench.summary_extract import summarize_by_model
        from kexue.workbench.summary_text import check_request
        from kexue.workbench.summary_vectors import summarize_by_vectors

        check_request(text, length, pieces, method)
        model = None if method == "vectors" else self._parts.summarizer
        if model is not None:
            from kexue.tasks._summary_data import language_of

            if method == "trained" or language_of("auto", [text])[0] == model.unit_:
                return summarize_by_model(model, text, length, pieces)
        if method == "trained":
            raise ValueError(
                f"{self.folder} has no summarizer of its own: its texts bring too few summaries, or what was learned "
                "from them was no better than the vectors, or an earlier version built it; use method 'vectors', or "
                "learn one from pairs with `kexue summarize train`"
            )
        return summarize_by_vectors(self._parts, text, length, pieces)

    def close(self) -> None:
        """Close the files; after that nothing can be asked. ``with Workspace.open(folder) as space`` does it too."""
        self._parts.store.close()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def info(self) -> dict[str, Any]:
        """Source, settings, figures, evaluation, and timings of the workspace, JSON-compatible."""
        figures = dict(self.manifest.figures)
        evaluation = tables(figures)
        for step in MEASURED:
            if step in figures:
                figures[step] = {key: value for key, value in figures[step].items() if key != "tables"}
        return {
            "folder": str(self.folder),
            "kexue": __version__,
            "source": self.manifest.source,
            "documents": len(self),
            "settings": self.manifest.settings,
            "figures": figures,
            "evaluation": evaluation,
            "timings": self.manifest.timings,
        }

    def report(self) -> Path:
        """Path of the report page."""
        return self.folder / "report.html"


def _load(folder: Path) -> tuple[Manifest, Parts]:
    """Open the files of a workspace; again, if a build has put a new one in its place meanwhile."""
    before = _identity(folder)
    try:
        manifest = Manifest.read(folder)
        parts = Parts.load(folder)
    except DAMAGE as error:
        if _identity(folder) != before:
            return _load(folder)
        raise damaged(folder, error) from error
    if _identity(folder) != before:
        parts.store.close()
        return _load(folder)
    return manifest, parts


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
