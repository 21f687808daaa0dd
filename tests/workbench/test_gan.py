from __future__ import annotations

import json
import os
import signal
import sys

import numpy as np
import pytest
from filelock import FileLock, Timeout
from PIL import Image
from typer.testing import CliRunner

from kexue.adversarial import image_grid
from kexue.cli import app, main
from kexue.workbench import WorkspaceError
from kexue.workbench import gan as module
from kexue.workbench.gan import GanModel, GanSettings, train_gan
from kexue.workbench.pictures import Pictures, read_pictures

RNG = np.random.default_rng(0)
PICTURES = Pictures(RNG.integers(0, 256, (30, 8, 8), dtype=np.uint8), "noise")
FEW = GanSettings(steps=4, batch_size=4)


def kexue(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("gan") / "model"
    result = kexue("gan", "train", "digits", "--out", out, "--steps", 12, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), out


def test_digits_are_learned_with_figures_and_grids(trained):
    info, out = trained
    assert info["shape"] == [8, 8]
    assert info["trained with"] == {"z_dim": 16, "critic_steps": 2, "lr": 5e-4, "betas": [0.5, 0.999]}
    figures = info["figures"]
    assert figures["pictures"] == 1797
    assert figures["trained on"] == 1618
    assert figures["fid"] > figures["fid of real halves"] > 0
    assert 0 < figures["classes"] <= 10
    assert set(info["files"]) == {
        "samples.png", "reconstructions.png", "interpolations.png", "neighbours.png", "losses.png"
    }  # fmt: skip
    with Image.open(out / "samples.png") as grid:
        assert grid.size == (8 * (48 + 1) - 1,) * 2
    with Image.open(out / "interpolations.png") as grid:
        assert grid.size[0] == 10 * (48 + 1) - 1  # real, eight on the way, real
    assert json.loads((out / "gan.json").read_text()) == info
    assert not (out.parent / ".model.partial").exists()


def test_samples_come_as_a_grid_or_an_array(trained, tmp_path):
    out = trained[1]
    assert kexue("gan", "sample", out, "--out", tmp_path / "new.png", "-n", 9).exit_code == 0
    assert kexue("gan", "sample", out, "--out", tmp_path / "deep" / "new.png", "-n", 1).exit_code == 0
    with Image.open(tmp_path / "new.png") as grid:
        assert grid.size == (3 * 49 - 1,) * 2
    result = kexue("gan", "sample", out, "--out", tmp_path / "new.npy", "-n", 5, "--seed", 1, "--json")
    assert json.loads(result.stdout)["pictures"] == 5
    found = np.load(tmp_path / "new.npy")
    assert np.array_equal(found, GanModel(out).sample(5, seed=1))
    assert np.abs(found).max() <= 1
    assert kexue("gan", "sample", out, "--out", tmp_path / "new.jpg").exit_code == 2
    assert kexue("gan", "sample", tmp_path, "--out", tmp_path / "x.png").exception is not None


@pytest.mark.parametrize("method", ["gan-qp", "gn", "wgan-clip"])
def test_plain_methods(method, tmp_path):
    train_gan(PICTURES, tmp_path / "model", GanSettings(method, steps=3, batch_size=4))
    model = GanModel(tmp_path / "model")
    assert model.estimator is None
    assert model.sample(3).shape == (3, 8, 8)
    assert set(model.info["files"]) == {"samples.png", "losses.png"}


@pytest.mark.parametrize("method", ["bigan-qp", "gan-qp"])
def test_an_interrupted_run_continues_to_the_same_pictures(method, tmp_path, monkeypatch):
    settings = GanSettings(method, steps=9, batch_size=4)
    train_gan(PICTURES, tmp_path / "whole", settings)
    kind = module.BiGANQP if method == "bigan-qp" else module.AdversarialTrainer
    fit, seen = kind.fit, []

    def pressed(self, *arguments, **options):
        def on_step(record):
            seen.append(record["step"])
            if len(seen) == 5:
                os.kill(os.getpid(), signal.SIGINT)

        return fit(self, *arguments, **options, on_step=on_step)

    monkeypatch.setattr(kind, "fit", pressed)
    with pytest.raises(KeyboardInterrupt):
        train_gan(PICTURES, tmp_path / "model", settings)
    assert not (tmp_path / "model").exists()
    train_gan(PICTURES, tmp_path / "model", settings)
    assert seen == list(range(1, 10))
    assert np.array_equal(GanModel(tmp_path / "model").sample(4), GanModel(tmp_path / "whole").sample(4))


def test_what_stands_there_is_kept(tmp_path):
    out = tmp_path / "model"
    train_gan(PICTURES, out, FEW)
    before = (out / "gan.json").read_bytes()
    with pytest.raises(WorkspaceError, match="--force"):
        train_gan(PICTURES, out, FEW)
    with pytest.raises(ValueError, match="at least two pictures"):
        train_gan(Pictures(PICTURES.data[:1], "one"), out, FEW, force=True)
    assert (out / "gan.json").read_bytes() == before
    train_gan(PICTURES, out, GanSettings(steps=3, batch_size=4), force=True)
    assert GanModel(out).info["settings"]["steps"] == 3
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(WorkspaceError, match="is no trained generator"):
        train_gan(PICTURES, tmp_path / "other", FEW, force=True)
    (out / "gan.json").write_text("{}")
    with pytest.raises(WorkspaceError, match="cannot be read"):
        GanModel(out)


def images(folder, *kinds):
    folder.mkdir(exist_ok=True)
    for number, (mode, size) in enumerate(kinds):
        shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
        Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def test_a_folder_of_images(tmp_path):
    gray = read_pictures(images(tmp_path / "gray", ("L", (10, 10)), ("L", (10, 10))))
    assert gray.data.shape == (2, 10, 10)
    with Image.open(tmp_path / "gray" / "0.png") as first:
        assert np.array_equal(gray.data[0], np.asarray(first))
    mixed = read_pictures(images(tmp_path / "mixed", ("L", (10, 20)), ("RGB", (40, 30)), ("RGBA", (9, 9))))
    assert mixed.data.shape == (3, 3, 32, 32)
    assert mixed.data.dtype == np.uint8
    assert read_pictures(tmp_path / "mixed", 16).shape == (3, 16, 16)
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(tmp_path / "mixed" / "clear.png")
    assert (read_pictures(tmp_path / "mixed", 8).data[-1] == 255).all()  # transparent is white
    train_gan(tmp_path / "mixed", tmp_path / "model", GanSettings("gan-qp", steps=2, batch_size=2, size=8))
    assert GanModel(tmp_path / "model").sample(2).shape == (2, 3, 8, 8)


def test_deep_gray_and_turned_images(tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    expected = (ramp / 257).round().astype(np.uint8)
    for name, x in (("16.png", ramp.astype(np.uint16)), ("32.tif", ramp.astype(np.int32)), ("f.tif", ramp / 65535)):
        (tmp_path / name[:2]).mkdir()
        Image.fromarray(x.astype(np.float32) if x.dtype == float else x).save(tmp_path / name[:2] / name)
        np.testing.assert_allclose(read_pictures(tmp_path / name[:2]).data[0].astype(int), expected, atol=1)
    Image.fromarray((ramp * 9).astype(np.float32)).save(tmp_path / "16" / "far.tif")
    with pytest.raises(ValueError, match=r"far.tif .* within 0 to 1; got 0 to 589815"):
        read_pictures(tmp_path / "16")
    (tmp_path / "turned").mkdir()
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by a quarter
    Image.fromarray(expected).save(tmp_path / "turned" / "a.png", exif=exif)
    assert np.array_equal(read_pictures(tmp_path / "turned").data[0], np.rot90(expected, -1))


def test_bad_images_are_named_or_left_out(tmp_path):
    folder = images(tmp_path / "pictures", ("L", (8, 8)), ("L", (8, 8)))
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "words.jpg").write_text("no image")
    with pytest.raises(ValueError, match="words.jpg cannot be read as an image"):
        read_pictures(folder)
    lines = []
    assert len(read_pictures(folder, skip_bad=True, log=lines.append).data) == 2
    assert len(lines) == 2
    result = kexue("gan", "train", folder, "--out", tmp_path / "model")
    assert result.exit_code == 1
    assert "--skip-bad" in str(result.exception)


def test_arrays(tmp_path):
    path = tmp_path / "x.npy"
    for given, shape in [
        (RNG.integers(0, 256, (4, 6, 6), dtype=np.uint8), (6, 6)),
        (RNG.random((4, 3, 6, 6)), (3, 6, 6)),
        (RNG.integers(0, 17, (4, 6, 6, 3)), (3, 6, 6)),
        (RNG.normal(size=(4, 5)), (5,)),
        (RNG.random((4, 5)) > 0.5, (5,)),
    ]:
        np.save(path, given)
        found = read_pictures(path)
        assert found.shape == shape
        if found.data.dtype != np.uint8:
            assert (found.data.min(), found.data.max()) == pytest.approx((-1, 1), abs=1e-6)
    inside = RNG.uniform(-0.5, 0.5, (4, 5)).astype(np.float32)
    np.save(path, inside)
    assert np.array_equal(read_pictures(path).data, inside)
    for bad, message in [
        (np.array([[1.0, np.nan], [0, 1]]), "finite"),
        (np.ones((3, 4)), "all its numbers are 1"),
        (np.zeros((3, 4, 5, 6)), "1 or 3 planes"),
        (np.zeros(3), r"\(3,\)"),
        (np.zeros((0, 4)), r"\(0, 4\)"),
        (np.array([["a", "b"]]), "real numbers"),
        (np.array([[1j, 2]]), "real numbers"),
    ]:
        np.save(path, bad)
        with pytest.raises(ValueError, match=message):
            read_pictures(path)
    path.write_bytes(b"no array")
    with pytest.raises(ValueError, match="no array that can be read"):
        read_pictures(path)
    np.savez(tmp_path / "several.npz", a=inside)
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    with pytest.raises(ValueError, match="archive of several"):
        read_pictures(tmp_path / "several.npy")
    np.save(path, np.array([[object()]]), allow_pickle=True)
    with pytest.raises(ValueError, match="no array that can be read"):
        read_pictures(path)


def test_vectors_get_no_grids(tmp_path):
    train_gan(Pictures(RNG.uniform(-1, 1, (25, 4)).astype(np.float32), "vectors"), tmp_path / "model", FEW)
    model = GanModel(tmp_path / "model")
    assert model.info["files"] == ["losses.png"]
    assert model.write(tmp_path / "x.npy", 3).is_file()
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        model.write(tmp_path / "x.png", 3)
    assert not (tmp_path / "x.png").exists()


def test_wrong_use(tmp_path):
    for arguments, code in [
        (("digits", "--method", "gan"), 2),
        (("digits", "--steps", 0), 2),
        (("digits", "--lr", -1), 2),
        (("digits", "--size", 9), 1),
        ((tmp_path / "nothing",), 1),
        ((tmp_path,), 1),
    ]:
        assert kexue("gan", "train", *arguments, "--out", tmp_path / "model").exit_code == code
    (tmp_path / "file.txt").touch()
    with pytest.raises(ValueError, match=r"no folder and no .npy"):
        read_pictures(tmp_path / "file.txt")


def test_a_training_that_diverges_says_so_in_a_line(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "x.npy", PICTURES.data)
    monkeypatch.setattr(sys, "argv", [
        "kexue", "gan", "train", str(tmp_path / "x.npy"), "--out", str(tmp_path / "model"), "--lr", "1e20",
    ])  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: the term ")
    assert "Lower the learning rate" in last
    assert not (tmp_path / "model").exists()


def test_a_folder_that_nobody_can_write_is_told_from_one_in_use(tmp_path, monkeypatch):
    def held(lock):
        raise Timeout(lock.lock_file)

    monkeypatch.setattr(FileLock, "acquire", held)
    with pytest.raises(WorkspaceError, match="cannot be written to"):
        train_gan(PICTURES, tmp_path / "model", FEW)
    (tmp_path / ".model.lock").touch()
    with pytest.raises(WorkspaceError, match="another run is writing"):
        train_gan(PICTURES, tmp_path / "model", FEW)


def test_grids():
    grid = image_grid(np.stack([np.full((2, 3), v) for v in (-1.0, 0.0, 5.0)]), columns=2, scale=1, gap=1)
    assert grid.shape == (5, 7)
    assert (grid[:2, :3] == 0).all()
    assert (grid[:2, 4:] == 128).all()
    assert (grid[3:, :3] == 255).all()
    assert image_grid(np.zeros((1, 3, 4, 4)), scale=2).shape == (8, 8, 3)
    for bad in (np.zeros((2, 2)), np.zeros((0, 2, 2)), np.zeros((1, 2, 2, 2)), np.full((1, 2, 2), np.nan)):
        with pytest.raises(ValueError, match="images must be"):
            image_grid(bad)
