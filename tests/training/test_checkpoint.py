import errno
import io
import json
import os
import shutil
import subprocess
import zlib

import pytest
import torch
from torch import nn

from kexue.training import DamagedCheckpointError, checkpoint, load_checkpoint, newest_checkpoint, save_checkpoint
from kexue.training.order import set_random_states
from training.runs import draw_globals, kill_before_call, seed_globals

FILES = ("model.safetensors", "optimizer.pt", "rng.pt", "checkpoint.json")


def trained(value=1.0):
    """A model whose weights are all `value`, with the optimizer state of one step."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def save(folder, step, value=None, **options):
    model, optimizer = trained(float(step) if value is None else value)
    return save_checkpoint(folder, model, [optimizer], step=step, loss=0.25, config={"seed": 3}, **options)


def test_round_trip_restores_model_and_optimizer(tmp_path):
    model, optimizer = trained(2.0)
    path = save_checkpoint(tmp_path, model, [optimizer], step=7, loss=0.25, config={"seed": 3})
    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.loss, loaded.config) == (7, 0.25, {"seed": 3})
    assert (tmp_path / "latest").read_text() == "step-7\n"
    other, other_optimizer = trained(5.0)
    loaded.restore(other, [other_optimizer])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizer.state[a]["exp_avg"], other_optimizer.state[b]["exp_avg"])


def test_the_model_file_is_plain_safetensors(tmp_path):
    from safetensors import safe_open

    with safe_open(save(tmp_path, 1) / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["0.bias", "0.weight", "1.bias", "1.weight"]
        assert file.metadata() == {"format": "pt"}


def test_tied_weights_views_and_odd_tensors_survive(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.output = nn.Linear(4, 5, bias=False)
            self.output.weight = self.embedding.weight
            table = torch.arange(12.0).reshape(3, 4)
            self.register_buffer("head", table[:2])
            self.register_buffer("tail", table[1:])
            self.register_buffer("turned", torch.arange(6.0).reshape(2, 3).T)
            self.register_buffer("nothing", torch.zeros(0))
            self.register_buffer("low", torch.tensor([1.5, 2.5], dtype=torch.bfloat16))
            self.register_buffer("flag", torch.tensor(True))

    model = Odd()
    path = save_checkpoint(tmp_path, model, [], step=1, loss=0.0, config={})
    assert json.loads((path / "checkpoint.json").read_text())["tied"] == {"output.weight": "embedding.weight"}
    other = Odd()
    load_checkpoint(path).restore(other, [])
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert other.output.weight is other.embedding.weight


def test_only_the_newest_stay(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-10", "step-3"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "altered"])
def test_a_damaged_file_falls_back_to_the_checkpoint_before(tmp_path, name, damage):
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "altered":
        # Inside the tensors' data for the two big files; for JSON a brace, since it carries no checksum itself.
        place = 0 if name == "checkpoint.json" else len(content) // 2
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    else:
        file.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
    with pytest.raises(DamagedCheckpointError, match=name):
        load_checkpoint(tmp_path / "step-2")
    with pytest.warns(UserWarning, match=r"step-2: .*falling back to the one before it"):
        found = newest_checkpoint(tmp_path)
    assert found.step == 1
    assert found.model["0.bias"].tolist() == [1.0] * 4


def test_no_usable_checkpoint_gives_none(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    (save(tmp_path, 2) / "optimizer.pt").unlink()
    with pytest.warns(UserWarning, match=r"optimizer\.pt is missing"):
        assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("version", [2, "1", None])
def test_an_unknown_format_version_is_an_error_and_not_skipped(tmp_path, version):
    save(tmp_path, 1)
    meta = save(tmp_path, 2) / "checkpoint.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"format": version}))
    with pytest.raises(ValueError, match=f"format {version!r}; this version of kexue reads format 1"):
        newest_checkpoint(tmp_path)


def test_pickled_code_is_never_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    path = save(tmp_path, 1)
    buffer = io.BytesIO()
    torch.save([Payload()], buffer)
    (path / "optimizer.pt").write_bytes(buffer.getvalue())
    meta = json.loads((path / "checkpoint.json").read_text())
    meta["files"]["optimizer.pt"] = {"bytes": len(buffer.getvalue()), "crc32": zlib.crc32(buffer.getvalue())}
    (path / "checkpoint.json").write_text(json.dumps(meta))
    with pytest.raises(DamagedCheckpointError):
        load_checkpoint(path)
    assert not (tmp_path / "owned").exists()


def test_another_model_or_number_of_optimizers_is_refused(tmp_path):
    loaded = load_checkpoint(save(tmp_path, 1))
    model, optimizer = trained()
    with pytest.raises(ValueError, match="holds 1 optimizers; got 0"):
        loaded.restore(model, [])
    with pytest.raises(ValueError, match="does not fit the model"):
        loaded.restore(nn.Linear(3, 4), [optimizer])


def test_state_that_is_no_tensor_is_refused_and_leaves_nothing(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(TypeError, match="'_extra_state' is dict"):
        save_checkpoint(tmp_path, Extra(2, 1), [], step=1, loss=0.0, config={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_is_a_clear_error_and_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, name):
    save(tmp_path, 1)
    write = checkpoint._write

    def full(path, content):
        if path.name == name:
            path.write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(OSError, match=r"step 2 \(No space left on device\); the last .* is .*step-1") as caught:
        save(tmp_path, 2)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-1"]
    assert newest_checkpoint(tmp_path).step == 1


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 64 KiB; skipped where it cannot be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(tiny_disk):
    save(tiny_disk, 1)
    (tiny_disk / "ballast").write_bytes(b"x" * 4096 * 8)

    def fill():
        for step in range(2, 20):
            save(tiny_disk, step, keep=20)

    with pytest.raises(OSError, match="No space left on device"):
        fill()
    names = sorted(p.name for p in tiny_disk.iterdir())
    assert not [name for name in names if "tmp" in name]
    newest = newest_checkpoint(tiny_disk)
    assert newest.step == max(int(name[5:]) for name in names if name.startswith("step-"))
    (tiny_disk / "ballast").unlink()
    assert load_checkpoint(save(tiny_disk, newest.step + 1)).step == newest.step + 1


def _die_at(count, folder):
    """In a child: save step 2, killed by SIGKILL just before system call number `count`. True if it was killed."""
    pid = os.fork()
    if pid == 0:
        kill_before_call(count)
        try:
            save(folder, 2, keep=1)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_of_saving_leaves_a_whole_checkpoint(tmp_path):
    steps = []
    for count in range(1, 100):
        folder = tmp_path / str(count)
        folder.mkdir()
        save(folder, 1)
        killed = _die_at(count, folder)
        found = newest_checkpoint(folder)
        assert found.model["0.bias"].tolist() == [float(found.step)] * 4
        steps.append(found.step)
        checkpoint.remove_unfinished(folder)
        assert not [p for p in folder.iterdir() if p.name.endswith(".tmp")]
        assert load_checkpoint(save(folder, 3)).step == 3
        if not killed:
            break
    assert steps == sorted(steps)
    assert steps[0] == 1
    assert steps.count(1) >= 5
    assert steps[-1] == 2


def test_the_states_of_the_global_generators_are_stored_and_read_without_pickled_code(tmp_path):
    seed_globals(5)
    draw_globals()
    path = save(tmp_path, 1)
    seed_globals(9)  # `save` draws the weights of its model
    set_random_states(load_checkpoint(path).rng)
    expected = draw_globals()
    set_random_states(load_checkpoint(path).rng)
    assert draw_globals() == expected
    assert load_checkpoint(path).rng["cuda"] == []
    states = torch.load(path / "rng.pt", weights_only=True)
    assert sorted(states) == ["cuda", "numpy", "python", "torch"]


def test_a_checkpoint_without_states_of_generators_is_read(tmp_path):
    path = save(tmp_path, 1)
    (path / "rng.pt").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"rng\.pt is missing"):
        load_checkpoint(path)
    meta = json.loads((path / "checkpoint.json").read_text())
    del meta["files"]["rng.pt"]  # as an older version wrote it
    (path / "checkpoint.json").write_text(json.dumps(meta))
    assert load_checkpoint(path).rng is None
