from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

from kexue.cli import app
from kexue.corpus import Document
from kexue.workbench import LanguageModel, WorkspaceError
from kexue.workbench.pieces import Pieces, sentences
from kexue.workbench.pretrain import PretrainSettings, pretrain

SUBJECTS = ("The cat", "A dog", "My friend", "The old man", "猫", "小狗")
VERBS = ("sees", "likes", "follows", "hears", "看见", "喜欢")
OBJECTS = ("the bird.", "a red ball.", "the river.", "the night sky.", "飞鸟。", "红色的球。")


def documents(count=40):
    out = []
    for i in range(count):
        draw = random.Random(i)
        lines = [f"{draw.choice(SUBJECTS)} {draw.choice(VERBS)} {draw.choice(OBJECTS)}" for _ in range(12)]
        out.append(Document(id=str(i), text=" ".join(lines), title="", labels=()))
    return out


SMALL = {"vocab_size": 400, "max_length": 32, "batch_size": 8}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for objective in ("one-pass", "mlm", "clm"):
        steps = 400 if objective == "mlm" else 150  # it learns from a seventh of the tokens
        pretrain(documents(), folder / objective, PretrainSettings(objective, steps=steps, **SMALL))
    return folder


@pytest.mark.parametrize(
    "text",
    ["", " ", "One. Two!  三。四？“五！”六", "no end", "a\n\nb", "3.14 is pi. ok", "。。。", "x" * 10_000],
)
def test_sentences_together_are_the_text(text):
    assert "".join(sentences(text)) == text


def test_sentences():
    assert sentences("It costs 3.14 dollars. He said: “好！”然后走了。") == [
        "It costs 3.14 dollars.", " He said: “好！”", "然后走了。",
    ]  # fmt: skip


def test_pieces_hold_every_token_of_the_text_within_the_limit(tmp_path):
    from kexue.words import train_tokenizer

    texts = [*documents(), Document(id="long", text="word" * 3000, title="", labels=()),
             Document(id="empty", text="  ", title="", labels=()),
             Document(id="literal", text="a [MASK] b", title="", labels=())]  # fmt: skip
    tokenizer = train_tokenizer([d.text for d in texts], 300)
    pieces = Pieces.write(tmp_path, texts, tokenizer, 32, seed=0)
    rows = [pieces[i] for i in range(len(pieces.offsets) - 1)]
    assert all(2 < len(row) <= 32 and row[0] == 2 and row[-1] == 3 for row in rows)
    assert all((row[1:-1] > 4).all() for row in rows)
    whole = "".join(tokenizer.decode(row[1:-1]) for row in rows)
    assert whole.replace(" ", "") == "".join(d.text for d in texts).replace(" ", "")
    assert len(pieces.held) >= 1
    assert set(pieces.held).isdisjoint(pieces.trained)


@pytest.mark.parametrize("objective", ["one-pass", "mlm", "clm"])
def test_a_model_learns_and_loads_in_transformers(models, objective):
    import transformers

    folder = models / objective
    info = LanguageModel.open(folder).info
    assert info["figures"]["held-out loss"] < info["figures"]["unigram loss"] - 0.5
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == info["settings"]["steps"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    stack = transformers.AutoModel.from_pretrained(folder).eval()
    ids = torch.tensor([tokenizer("The cat sees the bird.").input_ids])
    assert stack(ids).last_hidden_state.shape == (1, ids.shape[1], 128)
    assert not list(models.glob(".*partial"))


def test_pipelines_of_transformers(models):
    from transformers import pipeline

    filled = pipeline("fill-mask", model=str(models / "mlm"))("The cat sees the [MASK].")
    assert len(filled) == 5
    written = pipeline("text-generation", model=str(models / "clm"))(
        "The cat", max_new_tokens=5, do_sample=False, return_full_text=False
    )
    assert isinstance(written[0]["generated_text"], str)


@pytest.mark.parametrize("objective", ["one-pass", "mlm", "clm"])
def test_scores(models, objective):
    model = LanguageModel.open(models / objective)
    good, bad, empty = model.score(["The cat sees the bird.", "bird the. sees cat The", ""])
    assert good.mean > bad.mean + 0.5
    assert (empty.mean, empty.log_prob, empty.tokens) == (0.0, 0.0, ())
    assert good.log_prob == pytest.approx(sum(t.log_prob for t in good.tokens))
    assert "".join(good.text[t.start : t.end] for t in good.tokens) == good.text
    long = model.score(["The cat sees the bird. " * 30])[0]
    assert len(long.tokens) > 100  # in several windows
    for text in ("猫 看见 飞鸟。", "👩‍👩‍👧 e\u0301", "[MASK]", "\ud800"):
        assert model.score([text])[0].tokens
    batched = model.score(["The cat sees the bird.", "My friend likes a red ball. 猫 喜欢 红色的球。"], batch_size=2)
    alone = [model.score([b.text])[0] for b in batched]
    for a, b in zip(batched, alone, strict=True):
        assert a.log_prob == pytest.approx(b.log_prob, abs=1e-3)


def test_scores_are_those_of_the_model(models):
    one_pass, causal = (LanguageModel.open(models / name) for name in ("one-pass", "clm"))
    text = "My friend likes a red ball."
    ids = torch.tensor([one_pass.tokenizer(text).input_ids])
    wanted = one_pass.model.token_log_probs(ids)[0, 1:-1].sum().item()
    assert one_pass.score([text])[0].log_prob == pytest.approx(wanted, rel=1e-5)
    ids = torch.tensor([causal.tokenizer(text).input_ids])
    log_probs = causal.model(ids).logits.log_softmax(-1)[0, :-2].gather(1, ids[0, 1:-1, None]).sum().item()
    assert causal.score([text])[0].log_prob == pytest.approx(log_probs, rel=1e-5)


@pytest.mark.parametrize("objective", ["one-pass", "mlm"])
def test_suggestions_find_what_was_exchanged(models, objective):
    model = LanguageModel.open(models / objective)
    text = "小狗 看见 红色的狗。"
    (found,) = model.suggest([text], k=3, min_gain=0.5)
    assert found
    best = found[0]
    assert text[best.start : best.end] == best.found
    assert best.gain >= 0.5
    assert len(best.candidates) <= 3
    assert all(text_ != best.found for text_, _ in best.candidates)
    if objective == "one-pass":
        assert ("狗", "球") in [(c.found, c.candidates[0][0]) for c in found if c.start == text.rindex("狗")]
    assert model.suggest(["", "   "], min_gain=20.0) == [[], []]


def test_a_causal_model_suggests_nothing(models):
    with pytest.raises(ValueError, match="both sides"):
        LanguageModel.open(models / "clm").suggest(["a"])


def test_equal_settings_give_equal_models(models, tmp_path):
    pretrain(documents(), tmp_path / "again", PretrainSettings("one-pass", steps=150, **SMALL))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        models / "one-pass" / "model.safetensors"
    ).read_bytes()


def test_killed_and_started_again_ends_with_the_same_weights(models, tmp_path):
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "model"
    corpus.write_text("".join(json.dumps({"id": d.id, "text": d.text}) + "\n" for d in documents()))
    options = [
        "pretrain", str(corpus), "--out", str(out), "--objective", "clm", "--steps", "60", "--vocab-size", "400",
        "--max-length", "32", "--batch-size", "8",
    ]  # fmt: skip
    whole = tmp_path / "whole"
    assert CliRunner().invoke(app, [*options[:3], str(whole), *options[4:]]).exit_code == 0
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "kexue", *options], env=environment, stderr=subprocess.DEVNULL)
    metrics = tmp_path / ".model.partial" / "training" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= 13:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert list(metrics.parent.glob("step-*"))
    again = subprocess.run([sys.executable, "-m", "kexue", *options], env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_what_stands_there_is_not_overwritten(models, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(WorkspaceError, match="no language model"):
        pretrain(documents(), tmp_path / "mine", PretrainSettings(steps=1, **SMALL), force=True)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    with pytest.raises(WorkspaceError, match="--force"):
        pretrain(documents(), models / "clm", PretrainSettings(steps=1, **SMALL))
    (tmp_path / "empty").mkdir()
    pretrain(documents(5), tmp_path / "empty", PretrainSettings(steps=1, **SMALL))
    pretrain(documents(6), tmp_path / "empty", PretrainSettings("clm", steps=1, **SMALL), force=True)
    assert LanguageModel.open(tmp_path / "empty").objective == "clm"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "electra"}, "'electra'"),
        ({"size": "huge"}, "'huge'"),
        ({"vocab_size": 100}, "262"),
        ({"steps": 0}, "steps"),
        ({"lr": -1.0}, "lr"),
        ({"mask_rate": 1.5}, "at most 1"),
        ({"max_length": 2}, "max_length"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        PretrainSettings(**options)


def test_a_corpus_without_text(tmp_path):
    with pytest.raises(ValueError, match="at least one character"):
        pretrain([], tmp_path / "none", PretrainSettings(steps=1, **SMALL))


def test_models_that_are_none(models, tmp_path):
    with pytest.raises(WorkspaceError, match="does not exist"):
        LanguageModel.open(tmp_path / "missing")
    with pytest.raises(WorkspaceError, match="no language model"):
        LanguageModel.open(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(WorkspaceError, match="'bert'"):
        LanguageModel.open(tmp_path)
    with pytest.raises(TypeError, match="iterable of strings"):
        LanguageModel.open(models / "clm").score("text")


def test_commands(models):
    run = CliRunner().invoke
    result = run(app, ["score", str(models / "one-pass"), "The cat sees the bird.", "--json"])
    (row,) = json.loads(result.stdout)
    assert row["text"] == "The cat sees the bird."
    assert row["tokens"][0]["text"].startswith("The")
    result = run(app, ["score", str(models / "clm")], input="The cat\n\n猫\n")
    assert len(result.stdout.splitlines()) == 3
    result = run(app, ["suggest", str(models / "one-pass"), "小狗 看见 红色的狗。", "--min-gain", "0.5"])
    assert "狗 -> 球" in result.stdout
    result = run(app, ["suggest", str(models / "mlm"), "--json"], input="The cat sees the sky bird.\n")
    assert json.loads(result.stdout)[0]["text"].startswith("The cat")
    assert run(app, ["pretrain", "--objective", "bert"]).exit_code == 2
    assert run(app, ["pretrain", "--column"]).exit_code == 2


def test_writing(models):
    writer = LanguageModel.open(models / "clm")
    first, second = writer.write("The cat", 2, max_new_tokens=8, seed=3)
    assert first.startswith("The cat")
    assert first == writer.write("The cat", 1, max_new_tokens=8, seed=3)[0]
    assert second.startswith("The cat")
    greedy = writer.write("The cat", temperature=0, max_new_tokens=8)[0]
    ids = torch.tensor([writer._ids("The cat")])
    ids = torch.cat([torch.tensor([[2]]), ids], 1)
    theirs = writer.model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=3, pad_token_id=0)[0]
    assert greedy == writer.tokenizer.decode([i for i in theirs.tolist() if i > 4])
    assert len(writer.write()) == 1
    assert writer.write("The cat", temperature=0, max_new_tokens=4, quantize="int8")[0].startswith("The cat")
    with pytest.raises(ValueError, match="causal"):
        LanguageModel.open(models / "one-pass").write("The cat")
    with pytest.raises(TypeError, match="string"):
        writer.write(3)


def test_searching(models):
    writer, reader = LanguageModel.open(models / "clm"), LanguageModel.open(models / "one-pass")
    quick = {"steps": 20, "chains": 4, "count": 2, "progress": False}
    for options in ({}, {"proposal": reader}):
        found = writer.search(["dog", "river"], **quick, **options)
        assert found
        assert all("dog" in text and "river" in text for text, _ in found)
    assert writer.search(["dog", "river"], **quick) == writer.search(["dog", "river"], **quick)
    source = "The old man hears the river."
    assert all(text != source for text, _ in writer.search(near=source, **quick))
    shorter = writer.search(near=source, shorten=0.6, **quick)
    assert all(len(text) < len(source) for text, _ in shorter)
    with pytest.raises(ValueError, match="shorten needs near"):
        writer.search(["dog"], shorten=0.5)
    with pytest.raises(ValueError, match="both sides"):
        writer.search(["dog"], proposal=writer)
    with pytest.raises(ValueError, match="causal"):
        reader.search(["dog"])


def test_the_command_generate(models):
    run, writer = CliRunner().invoke, str(models / "clm")
    result = run(app, ["generate", writer, "--prompt", "The cat", "-k", "2", "--max-tokens", "6", "--json"])
    assert [row["text"][:7] for row in json.loads(result.stdout)] == ["The cat"] * 2
    result = run(app, ["generate", writer, "--contains", "dog,river", "--steps", "20", "--chains", "4"])
    assert all("dog" in line and "river" in line for line in result.stdout.splitlines())
    for options, message in (
        (["--prompt", "a", "--contains", "b"], "one or the other"),
        (["--contains", ","], "empty"),
        (["--shorten", "0.5"], "--near"),
        (["--near", "The cat", "--shorten", "7"], "between 0 and 1"),
        (["--prompt", "a", "--steps", "5"], "no effect"),
        (["--near", "The cat", "--top-p", "0.5"], "no effect"),
        (["--near", "The cat", "--max-tokens", "5"], "no effect"),
        (["--proposal", writer], "--contains or --near"),
    ):
        result = run(app, ["generate", writer, *options])
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.replace("│", " ").split())
