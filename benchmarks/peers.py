"""Peers that are programs in C or C++: fetched from the package index, compiled once, run as programs of their own.

- GloVe (Stanford, Apache-2.0): the sources of vocab_count, cooccur, shuffle and glove lie in the sdist of ``crucyble``.
- KenLM's ``count_ngrams``: in the sdist of ``kenlm``; it needs CMake and the Boost libraries.

A peer that cannot be fetched or compiled is left out, and the table says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from functools import cache
from pathlib import Path

_FOLDER = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kexue-benchmarks"

_GLOVE = """
import ctypes, sys
folder, corpus, window, least, step = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
text = lambda value: ctypes.create_string_buffer(value.encode(), 1000)
library = lambda name: ctypes.CDLL(f"{folder}/{name}.so")
if step == "count":
    library("vocab_count").vocab_count(
        text(corpus), text("vocab"), 0, ctypes.c_longlong(0), ctypes.c_longlong(least), text("log1"))
    library("cooccur").cooccur(
        text(corpus), text("vocab"), text("pairs"), 0, 1, window, text("overflow"), ctypes.c_float(4.0), text("log2"))
    library("shuffle").shuffle(text("pairs"), text("shuffled"), text("part"), 0, ctypes.c_float(4.0))
else:
    glove = library("glove")
    for name, value in (("num_threads", 1), ("num_iter", int(step)), ("vector_size", int(sys.argv[6]))):
        ctypes.c_int.in_dll(glove, name).value = value
    glove.train(text("shuffled"), text("vocab"), text("vectors"), text("gradients"), 0)
"""


def _sdist(name: str, version: str) -> Path | None:
    """The unpacked sources of a distribution, or None."""
    target = _FOLDER / f"{name}-{version}"
    if target.is_dir():
        return target
    _FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", name, "-d", folder]
        if subprocess.run([*command, f"{name}=={version}"], capture_output=True).returncode:
            return None
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            archive.extractall(_FOLDER, filter="data")
    return target if target.is_dir() else None


@cache
def glove() -> Path | None:
    """The folder of GloVe's compiled libraries, or None."""
    source, built = _sdist("crucyble", "0.1.0.dev4"), _FOLDER / "glove"
    if source is None or shutil.which("gcc") is None:
        return None
    built.mkdir(exist_ok=True)
    code = source / "src" / "lib" / "glove"
    for name in ("vocab_count", "cooccur", "shuffle", "glove"):
        library = built / f"{name}.so"
        options = ["-O3", "-march=native", "-w", "-fPIC", "-shared", f"-I{code}"]
        command = ["gcc", *options, "-o", str(library), str(code / f"{name}.c"), "-lm", "-lpthread"]
        if not library.exists() and subprocess.run(command, capture_output=True).returncode:
            return None
    return built


def run_glove(folder: Path, corpus: Path, window: int, min_count: int, step: str, dim: int = 0) -> None:
    """Count ("count") or train (number of epochs) in ``folder``."""
    command = [sys.executable, "-c", _GLOVE, str(glove()), str(corpus), str(window), str(min_count), step, str(dim)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


@cache
def kenlm() -> Path | None:
    """KenLM's compiled ``count_ngrams``, or None."""
    source = _sdist("kenlm", "0.3.0")
    if source is None or shutil.which("cmake") is None:
        return None
    program = source / "build" / "bin" / "count_ngrams"
    if not program.exists():
        options = ["-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_POLICY_VERSION_MINIMUM=3.5"]
        subprocess.run(["cmake", "-S", source, "-B", source / "build", *options], capture_output=True)
        subprocess.run(["cmake", "--build", source / "build", "--target", "count_ngrams", "-j2"], capture_output=True)
    return program if program.exists() else None


def run_kenlm(folder: Path, texts: list[str], order: int) -> None:
    """Write the characters of the texts separated by spaces, and count their n-grams."""
    with open(folder / "spaced", "w", encoding="utf-8") as file:
        file.writelines(" ".join(text) + "\n" for text in texts)
    # 1 GB is plenty for these texts; by default the program clears a large part of the machine's memory first.
    command = [
        str(kenlm()),
        "-o",
        str(order),
        "--memory=1G",
        "-T",
        f"{folder}/",
        "--write_vocab_list",
        f"{folder}/words",
    ]
    with open(folder / "spaced", "rb") as text, open(folder / "grams", "wb") as out:
        subprocess.run(command, stdin=text, stdout=out, stderr=subprocess.DEVNULL, check=True)
