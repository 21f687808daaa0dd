"""Tasks for the tests of executors, importable by worker processes."""

import os
import signal
from pathlib import Path


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
