"""Rows of documents: nothing lost, nothing mixed, as few rows as the plain algorithm needs."""

from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kexue.training import MaskedBatches, PackedBatches, fit, pack_documents
from kexue.training.packing import best_fit

LENGTHS = st.lists(st.integers(0, 25), min_size=1, max_size=40).filter(any)


def documents(lengths):
    """Documents whose tokens say where they come from: 1000 * number + place."""
    return [[1000 * (number + 1) + place for place in range(length)] for number, length in enumerate(lengths)]


def plain_best_fit(sizes, capacity):
    """Fills of the rows, one piece at a time."""
    rows = []
    for size in sorted(sizes, reverse=True):
        room = [fill for fill in rows if fill + size <= capacity]
        if room:
            rows.remove(max(room))
        rows.append((max(room) if room else 0) + size)
    return sorted(rows)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=80), st.integers(30, 41))
def test_best_fit_is_the_plain_algorithm(sizes, capacity):
    rows = best_fit(np.array(sizes), capacity)
    assert sorted(np.bincount(rows, sizes).astype(int)) == plain_best_fit(sizes, capacity)


@given(LENGTHS, st.integers(1, 12), st.booleans())
def test_best_fit_keeps_every_token_and_cuts_only_what_is_too_long(lengths, length, eos):
    packed = pack_documents(documents(lengths), length, eos_token_id=3 if eos else None)
    pieces = [packed.tokens[a:b].tolist() for a, b in zip(packed.pieces[:-1], packed.pieces[1:], strict=True)]
    whole = {n: doc + [3] * eos for n, doc in enumerate(documents(lengths)) if doc}
    back = {n: [piece for piece, d in zip(pieces, packed.documents, strict=True) if d == n] for n in whole}
    for n, parts in back.items():
        parts.sort(key=lambda piece: (piece[0] == 3, piece[0]))
        assert list(chain.from_iterable(parts)) == whole[n]
    assert all(len(parts) == -(-len(whole[n]) // length) for n, parts in back.items())
    assert all(1 <= len(row) <= length for row in packed)
    assert sum(map(len, packed)) == sum(map(len, whole.values()))
    assert packed.waste == pytest.approx(1 - sum(map(len, packed)) / (length * len(packed)))
    assert packed.cut == sum(len(doc) > length for doc in whole.values())


@given(LENGTHS, st.integers(1, 12))
def test_concat_is_the_joined_text_in_pieces_of_one_length(lengths, length):
    joined = list(chain.from_iterable([*doc, 3] for doc in documents(lengths) if doc))
    if len(joined) < length:
        with pytest.raises(ValueError, match=f"have {len(joined)} tokens with their EOS, fewer than one row"):
            pack_documents(documents(lengths), length, method="concat", eos_token_id=3)
        return
    packed = pack_documents(documents(lengths), length, method="concat", eos_token_id=3)
    assert packed.tokens.tolist() == joined[: len(joined) // length * length]
    assert packed.dropped == len(joined) % length
    assert all(len(row) == length for row in packed)
    assert packed.waste == 0
    for start, end, owner in zip(packed.pieces[:-1], packed.pieces[1:], packed.documents, strict=True):
        assert {t // 1000 - 1 for t in packed.tokens[start:end] if t != 3} <= {owner}


def test_best_fit_wastes_and_cuts_less_than_the_alternatives():
    generator = np.random.default_rng(0)
    lengths = np.minimum(generator.lognormal(4, 1, 2000).astype(int) + 1, 2000)
    texts = [np.full(n, 7) for n in lengths]
    best = pack_documents(texts, 256)
    joined = pack_documents(texts, 256, method="concat", eos_token_id=3)
    padded = 1 - lengths.sum() / (256 * (-(-lengths // 256)).sum())
    assert best.waste < 0.01 < 0.5 < padded
    assert best.cut == (lengths > 256).sum() < joined.cut / 5
    assert "rows of 256 tokens from 2,000 documents, 0." in repr(best)


@given(LENGTHS, st.integers(1, 12), st.integers(1, 5), st.integers(0, 99))
def test_batches_hold_whole_rows_with_boundaries_and_positions(lengths, length, batch_size, seed):
    packed = pack_documents(documents(lengths), length)
    batches = PackedBatches(packed, batch_size, seed=seed)
    steps = -(-len(packed) // batch_size)
    seen = []
    for step in range(steps):
        batch = batches(step)
        bounds = batch["cu_seqlens"].tolist()
        assert (batch["cu_seqlens"].dtype, bounds[0], bounds[-1]) == (torch.int32, 0, len(batch["input_ids"]))
        for a, b in pairwise(bounds):
            assert batch["position_ids"][a:b].tolist() == list(range(b - a))
            assert len({t // 1000 for t in batch["input_ids"][a:b].tolist()}) == 1
        assert torch.equal(batch["labels"], batch["input_ids"])
        seen += batch["input_ids"].tolist()
    assert sorted(seen) == sorted(chain.from_iterable(documents(lengths)))
    again = batches(steps - 1)
    assert all(torch.equal(again[name], value) for name, value in batch.items())


def test_ranks_partition_the_rows_of_a_step():
    packed = pack_documents(documents([5] * 12), 5)
    whole = PackedBatches(packed, 4)(1)["input_ids"]
    parts = [PackedBatches(packed, 4, rank=rank, world=2)(1)["input_ids"] for rank in (0, 1)]
    assert torch.equal(torch.cat(parts), whole)


def test_dense_batches_of_full_rows():
    packed = pack_documents(documents([7, 9, 20]), 6, method="concat", eos_token_id=3)
    batch = PackedBatches(packed, 2, boundaries=False)(0)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 6)
    assert sorted(batch) == ["input_ids", "labels"]
    assert sorted(PackedBatches(packed, 2, boundaries=False, labels=False)(0)) == ["input_ids"]
    with pytest.raises(ValueError, match="boundaries=False needs full rows"):
        PackedBatches(pack_documents(documents([7, 9]), 10), 2, boundaries=False)
    with pytest.raises(TypeError, match="packed must come from pack_documents; got list"):
        PackedBatches([[1, 2]], 2)


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ([], {}, ValueError, "at least one token; got 0 documents"),
        ([[], []], {}, ValueError, "at least one token; got 2 documents"),
        ([[5], [6, 70, -1]], {"vocab_size": 50}, ValueError, r"documents\[1\] must be in \[0, 50\); got -1, 70"),
        ([[5], [-1]], {}, ValueError, r"documents\[1\] must be in .* got -1"),
        (None, {}, TypeError, "documents must be a sequence of sequences of ids; got None"),
        ([[5.5]], {}, TypeError, r"documents\[0\] must be integers; got float64"),
        ([np.array([5.5])], {}, TypeError, r"documents\[0\] must be integers; got float64"),
        ([[[5]]], {}, ValueError, r"documents\[0\] must be one sequence of ids; got shape \(1, 1\)"),
        (["text"], {}, TypeError, r"documents\[0\] must be integers; got <U4"),
        ([[5]], {"length": 0}, ValueError, "length must be at least 1; got 0"),
        ([[5]], {"method": "first-fit"}, ValueError, "method must be one of 'best-fit', 'concat'; got 'first-fit'"),
        ([[5]], {"method": "concat"}, ValueError, "needs eos_token_id"),
        ([[5]], {"eos_token_id": 50, "vocab_size": 50}, ValueError, r"eos_token_id must be in \[0, 50\); got 50"),
        ([[5]], {"eos_token_id": 1.0}, TypeError, "eos_token_id must be an integer; got 1.0"),
    ],
)
def test_bad_input_is_named(texts, options, error, message):
    with pytest.raises(error, match=message):
        pack_documents(texts, **{"length": 4} | options)


@pytest.mark.slow
def test_a_packed_batch_has_the_loss_of_its_texts_one_by_one(tmp_path):
    from kexue.models import KexueConfig, KexueForCausalLM

    torch.manual_seed(0)
    config = KexueConfig(60, 32, 2, 4, attn_mode="causal", position="rope", max_position=64)
    model = KexueForCausalLM(config).eval()
    texts = [np.random.default_rng(n).integers(5, 60, n) for n in (3, 9, 17, 30, 6, 2)]
    packed = pack_documents(texts, 32, vocab_size=60)
    batch = PackedBatches(packed, len(packed))(0)
    together = model(**batch)
    alone = [model(torch.tensor(text)[None], labels=torch.tensor(text)[None]) for text in texts]
    total = sum(out.loss * out.num_items for out in alone)
    assert together.num_items == sum(out.num_items for out in alone) == sum(len(text) - 1 for text in texts)
    torch.testing.assert_close(together.loss, total / together.num_items)

    result = fit(model, PackedBatches(packed, 1), steps=40, out=tmp_path / "clm", lr=1e-2)
    assert result.history[-1] < 0.7 * result.history[0]
    lines = (tmp_path / "clm" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 40


@pytest.mark.slow
def test_fit_masks_packed_batches(tmp_path):
    from kexue.models import KexueConfig, KexueForMaskedLM

    torch.manual_seed(0)
    model = KexueForMaskedLM(KexueConfig(60, 32, 2, 4, max_position=64, mask_token_id=4))
    texts = [np.arange(5, 5 + n) for n in (3, 9, 17, 30, 6, 22)]
    inner = PackedBatches(pack_documents(texts, 32, vocab_size=60), 2, labels=False)
    batches = MaskedBatches(inner, mask_token_id=4, vocab_size=60, mean_span=2.0, rate=0.3)
    result = fit(model, batches, steps=80, out=tmp_path, lr=1e-2, warmup=5)
    assert np.mean(result.history[-5:]) < 0.6 * result.history[0]
