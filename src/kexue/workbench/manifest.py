"""The manifest of a workspace: what it is, how it was built, which files belong to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kexue import __version__
from kexue._files import write_json
from kexue.workbench.errors import WorkspaceError

FORMAT = 1
NAME = "manifest.json"
MEASURED = ("evaluate", "summaries")  # steps whose figures have tables
_REBUILD = "build it again with `kexue build ... --out {0} --force`"


def tables(figures: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What a build measured: title -> rows."""
    return {title: rows for step in MEASURED for title, rows in figures.get(step, {}).get("tables", {}).items()}


@dataclass
class Manifest:
    """Content of ``manifest.json``.

    Attributes:
        settings: What the user chose: seed, dimensions, epochs and so on.
        fingerprint: Digest of the documents.
        source: What the corpus was, for people.
        figures: What was counted and measured; equal for equal corpus, settings and machine.
        timings: Step -> seconds of CPU and clock, peak memory in MiB.
        files: Relative path -> size in bytes.
    """

    settings: dict[str, Any]
    fingerprint: str
    source: str
    figures: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, dict[str, float]] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)

    def write(self, folder: Path, leave_out: tuple[str, ...] = ()) -> None:
        """List the files of ``folder`` except ``leave_out`` and write the manifest as the last one."""
        self.files = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in (NAME, *leave_out)
        }
        write_json(folder / NAME, {"format": FORMAT, "kexue": __version__, **self.__dict__})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check the manifest of a workspace.

        Raises:
            WorkspaceError: ``folder`` is missing, is not a workspace, has another format, or is damaged.
        """
        remedy = _REBUILD.format(folder)
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            raise WorkspaceError(f"{folder} {what}; expected a workspace made by `kexue build --out {folder}`")
        path = folder / NAME
        if not path.is_file():
            from kexue.workbench.word_model import REPORT, is_model

            if is_model(folder):
                raise WorkspaceError(
                    f"{folder} is not a kexue workspace but a word model: {folder / REPORT} shows what it holds, and "
                    f"`kexue words` asks it"
                )
            raise WorkspaceError(f"{folder} is not a kexue workspace: it has no {NAME}; give a folder that was built, "
                                 f"or build one with `kexue build --out NEW_FOLDER`")  # fmt: skip
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(value, Mapping) or "format" not in value:
                raise ValueError("no format version")
        except (ValueError, OSError) as error:
            raise WorkspaceError(f"{path} is damaged ({error}); {remedy}") from None
        if value["format"] != FORMAT:
            raise WorkspaceError(
                f"{folder} has format {value['format']!r} (written by kexue {value.get('kexue', '?')}); this is kexue "
                f"{__version__}, which reads format {FORMAT}. Use that version, or {remedy}"
            )
        fields = {"settings", "fingerprint", "source", "figures", "timings", "files"}
        if missing := fields - set(value):
            raise WorkspaceError(f"{path} is damaged (no {', '.join(sorted(missing))}); {remedy}")
        for key in sorted(fields - {"fingerprint", "source"}):
            if not isinstance(value[key], dict):
                raise WorkspaceError(f"{path} is damaged ({key} is no object); {remedy}")
        manifest = cls(**{key: value[key] for key in fields})
        for name, size in manifest.files.items():
            file = folder / name
            if not file.is_file():
                raise WorkspaceError(f"{folder} is damaged: {name} is missing; {remedy}")
            if file.stat().st_size != size:
                raise WorkspaceError(
                    f"{folder} is damaged: {name} has {file.stat().st_size} bytes, expected {size}; {remedy}"
                )
        return manifest
