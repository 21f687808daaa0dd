"""The reproduction with a model and data of the user's, and how it is called."""

import pytest

from kexue.reproduce import run
from kexue.reproduce.nsp_zero_shot import FIRST_COMMON, FIRST_OWN, OWN, TOPICS, sentences
from tasks.nsp_models import bert, tokenizer


@pytest.fixture
def given(tmp_path):
    bert().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    rows = [f"{text},{label}" for text, label in (("the cup goal", "sports"), ("soup rice", "food")) * 10]
    (tmp_path / "data.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_a_model_and_data_of_the_users_are_measured(given):
    result = run("nsp-zero-shot", out=given, model=given / "model", data=given / "data.csv")
    table = result.figures["your model and data"]
    assert table["prompt"] == ["before the text"] * 2 + ["after the text"] * 2
    assert all(0 <= x <= 1 for x in table["accuracy"])
    assert result.figures["labels"] == "food, sports"
    assert result.figures["accuracy"] in (table["accuracy"][0], table["accuracy"][2])
    assert result.figure_path.is_file()
    assert (result.verdict == "reproduced") == (result.figures["accuracy"] >= 0.7)


@pytest.mark.parametrize(
    ("early", "late", "turned", "p", "verdict", "held"),
    [
        ((0.3, 0.4), (0.7, 0.9), (0.0, 0.01), 0.001, "reproduced", "abcd"),
        ((0.3, 0.4), (0.7, 0.9), (0.0, 0.01), 0.01, "partly", "abc"),
        ((0.065, 0.25), (0.705, 1.0), (0.0, 0.0), 0.3, "partly", "bc"),
        ((0.065, 0.25), (0.705, 1.0), (0.0, 0.1), 0.3, "not reproduced", "b"),
        ((0.3, 0.4), (0.5, 0.6), (0.0, 0.0), 0.001, "not reproduced", "acd"),
        ((0.065, 0.25), (0.1, 0.2), (0.0, 0.1), 0.3, "not reproduced", ""),
    ],
)
def test_the_verdict_follows_the_rule_and_the_note_says_what_held(monkeypatch, early, late, turned, p, verdict, held):
    from kexue.reproduce import nsp_zero_shot

    def synthetic(seed, steps, looks):
        rows = {"steps": [1000, steps], "accuracy": [early[seed], late[seed]], "reversed": [0.0, turned[seed]]}
        return rows | {"loss": [0.7]}

    real = {"arm": ["x"] * 3, "questions": [78] * 3, "accuracy": [0.1] * 3, "chance": [0.125] * 3, "p": [p, 0.5, 0.001]}
    monkeypatch.setattr(nsp_zero_shot, "_synthetic", synthetic)
    monkeypatch.setattr(nsp_zero_shot, "measure_topics", lambda *_: real)
    result = nsp_zero_shot.measure(quick=False, seed=0)
    assert result.verdict == verdict
    assert {name[1] for name, value in result.figures.items() if value == "True"} == set(held)
    holds, fails = result.note.split("Does not hold:")
    assert {c for c in "abcd" if f"({c})" in holds} == set(held)
    assert {c for c in "abcd" if f"({c})" in fails} == set("abcd") - set(held)


def test_bad_inputs_are_refused(given):
    with pytest.raises(ValueError, match="go together"):
        run("nsp-zero-shot", model=given / "model")
    with pytest.raises(ValueError, match="'flatnce' takes no data, model"):
        run("flatnce", model=given / "model", data=given / "data.csv")
    (given / "few.csv").write_text("text,label\na,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match="at least 10 texts"):
        run("nsp-zero-shot", model=given / "model", data=given / "few.csv")
    (given / "same.csv").write_text("text,label\n" + "a,b\n" * 12, encoding="utf-8")
    with pytest.raises(ValueError, match="at least 2 labels"):
        run("nsp-zero-shot", model=given / "model", data=given / "same.csv")


def test_the_command_needs_both_and_the_method_for_them():
    from typer.testing import CliRunner

    from kexue.cli import app

    for args in (["--model", "here", "--data", "there"], ["nsp-zero-shot", "--model", "here"]):
        assert CliRunner().invoke(app, ["reproduce", *args]).exit_code == 2


def test_sentences_have_the_words_of_their_topic_or_common_ones():
    import torch

    topics = torch.arange(TOPICS).repeat(50)
    words = sentences(topics, 10, torch.Generator().manual_seed(0))
    own = words >= FIRST_OWN
    assert torch.equal(((words - FIRST_OWN) // OWN)[own], topics[:, None].expand_as(words)[own])
    assert (words[~own] >= FIRST_COMMON).all()
    assert 0.43 < own.float().mean() < 0.47
