import errno
import json
import math
import os
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from kexue.training import FitResult, TrainingInterrupted, default_optimizers, fit, newest_checkpoint
from training.runs import STEPS, Dense, Sparse, draw_globals, noisy_batches, seed_globals, train


class Crash(Exception):
    pass


def crash_at(step):
    def on_step(record):
        if record["step"] == step:
            raise Crash

    return on_step


def signal_at(step, number):
    def on_step(record):
        if record["step"] == step:
            signal.raise_signal(number)

    return on_step


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_equal_weights(a, b):
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Dense, {}),
        (Dense, {"accumulate": 3, "schedule": "cosine"}),
        (Dense, {"precision": "bf16"}),
        (Dense, {"lr": None, "optimizer": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)}),
        (Sparse, {}),
        (Sparse, {"accumulate": 2, "clip": None}),
    ],
    ids=["dense", "accumulated", "bf16", "sgd", "sparse", "sparse-accumulated"],
)
def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(tmp_path, kind, options):
    expected, whole = train(tmp_path / "whole", kind, **options)
    for step in (2, 8, 19):
        with pytest.raises(Crash):
            train(tmp_path / "crashed", kind, on_step=crash_at(step), **options)
    model, result = train(tmp_path / "crashed", kind, **options)
    assert_equal_weights(model, expected)
    assert result == whole
    assert [line["step"] for line in metrics(tmp_path / "crashed")] == list(range(1, STEPS + 1))


def test_two_optimizers_with_their_own_rates_resume_bit_for_bit(tmp_path):
    def run(out, **options):
        model = Sparse()

        def make(params):
            rest = [p for p in params if p is not model.table.weight]
            return [torch.optim.SparseAdam([model.table.weight], lr=0.05), torch.optim.AdamW(rest, lr=0.01)]

        return model, fit(model, noisy_batches(), steps=12, out=out, save_every=4, optimizer=make, **options)

    expected, whole = run(tmp_path / "whole")
    with pytest.raises(Crash):
        run(tmp_path / "crashed", on_step=crash_at(6))
    model, result = run(tmp_path / "crashed")
    assert_equal_weights(model, expected)
    assert result.history == whole.history
    assert not torch.equal(expected.table.weight, Sparse().table.weight)
    states = newest_checkpoint(tmp_path / "whole").optimizers
    assert [state["param_groups"][0]["lr"] for state in states] == pytest.approx([0.05 / 12, 0.01 / 12])


def test_a_hand_made_sparse_gradient_trains(tmp_path):
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(6, 2))

        def forward(self, ids):
            rows = nn.functional.embedding(ids, self.weight, sparse=True)
            return (rows - 1.0).square().mean()

    model = Rows()
    batches = [{"ids": torch.tensor([0, 2, 2])}]
    result = fit(
        model, batches, steps=200, out=tmp_path, optimizer=lambda p: torch.optim.SparseAdam(p, lr=0.1), clip=1.0
    )
    torch.testing.assert_close(model.weight[[0, 2]], torch.ones(2, 2), atol=1e-2, rtol=0)
    assert not model.weight[[1, 3, 4, 5]].any()
    assert result.loss < result.history[0] / 100
    # One row twice: the gradient of the first step is 2 (0 - 1) / 6 per entry of row 0, and twice that for row 2.
    assert metrics(tmp_path)[0]["grad_norm"] == pytest.approx(math.sqrt(2 * (1 / 3) ** 2 + 2 * (2 / 3) ** 2), rel=1e-6)


def test_a_finished_run_returns_at_once_with_its_weights(tmp_path):
    expected, whole = train(tmp_path)

    def never(number):
        raise Crash

    model = Dense()
    with torch.no_grad():
        model.head.weight.zero_()
    result = fit(model, never, steps=STEPS, out=tmp_path, save_every=7, lr=0.02, warmup=3)
    assert_equal_weights(model, expected)
    assert result == whole
    assert not result.interrupted


def test_history_metrics_and_result_agree(tmp_path):
    _, result = train(tmp_path, schedule="constant")
    lines = metrics(tmp_path)
    assert isinstance(result, FitResult)
    assert [line["loss"] for line in lines] == result.history
    assert (result.step, result.loss) == (STEPS, lines[-1]["loss"])
    assert [line["lr"] for line in lines] == pytest.approx([0.02 / 3, 0.04 / 3] + [0.02] * (STEPS - 2))
    assert all(line["items"] == 8 and line["grad_norm"] > 0 and line["seconds"] > 0 for line in lines)


def test_half_lines_and_lines_beyond_the_checkpoint_are_dropped(tmp_path):
    with pytest.raises(Crash):
        train(tmp_path, on_step=crash_at(8))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "loss": 1.0}\nrubbish\n{"step": 10, "lo')
    _, result = train(tmp_path)
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, STEPS + 1))
    assert len(result.history) == STEPS


def test_a_truncated_checkpoint_falls_back_and_ends_with_the_same_bits(tmp_path):
    expected, whole = train(tmp_path / "whole")
    out = tmp_path / "damaged"
    with pytest.raises(Crash):
        train(out, on_step=crash_at(12))
    file = out / "step-10" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.warns(UserWarning, match=r"step-10: model\.safetensors has .* bytes"):
        model, result = train(out)
    assert_equal_weights(model, expected)
    assert result == whole


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_signals_finish_the_step_save_and_are_resumable(tmp_path, number, exit_code):
    expected, _ = train(tmp_path / "whole")
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    model = Dense()
    with pytest.raises(TrainingInterrupted, match="after step 7") as caught:
        fit(
            model,
            noisy_batches(),
            steps=STEPS,
            out=tmp_path / "stopped",
            lr=0.02,
            warmup=3,
            on_step=signal_at(7, number),
        )
    assert isinstance(caught.value, KeyboardInterrupt)
    assert (caught.value.exit_code, caught.value.step) == (exit_code, 7)
    assert newest_checkpoint(tmp_path / "stopped").path == caught.value.checkpoint
    assert_equal_weights(model, SimpleNamespace(state_dict=lambda: newest_checkpoint(tmp_path / "stopped").model))
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    resumed, _ = train(tmp_path / "stopped")
    assert_equal_weights(resumed, expected)


def test_what_a_callback_draws_goes_on_after_a_resume(tmp_path):
    def run(out, stop=None):
        drawn = []

        def on_step(record):
            drawn.append(draw_globals())
            return record["step"] == stop

        train(out, on_step=on_step)
        return drawn

    whole = run(tmp_path / "whole")
    assert run(tmp_path / "parts", stop=8) + run(tmp_path / "parts") == whole


def test_auto_precision_is_bf16_where_there_are_instructions_for_it(tmp_path, monkeypatch):
    from kexue.training import loop

    for has, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(loop, "has_bf16", lambda device, has=has: has)
        _, result = train(tmp_path / f"auto {name}", precision="auto")
        assert result.history == train(tmp_path / name, precision=name)[1].history
        assert newest_checkpoint(tmp_path / f"auto {name}").config["precision"] == name
    monkeypatch.undo()
    assert isinstance(loop.has_bf16(torch.device("cpu")), bool)
    assert not loop.has_bf16(torch.device("meta"))


def test_tokens_are_counted_and_shown_where_there_are_any(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")

    class Named(Dense):
        def forward(self, input_ids, labels):
            return super().forward(input_ids, labels)

    def batches(number):
        batch = noisy_batches()(number)
        return {"input_ids": batch["ids"], "labels": batch["labels"]}

    fit(Named(), batches, steps=4, out=tmp_path, accumulate=2, show_progress=True)
    assert [line["tokens"] for line in metrics(tmp_path)] == [2 * 8 * 5] * 4
    assert "tokens/s" in capsys.readouterr().err


def test_a_second_ctrl_c_stops_at_once_and_handlers_come_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)

    def on_step(record):
        if record["step"] == 7:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        train(tmp_path, on_step=on_step)
    assert not isinstance(caught.value, TrainingInterrupted)
    assert signal.getsignal(signal.SIGINT) is before
    assert newest_checkpoint(tmp_path).step == 5


def test_a_signal_that_the_caller_ignores_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _, result = train(tmp_path, on_step=signal_at(7, signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.step == STEPS


def test_it_runs_outside_the_main_thread(tmp_path):
    done = []
    thread = threading.Thread(target=lambda: done.append(train(tmp_path / "thread")))
    thread.start()
    thread.join()
    expected, _ = train(tmp_path / "main")
    assert_equal_weights(done[0][0], expected)


def test_on_step_can_end_the_run_which_then_continues(tmp_path):
    expected, _ = train(tmp_path / "whole")
    _, result = train(tmp_path / "out", on_step=lambda record: record["step"] == 8)
    assert (result.step, result.interrupted, len(result.history)) == (8, True, 8)
    model, result = train(tmp_path / "out")
    assert (result.step, result.interrupted) == (STEPS, False)
    assert_equal_weights(model, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 25}, "steps was 24 and is 25"),
        ({"lr": 0.03}, r"lr was 0\.02 and is 0\.03|lr was"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"schedule": "cosine"}, "schedule was 'linear' and is 'cosine'"),
        ({"fingerprint": "other data"}, "fingerprint was None and is 'other data'"),
        ({"optimizer": torch.optim.SGD, "lr": None}, r"optimizers was \['AdamW'\] and is \['SGD'\]"),
        ({"kind": Sparse}, "model was 'Dense with"),
    ],
)
def test_a_changed_configuration_is_refused_by_name(tmp_path, options, message):
    train(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ValueError, match=message) as caught:
        train(tmp_path, **options)
    assert "resume=False" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_resume_false_starts_over(tmp_path):
    train(tmp_path)
    model, result = train(tmp_path, steps=6, resume=False)
    expected, _ = train(tmp_path / "fresh", steps=6)
    assert_equal_weights(model, expected)
    assert result.step == len(metrics(tmp_path)) == 6
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-5", "step-6"]


class Regression(nn.Module):
    """Mean squared error over the rows that have a target; without dropout."""

    def __init__(self, form="object"):
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(4, 1).double()
        self.form = form

    def forward(self, x, y):
        known = ~torch.isnan(y)
        loss = (self.map(x).squeeze(1) - y)[known].square().mean()
        return {
            "tensor": loss,
            "one element": loss.reshape(1, 1),
            "tuple": (loss, None),
            "mapping": {"loss": loss},
            "object": SimpleNamespace(loss=loss, num_items=known.sum()),
        }[self.form]


def regression_batches(*sizes, known=1.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(sizes), 4, dtype=torch.float64, generator=generator)
    y = x.sum(1) + 1
    y[torch.rand(len(y), generator=generator) > known] = math.nan
    return [{"x": a, "y": b} for a, b in zip(x.split(sizes), y.split(sizes), strict=True)]


@pytest.mark.parametrize(("form", "known"), [("object", 0.5), ("tensor", 1.0)])
def test_accumulation_equals_the_big_batch(tmp_path, form, known):
    parts = regression_batches(7, 2, 5, known=known)
    whole = [{key: torch.cat([part[key] for part in parts]) for key in ("x", "y")}]
    a, b = Regression(form), Regression(form)
    # SGD, because Adam divides the size of the gradient out.
    options = {"steps": 5, "optimizer": lambda p: torch.optim.SGD(p, lr=0.1), "clip": None}
    first = fit(a, parts, out=tmp_path / "a", accumulate=3, **options)
    second = fit(b, whole, out=tmp_path / "b", **options)
    np.testing.assert_allclose(first.history, second.history, rtol=1e-12)
    torch.testing.assert_close(a.map.weight, b.map.weight, rtol=1e-12, atol=1e-12)
    assert metrics(tmp_path / "a")[0]["items"] == metrics(tmp_path / "b")[0]["items"]


def test_a_batch_without_items_is_passed_over_and_a_step_of_them_is_an_error(tmp_path):
    parts = regression_batches(4, 4)
    empty = {"x": parts[0]["x"], "y": torch.full((4,), math.nan, dtype=torch.float64)}
    result = fit(Regression(), [parts[0], empty], steps=1, accumulate=2, out=tmp_path / "a")
    expected = fit(Regression(), [parts[0]], steps=1, out=tmp_path / "b")
    assert result.loss == pytest.approx(expected.loss)
    with pytest.raises(ValueError, match="step 1 has nothing to predict"):
        fit(Regression(), [empty], steps=1, out=tmp_path / "c")


@pytest.mark.parametrize("form", ["tensor", "one element", "tuple", "mapping", "object"])
def test_every_form_of_loss_is_understood(tmp_path, form):
    result = fit(Regression(form), regression_batches(8), steps=3, out=tmp_path)
    expected = fit(Regression(), regression_batches(8), steps=3, out=tmp_path / "expected")
    assert result.history == expected.history


@pytest.mark.slow
def test_transformers_models_train(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertForMaskedLM(config)
    ids = torch.arange(24).reshape(4, 6)
    result = fit(model, [{"input_ids": ids, "labels": ids}], steps=30, out=tmp_path, lr=0.02)
    assert result.history[-1] < 0.7 * result.history[0]
    assert newest_checkpoint(tmp_path).step == 30


def test_clipping_bounds_the_update_and_reports_the_norm_before(tmp_path):
    model = Regression()
    start = model.map.weight.detach().clone(), model.map.bias.detach().clone()
    fit(
        model,
        regression_batches(8),
        steps=1,
        out=tmp_path,
        clip=0.01,
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
    )
    moved = torch.cat([(model.map.weight - start[0]).flatten(), model.map.bias - start[1]]).norm().item()
    assert moved == pytest.approx(0.01, rel=1e-3)
    assert metrics(tmp_path)[0]["grad_norm"] > 0.1


def test_decay_acts_on_matrices_only():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.sparse = nn.EmbeddingBag(9, 4, sparse=True)
            self.conv = nn.Conv1d(4, 4, 3)
            self.norm = nn.LayerNorm((2, 4))
            self.batch_norm = nn.BatchNorm1d(4)
            self.output = nn.Linear(4, 7)
            self.output.weight = self.embed.weight
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.scale = nn.Parameter(torch.ones(4))
            self.hidden = nn.Linear(4, 4)

    model = Model()
    names = {p: name for name, p in model.named_parameters()}
    adam, sparse = default_optimizers(model, lr=0.5, weight_decay=0.1)
    decayed, rest = adam.param_groups
    assert [names[p] for p in decayed["params"]] == ["conv.weight", "hidden.weight"]
    assert {names[p] for p in rest["params"]} == {
        "embed.weight", "conv.bias", "norm.weight", "norm.bias", "batch_norm.weight", "batch_norm.bias", "output.bias",
        "scale", "hidden.bias",
    }  # fmt: skip
    assert (decayed["weight_decay"], rest["weight_decay"], decayed["lr"]) == (0.1, 0.0, 0.5)
    assert [names[p] for p in sparse.param_groups[0]["params"]] == ["sparse.weight"]


def test_the_callers_random_state_and_modes_are_given_back(tmp_path):
    model = Dense().eval()
    model.head.train()
    seed_globals(4)
    expected = draw_globals()
    seed_globals(4)
    seen = []
    fit(
        model,
        noisy_batches(),
        steps=2,
        out=tmp_path,
        on_step=lambda record: seen.append((model.training, model.dropout.training)),
    )
    assert seen == [(True, True)] * 2
    assert (model.training, model.dropout.training, model.head.training) == (False, False, True)
    assert draw_globals() == expected
    assert all(p.grad is None for p in model.parameters())


def test_the_result_does_not_depend_on_the_callers_random_state(tmp_path):
    losses = []
    for number in range(2):
        model = Dense()
        seed_globals(number)
        losses.append(fit(model, noisy_batches(), steps=4, out=tmp_path / str(number)).history)
    assert losses[0] == losses[1]
    assert fit(Dense(), noisy_batches(), steps=4, out=tmp_path / "other", seed=1).history != losses[0]


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_keeps_weights_and_checkpoint(tmp_path, bad, clip):
    class Turns(Regression):
        def forward(self, x, y):
            loss = super().forward(x, y).loss
            if float(x[0, 0]) == 99.0:
                # sqrt has an infinite derivative at 0, and 0 * inf is NaN.
                loss = loss * math.nan if bad == "loss" else loss + (self.map.bias.sum() * 0.0).sqrt()
            return loss

    model = Turns()
    good = regression_batches(8)[0]
    poison = {"x": torch.full_like(good["x"], 99.0), "y": good["y"]}
    kept = []

    def remember(record):
        kept.append([p.detach().clone() for p in model.parameters()])

    with pytest.raises(FloatingPointError, match=r"is nan in step 8, which was not applied; the last .*step-6"):
        fit(model, [good] * 7 + [poison], steps=20, out=tmp_path, save_every=3, on_step=remember, clip=clip)
    assert newest_checkpoint(tmp_path).step == 6
    for a, b in zip(model.parameters(), kept[-1], strict=True):
        assert torch.equal(a, b)
    assert len(metrics(tmp_path)) == 7


def test_a_full_disk_ends_the_run_and_the_rest_continues(tmp_path, monkeypatch):
    expected, _ = train(tmp_path / "whole")
    out = tmp_path / "full"
    from kexue.training import checkpoint

    write = checkpoint._write

    def full(path, content):
        if path.parent.name == "step-10.tmp" and path.name == "optimizer.pt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        train(out)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(p.name for p in out.iterdir()) == ["latest", "metrics.jsonl", "step-5"]
    monkeypatch.undo()
    model, _ = train(out)
    assert_equal_weights(model, expected)


def test_the_bar_shows_loss_speed_and_rate(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    train(tmp_path / "a", show_progress=True, label="encoder")
    shown = capsys.readouterr().err
    assert "encoder" in shown
    assert f"{STEPS}/{STEPS}" in shown
    assert all(word in shown for word in ("loss", "items/s", "lr"))
    train(tmp_path / "b")
    assert capsys.readouterr().err == ""
