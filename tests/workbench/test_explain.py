"""The command ``kexue explain``."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from kexue.cli import app
from kexue.corpus import Document
from kexue.reproduce._review_classifier import tokenizer, train
from kexue.workbench import WorkspaceError
from kexue.workbench.explain import explain_texts
from kexue.workbench.pretrain import PretrainSettings, pretrain
from kexue.workbench.similarity import SimilaritySettings, train_similarity


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain") / "classifier"
    train(2, 0, layers=1, width=16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def run(*words, text=None):
    return CliRunner().invoke(app, ["explain", *map(str, words)], input=text)


def test_texts_are_explained_in_words_json_and_html(classifier, tmp_path):
    page = tmp_path / "page.html"
    done = run(classifier, "这家店真黑心了", "--target", "negative", "--against", "positive", "--html", page, "-k", 3)
    assert done.exit_code == 0, done.output
    assert "negative rather than positive: logit" in done.stdout
    assert "这家店真黑心了" in done.stdout
    assert done.stdout.count("\n  ") == 3
    assert "<p>这家店真黑心了</p>" in page.read_text(encoding="utf-8")  # hardly any change, so no colour
    made = json.loads(run(classifier, "--json", "--baseline", "zero", text="这家店真黑心了\n很好看啊\n").stdout)
    assert [one["text"] for one in made] == ["这家店真黑心了", "很好看啊"]
    for one in made:
        assert one["converged"]
        assert sum(token["score"] for token in one["tokens"]) == pytest.approx(one["change"], abs=2e-3)
        assert one["text"] == "".join(one["text"][t["start"] : t["end"]] for t in one["tokens"])


@pytest.mark.slow
def test_language_models_of_this_package(tmp_path):
    documents = [Document(str(i), "The cat sees the bird. The dog likes the river." * 4, "", ()) for i in range(20)]
    for objective in ("one-pass", "mlm", "clm"):
        folder = tmp_path / objective
        pretrain(documents, folder, PretrainSettings(objective, steps=3, vocab_size=300, max_length=32, batch_size=4))
        text = "The cat sees" if objective == "clm" else "The cat [MASK] the bird"
        done = run(folder, text, "--json")
        assert done.exit_code == 0, done.output
        (one,) = json.loads(done.stdout)
        assert one["output"] == "log_prob"
        assert sum(token["score"] for token in one["tokens"]) == pytest.approx(one["change"], abs=3e-3)
    assert "write [MASK] there" in str(run(tmp_path / "mlm", "The cat").exception)


@pytest.mark.slow
def test_two_sentences_are_explained_by_pairs_of_characters(tmp_path):
    groups = {"age": ["how old are you", "what is your age"], "home": ["where do you live", "what is your address"]}
    documents = [Document(f"{g}{i}", t, "", (g,)) for g, texts in groups.items() for i, t in enumerate(texts * 3)]
    train_similarity(documents, tmp_path / "model", SimilaritySettings(dim=8, epochs=1, min_count=1))
    done = run(tmp_path / "model", "your age", "Your address", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    pairs = torch.tensor(found["pairs"])
    assert (found["first"], found["second"]) == ("your age", "your address")
    assert pairs.shape == (8, 12)
    assert float(pairs.sum()) + found["rest"] == pytest.approx(found["cosine"], abs=1e-3)
    assert "cosine" in run(tmp_path / "model", "your age", "your address").stdout
    assert run(tmp_path / "model", "your age").exit_code == 2
    assert run(tmp_path / "model", "a", "b", "--target", "c").exit_code == 2


def test_what_is_no_model_is_refused(classifier, tmp_path):
    with pytest.raises(WorkspaceError, match="does not exist"):
        explain_texts(tmp_path / "nothing", ["a"])
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
    with pytest.raises(WorkspaceError, match="'BertModel'"):
        explain_texts(tmp_path, ["a"])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WorkspaceError, match="cannot be read|can be read"):
        explain_texts(tmp_path, ["a"])
    assert run(classifier, "好", "--tol", 0).exit_code == 2
    wrong = run(classifier, "好", "--target", "neutral")
    assert wrong.exit_code == 1
    assert "'negative', 'positive'; got 'neutral'" in str(wrong.exception)


def test_every_class_hostile_texts_and_wrong_usage(classifier, tmp_path):
    page = tmp_path / "page.html"
    done = run(classifier, "真\x1b[31m黑<script>", "--every-class", "--max-length", 6, "--html", page, "-k", 1)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("from the baseline") == 2
    assert "\x1b" not in done.stdout
    assert "\x1b" not in page.read_text(encoding="utf-8")
    assert "<script" not in page.read_text(encoding="utf-8")
    for wrong in (["--baseline", "x"], ["--output", "x"], ["--html", tmp_path / "no" / "page.html"],
                  ["--every-class", "--target", "negative"]):  # fmt: skip
        assert run(classifier, "真", *wrong).exit_code == 2
