"""What the progress bar of a run says."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from kexue._progress import Bar


class Display:
    """Feeds the progress bar at most ten times a second: smoothed loss, speed, learning rate.

    Args:
        bar: The bar.
        done: Steps that were done before.
    """

    def __init__(self, bar: Bar, done: int) -> None:
        bar.advance(done)
        self.bar = bar
        self.start = self.last = time.monotonic()
        self.loss: float | None = None
        self.count = 0.0
        self.unit = "items"
        self.rate = 0.0
        self.waiting = 0

    def update(self, record: Mapping[str, Any]) -> None:
        """Take note of one step."""
        self.loss = record["loss"] if self.loss is None else 0.95 * self.loss + 0.05 * record["loss"]
        self.unit = "tokens" if "tokens" in record else "items"
        self.count += record[self.unit]
        self.rate = record["lr"]
        self.waiting += 1
        if time.monotonic() - self.last > 0.1:
            self.close()

    def close(self) -> None:
        """Show what has not been shown yet."""
        self.last = time.monotonic()
        if self.waiting:
            speed = self.count / max(self.last - self.start, 1e-9)
            self.bar.advance(self.waiting, f"loss {self.loss:.4g}, {speed:.3g} {self.unit}/s, lr {self.rate:.2e}")
            self.waiting = 0
