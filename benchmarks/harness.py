"""Interleaved timing of several implementations of the same work.

Contenders take turns (A B C A B C ...) so that a change of the machine's load hits all of them alike. CPU time of the
process (all its threads) and of the programs that it has run is measured, medians are reported, and each ratio is taken
against the peer in the same run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Row:
    """One contender: median CPU milliseconds, speed relative to the reference peer, and any further columns."""

    name: str
    milliseconds: float
    ratio: float
    extra: dict[str, str] = field(default_factory=dict)


@dataclass
class Table:
    """One comparison, rendered to docs/benchmarks.md."""

    title: str
    workload: str
    peer: str
    rows: list[Row]
    versions: dict[str, str]
    remarks: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """Render the comparison as Markdown."""
        extra = list(dict.fromkeys(key for row in self.rows for key in row.extra))
        head = ["", "CPU ms (median)", f"speed, {self.peer} = 1", *extra]
        lines = [f"### {self.title}", "", self.workload, "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for row in self.rows:
            cells = [row.name, f"{row.milliseconds:.3g}", f"{row.ratio:.2f}", *(row.extra.get(k, "") for k in extra)]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *(f"- {remark}" for remark in self.remarks)]
        lines.append(f"- Versions: {', '.join(f'{k} {v}' for k, v in self.versions.items())}.")
        return "\n".join(lines) + "\n"


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of the given packages, as installed."""
    found = {"Python": platform.python_version()}
    for package in packages:
        found[package] = importlib.metadata.version(package)
    return found


def cpu_seconds() -> float:
    """CPU time of this process and of the programs that it has run to their end."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def installed(module: str) -> bool:
    """Whether a peer (extra ``bench``) can be imported."""
    return importlib.util.find_spec(module) is not None


def compare(
    title: str,
    workload: str,
    contenders: Mapping[str, Callable[[], Any]],
    *,
    peer: str,
    packages: tuple[str, ...] = (),
    repeats: int = 7,
    extra: Mapping[str, Mapping[str, str]] | None = None,
    remarks: list[str] | None = None,
) -> Table:
    """Time each contender ``repeats`` times in turn, after one unmeasured call each.

    Args:
        title: Heading of the comparison.
        workload: What is computed, with sizes, dtype and threads.
        contenders: Name -> function without arguments that does the whole work once.
        peer: Name of the contender that counts as 1; when it is missing (not installed) the first one counts as 1.
        packages: Distributions whose versions are printed.
        repeats: Measured calls per contender.
        extra: Further columns: contender -> column -> text.
        remarks: Sentences printed under the table.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for function in contenders.values():
        function()
    for _ in range(repeats):
        for name, function in contenders.items():
            start = cpu_seconds()
            function()
            samples[name].append(cpu_seconds() - start)
    median = {name: statistics.median(times) * 1e3 for name, times in samples.items()}
    base = peer if peer in median else next(iter(median))
    rows = [
        Row(name, value, median[base] / value if value else float("inf"), dict((extra or {}).get(name, {})))
        for name, value in median.items()
    ]
    return Table(title, workload, base, rows, versions(*packages), remarks or [])


def peak_memory(function: Callable[[], Any]) -> float:
    """Peak of the memory that torch allocates on the CPU during one call, in MiB above the start."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    current = peak = 0
    events = (event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak / 2**20
