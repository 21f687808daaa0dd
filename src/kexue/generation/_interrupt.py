"""Ctrl-C during a chain: the step is finished and what was collected is kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupt:
    """Whether Ctrl-C came."""

    came = False


@contextmanager
def noted_interrupt() -> Iterator[Interrupt]:
    """Note the first Ctrl-C, so that no step is cut in two; a second one raises KeyboardInterrupt at once.

    Only where Python's own handler is in force: in the main thread, and if the program has not set another.
    """
    flag = Interrupt()
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield flag
        return

    def handle(*_: object) -> None:
        if flag.came:
            raise KeyboardInterrupt
        flag.came = True

    signal.signal(signal.SIGINT, handle)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
