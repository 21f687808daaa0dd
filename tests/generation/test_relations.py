"""Soft relations of a sentence to what is wanted."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from kexue.generation import Diversity, JointRelation, SentenceMatch, WordMatch

TABLE = np.random.default_rng(0).normal(size=(12, 5))
TEXTS = st.lists(st.integers(0, 11), min_size=1, max_size=8).map(tuple)


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@given(TEXTS, st.lists(st.integers(0, 11), min_size=1, max_size=3), st.floats(0, 6))
def test_word_match_is_the_worst_best_cosine(text, keywords, exponent):
    worst = min(max(cosine(TABLE[k], TABLE[t]) for t in text) for k in keywords)
    got = WordMatch(keywords, TABLE, exponent)(text)
    assert got == pytest.approx(min(1.0, max(worst, 1e-3)) ** exponent, rel=1e-9)


@given(TEXTS, TEXTS)
def test_sentence_match_is_the_cosine_of_the_means(text, source):
    weights = np.linspace(0.1, 2, 12)
    unit = TABLE / np.linalg.norm(TABLE, axis=1, keepdims=True) * weights[:, None]
    expected = cosine(unit[list(text)].mean(0), unit[list(source)].mean(0))
    got = SentenceMatch(source, torch.tensor(TABLE), weights, exponent=2.0)(text)
    assert got == pytest.approx(min(1.0, max(expected, 1e-3)) ** 2, rel=1e-6)


@given(TEXTS, TEXTS)
def test_diversity_is_one_minus_bleu(text, source):
    orders = min(4, len(text), len(source))
    smooth = SmoothingFunction().method2 if set(text) & set(source) else SmoothingFunction().method0
    bleu = 0.0
    if set(text) & set(source):
        bleu = sentence_bleu([source], text, weights=[1 / orders] * orders, smoothing_function=smooth)
    assert Diversity(source, floor=1e-6)(text) == pytest.approx(min(1.0, max(1 - bleu, 1e-6)), abs=1e-9)


def test_batches_equal_single_sentences_and_products_are_products():
    relations = [WordMatch([[1, 2]], TABLE), SentenceMatch((3, 4), TABLE), Diversity((3, 4))]
    joint = JointRelation(*relations, lambda ids: 0.5)
    texts = [(1, 2, 3), (4,), (3, 4)]
    for relation in (*relations, joint):
        np.testing.assert_allclose(relation.batch(texts), [relation(text) for text in texts])
        assert relation.batch([]).shape == (0,)
    np.testing.assert_allclose(joint.batch(texts), 0.5 * np.prod([r.batch(texts) for r in relations], axis=0))


def test_nothing_is_cut_off():
    opposite = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    assert WordMatch([0], opposite, 2.0, 0.01)((1, 2)) == pytest.approx(1e-4)
    assert SentenceMatch((0,), opposite, floor=0.01)((1,)) == pytest.approx(0.01)
    assert SentenceMatch((0,), opposite, floor=0.01)((0, 1)) == pytest.approx(0.01)  # the mean vanishes
    assert WordMatch([0], opposite, 1.0)(()) == pytest.approx(1e-3)
    assert Diversity((1, 2))(()) == 1.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: WordMatch([], TABLE), "at least one token"),
        (lambda: WordMatch([12], TABLE), "below the number of embeddings, 12; got 12"),
        (lambda: WordMatch([1], TABLE, exponent=-1), "exponent"),
        (lambda: WordMatch([1], TABLE, floor=0), "floor"),
        (lambda: WordMatch([1], TABLE, floor=1), "floor must be below 1"),
        (lambda: WordMatch([1], TABLE[0]), r"table \(V, D\)"),
        (lambda: WordMatch([1], TABLE * np.nan), "finite"),
        (lambda: WordMatch([1], TABLE)((99,)), "got 99"),
        (lambda: SentenceMatch([], TABLE), "at least one token"),
        (lambda: SentenceMatch([1], TABLE, weights=[1.0]), "weights must be 12"),
        (lambda: Diversity([]), "at least one token"),
        (lambda: JointRelation(), "at least one relation"),
    ],
)
def test_bad_input_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_wrong_kinds_are_refused():
    with pytest.raises(TypeError, match="callable"):
        JointRelation(3)
    with pytest.raises(TypeError, match="integers"):
        SentenceMatch([1.5], TABLE)
