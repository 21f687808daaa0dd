import os

import pytest

from kexue import _files
from kexue._files import atomic_path, recover_directory, replace_directory, write_json


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
