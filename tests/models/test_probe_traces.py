"""A probe leaves everything as it was, on friendly and on hostile models."""

import copy
import math
import random

import numpy as np
import pytest
import torch
import transformers as t
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kexue.models import probe

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert(**change):
    torch.manual_seed(0)
    return t.BertForMaskedLM(t.BertConfig(**{**SIZES, **change}))


def ids(rows=2, length=6):
    return torch.randint(5, 40, (rows, length), generator=torch.Generator().manual_seed(1))


def hooks(model):
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return [len(getattr(m, name)) for m in model.modules() for name in names]


def everything(model):
    """All that a probe must not change, by value."""
    return {
        "state": copy.deepcopy(dict(model.state_dict())),
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "objects": [id(x) for x in (*model.parameters(), *model.buffers())],
        "versions": [x._version for x in (*model.parameters(), *model.buffers())],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "required": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": hooks(model),
        "random": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
    }


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


class Counting(nn.Module):
    """State of every kind that a forward pass may change."""

    def __init__(self):
        super().__init__()
        self.register_buffer("alpha", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2), persistent=False)
        self.plain = torch.zeros(2)
        self.times, self.history, self.seen = 0, [], {"last": None}
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        self.alpha += 1
        self.replaced = self.replaced + 1
        self.plain += 1
        self.times += 1
        y = self.layer(x) * (1 + self.alpha) + random.random() + np.random.rand()  # noqa: NPY002
        self.history.append(y)
        self.seen["last"] = self.kept = y
        return y


def mixed():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(5, 4),
        Counting(),
    )  # fmt: skip
    model[1].eval()
    model[4].weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("training", [None, True, False])
def test_model_gradients_flags_buffers_and_random_states_are_as_found(training):
    model = mixed()
    model(torch.randn(2, 3, 5)).sum().backward()  # gradients that must survive
    counting = model[5]
    plain, history, before = counting.plain, list(counting.history), everything(model)
    report = probe(model, torch.ones(2, 3, 5), training=training)
    assert len(report.rows) == 7
    assert_same(before, everything(model))
    assert counting.plain is plain
    assert (plain == 1).all()
    assert (counting.times, counting.history, counting.seen) == (1, history, {"last": history[0]})


def test_state_that_appears_in_the_call_is_gone():
    model = Counting()
    probe(model, torch.ones(2, 4))
    assert not hasattr(model, "kept")
    assert model.history == []


def test_everything_is_as_found_after_an_error_too():
    class Fails(nn.Module):
        def forward(self, x):
            raise KeyError("broken")

    model = nn.Sequential(*mixed(), Fails())
    before = everything(model)
    with pytest.raises(KeyError, match="broken"):
        probe(model, torch.ones(2, 3, 5), training=True)
    assert_same(before, everything(model))
    fine = mixed()
    before = everything(fine)
    with pytest.raises(ZeroDivisionError):
        probe(fine, torch.ones(2, 3, 5), loss=lambda out: out.sum() / (1 // 0))
    assert_same(before, everything(fine))


def test_errors_inside_that_the_model_catches_do_not_confuse_the_rows():
    class Fails(nn.Module):
        def forward(self, x):
            raise KeyError("broken")

    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.bad, self.good = nn.Sequential(Fails()), nn.Linear(4, 4)

        def forward(self, x):
            try:
                return self.bad(x)
            except KeyError:
                return self.good(x)

    rows = probe(nn.Sequential(Tries(), nn.Tanh()), torch.ones(2, 4)).rows
    assert [row["name"] for row in rows] == ["0", "0.good", "1"]
    assert all(row["rms_grad"] is not None for row in rows)


def test_inputs_are_not_changed_nor_given_gradients():
    class Writes(nn.Module):
        def forward(self, x, y):
            x += 1
            return x * y

    x, y = torch.zeros(2, 3), torch.ones(2, 3, requires_grad=True)
    probe(nn.Sequential(nn.Identity()), x)
    (row,) = probe(Writes(), (x, y)).rows
    assert row["rms_out"] == pytest.approx(1)
    assert (x == 0).all()
    assert x.grad is None
    assert not x.requires_grad
    assert y.grad is None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(context):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.ones(2, 4)
    want = probe(model, x).rows
    with context():
        made = torch.ones(2, 4)
        assert probe(model, made).rows == want
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("frozen", ["all", "first"])
def test_frozen_models_have_gradients_of_outputs(frozen):
    model = bert().eval()
    want = probe(model, {"input_ids": ids(), "labels": ids()}).rows
    for p in model.parameters() if frozen == "all" else model.bert.embeddings.parameters():
        p.requires_grad_(False)
    got = probe(model, {"input_ids": ids(), "labels": ids()}).rows
    assert got == want
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad


def test_what_runs_without_gradients_inside_the_model_has_none():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                x = self.frozen(x)
            return self.head(x)

    rows = probe(Partly(), torch.ones(2, 4)).rows
    assert [row["rms_grad"] is None for row in rows] == [True, False]
    assert probe(Partly(), torch.ones(2, 4), loss=lambda y: y.detach().sum()).rows[1]["rms_grad"] is None


def test_writing_in_place_does_not_change_the_numbers():
    def build(inplace):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(inplace), nn.Flatten(), nn.Dropout(0.3, inplace), nn.Linear(20, 8),
            nn.Unflatten(1, (2, 4)), nn.SiLU(inplace), nn.Identity(), nn.ReLU(inplace),
        )  # fmt: skip

    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    want = probe(build(False), x).rows
    got = probe(build(True), x).rows
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b)
    assert all(row["rms_grad"] > 0 for row in got)
    assert len({row["rms_out"] for row in got}) >= 5


def test_tables_that_renormalise_themselves_are_put_back():
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=0.1), nn.Linear(4, 4))
    before = model[0].weight.detach().clone()
    report = probe(model, torch.tensor([[1, 2]]))
    assert report.rows[0]["rms_out"] == pytest.approx(0.05, rel=1e-3)
    assert torch.equal(model[0].weight, before)


def test_spectral_norm_and_batch_norm_in_training_keep_their_state():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.utils.spectral_norm(nn.Linear(4, 4)),
        nn.BatchNorm1d(4),
    ).train()  # fmt: skip
    x = torch.randn(6, 4)
    before = everything(model)
    assert all(row["rms_grad"] > 0 for row in probe(model, x).rows)
    assert_same(before, everything(model))


def test_a_graph_of_the_caller_can_still_be_differentiated():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    loss = model(torch.randn(3, 4)).square().sum()
    probe(model, torch.randn(3, 4))
    loss.backward()
    assert model[0].weight.grad is not None


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_transformers_model_is_as_found(implementation):
    model = bert().train()
    model.set_attn_implementation(implementation)
    config, before = copy.deepcopy(model.config.to_dict()), everything(model)
    probe(model, {"input_ids": ids(), "labels": ids()})
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == implementation
    assert_same(before, everything(model))


@pytest.mark.slow
def test_the_forward_pass_is_the_same_to_the_last_bit():
    model, seen = bert().eval(), []
    model.cls.register_forward_hook(lambda m, a, out: seen.append(out.detach().clone()))
    model(ids())
    probe(model, ids())
    assert torch.equal(*seen)


@pytest.mark.slow
def test_checkpoints_do_not_matter():
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    batch = {"input_ids": ids(), "labels": ids()}
    want = probe(model, batch).rows
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert probe(model, batch).rows == want
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_checkpoints_written_by_hand():
    class Saves(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.layer, self.reentrant = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), reentrant

        def forward(self, x):
            return checkpoint(self.layer, 2 * x, use_reentrant=self.reentrant)

    rows = probe(nn.Sequential(Saves(False), nn.Linear(4, 4)), torch.ones(2, 4)).rows
    assert [row["name"] for row in rows] == ["0", "0.layer", "0.layer.0", "0.layer.1", "1"]
    assert all(row["rms_grad"] > 0 for row in rows)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        probe(nn.Sequential(nn.Linear(4, 4), Saves(True)), torch.ones(2, 4))


def test_wrappers_are_looked_through():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    want = probe(model, torch.ones(2, 4)).rows
    assert probe(torch.compile(model, backend="eager"), torch.ones(2, 4)).rows == want


def test_shared_modules_and_tied_weights():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    rows = probe(model, torch.ones(2, 4)).rows
    assert [row["name"] for row in rows] == ["0", "1", "0#2"]


def test_positional_and_named_batches():
    class Sum(nn.Module):
        def forward(self, x, y=None, scale=1.0):
            return (x + y) * scale

    x = torch.ones(2, 3)
    for batch in ((x, x), [x, x], {"x": x, "y": x}, {"x": x, "y": x, "scale": 1.0}):
        assert probe(Sum(), batch).rows[0]["rms_out"] == pytest.approx(2)
    encoding = t.BatchEncoding({"x": x, "y": x, "scale": 2.0})
    assert probe(Sum(), encoding).rows[0]["rms_out"] == pytest.approx(4)


def test_a_batch_of_one_and_a_part_that_gets_nothing():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return torch.cat([self.first(x[:1]), self.second(x[1:])])

    rows = probe(Routed(), torch.ones(1, 4)).rows
    assert [row["name"] for row in rows] == ["first"]


def test_gradients_do_not_overflow_in_half_precision():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))).to(torch.float16)
    rows = probe(model, torch.ones(4, 8, dtype=torch.float16)).rows
    assert all(math.isfinite(row["rms_grad"]) and row["rms_grad"] > 0 for row in rows)


def test_under_autocast():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = probe(model, torch.ones(4, 8)).rows
    assert rows[0]["rms_out"] == pytest.approx(probe(model, torch.ones(4, 8)).rows[0]["rms_out"], rel=1e-2)


def test_a_functional_head_beside_modules():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.weight = nn.Linear(4, 4), nn.Parameter(torch.eye(4) * 3)

        def forward(self, x):
            return F.linear(self.layer(x), self.weight)

    assert probe(Head(), torch.ones(2, 4)).rows[0]["rms_grad"] == pytest.approx(3)


def test_torchscript_inside_a_model_has_no_rows_and_keeps_its_state():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train())
    before = {name: value.clone() for name, value in scripted.state_dict().items()}
    model = nn.Sequential(nn.Linear(4, 4), scripted, nn.Tanh())
    rows = probe(model, torch.randn(5, 4)).rows
    assert [row["name"] for row in rows] == ["0", "2"]
    assert rows[0]["rms_grad"] > 0
    assert_same(before, dict(scripted.state_dict()))
    with pytest.raises(TypeError, match="TorchScript"):
        probe(scripted, torch.ones(2, 4))


@pytest.mark.slow
def test_outputs_and_caches_of_models_can_be_in_the_batch():
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = t.T5ForConditionalGeneration(t.T5Config(decoder_start_token_id=0, **sizes)).eval()
    encoded = model.encoder(ids())
    rows = probe(model, {"encoder_outputs": encoded, "decoder_input_ids": ids()}).rows
    assert rows[0]["name"].startswith("decoder")
    assert encoded.last_hidden_state.grad_fn is not None
    gpt = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1))
    cache = gpt.eval()(ids(), use_cache=True).past_key_values
    rows = probe(gpt, {"input_ids": ids()[:, :1], "past_key_values": cache}).rows
    assert cache.get_seq_length() == 6
    assert max(row["attention_entropy"] or 0 for row in rows) == pytest.approx(math.log(7), rel=1e-3)
