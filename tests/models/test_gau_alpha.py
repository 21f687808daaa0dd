import json
import math
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from kexue.models import GAUAlphaConfig, GAUAlphaForMaskedLM, GAUAlphaModel
from reference import gated_attention_softmax as reference

SIZES = {
    "vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "attention_key_size": 8,
}  # fmt: skip


def config(**options):
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return GAUAlphaConfig(**{**SIZES, **plain, **options})


def build(kind=GAUAlphaForMaskedLM, seed=0, **options):
    torch.manual_seed(seed)
    return kind(config(**options)).eval()


def ids(batch=3, length=20, seed=1):
    return torch.randint(1, 30, (batch, length), generator=torch.Generator().manual_seed(seed))


def norm(x):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-12)


def hidden_states(model, input_ids, mask, segments):
    """The published formula, all hidden states, from the parameters by name."""
    p = dict(model.named_parameters())
    words = p["gau_alpha.embeddings.word_embeddings.weight"][input_ids]
    states = [norm(words + p["gau_alpha.embeddings.token_type_embeddings.weight"][segments])]
    for number in range(3):
        x = states[-1]
        name = f"gau_alpha.encoder.layer.{number}.gau."
        u, v, z = reference.silu(x @ p[f"{name}i_dense.weight"].T).split([24, 24, 8], -1)
        q, k = (reference.rotate(z * p[f"{name}{side}_scaleoffset.weight"]) for side in "qk")
        out = (u * (reference.weights(q, k, "softmax_plus", mask=mask) @ v)) @ p[f"{name}o_dense.weight"].T
        states.append(norm(x + out))
    return states


def test_parameters_have_the_names_of_published_checkpoints_and_nothing_else():
    model = build()
    names = {"cls.predictions.decoder.weight"}
    names |= {f"gau_alpha.embeddings.{kind}_embeddings.weight" for kind in ("word", "token_type")}
    for number in range(3):
        parts = ("i_dense", "o_dense", "q_scaleoffset", "k_scaleoffset")
        names |= {f"gau_alpha.encoder.layer.{number}.gau.{part}.weight" for part in parts}
    assert set(model.state_dict()) == names
    assert model.cls.predictions.decoder.weight is model.gau_alpha.embeddings.word_embeddings.weight


def test_outputs_loss_and_every_gradient_equal_the_formula():
    model = build().double()
    input_ids, segments, mask = ids(), ids(seed=2) % 2, torch.ones(3, 20, dtype=torch.bool)
    mask[1, 13:] = False
    labels = ids(seed=3).masked_fill(torch.rand(3, 20, generator=torch.Generator().manual_seed(4)) < 0.8, -100)
    output = model(input_ids, mask, segments, labels=labels, output_hidden_states=True)
    states = hidden_states(model, input_ids, mask, segments)
    logits = states[-1] @ model.gau_alpha.embeddings.word_embeddings.weight.T
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.hidden_states, tuple(states))
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.loss, loss)
    parameters = tuple(model.parameters())
    got, want = torch.autograd.grad(output.loss, parameters), torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(got, want)


def test_published_state_dicts_load_strictly_and_by_from_pretrained(tmp_path):
    from safetensors.torch import save_file

    source = build(seed=3)
    tensors = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    target = build(seed=4)
    target.load_state_dict(tensors, strict=True)
    expected = source(ids()).logits
    assert torch.equal(target(ids()).logits, expected)
    # a folder as the port writes it: every tensor, and keys of its own in the config
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    published = {
        **SIZES, "architectures": ["GAUAlphaForMaskedLM"], "attention_probs_dropout_prob": 0.1, "attention_scale": True,
        "classifier_dropout": 0.1, "embedding_size": 16, "gradient_checkpointing": False, "hidden_act": "swish",
        "hidden_dropout_prob": 0.1, "initializer_range": 0.02, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
        "model_type": "gau_alpha", "normalization": "softmax_plus", "pad_token_id": 0, "torch_dtype": "float32",
        "transformers_version": "4.17.0", "type_vocab_size": 2, "use_bias": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published), encoding="utf-8")
    loaded, report = GAUAlphaForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(ids()).logits, expected)
    assert loaded.cls.predictions.decoder.weight is loaded.gau_alpha.embeddings.word_embeddings.weight
    base = GAUAlphaModel.from_pretrained(tmp_path)
    assert torch.equal(base(ids()).last_hidden_state, source.gau_alpha(ids()).last_hidden_state)


@pytest.mark.parametrize(
    "options", [{}, {"tie_word_embeddings": False}, {"use_bias": True, "normalization": "softmax"}]
)
def test_saving_and_loading_gives_the_same_model(tmp_path, options):
    model = build(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    again = GAUAlphaForMaskedLM.from_pretrained(tmp_path)
    saved, loaded = (m.config.to_dict() | {"_name_or_path": ""} for m in (model, again))
    assert loaded == saved
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(again(ids()).logits, model(ids()).logits)
    tied = again.cls.predictions.decoder.weight is again.gau_alpha.embeddings.word_embeddings.weight
    assert tied is model.config.tie_word_embeddings


def test_the_auto_classes_find_a_saved_model(tmp_path):
    from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

    model = build()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is GAUAlphaConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is GAUAlphaModel
    assert torch.equal(AutoModelForMaskedLM.from_pretrained(tmp_path)(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("normalization", ["softmax_plus", "squared_relu", "relu2_sum"])
def test_padding_changes_nothing(normalization):
    model = build(normalization=normalization).double()
    short = ids(1, 7)
    padded = torch.cat([short, torch.full((1, 5), 0)], 1)
    mask = torch.arange(12)[None] < 7
    alone = model(short).logits
    for given in (mask, mask.long(), mask.double(), None):  # None: pad_token_id says it
        torch.testing.assert_close(model(padded, given).logits[:, :7], alone)
    junk = padded.masked_fill(~mask, 9)
    torch.testing.assert_close(model(junk, mask).logits[:, :7], alone)
    both = model(torch.cat([ids(1, 12, 5), padded]), torch.cat([torch.ones_like(mask), mask])).logits
    torch.testing.assert_close(both[1:, :7], alone)
    assert not torch.allclose(
        build(normalization=normalization, pad_token_id=None).double()(padded).logits[:, :7], alone
    )


def test_hidden_samples_and_empty_batches_stay_finite():
    model = build()
    assert torch.isfinite(model(torch.zeros(2, 5, dtype=torch.long)).logits).all()
    for shape in ((0, 5), (2, 0)):
        output = model(torch.zeros(shape, dtype=torch.long), labels=torch.zeros(shape, dtype=torch.long))
        assert output.logits.shape == (*shape, 30)
        assert float(output.loss.detach()) == 0


def test_no_label_is_no_loss():
    output = build()(ids(), labels=torch.full((3, 20), -100))
    output.loss.backward()
    assert float(output.loss.detach()) == 0


def test_outputs_follow_the_conventions_of_transformers():
    model = build().double()
    output = model(ids(), output_attentions=True, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    assert [tuple(a.shape) for a in output.attentions] == [(3, 1, 20, 20)] * 3
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(3, 1, 20, dtype=torch.float64))
    plain = model(ids())
    torch.testing.assert_close(plain.logits, output.logits)
    assert plain.attentions is None
    assert plain.hidden_states is None
    logits, states = model(ids(), output_hidden_states=True, return_dict=False)
    assert torch.equal(logits, plain.logits)
    assert len(states) == 4
    loss, logits = model(ids(), labels=ids(), return_dict=False)
    assert torch.equal(loss, model(ids(), labels=ids()).loss)
    assert len(model.gau_alpha(ids(), return_dict=False)) == 1


def test_embeddings_can_be_given_instead_of_ids():
    model = build()
    words = model.get_input_embeddings()(ids())
    assert torch.equal(model(inputs_embeds=words).logits, model(ids()).logits)
    (grad,) = torch.autograd.grad(model(inputs_embeds=words.detach().requires_grad_(), labels=ids()).loss, [
        next(iter(model.parameters()))
    ])  # fmt: skip
    assert torch.isfinite(grad).all()


def test_resized_vocabularies_keep_their_rows_and_stay_tied():
    model = build()
    before = model(ids()).logits
    model.resize_token_embeddings(37)
    after = model(ids(), labels=ids()).logits
    assert after.shape == (3, 20, 37)
    torch.testing.assert_close(after[..., :30], before)
    assert model.cls.predictions.decoder.weight is model.gau_alpha.embeddings.word_embeddings.weight
    assert model.config.vocab_size == 37


def test_start_values_are_those_of_the_paper():
    torch.manual_seed(0)
    model = GAUAlphaModel(GAUAlphaConfig(12000, 64, 128, 8, 32))
    layer = model.encoder.layer[0].gau

    def check(weight, width):
        std = 1.13684723 / math.sqrt(width) * 8 ** (-1 / 3)
        weight = weight.detach()
        assert float(weight.abs().max()) <= 2 * std
        # cutting a normal at two standard deviations leaves 0.8796 of it
        assert float(weight.std()) == pytest.approx(0.8796 * std, rel=0.03)

    check(layer.i_dense.weight, 64)
    check(layer.o_dense.weight, 128)
    check(model.embeddings.word_embeddings.weight[1:], 64)  # 12000 rows are above 10000: columns count
    assert not model.embeddings.word_embeddings.weight[0].any()
    assert float(model.embeddings.token_type_embeddings.weight.detach().std()) == pytest.approx(0.0625, rel=0.2)
    small = GAUAlphaModel(GAUAlphaConfig(4000, 64, 128, 8, 32))
    check(small.embeddings.word_embeddings.weight[1:], 4000)
    assert bool((layer.q_scaleoffset.weight == 1).all())


def test_dropout_acts_in_training_only():
    model = build(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    assert torch.equal(model(ids()).logits, model(ids()).logits)
    model.train()
    assert not torch.equal(model(ids()).logits, model(ids()).logits)
    only = build(attention_probs_dropout_prob=0.5).train()
    assert not torch.equal(only(ids()).logits, only(ids()).logits)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_activations_give_the_same_gradients(dropout):
    def gradients(checkpointing):
        model = build(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.gau_alpha.encoder.gradient_checkpointing
        torch.manual_seed(7)
        model(ids(), labels=ids()).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    torch.testing.assert_close(gradients(True), gradients(False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_close(dtype):
    model = build()
    exact = model(ids(), labels=ids())
    low = build().to(dtype)(ids(), labels=ids())
    assert low.logits.dtype == dtype
    assert float(low.loss.detach()) == pytest.approx(float(exact.loss.detach()), rel=1e-2)
    low.loss.backward()


@pytest.mark.slow
def test_the_model_compiles_as_one_graph():
    torch.compiler.reset()
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask = torch.ones(3, 20, dtype=torch.long)
    torch.testing.assert_close(compiled(ids(), mask, labels=ids()).loss, model(ids(), mask, labels=ids()).loss)


@pytest.mark.slow
def test_the_trainer_of_transformers_trains_it(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = build(num_hidden_layers=2)
    rows = []
    for row in ids(64, 10):
        masked = torch.arange(10) % 5 == 2
        rows.append({
            "input_ids": row.masked_fill(masked, 29), "attention_mask": torch.ones(10, dtype=torch.long),
            "labels": torch.where(masked, row * 0 + 5, -100),
        })  # fmt: skip
    arguments = TrainingArguments(
        tmp_path, max_steps=40, per_device_train_batch_size=16, gradient_accumulation_steps=2, learning_rate=5e-3,
        report_to=[], save_strategy="no", use_cpu=True, logging_steps=5, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert 1 < losses[0] < 5  # the mean of one batch, not the sum over accumulated ones
    assert losses[-1] < 0.3 * losses[0]


def test_the_package_stays_free_of_transformers_until_a_model_is_used():
    code = "import sys, kexue.models, kexue.attention; print('transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "False"


BAD = [
    ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1; got 0"),
    ({"hidden_size": 16.0}, TypeError, "hidden_size must be an integer"),
    ({"num_hidden_layers": 0}, ValueError, "num_hidden_layers"),
    ({"attention_key_size": 7}, ValueError, "attention_key_size must be even.*got 7"),
    ({"hidden_dropout_prob": 1}, ValueError, "hidden_dropout_prob must be below 1"),
    ({"attention_probs_dropout_prob": -1}, ValueError, "attention_probs_dropout_prob"),
    ({"pad_token_id": 30}, ValueError, "pad_token_id must be below vocab_size, 30; got 30"),
    ({"normalization": "sigmoid"}, ValueError, "normalization must be one of"),
    ({"hidden_act": "gelu"}, ValueError, "hidden_act"),
    ({"attention_scale": False}, ValueError, "attention_scale"),
    ({"embedding_size": 8}, ValueError, "embedding_size must be hidden_size, 16.*got 8"),
    ({"attention_min_length": 1}, ValueError, "attention_min_length"),
    ({"layer_norm_eps": 0}, ValueError, "layer_norm_eps"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_configs_are_rejected(options, error, message):
    with pytest.raises(error, match=message):
        config(**options)


def test_bad_calls_are_rejected():
    model = build()
    with pytest.raises(ValueError, match="got neither"):
        model()
    with pytest.raises(ValueError, match="got both"):
        model(ids(), inputs_embeds=torch.zeros(3, 20, 16))
    with pytest.raises(ValueError, match="input_ids must be"):
        model(ids()[0])
    with pytest.raises(ValueError, match=r"inputs_embeds must be \(B, T, 16\)"):
        model(inputs_embeds=torch.zeros(3, 20, 15))
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(3, 20\)"):
        model(ids(), torch.ones(3, 1, 20, 20))
    with pytest.raises(ValueError, match="got values from -10000 to 0"):
        model(ids(), torch.cat([torch.zeros(3, 19), torch.full((3, 1), -1e4)], 1))
    with pytest.raises(ValueError, match="token_type_ids must have shape"):
        model(ids(), token_type_ids=ids(3, 19))
    with pytest.raises(ValueError, match="labels must have shape"):
        model(ids(), labels=ids(3, 19))
