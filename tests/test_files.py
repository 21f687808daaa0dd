import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from kexue import _files
from kexue._files import atomic_path, map_tensors, recover_directory, replace_directory, write_json


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": "文"})

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text(encoding="utf-8") == '{\n  "a": "文"\n}\n'
    assert os.listdir(tmp_path) == ["value.json"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(_files, "_exchange", lambda a, b: False)
    new, target = tmp_path / "new", tmp_path / "target"
    for folder, text in ((new, "new"), (target, "old")):
        folder.mkdir()
        (folder / "file").write_text(text)
    replace_directory(new, target)
    assert (target / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["target"]


def test_a_replacement_that_was_killed_half_way_is_undone(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "_exchange", lambda a, b: False)
    new, target = tmp_path / "new", tmp_path / "target"
    for folder, text in ((new, "new"), (target, "old")):
        folder.mkdir()
        (folder / "file").write_text(text)
    real, calls = os.replace, []

    def killed_at_second(source, destination):
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, destination)

    monkeypatch.setattr(_files.os, "replace", killed_at_second)
    with pytest.raises(KeyboardInterrupt):
        replace_directory(new, target)
    monkeypatch.undo()
    assert not target.exists()
    recover_directory(target)
    assert (target / "file").read_text() == "old"
    assert (new / "file").read_text() == "new"


@pytest.mark.parametrize("mmap", [True, False])
def test_tensors_come_back_and_damage_is_a_value_error(tmp_path, mmap):
    arrays = {"a": np.arange(6, dtype=np.int64).reshape(2, 3), "b": np.ones(0, np.float32), "c": np.array([True])}
    path = tmp_path / "x.safetensors"
    save_file(arrays, path)
    found = map_tensors(path, mmap)
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], data[:-8], b"\xff" * len(data), b""):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="damaged"):
            map_tensors(path, mmap)
