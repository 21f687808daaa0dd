from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from kexue.cli import app
from kexue.corpus import CorpusError, Document
from kexue.workbench import WorkspaceError
from kexue.workbench.similarity import SimilarityModel, SimilaritySettings, read_groups, train_similarity

ACTS = {
    "改": ("怎么修改{}", "如何更改{}", "我想换一下{}", "{}要怎么改"),
    "查": ("怎么查询{}", "在哪里看{}", "{}去哪里查", "我要查看{}"),
    "cancel": ("cancel my {}", "I want to cancel the {}", "stop the {} please", "how to cancel {}?"),
}
THINGS = ("密码", "手机号", "银行卡", "address", "头像", "order", "发票", "优惠券", "会员", "积分")
SENTENCES = [(form.format(x), f"{x}-{act}") for x in THINGS for act, forms in ACTS.items() for form in forms]
SMALL = SimilaritySettings(dim=32, epochs=30)


def kexue(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def documents():
    return [Document(id=f"q{i}", text=text, labels=(group, "other")) for i, (text, group) in enumerate(SENTENCES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("similarity")


@pytest.fixture(scope="module")
def table(folder):
    path = folder / "faq.tsv"
    path.write_text("".join(f"{text}\t{group}\n" for text, group in SENTENCES), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(folder, table):
    result = kexue("similarity", "train", table, "--out", folder / "model", "--dim", 32, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), folder / "model"


def test_unseen_groups_are_ranked_and_give_a_threshold(model):
    info, path = model
    figures = info["figures"]
    assert figures["sentences"] == len(SENTENCES)
    assert figures["groups"] == 30
    assert figures["held-out groups"] == 5
    assert figures["passes"] == 200
    assert figures["top1"] > 0.7  # 19 wrong answers for each right one: chance is .16
    assert 0 < figures["best_threshold"] < 1
    assert SimilarityModel(path).threshold == pytest.approx(figures["best_threshold"], abs=1e-4)


def test_a_query_finds_sentences_of_its_meaning(model):
    _, path = model
    result = kexue("similarity", "query", path, "怎样修改密码？", "-k", 3, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [set(one) for one in found] == [{"text", "score", "id", "group"}] * 3
    assert found[0]["group"] == "密码-改"
    assert found[0]["text"] in dict(SENTENCES)
    assert found == sorted(found, key=lambda one: -one["score"])
    shown = kexue("similarity", "query", path, "怎样修改密码？", "-k", 3).stdout.splitlines()
    assert len(shown) == 3
    assert found[0]["text"] in shown[0]
    assert found[0]["group"] in shown[0]


def test_a_threshold_leaves_out_what_is_below_it(model):
    _, path = model
    opened = SimilarityModel(path)
    text = "怎么修改密码"
    every = opened.query(text, k=len(SENTENCES))
    assert len(every) == len(SENTENCES)
    assert every[0].text == text
    assert every[0].score == pytest.approx(1, abs=1e-5)
    least = every[7].score
    assert opened.query(text, k=len(SENTENCES), threshold=least) == [one for one in every if one.score >= least]
    assert json.loads(kexue("similarity", "query", path, text, "--threshold", 2, "--json").stdout) == []
    best = json.loads(kexue("similarity", "query", path, text, "--threshold", "best", "-k", 99, "--json").stdout)
    assert len(best) == sum(one.score >= opened.threshold for one in every)


def test_queries_of_any_text_are_answered(model):
    opened = SimilarityModel(model[1])
    for text in ("", " ", "🎉", "é́", "x" * 100_000, "未知字𠮷"):
        found = opened.query(text, k=2)
        assert len(found) == 2
        assert all(np.isfinite(one.score) for one in found)
    with pytest.raises(TypeError, match="must be a str"):
        opened.query(3)
    with pytest.raises(ValueError, match="k must be"):
        opened.query("a", k=0)


def test_json_lines_and_tables_with_and_without_header_hold_the_same(tmp_path, table):
    lines = tmp_path / "faq.jsonl"
    lines.write_text("".join(document.to_json() + "\n" for document in documents()), encoding="utf-8")
    header = tmp_path / "faq.csv"
    header.write_text("group,text\n" + "".join(f"{g},{t}\n" for t, g in SENTENCES), encoding="utf-8")
    for path in (table, lines, header):
        assert [(d.text, d.labels[0]) for d in read_groups([path])] == SENTENCES
    assert read_groups([lines])[3].id == "q3"


def test_a_table_that_is_no_pair_of_columns_is_not_guessed_at(tmp_path, table):
    three = tmp_path / "three.tsv"
    three.write_text("".join(f"{i}\t{t}\t{g}\n" for i, (t, g) in enumerate(SENTENCES)), encoding="utf-8")
    with pytest.raises(CorpusError, match="Columns found: '1', '2', '3'"):
        read_groups([three])
    found = read_groups([three], {"text_column": "2", "label_column": "3"})
    assert [(d.text, d.labels[0]) for d in found] == SENTENCES
    header = tmp_path / "header.tsv"  # its columns are the other way round
    header.write_text("group\ttext\ng\tt\n", encoding="utf-8")
    with pytest.raises(CorpusError, match="Columns found: '1', '2'"):
        read_groups([table, header])
    broken = tmp_path / "broken.tsv"
    broken.write_text('a\tg\n"b\tg\nc\th\n', encoding="utf-8")
    with pytest.raises(CorpusError, match="line 2: a quote that opens in this row is never closed"):
        read_groups([broken])
    broken.write_text("a\tg\nb\n", encoding="utf-8")
    with pytest.raises(CorpusError, match="line 2: there is no column '2' for the label"):
        read_groups([broken])


def test_wrong_queries_are_wrong_usage(model, tmp_path):
    _, path = model
    for arguments in (["  "], ["a", "--threshold", "nan"], ["a", "--threshold", "high"], ["a", "-k", 0]):
        assert kexue("similarity", "query", path, *arguments).exit_code == 2
    damaged = tmp_path / "damaged"
    shutil.copytree(path, damaged)
    (damaged / "training.json").write_text("[]")
    with pytest.raises(WorkspaceError, match="train it again"):
        SimilarityModel(damaged)


def test_what_cannot_be_used_is_refused(tmp_path):
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"id": "1", "text": "a"}\n{"id": "2", "text": "b", "labels": ["g"]}\n', encoding="utf-8")
    result = kexue("similarity", "train", bare, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "1 of 2 have none, the first is '1'" in str(result.exception) + result.stderr
    one = [Document(id="1", text="a", labels=("g",)), Document(id="2", text="b", labels=("g",))]
    with pytest.raises(ValueError, match="at least two groups"):
        train_similarity(one, tmp_path / "out")
    with pytest.raises(ValueError, match="must hold sentences"):
        train_similarity([], tmp_path / "out")
    with pytest.raises(ValueError, match="document '1' has none"):
        train_similarity([Document(id="1", text="a")], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for bad in ({"kind": "x"}, {"epochs": 0}, {"held_out": 0.6}, {"held_out": -1}, {"dim": 0}, {"min_count": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SimilaritySettings(**bad)
    assert kexue("similarity", "train", bare, "--kind", "nothing").exit_code == 2


def test_a_folder_that_stands_there_is_kept(model, tmp_path):
    _, path = model
    with pytest.raises(WorkspaceError, match="--force"):
        train_similarity(documents(), path, SMALL)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(WorkspaceError, match="no model of sentence similarity"):
        train_similarity(documents(), other, SMALL, force=True)
    assert (other / "mine.txt").read_text() == "mine"
    with pytest.raises(WorkspaceError, match="does not exist"):
        SimilarityModel(tmp_path / "nowhere")
    with pytest.raises(WorkspaceError, match="is no model"):
        SimilarityModel(other)
    with pytest.raises(WorkspaceError, match="is a file"):
        SimilarityModel(other / "mine.txt")


def test_too_few_groups_are_all_learned_from(tmp_path):
    few = [d for d in documents() if d.labels[0].endswith("cancel")]
    lines = []
    path = train_similarity(few, tmp_path / "few", SMALL, log=lines.append)
    opened = SimilarityModel(path)
    assert opened.threshold is None
    assert "too few groups" in lines[0]
    assert "top1" not in opened.info["figures"]
    result = kexue("similarity", "query", path, "cancel", "--threshold", "best")
    assert result.exit_code == 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_an_interrupted_run_continues_to_the_same_model(tmp_path, table, number, code):
    options = ["--dim", "8", "--epochs", "70"]
    assert kexue("similarity", "train", table, "--out", tmp_path / "whole", *options).exit_code == 0
    out = tmp_path / "cut"
    command = [sys.executable, "-m", "kexue", "similarity", "train", str(table), "--out", str(out), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any(tmp_path.rglob("step-*" if number == signal.SIGKILL else "metrics.jsonl")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert not out.exists()
    assert any(name.endswith(".partial") for name in os.listdir(tmp_path))
    assert kexue("similarity", "train", table, "--out", out, *options).exit_code == 0
    assert not any(name.endswith(".partial") for name in os.listdir(tmp_path))
    first, second = (SimilarityModel(tmp_path / name).estimator for name in ("whole", "cut"))
    for a, b in zip(first.encoder_.state_dict().values(), second.encoder_.state_dict().values(), strict=True):
        assert a.equal(b)
