"""Pairs of sentences: the label says whether they are neighbours in one document."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kexue.training import NextSentencePairs, fit

CLS, SEP, PAD = 2, 3, 0
SHAPES = st.lists(st.lists(st.integers(1, 9), max_size=5), min_size=2, max_size=6).filter(
    lambda docs: any(len(doc) > 1 for doc in docs) and sum(map(bool, docs)) > 1
)


def corpus(shapes):
    """Sentences whose tokens say where they come from: 10_000 * document + 100 * sentence + place + 100."""
    return [
        [[10_000 * d + 100 * s + t + 100 for t in range(size)] for s, size in enumerate(doc)]
        for d, doc in enumerate(shapes)
    ]


def made(documents, batch_size=4, **options):
    settings = {"max_length": 40, "cls_token_id": CLS, "sep_token_id": SEP, "pad_token_id": PAD} | options
    return NextSentencePairs(documents, batch_size, **settings)


def rows(batch):
    """(first, second, label) of a batch, after checking the frame around them."""
    found = []
    texts = (
        zip(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"], batch["labels"], strict=True)
        if "attention_mask" in batch
        else [
            (batch["input_ids"][a:b], batch["token_type_ids"][a:b], torch.ones(b - a), label)
            for a, b, label in zip(batch["cu_seqlens"][:-1], batch["cu_seqlens"][1:], batch["labels"], strict=True)
        ]
    )
    for ids, segments, mask, label in texts:
        n = int(mask.sum())
        assert (ids[n:] == PAD).all()
        assert not segments[n:].any()
        ids, segments = ids[:n].tolist(), segments[:n].tolist()
        middle = ids.index(SEP)
        assert ids[0] == CLS
        assert ids[-1] == SEP
        assert ids.count(SEP) == 2
        assert segments == [0] * (middle + 1) + [1] * (n - middle - 1)
        found.append((ids[1:middle], ids[middle + 1 : -1], int(label)))
    return found


@given(SHAPES, st.integers(0, 10**6), st.integers(0, 20), st.booleans())
def test_neighbours_have_label_0_and_strangers_label_1(shapes, seed, step, packed):
    documents = corpus(shapes)
    for a, b, label in rows(made(documents, seed=seed, packed=packed)(step)):
        (da, sa), (db, sb) = [divmod(x[0] - 100, 10_000) for x in (a, b)]
        assert a == documents[da][sa // 100]
        assert b == documents[db][sb // 100]
        if label == 0:
            assert (db, sb // 100) == (da, sa // 100 + 1)
        else:
            assert db != da


@given(SHAPES, st.integers(5, 14))
def test_a_long_pair_keeps_the_end_of_the_first_and_the_beginning_of_the_second(shapes, max_length):
    documents = corpus(shapes)
    for a, b, _ in rows(made(documents, max_length=max_length)(0)):
        first = documents[(a[0] - 100) // 10_000][(a[0] - 100) % 10_000 // 100]
        second = documents[(b[0] - 100) // 10_000][(b[0] - 100) % 10_000 // 100]
        assert first[len(first) - len(a) :] == a
        assert second[: len(b)] == b
        budget = max_length - 3
        assert len(a) + len(b) == min(budget, len(first) + len(second))
        # The longer one is cut first, down to half of the room.
        assert len(a) == len(first) or len(a) >= min(budget - len(second), budget // 2)
        assert len(a) >= min(len(first), budget // 2)
        assert len(b) >= min(len(second), budget // 2)


def test_share_of_negatives_and_their_law():
    pairs = made(corpus([[1] * 30, [1] * 10, [1] * 60]), batch_size=97)
    first, second, labels = (np.concatenate(x) for x in zip(*(pairs.pairs(step) for step in range(200)), strict=True))
    n = len(labels)
    assert n == 200 * 97
    assert abs(labels.mean() - 0.5) < 5 * (0.25 / n) ** 0.5
    # Document 1 (sentences 30 to 39): its negatives are uniform over the 90 others.
    drawn = second[(labels == 1) & (first >= 30) & (first < 40)]
    counts = np.bincount(drawn, minlength=100)
    assert counts[30:40].sum() == 0
    expected = len(drawn) / 90
    assert ((counts[counts > 0] - expected) ** 2).sum() / expected < 90 + 5 * (2 * 90) ** 0.5
    assert (made(corpus([[1] * 3, [1]]), negatives=0.0).pairs(0)[2] == 0).all()
    assert (made(corpus([[1] * 3, [1]]), negatives=1.0).pairs(0)[2] == 1).all()


def test_every_sentence_with_a_successor_is_first_once_in_an_epoch():
    pairs = made(corpus([[1, 2, 3], [4], [5, 6], [1, 1, 1, 1]]), batch_size=4)
    assert len(pairs) == 6
    first = np.concatenate([pairs.pairs(step)[0] for step in range(2)])
    assert sorted(first) == [0, 1, 4, 6, 7, 8]


def test_a_pure_function_of_seed_step_and_rank():
    documents = corpus([[3, 4, 5], [2, 6], [7, 1, 2, 2]])
    first, again, other = (made(documents, seed=seed)(5) for seed in (1, 1, 2))
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert any(not torch.equal(other[name], value) for name, value in first.items() if other[name].shape == value.shape)
    whole = made(documents).pairs(0)[0]
    parts = [made(documents, rank=rank, world=2).pairs(0)[0] for rank in (0, 1)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_names_and_shapes_of_what_comes_out():
    batch = made(corpus([[3, 4], [2, 6]]), pad_to_multiple_of=16, labels="next_sentence_label")(0)
    assert batch["input_ids"].shape[1] % 16 == 0
    assert sorted(batch) == ["attention_mask", "input_ids", "next_sentence_label", "token_type_ids"]
    packed = made(corpus([[3, 4], [2, 6]]), packed=True)(0)
    assert sorted(packed) == ["cu_seqlens", "input_ids", "labels", "position_ids", "token_type_ids"]
    bounds = packed["cu_seqlens"].tolist()
    for a, b in pairwise(bounds):
        assert packed["position_ids"][a:b].tolist() == list(range(b - a))


@pytest.mark.parametrize(
    ("documents", "options", "error", "message"),
    [
        ([], {}, ValueError, "a document with at least two sentences is needed; got 0"),
        ([[[5]], [[6]]], {}, ValueError, "a document with at least two sentences is needed; got 2"),
        ([[[5], [6]]], {}, ValueError, "negatives need a second document"),
        ([[[5], [6]], []], {}, ValueError, "negatives need a second document"),
        ([[[5]], [[6], []]], {}, ValueError, r"got an empty one at documents\[1\]\[1\]"),
        ([[[5], [60]], [[6]]], {"vocab_size": 50}, ValueError, r"sentences\[1\] must be in \[0, 50\); got 60"),
        ([[[5], [6.5]], [[6]]], {}, TypeError, r"sentences\[1\] must be integers"),
        ([[[5], [6]], [[6]]], {"max_length": 4}, ValueError, "max_length must be at least 5; got 4"),
        ([[[5], [6]], [[6]]], {"negatives": 1.5}, ValueError, "negatives must be at most 1; got 1.5"),
        ([[[5], [6]], [[6]]], {"cls_token_id": 50, "vocab_size": 50}, ValueError, r"cls_token_id must be in \[0, 50\)"),
    ],
)
def test_bad_input_is_named(documents, options, error, message):
    with pytest.raises(error, match=message):
        made(documents, **options)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_fit_learns_which_sentence_follows(tmp_path, packed):
    from kexue.models import KexueConfig, KexueForNextSentence

    torch.manual_seed(0)
    # The sentence of token t is followed by that of t + 20.
    documents = [[[t, t], [t + 20, t + 20]] for t in range(5, 25)]
    config = KexueConfig(50, 32, 2, 4, max_position=16, type_vocab_size=2, pad_token_id=PAD)
    batches = NextSentencePairs(
        documents, 20, max_length=7, cls_token_id=CLS, sep_token_id=SEP, pad_token_id=PAD, packed=packed, vocab_size=50
    )
    result = fit(KexueForNextSentence(config), batches, steps=200, out=tmp_path, lr=3e-3, warmup=10)
    assert np.mean(result.history[-10:]) < 0.5 * np.mean(result.history[:10])
