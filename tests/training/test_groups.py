"""Parameter groups: rates by depth and by name, decay, ties, and what optimizers and loops do with them."""

import importlib.util
import math

import pytest
import torch
import transformers as t
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kexue.training import default_optimizers, fit, layer_depths, newest_checkpoint, param_groups
from reference.layerwise_learning_rates import rate, train
from training.layered import Block, Classifier, batches, chain

SIZES = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}


def bert(layers=2, head=t.BertForSequenceClassification):
    torch.manual_seed(0)
    return head(t.BertConfig(**SIZES, num_hidden_layers=layers))


def rates(groups):
    """Name -> (rate, decay); every name once."""
    found = {}
    for group in groups:
        for name, _ in group["params"]:
            assert name not in found
            found[name] = (group["lr"], group["weight_decay"])
    return found


class Model(nn.Module):
    def __init__(self, layers, kinds, tied):
        super().__init__()
        self.embeddings = nn.ModuleDict({"word": nn.Embedding(5, 3), "norm": nn.LayerNorm(3)})
        self.layers = nn.ModuleList([Block(3, kinds[n % len(kinds)]) for n in range(layers)])
        self.pooler = nn.Linear(3, 3)
        self.classifier = nn.Linear(3, 5)
        if tied:
            self.classifier.weight = self.embeddings["word"].weight


@st.composite
def requests(draw):
    model = Model(draw(st.integers(1, 5)), draw(st.lists(st.integers(0, 2), min_size=1)), draw(st.booleans()))
    names = [name for name, _ in model.named_parameters()]
    patterns = st.sampled_from(["*", "*.weight", "*.norm.*", "layers.0.*", "classifier.*", "layers.*.bias*", *names])
    patterns = patterns.filter(lambda p: not (p == "layers.*.bias*" and not any("linear.bias" in n for n in names)))
    rules = draw(st.dictionaries(patterns, st.floats(0, 100), max_size=4))
    frozen = draw(st.sets(st.sampled_from(names), max_size=len(names) - 1))
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    return model, rules, draw(st.floats(0.01, 1.0)), draw(st.floats(0, 10)), draw(st.floats(0, 1))


@settings(max_examples=150, deadline=None)
@given(requests())
def test_every_trained_parameter_once_with_the_rate_of_the_formula(request):
    model, rules, layer_decay, lr, weight_decay = request
    groups = param_groups(model, lr, layer_decay, rules, weight_decay)
    found = rates(groups)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(found) == set(trained)
    assert all(trained[name] is p for group in groups for name, p in group["params"])
    tied = model.classifier.weight is model.embeddings["word"].weight
    aliases = {"embeddings.word.weight": ["classifier.weight"]} if tied else {}
    head = len(model.layers) + 1
    for name, p in trained.items():
        part = name.split(".")[0]
        depth = {"embeddings": 0, "pooler": head - 1, "classifier": head}.get(part)
        depth = int(name.split(".")[1]) + 1 if depth is None else depth
        names = [name, *aliases.get(name, [])]
        once = {k: v for k, v in rules.items() if any(rate(n, 0, 0, 1.0, 1.0, {k: 2.0}) == 2.0 for n in names)}
        expected = rate("x", depth, head, lr, layer_decay, dict.fromkeys(["*"], math.prod(once.values())))
        assert found[name][0] == pytest.approx(expected, rel=1e-11, abs=1e-300)
        decays = p.ndim > 1
        assert found[name][1] == (weight_decay if decays else 0.0)
    # Equal settings share a group, in the order of the model.
    keys = [(f"{g['lr']:.12e}", g["weight_decay"]) for g in groups]
    assert len(set(keys)) == len(keys)
    order = list(trained)
    firsts = [order.index(g["params"][0][0]) for g in groups]
    assert firsts == sorted(firsts)
    for group in groups:
        places = [order.index(name) for name, _ in group["params"]]
        assert places == sorted(places)


def test_the_rates_of_a_bert():
    groups = param_groups(bert(), lr=2e-5, layer_decay=0.9, rules={"*.embeddings.*": 0.1, "classifier.*": 10})
    found = rates(groups)
    expected = {
        "bert.embeddings.word_embeddings.weight": (2e-5 * 0.9**3 * 0.1, 0.01),
        "bert.embeddings.LayerNorm.weight": (2e-5 * 0.9**3 * 0.1, 0.0),
        "bert.encoder.layer.0.attention.self.query.weight": (2e-5 * 0.9**2, 0.01),
        "bert.encoder.layer.1.output.LayerNorm.weight": (2e-5 * 0.9, 0.0),
        "bert.encoder.layer.1.output.dense.bias": (2e-5 * 0.9, 0.0),
        "bert.pooler.dense.weight": (2e-5 * 0.9, 0.01),
        "classifier.weight": (2e-4, 0.01),
    }
    assert {name: found[name] for name in expected} == {k: pytest.approx(v, rel=1e-12) for k, v in expected.items()}
    assert len(groups) == 8  # two for each rate


def test_with_embeddings_spared_it_is_the_default_optimizer():
    model = bert(head=t.BertForMaskedLM)
    groups = param_groups(model, lr=1e-3, no_decay=["*_embeddings.weight"])
    (default,) = default_optimizers(model)
    for group in default.param_groups:
        (same,) = [g for g in groups if g["weight_decay"] == group["weight_decay"]]
        assert {id(p) for _, p in same["params"]} == {id(p) for p in group["params"]}
    assert len(groups) == 2
    assert len(param_groups(model, lr=1e-3, weight_decay=0.0)) == 1


def test_equal_rates_reached_by_different_products_share_a_group():
    assert 0.3 * 0.7 * 0.7 != 0.3 * 0.7**2  # in the last bit
    groups = param_groups(chain(), 0.3, layer_decay=0.7, rules={"2.*": 0.7, "4.*": 0.7**2}, weight_decay=0.0)
    assert [g["lr"] for g in groups] == [pytest.approx(0.147)]
    many = param_groups(bert(), 0.1, rules={name: 0.5 for name, _ in bert().named_parameters()})
    assert len(many) == 2


def test_norms_of_transformers_and_further_names_do_not_decay():
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(t.LlamaConfig(**SIZES, num_hidden_layers=1, bos_token_id=None, eos_token_id=None))
    decayed = {n for n, (_, decay) in rates(param_groups(model, 1.0)).items() if decay}
    assert all("proj" in n or n in ("lm_head.weight", "model.embed_tokens.weight") for n in decayed)
    assert len(decayed) == 9
    fewer = {
        n for n, (_, decay) in rates(param_groups(model, 1.0, no_decay=["lm_head.*", "*.q_proj.*"])).items() if decay
    }
    assert decayed - fewer == {"lm_head.weight", "model.layers.0.self_attn.q_proj.weight"}


def test_a_tied_tensor_is_in_one_group_and_answers_to_both_names():
    model = bert(head=t.BertForMaskedLM)
    name = "bert.embeddings.word_embeddings.weight"
    assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight
    found = rates(param_groups(model, 1.0, layer_decay=0.5, rules={"cls.predictions.decoder.weight": 8}))
    assert found[name] == (1.0, 0.01)  # 0.5^3 by its depth as an embedding, times 8
    assert "cls.predictions.decoder.weight" not in found


def test_frozen_parameters_are_left_out_and_their_patterns_are_known():
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    found = rates(param_groups(model, 1.0, rules={"*.embeddings.*": 0.1}))
    assert not any("embeddings" in name for name in found)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient; got BertForSequenceClassification"):
        param_groups(model, 1.0)


def test_a_multiplier_of_zero_keeps_the_parameter():
    model = chain()
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.AdamW(param_groups(model, 0.1, rules={"0.*": 0}))
    for _ in range(3):
        model(torch.ones(2, 3).double()).sum().backward()
        optimizer.step()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": [1]}, TypeError, "model must be"),
        ({"lr": -1.0}, ValueError, "lr must be at least 0.0; got -1.0"),
        ({"lr": math.nan}, ValueError, "lr must be finite; got nan"),
        ({"lr": "1e-3"}, TypeError, "lr must be a number; got '1e-3'"),
        ({"layer_decay": 0.0}, ValueError, "layer_decay must be greater than 0.0; got 0.0"),
        ({"layer_decay": 1.5}, ValueError, "layer_decay must be at most 1; got 1.5"),
        ({"layer_decay": math.nan}, ValueError, "layer_decay must be finite"),
        ({"rules": {"3.*": 1.0}}, ValueError, r"the pattern '3\.\*' of rules matches no parameter"),
        ({"rules": {"0.*": -1.0}}, ValueError, r"the multiplier of '0\.\*' must be at least 0\.0; got -1\.0"),
        ({"rules": {"0.*": math.nan}}, ValueError, "must be finite; got nan"),
        ({"rules": {"0.*": math.inf}}, ValueError, "must be finite; got inf"),
        ({"rules": {"0.*": "0.1"}}, TypeError, "must be a number"),
        ({"rules": {0: 1.0}}, TypeError, "a pattern of rules must be a str; got 0"),
        ({"rules": ["0.*"]}, TypeError, "rules must map patterns to multipliers; got list"),
        ({"rules": {"0.*": 1e300, "*.weight": 1e300}}, ValueError, "the rate of '0.weight' must be finite; got inf"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be at least 0.0"),
        ({"no_decay": ["bias"]}, ValueError, "the pattern 'bias' of no_decay matches no parameter"),
        ({"no_decay": "*.bias"}, TypeError, r"no_decay must be a list of patterns; got '\*\.bias'"),
        ({"no_decay": 3}, TypeError, "no_decay must be a list"),
        ({"where": "0.*"}, TypeError, "where must be a function"),
        ({"where": lambda name, p: False}, ValueError, "for which where is true"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, error, message):
    arguments = {"model": chain(), "lr": 0.1} | change
    with pytest.raises(error, match=message):
        param_groups(**arguments)


# -- with optimizers and loops -------------------------------------------------------------------------

KINDS = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {"fused": True}),
    "rmsprop": (torch.optim.RMSprop, {}),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_fifty_steps_equal_plain_loops_with_one_rate_for_each_tensor(kind):
    make, options = KINDS[kind]
    model, generator = chain(), torch.Generator().manual_seed(1)
    x, y = (torch.randn(16, n, generator=generator, dtype=torch.float64) for n in (3, 1))
    names, start = zip(*((n, p.detach().clone()) for n, p in model.named_parameters()), strict=True)

    def gradient(theta):
        leaves = {n: v.clone().requires_grad_() for n, v in zip(names, theta, strict=True)}
        loss = (torch.func.functional_call(model, leaves, x) - y).square().mean()
        return torch.autograd.grad(loss, list(leaves.values()))

    rules = {"2.*": 3.0, "*.bias": 0.5}
    depth = {"0": 1, "2": 2, "4": 3}
    speeds = [rate(n, depth[n[0]], 3, 0.01, 0.8, rules) for n in names]
    expected = train(gradient, start, speeds, kind, 50)
    optimizer = make(param_groups(model, 0.01, 0.8, rules, weight_decay=0.0), **options)
    for _ in range(50):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    for p, want, before in zip(model.parameters(), expected, start, strict=True):
        assert (p - want).abs().max() < 1e-12
        assert (p - before).abs().max() > 1e-4


@pytest.mark.parametrize(
    "make",
    [o for o in vars(torch.optim).values() if isinstance(o, type) and issubclass(o, torch.optim.Optimizer)
     and o.__name__ not in ("Optimizer", "LBFGS", "Muon", "SparseAdam")],
)  # fmt: skip
def test_every_optimizer_of_torch_takes_the_groups_and_knows_the_names(make):
    model = chain()
    optimizer = make(param_groups(model, 0.01, layer_decay=0.5))
    assert [n for g in optimizer.param_groups for n in g["param_names"]] == [n for n, _ in model.named_parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):  # Adafactor-like methods may wait for a second gradient
        optimizer.zero_grad()
        model(torch.ones(2, 3).double()).sum().backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon yet")
def test_where_splits_a_model_between_two_optimizers(tmp_path):
    model = chain()

    def matrix(name, p):
        return p.ndim == 2

    muon = torch.optim.Muon(param_groups(model, 0.02, 0.5, where=matrix))
    rest = torch.optim.AdamW(param_groups(model, 0.01, 0.5, where=lambda n, p: not matrix(n, p)))
    assert sum(len(g["params"]) for o in (muon, rest) for g in o.param_groups) == 6

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).square().mean()

    result = fit(WithLoss(), [{"x": torch.ones(4, 3).double()}], steps=20, out=tmp_path, optimizer=[muon, rest])
    assert result.loss < result.history[0]


def run(out, steps=12, stop=None, **options):
    model = Classifier()
    optimizer = torch.optim.AdamW(param_groups(model, 0.02, 0.5, {"head.*": 2.0}), fused=True)

    def on_step(record):
        return record["step"] == stop

    settings = {"steps": steps, "save_every": 4, "warmup": 3, "optimizer": optimizer, "on_step": on_step} | options
    return model, optimizer, fit(model, batches, out=out, **settings)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "schedule": "cosine"}, {"precision": "bf16"}])
def test_fit_keeps_the_ratios_and_resumes_bit_for_bit(tmp_path, options):
    expected, optimizer, whole = run(tmp_path / "whole", **options)
    tops = [g["lr"] for g in param_groups(Classifier(), 0.02, 0.5, {"head.*": 2.0})]
    now = [g["lr"] for g in optimizer.param_groups]
    factor = now[0] / tops[0]
    assert 0 < factor < 1
    assert now == pytest.approx([factor * top for top in tops])
    run(tmp_path / "stopped", stop=6, **options)
    model, _, result = run(tmp_path / "stopped", **options)
    assert result.history == whole.history
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    names = newest_checkpoint(tmp_path / "whole").optimizers[0]["param_groups"][0]["param_names"]
    assert names == ["table.weight"]


def test_the_metrics_name_the_largest_rate(tmp_path):
    seen = []
    model = Classifier()
    optimizer = torch.optim.SGD(param_groups(model, 0.1, 0.5))
    fit(model, batches, steps=2, out=tmp_path, optimizer=optimizer, schedule="constant",
        on_step=lambda record: seen.append(record["lr"]))  # fmt: skip
    assert seen == [0.1, 0.1]


def test_schedulers_of_torch_scale_every_group():
    optimizer = torch.optim.AdamW(param_groups(chain(), 0.1, layer_decay=0.5, weight_decay=0.0))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.0125, 0.025, 0.05])


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="Trainer needs accelerate")
def test_the_trainer_of_transformers_takes_the_optimizer(tmp_path):
    model = bert()
    optimizer = torch.optim.AdamW(param_groups(model, 1e-3, layer_decay=0.5))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    data = [{"input_ids": torch.arange(1, 9) + n, "labels": torch.tensor(n % 2)} for n in range(8)]
    arguments = t.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=2, report_to=[], use_cpu=True,
        lr_scheduler_type="constant", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    t.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()
    moved = {n: (p - before[n]).abs().max().item() for n, p in model.named_parameters()}
    assert moved["classifier.weight"] > 0
    # Adam's first steps are as large as the rate.
    for name, depth in layer_depths(model).depth.items():
        if name.endswith("dense.weight"):
            assert moved[name] == pytest.approx(2e-3 * 0.5 ** (3 - depth), rel=0.1)


def test_tables_with_sparse_gradients_do_not_decay():
    model = nn.ModuleList([nn.Embedding(9, 4, sparse=True), nn.Embedding(9, 4)])
    decays = {name: group["weight_decay"] for group in param_groups(model, lr=0.1) for name, _ in group["params"]}
    assert decays == {"0.weight": 0.0, "1.weight": 0.01}
    optimizer = torch.optim.SGD(param_groups(model, lr=0.1), momentum=0.9)
    sum(table(torch.tensor([1, 1])).sum() for table in model).backward()
    optimizer.step()
