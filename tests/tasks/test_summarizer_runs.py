"""Runs of the summarizer: that are killed, that have duplicates, with a BERT checkpoint, as an estimator."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.model_selection import KFold, cross_val_score

from kexue.tasks import Summarizer, _summary_extractor, summarizer
from kexue.tasks._piece_features import PieceEncoder
from kexue.tasks._summary_extractor import Pieces
from kexue.training import TrainingInterrupted

DOCUMENTS = [
    f"Notes of day {i}. {'It was wet. ' * (i % 3)}The result is {7 * i} points for team {i % 5}. Thanks to all."
    for i in range(24)
]
SUMMARIES = [f"The result is {7 * i} points" for i in range(24)]


def made(**settings: Any) -> Summarizer:
    return Summarizer(**{"extract_only": True, "folds": 2, "epochs": 2, "show_progress": False, **settings})


def weights(model: Summarizer) -> dict[str, torch.Tensor]:
    return {f"{k}.{name}": x for k, labeler in enumerate(model._labelers) for name, x in labeler.state_dict().items()}


def assert_same(model: Summarizer, other: Summarizer) -> None:
    assert weights(model).keys() == weights(other).keys()
    assert all(torch.equal(x, weights(other)[name]) for name, x in weights(model).items())
    for name in ("epochs_", "scores_", "length_", "threshold_", "out_of_fold_extracts_"):
        assert getattr(model, name) == getattr(other, name)


@pytest.fixture(scope="module")
def undisturbed() -> Summarizer:
    return made().fit(DOCUMENTS, SUMMARIES)


def test_a_run_that_is_interrupted_every_17_steps_ends_with_the_same_weights(
    undisturbed: Summarizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = _summary_extractor._Training.forward
    count = 0

    def interrupted(*given: Any, **batch: Any) -> Any:
        nonlocal count
        count += 1
        if count % 17 == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(*given, **batch)

    monkeypatch.setattr(_summary_extractor._Training, "forward", interrupted)
    stops: list[tuple[str, int]] = []
    model = made()
    while not hasattr(model, "unit_"):
        try:
            model.fit(DOCUMENTS, SUMMARIES, checkpoint=tmp_path)
        except TrainingInterrupted as error:
            stops.append((error.checkpoint.parent.name, error.step % 10))
            assert not hasattr(model, "unit_")
    assert {folder for folder, step in stops if step} == {"fold-0", "fold-1"}  # inside an epoch of each
    assert_same(model, undisturbed)
    with pytest.raises(KeyboardInterrupt, match="nothing of it is kept; with checkpoint=FOLDER"):
        made().fit(DOCUMENTS, SUMMARIES)


def test_a_killed_run_ends_with_the_same_weights_and_needs_no_transformers(
    undisturbed: Summarizer, tmp_path: Path
) -> None:
    code = """
import os, signal, sys
from kexue.tasks import Summarizer, _summary_extractor as extractor
documents, summaries = eval(sys.stdin.read())
Summarizer.load(sys.argv[1]).explain(Summarizer.load(sys.argv[1]).predict(documents[:2]))
assert "transformers" not in sys.modules
extractor.SAVE_EVERY, forward, count = 7, extractor._Training.forward, 0
def killed(*given, **batch):
    global count
    count += 1
    if count == 33:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(*given, **batch)
extractor._Training.forward = killed
model = Summarizer(extract_only=True, folds=2, epochs=2, show_progress=False)
model.fit(documents, summaries, checkpoint=sys.argv[2])
"""
    undisturbed.save(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "run")],
        input=repr((DOCUMENTS, SUMMARIES)), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list((tmp_path / "run" / "fold-1").glob("*7*"))  # step 7 of the second fold is there
    assert_same(made().fit(DOCUMENTS, SUMMARIES, checkpoint=tmp_path / "run"), undisturbed)


def test_a_run_is_not_continued_with_other_summaries(tmp_path: Path) -> None:
    made().fit(DOCUMENTS, SUMMARIES, checkpoint=tmp_path)
    others = [*SUMMARIES[:-1], SUMMARIES[-1] + "!"]  # the same labels
    for pairs in ((DOCUMENTS, others), (DOCUMENTS[::-1], SUMMARIES[::-1])):
        with pytest.raises(ValueError, match="data or model are others"):
            made().fit(*pairs, checkpoint=tmp_path)


class Echo(BaseEstimator):  # type: ignore[misc]
    """A generator that writes its source, or nothing."""

    def __init__(self, silent: bool = False) -> None:
        self.silent = silent

    def fit(self, sources: list[str], targets: list[str], **rest: Any) -> Echo:
        self.targets_ = targets
        return self

    def generate(self, sources: list[str]) -> list[str]:
        return ["" if self.silent else source for source in sources]


@pytest.mark.parametrize("folds", [3, KFold(3)])
@pytest.mark.parametrize("extract_only", [True, False])
def test_equal_documents_stand_on_one_side_everywhere(
    folds: Any, extract_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [*DOCUMENTS[:12], *DOCUMENTS[:5], *(f"  {text}\n" for text in DOCUMENTS[4:9])]
    summaries = [f"{text} {i}" for i, text in enumerate([*SUMMARIES[:12], *SUMMARIES[:5], *SUMMARIES[4:9]])]
    names = [" ".join(text.split()) for text in documents]
    seen: dict[int, set[str]] = {}  # documents that each labeller learned from or was chosen by
    asked: list[int] = []
    train, inner = summarizer.train_labeler, _summary_extractor.inner_rows
    take, probabilities = Pieces.take, summarizer.probabilities

    def spy_train(given: Any, labels: Any, rows: Any, *rest: Any) -> Any:
        labeler, epoch = train(given, labels, rows, *rest)
        seen[id(labeler)] = {names[i] for i in rows}
        return labeler, epoch

    def spy_inner(rows: Any, same: Any, seed: int) -> Any:
        learned, held = inner(rows, same, seed)
        assert sorted([*learned, *held]) == sorted(rows)
        assert not {names[i] for i in learned} & {names[i] for i in held}
        return learned, held

    def spy_take(self: Pieces, rows: Any) -> Pieces:
        found = take(self, rows)
        found.rows = [names[i] for i in rows]  # type: ignore[attr-defined]
        return found

    def spy_probabilities(labelers: Any, given: Any) -> Any:
        if hasattr(given, "rows"):
            for labeler in labelers:
                if id(labeler) in seen:
                    assert not seen[id(labeler)] & set(given.rows)
                    asked.append(len(given.rows))
        return probabilities(labelers, given)

    monkeypatch.setattr(summarizer, "train_labeler", spy_train)
    monkeypatch.setattr(summarizer, "probabilities", spy_probabilities)
    monkeypatch.setattr(_summary_extractor, "inner_rows", spy_inner)
    monkeypatch.setattr(Pieces, "take", spy_take)
    monkeypatch.setattr(summarizer, "LEAST_PAIRS", 10)
    model = made(folds=folds, epochs=1, extract_only=extract_only, generator=Echo())
    model.fit(documents, summaries)
    assert all(model.out_of_fold_extracts_)
    if extract_only:  # every document by its fold
        assert sum(asked) == len(documents)
    else:  # those set aside were asked of every labeller, the others of one
        learned = {names[summaries.index(text)] for text in model._generator.targets_}
        rows = [name in learned for name in names]
        assert 0 < sum(rows) < len(rows)
        assert sum(asked) == sum(rows) + len(model._labelers) * (len(rows) - sum(rows))
        assert sum(rows) == len(model._generator.targets_)


def test_validation_documents_must_be_others() -> None:
    held = [DOCUMENTS[20], DOCUMENTS[3] + "\n"], SUMMARIES[:2]
    with pytest.raises(ValueError, match="1 of 2 validation documents are trained on too, the first is number 1"):
        made().fit(DOCUMENTS[:12], SUMMARIES[:12], validation=held)


def test_it_is_an_estimator_of_scikit_learn(undisturbed: Summarizer) -> None:
    plain = made(epochs=1)
    texts, wanted = np.array(DOCUMENTS[:8]), np.array(SUMMARIES[:8], object)
    found = cross_val_score(plain, texts, wanted, cv=2, error_score="raise")
    assert found.min() > 0.3
    assert not hasattr(plain, "unit_")
    assert plain.set_params(folds=3).get_params()["folds"] == 3
    lists = clone(plain).fit(DOCUMENTS[:8], SUMMARIES[:8])
    assert_same(clone(plain).fit((text for text in texts), iter(wanted)), lists)
    second = DOCUMENTS[8:14], SUMMARIES[8:14]
    assert_same(lists.fit(*second), clone(plain).fit(*second))  # nothing of the first fit
    for again in (pickle.loads(pickle.dumps(undisturbed)), copy.deepcopy(undisturbed)):
        assert_same(again, undisturbed)
        assert again.predict(DOCUMENTS) == undisturbed.predict(DOCUMENTS)


def test_a_fit_that_fails_leaves_the_old_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(epochs=1).fit(DOCUMENTS[:8], SUMMARIES[:8])
    before = dict(model.__dict__)

    def fails(*_: Any) -> Any:
        raise RuntimeError("in the last step")

    monkeypatch.setattr(summarizer, "text_rank", fails)
    with pytest.raises(RuntimeError, match="in the last step"):
        model.fit(DOCUMENTS, SUMMARIES)
    assert model.__dict__ == before


def test_a_summary_does_not_depend_on_the_other_documents(undisturbed: Summarizer) -> None:
    texts = [*DOCUMENTS[:5], "", "One piece", *(" ".join(["Same words here."] * n) for n in (2, 30)), *DOCUMENTS[:2]]
    together = undisturbed.predict(texts)
    assert together == [undisturbed.predict([text])[0] for text in texts]
    assert together == undisturbed.predict(texts[::-1])[::-1]
    for row, text in zip(undisturbed.explain(texts), texts, strict=True):
        (alone,) = undisturbed.explain([text])
        assert [(p.text, p.chosen) for p in row] == [(p.text, p.chosen) for p in alone]
        np.testing.assert_allclose([p.probability for p in row], [p.probability for p in alone], atol=1e-6)


def test_an_explanation_has_the_pieces_that_a_summary_is_made_of(
    undisturbed: Summarizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [*DOCUMENTS[:6], " \n", "\ud800 one piece", "第一句。第二句，"]
    monkeypatch.setattr(summarizer, "LEAST_PAIRS", 10)
    generated = made(extract_only=False, epochs=1, generator=Echo()).fit(DOCUMENTS, SUMMARIES)
    for model in (undisturbed, generated):
        for text, pieces, summary in zip(texts, model.explain(texts), model.predict(texts), strict=True):
            assert [text[p.start : p.stop].replace("\ud800", "\ufffd") for p in pieces] == [p.text for p in pieces]
            assert all(0 < piece.probability < 1 for piece in pieces)
            chosen = [piece.text for piece in pieces if piece.chosen]
            assert bool(chosen) == bool(text.strip())
            assert summary == summarizer.join_pieces(chosen)
    assert sum(p.chosen for p in generated.explain(texts)[0]) == sum(
        p.probability > 0.2 for p in generated.explain(texts)[0]
    )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"show_progress": 1}, TypeError, "show_progress must be a bool or None; got 1"),
        ({"generator": "x"}, TypeError, "generator must be a SummaryGenerator; got 'x'"),
        ({"extract_only": 1}, ValueError, "extract_only must be True, False or 'auto'; got 1"),
    ],
)
def test_settings_are_refused_before_anything_is_read(settings: Any, error: type[Exception], message: str) -> None:
    def never(texts: list[str]) -> Any:
        raise AssertionError("the encoder was called")

    with pytest.raises(error, match=message):
        made(**{"encoder": never, **settings}).fit(DOCUMENTS, SUMMARIES)


def test_settings_of_numpy_are_settings() -> None:
    model = made(extract_only=np.True_, folds=np.int64(2), epochs=np.int32(1)).fit(DOCUMENTS, SUMMARIES)
    assert not model.uses_generator_
    assert model.scored_on_ == "out-of-fold"


def test_all_documents_are_seen_equally_often() -> None:
    for n in (5, 100, 161, 300):
        size = min(16, n)
        seen = max(n, _summary_extractor.LEAST_STEPS * size)
        counts = np.zeros(n, np.int64)
        for epoch in range(12):
            batches = _summary_extractor._batches(np.arange(n), size, seen, 0, epoch)
            assert len(batches) == max(-(-n // size), _summary_extractor.LEAST_STEPS)
            counts += np.bincount(np.concatenate(batches), minlength=n)
        assert counts.sum() == 12 * seen
        assert counts.max() - counts.min() <= 12
        assert abs(counts[: n // 2].mean() - counts[-(n // 2) :].mean()) < 1.5  # long ones as often as short ones


def test_vectors_of_a_function_keep_their_width_and_stay_dense() -> None:
    widths = iter([3, 3, 4])
    encode = PieceEncoder(lambda texts: np.ones((len(texts), next(widths))))
    assert isinstance(Pieces.joined([encode(["a"]), encode(["b", "c"])]).vectors, np.ndarray)
    with pytest.raises(ValueError, match=r"width 3 as before; got \(1, 4\)"):
        encode(["d"])
