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


def test_the_command_needs_the_method_for_them():
    from typer.testing import CliRunner

    from kexue.cli import app

    result = CliRunner().invoke(app, ["reproduce", "--model", "here"])
    assert result.exit_code == 2


def test_sentences_have_the_words_of_their_topic_or_common_ones():
    import torch

    topics = torch.arange(TOPICS).repeat(50)
    words = sentences(topics, 10, torch.Generator().manual_seed(0))
    own = words >= FIRST_OWN
    assert torch.equal(((words - FIRST_OWN) // OWN)[own], topics[:, None].expand_as(words)[own])
    assert (words[~own] >= FIRST_COMMON).all()
    assert 0.43 < own.float().mean() < 0.47
