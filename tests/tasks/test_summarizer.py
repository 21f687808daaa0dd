from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import (
    GroupKFold,
    KFold,
    LeaveOneGroupOut,
    LeaveOneOut,
    PredefinedSplit,
    ShuffleSplit,
    StratifiedGroupKFold,
    StratifiedKFold,
)

from kexue.tasks import Summarizer, rouge, split_pieces, summarizer
from kexue.tasks._piece_features import PieceEncoder
from kexue.tasks._summary_data import Texts, beyond_noise, document_folds, language_of
from kexue.tasks._summary_extractor import Pieces, inner_rows, passing, probabilities, window
from kexue.tasks._summary_selection import Selection
from kexue.tasks.gated_conv import GatedConvLabeler

DOCUMENTS = [
    f"Notes of day {i}. {'It was wet. ' * (i % 3)}The result is {7 * i} points for team {i % 5}. Thanks to all."
    for i in range(24)
]
SUMMARIES = [f"The result is {7 * i} points" for i in range(24)]


def made(**settings: Any) -> Summarizer:
    return Summarizer(**{"extract_only": True, "folds": 3, "epochs": 4, "show_progress": False, **settings})


@pytest.fixture(scope="module")
def fitted() -> Summarizer:
    return made().fit(DOCUMENTS, SUMMARIES)


def test_it_learns_which_piece_is_the_summary(fitted: Summarizer) -> None:
    score = fitted.score(DOCUMENTS, SUMMARIES)
    assert score > 0.7
    assert fitted.scores_["extractor"] > fitted.scores_["lead-1"] + 0.3
    assert fitted.unit_ == "word"
    assert fitted.uses_generator_ is False
    assert fitted.scored_on_ == "out-of-fold"
    assert set(fitted.scores_) == {"extractor", "lead-1", "lead-3", "text_rank"}
    for text, chosen in zip(DOCUMENTS, fitted.out_of_fold_extracts_, strict=True):
        assert chosen == sorted(set(chosen))
        assert chosen
        assert max(chosen) < len(split_pieces(text))


def test_no_document_is_extracted_by_a_labeller_that_saw_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[int]] = []
    asked: list[set[int]] = []
    train = summarizer.train_labeler

    def spy(given: Any, labels: Any, rows: Any, *rest: Any) -> Any:
        seen.append(set(rows.tolist()))
        return train(given, labels, rows, *rest)

    take = Pieces.take
    monkeypatch.setattr(summarizer, "train_labeler", spy)
    monkeypatch.setattr(Pieces, "take", lambda self, rows: asked.append(set(map(int, rows))) or take(self, rows))
    documents = [*DOCUMENTS, *DOCUMENTS[:6]]  # equal ones share a fold
    model = made(epochs=1).fit(documents, [*SUMMARIES, *SUMMARIES[:6]])
    assert len(model.out_of_fold_extracts_) == 30
    extracted: list[int] = []
    for k, rows in enumerate(seen):
        inner, outer = asked[2 * k : 2 * k + 2]
        assert inner <= rows  # the epoch is chosen on rows of its own
        assert not outer & rows
        assert not {documents[i] for i in outer} & {documents[i] for i in rows}
        extracted += outer
    assert sorted(extracted) == list(range(30))


def test_folds_of_any_splitter_leave_each_document_out_once() -> None:
    same = np.array([0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 0, 8])
    rows = np.array([0, 1, 2, 4, 5, 6, 8, 9, 10, 11])  # 3 and 7 take no part
    splitters = (
        KFold(3), LeaveOneOut(), GroupKFold(4), StratifiedKFold(3), StratifiedGroupKFold(2), LeaveOneGroupOut(),
        PredefinedSplit(np.arange(12) % 3),
    )  # fmt: skip
    for folds in (2, 5, *splitters):
        parts = document_folds(folds, same, rows, 0)
        assert sorted(np.concatenate([test for _, test in parts])) == list(rows)
        for train, test in parts:
            assert len(train)
            assert set(train) <= set(rows)
            assert not set(same[train]) & set(same[test])
    with pytest.raises(ValueError, match="must leave each document out once; document"):
        document_folds(ShuffleSplit(2, random_state=0), same, rows, 0)
    with pytest.raises(ValueError, match="folds=8 needs at least as many different documents; got 7"):
        document_folds(8, same, rows, 0)
    with pytest.raises(ValueError, match="must train on documents other than"):
        document_folds(KFold(2), np.zeros(4, np.int64), np.arange(4), 0)
    with pytest.raises(ValueError, match="must number the 12 documents from 0"):
        document_folds(PredefinedSplit(np.arange(13) % 3), same, rows, 0)
    with pytest.raises(TypeError, match="folds must be an integer"):
        document_folds(KFold, same, rows, 0)


def test_the_epoch_is_chosen_on_rows_that_are_not_trained_on() -> None:
    learned, held = inner_rows(np.arange(3, 43), np.arange(50), 0)
    assert len(held) == 4
    assert sorted([*learned, *held]) == list(range(3, 43))
    assert [len(x) for x in inner_rows(np.arange(9), np.arange(9) % 4, 0)] == [9, 0]
    for seed in range(20):
        same = np.random.default_rng(seed).integers(0, 8, 30)
        learned, held = inner_rows(np.arange(30), same, seed)
        assert len(held)
        assert not set(same[learned]) & set(same[held])


def test_packed_windows_give_the_probabilities_of_each_document_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    labeler = GatedConvLabeler(PieceEncoder()(["a"]).shape[1], 8).eval()
    with torch.no_grad():
        for block in labeler.blocks:
            block.alpha.fill_(0.5)
    encode = PieceEncoder()
    documents = [encode([f"word {k * i}" for k in range(n)]) for i, n in enumerate((1, 70, 3, 40))]
    with torch.no_grad():
        want = [labeler(torch.from_numpy(x.toarray())[None]).sigmoid()[0].numpy() for x in documents]
    for size in (4096, 16):
        monkeypatch.setattr("kexue.tasks._summary_extractor.WINDOW", size)
        given = Pieces.joined(documents)
        for found, each in zip(given.split(probabilities([labeler], given)), want, strict=True):
            np.testing.assert_allclose(found, each, atol=1e-6)


def test_equal_seeds_give_equal_summaries_and_a_saved_model_gives_its_own(fitted: Summarizer, tmp_path: Path) -> None:
    again = clone(fitted).fit(DOCUMENTS, SUMMARIES)
    assert again.predict(DOCUMENTS) == fitted.predict(DOCUMENTS)
    fitted.save(tmp_path / "model")
    loaded = Summarizer.load(tmp_path / "model")
    assert loaded.predict(DOCUMENTS) == fitted.predict(DOCUMENTS)
    assert loaded.get_params() == fitted.get_params()
    for name in ("scores_", "unit_", "out_of_fold_extracts_", "length_", "threshold_", "epochs_"):
        assert getattr(loaded, name) == getattr(fitted, name)
    (tmp_path / "model" / "labelers.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no complete summarizer"):
        Summarizer.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("key", "value"),
    [("unit", None), ("length", "x"), ("labelers", 10**7), ("width", 0), ("width", 5), ("params", 3)],
)
def test_a_damaged_folder_is_refused_in_one_line(key: str, value: Any, fitted: Summarizer, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model")
    path = tmp_path / "model" / "summarizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), key: value}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"^[^\n]*model holds no complete summarizer: [^\n]+$"):
        Summarizer.load(tmp_path / "model")


def test_extracts_and_baselines_are_scored_on_the_same_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kexue.tasks._summary_selection.MOST_ROWS", 5)
    model = made(epochs=1).fit(DOCUMENTS, SUMMARIES)
    rows = np.random.default_rng(0).permutation(24)[:5]
    lead = [rouge(split_pieces(DOCUMENTS[i])[0], SUMMARIES[i], "word")["main"] for i in rows]
    assert model.scores_["lead-1"] == pytest.approx(np.mean(lead))


def test_a_function_as_encoder_is_asked_for_again(tmp_path: Path) -> None:
    def encoder(texts: list[str]) -> Any:
        return np.array([["result" in text, len(text) / 50] for text in texts], np.float32)

    model = made(encoder=encoder).fit(DOCUMENTS, SUMMARIES)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="load with encoder="):
        Summarizer.load(tmp_path / "model")
    assert Summarizer.load(tmp_path / "model", encoder=encoder).predict(DOCUMENTS) == model.predict(DOCUMENTS)


@pytest.mark.parametrize("n", [2, 5])
def test_very_few_documents(n: int) -> None:
    model = made(folds=2, epochs=1).fit(DOCUMENTS[:n], SUMMARIES[:n])
    assert all(model.predict(DOCUMENTS[:n]))


def test_documents_of_one_piece_blank_ones_and_other_languages(fitted: Summarizer) -> None:
    found = fitted.predict(["One piece", "", " \n", "...", "中文的文档。", "word " * 2000])
    assert found[1:3] == ["", ""]
    assert all(found[k] for k in (0, 3, 4, 5))
    assert fitted.predict([]) == []


def test_chinese_is_measured_by_characters() -> None:
    documents = [f"第{i}号通知。会议在{i}楼举行，请大家准时参加。" for i in range(8)]
    model = made(folds=2, epochs=2).fit(documents, [f"会议在{i}楼举行" for i in range(8)])
    assert model.unit_ == "char"
    assert model.score(documents, [f"会议在{i}楼举行" for i in range(8)]) > 0.5
    assert language_of("en", documents) == ("word", "en")
    assert language_of(("。",), documents) == ("char", ("。",))


def test_windows_hold_most_of_the_labels() -> None:
    labels = np.zeros(30, np.bool_)
    labels[[2, 15, 17, 18]] = True
    start, stop = window(labels, 8)
    assert stop - start == 8
    assert labels[start:stop].sum() == 3
    assert window(labels, 30) == (0, 30)


def test_selection_takes_the_likeliest_pieces_towards_the_length() -> None:
    words = [list("abc"), list("de"), list("abc"), list("fg")]
    values = np.array([0.9, 0.3, 0.8, 0.05], np.float32)
    assert Selection(5, 0.1)(values, words) == [0, 1]  # piece 2 repeats piece 0
    assert Selection(1, 0.0)(values, words) == [0]
    assert Selection(100, 0.1)(values, words) == [0, 1]
    assert Selection(100, 0.0)(values, words) == [0, 1, 3]
    assert passing(values, 0.95) == [0]
    assert passing(values, 0.2) == [0, 1, 2]


def test_labels_are_the_matched_pieces_and_the_metric_joins_them() -> None:
    data = Texts(DOCUMENTS[:2], SUMMARIES[:2], "word", "auto")
    assert [x.tolist() for x in data.labels] == [[False, True, False], [False, False, True, False]]
    exact = Texts(["A b c. D e f."], ["a b c"], "word", "auto")
    assert exact.measure([0, 0], [[0], [1]]).tolist() == pytest.approx([1.0, 0.0])


def test_a_generator_must_be_better_by_more_than_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    class Perfect(BaseEstimator):  # type: ignore[misc]
        def fit(self, sources: list[str], targets: list[str], **rest: Any) -> Perfect:
            assert len(sources) == len(targets) == len(rest["alternatives"])
            assert all(sources)
            self.known = {str(7 * i): text for i, text in enumerate(SUMMARIES)}
            return self

        def generate(self, sources: list[str]) -> list[str]:
            return [next((self.known[w] for w in s.split() if w in self.known), "") for s in sources]

    class Silent(Perfect):
        def generate(self, sources: list[str]) -> list[str]:
            return ["" for _ in sources]

    monkeypatch.setattr(summarizer, "LEAST_PAIRS", 10)
    settings = {"epochs": 4}
    model = made(extract_only="auto", generator=Perfect(), **settings).fit(DOCUMENTS, SUMMARIES)
    assert model.uses_generator_
    assert model.scored_on_ == "validation"
    assert model.scores_["generator"] > model.scores_["extractor"]
    assert len(model.out_of_fold_extracts_) == 24
    model = made(extract_only="auto", generator=Silent(), **settings).fit(DOCUMENTS, SUMMARIES)
    assert not model.uses_generator_
    assert model.scores_["generator"] == 0
    assert all(model.predict(DOCUMENTS[:3]))
    assert made(extract_only=False, generator=Silent(), **settings).fit(DOCUMENTS, SUMMARIES).uses_generator_
    assert not beyond_noise(np.array([0.3]))


@pytest.mark.parametrize(
    ("documents", "summaries", "error", "message"),
    [
        (DOCUMENTS, SUMMARIES[1:], ValueError, "each document needs a summary; got 24 documents and 23 summaries"),
        ("text", SUMMARIES, TypeError, "documents must be a list of str; got str"),
        (DOCUMENTS, "text", TypeError, "summaries must be a list of str; got str"),
        ([*DOCUMENTS[:2], None], SUMMARIES[:3], TypeError, r"documents\[2\] is None of type NoneType"),
        ([*DOCUMENTS[:2], " \n"], SUMMARIES[:3], ValueError, r"documents\[2\] holds no word"),
        (DOCUMENTS[:3], ["a", "", "b"], ValueError, r"summaries\[1\] holds no word"),
        ([], [], ValueError, "at least one pair is needed"),
        (DOCUMENTS[:2], SUMMARIES[:2], ValueError, "folds=3 needs at least as many different documents; got 2"),
    ],
)
def test_bad_pairs_are_refused(documents: Any, summaries: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        made().fit(documents, summaries)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"folds": 1}, ValueError, "folds must be at least 2; got 1"),
        ({"folds": "5"}, TypeError, "folds must be an integer"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1; got 0"),
        ({"epochs": 1.5}, TypeError, "epochs must be an integer"),
        ({"random_state": -1}, ValueError, "random_state must be at least 0"),
        ({"lr": 0.0}, ValueError, "lr must be greater than"),
        ({"extract_only": "yes"}, ValueError, "extract_only must be True, False or 'auto'; got 'yes'"),
        ({"language": "fr"}, ValueError, "language must be one of"),
        ({"language": 3}, TypeError, "language must be one of"),
        ({"encoder": 3}, TypeError, "encoder must be"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        made(**settings).fit(DOCUMENTS, SUMMARIES)


def test_an_unfitted_one_says_so(tmp_path: Path) -> None:
    for use in (lambda m: m.predict(DOCUMENTS), lambda m: m.score(DOCUMENTS, SUMMARIES), lambda m: m.save(tmp_path)):
        with pytest.raises(NotFittedError):
            use(made())
