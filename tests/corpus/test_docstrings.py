"""Docstrings of installed packages, with packages made for the purpose."""

import ast
import importlib
import pathlib
import sys
import sysconfig
import warnings

import pytest

from kexue.corpus import installed_documentation
from kexue.corpus.source import _Unsure, docstrings, parse, scan

LONG = (
    "Words that say what this does, so many of them that nobody could call the docstring short, which is needed here. "
)
LONG += "More words."


def doc(summary, indent=4):
    pad = " " * indent
    return f'{pad}"""{summary}\n\n{pad}{LONG}\n{pad}"""\n'


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write modules of a package that can be found but fails when imported."""

    def write(files, name="fakepkg"):
        for path, source in files.items():
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(source.encode() if isinstance(source, str) else source)
        importlib.invalidate_caches()
        return installed_documentation([name])

    monkeypatch.syspath_prepend(str(tmp_path))
    return write


def ids(reader):
    return [document.id for document in reader]


BOOM = "raise SystemExit('this package must not be imported')\n"


def test_fields_of_a_document(package):
    see_also = "See Also\n    --------\n    g\n    os.path.join : Joins.\n"
    source = f'def f(x: int = 3) -> "int":\n    """Sum of\n    x.\n\n    {LONG}\n\n    {see_also}    """\n'
    (document,) = package({"__init__.py": BOOM, "sub/__init__.py": "", "sub/_mod.py": "\n\n" + source})
    assert document.id == "fakepkg.sub._mod.f"
    assert document.title == "Sum of x."
    assert document.text == f"Sum of\nx.\n\n{LONG}"
    assert document.labels == ("fakepkg", "fakepkg.sub._mod")
    assert document.meta == {
        "kind": "function",
        "package": "fakepkg",
        "path": "fakepkg/sub/_mod.py",
        "line": 3,
        "related": ["g", "os.path.join"],
    }
    assert "fakepkg" not in sys.modules


EVERYTHING = f'''# comment
{doc("Module.", 0)}
import x


class A(B, metaclass=M["a:b"]):
{doc("Class.")}
    def method(self, a="(", b={{"x": ':'}}, *, c=lambda: 0) -> dict[str, "int"]:  # a comment with ) and "quotes
        # and another
{doc("Method.", 8)}
        def inner():
{doc("Inner.", 12)}
    if x:
        async def coroutine(self):
{doc("Coroutine.", 12)}
    else:
        def coroutine(self):
{doc("Second.", 12)}
    class Nested:
{doc("Nested.", 8)}

def _private():
{doc("Private.")}
    def public():
{doc("Inside private.", 8)}

try:
    def conditional(): {doc("Conditional.", 0).rstrip()}
except ImportError:
    pass

def short():
    """Short."""

def not_a_docstring():
    """{LONG}""".format(1)

def fstring():
    f"""{LONG} {{x}}"""

def escaped():
    """Tab \\t and {LONG}
    """

def raw():
    r"""Raw \\d {LONG}"""

text = """
def in_a_string():
    pass
"""
'''


def test_names_kinds_and_order(package):
    reader = package({"m.py": EVERYTHING})
    found = list(reader)
    lines = EVERYTHING.split("\n")
    assert [(d.id.removeprefix("fakepkg.m"), d.meta["kind"]) for d in found] == [
        ("", "module"),
        (".A", "class"),
        (".A.method", "method"),
        (".A.method.inner", "function"),
        (".A.coroutine", "method"),
        (".A.Nested", "class"),
        ("._private.public", "function"),
        (".conditional", "function"),
        (".escaped", "function"),
        (".raw", "function"),
    ]
    assert found[4].title == "Coroutine."  # the first of two wins
    assert reader.duplicates == 1
    for document in found[1:]:
        assert document.id.rpartition(".")[2] in lines[document.meta["line"] - 1]
    assert "\t" not in found[8].text
    assert r"\d" in found[9].text


def test_order_is_that_of_the_source(package):
    def named(*names):
        return "".join(f"def {n}():\n{doc(n)}" for n in names)

    reader = package(
        {
            "__init__.py": named("z"),
            "b.py": named("d", "c"),
            "b/__init__.py": named("q"),
            "a/x.py": named("y"),
            "c.py": named("a"),
        }
    )
    assert ids(reader) == [f"fakepkg.{n}" for n in ("z", "a.x.y", "b.q", "b.d", "b.c", "c.a")]
    assert list(reader) == list(reader)


def test_what_is_left_out(package):
    one = f"def f():\n{doc('One.')}"
    files = ["tests/a.py", "sub/test/a.py", "testing/a.py", "_vendor/a.py", "not-a-name/a.py", "not-a-name.py"]
    reader = package({"_core.py": one, "a.pyi": one, **dict.fromkeys(files, one)})
    assert ids(reader) == ["fakepkg._core.f"]


def test_equal_texts_are_kept_once_unless_asked_for(package, tmp_path):
    one = f"def f():\n{doc('One.')}"
    reader = package({"a.py": one, "b.py": one})
    assert ids(reader) == ["fakepkg.a.f"]
    assert reader.duplicates == 1
    assert ids(installed_documentation(["fakepkg"], keep_duplicates=True)) == ["fakepkg.a.f", "fakepkg.b.f"]


def test_files_that_are_no_python_of_today_are_skipped_and_counted(package):
    good = f"def f():\n{doc('One.')}"
    reader = package(
        {
            "a.py": good,
            "broken.py": good + "\ndef g(:\n" + doc("Two."),
            "nul.py": good + "\0",
            "old.py": good + "\nprint 'x'\n",
            "open.py": good + '\n"""never closed',
            "utf8.py": good.encode() + b"# \xff\n",
        }
    )
    assert ids(reader) == ["fakepkg.a.f"]
    assert [pathlib.Path(path).name for path, _ in reader.skipped] == [
        "broken.py",
        "nul.py",
        "old.py",
        "open.py",
        "utf8.py",
    ]
    assert all(reason.startswith("not Python 3.") for _, reason in reader.skipped)


def test_encodings_marks_and_line_ends(package):
    source = f'def f():\n    """Caf\xe9.\n\n    {LONG}"""\n'
    reader = package(
        {
            "a.py": b"\xef\xbb\xbf" + source.encode(),
            "b.py": ("# -*- coding: latin-1 -*-\n" + source.replace("One", "Two")).encode("latin-1"),
            "c.py": ("# coding: cp1252\n" + source).encode("cp1252"),
            "d.py": source.replace("\n", "\r\n").encode(),
        }
    )
    assert [d.title for d in installed_documentation(["fakepkg"], keep_duplicates=True)] == ["Caf\xe9."] * 4
    assert reader.duplicates == 0


def test_no_warning_for_the_strings_of_others(package):
    reader = package({"a.py": f'def f():\n    """Bad \\d escape. {LONG}"""\nx = 1 is 1\n'})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(reader)) == 1


def test_characters_that_cannot_be_stored_are_replaced(package):
    (document,) = package({"a.py": f'def f():\n    """Half \\ud800 and \\0 nothing. {LONG}"""\n'})
    assert document.text.startswith("Half ? and  nothing.")


def test_attached_docstrings(package):
    source = f'''
add_newdoc("fakepkg._core.multi", "thing", """Thing.\n\n{LONG}\n\nSee Also\n--------\nother""")
add_newdoc("fakepkg._core.multi", "thing", ("sort", """Sort.\n\n{LONG}"""))
add_newdoc("fakepkg.multi", "thing", [("one", """One.\n\n{LONG}"""), ("_two", """Two.\n\n{LONG}""")])
add_newdoc("airy", """Airy.\n\n{LONG}""")
add_docstr(fakepkg.abs, r"""abs(x) -> y\n\nAbsolute.\n\n{LONG} {{x}}""" + """!""".format(**common))
fft = _add_docstr(_fft.fft_fft, """Transform.\n\n{LONG}""")
add_newdoc("elsewhere", "x", """Not here.\n\n{LONG}""")
add_newdoc("fakepkg", "y", COMPUTED)
def normal():
{doc("Normal.")}
'''
    found = list(package({"special/_docs.py": source}))
    assert [(d.id, d.meta["kind"], d.title) for d in found] == [
        ("fakepkg.thing", "function", "Thing."),
        ("fakepkg.thing.sort", "method", "Sort."),
        ("fakepkg.multi.thing.one", "method", "One."),
        ("fakepkg.special.airy", "function", "Airy."),
        ("fakepkg.abs", "function", "Absolute."),
        ("fakepkg.special.fft", "function", "Transform."),
        ("fakepkg.special._docs.normal", "function", "Normal."),
    ]
    assert [d.meta.get("attached", False) for d in found] == [True] * 6 + [False]
    assert found[0].meta["related"] == ["other"]
    assert {d.labels for d in found} == {("fakepkg", "fakepkg.special._docs")}


def test_single_files_namespaces_and_progress(package, tmp_path, monkeypatch):
    (tmp_path / "single.py").write_text(BOOM + f"def f():\n{doc('One.')}")
    other = tmp_path / "other"
    for root, name in ((tmp_path, "a"), (other, "b")):
        (root / "spaced").mkdir(parents=True)
        (root / "spaced" / f"{name}.py").write_text(f"def f():\n{doc(name)}")
    monkeypatch.syspath_prepend(str(other))
    calls = []
    reader = installed_documentation(["spaced", "single"], progress=lambda done, total: calls.append((done, total)))
    assert sorted(ids(reader)) == ["single.f", "spaced.a.f", "spaced.b.f"]
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_fingerprint_follows_the_source(package, tmp_path):
    reader = package({"a.py": f"def f():\n{doc('One.')}"})
    before = reader.fingerprint()
    assert before == reader.fingerprint() == installed_documentation(["fakepkg"]).fingerprint()
    (tmp_path / "fakepkg" / "b.py").write_text("")
    assert reader.fingerprint() != before


def test_distribution_names_are_understood():
    assert installed_documentation(["scikit-learn"]).packages == ["sklearn"]
    assert installed_documentation(["Scikit_Learn", "json"]).packages == ["json", "sklearn"]


@pytest.mark.parametrize(
    ("packages", "error", "message"),
    [
        (["nunpy"], ValueError, r"no installed package is called 'nunpy'; did you mean .*numpy"),
        (["numpy.linalg"], ValueError, "'numpy.linalg'; did you mean numpy"),
        (["qqqqqqqqqq"], ValueError, "no installed package is called 'qqqqqqqqqq'$"),
        (["../etc"], ValueError, "no installed package"),
        ([], ValueError, "at least one package"),
        ("numpy", TypeError, r"a list of names such as \['numpy'\]; got 'numpy'"),
        ([3], TypeError, "packages must be str; got 3"),
    ],
)
def test_names_that_are_not_installed(packages, error, message):
    with pytest.raises(error, match=message):
        installed_documentation(packages)


def test_a_package_without_source_is_an_error_only_alone(package):
    with pytest.raises(ValueError, match=r"no docstring .* in math \(math: no Python source\)"):
        list(installed_documentation(["math"]))
    package({"a.py": f"def f():\n{doc('One.')}"})
    reader = installed_documentation(["math", "fakepkg"])
    assert ids(reader) == ["fakepkg.a.f"]
    assert reader.skipped == [("math", "no Python source")]


def test_all_packages_are_the_installed_ones_and_the_standard_library():
    packages = installed_documentation().packages
    assert {"numpy", "torch", "json", "_pytest"} <= set(packages)
    assert not {"test", "tests", "__pycache__"} & set(packages)
    assert packages == sorted(packages)


@pytest.mark.parametrize(
    "source",
    [
        'def f():\n    ("""bracketed""")\n',
        'def f():\n    "joined" "strings"\n',
        "print 'python 2'\n",
        'x = f"{y["z"]}""\n',
    ],
)
def test_the_scanner_gives_up_where_it_is_not_sure(source):
    with pytest.raises(_Unsure):
        scan(source)


def test_both_ways_agree_on_everything_above():
    assert scan(EVERYTHING) == parse(EVERYTHING.encode())
    joined = f'def f():\n    "{LONG}" \\\n    "{LONG}"\n'
    assert docstrings(joined.encode()) == parse(joined.encode())
    assert len(parse(joined.encode())) == 1


@pytest.mark.slow
def test_both_ways_agree_on_the_standard_library():
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files = [*sorted(root.glob("*.py")), *sorted(root.glob("[a-j]*/*.py"))]
    compared = 0
    for file in files:
        source = file.read_bytes()
        try:
            expected = parse(source)
        except SyntaxError:
            continue
        try:
            found = scan(source.decode().replace("\r\n", "\n"))
        except (_Unsure, UnicodeDecodeError):
            continue
        assert found == expected, file
        compared += 1
    assert compared > 300


def test_docstrings_are_what_ast_says():
    source = pathlib.Path(ast.__file__).read_bytes()
    tree = ast.parse(source)
    expected = [
        (node.name, ast.get_docstring(node))
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    ]
    found = {item.name: item.docstring for item in docstrings(source)}
    long = {name: text for name, text in expected if text and len(text) > 120}
    assert len(long) > 10
    assert long == {name: text for name, text in found.items() if name in long}
