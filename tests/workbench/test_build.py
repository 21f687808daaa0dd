"""Builds that are killed, interrupted, repeated, refused, or run out of disk."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from safetensors import SafetensorError

from kexue.workbench import Workspace, WorkspaceError
from kexue.workbench import build as building

pytestmark = pytest.mark.slow

PROGRAM = textwrap.dedent(
    """
    import sys
    sys.path[:0] = {paths!r}
    from conftest import make_documents
    from kexue.workbench import Workspace
    say = lambda line: print(line, flush=True)
    Workspace.build(make_documents(), {out!r}, force={force!r}, epochs={epochs!r}, dim=32, log=say)
    """
)


def start(out, force=False, epochs=60):
    here = os.path.dirname(__file__)
    code = PROGRAM.format(paths=[here], out=str(out), force=force, epochs=epochs)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def vectors(space):
    return (space.folder / "ranker" / "vectors.npy").read_bytes()


def figures(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["figures"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, documents):
    out = tmp_path_factory.mktemp("reference") / "space"
    Workspace.build(documents, out, epochs=60, dim=32)
    return figures(out)


def test_equal_corpus_and_seed_give_equal_figures_and_bits(tmp_path, documents):
    first = Workspace.build(documents, tmp_path / "a", epochs=3, dim=16)
    second = Workspace.build(documents, tmp_path / "b", epochs=3, dim=16)
    drop = {"report"}  # its size holds timings
    assert {k: v for k, v in figures(first.folder).items() if k not in drop} == {
        k: v for k, v in figures(second.folder).items() if k not in drop
    }
    assert vectors(first) == vectors(second)
    other = Workspace.build(documents, tmp_path / "c", epochs=3, dim=16, seed=1)
    assert vectors(first) != vectors(other)


def test_builds_killed_at_random_moments_end_like_an_undisturbed_one(tmp_path, reference):
    out = tmp_path / "space"
    rng = random.Random(0)
    kills = 0
    for _ in range(6):
        process = start(out)
        seen = 0
        target = rng.randint(0, 6)
        while seen < target and process.stdout.readline():
            seen += 1
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += process.returncode == -signal.SIGKILL
        if out.exists():
            break
        process.stdout.close()
        process.stderr.close()
    assert kills >= 1
    process = start(out)
    _, errors = process.communicate(timeout=300)
    if process.returncode:  # the last kill came after the workspace was complete
        assert "exists" in errors
    found = figures(out)
    assert {k: v for k, v in found.items() if k != "report"} == {k: v for k, v in reference.items() if k != "report"}
    assert [hit.id for hit in Workspace.open(out).search("blur an image", k=1)] == ["tools.image.blur"]
    assert sorted(p for p in os.listdir(tmp_path) if p.endswith((".partial", ".old"))) == []


def test_finished_steps_are_not_repeated(tmp_path, documents, monkeypatch):
    out = tmp_path / "space"
    names = [name for name, _ in building.STEPS]
    broken = [(name, step) for name, step in building.STEPS]
    place = names.index("encoder")

    def fail(context):
        raise KeyboardInterrupt

    broken[place] = ("encoder", fail)
    monkeypatch.setattr(building, "STEPS", tuple(broken))
    with pytest.raises(KeyboardInterrupt):
        Workspace.build(documents, out, epochs=2, dim=16)
    monkeypatch.undo()
    assert not out.exists()
    lines = []
    Workspace.build(documents, out, epochs=2, dim=16, log=lines.append)
    done = [line.split()[0] for line in lines if "done before" in line]
    # The documents came from a program, so they were read again and indexed again; counting and vectors were kept.
    assert done == ["count", "vectors"]


def interrupt_before(step, documents, out, monkeypatch):
    def fail(context):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(building, "STEPS", tuple((n, fail if n == step else s) for n, s in building.STEPS))
        with pytest.raises(KeyboardInterrupt):
            Workspace.build(documents, out, epochs=2, dim=16)


def test_an_unfinished_build_of_other_documents_is_started_over(tmp_path, documents, monkeypatch):
    out = tmp_path / "space"
    interrupt_before("index", documents, out, monkeypatch)  # leaves a checkpoint of these documents
    lines = []
    space = Workspace.build(documents[:30], out, epochs=2, dim=16, log=lines.append)
    assert any("another corpus" in line for line in lines)
    assert not any("done before" in line for line in lines)
    assert len(space) == 30


def test_another_version_does_not_continue_an_unfinished_build(tmp_path, documents, monkeypatch):
    out = tmp_path / "space"
    interrupt_before("vectors", documents, out, monkeypatch)
    monkeypatch.setattr(building, "__version__", "99.0")
    lines = []
    Workspace.build(documents, out, epochs=1, dim=16, log=lines.append)
    assert not any("done before" in line for line in lines)


def test_what_a_killed_write_left_does_not_stay_in_the_workspace(tmp_path, documents, monkeypatch):
    out = tmp_path / "space"
    interrupt_before("index", documents, out, monkeypatch)
    for left in (".counts.safetensors.a1b2.tmp", "tokens/.df.npy.a1b2.tmp"):
        (tmp_path / ".space.partial" / left).write_bytes(b"half")
    Workspace.build(documents, out, epochs=2, dim=16)
    assert not list(out.rglob("*.tmp"))


def test_a_link_keeps_pointing_to_the_workspace_that_is_replaced(tmp_path, documents):
    real, link = tmp_path / "disk" / "space", tmp_path / "link"
    Workspace.build(documents, real, epochs=1, dim=16)
    link.symlink_to(real)
    for count in (30, 20):
        Workspace.build(documents[:count], link, epochs=1, dim=16, force=True)
        assert link.is_symlink()
        assert len(Workspace.open(real)) == len(Workspace.open(link)) == count


@pytest.mark.parametrize("folder", ["/", "/proc"])
def test_a_folder_that_cannot_be_replaced_is_refused_at_once(documents, folder):
    if not os.path.ismount(folder):
        pytest.skip(f"{folder} is no mount point here")
    with pytest.raises(WorkspaceError, match="give a folder inside it"):
        Workspace.build(documents, folder)


def test_a_workspace_in_the_folder_of_its_texts_is_not_read_as_text(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"Note {number} about apples, trains and the number {number}.")
    (tmp_path / "bad.jsonl").write_text("[]\n" * 150)
    options = {"on_error": "skip"}
    for force in (False, True):
        space = Workspace.build(tmp_path, tmp_path / "space", epochs=1, dim=8, force=force, read_options=options)
        assert len(space) == 6
    assert space.info()["figures"]["read"]["skipped"] > 150  # also those of which only the number is kept


def test_a_killed_forced_build_leaves_the_previous_workspace_alone(tmp_path, documents):
    out = tmp_path / "space"
    before = Workspace.build(documents, out, epochs=2, dim=16)
    kept = vectors(before)
    process = start(out, force=True)
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert vectors(before) == kept
    assert Workspace.open(out).search("blur", k=1)[0].id == before.search("blur", k=1)[0].id
    again = Workspace.build(documents, out, epochs=2, dim=16, force=True)
    assert len(again) == 40


def test_an_existing_folder_is_refused_without_force_and_protected_with_it(tmp_path, documents):
    out = tmp_path / "space"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(WorkspaceError, match="exists"):
        Workspace.build(documents, out)
    with pytest.raises(WorkspaceError, match="not a kexue workspace"):
        Workspace.build(documents, out, force=True)
    assert (out / "thesis.txt").read_text() == "mine"


def test_two_builds_into_one_folder_are_refused_by_a_lock(tmp_path, documents):
    out = tmp_path / "space"
    process = start(out)
    process.stdout.readline()
    with pytest.raises(WorkspaceError, match="another run is writing"):
        Workspace.build(documents, out)
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError("84240 requested and 21504 written"),  # numpy
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_ends_with_a_clear_error_and_keeps_what_was_done(tmp_path, documents, monkeypatch, error):
    out = tmp_path / "space"
    steps = dict(building.STEPS)

    def full(context):
        raise error

    monkeypatch.setattr(building, "STEPS", tuple((n, full if n == "index" else s) for n, s in steps.items()))
    with pytest.raises(WorkspaceError, match="disk is full.*run the same command again"):
        Workspace.build(documents, out, epochs=2, dim=16)
    monkeypatch.undo()
    assert not out.exists()
    lines = []
    Workspace.build(documents, out, epochs=2, dim=16, log=lines.append)
    assert any(line.startswith("encoder") and "done before" in line for line in lines)


def test_a_really_full_disk_is_survived(tmp_path, documents):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.name != "posix" or os.system(f"mount -t tmpfs -o size=256k tmpfs {disk} 2>/dev/null") != 0:
        pytest.skip("a small tmpfs cannot be mounted here")
    try:
        with pytest.raises(WorkspaceError, match="disk is full"):
            Workspace.build(documents * 1, disk / "space", epochs=2, dim=64)
        assert not (disk / "space").exists()
        os.system(f"mount -o remount,size=64m {disk}")
        assert len(Workspace.build(documents, disk / "space", epochs=2, dim=64)) == 40
    finally:
        os.system(f"umount -l {disk}")


@pytest.mark.parametrize(
    ("corpus", "error", "message"),
    [([], ValueError, "no documents"), (3, TypeError, "paths"), (["/absent/folder"], (OSError, ValueError), "absent")],
)
def test_a_corpus_without_documents_is_an_error_that_leaves_no_workspace(tmp_path, corpus, error, message):
    with pytest.raises(error, match=message):
        Workspace.build(corpus, tmp_path / "space")
    assert not (tmp_path / "space").exists()


@pytest.mark.parametrize(("name", "value"), [("epochs", 0), ("dim", 1), ("seed", -1)])
def test_settings_are_checked_at_the_door(tmp_path, documents, name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        Workspace.build(documents, tmp_path / "space", **{name: value})


def test_one_document_is_a_corpus(tmp_path, documents):
    space = Workspace.build(documents[:1], tmp_path / "space", epochs=1)
    assert space.search("matrix", k=3)[0].id == documents[0].id
    assert space.similar(documents[0].id) == []
