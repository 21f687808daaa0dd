"""retrieval_report and its parts against sorting every row, ties, self, singletons, hostile input."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.tasks import _cosines, retrieval_report
from kexue.tasks._cosines import distinct_rows, top_of_block, unit_rows
from reference import sentence_similarity as reference

FIGURES = ("mean_rank", "mrr", "queries", "singletons", "best_f1")


def clustered(n, width=5, seed=0, dtype=np.float64):
    """Rows around a few centres, with duplicates and singletons."""
    rng = np.random.default_rng(seed)
    groups = np.append(rng.integers(0, max(1, n // 4), n - 2), [1000, 1001])
    rows = rng.normal(size=(2000, width))[groups] + rng.normal(size=(n, width))
    rows[n // 2] = rows[0]
    return rows.astype(dtype), groups


def assert_same(found, expected):
    for key, value in expected.items():
        if key == "threshold_curve":
            assert list(found[key]) == list(value)
            for column in value:
                assert found[key][column] == pytest.approx(value[column], abs=1e-12), column
        else:
            assert found[key] == pytest.approx(value, abs=1e-12), key


@pytest.mark.parametrize("n", [3, 17, 60])
def test_every_figure_agrees_with_sorting_all_rows(n):
    rows, groups = clustered(n, seed=n)
    groups[:2] = 0
    thresholds = [-1.0, 0.0, 0.37, 0.9, 2.0]
    found = retrieval_report(rows, groups, ks=(1, 2, 7), thresholds=thresholds)
    assert_same(found, reference.report(rows, groups, (1, 2, 7), thresholds))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12).flatmap(lambda n: st.tuples(*(st.lists(x, min_size=n, max_size=n) for x in (
    st.tuples(st.integers(-1, 1), st.integers(-1, 1)), st.integers(0, 3))))))  # fmt: skip
def test_ties_duplicates_and_zero_rows_agree_with_sorting(drawn):
    rows, groups = [list(v) for v in drawn[0]], drawn[1]
    if len(set(groups)) == len(groups):
        return
    # entries -1, 0, 1 in two dimensions: every cosine is 0, +-1 or +-sqrt(1/2), so that ties are the rule
    exact = [[round(reference.cosine(a, b), 9) for b in rows] for a in rows]
    ranks = []
    for i, g in enumerate(groups):
        order = sorted((j for j in range(len(rows)) if j != i), key=lambda j: (-exact[i][j], j))
        places = [p for p, j in enumerate(order, 1) if groups[j] == g]
        ranks += places[:1]
    for dtype in (np.float32, np.float64):
        found = retrieval_report(np.array(rows, dtype), groups, ks=(1, 3))
        assert found["mean_rank"] == pytest.approx(np.mean(ranks))
        assert found["top1"] == pytest.approx(np.mean(np.array(ranks) <= 1))
        assert found["top3"] == pytest.approx(np.mean(np.array(ranks) <= 3))


def test_the_row_with_the_higher_number_loses_a_tie():
    same = [[1.0, 0.0]] * 3
    # row 0 finds row 1 first; rows 1 and 2 find row 0 first
    assert retrieval_report(same, ["a", "b", "a"], ks=(1,))["mean_rank"] == 1.5  # rank 2 of row 0, rank 1 of row 2
    assert retrieval_report(same, ["a", "a", "b"], ks=(1,))["top1"] == 1.0
    assert retrieval_report(same, ["b", "a", "a"], ks=(1, 2))["top1"] == 0.0


def test_self_is_left_out_by_its_number_not_by_its_cosine():
    rows = np.zeros((4, 2))  # every cosine is 0, also that of a row with itself
    report = retrieval_report(rows, [0, 0, 1, 1], ks=(1, 2, 3))
    # row 0: 1 first; row 1: 0 first; row 2: 0, 1, 3; row 3: 0, 1, 2
    assert (report["top1"], report["top2"], report["top3"], report["mean_rank"]) == (0.5, 0.5, 1.0, 2.0)


def test_identical_rows_tie_exactly_wherever_they_stand():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 67)).astype(np.float32)
    rows[7::11] = rows[7]
    rows[13::11] = rows[7] * np.float32(3)  # parallel
    twins = sorted({*range(7, 300, 11), *range(13, 300, 11)})
    groups = np.arange(300)
    groups[twins[-1]] = groups[twins[0]]
    report = retrieval_report(rows, groups, ks=(1,))
    # the first twin sees all others in front of the last one; the last sees the first one first
    assert report["mean_rank"] == (len(twins) - 1 + 1) / 2


def test_singletons_ask_nothing_but_are_answers():
    report = retrieval_report([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]], ["a", "a", "alone"], ks=(1, 2))
    assert (report["queries"], report["singletons"], report["groups"]) == (2, 1, 2)
    assert (report["top1"], report["top2"]) == (0.0, 1.0)


def test_the_length_of_a_row_does_not_matter_even_where_its_square_overflows():
    rows, groups = clustered(40, dtype=np.float32)
    expected = retrieval_report(rows, groups)
    for factor in (1e-30, 1e30):
        assert retrieval_report(rows * np.float32(factor), groups)["mean_rank"] == expected["mean_rank"]


def test_blocks_do_not_change_anything(monkeypatch):
    rows, groups = clustered(200)
    whole = retrieval_report(rows, groups)
    monkeypatch.setattr(_cosines, "BLOCK_BYTES", 1)  # 16 rows
    assert retrieval_report(rows, groups) == whole


def test_no_n_by_n_matrix_is_ever_made(monkeypatch):
    shapes = []
    original = np.clip
    monkeypatch.setattr(_cosines, "BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr(_cosines.np, "clip", lambda x, *a, **k: shapes.append(x.shape) or original(x, *a, **k))
    rows, groups = clustered(700)
    retrieval_report(rows, groups)
    assert len(shapes) > 10
    assert max(a * b for a, b in shapes) <= (1 << 16) / 8 + 16 * 700


def test_arrays_tensors_and_lists_give_the_same_report():
    rows, groups = clustered(30, dtype=np.float32)
    expected = retrieval_report(rows, groups)
    tensor = torch.tensor(rows, requires_grad=True)
    assert retrieval_report(tensor, torch.tensor(groups)) == expected
    assert retrieval_report(rows.tolist(), [str(g) for g in groups])["top1"] == expected["top1"]
    assert retrieval_report(np.asfortranarray(rows)[:, ::-1], groups)["mrr"] == expected["mrr"]
    low = retrieval_report(tensor.bfloat16(), groups)
    assert low == retrieval_report(tensor.bfloat16().float(), groups)
    before = rows.copy()
    retrieval_report(rows, groups)
    assert np.array_equal(rows, before)


def test_groups_may_be_anything_hashable():
    rows = [[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]
    for groups in (["a", "a", None, None], [(1, 2), (1, 2), frozenset(), frozenset()], np.array([1.5, 1.5, 2, 2])):
        assert retrieval_report(rows, groups)["top1"] == 1.0


def test_the_report_is_json_and_the_default_curve_has_a_hundred_and_one_points():
    rows, groups = clustered(30)
    report = retrieval_report(rows, groups)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    curve = report["threshold_curve"]
    assert {len(column) for column in curve.values()} == {101}
    assert (curve["threshold"][0], curve["threshold"][-1]) == (0.0, 1.0)
    assert all(a >= b for a, b in zip(curve["coverage"], curve["coverage"][1:], strict=False))


def test_the_best_threshold_gives_the_figures_that_are_reported_for_it():
    rows, groups = clustered(60, dtype=np.float32)
    report = retrieval_report(rows, groups)
    again = retrieval_report(rows, groups, thresholds=[report["best_threshold"]])["threshold_curve"]
    for key in ("f1", "coverage", "precision", "accuracy"):
        assert again[key] == [report[f"best_{key}"]]


def test_a_cosine_reaches_the_threshold_that_equals_it():
    for k in range(1, 100):  # rows whose cosine is k / 100, but for the rounding of the square root
        rows = [[1.0, 0.0], [k, math.sqrt(100**2 - k**2)]]
        curve = retrieval_report(rows, [0, 0])["threshold_curve"]
        assert sum(curve["coverage"]) == k + 1, k


@pytest.mark.parametrize(
    ("vectors", "groups", "options", "error", "match"),
    [
        ([[1.0, math.nan], [1.0, 0.0]], [0, 0], {}, ValueError, "row 0 holds NaN"),
        ([[1.0, 0.0], [1.0, math.inf]], [0, 0], {}, ValueError, "row 1 holds NaN or infinity"),
        ([1.0, 2.0], [0, 0], {}, ValueError, r"shape \(N, D\)"),
        (np.zeros((2, 0)), [0, 0], {}, ValueError, r"\(2, 0\)"),
        ([[1.0], [1.0, 2.0]], [0, 0], {}, ValueError, r"shape \(N, D\)"),
        ([["a"], ["b"]], [0, 0], {}, TypeError, "real numbers"),
        (np.ones((2, 2), complex), [0, 0], {}, TypeError, "complex"),
        (np.ones((2, 2)), [0], {}, ValueError, "each of the 2 rows; got 1"),
        (np.ones((2, 2)), "ab", {}, TypeError, "str"),
        (np.ones((2, 2)), 3, {}, TypeError, "int"),
        (np.ones((2, 2)), [[0], [0]], {}, TypeError, "hashable; entry 0 is of type list"),
        (np.ones((2, 2)), [math.nan, 1.0], {}, ValueError, "NaN"),
        (np.ones((2, 2)), [0, 1], {}, ValueError, "two rows; got 2 rows in 2 groups"),
        (np.zeros((0, 2)), [], {}, ValueError, "got 0 rows"),
        (np.ones((2, 2)), [0, 0], {"ks": (0,)}, ValueError, "ks must be at least 1"),
        (np.ones((2, 2)), [0, 0], {"ks": (1.5,)}, TypeError, "1.5"),
        (np.ones((2, 2)), [0, 0], {"ks": 5}, TypeError, "sequence"),
        (np.ones((2, 2)), [0, 0], {"thresholds": [math.nan]}, ValueError, "finite"),
        (np.ones((2, 2)), [0, 0], {"thresholds": 0.5}, TypeError, "sequence of numbers; got 0.5"),
    ],
)
def test_bad_input_is_refused(vectors, groups, options, error, match):
    with pytest.raises(error, match=match):
        retrieval_report(vectors, groups, **options)


def test_k_beyond_the_number_of_rows_is_always_a_hit():
    rows, groups = clustered(10)
    groups[:2] = 0
    assert retrieval_report(rows, groups, ks=(9, 500))["top500"] == 1.0


def test_distinct_rows_are_found_also_when_hashes_collide(monkeypatch):
    rows = np.array([[1.0, 2.0], [0.0, 1.0], [1.0, 2.0], [2.0, 1.0]], np.float32)
    for hashes in (_cosines._hashes, lambda x: np.zeros(len(x), np.uint64)):
        monkeypatch.setattr(_cosines, "_hashes", hashes)
        distinct, inverse = distinct_rows(rows)
        assert len(distinct) == 3
        assert np.array_equal(distinct[inverse], rows)
        assert distinct_rows(rows[:2])[1] is None


def test_unit_rows_of_parallel_rows_are_equal_bit_by_bit():
    base = np.array([[1.0, -3.0, 7.0]], np.float32)
    rows = unit_rows(np.concatenate([base, 3 * base, 5e30 * base, np.zeros((1, 3), np.float32), [[-0.0, 1, 2]]]))
    assert rows[0].tobytes() == rows[1].tobytes()
    assert np.linalg.norm(rows[:3], axis=1) == pytest.approx(1, abs=1e-6)
    assert rows[3].tolist() == [0, 0, 0]
    assert not np.signbit(rows[4]).any()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(1, 6))
def test_the_top_of_a_block_is_that_of_a_stable_sort(drawn, k):
    block = np.array(drawn, np.float32)
    positions, scores = np.empty((len(block), k), np.int64), np.empty((len(block), k), np.float32)
    top_of_block(block, positions, scores)
    order = np.argsort(-block, axis=1, kind="stable")[:, :k]
    assert np.array_equal(positions, order)
    assert np.array_equal(scores, np.take_along_axis(block, order, 1))
