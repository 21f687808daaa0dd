"""Tasks for the tests of executors, importable by worker processes."""

import os
import signal
import time
from pathlib import Path

from kexue.words._executors import check_wanted


def die_once(path, flag):
    """Kill the worker on the first call, write the file on the second."""
    if not os.path.exists(flag):
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    Path(path).write_text("done")


def die_always(path):
    """Kill the worker."""
    os.kill(os.getpid(), signal.SIGKILL)


def bad_value(path):
    """Fail as on bad input."""
    raise ValueError("bad bytes")


def until_unwanted(path, note):
    """Work until the count is given up; note that it began, and how it ended."""
    Path(note).write_text("begun")
    try:
        for _ in range(2000):
            check_wanted()
            time.sleep(0.01)
    except BaseException as error:
        Path(note).write_text(type(error).__name__)
        raise


def bad_value_after(path, note):
    """Fail as on bad input, once the other task has begun."""
    while not os.path.exists(note):
        time.sleep(0.01)
    raise ValueError("bad bytes")
