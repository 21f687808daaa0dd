"""The folder of a BERT checkpoint as encoder of the summarizer."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, BertModel

from kexue.models import KexueForMaskedLM
from kexue.tasks import Summarizer
from kexue.tasks._piece_features import PieceEncoder
from tasks.nsp_models import VOCABULARY, bert, kexue, tokenizer

DOCUMENTS = [
    f"Notes of day {i}. {'It was wet. ' * (i % 3)}The result is {7 * i} points. Thanks to all." for i in range(10)
]
SUMMARIES = [f"The result is {7 * i} points" for i in range(10)]
TEXTS = ["the cup is news", "goal", "", "team ball " * 40]


def write(folder: Path, seed: int = 0, kind: Any = BertModel, **changes: Any) -> Any:
    tokenizer().save_pretrained(folder)
    model = bert(seed, kind=kind, **changes)
    model.save_pretrained(folder)
    return model


def fitted(folder: Path) -> Summarizer:
    model = Summarizer("en", True, 2, 2, encoder=folder, show_progress=False)
    return model.fit(DOCUMENTS, SUMMARIES)


def test_vectors_are_means_of_the_last_layer_special_tokens_included(tmp_path: Path) -> None:
    model, cut = write(tmp_path / "bert"), tokenizer()
    ids = [cut(text, truncation=True, max_length=64)["input_ids"] for text in TEXTS]
    assert [len(row) for row in ids] == [6, 3, 2, 64]
    with torch.no_grad():
        want = [model(torch.tensor([row])).last_hidden_state[0].mean(0).numpy() for row in ids]
    np.testing.assert_allclose(PieceEncoder(tmp_path / "bert")(TEXTS), want, atol=1e-5)
    model.half().save_pretrained(tmp_path / "bert")
    np.testing.assert_allclose(PieceEncoder(str(tmp_path / "bert"))(TEXTS), want, atol=0.05)


@pytest.mark.parametrize("kind", ["a masked language model", "a model of Kexue"])
def test_checkpoints_with_other_heads_are_read(kind: str, tmp_path: Path) -> None:
    write(tmp_path, kind=BertForMaskedLM)
    if kind != "a masked language model":
        kexue(kind=KexueForMaskedLM).save_pretrained(tmp_path)
    assert PieceEncoder(tmp_path)(["the cup", "goal"]).shape == (2, 32)


def test_a_summarizer_finds_its_checkpoint_and_notices_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "bert")
    monkeypatch.chdir(tmp_path)
    model = fitted(Path("bert"))
    want = model.predict(DOCUMENTS)
    model.save("model")
    monkeypatch.chdir(tmp_path.parent)
    folder = tmp_path / "model"
    for again in (Summarizer.load(folder), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert again.predict(DOCUMENTS) == want
        assert again.explain(DOCUMENTS) == model.explain(DOCUMENTS)
    (tmp_path / "bert").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"there is no folder .*bert; if the checkpoint has moved, load with encoder="):
        Summarizer.load(folder)
    moved = Summarizer.load(folder, encoder=tmp_path / "moved")
    assert moved.predict(DOCUMENTS) == want
    assert moved.encoder == tmp_path / "moved"
    write(tmp_path / "bert", seed=1)
    with pytest.raises(ValueError, match=r"bert' gives other vectors than the one of the training"):
        Summarizer.load(folder)
    with pytest.raises(ValueError, match=r"bert' gives other vectors than the one of the training"):
        pickle.loads(pickle.dumps(model))
    write(tmp_path / "bert", hidden_size=16)
    with pytest.raises(ValueError, match=r"vectors of width 32 as before; got \(3, 16\)"):
        Summarizer.load(folder)
    with pytest.raises(ValueError, match="the encoder 'hash' gives other vectors"):
        Summarizer.load(folder, encoder="hash")


def test_folders_that_hold_no_checkpoint_are_refused(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            fitted(tmp_path / "bert")

    refused("there is no folder")
    (tmp_path / "bert").mkdir()
    refused("bert holds no BERT checkpoint that can be loaded")
    write(tmp_path / "bert", vocab_size=9)
    refused(f"tokenizer of another model: token {VOCABULARY - 1}, but 9 embeddings")
    write(tmp_path / "bert")
    path = tmp_path / "bert" / "model.safetensors"
    weights = load_file(path)
    save_file({k: v for k, v in weights.items() if "query" not in k}, path, {"format": "pt"})
    refused("lacks 4 weights, among them encoder.layer.0.attention.self.query.bias")
    path.write_bytes(path.read_bytes()[:500])
    refused("bert holds no BERT checkpoint that can be loaded")
    shutil.rmtree(tmp_path / "bert")
    bert(kind=BertModel).save_pretrained(tmp_path / "bert")
    refused("bert holds no tokenizer")
