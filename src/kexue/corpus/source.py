r"""Find the docstrings in the source of a Python module, without importing it.

Two ways to the same result. :func:`parse` asks :mod:`ast`. It is exact, and spends most of its
time on nodes that nobody looks at. :func:`scan` walks over the strings, comments and ``def``/``class`` lines with one
regular expression and evaluates nothing but the docstrings with :mod:`ast`; it is several times faster. Where it sees
something that it does not know (another encoding, a header it cannot follow, Python 2 statements, calls that attach
docstrings) :func:`docstrings` falls back to :func:`parse`.
"""

from __future__ import annotations

import ast
import inspect
import re
import string
import warnings
from collections.abc import Iterator
from typing import NamedTuple

MINIMUM = 120  # a docstring counts if it is longer than this


class Found(NamedTuple):
    """A docstring: name inside the module ("" for the module itself), kind, line, and the cleaned text.

    ``attached`` says that a call attaches the docstring to a compiled object; then ``absolute`` says that the name is
    not relative to the package the source is in.
    """

    name: str
    kind: str
    line: int
    docstring: str
    attached: bool = False
    absolute: bool = False


_TRIPLE = r'"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""|' + r"'''[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'''"
_SINGLE = r'"(?!"")[^"\\\n]*(?:\\.[^"\\\n]*)*"|' + r"'(?!'')[^'\\\n]*(?:\\.[^'\\\n]*)*'"
_STRING = f"{_SINGLE}|{_TRIPLE}"
_COMPOUND = "if|else|elif|try|except|finally|with|for|while|match|case|async"
_TOKEN = re.compile(
    rf"{_STRING}|\#[^\n]*|\n(?P<indent>[ \t\f]*)(?:(?:async[ \t]+)?(?P<kind>def|class)[ \t]+(?P<name>\w+)"
    rf"|(?:{_COMPOUND})\b)|(?P<odd>[\"'])",
    re.S,
)
_HEADER = re.compile(rf"(?:{_STRING})|\#[^\n]*|(?P<open>[(\[{{])|(?P<close>[)\]}}])|(?P<colon>:)|(?P<odd>[\"'])", re.S)
_BEFORE = re.compile(r"(?:[ \t\f]|\\\n|\n|\#[^\n]*)*")
_LITERAL = re.compile(rf"(?P<prefix>[rRuU]?)(?P<literal>{_STRING})", re.S)
_SPACE = re.compile(r"(?:[ \t\f]|\\\n)*")
_AFTER = re.compile(r"[ \t\f]*(?:\#[^\n]*)?(?:\n|;|$)")
_CODING = re.compile(rb"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")
# Statements of Python 2, which only the parser can refuse.
_PYTHON_2 = re.compile(
    r"\n[ \t]*(?:print[ \t]+[\"'\w]|exec[ \t]+[\"'\w]|except[ \t]+[\w.]+[ \t]*,|raise[ \t]+\w+[ \t]*,)"
)


class _Unsure(Exception):
    """The scanner met something it does not know."""


def _clean(text: str) -> str:
    """As ast.get_docstring; a NUL or half a surrogate pair, which an escape can write, is no text."""
    text = inspect.cleandoc(text).replace("\0", "")
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def docstrings(source: bytes) -> list[Found]:
    """Return the docstrings longer than 120 characters of modules, classes and functions, in the order of lines.

    Names that begin with an underscore are left out themselves, but not what is defined inside them.

    Args:
        source: Content of a Python file.

    Raises:
        SyntaxError: if it is not Python source of this version.

    Example:
        >>> source = b'def f():\\n    \"\"\"' + b"x" * 121 + b'\"\"\"'
        >>> [(found.name, found.kind, found.line) for found in docstrings(source)]
        [('f', 'function', 1)]
    """
    if len(source) <= MINIMUM:
        return []
    source = source.removeprefix(b"\xef\xbb\xbf")
    head = source.split(b"\n", 2)[:2]
    coding = next((m[1].lower() for line in head if (m := _CODING.match(line))), b"utf-8")
    if coding.replace(b"_", b"-") in (b"utf-8", b"utf8", b"ascii", b"us-ascii", b"latin-1", b"iso-8859-1"):
        try:
            text = source.decode(coding.decode())
        except UnicodeDecodeError as error:
            raise SyntaxError(str(error)) from error
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        if "add_newdoc" not in text and "add_docstr" not in text:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's strings
                try:
                    return scan(text)
                except _Unsure:
                    pass
    return parse(source)


def scan(text: str) -> list[Found]:
    """Find the docstrings of decoded source with ``\\n`` line ends; see :func:`docstrings`."""
    text = "\n" + text  # so that every line begins with a line end, which the patterns look for
    if "\0" in text or _PYTHON_2.search(text):
        raise _Unsure
    found: list[Found] = []
    if module := _literal(text, 0):
        found.append(Found("", "module", 1, module))
    stack: list[tuple[int, str, bool]] = []  # indentation, qualified name, whether it is a class
    line, counted = 0, 0
    for match in _TOKEN.finditer(text):
        group = match.lastgroup
        if group is None:  # a string or a comment
            continue
        if group == "odd":
            raise _Unsure  # a quote that opens nothing known
        indent = match["indent"]
        depth = len(indent.expandtabs()) if "\t" in indent else len(indent)
        while stack and stack[-1][0] >= depth:
            stack.pop()
        name = match["name"]
        if name is None:
            continue
        is_class = match["kind"] == "class"
        parent, in_class = (stack[-1][1] + ".", stack[-1][2]) if stack else ("", False)
        stack.append((depth, parent + name, is_class))
        if name[0] == "_":
            continue
        docstring = _literal(text, _colon(text, match.end()))
        if docstring:
            line += text.count("\n", counted, match.start() + 1)
            counted = match.start() + 1
            kind = "class" if is_class else "method" if in_class else "function"
            found.append(Found(parent + name, kind, line, docstring))
    return found


def _colon(text: str, position: int) -> int:
    """Return the position after the colon that ends a ``def`` or ``class`` header."""
    depth = 0
    for match in _HEADER.finditer(text, position):
        if match["open"]:
            depth += 1
        elif match["close"]:
            depth -= 1
            if depth < 0:
                raise _Unsure
        elif match["colon"] and depth == 0:
            return match.end()
        elif match["odd"]:
            raise _Unsure
    raise _Unsure


def _literal(text: str, position: int) -> str | None:
    """Return the cleaned docstring that stands at ``position``, if there is one and it is long enough."""
    match = _BEFORE.match(text, position)
    position = match.end() if match else position
    char = text[position : position + 1]
    if char == "(":
        raise _Unsure  # a docstring may stand in brackets; almost nobody does
    if not char or char not in "\"'rRuU":
        return None
    match = _LITERAL.match(text, position)
    if match is None:
        return None
    start, end = position, match.end()
    if not _AFTER.match(text, end):
        if _LITERAL.match(text, _skip_space(text, end)):
            raise _Unsure  # strings joined by standing side by side
        return None
    literal = match["literal"]
    if len(literal) <= MINIMUM and "\t" not in literal:
        return None
    triple = literal.startswith(('"""', "'''"))
    if triple and ("\\" not in literal or match["prefix"] in ("r", "R")):
        docstring = _clean(literal[3:-3])
    else:
        try:
            docstring = _clean(ast.literal_eval(text[start:end]))
        except (SyntaxError, ValueError) as error:
            raise _Unsure from error
    return docstring if len(docstring) > MINIMUM else None


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def parse(source: bytes) -> list[Found]:
    """Find the docstrings with :mod:`ast`; see :func:`docstrings`.

    Raises:
        SyntaxError: if it is not Python source of this version.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except (ValueError, RecursionError, MemoryError) as error:
            raise SyntaxError(f"{type(error).__name__}: {error}") from error
    found = list(_walk(tree, "", False))
    if b"add_newdoc" in source or b"add_docstr" in source:
        found += _attached(tree)
    return sorted(found, key=lambda item: item.line)


def _walk(tree: ast.Module, prefix: str, in_class: bool) -> Iterator[Found]:
    stack: list[tuple[ast.AST, str, bool]] = [(tree, prefix, in_class)]
    while stack:
        node, prefix, in_class = stack.pop()
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
                    stack.append((child, prefix, in_class))
                continue
            is_class = isinstance(child, ast.ClassDef)
            stack.append((child, f"{prefix}{child.name}.", is_class))
            docstring = _docstring(child)
            if docstring and not child.name.startswith("_"):
                kind = "class" if is_class else "method" if in_class else "function"
                yield Found(prefix + child.name, kind, child.lineno, docstring)
    if docstring := _docstring(tree):
        yield Found("", "module", 1, docstring)


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    text = ast.get_docstring(node, clean=False)
    cleaned = _clean(text) if text else ""
    return cleaned if len(cleaned) > MINIMUM else None


def _attached(tree: ast.Module) -> Iterator[Found]:
    """Docstrings of compiled objects, which numpy, scipy and torch attach with calls.

    ``add_newdoc(place, name, doc)``, with ``doc`` a string, ``(method, string)`` or a list of such pairs;
    ``add_newdoc(name, doc)``; ``add_docstr(object, doc)``, and ``name = _add_docstr(object, doc)``. Where the text is
    computed, and not written, there is nothing to read: the universal functions of numpy have theirs in compiled code.
    """
    for node in ast.walk(tree):
        target = ""
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and isinstance(node.targets[0], ast.Name):
            target, call = node.targets[0].id, node.value
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            call = node.value
        else:
            continue
        function = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
        arguments, line = call.args, call.lineno
        items: list[tuple[str, str | None, str]] = []
        absolute = False
        if function == "add_newdoc" and len(arguments) == 2:
            items = [(_text(arguments[0]) or "", _text(arguments[1]), "function")]
        elif function == "add_newdoc" and len(arguments) >= 3:
            place, name = _text(arguments[0]), _text(arguments[1])
            if place and name:
                absolute, base = True, f"{_public(place)}.{name}"
                if name.startswith("_"):
                    continue
                pairs = arguments[2].elts if isinstance(arguments[2], ast.List) else [arguments[2]]
                for pair in pairs:
                    if isinstance(pair, ast.Tuple) and len(pair.elts) == 2:
                        items.append((f"{base}.{_text(pair.elts[0]) or '_'}", _text(pair.elts[1]), "method"))
                    else:
                        items.append((base, _text(pair), "function"))
        elif function in ("add_docstr", "_add_docstr") and len(arguments) == 2:
            dotted = ast.unparse(arguments[0])
            absolute = not target
            place, _, name = dotted.rpartition(".")
            if target or re.fullmatch(r"[\w.]+", dotted):
                items = [(target or f"{_public(place)}.{name}", _text(arguments[1]), "function")]
        elif function == "_array_method_doc" and len(arguments) == 3:  # numpy's helper for the methods of arrays
            absolute = True
            items = [(f"numpy.ndarray.{_text(arguments[0])}", _text(arguments[2]), "method")]
        for name, text, kind in items:
            docstring = _clean(text) if text else ""
            if len(docstring) > MINIMUM and name and not name.rpartition(".")[2].startswith("_"):
                yield Found(name, kind, line, docstring, True, absolute)


def _public(dotted: str) -> str:
    """Return the part of the dotted name of a module that is public."""
    parts = dotted.split(".")
    private = next((i for i, part in enumerate(parts) if part.startswith("_")), len(parts))
    return ".".join(parts[:private])


class _Blank(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return ""


def _text(node: ast.expr) -> str | None:
    """Return a string constant, joined constants, or a ``.format(...)`` template with its fields left blank."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return left + right if left is not None and right is not None else None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        template = _text(node.func.value)
        if template is None:
            return None
        try:
            return string.Formatter().vformat(template, (), _Blank())
        except (ValueError, IndexError, KeyError, AttributeError):
            return None
    return None
