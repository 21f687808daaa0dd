"""Geometric word vectors: PMI regression, "simpler GloVe" — 几何词向量.

Source: 科学空间 article 4671 (更别致的词向量模型(三):描述相关的模型) and its series.

    P(i,j) = P(i) P(j) exp(<v_i, v_j>)      that is      <v_i, v_j> = PMI_ij
    L = sum over pairs i < j seen together of lambda_ij (<v_i, v_j> - PMI_ij)^2,   lambda = (X/x_max)^alpha, cut at 1
    PMI_ij = ln X_ij - ln X_tot - ln n_i - ln n_j + 2 ln n_tot      (X_tot over ordered pairs i != j; n = word counts)

exp is the only function under which meanings add (r({a,c},w) = r({b,d},w) for a - b + c = d). exp(<v,v>) has no
normaliser and is no probability. Self pairs are left out of the loss: the model learns <v_i, v_i> from the other pairs.

Differences from the published program, and why: the default solver is exact (alternating least squares, no learning
rate) instead of Adagrad; pairs that never occur take part with a small weight w0 and target t0, which costs one Gram
matrix and improves the vectors more than any other change; analogies leave out their inputs. GloVe's trainable biases
are not used: its loss does not change when a constant vector is added to all vectors, so its norms and cosines mean
nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.base import BaseEstimator, TransformerMixin, clone

from kexue._checks import check_choice, check_int, check_real
from kexue._files import atomic_path, write_json
from kexue._progress import Bar, progress
from kexue.words import _adagrad, _als
from kexue.words._pairs import Counts, Pairs, from_counter, from_matrix, make_pairs
from kexue.words._queries import WordQueries
from kexue.words._text import Tokenize
from kexue.words._vocabulary import distinct_words
from kexue.words.cooccurrence import CooccurrenceCounter
from kexue.words.word_format import read_word2vec, write_word2vec

__all__ = ["PMIEmbedding"]

_FORMAT, _VERSION = "kexue.words.PMIEmbedding", 1
_SWEEPS = {"als": 3, "adagrad": 25, "spectral": 1}


class PMIEmbedding(WordQueries, TransformerMixin, BaseEstimator):
    """Word vectors whose inner product is the pointwise mutual information and whose norm is the weight of a word.

    Memory of fit: 24 bytes per unordered pair, about 45 while targets are computed.
    Time of an "als" sweep: pairs x D^2 multiplications.

    Args:
        dim: Width D of a table.
        model: "shared" one table; "concat" two tables, output [v; u] of width 2 D (better at grammar); "sum" two
            tables, output v + u.
        solver: "als" exact alternating solution; "adagrad" as published; "spectral" leading eigenvectors of the PMI
            matrix (zero where unseen; one table only).
        x_max: Count from which ``truncate`` cuts the weight, above 0.
        alpha: Exponent of the weight, at least 0.
        truncate: Cut weights at 1 (better meaning); False lets frequent pairs weigh more (better order of the norms).
        marginal: "unigram" uses word counts, "rowsum" the sums of the pair counts (then sum_j P(i,j) = P(i) exactly).
        reg: Weight of |v|^2, "als" only. Words with fewer neighbours than D need it. 1 suits millions of words; a
            corpus of some thousand words needs less (a warning says so).
        w0: Weight of each pair that was never seen, "als" only. 0 leaves them out.
        t0: Target (PMI) of the pairs that were never seen, "als" only.
        max_iter: Sweeps of "als" (default 3) or epochs of "adagrad" (default 25).
        random_state: Seed of the initial vectors and of the order of "adagrad".
        scale_reg: Multiply ``reg`` by the sum of the word's weights, so that rare words are not pulled in more than
            others.
        cds: Exponent of the context's distribution (0.75: Levy and Goldberg). 1 is off.
        shift: Subtract ln(shift) from the targets. 1 is off.
        learning_rate: Of "adagrad".
        n_jobs: Threads of "als"; the result does not depend on it.
        dtype: "float32" or "float64".
        counter: Settings for counting when :meth:`fit` is given text; None means ``CooccurrenceCounter()``.

    Attributes:
        vectors_: (V, D) array (2 D for "concat"), rows by ``vocabulary_``.
        vocabulary_: (V,) list of words, most frequent first.
        counts_: (V,) occurrences of the words; None when read from a word2vec file.
        loss_history_: After each sweep, what is minimised ("als": with the penalty and the unseen pairs) per seen pair.
        error_history_: After each sweep, the mean of lambda (<v_i, u_j> - PMI)^2 over the seen pairs: L per pair.

    Raises:
        ValueError: In :meth:`fit`: a parameter out of range, counts that are negative, not finite or not symmetric.

    Reference:
        https://spaces.ac.cn/archives/4671

    Example:
        >>> texts = ["the cat drinks milk", "the dog drinks water", "the cat and the dog sleep"] * 5
        >>> X = CooccurrenceCounter(window=3, min_count=1).fit(texts)
        >>> m = PMIEmbedding(dim=4, reg=0.01, x_max=10, random_state=0).fit(X)
        >>> m.vectors_.shape, m.vocabulary_[:2]
        ((8, 4), ['the', 'cat'])
        >>> m.related("milk", k=2, metric="pmi")[0][0]
        'drinks'
        >>> m.loss_history_[0] > m.loss_history_[-1]
        True
    """

    counts_: npt.NDArray[Any] | None

    def __init__(
        self,
        dim: int = 128,
        model: str = "shared",
        solver: str = "als",
        x_max: float = 100.0,
        alpha: float = 0.75,
        truncate: bool = True,
        marginal: str = "unigram",
        reg: float = 1.0,
        w0: float = 1e-3,
        t0: float = 0.0,
        max_iter: int | None = None,
        random_state: int | None = 0,
        scale_reg: bool = False,
        cds: float = 1.0,
        shift: float = 1.0,
        learning_rate: float = 0.1,
        n_jobs: int = 1,
        dtype: str = "float32",
        counter: CooccurrenceCounter | None = None,
    ) -> None:
        self.dim = dim
        self.model = model
        self.solver = solver
        self.x_max = x_max
        self.alpha = alpha
        self.truncate = truncate
        self.marginal = marginal
        self.reg = reg
        self.w0 = w0
        self.t0 = t0
        self.max_iter = max_iter
        self.random_state = random_state
        self.scale_reg = scale_reg
        self.cds = cds
        self.shift = shift
        self.learning_rate = learning_rate
        self.n_jobs = n_jobs
        self.dtype = dtype
        self.counter = counter

    def _check(self) -> None:
        check_int("dim", self.dim, 1)
        check_choice("model", self.model, ("shared", "concat", "sum"))
        check_choice("solver", self.solver, ("als", "adagrad", "spectral"))
        check_choice("marginal", self.marginal, ("unigram", "rowsum"))
        check_choice("dtype", self.dtype, ("float32", "float64"))
        check_real("x_max", self.x_max, above=0)
        check_real("alpha", self.alpha, minimum=0)
        for name in ("reg", "w0"):
            check_real(name, getattr(self, name), minimum=0)
        check_real("t0", self.t0)
        check_real("cds", self.cds, above=0)
        check_real("shift", self.shift, above=0)
        check_real("learning_rate", self.learning_rate, above=0)
        check_int("n_jobs", self.n_jobs, 1)
        for name, minimum in (("max_iter", 1), ("random_state", 0)):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), minimum)
        if self.solver == "spectral" and self.model != "shared":
            raise ValueError(f"solver='spectral' fits one table; got model={self.model!r}")

    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        vocabulary: Sequence[str] | None = None,
        counts: Any = None,
        progress: bool | None = None,
    ) -> PMIEmbedding:
        """Fit the vectors.

        Args:
            X: A fitted :class:`CooccurrenceCounter`; or a (V, V) matrix of counts (dense or sparse; the diagonal is
                ignored); or a corpus as of ``CooccurrenceCounter.fit``, which is counted with ``counter``.
            y: Ignored.
            vocabulary: Words of a matrix; default "0", "1", ...
            counts: (V,) occurrences of the words of a matrix; default its row sums.
            progress: Whether to show a progress bar; None shows it on a terminal.

        Returns:
            self.
        """
        self._check()
        data, words = self._read(X, vocabulary, counts)
        size = len(words)
        if self.solver == "spectral" and self.dim > size - 1:
            raise ValueError(f"dim must be at most V - 1 = {size - 1} for solver='spectral'; got {self.dim}")
        if not len(data.values):
            raise ValueError(f"no two different words of the {size} occur together: there is nothing to fit")
        pairs = make_pairs(
            data,
            one_table=self.model == "shared",
            x_max=float(self.x_max),
            alpha=float(self.alpha),
            truncate=bool(self.truncate),
            marginal=self.marginal,
            cds=float(self.cds),
            shift=float(self.shift),
            dtype=np.dtype(self.dtype),
        )
        self.loss_history_: list[float] = []
        self.error_history_: list[float] = []
        v, u = self._solve(pairs, size, progress)
        tables = {"shared": lambda: v, "concat": lambda: np.hstack([v, u]), "sum": lambda: v + u}
        self._forget()
        self.vectors_ = np.ascontiguousarray(tables[self.model]())
        self.vocabulary_ = words
        self.counts_ = np.asarray(data.words)
        return self

    def transform(self, X: Any) -> npt.NDArray[Any]:
        """Sentence vectors (N, D): sums of word vectors.

        Args:
            X: Token lists (or texts, split as by the counter).
        """
        if isinstance(X, CooccurrenceCounter):
            raise TypeError("transform takes token lists; the vectors of a fitted counter are in vectors_")
        return self.sentence_vectors(X)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to a folder: ``vectors.safetensors`` and ``model.json`` (with a format version).

        Args:
            path: The folder; made when missing. ``model.json`` is written last and names the digest of the vectors, so
                that an interrupted save is noticed by :meth:`load`.
        """
        self._check_fitted()
        from safetensors.numpy import save as to_bytes

        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"vectors": self.vectors_}
        if self.counts_ is not None:
            tensors["counts"] = self.counts_
        data = to_bytes(tensors)
        with atomic_path(folder / "vectors.safetensors") as temporary:
            temporary.write_bytes(data)
        settings = self.get_params(deep=False)
        del settings["counter"]
        write_json(
            folder / "model.json",
            {
                "format": _FORMAT,
                "version": _VERSION,
                "sha256": hashlib.sha256(data).hexdigest(),
                "settings": {name: getattr(value, "item", lambda v=value: v)() for name, value in settings.items()},
                "loss_history": self.loss_history_,
                "error_history": self.error_history_,
                "vocabulary": self.vocabulary_,
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PMIEmbedding:
        """Read a model that :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no model.
            ValueError: A damaged or unknown format (names the file and the remedy).
        """
        from safetensors.numpy import load as from_bytes

        folder = Path(path)
        text = (folder / "model.json").read_bytes()
        try:
            found = json.loads(text)
            kind, version = found["format"], found["version"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{folder / 'model.json'} is damaged or no model of {_FORMAT}") from None
        if kind != _FORMAT or version != _VERSION:
            raise ValueError(
                f"{folder / 'model.json'}: expected {_FORMAT} version {_VERSION}; got {kind} version {version}"
                " (written by another version of kexue? fit the model again)"
            )
        data = (folder / "vectors.safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != found["sha256"]:
            raise ValueError(f"{folder}: vectors.safetensors does not belong to model.json (a save was interrupted?)")
        tensors = from_bytes(data)
        model = cls(**found["settings"])
        model.vectors_ = tensors["vectors"]
        model.counts_ = tensors.get("counts")
        model.vocabulary_ = found["vocabulary"]
        model.loss_history_, model.error_history_ = found["loss_history"], found["error_history"]
        return model

    def save_word2vec_format(self, path: str | os.PathLike[str], binary: bool = False) -> None:
        """Write the vectors as word2vec text or binary file (float32; no counts, no settings).

        Raises:
            ValueError: A word with white space: the format has no way to hold it.
        """
        self._check_fitted()
        write_word2vec(path, self.vocabulary_, self.vectors_, binary)

    @classmethod
    def load_word2vec_format(cls, path: str | os.PathLike[str]) -> PMIEmbedding:
        """Read a word2vec text or binary file, as written by kexue, gensim, fastText or word2vec itself.

        The rows are taken to be ordered by frequency, as these programs write them (:meth:`similar` needs it).

        Raises:
            ValueError: A damaged file (names file and record).
        """
        words, vectors = read_word2vec(path)
        model = cls(dim=vectors.shape[1])
        model.vectors_, model.vocabulary_, model.counts_ = vectors, words, None
        model.loss_history_, model.error_history_ = [], []
        return model

    def _tokenizer(self) -> Tokenize | None:
        return None if self.counter is None else self.counter.tokenize

    def _read(self, X: Any, vocabulary: Sequence[str] | None, counts: Any) -> tuple[Counts, list[str]]:
        matrix = sparse.issparse(X) or (isinstance(X, np.ndarray) and X.dtype.kind in "biufc")
        if not matrix:
            if vocabulary is not None or counts is not None:
                raise ValueError("vocabulary and counts belong to a matrix; a counter or corpus brings its own")
            if not isinstance(X, CooccurrenceCounter):
                X = (CooccurrenceCounter() if self.counter is None else clone(self.counter)).fit(X)
            return from_counter(X), list(X.vocabulary_)
        data = from_matrix(X, counts, self.model == "shared")
        size = len(data.words)
        words = [str(k) for k in range(size)] if vocabulary is None else distinct_words(vocabulary)
        if len(words) != size:
            raise ValueError(f"vocabulary must have {size} words, one for each row; got {len(words)}")
        return data, words

    def _solve(self, pairs: Pairs, size: int, show: bool | None) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        sweeps = _SWEEPS[self.solver] if self.max_iter is None else int(self.max_iter)
        run = _als.Threads(int(self.n_jobs))
        try:
            with progress("fitting word vectors", total=sweeps * size, enabled=show) as bar:
                if self.solver == "als":
                    return self._alternate(pairs, size, sweeps, run, bar)
                if self.solver == "adagrad":
                    return self._descend(pairs, size, sweeps, run, bar)
                return self._decompose(pairs, size, run)
        finally:
            run.close()

    def _alternate(
        self, pairs: Pairs, size: int, sweeps: int, run: _als.Threads, bar: Bar
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        dim, dtype = int(self.dim), np.dtype(self.dtype)
        rng = np.random.default_rng(self.random_state)
        tables = 1 if pairs.one_table else 2
        start = rng.standard_normal((tables, size, dim)) / np.sqrt(dim)
        v, u = _als.padded(start[0].astype(dtype)), _als.padded(start[-1].astype(dtype))
        back = pairs if pairs.one_table else pairs.transposed()
        regs_v, regs_u = self._penalties(pairs), self._penalties(back)
        w0, t0 = float(self.w0), float(self.t0)
        space = _als.Workspace(v.shape[1], dtype, run.n_jobs)
        for _ in range(sweeps):
            if pairs.one_table:
                _als.sweep_one_table(pairs, v, w0, t0, regs_v, space, run, bar.advance)
                u = v
            else:
                _als.sweep_two_tables(pairs, v, u, w0, t0, regs_v, space, run, lambda n: bar.advance(n / 2))
                _als.sweep_two_tables(back, u, v, w0, t0, regs_u, space, run, lambda n: bar.advance(n / 2))
            data, seen = _als.squared_error(pairs, v, u, t0, run)
            self._note(pairs, data, _als.objective(pairs, v, u, data, seen, w0, t0, regs_v, regs_u), bar)
        explained = 1 - self.error_history_[-1] / max(pairs.mean_square(), np.finfo(float).tiny)
        if explained < 0.05 and self.reg > 0:
            warnings.warn(
                f"the vectors explain {max(explained, 0):.1%} of the weighted PMI: the penalty outweighs the counts "
                f"(small corpus?). Lower reg={self.reg:g} or x_max={self.x_max:g}",
                stacklevel=4,
            )
        return v[:, :dim], u[:, :dim]

    def _penalties(self, pairs: Pairs) -> npt.NDArray[np.float64]:
        regs = np.full(len(pairs.indptr) - 1, float(self.reg))
        if self.scale_reg:
            rows = np.repeat(np.arange(len(regs)), np.diff(pairs.indptr))
            regs *= np.bincount(rows, pairs.weights, minlength=len(regs))
        return regs

    def _descend(
        self, pairs: Pairs, size: int, epochs: int, run: _als.Threads, bar: Bar
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        dim, dtype = int(self.dim), np.dtype(self.dtype)
        rng = np.random.default_rng(self.random_state)
        v = ((rng.random((size, dim)) - 0.5) / dim).astype(dtype)
        gv = np.ones((size, dim), dtype)
        u, gu = v, gv
        if not pairs.one_table:
            u, gu = ((rng.random((size, dim)) - 0.5) / dim).astype(dtype), np.ones((size, dim), dtype)
        for _ in range(epochs):
            order = rng.permutation(size)
            _adagrad.epoch(
                order, pairs.indptr, pairs.indices, pairs.weights, pairs.targets, v, u, gv, gu,
                dtype.type(self.learning_rate), pairs.one_table,
            )  # fmt: skip
            data, _ = _als.squared_error(pairs, v, u, 0.0, run)
            bar.advance(size)
            self._note(pairs, data, data, bar)
        return v, u

    def _decompose(self, pairs: Pairs, size: int, run: _als.Threads) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        from scipy.sparse.linalg import eigsh

        dtype = np.dtype(self.dtype)
        matrix = sparse.csr_matrix((pairs.targets, pairs.indices, pairs.indptr), shape=(size, size), dtype=np.float64)
        start = np.random.default_rng(self.random_state).standard_normal(size)
        values, axes = eigsh(matrix, k=int(self.dim), which="LA", v0=start)
        order = np.argsort(-values)
        values, axes = values[order], axes[:, order]
        axes *= np.sign(axes[np.abs(axes).argmax(0), np.arange(len(values))])  # the sign of an eigenvector is free
        v = np.ascontiguousarray(axes * np.sqrt(np.clip(values, 0.0, None))).astype(dtype)
        data, _ = _als.squared_error(pairs, v, v, 0.0, run)
        self._note(pairs, data, data, Bar())
        return v, v

    def _note(self, pairs: Pairs, data: float, loss: float, bar: Bar) -> None:
        self.error_history_.append(data / pairs.size)
        self.loss_history_.append(loss / pairs.size)
        bar.advance(0, f"loss {self.loss_history_[-1]:.4f}")
        if not np.isfinite(loss):
            raise ValueError("the loss is not finite; lower learning_rate or check the counts")
