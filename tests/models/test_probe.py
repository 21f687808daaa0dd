"""What the rows of a probe say: scales, growth, the gradient's loss, names and figures."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from kexue.models import ProbeReport, probe
from reference import bert_initial_std as reference

KEYS = ["name", "rms_out", "rms_grad", "gain", "attention_entropy"]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_name(report):
    return {row["name"]: row for row in report.rows}


def chain(gains, width=16):
    """Linear layers that multiply every length by a known factor."""
    model = nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=torch.float64) for _ in gains))
    for n, (layer, gain) in enumerate(zip(model, gains, strict=True)):
        layer.weight.data = gain * torch.linalg.qr(normal(width, width, seed=n))[0]
    return model


@given(st.lists(st.floats(0.1, 3), min_size=1, max_size=6))
def test_a_linear_chain_has_the_scales_that_follow_from_its_gains(gains):
    x = normal(5, 16)
    report = probe(chain(gains), x)
    assert [row["name"] for row in report.rows] == [str(n) for n in range(len(gains))]
    for n, row in enumerate(report.rows):
        assert row["gain"] == pytest.approx(gains[n])
        assert row["rms_out"] == pytest.approx(reference.rms(x) * math.prod(gains[: n + 1]))
        assert row["rms_grad"] == pytest.approx(math.prod(gains[n + 1 :]))  # the direction has rms 1
        assert row["attention_entropy"] is None


class Written(nn.Module):
    """Everything that a hook could see, kept by hand."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, ids, keep=None):
        keep = [] if keep is None else keep
        x = self.table(ids)
        keep.append(("table", x, None))
        for n, layer in enumerate(self.layers):
            before, y = x, layer(x)
            keep.append((f"layers.{n}", y, before if n == 0 else keep[-1][1]))
            x = x + torch.tanh(y)
        y = self.norm(x)
        keep.append(("norm", y, x))
        out = self.head(y)
        keep.append(("head", out, y))
        return out


def test_every_number_agrees_with_retained_gradients():
    torch.manual_seed(0)
    model, ids = Written().double(), torch.tensor([[1, 2, 8], [0, 3, 3]])
    keep = []
    target = model(ids, keep).square().sum()
    for _, y, _ in keep:
        y.retain_grad()
    target.backward()
    report = probe(model, ids, loss=lambda out: out.square().sum())
    assert report.loss == pytest.approx(float(target.detach()))
    assert [row["name"] for row in report.rows] == [name for name, _, _ in keep]
    for row, (_, y, before) in zip(report.rows, keep, strict=True):
        assert list(row) == KEYS
        assert row["rms_out"] == pytest.approx(reference.rms(y))
        assert row["rms_grad"] == pytest.approx(reference.rms(y.grad))
        assert row["gain"] == (None if before is None else pytest.approx(reference.rms(y) / reference.rms(before)))


def test_gains_of_blocks_multiply_to_the_growth_of_the_stack():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4))

        def forward(self, x):
            for block in self.blocks:
                x = x + F.relu(block(2 * x))
            return x

    rows = by_name(probe(Stack(), normal(3, 8, dtype=torch.float32)))
    growth = math.prod(rows[f"blocks.{n}"]["gain"] for n in range(1, 4))
    assert growth == pytest.approx(rows["blocks.3"]["rms_out"] / rows["blocks.0"]["rms_out"])


def test_branches_that_read_one_tensor_are_measured_against_it():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))
            for n, expert in enumerate(self.experts):
                expert.weight.data = (n + 1.0) * torch.eye(4)

        def forward(self, x):
            return sum(expert(x) for expert in self.experts)

    rows = probe(Experts(), normal(3, 4, dtype=torch.float32)).rows
    assert [row["gain"] for row in rows] == pytest.approx([1, 2, 3])


def test_a_module_called_again_gets_a_row_of_its_own():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4, bias=False)])
            self.layers[0].weight.data = 2 * torch.eye(4)

        def forward(self, x):
            for _ in range(3):
                x = self.layers[0](x)
            return x

    rows = probe(Twice(), torch.ones(2, 4)).rows
    assert [row["name"] for row in rows] == ["layers.0", "layers.0#2", "layers.0#3"]
    assert [row["rms_out"] for row in rows] == pytest.approx([2, 4, 8])
    assert [row["rms_grad"] for row in rows] == pytest.approx([4, 2, 1])
    assert [row["gain"] for row in rows] == pytest.approx([2, 2, 2])


def test_a_sequential_called_again_starts_anew():
    shared = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    for layer in shared:
        layer.weight.data = 3 * torch.eye(4)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = shared

        def forward(self, x):
            return self.shared(self.shared(x) / 9)

    rows = by_name(probe(Twice(), torch.ones(2, 4)))
    assert rows["shared.0#2"]["gain"] == pytest.approx(3)


@pytest.mark.parametrize("kind", ["attribute", "mapping", "scalar", "pair"])
def test_the_loss_of_the_model_is_used_if_it_has_one(kind):
    class Output:
        def __init__(self, loss, logits):
            self.loss, self.logits = loss, logits

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x, labels):
            y = self.layer(x)
            loss = F.mse_loss(y, labels)
            return {
                "attribute": Output(loss, y), "mapping": {"logits": y, "loss": loss}, "scalar": loss, "pair": (loss, y)
            }[kind]  # fmt: skip

    model, x, labels = Model(), normal(4, 3, dtype=torch.float32), normal(4, 3, seed=1, dtype=torch.float32)
    report = probe(model, {"x": x, "labels": labels})
    y = model.layer(x).detach()
    assert report.loss == pytest.approx(float(F.mse_loss(y, labels)))
    assert report.rows[0]["rms_grad"] == pytest.approx(reference.rms(2 * (y - labels) / 12), rel=1e-5)


def test_the_default_direction_has_rms_one_and_skips_padding():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 5, dtype=torch.float64)

        def forward(self, x, attention_mask=None):
            y = self.layer(x)
            y.register_hook(seen.append)
            return y

    seen = []
    model, x = Model(), normal(2, 4, 5)
    assert probe(model, x).rows[0]["rms_grad"] == pytest.approx(1)
    assert probe(model, x).loss is None
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    assert probe(model, (x, mask)).rows[0]["rms_grad"] == pytest.approx(1)
    assert (seen[0].abs().sum(-1) > 0).all()
    assert (seen[-1].abs().sum(-1) > 0).int().tolist() == mask.tolist()


def test_behind_a_layer_norm_the_direction_still_says_something():
    model = nn.Sequential(nn.Linear(64, 64, dtype=torch.float64), nn.LayerNorm(64, dtype=torch.float64))
    assert probe(model, normal(8, 64)).rows[0]["rms_grad"] > 0.5
    square = probe(model, normal(8, 64), loss=lambda out: out.square().mean())
    assert square.rows[0]["rms_grad"] < 1e-6  # why a mean square is not the default


def test_equal_calls_give_equal_reports_also_with_dropout():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)).train()
    first, second = probe(model, torch.ones(3, 8)), probe(model, torch.ones(3, 8))
    assert first.rows == second.rows
    assert first.rows[1]["rms_out"] != probe(model, torch.ones(3, 8), seed=1).rows[1]["rms_out"]
    assert probe(model, torch.ones(3, 8), training=False).rows[1]["gain"] == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_of_half_precision_are_those_of_float32(dtype):
    model = nn.Linear(32, 32, bias=False).to(dtype)
    model.weight.data = 300 * torch.eye(32, dtype=dtype)
    x = torch.full((64, 32), 200.0, dtype=dtype)  # squares and sums of squares are beyond float16
    (row,) = probe(model, x).rows
    assert row["rms_out"] == pytest.approx(60000, rel=1e-2)
    assert row["rms_grad"] == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1.0, 1e25])
def test_squares_beyond_float32_do_not_turn_into_0_or_inf(size):
    model = nn.Linear(4, 4, bias=False)
    model.weight.data = size * torch.eye(4)
    rows = probe(nn.Sequential(model, nn.Linear(4, 4)), torch.ones(3, 4)).rows
    assert rows[0]["rms_out"] == pytest.approx(size)
    assert probe(model, torch.ones(3, 4), loss=lambda y: y.sum() * size).rows[0]["rms_grad"] == pytest.approx(size)


def test_nan_and_inf_are_shown():
    class Bad(nn.Module):
        def forward(self, x):
            return x / 0

    report = probe(nn.Sequential(nn.Identity(), Bad(), nn.Tanh()), torch.tensor([[0.0, 1.0]]))
    assert math.isnan(report.rows[1]["rms_out"])
    assert "nan" in str(report)
    assert report.plot("out").axes
    assert probe(nn.Sequential(Bad()), torch.ones(1, 2)).rows[0]["rms_out"] == math.inf


def test_outputs_of_other_kinds():
    class Pack(nn.Module):
        def forward(self, x):
            return {"count": torch.tensor(3), "parts": [None, (2 * x, 3 * x)]}

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.pack, self.best = Pack(), Best()
            self.rnn = nn.LSTM(4, 4, batch_first=True)
            self.unused = nn.Linear(4, 4)

        def forward(self, x):
            y = self.rnn(self.pack(x)["parts"][1][0])[0]
            self.best(y)
            return y

    class Best(nn.Module):
        def forward(self, x):
            return x.argmax(-1)

    rows = by_name(probe(Whole(), torch.ones(2, 3, 4)))
    assert list(rows) == ["pack", "rnn"]  # nothing floating comes out of best, unused is not called
    assert rows["pack"]["rms_out"] == pytest.approx(2)
    assert rows["rnn"]["rms_grad"] == pytest.approx(1)


def test_packed_sequences_go_in_and_out():
    packed = nn.utils.rnn.pack_padded_sequence(normal(5, 2, 3, dtype=torch.float32), torch.tensor([5, 2]))
    (row,) = probe(nn.GRU(3, 4), packed).rows
    assert row["rms_grad"] == pytest.approx(1)


def test_the_model_itself_has_a_row_if_it_has_no_others():
    (row,) = probe(nn.Linear(3, 2), torch.ones(4, 3)).rows
    assert row["name"] == ""
    assert "(Linear)" in str(probe(nn.Linear(3, 2), torch.ones(4, 3)))


def test_rows_are_json_and_the_table_is_aligned():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    report = probe(model, torch.tensor([[1, 2]]))
    assert isinstance(report, ProbeReport)
    assert json.loads(json.dumps(report.rows)) == report.rows
    lines = str(report).splitlines()
    assert lines[0] == "Sequential: 2 rows"
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[1].split() == ["name", "rms", "out", "rms", "grad", "gain", "entropy"]
    assert "loss 1." in str(probe(model, torch.tensor([[1, 2]]), loss=lambda y: 0 * y.sum() + 1.25))


def test_a_long_table_shows_blocks_and_says_what_it_leaves_out():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(*(nn.Tanh() for _ in range(9))) for _ in range(8))
            self.head = nn.Linear(4, 4)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    report = probe(Model(), torch.ones(2, 4))
    names = [line.split()[0] for line in str(report).splitlines()[2:-1]]
    assert names == [f"layers.{n}" for n in range(8)] + ["head"]
    assert str(report).splitlines()[-1].startswith("(72 rows inside blocks")
    assert len(report.table(every=True).splitlines()) == 2 + len(report.rows)
    assert [text.get_text() for text in report.plot("grad").axes[0].get_xticklabels()] == names[:-1]


@pytest.mark.parametrize("kind", ["out", "grad", "gain"])
def test_figures_show_the_column(kind, tmp_path):
    report = probe(chain([2.0, 0.5, 3.0]), normal(4, 16))
    figure = report.plot(kind)
    column = {"out": "rms_out", "grad": "rms_grad", "gain": "gain"}[kind]
    line = figure.axes[0].lines[0]
    assert list(line.get_ydata()) == pytest.approx([row[column] for row in report.rows])
    assert figure.axes[0].get_yscale() == "log"
    assert list(report.plot(column).axes[0].lines[0].get_ydata()) == list(line.get_ydata())
    figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_figures_of_zeros_huge_ranges_and_gaps():
    class Times(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return self.factor * x

    x = torch.ones(1, 2, dtype=torch.float64)
    for factors in ((0.0, 0.0), (1e200, 1e-300, 1e50), (math.inf, 1.0), (1.0, 0.0, 1.0), (1e-320, 1.0)):
        report = probe(nn.Sequential(nn.Identity(), *map(Times, factors)), x)
        for kind in ("out", "grad", "gain"):
            figure = report.plot(kind)
            figure.canvas.draw()
            assert figure.axes[0].get_title()
            assert figure.axes[0].get_xlabel() or figure.axes[0].get_ylabel()


def test_figures_use_no_global_state():
    import subprocess
    import sys

    code = (
        "import torch, sys; from kexue.models import probe; r = probe(torch.nn.Linear(2, 2), torch.ones(1, 2));"
        "before = 'matplotlib' in sys.modules; r.plot(); print(before, 'matplotlib.pyplot' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]


def test_figures_that_cannot_be_drawn():
    report = probe(nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="'loss'"):
        report.plot("loss")
    with pytest.raises(ValueError, match="no row with a finite attention_entropy"):
        report.plot("entropy")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((len, torch.ones(1)), TypeError, "must be an nn.Module; got builtin"),
        ((nn.Linear(2, 2), torch.ones(0, 2)), ValueError, r"must not be empty; got a tensor of shape \(0, 2\)"),
        ((nn.Linear(2, 2), []), ValueError, "at least one tensor; got list"),
        ((nn.Linear(2, 2), {"input": None}), ValueError, "at least one tensor; got dict"),
        ((nn.Linear(2, 2), "text"), ValueError, "got str"),
        ((nn.LazyLinear(2), torch.ones(1, 2)), ValueError, "lazy parameters"),
        ((nn.Linear(2, 2, device="meta"), torch.ones(1, 2)), ValueError, "meta device"),
    ],
)
def test_bad_models_and_batches(arguments, error, message):
    with pytest.raises(error, match=message):
        probe(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": 3}, TypeError, "loss must be callable"),
        ({"loss": lambda out: out}, ValueError, r"the loss must be a scalar; got shape \(1, 2\)"),
        ({"loss": lambda out: 1.0}, TypeError, "floating tensor; got float"),
        ({"loss": lambda out: out.argmax()}, TypeError, "floating tensor; got torch.int64"),
        ({"training": 1}, TypeError, "training"),
        ({"seed": -1}, ValueError, "seed"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        probe(nn.Linear(2, 2), torch.ones(1, 2), **options)


def test_a_model_without_a_floating_output_is_refused():
    class Best(nn.Module):
        def forward(self, x):
            return x.argmax(-1)

    with pytest.raises(ValueError, match="no floating tensor"):
        probe(Best(), torch.ones(2, 2))
