"""Progress bars on standard error, silent when it is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Bar:
    """What :func:`progress` yields: call :meth:`advance` as work is done."""

    def __init__(self, update: object | None = None) -> None:
        self._update = update

    def advance(self, amount: float = 1.0, note: str | None = None) -> None:
        """Report ``amount`` more units of work and optionally a short note such as the loss."""
        if callable(self._update):
            self._update(amount, note)


@contextmanager
def progress(label: str, total: float | None = None, enabled: bool | None = None) -> Iterator[Bar]:
    """Show a progress bar while the block runs.

    Args:
        label: What is being done.
        total: Units of work; None when unknown.
        enabled: None shows the bar only if standard error is a terminal.
    """
    if enabled is None:
        enabled = sys.stderr.isatty()
    if not enabled:
        yield Bar()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as view:
        task = view.add_task(label, total=total, note="")

        def update(amount: float, note: str | None) -> None:
            if note is None:
                view.update(task, advance=amount)
            else:
                view.update(task, advance=amount, note=note)

        yield Bar(update)


def track(items: Iterable[T], label: str, total: float | None = None, enabled: bool | None = None) -> Iterator[T]:
    """Iterate over ``items`` with a progress bar."""
    with progress(label, total, enabled) as bar:
        for item in items:
            yield item
            bar.advance()
