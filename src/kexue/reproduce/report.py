"""The page that shows one or several reproductions: claim, figures, verdict, plot."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

from kexue._files import atomic_path
from kexue.catalog import METHODS
from kexue.reproduce.runner import Reproduction

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>kexue: reproductions</title><style>
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1b1b}
h2{margin-top:3rem} table{border-collapse:collapse;margin:.5rem 0} td,th{border:1px solid #ccc;padding:.2rem .6rem;text-align:right}
td:first-child,th:first-child{text-align:left} img{max-width:100%} .verdict{display:inline-block;padding:.1rem .6rem;border-radius:1rem;color:#fff}
.reproduced{background:#287a3c}.partly{background:#a66b00}.not{background:#a12626}.note{color:#555}
</style></head><body><h1>Reproductions</h1>
{% for r in rows %}<h2 id="{{ r.slug }}">{{ methods[r.slug].name }} · {{ methods[r.slug].name_zh }}</h2>
<p><b>Claim.</b> {{ r.claim }}</p>
<p><span class="verdict {{ r.verdict.split()[0] }}">{{ r.verdict }}</span>
{{ "%.1f"|format(r.seconds) }} CPU s, seed {{ r.seed }}{% if r.quick %}, quick version{% endif %}</p>
{% if r.note %}<p class="note">{{ r.note }}</p>{% endif %}
{% for name, table in tables(r.figures) %}<h3>{{ name }}</h3><table><tr>{% for c in table[0] %}<th>{{ c }}</th>{% endfor %}</tr>
{% for row in table[1] %}<tr>{% for c in row %}<td>{{ c }}</td>{% endfor %}</tr>{% endfor %}</table>{% endfor %}
{% if images[r.slug] %}<img alt="figure of {{ r.slug }}" src="data:image/png;base64,{{ images[r.slug] }}">{% endif %}
{% endfor %}</body></html>
"""


def format_figure(value: Any) -> str:
    """Render a figure for people: four significant digits, lists joined by commas."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(format_figure(item) for item in value)
    return str(value)


def figure_tables(figures: Mapping[str, Any]) -> list[tuple[str, tuple[list[str], list[list[str]]]]]:
    """Split figures into printable tables: one for the single values, one for each dict of columns."""
    single = [[name, format_figure(value)] for name, value in figures.items() if not isinstance(value, Mapping)]
    tables: list[tuple[str, tuple[list[str], list[list[str]]]]] = []
    if single:
        tables.append(("Figures", (["figure", "value"], single)))
    for name, columns in figures.items():
        if isinstance(columns, Mapping):
            rows = [[format_figure(cell) for cell in row] for row in zip(*columns.values(), strict=True)]
            tables.append((name, (list(columns), rows)))
    return tables


def write_report(results: Sequence[Reproduction], path: str | Path) -> Path:
    """Write one self-contained HTML page (figures embedded).

    Args:
        results: What :func:`kexue.reproduce.run` returned.
        path: The HTML file.

    Returns:
        The path.
    """
    images = {
        r.slug: base64.b64encode(r.figure_path.read_bytes()).decode("ascii") if r.figure_path is not None else ""
        for r in results
    }
    template = Environment(autoescape=True).from_string(_TEMPLATE)
    page = template.render(rows=results, methods=METHODS, tables=figure_tables, images=images)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(path)
