from __future__ import annotations

import zlib

import numpy as np
import pytest

from kexue.tasks import _piece_features
from kexue.tasks._piece_features import MARKS, WIDTH, PieceEncoder, hashed, hashes_of
from kexue.tasks._text_words import tokens

PIECES = ["Return the mean.", "..", "原告诉称，", "The mean is a number.", ""]


def test_hash_vectors_do_not_depend_on_the_other_pieces_and_have_length_one() -> None:
    vectors, words = hashed(PIECES)
    assert vectors.shape == (5, WIDTH)
    assert words[2] == list("原告诉称")
    length = np.sqrt(vectors.multiply(vectors).sum(1))
    np.testing.assert_allclose(length, [1, 0, 1, 1, 0], rtol=1e-6)
    for row, piece in enumerate(PIECES):
        np.testing.assert_array_equal(hashed([piece])[0].toarray()[0], vectors[[row]].toarray()[0])


def test_pieces_that_share_words_are_nearer_than_others() -> None:
    vectors = hashed(["the weighted mean of an array", "a weighted mean of arrays", "open a file for reading"])[0]
    near = (vectors @ vectors.T).toarray()
    assert near[0, 1] > 0.4 > near[0, 2]


@pytest.mark.parametrize("pieces", [PIECES, ["one"], [".."], ["🙂", "\ud800", "İİ"]])
def test_vectors_of_a_document_are_finite_and_the_same_each_time(pieces: list[str]) -> None:
    encode = PieceEncoder("hash")
    found = encode(pieces).toarray()
    assert found.shape == (len(pieces), WIDTH + MARKS)
    assert np.isfinite(found).all()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, PieceEncoder()(pieces).toarray())


def test_hashes_are_those_of_zlib_and_only_those_of_usual_words_are_remembered() -> None:
    for word in ("the", "weighted", "均", "x" * 5000):
        parts = [word] if len(word) <= 4 else [word, "^" + word[:4], word[-3:] + "$"]
        assert hashes_of(word) == tuple(zlib.crc32(part.encode()) for part in parts)
    before = _piece_features._kept_hashes.cache_info().currsize
    hashed(["y" * 100 + str(i) for i in range(10)])
    assert _piece_features._kept_hashes.cache_info().currsize == before


def test_words_are_lower_case_and_chinese_characters_stand_alone() -> None:
    assert tokens("The 3D-mean 均值。x_1") == ["the", "3d", "mean", "均", "值", "x", "1"]


def test_a_function_gives_its_own_vectors() -> None:
    encode = PieceEncoder(lambda texts: np.array([[len(text), 1] for text in texts]))
    np.testing.assert_array_equal(encode(["ab", ""]), [[2, 1], [0, 1]])


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda texts: np.zeros((3, 2)), ValueError, r"must return \(2, D\) for 2 texts; got \(3, 2\)"),
        (lambda texts: np.zeros(2), ValueError, r"must return \(2, D\)"),
        (lambda texts: [[1.0], [np.nan]], ValueError, "finite numbers; got others for text 1, 'b'"),
        (lambda texts: [["x"], ["y"]], TypeError, "must return numbers"),
    ],
)
def test_what_a_function_returns_is_checked(function: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PieceEncoder(function)(["a", "b"])


def test_other_encoders_are_refused() -> None:
    with pytest.raises(TypeError, match="encoder must be .*; got int"):
        PieceEncoder(3)
    with pytest.raises(ValueError, match="there is no folder"):
        PieceEncoder("hesh")
