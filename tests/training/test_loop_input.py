import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kexue.training import fit
from training.runs import STEPS, Dense, train


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1; got 0"),
        ({"steps": 2.5}, TypeError, "steps must be an integer; got 2.5"),
        ({"save_every": 0}, ValueError, "save_every must be at least 1"),
        ({"accumulate": 0}, ValueError, "accumulate must be at least 1"),
        ({"keep": 0}, ValueError, "keep must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"lr": 0.0}, ValueError, "lr must be greater than 0"),
        ({"clip": -1.0}, ValueError, "clip must be greater than 0"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be at least 0"),
        ({"schedule": "exponential"}, ValueError, "schedule must be one of .* got 'exponential'"),
        ({"warmup": 25}, ValueError, "warmup must be at most steps = 24; got 25"),
        ({"precision": "fp16"}, ValueError, "precision must be one of 'fp32', 'bf16', 'auto'; got 'fp16'"),
        ({"resume": "no"}, TypeError, "resume must be a bool; got 'no'"),
        ({"show_progress": 1}, TypeError, "show_progress must be a bool; got 1"),
        ({"on_step": 3}, TypeError, "on_step must be callable or None; got int"),
        ({"fingerprint": 3}, TypeError, "fingerprint must be a str or None; got int"),
        ({"optimizer": 3, "lr": None}, TypeError, "optimizer must be a torch Optimizer"),
        ({"optimizer": [], "lr": None}, TypeError, "optimizer must be a torch Optimizer"),
        ({"optimizer": lambda p: torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0), "lr": None},
         ValueError, r"parameter of shape \(2,\) that is not in the model"),
        ({"optimizer": lambda p: [torch.optim.SGD(p, lr=1.0)] * 2, "lr": None}, ValueError, "two optimizers"),
    ],
)  # fmt: skip
def test_bad_settings_are_named_before_anything_is_written(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        train(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_unused_rate_is_reported(tmp_path):
    with pytest.warns(UserWarning, match=r"lr=0\.02 is not used.*0\.1"):
        _, result = train(tmp_path, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert result.step == STEPS


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "at least one batch"),
        (iter([{}]), TypeError, "cannot be resumed.*list_iterator"),
        ({"ids": torch.zeros(3)}, TypeError, "sequence of dicts .* got dict"),
        ([torch.zeros(3)], TypeError, "batch 0 must be a dict of the model's arguments; got Tensor"),
        (lambda step: None, TypeError, "batch 0 must be a dict .* got NoneType"),
    ],
)
def test_bad_batches_are_named(tmp_path, batches, error, message):
    with pytest.raises(error, match=message):
        fit(Dense(), batches, steps=2, out=tmp_path)


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (lambda w: None, TypeError, "must return a scalar loss.* got a NoneType"),
        (lambda w: {"logits": w}, TypeError, "got a dict with logits"),
        (lambda w: {}, TypeError, "got a dict with no key"),
        (lambda w: (), TypeError, "got a tuple"),
        (lambda w: SimpleNamespace(loss=None), TypeError, "got a SimpleNamespace"),
        (lambda w: w, ValueError, r"must be a scalar; got a tensor of shape \(3,\)"),
        (lambda w: torch.tensor(1.0), ValueError, "no gradient"),
        (lambda w: {"loss": w.sum(), "num_items": -2}, ValueError, r"num_items must be .* got -2\.0"),
        (lambda w: {"loss": w.sum(), "num_items": torch.tensor(math.nan)}, ValueError, "num_items must be .* got nan"),
    ],
)
def test_a_model_without_a_loss_is_named(tmp_path, output, error, message):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self):
            return output(self.weight)

    with pytest.raises(error, match=message):
        fit(Model(), [{}], steps=2, out=tmp_path)


def test_models_that_cannot_be_trained_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got function"):
        fit(lambda x: x, [{}], steps=1, out=tmp_path)
    with pytest.raises(ValueError, match="no parameter that requires a gradient; got Dropout"):
        fit(nn.Dropout(), [{}], steps=1, out=tmp_path)
