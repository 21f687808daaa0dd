"""SIGINT and SIGTERM during training: the step is finished and saved before anything stops."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

__all__ = ["TrainingInterrupted"]


class TrainingInterrupted(KeyboardInterrupt):
    """Raised by :func:`kexue.training.fit` after it has saved because of SIGINT (Ctrl-C) or SIGTERM.

    It is a KeyboardInterrupt, so that ``except Exception`` does not go on with a half-trained model. A command line
    program ends with ``sys.exit(error.exit_code)``; calling ``fit`` again with the same arguments continues.

    Args:
        number: Number of the signal.
        step: Steps that are done and saved.
        checkpoint: Folder of the checkpoint.

    Attributes:
        number: Number of the signal.
        step: Steps that are done and saved.
        checkpoint: Folder of the checkpoint.
        exit_code: 130 after SIGINT (the user broke off), 0 after SIGTERM (an orderly stop was asked for and done).

    Example:
        >>> error = TrainingInterrupted(signal.SIGINT, 20, Path("run/step-20"))
        >>> error.exit_code, str(error)
        (130, 'training stopped by SIGINT after step 20, which is saved in run/step-20; run it again to continue')
    """

    def __init__(self, number: int, step: int, checkpoint: Path) -> None:
        super().__init__(
            f"training stopped by {signal.Signals(number).name} after step {step}, which is saved in "
            f"{checkpoint.as_posix()}; run it again to continue"
        )
        self.number = int(number)
        self.step = step
        self.checkpoint = checkpoint
        self.exit_code = 0 if number == signal.SIGTERM else 130


class Signals:
    """What :func:`deferred_signals` yields: the signal that came, or None, and whether it was acted upon."""

    received: int | None = None
    answered = False


@contextmanager
def deferred_signals() -> Iterator[Signals]:
    """Note SIGINT and SIGTERM instead of acting on them; a second SIGINT raises KeyboardInterrupt at once.

    Handlers can be set in the main thread only; elsewhere, and for a signal that the caller ignores (nohup), nothing
    changes. The caller's handlers come back at the end of the block, and get a signal that came too late for it.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        if signals.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        signals.received = number
        if sys.stderr.isatty():
            print("\nfinishing the step and saving; press Ctrl-C again to stop at once", file=sys.stderr)

    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                previous[number] = signal.signal(number, handle)
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if signals.received is not None and not signals.answered:
        signal.raise_signal(signals.received)
