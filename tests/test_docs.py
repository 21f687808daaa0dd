"""Every Python example of the README and of the documentation runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("README*.md"), *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.S | re.M)


def examples(page):
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if examples(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_of_the_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__example__"}
    for number, code in enumerate(examples(page)):
        exec(compile(code, f"{page.name}[{number}]", "exec"), namespace)
    assert namespace


def test_every_page_has_its_chinese_twin():
    pages = [p for p in ROOT.glob("docs/**/*.md") if not p.name.endswith(".zh.md") and p.name != "benchmarks.md"]
    missing = [str(p) for p in pages if not p.with_name(p.stem + ".zh.md").exists()]
    assert not missing
