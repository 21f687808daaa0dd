"""The generator of summaries: training that resumes exactly, decoding against an exhaustive search, files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from kexue.tasks._summary_decoding import Search, beam_search
from kexue.tasks._summary_generator import SummaryGenerator
from kexue.tasks._summary_training import Rows, framed
from kexue.tasks._summary_vocabulary import CLS, SEP
from reference.spaces_gen import best_text

SOURCES = [f"the {a} {b} sat on a {c}, said the man." for a in ("big", "old") for b in ("cat", "dog") for c in "xyz"]
TARGETS = [" ".join(text.split()[1:4]) for text in SOURCES]
TINY = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "min_count": 2, "batch_size": 4}


@pytest.fixture(scope="module")
def fitted():
    return SummaryGenerator(**TINY, steps=60, lr=0.01).fit(SOURCES, TARGETS, show_progress=False)


def test_it_learns_to_copy_what_is_to_be_copied(fitted):
    written = fitted.generate(SOURCES)
    assert sum(a == b for a, b in zip(written, TARGETS, strict=True)) >= 10


def test_a_batch_gives_what_each_row_alone_gives(fitted):
    texts = [*SOURCES, "a zebra", SOURCES[0] * 3]
    for beams in (1, 3):
        model = SummaryGenerator(**{**fitted.get_params(), "beams": beams})
        model.__dict__ |= {k: v for k, v in fitted.__dict__.items() if k.endswith("_")}
        assert model.generate(texts) == [model.generate([text])[0] for text in texts]


def test_a_blank_source_gives_an_empty_text(fitted):
    assert fitted.generate(["", " \n"]) == ["", ""]
    assert fitted.generate([]) == []


def test_a_very_long_source_is_cut(fitted):
    assert len(fitted.generate([" ".join(SOURCES) * 20])) == 1


def test_wide_beams_find_what_trying_all_finds(fitted):
    """With copying off, beams as many as texts: the search is exhaustive."""
    model, size = fitted.model_, len(fitted.vocabulary_)
    source = [CLS, size - 1, size - 2, size - 1, SEP]
    words = [SEP, size - 1, size - 2, size - 3]

    def score(text):
        ids = torch.tensor([[*source, CLS, *text]])
        segments = torch.tensor([[0] * len(source) + [1] * (len(text) + 1)])
        with torch.no_grad():
            row = model(ids, token_type_ids=segments).logits[0, -1].double()
        kept = torch.full_like(row, -torch.inf)
        allowed = words if text else words[1:]
        kept[allowed] = row[allowed]
        return kept.log_softmax(0)[words].numpy()

    total, text = best_text(lambda t: score(tuple(words[i] for i in t)), 0, 3)
    search = Search(beams=27, top_k=None, copy=False, longest=3, length_penalty=0.0, rare=0)
    import kexue.tasks._summary_decoding as decoding

    banned = torch.ones(size, dtype=torch.bool)
    banned[words] = False
    original = decoding._Rows._banned
    decoding._Rows._banned = lambda rows: banned.expand(len(rows.ids), -1).clone()
    try:
        found = beam_search(model, [source], search)[0]
    finally:
        decoding._Rows._banned = original
    assert np.isfinite(total)
    assert found == [words[i] for i in text]


def test_a_killed_training_goes_on_bit_by_bit(tmp_path, monkeypatch):
    options = {**TINY, "steps": 6, "sparse_from": 0.5}
    whole = SummaryGenerator(**options).fit(SOURCES, TARGETS, alternatives=TARGETS, show_progress=False)
    original = Rows.__call__

    def breaks(self, step):
        if step == 4:
            raise RuntimeError("killed")
        return original(self, step)

    monkeypatch.setattr(Rows, "__call__", breaks)
    arguments = {"alternatives": TARGETS, "checkpoint": tmp_path, "checkpoint_every": 2, "show_progress": False}
    with pytest.raises(RuntimeError, match="killed"):
        SummaryGenerator(**options).fit(SOURCES, TARGETS, **arguments)
    monkeypatch.setattr(Rows, "__call__", original)
    again = SummaryGenerator(**options).fit(SOURCES, TARGETS, **arguments)
    for a, b in zip(whole.model_.parameters(), again.model_.parameters(), strict=True):
        assert torch.equal(a, b)


def test_noise_draws_from_the_row_and_spares_marks_and_labels():
    row = np.arange(400, 420), np.arange(500, 505)
    batch = Rows([[row]], 1, 64, 0.5, 0, 10, 10)(0)
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    changed = ids != labels
    assert changed.any()
    assert set(ids.tolist()) <= set(labels.tolist())
    assert not changed[(labels == CLS) | (labels == SEP)].any()


def test_the_loss_becomes_sparse_and_alternatives_are_drawn():
    a, b = (np.full(3, 400), np.full(2, 500)), (np.full(3, 401), np.full(2, 500))
    rows = Rows([[a, b]], 1, 64, 0.0, 0, 20, 7)
    assert [rows(step)["top_k"] for step in (0, 19, 20, 39)] == [None, None, 7, 7]
    first = [int(rows(step)["input_ids"][0, 1]) for step in range(40)]
    assert 8 < first.count(400) < 32


@pytest.mark.parametrize(("a", "b"), [(0, 1), (3, 9), (9, 3), (9, 9), (50, 0), (0, 50)])
def test_the_longer_side_is_cut_and_keeps_its_last_mark(a, b):
    source, target = framed(np.arange(a), np.arange(b), 12)
    lengths = [a, b]
    while sum(lengths) > 8:
        lengths[int(lengths[1] > lengths[0])] -= 1
    assert [len(source) - 2, len(target) - 2] == lengths
    assert source[0] == target[0] == CLS
    assert source[-1] == target[-1] == SEP


def test_a_saved_generator_comes_back_and_damage_is_told(fitted, tmp_path):
    fitted.save(tmp_path / "g")
    assert SummaryGenerator.load(tmp_path / "g").generate(SOURCES) == fitted.generate(SOURCES)
    weights = tmp_path / "g" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match="holds no complete summary generator"):
        SummaryGenerator.load(tmp_path / "g")
    head = tmp_path / "g" / "generator.json"
    head.write_text(json.dumps({**json.loads(head.read_text()), "format": 9}))
    with pytest.raises(ValueError, match="expected format 1"):
        SummaryGenerator.load(tmp_path / "g")


@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        ({}, (["a"], ["b", "c"]), ValueError, "targets must be 1 texts"),
        ({}, (["a", " "], ["", "b"]), ValueError, "text on both sides"),
        ({}, ("a", ["b"]), TypeError, "sources"),
        ({"steps": 1, "epochs": 1}, (["a"], ["b"]), ValueError, "only one of steps and epochs"),
        ({"noise": 1.5}, (["a"], ["b"]), ValueError, "noise"),
        ({"beams": 0}, (["a"], ["b"]), ValueError, "beams"),
        ({"top_k": 0}, (["a"], ["b"]), ValueError, "top_k"),
    ],
)
def test_bad_input_is_refused(options, arguments, error, message):
    with pytest.raises(error, match=message):
        SummaryGenerator(**options).fit(*arguments)
