"""See Also sections and summaries of docstrings."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.corpus import split_see_also, split_summary

BODY = "Parameters\n----------\nx : int\n    Number."


def test_the_section_is_cut_and_the_rest_stays():
    doc = f"Sum.\n\n{BODY}\n\nSee Also\n--------\na : First.\n    More.\nb.c, d\n\nNotes\n-----\nEnd."
    text, names = split_see_also(doc)
    assert text == f"Sum.\n\n{BODY}\n\nNotes\n-----\nEnd."
    assert names == ["a", "b.c", "d"]


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ("func_a : Function a with its description.", ["func_a"]),
        ("func_a: no space", ["func_a"]),
        ("func_a", ["func_a"]),
        ("a, b , c.d", ["a", "b", "c.d"]),
        ("a, b,\nc : wrapped", ["a", "b", "c"]),
        ("a\n    b\n    c : inside a description", ["a"]),
        (":func:`a.b` : role\n:py:class:`~c.D`", ["a.b", "c.D"]),
        (":obj:`a`, :obj:`b`", ["a", "b"]),
        ("`a`\n`~b.c` : text", ["a", "b.c"]),
        (".Axes.legend\n!plain()", ["Axes.legend", "plain"]),
        ("A whole sentence about nothing", []),
        ("a b : two words", []),
        ("a\na : again", ["a"]),
        ("a : in the usual\n  fashion.", ["a"]),
        ("\n\na\n\n\nb\n", ["a", "b"]),
        ("https://example.org/x", ["https"]),
    ],
)
def test_entries(body, names):
    text, found = split_see_also(f"Sum.\n\nSee Also\n--------\n{body}")
    assert found == names
    assert text == "Sum."


NAME = st.from_regex(r"\A[a-z_]{1,6}(\.[a-zA-Z_]{1,6}){0,2}\Z")
ROLE = st.sampled_from(["{}", ":func:`{}`", ":class:`{}`", "`{}`"])


def entries_by_the_guide(body):
    """The rule of the numpydoc guide: an entry starts at the margin, has names separated by commas, each plain, in
    backquotes or with a role, and perhaps ``: description``; indented lines belong to the description."""
    names = []
    for line in body.split("\n"):
        if not line or line[0] == " ":
            continue
        # A role has colons of its own, so the description is looked for after blanking what is in backquotes.
        blanked = re.sub(r"(:\w+:)?`[^`]*`", lambda m: "x" * len(m[0]), line)
        end = blanked.find(":")
        for item in (line if end < 0 else line[:end]).split(","):
            quoted = re.search(r"`([^`]*)`", item)
            names.append(quoted[1] if quoted else item.strip())
    return list(dict.fromkeys(names))


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.lists(st.tuples(NAME, ROLE), min_size=1, max_size=3), st.sampled_from(range(4))), min_size=1)
)
def test_entries_follow_the_numpydoc_guide(items):
    lines = []
    for names, form in items:
        head = ", ".join(role.format(name) for name, role in names)
        lines += [[head], [head + " : Some words: more, words"], [head + " :", "    a, b"], [head, "    c : d", ""]][
            form
        ]
    body = "\n".join(lines)
    text, found = split_see_also(f"Sum.\n\nSee Also\n--------\n{body}\n\nNotes\n-----\nx")
    assert found == entries_by_the_guide(body)
    assert text == "Sum.\n\nNotes\n-----\nx"


def test_variants_of_the_heading():
    for heading in ("See Also\n--------", "See also\n---", "SEE ALSO\n========", "  See Also\n  --------"):
        assert split_see_also(f"Sum.\n\n{heading}\na\n") == ("Sum.", ["a"])


def test_the_sphinx_directive():
    doc = "Sum.\n\n.. seealso::\n\n    :func:`torch.a` and :class:`~b.C`,\n    see `d.e` or ``code``.\n\nAfter."
    assert split_see_also(doc) == ("Sum.\n\nAfter.", ["torch.a", "b.C", "d.e"])
    assert split_see_also(".. seealso:: :py:meth:`the text <a.b>`\n\nAfter.") == ("After.", ["a.b"])
    assert split_see_also("Sum.\n\n    .. seealso::\n        :func:`a`\n    Stays.") == ("Sum.\n\n    Stays.", ["a"])


@pytest.mark.parametrize(
    "doc",
    [
        "Sum.\n\nSee Also:\n    other: Does more.\n",  # Google style
        "See also the other one.",
        "Sum.\n\nNotes\n-----\nNothing.",
        "",
        "See Also",
    ],
)
def test_other_text_is_left_alone(doc):
    assert split_see_also(doc) == (doc, [])


@given(st.text("SeeAlso -\n=:.`ab,", max_size=200))
def test_cutting_only_removes(doc):
    text, names = split_see_also(doc)
    characters = iter(doc)
    assert all(c in characters for c in text if not c.isspace())  # what is left stands in the same order
    assert all(name == name.strip() and name for name in names)
    assert split_see_also("Sum.\n\n" + doc)[0].startswith("Sum.")


@pytest.mark.parametrize(
    ("doc", "title", "rest"),
    [
        ("Sum of items.", "Sum of items.", ""),
        ("Sum of items\nover an axis. More. \n\nRest.", "Sum of items over an axis.", "More. \n\nRest."),
        ("Sum, e.g. Of items, of v1.2 things. More.", "Sum, e.g. Of items, of v1.2 things.", "More."),
        ("求和。然后。", "求和。", "然后。"),
        ("f(x, y=(1, 2)) -> Tensor\n\nSum of x.\n\nRest.", "Sum of x.", "f(x, y=(1, 2)) -> Tensor\n\nRest."),
        ("f(x)\nSum of x.", "Sum of x.", "f(x)"),
        ("f(x)", "f(x)", ""),
        ("Main title\n==========\n\nText.", "Main title", "Text."),
        ("module\n~~~~~~\n\nWhat it is.", "What it is.", "module"),
        ("Sum\n:param x: number", "Sum", ":param x: number"),
        ("Return an\n:class:`Item` now.", "Return an :class:`Item` now.", ""),
        ("Sum\n- one\n- two", "Sum", "- one\n- two"),
        ("\n\n  Sum  of\titems \n", "Sum of items", ""),
        ("", "", ""),
    ],
)
def test_summaries(doc, title, rest):
    assert split_summary(doc) == (title, rest)


def test_a_long_summary_ends_at_a_space():
    title, rest = split_summary("word " * 100)
    assert len(title) <= 300
    assert (title + " " + rest).split() == ["word"] * 100
    assert split_summary("x" * 400) == ("x" * 300, "x" * 100)


@given(st.text("aB .。\n()=~-:", max_size=120))
def test_summary_is_one_line_and_nothing_is_repeated(doc):
    title, rest = split_summary(doc)
    assert "\n" not in title
    assert len(title) + len(rest) <= len(doc) + 2
    assert bool(title) == bool(doc.strip())
