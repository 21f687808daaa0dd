"""Do two piles of text differ, by how much, and which documents make the difference?

Texts become vectors, each side a normal, and the two are compared by the squared Frechet distance
(:func:`kexue.stats.frechet_distance`), which :func:`kexue.stats.frechet_contributions` shares out among the documents.
The vectors are

- the rows of a file of features (.npy, .npz),
- those of the encoder of a workspace, if one is named or one of the sides is one: always the same space, so that the
  distances of several months can be compared with each other,
- else topics that are learned from the two sides (tf-idf, truncated SVD), in which both count the same, and how much
  of a text lies outside of them.

A distance between finite samples is never 0: what it is when the documents of both sides are dealt out at random says
whether the one found means anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue._checks import check_int
from kexue._progress import progress
from kexue.corpus import Document, read_documents
from kexue.workbench.manifest import NAME
from kexue.workbench.parts import DOCUMENTS
from kexue.workbench.workspace import Workspace

TOPICS = 32  # most directions in which texts are compared without an encoder
PER_TOPIC = 8  # documents of the smaller side for each of them: a covariance of more directions would be noise
OUTSIDE = 3.0  # weight of the coordinate that says how much of a text lies in none of the topics: one against many
FITTED = 20_000  # documents of a side that topics are learned from
BLOCK = 1024  # documents that become vectors at a time
TITLE = 80  # characters
ROUNDING = 1e-12  # of the variance: the distance of equal sides


@dataclass(frozen=True)
class Share:
    """What a document adds to the distance.

    Attributes:
        id: Id of the document; ``file.npy:17`` is a row of a file of features, counted from 1.
        source: "A" or "B".
        contribution: Part of the distance, which is the sum of all; negative if the document draws the sides together.
        title: Title or first words; empty for features.
    """

    id: str
    source: str
    contribution: float
    title: str = ""


@dataclass(frozen=True)
class Drift:
    """How two sides differ.

    Attributes:
        distance: Squared Frechet distance.
        chance: Mean distance when the documents are dealt out at random; None without permutations.
        p_value: Share of deals, the true one among them, that are at least as far apart; None without permutations.
        features: "given", "workspace" or "topics".
        dim: Width of the vectors.
        sizes: Documents of A and of B.
        documents: Shares, the most responsible first.
    """

    distance: float
    chance: float | None
    p_value: float | None
    features: str
    dim: int
    sizes: tuple[int, int]
    documents: list[Share]


@dataclass(frozen=True)
class _Side:
    ids: list[str]
    titles: list[str]
    rows: NDArray[np.float64]


def drift(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    workspace: str | os.PathLike[str] | None = None,
    permutations: int = 99,
    seed: int = 0,
    read_options: Mapping[str, Any] | None = None,
    log: Callable[[str], None] | None = None,
) -> Drift:
    """Compare two corpora, or two files of features.

    Args:
        a: A file or folder that :func:`kexue.corpus.read_documents` reads, a workspace, or a .npy or .npz file: an
            array ``(N, D)``, in an .npz under the name ``features`` or alone, with ``ids`` beside it if they are known.
        b: The same; both are texts, or both are features.
        workspace: Whose encoder makes the vectors of texts. Without, that of ``a`` or ``b``, if one is a workspace.
        permutations: How often the documents are dealt out at random; 0 leaves it out.
        seed: Of the deals and the topics.
        read_options: Passed to :func:`kexue.corpus.read_documents`.
        log: Called with one line for each finished step.

    Raises:
        ValueError: Fewer than two documents on a side, features beside texts, widths that differ, values that are not
            finite, no words at all.
        FileNotFoundError: There is no such file or folder.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> np.save(folder / "a.npy", np.array([[0.0], [1.0], [0.0], [1.0]]))
        >>> np.save(folder / "b.npy", np.array([[0.0], [1.0], [0.0], [9.0]]))
        >>> found = drift(folder / "a.npy", folder / "b.npy")
        >>> found.documents[0].id, found.documents[0].source
        ('b.npy:4', 'B')
    """
    check_int("permutations", permutations, 0)
    check_int("seed", seed, 0)
    say = log or (lambda line: None)
    paths = Path(a), Path(b)
    given = [path.suffix.lower() in (".npy", ".npz") for path in paths]
    if given[0] != given[1]:
        raise ValueError(f"A and B must both be texts or both be features (.npy, .npz); got {paths[0]} and {paths[1]}")
    if given[0]:
        if workspace is not None or read_options:
            raise ValueError("a workspace and options of the reader are for texts; A and B are features")
        kind, sides = "given", [_features(path) for path in paths]
        if sides[0].rows.shape[1] != sides[1].rows.shape[1]:
            widths = " and ".join(str(side.rows.shape[1]) for side in sides)
            raise ValueError(f"the features of A and B must have the same width; got {widths}")
    else:
        kind, sides = _vectors(paths, workspace, seed, dict(read_options or {}), say)
    for name, path, side in zip("AB", paths, sides, strict=True):
        if len(side.ids) < 2:
            raise ValueError(f"{name} must hold at least 2 documents; {path} holds {len(side.ids)}")
    x, y = sides[0].rows, sides[1].rows
    shares = _shares(x, y)
    spread = float(np.concatenate([x, y]).var(0).sum())
    distance = float(shares[0].sum() + shares[1].sum())
    if distance <= ROUNDING * spread:
        distance = 0.0
    chance = p_value = None
    if permutations:
        with progress("chance", permutations) as bar:
            drawn = []
            for value in _deals(x, y, permutations, seed):
                drawn.append(value)
                bar.advance()
        chance = float(np.mean(drawn))
        # Of few documents several deals are the same; rounding must not tell them apart.
        least = distance - 1e-6 * spread
        p_value = (1 + sum(value >= least for value in drawn)) / (permutations + 1)
        say(f"chance: {permutations} random deals")
    documents = [
        Share(side.ids[row], name, float(share[row]), side.titles[row])
        for name, side, share in zip("AB", sides, shares, strict=True)
        for row in range(len(side.ids))
    ]
    documents.sort(key=lambda document: -document.contribution)
    return Drift(distance, chance, p_value, kind, x.shape[1], (len(x), len(y)), documents)


def _features(path: Path) -> _Side:
    """Read a file of features."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            arrays = {"features": loaded}
        else:
            with loaded:
                arrays = {name: loaded[name] for name in loaded.files}
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is no file of features: {error}") from None
    alone = [name for name in arrays if name != "ids"]
    name = "features" if "features" in arrays else alone[0] if len(alone) == 1 else None
    if name is None:
        raise ValueError(f"{path} must hold one array, or one named features; got {sorted(arrays)}")
    rows = arrays[name]
    if rows.ndim != 2 or rows.shape[1] == 0 or rows.dtype.kind not in "fiu":
        raise ValueError(f"{path} must hold numbers of shape (N, D), D >= 1; got {rows.dtype} of shape {rows.shape}")
    rows = rows.astype(np.float64)
    if not np.isfinite(rows).all():
        raise ValueError(f"{path} must hold finite values; got {int((~np.isfinite(rows)).sum())} that are not")
    ids = [str(value) for value in arrays["ids"].ravel()] if "ids" in arrays else None
    if ids is not None and len(ids) != len(rows):
        raise ValueError(f"{path} must hold an id for each of its {len(rows)} rows; got {len(ids)}")
    return _Side(ids or [f"{path.name}:{row + 1}" for row in range(len(rows))], [""] * len(rows), rows)


def _vectors(
    paths: tuple[Path, Path],
    workspace: str | os.PathLike[str] | None,
    seed: int,
    options: dict[str, Any],
    say: Callable[[str], None],
) -> tuple[str, list[_Side]]:
    """Turn the texts of both sides into vectors."""
    opened: dict[Path, Workspace] = {}
    try:
        for path in paths:
            if (path / NAME).is_file() and (path / DOCUMENTS).is_file():
                opened[path] = Workspace.open(path)
        if workspace is not None:
            opened[Path(workspace)] = opened.get(Path(workspace)) or Workspace.open(Path(workspace))
        # A workspace is asked for its documents, everything else is read twice: to learn topics, and to see them.
        corpora: list[Iterable[Document]] = [
            opened[path]._parts.store if path in opened else read_documents(path, **options) for path in paths
        ]
        encoder = opened[Path(workspace)] if workspace is not None else next(iter(opened.values()), None)
        if encoder is None:
            encode: Callable[[Sequence[str]], NDArray[Any]] = _learn_topics(corpora, seed, say)
        else:
            encode = encoder.encode
        sides = [_encoded(name, corpus, encode, say) for name, corpus in zip("AB", corpora, strict=True)]
        return ("topics" if encoder is None else "workspace"), sides
    finally:
        for space in opened.values():
            space.close()


def _text(document: Document) -> str:
    if document.title and not document.text.startswith(document.title):
        return f"{document.title}\n{document.text}"
    return document.text


def _encoded(
    name: str,
    corpus: Iterable[Document],
    encode: Callable[[Sequence[str]], NDArray[Any]],
    say: Callable[[str], None],
) -> _Side:
    ids: list[str] = []
    titles: list[str] = []
    blocks: list[NDArray[Any]] = []
    with progress(f"vectors of {name}") as bar:
        for documents in _batches(corpus, BLOCK):
            ids += [document.id for document in documents]
            titles += [_title(document) for document in documents]
            blocks.append(encode([_text(document) for document in documents]))
            bar.advance(len(documents))
    say(f"{name}: {len(ids)} documents")
    return _Side(ids, titles, np.concatenate(blocks).astype(np.float64))


def _batches(corpus: Iterable[Document], size: int) -> Iterator[list[Document]]:
    documents = iter(corpus)
    while batch := list(islice(documents, size)):
        yield batch


def _title(document: Document) -> str:
    line = " ".join((document.title or document.text[: 4 * TITLE]).split())
    return line if len(line) <= TITLE else line[: TITLE - 1] + "…"


def _learn_topics(
    corpora: list[Iterable[Document]], seed: int, say: Callable[[str], None]
) -> Callable[[Sequence[str]], NDArray[Any]]:
    """Fit tf-idf and its leading directions to a sample of both sides; return what turns texts into vectors."""
    from scipy import sparse
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    from kexue.words import Tokenizer

    samples: list[list[str]] = []
    for name, corpus in zip("AB", corpora, strict=True):
        with progress(f"reading {name}") as bar:
            samples.append(_sample(corpus, seed, bar.advance))
    texts = samples[0] + samples[1]
    # A word of a single document says nothing about a side, unless there are but a few documents.
    words = TfidfVectorizer(
        analyzer=Tokenizer(), sublinear_tf=True, min_df=2 if len(texts) >= 100 else 1, max_features=100_000
    )
    fewest = min(len(sample) for sample in samples)
    if fewest < 2:
        raise ValueError(f"A and B must each hold at least 2 documents; got {len(samples[0])} and {len(samples[1])}")
    try:
        counts = words.fit_transform(texts)
    except ValueError:
        raise ValueError("A and B hold no words to compare them by") from None
    if counts.shape[1] < 2:
        raise ValueError("A and B hold a single word, which does not tell them apart")
    dim = min(TOPICS, max(4, fewest // PER_TOPIC), *counts.shape)
    # Both sides count the same, or the topics of a small one would not be seen beside those of a large one.
    scale = np.concatenate([np.full(len(sample), len(sample) ** -0.5) for sample in samples])
    with np.errstate(divide="ignore", invalid="ignore"):  # a share of the variance, which texts that are alike lack
        svd = TruncatedSVD(dim, random_state=seed).fit(sparse.diags(scale) @ counts)
    say(f"topics: {dim} of {counts.shape[1]} words in {len(texts)} documents")

    def encode(batch: Sequence[str]) -> NDArray[np.float64]:
        # A text of words that no topic knows would be nowhere: the last coordinate is the length of what is left over.
        counts = words.transform(batch)
        rows = svd.transform(counts)
        left = np.asarray(counts.multiply(counts).sum(1)).ravel() - (rows**2).sum(1)
        return np.column_stack([normalize(rows), OUTSIDE * np.sqrt(np.maximum(left, 0))])

    return encode


def _sample(corpus: Iterable[Document], seed: int, advance: Callable[[float], None]) -> list[str]:
    """At most ``FITTED`` texts, each with the same chance (reservoir sampling)."""
    rng = np.random.default_rng(seed)
    kept: list[str] = []
    for count, document in enumerate(corpus):
        if count < FITTED:
            kept.append(_text(document))
        elif (place := int(rng.integers(count + 1))) < FITTED:
            kept[place] = _text(document)
        advance(1)
    return kept


def _shares(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    import torch

    from kexue.stats import frechet_contributions

    shares = frechet_contributions(torch.from_numpy(x), torch.from_numpy(y))
    return shares[0].numpy(), shares[1].numpy()


def _deals(x: NDArray[np.float64], y: NDArray[np.float64], count: int, seed: int) -> Iterator[float]:
    """Distances of random deals of all rows into sides of the same sizes."""
    rows = np.concatenate([x, y])
    rows -= rows.mean(0)
    if len(rows) < rows.shape[1]:
        rows = rows @ np.linalg.qr(rows.T)[0]
    total, few = rows.T @ rows, min(len(x), len(y))
    rng = np.random.default_rng(seed)
    for _ in range(count):
        part = rows[rng.permutation(len(rows))[:few]]
        mean, moment = part.mean(0), part.T @ part
        rest = -few / (len(rows) - few) * mean  # all rows have mean 0
        yield _distance(
            mean, (moment - few * np.outer(mean, mean)) / (few - 1),
            rest, (total - moment - (len(rows) - few) * np.outer(rest, rest)) / (len(rows) - few - 1),
        )  # fmt: skip


def _distance(m: NDArray[Any], s: NDArray[Any], n: NDArray[Any], t: NDArray[Any]) -> float:
    w, v = np.linalg.eigh(s)
    factor = v * np.sqrt(np.maximum(w, 0))
    root = np.sqrt(np.maximum(np.linalg.eigvalsh(factor.T @ t @ factor), 0)).sum()
    return float(((m - n) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * root)
