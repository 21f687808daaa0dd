"""``python -m benchmarks [ROOM ...]``: run the comparisons and write docs/benchmarks.md.

A room is a module of this package with ``SECTION`` (heading), and ``run() -> list[Table]``. Results of rooms that were
not run this time are kept, so that one room can be measured again alone.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from pathlib import Path

import benchmarks

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Ours and the peers do the same work in one run, taking turns; CPU time of one process, medians; versions under each
table. `make bench` measures again and rewrites this page. A ratio above 1 means faster than the peer.
"""


def main(rooms: list[str]) -> None:
    """Run the given rooms, or all of them."""
    known = sorted(
        m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name not in ("__main__", "harness", "peers")
    )
    unknown = set(rooms) - set(known)
    if unknown:
        sys.exit(f"unknown benchmark {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    sections = {}
    if PAGE.exists():
        for match in re.finditer(r"<!-- (\w+) -->\n(.*?)(?=<!-- \w+ -->|\Z)", PAGE.read_text(encoding="utf-8"), re.S):
            sections[match[1]] = match[2].strip() + "\n"
    for room in rooms or known:
        module = importlib.import_module(f"benchmarks.{room}")
        print(f"== {module.SECTION}", file=sys.stderr)
        tables = [table.markdown() for table in module.run()]
        sections[room] = "\n".join([f"## {module.SECTION}\n", *tables])
        print(sections[room])
    body = "\n".join(f"<!-- {room} -->\n{sections[room]}" for room in known if room in sections)
    PAGE.write_text(f"{HEAD}\n{body}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
