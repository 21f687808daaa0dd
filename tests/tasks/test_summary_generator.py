"""The generator of summaries: training that resumes exactly, decoding against an exhaustive search, files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kexue.tasks._summary_choice import PENALTIES, held_back
from kexue.tasks._summary_data import scores
from kexue.tasks._summary_decoding import Search, beam_search
from kexue.tasks._summary_training import Rows, framed
from kexue.tasks._summary_vocabulary import CLS, SEP
from kexue.tasks.summary_generator import SummaryGenerator
from kexue.training import TrainingInterrupted
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
    for options in (
        {"beams": 1},
        {"beams": 1, "copy": True},
        {"beams": 3},
        {"beams": 3, "copy": True, "length_penalty": 0.5},
    ):
        model = SummaryGenerator(**{**fitted.get_params(), **options})
        model.__dict__ |= {k: v for k, v in fitted.__dict__.items() if k.endswith("_")}
        assert model.generate(texts) == [model.generate([text])[0] for text in texts]


def test_a_blank_source_gives_an_empty_text(fitted):
    assert fitted.generate(["", " \n"]) == ["", ""]
    assert fitted.generate([]) == []


def test_long_texts_are_cut_by_the_documented_rule(fitted, monkeypatch):
    import kexue.tasks.summary_generator as module

    read = []
    monkeypatch.setattr(module, "beam_search", lambda model, sources, search: read.extend(sources) or [[]])
    model = SummaryGenerator(**{**fitted.get_params(), "max_length": 40})
    model.__dict__ |= {k: v for k, v in fitted.__dict__.items() if k.endswith("_")}
    for longest, room in ((10, 26), (15, 21), (200, 20)):
        model.longest_ = longest
        model.generate([" ".join(SOURCES) * 200])
        ids = read.pop()
        assert len(ids) == room + 2
        assert ids[1:-1] == fitted.vocabulary_.read(" ".join(SOURCES) * 200)[0][:room]
    cut = SummaryGenerator(**TINY, steps=1, max_length=24).fit(["the cat"] * 2, ["the cat " * 90] * 2)
    assert cut.longest_ == 18 * 11 // 10 + 1  # targets are cut to 24 - 4 - 2 ids in training


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


def pairs(n):
    """Different pairs, so many that some are set aside."""
    sources = [f"the {'big' if i % 2 else 'old'} {name} sat on mat {i}." for i in range(n) for name in ("cat", "dog")]
    return sources, [" ".join(text.split()[1:4]) for text in sources]


RESUMED = {**TINY, "steps": 6, "sparse_from": 0.5, "batch_size": 2}
MOST = ("copy_", "length_penalty_", "longest_")


def same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a.model_.parameters(), b.model_.parameters(), strict=True))
    assert a.vocabulary_.units == b.vocabulary_.units
    assert {name: getattr(a, name) for name in MOST} == {name: getattr(b, name) for name in MOST}
    assert a.losses_ == b.losses_


@pytest.fixture(scope="module")
def whole():
    sources, targets = pairs(30)
    return SummaryGenerator(**RESUMED).fit(sources, targets, alternatives=targets, show_progress=False)


def resumed(folder):
    sources, targets = pairs(30)
    return SummaryGenerator(**RESUMED).fit(
        sources, targets, alternatives=targets, checkpoint=folder, checkpoint_every=2, show_progress=False
    )


def test_ctrl_c_leaves_a_usable_generator_or_a_run_to_be_continued(tmp_path, monkeypatch, whole):
    original = Rows.__call__

    def interrupted(self, step):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, step)

    sources, targets = pairs(30)
    with monkeypatch.context() as patched:
        patched.setattr(Rows, "__call__", interrupted)
        run = SummaryGenerator(**RESUMED)
        with pytest.raises(KeyboardInterrupt, match="after step 3 of 6"):
            run.fit(sources, targets, alternatives=targets, show_progress=False)
        assert len(run.generate(sources[:2])) == 2
        with pytest.raises(TrainingInterrupted, match="run it again to continue"):
            resumed(tmp_path)
    same(resumed(tmp_path), whole)


@pytest.mark.parametrize("broken", [4, "choice"])
def test_a_fit_that_broke_off_goes_on_bit_by_bit(tmp_path, monkeypatch, whole, broken):
    original = Rows.__call__

    def breaks(self, step):
        if step == broken:
            raise RuntimeError("broken")
        return original(self, step)

    def chooses(*arguments):
        raise RuntimeError("broken")

    with monkeypatch.context() as patched:
        patched.setattr(Rows, "__call__", breaks)
        if broken == "choice":
            patched.setattr("kexue.tasks.summary_generator.choose_decoding", chooses)
        with pytest.raises(RuntimeError, match="broken"):
            resumed(tmp_path)
    same(resumed(tmp_path), whole)


KILLED = """
import os, signal, sys
from pathlib import Path
from kexue.tasks._summary_training import Rows
from tasks.test_summary_generator import resumed
original = Rows.__call__
def dies(self, step):
    if step == 5:  # after the second checkpoint
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, step)
Rows.__call__ = dies
resumed(Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_it_ends_with_the_bits_of_the_undisturbed_fit(tmp_path, whole):
    tests = Path(__file__).resolve().parents[1]
    paths = [str(tests), str(tests.parent / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    same(resumed(tmp_path), whole)


@pytest.mark.parametrize("other", [{"num_heads": 4}, {"dropout": 0.5}, {"ema": 0.9}, {"copy": False}, {"noise": 0.3}])
def test_a_run_is_not_continued_with_other_settings(tmp_path, other):
    options = {**TINY, "steps": 3, "copy": True}
    SummaryGenerator(**options).fit(SOURCES, TARGETS, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="settings"):
        SummaryGenerator(**options | other).fit(SOURCES, TARGETS, checkpoint=tmp_path)


def test_decoding_is_what_writes_best_on_the_pairs_set_aside(monkeypatch):
    sources, targets = pairs(60)
    out = held_back(sources, 0)
    assert out.sum() == 12
    trained = []
    monkeypatch.setattr(Rows, "__init__", _recording(Rows.__init__, trained))
    model = SummaryGenerator(**TINY, steps=40, lr=0.01).fit(sources, targets, show_progress=False)
    assert len(trained[0]) == 108
    held = [(s, t) for s, t, kept in zip(sources, targets, out, strict=True) if kept]
    found = {}
    for copy in (False, True):
        for penalty in PENALTIES:
            model.set_params(copy=copy, length_penalty=penalty)
            written = model.generate([s for s, _ in held])
            found[copy, penalty] = scores(written, [t for _, t in held], "word").mean()
    assert found[model.copy_, model.length_penalty_] == max(found.values())
    assert min(found.values()) < max(found.values())
    written = model.set_params(copy=model.copy_, length_penalty=model.length_penalty_).generate(sources[:9])
    assert model.set_params(copy="auto", length_penalty="auto").generate(sources[:9]) == written


def _recording(original, seen):
    def init(self, rows, *arguments):
        seen.append(rows)
        original(self, rows, *arguments)

    return init


def test_equal_sources_are_set_aside_together_and_few_are_not():
    texts = [f"text {i % 70}" for i in range(210)]
    out = held_back(texts, 3)
    assert out.sum() == 21
    assert len({text for text, kept in zip(texts, out, strict=True) if kept}) == 7
    assert (held_back(texts, 3) == out).all()
    assert not held_back(texts[:49] * 9, 3).any()
    assert held_back([str(i) for i in range(5000)], 0).sum() == 64


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
    loaded = SummaryGenerator.load(tmp_path / "g")
    assert loaded.generate(SOURCES) == fitted.generate(SOURCES)
    assert (loaded.copy_, loaded.length_penalty_) == (False, 1.0)
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
        ({"copy": 1}, (["a"], ["b"]), TypeError, "copy must be a bool or 'auto'; got 1"),
        ({"copy": "yes"}, (["a"], ["b"]), TypeError, "copy must be a bool or 'auto'; got 'yes'"),
        ({"length_penalty": "yes"}, (["a"], ["b"]), TypeError, "length_penalty"),
        ({"random_state": 1 << 63}, (["a"], ["b"]), ValueError, "random_state must be below"),
        ({"hidden_size": 10}, (["a"], ["b"]), ValueError, "hidden_size must be a multiple"),
    ],
)
def test_bad_input_is_refused(options, arguments, error, message):
    with pytest.raises(error, match=message):
        SummaryGenerator(**options).fit(*arguments)
