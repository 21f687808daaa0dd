"""text_rank against a dense float64 solve, isolated and empty pieces, vectors; select_pieces under a budget."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.tasks import select_pieces, text_rank
from kexue.tasks._text_words import linked_grams
from reference import spaces_rouge as reference


@given(st.lists(st.text("甲乙丙丁戊a ,", max_size=8), max_size=12), st.sampled_from([0.0, 0.5, 0.85, 0.999]))
@settings(max_examples=150, deadline=None)
def test_agrees_with_a_dense_solve(pieces, damping):
    ranks = text_rank(pieces, damping)
    expected = reference.walk(reference.similarity([list(linked_grams(p)) for p in pieces]), damping) if pieces else []
    np.testing.assert_allclose(ranks, expected, rtol=1e-9, atol=0)


def test_grams_are_words_and_pairs_of_characters():
    assert list(linked_grams("用MATLAB仿真, 好 it_is É中")) == ["用", "matlab", "仿真", "好", "it_is", "é", "中"]
    assert list(linked_grams("See (numpy.linalg), it's\nA，B。")) == ["see", "numpy.linalg", "it's", "a", "b"]
    assert list(linked_grams("中国人")) == ["中国", "国人"]
    assert list(linked_grams("，。-- ")) == []


def test_pieces_with_nothing_in_common_are_equal_and_lowest():
    assert text_rank([]).shape == (0,)
    assert text_rank(["甲"]).tolist() == [1]
    assert text_rank(["甲", "乙", "", "，"]).tolist() == [0.25] * 4
    ranks = text_rank(["甲乙丙", "乙丙丁", "", "戊己"])
    assert ranks[2] == ranks[3] == ranks.min()
    assert ranks[0] > ranks[3]
    assert ranks.sum() == pytest.approx(1)


def test_equal_pieces_have_equal_ranks():
    pieces = ["甲乙丙丁", "丙丁戊", "甲乙丙丁", "戊己庚甲", "甲乙丙丁"]
    ranks = text_rank(pieces)
    assert ranks[0] == ranks[2] == ranks[4]


def test_a_tokenizer_replaces_thelinked_grams():
    pieces = ["a-b", "b-c", "c-d"]
    expected = reference.walk(reference.similarity([p.split("-") for p in pieces]), 0.85)
    np.testing.assert_allclose(text_rank(pieces, tokenizer=lambda p: p.split("-")), expected, rtol=1e-10)


def clipped(vectors):
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = vectors / np.where(lengths > 0, lengths, 1)
    W = np.maximum(rows @ rows.T, 0)
    np.fill_diagonal(W, 0)
    return W


@pytest.mark.parametrize("n", [1, 2, 30])
def test_vectors_agree_with_all_positive_cosines(n):
    vectors = np.random.default_rng(n).normal(size=(n, 6))
    vectors[n // 2] = 0
    expected = reference.walk(clipped(vectors), 0.85)
    np.testing.assert_allclose(text_rank(vectors), expected, rtol=1e-9)
    np.testing.assert_allclose(text_rank(torch.tensor(vectors, requires_grad=True)), expected, rtol=1e-9)
    np.testing.assert_allclose(text_rank(vectors.astype(np.float32)), expected, rtol=1e-4)
    assert text_rank(torch.tensor(vectors).bfloat16()).sum() == pytest.approx(1)


def test_edges_of_vectors_go_to_the_nearest(monkeypatch):
    from kexue.tasks import _cosines

    vectors = np.random.default_rng(0).normal(size=(90, 5)) + 0.5
    W = clipped(vectors)
    nearest = np.argsort(-W, axis=1)[:, :4]
    keep = np.zeros_like(W, bool)
    np.put_along_axis(keep, nearest, True, 1)
    expected = reference.walk(np.where(keep | keep.T, W, 0), 0.85)
    monkeypatch.setattr(_cosines, "BLOCK_BYTES", 16 * 90 * 8)  # several blocks
    np.testing.assert_allclose(text_rank(vectors, neighbors=4), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"pieces": "甲"}, TypeError, "pieces must be an iterable of str"),
        ({"pieces": [1]}, TypeError, "pieces must be str; got 1"),
        ({"pieces": ["甲"], "damping": 1}, ValueError, "damping must be below 1"),
        ({"pieces": ["甲"], "damping": -0.1}, ValueError, "damping must be at least 0"),
        ({"pieces": ["甲"], "neighbors": 0}, ValueError, "neighbors must be at least 1"),
        ({"pieces": ["甲"], "tokenizer": 1}, TypeError, "tokenizer must be a function"),
        ({"pieces": ["甲"], "tokenizer": lambda piece: [[piece]]}, TypeError, "tokens must be hashable"),
        ({"pieces": ["甲"], "tokenizer": lambda piece: 5}, TypeError, "tokenizer must return an iterable"),
        ({"pieces": np.zeros((2, 2, 2))}, ValueError, "must be a matrix"),
        ({"pieces": np.array([[np.nan]])}, ValueError, "finite"),
        ({"pieces": np.array([["a"]])}, TypeError, "real numbers"),
    ],
)
def test_bad_input_of_text_rank(arguments, error, words):
    with pytest.raises(error, match=words):
        text_rank(**arguments)


def test_the_best_pieces_that_fit_in_the_order_of_the_document():
    pieces = ["甲乙丙丁", "戊己", "庚辛壬癸子", "丑寅"]
    assert select_pieces(pieces, [3, 1, 4, 2], 7) == [2, 3]  # the best, then what still fits
    assert select_pieces(pieces, [3, 1, 4, 2], 9) == [0, 2]
    assert select_pieces(pieces, [3, 1, 4, 2], 3, "piece") == [0, 2, 3]
    assert select_pieces(pieces, [1, 1, 1, 1], 2, "piece") == [0, 1]
    assert select_pieces(pieces, range(4, 0, -1), 6, redundancy=0) == [0, 1]
    assert select_pieces(["a b c", "d e", "f"], [1, 3, 2], 3, "word") == [1, 2]


def test_the_best_piece_is_taken_even_if_it_does_not_fit():
    assert select_pieces(["甲乙丙", "甲乙"], [1, 2], 1) == [1]
    assert select_pieces(["甲乙丙", "甲乙", " "], [1, 2, 3], 1) == [1]
    assert select_pieces([], [], 5) == []


def test_blank_pieces_are_not_taken():
    for unit in ("char", "word", "piece"):
        assert select_pieces(["", "a b", " \u3000", "c d"], [4, 1, 4, 2], 9, unit) == [1, 3]


def test_scores_may_be_a_tensor():
    scores = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    assert select_pieces(["甲", "乙"], scores, 1) == [1]


def test_repetitions_are_not_taken():
    pieces = ["甲乙丙丁", "乙丙丁。", "甲乙戊己", "庚辛"]
    assert select_pieces(pieces, [4, 3, 2, 1], 100, redundancy=0) == [0, 1, 2, 3]
    assert select_pieces(pieces, [4, 3, 2, 1], 100) == [0, 2, 3]
    assert select_pieces(pieces, [4, 3, 2.9, 2], 2, "piece", redundancy=1) == [0, 3]  # 2.9 * (1 - 1/3) < 2
    assert select_pieces(pieces, [4, 3, 2.9, 2], 2, "piece", redundancy=0.5) == [0, 2]
    assert select_pieces(["，", "，", "甲"], [1, 1, 1], 9) == [0, 1, 2]  # without n-grams, nothing is repeated


@given(
    st.lists(st.text("甲乙丙丁戊", max_size=5), min_size=1, max_size=9),
    st.integers(1, 20),
    st.sampled_from([0, 0.3, 1]),
    st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_selection_agrees_with_looking_at_every_piece(pieces, budget, redundancy, seed):
    scores = np.random.default_rng(seed).random(len(pieces))
    grams = [set(linked_grams(piece)) for piece in pieces]
    chosen, said, left = [], set(), budget
    while True:
        best, place = -1.0, -1
        for i, piece in enumerate(pieces):
            repeated = len(grams[i] & said) / max(1, len(grams[i]))
            if i in chosen or not piece or len(piece) > left or (redundancy and repeated == 1):
                continue
            if scores[i] * (1 - redundancy * repeated) > best:
                best, place = scores[i] * (1 - redundancy * repeated), i
        if place < 0 or left == 0:
            break
        chosen.append(place)
        said |= grams[place]
        left -= len(pieces[place])
    if not chosen:
        chosen = [max(range(len(pieces)), key=lambda i: scores[i] if pieces[i] else -1)]
    assert select_pieces(pieces, scores, budget, redundancy=redundancy) == sorted(chosen)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"scores": [1, 2]}, ValueError, r"one value for each of 1 pieces; got shape \(2,\)"),
        ({"scores": [-1.0]}, ValueError, "not negative"),
        ({"scores": [float("nan")]}, ValueError, "finite"),
        ({"scores": ["a"]}, TypeError, "scores must be real numbers"),
        ({"budget": 0}, ValueError, "budget must be at least 1"),
        ({"budget": 1.5}, TypeError, "budget must be an integer"),
        ({"unit": "line"}, ValueError, "unit must be one of"),
        ({"redundancy": 1.5}, ValueError, "redundancy must be at most 1"),
    ],
)
def test_bad_input_of_select_pieces(arguments, error, words):
    with pytest.raises(error, match=words):
        select_pieces(**{"pieces": ["甲"], "scores": [1], "budget": 1, **arguments})
