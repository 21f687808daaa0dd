"""PMIEmbedding: its solvers against dense float64 references, the loss, exact recovery and bad input."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import approx_fprime
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from kexue.words import CooccurrenceCounter, PMIEmbedding, _adagrad, _als, _pairs
from kexue.words._numba import gram_tile, kernel
from reference import pmi_embedding as reference


def corpus(words=40, size=3000, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.minimum(rng.zipf(1.4, size) - 1, words - 1)
    return [[f"w{k}" for k in part] for part in np.split(ids, range(50, size, 50))]


def counts_of(words=40, seed=0, window=3):
    return CooccurrenceCounter(window=window, min_count=1).fit(corpus(words, seed=seed))


def dense(counter):
    return counter.matrix_.toarray() / counter.unit_


def settings_of(**changed):
    return {"dim": 6, "x_max": 5.0, "reg": 0.3, "w0": 0.02, "t0": -0.7, "dtype": "float64", "max_iter": 2, **changed}


def start(size, dim, seed, tables=1):
    """The initial vectors of the alternating solver, as documented: standard normal over sqrt(dim)."""
    return np.random.default_rng(seed).standard_normal((tables, size, dim)) / np.sqrt(dim)


TARGETS = [
    {},
    {"truncate": False, "alpha": 0.5},
    {"marginal": "rowsum"},
    {"shift": 5.0, "alpha": 0.0},
]


@pytest.mark.slow  # compiles the float64 kernels
@pytest.mark.parametrize("changed", [*TARGETS, {"w0": 0.0}, {"reg": 2.0, "t0": 1.0}], ids=str)
def test_one_table_equals_gauss_seidel_by_normal_equations(changed):
    counter = counts_of()
    made = settings_of(**changed)
    model = PMIEmbedding(**made, random_state=3).fit(counter)
    pmi = reference.targets(
        dense(counter), counter.counts_, made.get("marginal", "unigram"), 1.0, made.get("shift", 1.0)
    )
    lam = reference.weights(dense(counter), 5.0, made.get("alpha", 0.75), made.get("truncate", True))
    first = start(len(lam), 6, 3)[0]
    expected = reference.gauss_seidel(first, pmi, lam, made["reg"], made["w0"], made["t0"], 2)
    np.testing.assert_allclose(model.vectors_, expected, rtol=1e-8, atol=1e-9)
    value = reference.objective(expected, expected, pmi, lam, made["reg"], made["w0"], made["t0"], True)
    pairs = counter.lower_.nnz
    assert model.loss_history_[-1] == pytest.approx(value / pairs, rel=1e-9)
    error = reference.objective(expected, expected, pmi, lam, 0, 0, 0, True)
    assert model.error_history_[-1] == pytest.approx(error / pairs, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("changed", [*TARGETS, {"w0": 0.0}, {"cds": 0.75}], ids=str)
@pytest.mark.parametrize("kind", ["concat", "sum"])
def test_two_tables_equal_alternating_normal_equations(changed, kind):
    counter = counts_of(seed=1)
    made = settings_of(model=kind, **changed)
    model = PMIEmbedding(**made).fit(counter)
    pmi = reference.targets(
        dense(counter), counter.counts_, made.get("marginal", "unigram"), made.get("cds", 1.0), made.get("shift", 1.0)
    )
    lam = reference.weights(dense(counter), 5.0, made.get("alpha", 0.75), made.get("truncate", True))
    first = start(len(lam), 6, 0, 2)
    v, u = reference.alternate(first[0], first[1], pmi, lam, 0.3, made["w0"], -0.7, 2)
    np.testing.assert_allclose(model.vectors_, np.hstack([v, u]) if kind == "concat" else v + u, rtol=1e-7, atol=1e-8)
    value = reference.objective(v, u, pmi, lam, 0.3, made["w0"], -0.7, False)
    assert model.loss_history_[-1] == pytest.approx(value / counter.matrix_.nnz, rel=1e-9)


def test_an_asymmetric_matrix_is_fitted_by_two_tables():
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.5, (17, 17)).astype(float)
    words = counts.sum(1) + 1
    model = PMIEmbedding(**settings_of(model="concat")).fit(counts, counts=words)
    pmi, lam = reference.targets(counts, words), reference.weights(counts, 5.0, 0.75, True)
    first = start(17, 6, 0, 2)
    v, u = reference.alternate(first[0], first[1], pmi, lam, 0.3, 0.02, -0.7, 2)
    np.testing.assert_allclose(model.vectors_, np.hstack([v, u]), rtol=1e-7, atol=1e-8)


def test_one_table_averages_the_smoothed_targets_of_both_directions():
    counter = counts_of()
    pairs = _pairs.make_pairs(
        _pairs.from_counter(counter), one_table=True, x_max=1.0, alpha=1.0, truncate=True, marginal="unigram",
        cds=0.75, shift=1.0, dtype=np.float64,
    )  # fmt: skip
    one_way = reference.targets(dense(counter), counter.counts_, cds=0.75)
    found = sparse.csr_matrix((pairs.targets, pairs.indices, pairs.indptr), shape=one_way.shape).toarray()
    np.testing.assert_allclose(found, np.nan_to_num((one_way + one_way.T) / 2), atol=1e-12)


def test_scaled_penalty_multiplies_by_the_sum_of_the_weights_of_a_word():
    counter = counts_of()
    model = PMIEmbedding(**settings_of(scale_reg=True, reg=0.05, max_iter=1)).fit(counter)
    pmi, lam = reference.targets(dense(counter), counter.counts_), reference.weights(dense(counter), 5.0, 0.75, True)
    expected = start(len(lam), 6, 0)[0]
    for i in range(len(lam)):
        expected[i] = reference.solve_row(i, expected, pmi, lam, 0.05 * lam[i].sum(), 0.02, -0.7)
    np.testing.assert_allclose(model.vectors_, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shared", "concat"])
def test_adagrad_equals_the_published_update_pair_by_pair(kind):
    counter = counts_of(15)
    one = kind == "shared"
    model = PMIEmbedding(dim=5, model=kind, solver="adagrad", max_iter=3, x_max=5.0, dtype="float64").fit(counter)
    pmi, lam = reference.targets(dense(counter), counter.counts_), reference.weights(dense(counter), 5.0, 0.75, True)
    rng = np.random.default_rng(0)
    size = len(lam)
    v = (rng.random((size, 5)) - 0.5) / 5
    gv = np.ones_like(v)
    u, gu = (v, gv) if one else ((rng.random((size, 5)) - 0.5) / 5, np.ones_like(v))
    for _ in range(3):
        reference.adagrad_epoch(rng.permutation(size), v, u, gv, gu, pmi, lam, 0.1, one)
    np.testing.assert_allclose(model.vectors_, v if one else np.hstack([v, u]), rtol=1e-7, atol=1e-10)


def test_adagrad_skips_pairs_whose_error_is_not_finite():
    table = np.array([[1.0, 1.0], [np.inf, 1.0], [1.0, 2.0]])
    sums = np.ones_like(table)
    indptr, indices = np.array([0, 0, 1, 2]), np.array([0, 0], np.int32)
    _adagrad.epoch(np.arange(3), indptr, indices, np.ones(2), np.zeros(2), table, table, sums, sums, 0.1, True)
    assert np.isfinite(table[0]).all()
    assert np.isfinite(table[2]).all()
    assert (table[2] < [1.0, 2.0]).all()
    assert (sums[1] == 1).all()


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from(["shared", "concat"]),
    st.sampled_from([0.0, 1e-3, 0.1]),
    st.sampled_from([0.0, -2.0]),
    st.integers(1, 40),
    st.booleans(),
)
def test_the_loss_never_rises(seed, kind, w0, t0, dim, scale):
    model = PMIEmbedding(
        dim=dim,
        model=kind,
        w0=w0,
        t0=t0,
        reg=0.01,
        x_max=3,
        max_iter=6,
        random_state=seed,
        scale_reg=scale,
        dtype="float64",
    ).fit(counts_of(25, seed=seed % 7))
    history = np.array(model.loss_history_)
    assert (np.diff(history) <= 1e-9 * history[:-1]).all()


def test_the_loss_does_not_rise_in_float32_either_beyond_rounding():
    model = PMIEmbedding(dim=30, reg=0.01, x_max=3, max_iter=15).fit(counts_of(200))
    history = np.array(model.loss_history_)
    assert (np.diff(history) <= 1e-5 * history[:-1]).all()
    assert history[-1] < 0.9 * history[0]


@pytest.mark.slow
def test_the_gradient_of_the_loss_vanishes_where_the_solver_stops():
    counter = counts_of(14)
    model = PMIEmbedding(**settings_of(dim=3, max_iter=3000)).fit(counter)
    pmi, lam = reference.targets(dense(counter), counter.counts_), reference.weights(dense(counter), 5.0, 0.75, True)

    def loss(flat):
        v = flat.reshape(-1, 3)
        return reference.objective(v, v, pmi, lam, 0.3, 0.02, -0.7, True)

    point = model.vectors_.ravel()
    assert np.abs(approx_fprime(point, loss, 1e-6)).max() < 1e-4
    moved = point + 0.01 * np.random.default_rng(0).standard_normal(point.shape)
    assert np.abs(approx_fprime(moved, loss, 1e-6)).max() > 1e-2
    assert loss(moved) > loss(point)


def test_planted_vectors_are_recovered_exactly_and_the_analogy_is_first():
    rng = np.random.default_rng(0)
    size, dim = 150, 6
    truth = rng.standard_normal((size, dim)) * 0.6
    truth[3] = truth[0] - truth[1] + truth[2]
    share = 1 / np.arange(3, size + 3)
    share /= share.sum()
    counts = 1e9 * np.outer(share, share) * np.exp(truth @ truth.T)
    np.fill_diagonal(counts, 0)
    model = PMIEmbedding(dim=dim, reg=1e-9, w0=0, alpha=0, shift=1e9 / counts.sum(), max_iter=60, dtype="float64").fit(
        counts, counts=share
    )
    error = np.abs(model.vectors_ @ model.vectors_.T - truth @ truth.T)
    np.fill_diagonal(error, 0)
    assert error.max() < 1e-5
    assert model.analogy(["0", "2"], ["1"], k=1)[0][0] == "3"


def test_rowsum_marginals_make_the_joint_distribution_consistent():
    counter = counts_of()
    pairs = _pairs.make_pairs(
        _pairs.from_counter(counter), one_table=True, x_max=1.0, alpha=1.0, truncate=True, marginal="rowsum",
        cds=1.0, shift=1.0, dtype=np.float64,
    )  # fmt: skip
    share = dense(counter).sum(1) / dense(counter).sum()
    ratio = sparse.csr_matrix((np.exp(pairs.targets), pairs.indices, pairs.indptr), shape=(len(share),) * 2)
    np.testing.assert_allclose(ratio @ share, np.ones(len(share)), rtol=1e-12)


def test_glove_does_not_notice_a_shift_of_all_vectors_but_this_model_does():
    counter = counts_of()
    x = dense(counter)
    lam = reference.weights(x, 5.0, 0.75, True)
    rng = np.random.default_rng(0)
    size = len(x)
    v, u = rng.standard_normal((2, size, 5))
    b, c = rng.standard_normal((2, size))
    with np.errstate(divide="ignore"):
        logs = np.where(x > 0, np.log(x), np.nan)
    shift = 30 * rng.standard_normal(5)
    before = reference.glove_loss(v, u, b, c, logs, lam)
    after = reference.glove_loss(
        v + shift, u + shift, b - v @ shift - shift @ shift / 2, c - u @ shift - shift @ shift / 2, logs, lam
    )
    assert after == pytest.approx(before, rel=1e-10)
    unit = (v + shift) / np.linalg.norm(v + shift, axis=1, keepdims=True)
    assert (unit @ unit.T).mean() > 0.9
    pmi = reference.targets(x, counter.counts_)
    ours = [reference.objective(w, w, pmi, lam, 0, 0, 0, True) for w in (v, v + shift)]
    assert ours[1] > 2 * ours[0]


def test_the_spectral_solution_is_the_positive_part_of_the_pmi_matrix():
    counter = counts_of()
    model = PMIEmbedding(dim=8, solver="spectral", dtype="float64").fit(counter)
    pmi = np.nan_to_num(reference.targets(dense(counter), counter.counts_))
    values, axes = np.linalg.eigh(pmi)
    best = np.argsort(-values)[:8]
    expected = (axes[:, best] * np.clip(values[best], 0, None)) @ axes[:, best].T
    np.testing.assert_allclose(model.vectors_ @ model.vectors_.T, expected, atol=1e-9)
    again = PMIEmbedding(dim=8, solver="spectral", dtype="float64").fit(counter)
    np.testing.assert_array_equal(model.vectors_, again.vectors_)


@pytest.mark.parametrize("kind", ["shared", "sum"])
def test_equal_seeds_give_equal_bits_for_any_number_of_threads(kind):
    counter = counts_of(300)
    one, three = (PMIEmbedding(dim=20, model=kind, reg=0.1, x_max=5, n_jobs=n).fit(counter) for n in (1, 3))
    other = PMIEmbedding(dim=20, model=kind, reg=0.1, x_max=5, random_state=1).fit(counter)
    np.testing.assert_array_equal(one.vectors_, three.vectors_)
    assert one.loss_history_ == three.loss_history_
    assert not np.array_equal(one.vectors_, other.vectors_)
    assert one.vectors_.dtype == np.float32


def test_float32_agrees_with_float64():
    counter = counts_of(200)
    low, high = (PMIEmbedding(dim=16, reg=0.1, x_max=5, dtype=d).fit(counter) for d in ("float32", "float64"))
    np.testing.assert_allclose(low.vectors_, high.vectors_, atol=2e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_register_tile_adds_an_exact_outer_product(dtype):
    @kernel
    def add(left, i, right, j, out, count):
        gram_tile(left, i, right, j, out, count)

    rng = np.random.default_rng(0)
    left, right = rng.integers(-8, 9, (7, 20)).astype(dtype), rng.integers(-8, 9, (7, 48)).astype(dtype)
    out = np.full((16, 33), 5, dtype)
    add(left, 8, right, 16, out, 7)
    expected = np.full((16, 33), 5, dtype)
    expected[8:12, 16:32] += left[:, 8:12].T @ right[:, 16:32]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("width", [16, 48, 112])
def test_the_blocked_factorisation_solves(width):
    rng = np.random.default_rng(width)
    factor = rng.standard_normal((width + 5, width))
    matrix, side = factor.T @ factor, rng.standard_normal(width)
    space = _als.Workspace(width, np.float64, 1)
    system, vector = matrix.copy(), side.copy()
    _als._solve(system, vector, space.negative[0], space.scale[0])
    np.testing.assert_allclose(matrix @ vector, side, atol=1e-7)


def test_a_singular_system_gives_a_finite_solution():
    counter = CooccurrenceCounter(window=1, min_count=1).fit(["a b", "a c", "b c", "a d"] * 3)
    model = PMIEmbedding(dim=12, reg=0, w0=0, max_iter=20, x_max=1, dtype="float64").fit(counter)
    assert np.isfinite(model.vectors_).all()
    assert model.error_history_[-1] < 1e-9


def test_a_word_without_neighbours_gets_the_zero_vector_when_unseen_pairs_do_not_count():
    counter = CooccurrenceCounter(window=1, min_count=1).fit(["a b", "a b", "alone"])
    for reg in (0.0, 0.1):
        model = PMIEmbedding(dim=3, reg=reg, w0=0, x_max=1).fit(counter)
        assert not model["alone"].any()
        assert np.isfinite(model.vectors_).all()


def test_a_penalty_that_outweighs_the_counts_is_warned_about():
    counter = counts_of()
    with pytest.warns(UserWarning, match="Lower reg=100"):
        PMIEmbedding(dim=4, reg=100).fit(counter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PMIEmbedding(dim=4, reg=0.01, x_max=5).fit(counter).vectors_.any()


def test_matrices_in_any_form_equal_the_counter():
    counter = counts_of()
    made = settings_of()
    expected = PMIEmbedding(**made).fit(counter)
    full = dense(counter)
    full[np.arange(40), np.arange(40)] = 7.0  # the diagonal does not count
    for matrix in (full, sparse.csr_matrix(full), sparse.coo_matrix(full)):
        found = PMIEmbedding(**made).fit(matrix, counts=counter.counts_, vocabulary=counter.vocabulary_)
        np.testing.assert_allclose(found.vectors_, expected.vectors_, rtol=1e-9, atol=1e-12)
        assert found.vocabulary_ == expected.vocabulary_


def test_text_is_counted_with_the_given_settings_and_works_in_a_pipeline():
    documents = corpus()
    settings_ = CooccurrenceCounter(window=3, min_count=1)
    made = settings_of(counter=settings_)
    np.testing.assert_array_equal(
        PMIEmbedding(**made).fit(documents).vectors_, PMIEmbedding(**made).fit(counts_of()).vectors_
    )
    assert not hasattr(settings_, "vocabulary_")
    labels = [("w3" in tokens) for tokens in documents]
    pipeline = make_pipeline(PMIEmbedding(**made), LogisticRegression(max_iter=1000)).fit(documents, labels)
    assert pipeline.score(documents, labels) > 0.7
    assert clone(pipeline)[0].get_params()["dim"] == 6


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"dim": 0}, ValueError),
        ({"dim": 2.0}, TypeError),
        ({"model": "two"}, ValueError),
        ({"solver": "sgd"}, ValueError),
        ({"marginal": "joint"}, ValueError),
        ({"x_max": 0}, ValueError),
        ({"x_max": float("nan")}, ValueError),
        ({"alpha": -0.1}, ValueError),
        ({"reg": -1}, ValueError),
        ({"w0": -1e-3}, ValueError),
        ({"t0": float("inf")}, ValueError),
        ({"cds": 0}, ValueError),
        ({"shift": 0}, ValueError),
        ({"max_iter": 0}, ValueError),
        ({"learning_rate": 0}, ValueError),
        ({"n_jobs": 0}, ValueError),
        ({"dtype": "float16"}, ValueError),
        ({"random_state": -1}, ValueError),
        ({"random_state": "a"}, TypeError),
        ({"solver": "spectral", "model": "sum"}, ValueError),
        ({"solver": "spectral", "dim": 40}, ValueError),
    ],
    ids=str,
)
def test_bad_settings_are_rejected(changed, error):
    with pytest.raises(error):
        PMIEmbedding(**changed).fit(counts_of())


def test_the_largest_width_of_the_spectral_solver_is_accepted():
    assert PMIEmbedding(dim=39, solver="spectral").fit(counts_of()).vectors_.shape == (40, 39)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.ones((2, 3)), "square"),
        (np.zeros((0, 0)), "square"),
        (np.array([[0, -1.0], [-1, 0]]), "not negative; got -1"),
        (np.array([[0, np.nan], [1, 0]]), "finite"),
        (np.array([[0, np.inf], [np.inf, 0]]), "finite"),
        (np.array([[0, 1.0], [2, 0]]), r"symmetric counts; got X\[0, 1\] = 1.0 and X\[1, 0\] = 2.0"),
        (np.eye(3), "nothing to fit"),
        (np.zeros((3, 3)), "nothing to fit"),
    ],
)
def test_bad_counts_are_rejected(matrix, message):
    with pytest.raises(ValueError, match=message):
        PMIEmbedding(dim=2).fit(matrix)


def test_bad_words_and_counts_of_a_matrix_are_rejected():
    x = np.ones((3, 3))
    with pytest.raises(ValueError, match="3 words"):
        PMIEmbedding(dim=2).fit(x, vocabulary=["a"])
    with pytest.raises(ValueError, match="repeat words"):
        PMIEmbedding(dim=2).fit(x, vocabulary=["a", "b", "a"])
    with pytest.raises(ValueError, match="3 numbers"):
        PMIEmbedding(dim=2).fit(x, counts=[1, 2])
    with pytest.raises(ValueError, match="not negative"):
        PMIEmbedding(dim=2).fit(x, counts=[1, -2, 3])
    with pytest.raises(ValueError, match="word 1 has pairs but its count is 0"):
        PMIEmbedding(dim=2).fit(x, counts=[1, 0, 3])
    with pytest.raises(ValueError, match="belong to a matrix"):
        PMIEmbedding(dim=2).fit(counts_of(), vocabulary=["a"])
    with pytest.raises(TypeError, match="numbers"):
        PMIEmbedding(dim=2).fit(x.astype(complex))
    with pytest.raises(ValueError, match="not been fitted"):
        PMIEmbedding(dim=2).fit(CooccurrenceCounter())


@pytest.mark.slow
def test_a_learning_rate_that_diverges_is_reported():
    with pytest.raises(ValueError, match="lower learning_rate"):
        PMIEmbedding(dim=4, solver="adagrad", learning_rate=1e30, max_iter=3).fit(counts_of())
