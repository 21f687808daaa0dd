import json
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kexue.generation import CausalLM, load_causal_lm
from kexue.models import KexueConfig, KexueForMaskedLM, from_megatron_gpt2
from reference import cpm_gpt2 as reference

HEADS = 4
IDS = torch.tensor([[3, 1, 19, 0, 7, 7, 2]])


@pytest.fixture(scope="module")
def weights():
    return reference.gpt2(vocabulary=20, width=16, layers=2, positions=12)


@pytest.fixture(scope="module")
def expected(weights):
    return from_megatron_gpt2([weights], HEADS)


def same(lm, expected):
    assert type(lm) is CausalLM
    assert not lm.training
    found, wanted = lm.state_dict(), expected.state_dict()
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch.equal(lm(IDS).logits, expected(IDS).logits)
    assert lm.lm_head.decoder.weight is lm.kexue.embeddings.token.weight


def gpt2(weights):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": HEADS, "n_positions": 12}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
    model.load_state_dict(reference.to_transformers(weights))
    return model


def checkpoint(part):
    """What the training script of the release saves beside the weights."""
    return {
        "module": part, "optimizer": None, "lr_scheduler": {"start_lr": 1e-4}, "csr_tensor_module_names": set(),
        "iteration": 80000, "random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(),  # noqa: NPY002
        "torch_rng_state": torch.get_rng_state(),
    }  # fmt: skip


def release(folder, weights, count=2, iteration="80000", **options):
    """The folder of the release; the path of the iteration."""
    inside = folder / iteration
    inside.mkdir(parents=True)
    for rank, part in enumerate(reference.shard(weights, count)):
        torch.save(checkpoint(part), inside / f"mp_rank_{rank:02}_model_states.pt", **options)
    return inside


def test_folders_of_this_package(tmp_path, expected):
    expected.save_pretrained(tmp_path)
    for kind in ("auto", "kexue"):
        same(load_causal_lm(tmp_path, kind), expected)
    same(load_causal_lm(str(tmp_path), mmap=False), expected)
    with pytest.raises(ValueError, match="among 'gpt2'; got 'kexue'"):
        load_causal_lm(tmp_path, format="transformers")


@pytest.mark.parametrize("kind", ["one file", "several files", "torch", "torch, several files", "encoder alone"])
def test_folders_of_transformers(tmp_path, weights, expected, kind):
    model = gpt2(weights)
    if kind == "encoder alone":
        model.transformer.save_pretrained(tmp_path)
    else:
        model.save_pretrained(tmp_path, max_shard_size="6KB" if "several" in kind else "1GB")
    if "torch" in kind:
        from safetensors.torch import load_file

        for path in sorted(tmp_path.glob("*.safetensors")):
            torch.save(load_file(path), path.with_name(path.name.replace("model", "pytorch_model", 1)[:-11] + "bin"))
            path.unlink()
        index = tmp_path / "model.safetensors.index.json"
        if index.exists():
            text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
            (tmp_path / "pytorch_model.bin.index.json").write_text(text)
            index.unlink()
    assert len([p for p in tmp_path.iterdir() if "model" in p.name]) > (1 if "several" in kind else 0)
    for name in ("auto", "transformers"):
        same(load_causal_lm(tmp_path, name), expected)
    lm = load_causal_lm(tmp_path)
    torch.testing.assert_close(lm(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    greedy = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, IDS.shape[1] :]
    assert lm.generate_fast(IDS.tolist(), max_new_tokens=4, temperature=0) == [greedy.tolist()]
    with pytest.raises(ValueError, match="among 'kexue'; got 'gpt2'"):
        load_causal_lm(tmp_path, format="kexue")


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_release_in_all_ways_to_name_it(tmp_path, weights, expected, count, options):
    inside = release(tmp_path, weights, count, **options)
    files = sorted(inside.iterdir())
    for source in (tmp_path, inside, files, list(map(str, files)), [torch.load(f, weights_only=False) for f in files]):
        same(load_causal_lm(source, num_heads=HEADS), expected)
        same(load_causal_lm(source, "megatron", num_heads=HEADS), expected)
    if count == 1:
        same(load_causal_lm(files[0], num_heads=HEADS), expected)
    same(load_causal_lm(reference.shard(weights, count), num_heads=HEADS), expected)


def test_the_iteration_that_the_marker_names_is_taken(tmp_path, weights, expected):
    other = {name: value + 1 for name, value in weights.items()}
    release(tmp_path, other, iteration="70000")
    release(tmp_path, weights)
    with pytest.raises(ValueError, match=r"2 iterations \(70000, 80000\)"):
        load_causal_lm(tmp_path, num_heads=HEADS)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("80000\n")
    same(load_causal_lm(tmp_path, num_heads=HEADS), expected)
    for wrong in ("90000", "..", "", "/etc"):
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(wrong)
        with pytest.raises(ValueError, match="names the iteration"):
            load_causal_lm(tmp_path, num_heads=HEADS)


def test_megatrons_own_folders(tmp_path, weights, expected):
    for rank, part in enumerate(reference.shard(weights, 2)):
        folder = tmp_path / "iter_0080000" / f"mp_rank_{rank:02}"
        folder.mkdir(parents=True)
        torch.save({"model": part, "iteration": 80000}, folder / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("80000")
    same(load_causal_lm(tmp_path, num_heads=HEADS), expected)
    shutil.rmtree(tmp_path / "iter_0080000" / "mp_rank_00")
    with pytest.raises(ValueError, match=r"has ranks \[1\]; missing: \[0\]"):
        load_causal_lm(tmp_path, num_heads=HEADS)


def test_eleven_ranks_are_taken_in_order_of_their_numbers(tmp_path):
    weights = reference.gpt2(vocabulary=22, width=22, layers=1, positions=8)
    inside = release(tmp_path, weights, count=11)
    for rank in range(11):
        (inside / f"mp_rank_{rank:02}_model_states.pt").rename(inside / f"mp_rank_{rank}_model_states.pt")
    lm = load_causal_lm(inside, num_heads=1)
    assert torch.equal(lm.kexue.embeddings.token.weight, weights["word_embeddings.weight"])


def test_state_dicts_of_gpt2_with_and_without_configuration(tmp_path, weights, expected):
    model = gpt2(weights)
    state = model.state_dict()
    torch.save(state, tmp_path / "gpt2.pt")
    save_file({k: v for k, v in state.items() if k != "lm_head.weight"}, tmp_path / "gpt2.safetensors")
    for source in (state, tmp_path / "gpt2.pt", tmp_path / "gpt2.safetensors", model.transformer.state_dict()):
        same(load_causal_lm(source, num_heads=HEADS), expected)
        same(load_causal_lm(source, "state_dict", num_heads=HEADS), expected)
        same(load_causal_lm(source, config=model.config), expected)
        with pytest.raises(ValueError, match="num_heads must be given"):
            load_causal_lm(source)
    same(load_causal_lm(expected.state_dict(), config=expected.config), expected)
    with pytest.raises(ValueError, match="wants config, a KexueConfig; got None"):
        load_causal_lm(expected.state_dict())


def test_heads_of_the_released_models_are_known():
    from kexue.generation.loading import _heads

    assert _heads(None, 30000, 2560, 32) == 32
    assert _heads(None, 30000, 768, 12) == 12
    assert _heads(8, 30000, 768, 12) == 8
    with pytest.raises(ValueError, match="12 layers of width 768 with 50257 tokens"):
        _heads(None, 50257, 768, 12)


def test_dtypes_are_kept_or_converted(tmp_path, weights, expected):
    half = {name: value.half() for name, value in weights.items()}
    inside = release(tmp_path / "a", half)
    gpt2(weights).half().save_pretrained(tmp_path / "b")
    from_megatron_gpt2([half], HEADS).save_pretrained(tmp_path / "c")
    for source in (inside, tmp_path / "b", tmp_path / "c"):
        lm = load_causal_lm(source, num_heads=HEADS)
        assert {p.dtype for p in lm.parameters()} == {torch.float16}
        lm = load_causal_lm(source, num_heads=HEADS, dtype=torch.float32)
        assert {p.dtype for p in lm.parameters()} == {torch.float32}
        assert torch.equal(lm.kexue.embeddings.token.weight, half["word_embeddings.weight"].float())


def test_the_model_does_not_write_into_what_it_came_from(tmp_path, weights):
    files = sorted(release(tmp_path, weights).iterdir())
    before = [file.read_bytes() for file in files]
    state = {name: value.clone() for name, value in weights.items()}
    hf = gpt2(weights).state_dict()
    kept = {name: value.clone() for name, value in hf.items()}
    for source in (files, [state], hf):
        lm = load_causal_lm(source, num_heads=HEADS)
        with torch.no_grad():
            for p in lm.parameters():
                p.zero_()
    assert [file.read_bytes() for file in files] == before
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    assert all(torch.equal(hf[name], kept[name]) for name in hf)


class Evil:
    """A pickle that runs a command when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("where", ["beside", "as a shard", "as a weight", "old format", "bare pickle", "in numpy"])
def test_pickles_that_run_code_are_refused_and_not_run(tmp_path, weights, where):
    mark, path = tmp_path / "ran", tmp_path / "mp_rank_00_model_states.pt"
    evil = Evil(mark)
    if where == "bare pickle":
        path.write_bytes(pickle.dumps({"module": evil}))
    elif where == "in numpy":
        torch.save({"module": weights, "np_rng_state": np.array([evil], dtype=object)}, path)
    else:
        value = {"beside": {"module": weights, "args": evil}, "as a shard": evil, "as a weight": weights | {"x": evil}}
        torch.save(value.get(where, {"args": evil}), path, _use_new_zipfile_serialization=where != "old format")
    for source in (path, [path], tmp_path):
        with pytest.raises(ValueError, match="is refused: it .* other than tensors"):
            load_causal_lm(source, num_heads=HEADS)
    bare = tmp_path / "folder"
    gpt2(weights).save_pretrained(bare)
    (bare / "model.safetensors").unlink()
    shutil.copy(path, bare / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is refused"):
        load_causal_lm(bare)
    assert not mark.exists()
    pickle.loads(pickle.dumps(evil))
    assert mark.exists()  # it would have run


def test_other_files_are_refused_with_the_reason(tmp_path, weights):
    good = tmp_path / "good.pt"
    torch.save(weights, good)
    contents = {
        "text.pt": b"hello", "empty.pt": b"", "cut.pt": good.read_bytes()[:2000], "cut.safetensors": b"\x10" * 40,
        "zip.pt": b"PK\x03\x04" + b"0" * 50,
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            load_causal_lm(tmp_path / name, num_heads=HEADS)
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)), tmp_path / "script.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": 1}, tmp_path / "numbers.pt")
    for name in ("script.pt", "module.pt", "list.pt"):
        with pytest.raises(ValueError, match=name):
            load_causal_lm(tmp_path / name, num_heads=HEADS)
    with pytest.raises(ValueError, match="neither those of GPT-2 nor of its Megatron shards nor of Kexue models: a"):
        load_causal_lm(tmp_path / "numbers.pt", num_heads=HEADS)


def test_folders_that_hold_something_else_are_refused(tmp_path, weights, expected):
    from transformers import BertConfig

    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_causal_lm(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="must hold a config.json, files mp_rank_XX, or one iteration"):
        load_causal_lm(empty)
    with pytest.raises(ValueError, match="wants a config.json"):
        load_causal_lm(empty, format="kexue")
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="among 'kexue', 'gpt2'; got 'bert'"):
        load_causal_lm(tmp_path / "bert")
    KexueForMaskedLM(KexueConfig(20, 16, 1, 2)).save_pretrained(tmp_path / "masked")
    with pytest.raises(ValueError, match="attn_mode='causal'; got 'bidirectional'"):
        load_causal_lm(tmp_path / "masked")
    expected.save_pretrained(tmp_path / "good")
    (tmp_path / "good" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights"):
        load_causal_lm(tmp_path / "good")
    for text, message in (("{", "is no JSON file"), ("[]", "must hold a JSON object"), ("\xff\x00", "among")):
        (tmp_path / "good" / "config.json").write_text(text if text[0] != "\xff" else "{}", encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load_causal_lm(tmp_path / "good")


def test_indices_that_point_elsewhere_are_refused(tmp_path, weights):
    secret = tmp_path / "secret.safetensors"
    save_file({"transformer.wte.weight": torch.ones(20, 16)}, secret)
    folder = tmp_path / "folder"
    gpt2(weights).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"transformer.wte.weight": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match=r"files beside it; got '../secret.safetensors'"):
        load_causal_lm(folder)
    index.write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(ValueError, match="under weight_map"):
        load_causal_lm(folder)
    shutil.copy(secret, folder / "part.safetensors")
    index.write_text(json.dumps({"weight_map": {"transformer.wpe.weight": "part.safetensors"}}))
    with pytest.raises(ValueError, match="lack transformer.wpe.weight"):
        load_causal_lm(folder)


def test_weights_that_do_not_fit_are_refused(tmp_path, weights):
    state = gpt2(weights).state_dict()
    lacking = {k: v for k, v in state.items() if k != "transformer.h.1.ln_2.bias"}
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.ln_2\.bias"):
        load_causal_lm(lacking, num_heads=HEADS)
    with pytest.raises(ValueError, match="unknown surprise"):
        load_causal_lm(state | {"surprise": torch.ones(1)}, num_heads=HEADS)
    with pytest.raises(ValueError, match="num_heads = 3"):
        load_causal_lm(state, num_heads=3)
    with pytest.raises(ValueError, match=r"1 \* 3 = 3; got 16"):
        load_causal_lm([weights], num_heads=3)
    files = sorted(release(tmp_path, weights).iterdir())
    with pytest.raises(ValueError, match="so many rows make one of 2 shards"):
        load_causal_lm(files[:1], num_heads=HEADS)
    for table in (torch.ones(3), [1]):
        with pytest.raises((ValueError, TypeError), match="wpe"):
            load_causal_lm(state | {"transformer.wpe.weight": table}, num_heads=HEADS)


def test_bad_arguments_are_refused(tmp_path, weights, expected):
    with pytest.raises(ValueError, match="format must be one of 'auto', 'kexue'"):
        load_causal_lm([weights], format="gguf")
    for bad in (5, None, b"path", iter([weights])):
        with pytest.raises(TypeError, match="expected a path, a list of shards or a state dict"):
            load_causal_lm(bad)
    with pytest.raises(TypeError, match="a shard must be a path or a dict of tensors; got int"):
        load_causal_lm([5], num_heads=HEADS)
    with pytest.raises(ValueError, match="at least one dict; got an empty list"):
        load_causal_lm([], num_heads=HEADS)
    with pytest.raises(TypeError, match="num_heads must be an integer"):
        load_causal_lm([weights], num_heads="4")
    with pytest.raises(TypeError, match="dtype must be a floating"):
        load_causal_lm([weights], num_heads=HEADS, dtype=torch.int64)
    with pytest.raises(ValueError, match="wants a folder with a config.json; got list"):
        load_causal_lm([weights], format="kexue", num_heads=HEADS)
    with pytest.raises(ValueError, match="wants one dict of tensors; got a list of 2"):
        load_causal_lm([weights, weights], format="state_dict", num_heads=HEADS)
    with pytest.raises(TypeError, match="must map names to tensors"):
        load_causal_lm(expected.state_dict() | {"x": 5}, config=expected.config)
