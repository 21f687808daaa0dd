"""Pages for people: one place that renders the templates of this room."""

from __future__ import annotations

from typing import Any


def figure(value: Any) -> str:
    """A value as the reports show it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return str(value)


def page(template: str, **values: Any) -> str:
    """Render a template of this room."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("kexue.workbench", "."), autoescape=True, trim_blocks=True)
    environment.filters["figure"] = figure
    return environment.get_template(template).render(**values)
