"""Growing checkpoints on disk: kexue.models.grow_checkpoint and the command ``kexue grow``."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from typer.testing import CliRunner

from kexue.cli import app
from kexue.models import GAUAlphaConfig, GAUAlphaForMaskedLM, grow, grow_checkpoint, growth_files

SIZES = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def models():
    no_ids = {"bos_token_id": None, "eos_token_id": None}
    return {
        "bert": BertForMaskedLM(BertConfig(max_position_embeddings=20, **SIZES)),
        "bert untied": BertForMaskedLM(BertConfig(max_position_embeddings=20, tie_word_embeddings=False, **SIZES)),
        "bert without a head": BertModel(BertConfig(max_position_embeddings=20, **SIZES)),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=20, **no_ids)),
        "llama": LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, max_position_embeddings=20, **SIZES)),
        "gau": GAUAlphaForMaskedLM(
            GAUAlphaConfig(
                vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=2, attention_key_size=8
            )
        ),
    }


@pytest.fixture(params=sorted(models()))
def saved(request, tmp_path):
    torch.manual_seed(0)
    model = models()[request.param].eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    model.save_pretrained(tmp_path / "small")
    return model, tmp_path


def test_the_file_holds_what_grow_gives(saved):
    model, place = saved
    report = grow_checkpoint(place / "small", place / "large", width=2, noise=0.1, seed=3)
    assert report.max_rel < 1e-5
    large = type(model).from_pretrained(place / "large")
    expected = grow(model, width=2, noise=0.1, generator=torch.Generator().manual_seed(3))
    assert (
        large.config.to_dict().items()
        >= {
            k: v for k, v in expected.config.to_dict().items() if k not in ("dtype", "architectures", "_name_or_path")
        }.items()
    )
    for (name, got), (other, want) in zip(large.named_parameters(), expected.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(got, want)


def test_files_of_any_number_load_as_one(saved, monkeypatch):
    model, place = saved
    monkeypatch.setattr(growth_files, "_SHARD", 5000)
    lines = []
    grow_checkpoint(place / "small", place / "large", width=3, progress=lines.append)
    files = sorted((place / "large").glob("*.safetensors"))
    assert len(files) == len(lines) > 2
    index = json.loads((place / "large" / "model.safetensors.index.json").read_text())
    stored = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == stored
    assert index["metadata"]["total_size"] == sum(4 * x.numel() for file in files for x in load_file(file).values())
    large = type(model).from_pretrained(place / "large")
    for got, want in zip(large.parameters(), grow(model, width=3).parameters(), strict=True):
        assert torch.equal(got, want)


def test_what_belongs_to_the_text_is_copied_and_the_rest_is_not(tmp_path):
    torch.manual_seed(0)
    small = tmp_path / "small"
    models()["bert"].save_pretrained(small)
    for name in ("tokenizer.json", "vocab.txt", "optimizer.pt", "trainer_state.json", "model.safetensors.index.json"):
        (small / name).write_text("{}", encoding="utf-8")
    (small / "model.safetensors.index.json").unlink()
    (small / "checkpoint-3").mkdir()
    grow_checkpoint(small, tmp_path / "large", width=2)
    names = {file.name for file in (tmp_path / "large").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt", "growth.json"} | (
        {"generation_config.json"} & names
    )
    record = json.loads((tmp_path / "large" / "growth.json").read_text())
    assert record["options"]["width"] == 2
    assert record["verified"]["max_rel"] < 1e-9


def test_low_precision_stays(tmp_path):
    torch.manual_seed(0)
    models()["bert"].bfloat16().save_pretrained(tmp_path / "small")
    grow_checkpoint(tmp_path / "small", tmp_path / "large", width=2)
    assert BertForMaskedLM.from_pretrained(tmp_path / "large", dtype="auto").dtype == torch.bfloat16
    assert all(x.dtype == torch.bfloat16 for x in load_file(tmp_path / "large" / "model.safetensors").values())


def test_a_grown_model_grows_again_and_replaces_an_earlier_result(tmp_path):
    torch.manual_seed(0)
    models()["gpt2"].save_pretrained(tmp_path / "a")
    grow_checkpoint(tmp_path / "a", tmp_path / "b", width=2)
    grow_checkpoint(tmp_path / "b", tmp_path / "c", depth=5)
    grow_checkpoint(tmp_path / "b", tmp_path / "c", width=2, depth=3)
    config = GPT2LMHeadModel.from_pretrained(tmp_path / "c").config
    assert (config.n_embd, config.n_layer) == (64, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_automatic_classes_load_it(tmp_path):
    models()["gau"].save_pretrained(tmp_path / "small")
    with pytest.warns(UserWarning, match="eps is one value"):
        grow_checkpoint(tmp_path / "small", tmp_path / "large", width=2)
    assert isinstance(AutoModelForMaskedLM.from_pretrained(tmp_path / "large"), GAUAlphaForMaskedLM)


def test_a_wrong_result_is_not_written(tmp_path, monkeypatch):
    models()["gpt2"].save_pretrained(tmp_path / "small")
    write = growth_files._write

    def broken(model, plan, *rest):
        for name, recipe in plan.tensors.items():
            if name.endswith("ln_f.weight"):
                object.__setattr__(recipe, "scale", 2 * recipe.scale)
        write(model, plan, *rest)

    monkeypatch.setattr(growth_files, "_write", broken)
    with pytest.raises(ValueError, match="nothing was written"):
        grow_checkpoint(tmp_path / "small", tmp_path / "large", width=2)
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_bad_checkpoints_and_folders(tmp_path):
    small = tmp_path / "small"
    with pytest.raises(ValueError, match="no folder with a config.json"):
        grow_checkpoint("bert-base-uncased", tmp_path / "large")
    models()["gpt2"].save_pretrained(small)
    with pytest.raises(ValueError, match="does not hold the small model"):
        grow_checkpoint(small, small)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("my only copy", encoding="utf-8")
    with pytest.raises(ValueError, match="choose another folder"):
        grow_checkpoint(small, taken)
    assert (taken / "thesis.txt").read_text(encoding="utf-8") == "my only copy"
    with pytest.raises(ValueError, match="nothing can shrink"):
        grow_checkpoint(small, tmp_path / "large", hidden_size=8)
    with pytest.raises(TypeError, match="seed"):
        grow_checkpoint(small, tmp_path / "large", seed=0.5)
    weights = load_file(small / "model.safetensors")
    from safetensors.torch import save_file

    weights.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(weights, small / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights.*c_fc"):
        grow_checkpoint(small, tmp_path / "large")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "architectures": None}))
    with pytest.raises(ValueError, match="architectures"):
        grow_checkpoint(small, tmp_path / "large")
    assert not (tmp_path / "large").exists()


def test_the_small_model_is_never_what_is_replaced(tmp_path):
    torch.manual_seed(0)
    models()["gpt2"].save_pretrained(tmp_path / "first")
    small = tmp_path / "small"
    grow_checkpoint(tmp_path / "first", small, depth=3)  # has the mark of a result, which a later one may replace
    (tmp_path / "link").symlink_to(small)
    before = (small / "model.safetensors").read_bytes()
    for source, out in (
        (small, tmp_path / "first" / ".." / "small"),
        (tmp_path / "link", small),
        (small, tmp_path / "link"),
    ):
        with pytest.raises(ValueError, match="out must be a folder that does not hold the small model"):
            grow_checkpoint(source, out, width=2)
    models()["gpt2"].save_pretrained(small / "inner")
    with pytest.raises(ValueError, match="does not hold the small model"):
        grow_checkpoint(small / "inner", small, width=2)
    assert (small / "model.safetensors").read_bytes() == before
    assert (small / "inner" / "model.safetensors").exists()


def test_weights_can_be_read_by_whom_the_configuration_can(tmp_path):
    models()["gpt2"].save_pretrained(tmp_path / "small")
    grow_checkpoint(tmp_path / "small", tmp_path / "large", width=2)
    modes = {file.suffix: file.stat().st_mode for file in (tmp_path / "large").iterdir()}
    assert modes[".safetensors"] == modes[".json"]


def test_damaged_weights_are_a_value_error(tmp_path):
    models()["gpt2"].save_pretrained(tmp_path / "small")
    weights = tmp_path / "small" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ValueError, match="small has no weights of GPT2LMHeadModel that can be read"):
        grow_checkpoint(tmp_path / "small", tmp_path / "large")
    weights.unlink()
    with pytest.raises(ValueError, match="small has no weights of GPT2LMHeadModel that can be read.*no file named"):
        grow_checkpoint(tmp_path / "small", tmp_path / "large")


def test_heads_that_need_batches_of_another_kind(tmp_path):
    torch.manual_seed(0)
    no_pad = GPT2ForSequenceClassification(models()["gpt2"].config)  # takes a single row without pad_token_id
    choices = BertForMultipleChoice(models()["bert"].config)  # (B, choices, T)
    for model in (no_pad, choices):
        name = type(model).__name__
        model.save_pretrained(tmp_path / name)
        assert grow_checkpoint(tmp_path / name, tmp_path / f"{name} large", width=2).max_rel < 1e-9


def test_the_command(tmp_path):
    torch.manual_seed(0)
    models()["gpt2"].save_pretrained(tmp_path / "small")
    run = CliRunner().invoke(
        app, ["grow", str(tmp_path / "small"), "--width", "2", "--noise", ".1", "--out", str(tmp_path / "large")]
    )
    assert run.exit_code == 0, run.output
    assert "logits" in run.output
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "large").config.n_embd == 32
    run = CliRunner().invoke(
        app, ["grow", str(tmp_path / "small"), "--depth", "3", "--out", str(tmp_path / "large"), "--json"]
    )
    printed = json.loads(run.stdout)
    assert printed["options"]["depth"] == 3
    assert printed["verified"]["max_abs"] == 0


def test_errors_of_the_command_name_its_options(tmp_path):
    models()["bert"].save_pretrained(tmp_path / "small")
    place = ["grow", str(tmp_path / "small"), "--out", str(tmp_path / "large")]
    for options, text in (
        (["--depth", "4"], "With --inexact the stack"),
        (["--hidden-size", "24", "--width", "2"], "--width 2 makes hidden_size 32; got --hidden-size 24"),
        (["--hidden-size", "30", "--inexact"], "or --heads wider"),
    ):
        error = CliRunner().invoke(app, [*place, *options]).exception
        assert isinstance(error, ValueError)
        assert text in str(error)


@pytest.mark.slow
def test_the_command_says_what_is_wrong_in_a_line(tmp_path):
    models()["bert"].save_pretrained(tmp_path / "small")
    code = [sys.executable, "-m", "kexue", "grow", str(tmp_path / "small"), "--depth", "4", "--out"]
    run = subprocess.run([*code, str(tmp_path / "large")], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("error: bert cannot get deeper exactly")
    assert not (tmp_path / "large").exists()
    run = subprocess.run([*code, str(tmp_path / "large"), "--inexact"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "note: growth of BertForMaskedLM: the stack of layers is repeated" in run.stderr
