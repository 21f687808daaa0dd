"""The metrics file of a run: one JSON line for each step, without gaps or repeats after a crash."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from kexue._files import atomic_path


class MetricsLog:
    """Append to ``path``, after dropping what was written beyond ``step``.

    A run that is killed has written lines that its last checkpoint does not know; they are computed again after
    resuming, so they are cut off here, with any half line. ``losses`` are those of the lines that stay. Without a path
    (on the ranks that do not write) the losses are only collected.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        self.losses: list[float] = []
        self._file: io.FileIO | None = None
        if path is None:
            return
        kept: list[bytes] = []
        for line, record in _records(path, step):
            kept.append(line)
            self.losses.append(record["loss"])
        content = b"".join(kept)
        if not path.exists() or path.stat().st_size != len(content):
            with atomic_path(path) as temporary:
                temporary.write_bytes(content)
        # Unbuffered: a line is in the hands of the system when write() returns, and a full disk shows at once.
        self._file = io.FileIO(path, "ab")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append the record of one step."""
        if self._file is not None:
            rest = json.dumps(record, allow_nan=False).encode() + b"\n"
            while rest:  # a write that comes up short is followed by one that says why
                rest = rest[self._file.write(rest) :]
        self.losses.append(record["loss"])

    def sync(self) -> None:
        """Bring all lines to the disk, before a checkpoint says that their steps are done."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def _records(path: Path, step: int) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Whole lines of steps up to ``step``, in rising order."""
    if not path.exists():
        return
    last = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
                number, loss = record["step"], record["loss"]
            except (ValueError, KeyError, TypeError):
                continue
            if line.endswith(b"\n") and last < number <= step and isinstance(loss, float):
                last = number
                yield line, record
