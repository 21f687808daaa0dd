"""Train the encoder of a corpus from nothing but the corpus: two views of a document must find each other.

Every document is seen as a short view (its head, or a span of 4 to 20 tokens) and a long view (a span of 64 to 512
tokens of its body); a fifth of the tokens is dropped, and in half of the views the words of its own name are added.
Symmetric InfoNCE in the batch pulls the two together. The start is latent semantic analysis: the leading left singular
vectors of the sublinear tf-idf matrix, and log-weights from the inverse document frequency.

A batch is a pure function of (seed, step), so that :func:`kexue.training.fit` resumes bit for bit. The length of a run
follows from the number of documents (:func:`default_epochs`) and never from a clock.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor, nn

from kexue._checks import check_int
from kexue.losses import info_nce
from kexue.models._bags import count_words
from kexue.models.bag_encoder import BagEncoder, RowAdam
from kexue.training import batch_indices, fit, numpy_generator
from kexue.words._numba import compiled
from kexue.workbench.ranking import NAME_PART, TEXT_PART, heads_are_text
from kexue.workbench.tokens import TokenizedCorpus, concatenate

SHORT, LONG = (4, 20), (64, 512)  # lengths of spans, drawn log-uniformly
MOST = 64  # tokens of a head or a name that a view uses
HEAD, DROP, NAME = 0.5, 0.2, 0.5  # probabilities: head as the short view, token dropped, name added
TEMPERATURE, MARGIN = 1 / 20, 0.2
RATE, WARMUP = 3e-3, 50


@njit(inline="always")
def _uniform(key, counter):  # type: ignore[no-untyped-def]
    """A number in [0, 1) that depends on (key, counter) only: SplitMix64."""
    z = np.uint64(key) + np.uint64(counter) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.float64(z >> np.uint64(11)) / 9007199254740992.0


@compiled()
def _thin(source, begin, end, key, counter, drop, out, n):  # type: ignore[no-untyped-def]
    """Copy tokens, each kept with probability 1 - drop; at least one of them stays."""
    first = n
    for t in range(begin, end):
        if _uniform(key, counter + np.uint64(t - begin)) >= drop:
            out[n] = source[t]
            n += 1
    if n == first and end > begin:
        out[n] = source[begin]
        n += 1
    return n


@compiled()
def _views(documents, head, head_at, body, body_at, name, name_at, key, short, long, p_head, drop, p_name, out):  # type: ignore[no-untyped-def]
    """Short views of all documents, then long ones: token ids in ``out``, returns the offsets."""
    size = len(documents)
    offsets = np.zeros(2 * size + 1, np.int64)
    n = 0
    for view in range(2 * size):
        document = documents[view % size]
        is_short = view < size
        # 2^20 numbers for each view: 16 for its choices, the others for its tokens (head, body, name a third each)
        at = np.uint64(view) << np.uint64(20)
        begin, length = body_at[document], body_at[document + 1] - body_at[document]
        heads = head_at[document + 1] - head_at[document]
        if heads > 0 and ((is_short and (length < short[0] or _uniform(key, at) < p_head)) or length == 0):
            begin = head_at[document]
            n = _thin(head, begin, begin + min(heads, MOST), key, at + np.uint64(16), drop, out, n)
        else:
            low, high = short if is_short else long
            span = int(low * math.exp(_uniform(key, at + np.uint64(1)) * math.log((high + 1) / low)))
            span = min(span, length)
            start = begin + int(_uniform(key, at + np.uint64(2)) * (length - span + 1))
            n = _thin(body, start, start + span, key, at + np.uint64(1 << 18), drop, out, n)
        if _uniform(key, at + np.uint64(3)) < p_name:
            begin = name_at[document]
            last = min(name_at[document + 1], begin + MOST)
            n = _thin(name, begin, last, key, at + np.uint64(1 << 19), drop, out, n)
        offsets[view + 1] = n
    return offsets


class ViewSampler:
    """Batches of view pairs as a function of the step.

    Args:
        corpus: What is learned from. Its heads must already lack what may not be seen.
        batch_size: Documents of a step.
        seed: Seed of the order and of the views.

    Example:
        >>> from kexue.workbench.tokens import Ragged
        >>> rows = Ragged.from_rows([[0, 1, 2, 3], [4, 5, 6, 7]])
        >>> none = Ragged.from_rows([[], []])
        >>> blank = np.full(2, -1, np.int32)
        >>> pile = TokenizedCorpus(list("abcdefgh"), np.ones(8), none, rows, none, none, blank, [""] * 2, blank, blank)
        >>> batch = ViewSampler(pile, 2, seed=0)(step=5)
        >>> sorted(batch), len(batch["offsets"])
        (['ids', 'offsets', 'weights'], 5)
    """

    def __init__(self, corpus: TokenizedCorpus, batch_size: int, seed: int) -> None:
        check_int("batch_size", batch_size, 2)
        self.fields = [array for f in (corpus.head, corpus.body, corpus.name) for array in (f.values, f.offsets)]
        self.usable = np.flatnonzero(corpus.head.lengths + corpus.body.lengths >= SHORT[0])
        self.batch_size, self.seed = batch_size, seed
        self.size = len(corpus.vocabulary)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every usable document is seen once (rounded down: batches are always full)."""
        return max(1, len(self.usable) // self.batch_size)

    def __call__(self, step: int) -> dict[str, Tensor]:
        """The batch of a step: ``ids``, ``weights``, ``offsets`` of 2 B views, the short ones first."""
        size = min(self.batch_size, len(self.usable))
        chosen = self.usable[batch_indices(self.seed, step, size, len(self.usable), drop_last=True)]
        key = np.uint64(numpy_generator(self.seed, step).integers(0, 1 << 63))
        out = np.empty(2 * size * (LONG[1] + 2 * MOST), np.int32)
        kernel: Any = _views
        offsets = kernel(chosen, *self.fields, key, SHORT, LONG, HEAD, DROP, NAME, out)
        parts = count_words(out[: offsets[-1]], offsets, self.size)
        return dict(zip(("ids", "weights", "offsets"), map(torch.from_numpy, parts), strict=True))


class _Contrast(nn.Module):
    """The loss of a batch: each short view against all long ones, and the other way round."""

    def __init__(self, encoder: BagEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        z = self.encoder(ids, weights, offsets)
        short, long = z.chunk(2)
        return info_nce(short, long, temperature=TEMPERATURE, symmetric=True, margin=MARGIN)


def default_epochs(documents: int) -> int:
    """Passes over the corpus: 80 up to 5 000 documents, then fewer, falling with the fourth root of their number.

    On 40 000 documents 8, 20, 32 and 48 passes found .56, .67, .74 and .76 of 2 000 held-out questions among the first
    ten: a large corpus needs fewer passes, but not so few that the number of steps stays what it was.

    Example:
        >>> default_epochs(1_000), default_epochs(5_000), default_epochs(40_000), default_epochs(1_000_000)
        (80, 80, 48, 21)
    """
    check_int("documents", documents, 1)
    return max(1, round(80 * min(1.0, (5_000 / documents) ** 0.25)))


def initialize(encoder: BagEncoder, corpus: TokenizedCorpus, seed: int = 0) -> None:
    """Set the table to the left singular vectors of the sublinear tf-idf (mean length 1), the log-weights to log idf.

    Args:
        encoder: Its vocabulary is that of ``corpus``.
        corpus: Heads and bodies are used.
        seed: Seed of the randomised decomposition.
    """
    import scipy.sparse as sp
    from sklearn.utils.extmath import randomized_svd

    n, size = len(corpus), len(corpus.vocabulary)
    text = concatenate(corpus.head, corpus.body)
    ids, weights, offsets = count_words(np.ascontiguousarray(text.values), text.offsets, size)
    df = np.bincount(ids, minlength=size)
    idf = (np.log((1 + n) / (1 + df)) + 1).astype(np.float32)
    matrix = sp.csr_matrix((weights * idf[ids], ids, offsets), shape=(n, size))
    length = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
    matrix = sp.diags_array((1 / np.maximum(length, 1e-12)).astype(np.float32)) @ matrix
    rank = min(encoder.dim, n, size)
    iterations = 3 if n <= 10_000 else 1
    left = randomized_svd(matrix.T.tocsr(), rank, n_oversamples=10, n_iter=iterations, random_state=seed)[0]
    table = np.random.default_rng(seed).standard_normal((size, encoder.dim)).astype(np.float32) * 1e-3
    # The scale is that of words which text uses; words of single names have tiny vectors and would stretch the rest.
    common = df >= 2 if (df >= 2).any() else df >= 0
    table[:, :rank] += left / max(float(np.linalg.norm(left[common], axis=1).mean()), 1e-12)
    with torch.no_grad():
        encoder.table.copy_(torch.from_numpy(table))
        encoder.log_weight.copy_(torch.from_numpy(np.log(idf / idf[common].mean())))


def train_encoder(
    corpus: TokenizedCorpus,
    *,
    out: str | os.PathLike[str],
    dim: int = 256,
    epochs: int | None = None,
    batch_size: int = 512,
    seed: int = 0,
    held_out: NDArray[np.bool_] | None = None,
    tokenizer: Callable[[str], list[str]] | None = None,
    progress: bool | None = None,
    resume: bool = True,
    save_every: int = 1000,
) -> BagEncoder:
    """Learn word vectors and weights under which the parts of a document find each other.

    Args:
        corpus: What to learn from.
        out: Folder of checkpoints and metrics; called again after a crash, the run continues there.
        dim: Width of the vectors.
        epochs: Passes over the corpus; None takes :func:`default_epochs`.
        batch_size: Documents of a step; fewer when the corpus has fewer.
        seed: Seed of start, order and views.
        held_out: Bool ``(N,)``: documents whose head is never seen (their body and name are).
        tokenizer: Stored with the encoder, for :meth:`BagEncoder.encode`.
        progress: Show a bar; None if standard error is a terminal.
        resume: Continue a run found in ``out``.
        save_every: Steps between checkpoints.

    Returns:
        The encoder. A corpus with fewer than two usable documents gives the untrained start.

    Raises:
        ValueError: ``held_out`` has another length than the corpus, or a setting is out of range.
    """
    check_int("batch_size", batch_size, 2)
    if epochs is not None:
        check_int("epochs", epochs, 1)
    if held_out is not None:
        if held_out.shape != (len(corpus),):
            raise ValueError(f"held_out must have shape ({len(corpus)},); got {held_out.shape}")
        corpus = corpus.without_heads(held_out.astype(bool))
    encoder = BagEncoder(corpus.vocabulary, dim, tokenizer=tokenizer)
    initialize(encoder, corpus, seed)
    sampler = ViewSampler(corpus, batch_size, seed)
    if len(sampler.usable) < 2:
        return encoder
    steps = sampler.steps_per_epoch * (epochs or default_epochs(len(sampler.usable)))
    with _one_thread():
        fit(
            _Contrast(encoder),
            sampler,
            steps=steps,
            out=Path(out),
            save_every=save_every,
            seed=seed,
            resume=resume,
            optimizer=lambda parameters: RowAdam(parameters, lr=RATE, betas=(0.9, 0.98)),
            schedule="linear",
            warmup=min(WARMUP, max(1, steps // 10)),
            clip=None,
            fingerprint=_fingerprint(corpus, dim, batch_size),
            keep=1,
            label="encoder",
            show_progress=progress,
        )
    return encoder.eval()


def text_vectors(encoder: BagEncoder, corpus: TokenizedCorpus) -> NDArray[np.float32]:
    """Vectors of whole documents (head, body and name as one text), rows of length 1, ``(N, D)``: what is compared with
    what for related items.

    Args:
        encoder: The trained encoder.
        corpus: The documents, in the encoder's vocabulary.
    """
    return encoder.encode_ids(concatenate(corpus.head, corpus.body, corpus.name))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute with one thread while the block runs.

    A step is many small products: waiting for a second thread costs more than it computes (on two busy cores 240 ms of
    CPU a step instead of 20), and the bits do not depend on the machine's number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def document_vectors(encoder: BagEncoder, corpus: TokenizedCorpus, heads: bool | None = None) -> NDArray[np.float32]:
    """Vectors that queries are compared with, ``(N, D)``: 3 x (text with name) + 2 x (name alone), each of length 1.

    A name is short and says much; alone it would drown in the text. Without names this is 3 x text. The lengths differ
    on purpose: the product with a query of length 1 is the weighted sum of both cosines.

    Args:
        encoder: The trained encoder.
        corpus: The documents, in the encoder's vocabulary.
        heads: Whether heads count as text; None asks :func:`heads_are_text`.
    """
    heads = heads_are_text(corpus) if heads is None else heads
    fields = [corpus.head, corpus.body] if heads else [corpus.body]
    vectors = TEXT_PART * encoder.encode_ids(concatenate(*fields, corpus.name))
    if len(corpus.name.values):
        vectors += NAME_PART * encoder.encode_ids(corpus.name)
    return vectors


def _fingerprint(corpus: TokenizedCorpus, *settings: Any) -> str:
    digest = hashlib.sha256(repr((settings, SHORT, LONG, HEAD, DROP, NAME, RATE)).encode())
    digest.update("\n".join(corpus.vocabulary).encode("utf-8", "surrogatepass"))
    for field in (corpus.head, corpus.body, corpus.name):
        digest.update(np.ascontiguousarray(field.values).data)
        digest.update(np.ascontiguousarray(field.offsets).data)
    return digest.hexdigest()
