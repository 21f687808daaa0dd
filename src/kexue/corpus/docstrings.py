"""The documentation of the installed packages as a corpus: docstrings, read as source and never imported.

A document for every docstring longer than 120 characters of a module, class or function whose own name does not begin
with an underscore, in the packages installed in the running environment and in the standard library. Folders called
``tests``, ``test`` and ``testing`` and vendored copies are left out. The order is that of the source: packages by name,
files by path, then by line, so that neighbours in the corpus are neighbours in the source.

Of several docstrings under one name (overloads, property setters, alternatives behind a condition) the first in that
order is kept; of several with the same text (copies between packages, aliases) the first as well, unless duplicates are
asked for. Ids are the real dotted names, with private modules where there are such.

Compiled objects have no source. numpy, scipy and torch attach their docstrings with calls (``add_newdoc``,
``add_docstr``) whose string constants are read too; these documents carry ``meta["attached"] = True`` and the public
name, such as ``numpy.ndarray.sort``.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from kexue.corpus.document import Document
from kexue.corpus.sections import split_see_also, split_summary
from kexue.corpus.source import docstrings

_LEFT_OUT = frozenset(("tests", "test", "testing", "_vendor", "vendor", "_vendored", "vendored", "__pycache__"))
_VERSION = 1  # part of the fingerprint: raise it when the same source gives other documents


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    relative: str  # from the folder that holds the package, with /
    module: str
    package: str


def _locate(package: str) -> list[str]:
    """Return the folders or the file of a top-level package; nothing if it has no Python source."""
    if package in sys.stdlib_module_names:
        base = os.path.join(sysconfig.get_path("stdlib"), package)
        return [path for path in (base, base + ".py") if os.path.exists(path)][:1]
    try:
        spec = importlib.util.find_spec(package)  # of a top-level name this imports nothing
    except (ImportError, ValueError, AttributeError):
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [path for path in spec.submodule_search_locations if os.path.isdir(path)]
    return [spec.origin] if spec.origin and spec.origin.endswith(".py") and os.path.isfile(spec.origin) else []


def _files(package: str) -> Iterator[_File]:
    for root in _locate(package):
        if os.path.isfile(root):
            yield _File(root, os.path.basename(root), package, package)
            continue
        found: list[tuple[str, ...]] = []
        for folder, names, files in os.walk(root):
            names[:] = [name for name in names if name not in _LEFT_OUT and name.isidentifier()]
            inside = () if folder == root else tuple(os.path.relpath(folder, root).split(os.sep))
            found += [(*inside, file) for file in files if file.endswith(".py") and file[:-3].isidentifier()]
        for parts in sorted(found):
            names = [package, *parts[:-1]]
            if parts[-1] != "__init__.py":
                names.append(parts[-1][:-3])
            yield _File(os.path.join(root, *parts), "/".join((package, *parts)), ".".join(names), package)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _resolve(packages: Iterable[str] | None) -> list[str]:
    """Return the top-level import names that are meant, sorted; distributions give the packages they hold."""
    if isinstance(packages, (str, bytes)):
        raise TypeError(f"packages must be a list of names such as ['numpy']; got {packages!r}")
    wanted = None if packages is None else list(packages)
    if wanted is not None:
        if not wanted:
            raise ValueError("packages must name at least one package, or be None for all of them; got none")
        for name in wanted:
            if not isinstance(name, str):
                raise TypeError(f"packages must be str; got {name!r} of type {type(name).__name__}")
        if all(name.isidentifier() and (name in sys.stdlib_module_names or _locate(name)) for name in wanted):
            return sorted(set(wanted))
    provided = importlib.metadata.packages_distributions()
    installed = {name for name in provided if name.isidentifier()} | set(sys.stdlib_module_names)
    if wanted is None:
        return sorted(installed - _LEFT_OUT)
    by_distribution: dict[str, set[str]] = {}
    for top, distributions in provided.items():
        for distribution in distributions:
            by_distribution.setdefault(_normal(distribution), set()).add(top)
    result: set[str] = set()
    for name in wanted:
        if name in installed or (name.isidentifier() and _locate(name)):
            result.add(name)
        elif _normal(name) in by_distribution:
            result |= {top for top in by_distribution[_normal(name)] if top.isidentifier()}
        else:
            top = name.partition(".")[0]
            close = [top] if top != name and top in installed else []
            close += difflib.get_close_matches(name, sorted(installed | set(by_distribution)), 3)
            hint = f"; did you mean {' or '.join(dict.fromkeys(close))}?" if close else ""
            raise ValueError(f"no installed package is called {name!r}{hint}")
    return sorted(result)


class InstalledDocumentation:
    """Documents of installed packages; every iteration reads the source again. Made by :func:`installed_documentation`.

    Attributes:
        packages: The top-level names that are read.
        skipped: Of the latest iteration: (path, reason) of files that are not Python source of this version or cannot
            be read, and (package, reason) of packages without Python source.
        duplicates: How many docstrings of the latest iteration were left out because an earlier one has the same name
            or the same text.
    """

    def __init__(
        self,
        packages: Iterable[str] | None = None,
        *,
        keep_duplicates: bool = False,
        progress: Callable[[float, float], None] | None = None,
    ) -> None:
        if progress is not None and not callable(progress):
            raise TypeError(f"progress must be a function of (done, total) or None; got {progress!r}")
        self.packages = _resolve(packages)
        self.keep_duplicates = keep_duplicates
        self.skipped: list[tuple[str, str]] = []
        self.duplicates = 0
        self._progress = progress

    def __repr__(self) -> str:
        shown = ", ".join(self.packages[:5]) + (", ..." if len(self.packages) > 5 else "")
        return f"{type(self).__name__}({shown})"

    def fingerprint(self) -> str:
        """Return 64 hexadecimal digits that change when a source file does; reads names, sizes and times only."""
        digest = hashlib.sha256(repr((_VERSION, self.keep_duplicates)).encode())
        for package in self.packages:
            for file in _files(package):
                try:
                    info = os.stat(file.path)
                except OSError:
                    continue
                digest.update(f"{file.relative}\0{info.st_size}\0{info.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Document]:
        self.skipped, self.duplicates = [], 0
        skipped = self.skipped
        files: list[_File] = []
        for package in self.packages:
            before = len(files)
            files += _files(package)
            if len(files) == before:
                skipped.append((package, "no Python source"))
        ids: set[str] = set()
        texts: set[int] = set()
        count = duplicates = 0
        for done, file in enumerate(files, start=1):
            for document in _documents(file, skipped):
                key = hash(document.text)
                if document.id in ids or (key in texts and not self.keep_duplicates):
                    duplicates += 1
                    continue
                ids.add(document.id)
                texts.add(key)
                count += 1
                yield document
            self.duplicates = duplicates
            if self._progress is not None:
                self._progress(done, len(files))
        if not count:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:5])
            raise ValueError(
                f"no docstring of more than 120 characters in {', '.join(self.packages[:5])}"
                + (f" ({reasons})" if reasons else "")
            )


# "name(arguments)", "--", blank line: how compiled functions write their signature in front of their docstring.
_CLINIC = re.compile(r"\A(\s*\w[^\n]*\)[ \t]*\n)[ \t]*--[ \t]*\n(?=[ \t]*\n)")


def _documents(file: _File, skipped: list[tuple[str, str]]) -> Iterator[Document]:
    try:
        with open(file.path, "rb") as handle:
            source = handle.read()
        found = docstrings(source)
    except OSError as error:
        skipped.append((file.path, f"cannot be read: {error.strerror}"))
        return
    except SyntaxError as error:
        skipped.append((file.path, f"not Python {sys.version_info[0]}.{sys.version_info[1]}: {error.msg}"))
        return
    for item in found:
        text, related = split_see_also(_CLINIC.sub(r"\1\n", item.docstring))
        if not text.strip():
            continue
        if item.name == "":
            # The private names of modules follow the same rule as those of functions.
            if file.module.rpartition(".")[2].startswith("_"):
                continue
            name = file.module
        elif item.absolute:
            name = item.name
            if name.partition(".")[0] != file.package or not all(part.isidentifier() for part in name.split(".")):
                continue
        elif item.attached:
            name = f"{_parent(file.module)}.{item.name}"
        else:
            name = f"{file.module}.{item.name}"
        meta: dict[str, Any] = {
            "kind": item.kind,
            "package": file.package,
            "path": file.relative,
            "line": item.line,
            "related": related,
        }
        if item.attached:
            meta["attached"] = True
        yield Document(name, text, split_summary(text)[0], (file.package, file.module), meta)


def _parent(module: str) -> str:
    """Return the public part of a module name: ``scipy.special`` for ``scipy.special._add_newdocs``."""
    parts = module.split(".")
    private = next((i for i, part in enumerate(parts) if i and part.startswith("_")), len(parts))
    return ".".join(parts[:private])


def installed_documentation(
    packages: Iterable[str] | None = None,
    *,
    keep_duplicates: bool = False,
    progress: Callable[[float, float], None] | None = None,
) -> InstalledDocumentation:
    """Read the documentation of installed packages: a real corpus that every environment has, with known relations.

    A document's id is the qualified name, its title the summary on one line, its text the docstring without its See
    Also section, its labels (package, module). ``meta`` has ``related`` (the names in the See Also section), ``kind``
    ("module", "class", "function" or "method"), ``package``, ``path`` (relative to the folder that holds the package),
    ``line``, and ``attached`` for docstrings that a call attaches to a compiled object. See
    :mod:`kexue.corpus.docstrings` for what is left out and in which order documents come.

    Args:
        packages: Import names ("sklearn") or names of distributions ("scikit-learn"); None for everything installed and
            the standard library.
        keep_duplicates: Whether to keep docstrings whose text an earlier one has; ids are unique in any case.
        progress: Called as ``progress(done, total)`` with numbers of files after each file.

    Returns:
        An iterable that reads the source anew every time, with ``skipped``, ``duplicates`` and ``fingerprint()``.

    Raises:
        ValueError: for a name that nothing installed has (at once); while iterating if there is no docstring at all.
        TypeError: for an argument of the wrong type.

    Example:
        >>> documents = {document.id: document for document in installed_documentation(["statistics"])}
        >>> documents["statistics.harmonic_mean"].title
        'Return the harmonic mean of data.'
        >>> documents["statistics.harmonic_mean"].labels
        ('statistics', 'statistics')
    """
    return InstalledDocumentation(packages, keep_duplicates=keep_duplicates, progress=progress)
