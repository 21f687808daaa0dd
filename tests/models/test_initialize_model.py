"""What holds for every scheme: ties, dtypes, seeds, refusals; models of this package."""

import pytest
import torch
import transformers as t
from torch import nn

from kexue.models import (
    GAUAlphaConfig,
    GAUAlphaForMaskedLM,
    NTKLinear,
    ScheduledResidual,
    extend_positions,
    initialization_plan,
    initialize_model,
    truncated_normal_,
)
from models.scheme_models import FF, HF, D, V, build, g, state

pytestmark = pytest.mark.slow  # each builds models of transformers


@pytest.mark.parametrize("scheme", ["lecun", "gpt2", "bert"])
def test_own_layers_keep_their_own_rules(scheme):
    model = nn.Sequential(NTKLinear(200, 100), ScheduledResidual(nn.Linear(100, 100), learnable=True))
    with torch.no_grad():
        model[1].alpha.fill_(3.0)
    initialize_model(model, scheme, g())
    assert float(model[1].alpha.detach()) == 0
    assert float(model[0].weight.detach().std()) == pytest.approx(1, rel=0.02)
    assert not model[0].bias.any()


def test_models_of_this_package():
    config = GAUAlphaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=FF, num_hidden_layers=2, attention_key_size=16
    )
    model = extend_positions(build("bert"), 500)
    initialize_model(model, "bert", g())
    table = model.bert.embeddings.position_embeddings.weight.detach()
    assert float(table.std()) == pytest.approx(0.0175925, rel=0.06)
    for scheme in ("lecun", "ntk"):
        gau = initialize_model(GAUAlphaForMaskedLM(config), scheme, g()).eval()
        assert torch.isfinite(gau(torch.arange(20)[None]).logits).all()


def test_norms_that_add_one_to_their_gain_get_zero():
    config = t.GemmaConfig(head_dim=12, num_key_value_heads=2, **HF)
    model = initialize_model(t.GemmaForCausalLM(config), "lecun", g())
    gains = [p for key, p in model.named_parameters() if "norm" in key]
    assert gains
    assert not any(p.any() for p in gains)
    llama = initialize_model(build("llama"), "lecun", g())
    assert all((p == 1).all() for key, p in llama.named_parameters() if "norm" in key)


def test_the_same_seed_gives_the_same_model_and_other_random_numbers_are_left_alone():
    first, second = build("bert"), build("bert")
    initialize_model(first, "lecun", g(3))
    torch.rand(5)
    before = torch.get_rng_state()
    initialize_model(second, "lecun", g(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    initialize_model(second, "lecun", g(4))
    tables = [model.bert.embeddings.word_embeddings.weight for model in (first, second)]
    assert not torch.equal(*tables)


def test_tied_tensors_are_drawn_once_and_stay_tied():
    model = build("bert")
    rows = [row.name for row in initialization_plan(model, "lecun")]
    assert len(rows) == len(set(rows)) == len(list(model.parameters()))
    initialize_model(model, "lecun", g())
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    shared = nn.Linear(6, 6)
    twice = nn.Sequential(shared, nn.ReLU(), shared)
    generator = g()
    initialize_model(twice, "lecun", generator)
    expected = truncated_normal_(torch.empty(6, 6), 6**-0.5, generator=g())
    assert torch.equal(shared.weight, expected)
    views = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    views[1].weight = nn.Parameter(views[0].weight.detach())  # two Parameters, one memory
    assert len(initialization_plan(views, "lecun")) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_dtypes_and_frozen_parameters(dtype):
    model = build("bert").to(dtype)
    model.bert.encoder.layer[0].requires_grad_(False)
    initialize_model(model, "bert", g())
    for p in model.parameters():
        assert p.dtype == dtype
        if p.numel() > 2000:
            assert float(p.detach().double().std()) == pytest.approx(0.0175925, rel=0.06)
            assert float(p.detach().double().abs().max()) <= 0.04


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_tables_of_sines_and_cosines_stay_and_other_frozen_tables_do_not(dtype):
    whisper = t.WhisperConfig(
        vocab_size=V, d_model=D, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=FF, decoder_ffn_dim=FF, max_source_positions=30,
        pad_token_id=1, decoder_start_token_id=2, bos_token_id=3, eos_token_id=2,
    )  # fmt: skip
    for model, name in (
        (t.WhisperModel(whisper), "encoder.embed_positions.weight"),
        (t.RoFormerModel(t.RoFormerConfig(**{**HF, "embedding_size": D})), "encoder.embed_positions.weight"),
    ):
        for p in model.to(dtype).parameters():
            p.requires_grad_(False)
        before = state(model)
        initialize_model(model, "lecun", g())
        same = [key for key, p in model.named_parameters() if p.dim() > 1 and torch.equal(p, before[key])]
        assert same == [name]
        assert name not in {row.name for row in initialization_plan(model)}


def test_class_tokens_and_positions_that_are_no_module_are_look_ups():
    config = t.ViTConfig(
        hidden_size=D, intermediate_size=FF, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=4
    )
    model = t.ViTModel(config, use_mask_token=True)
    for scheme, std in (("lecun", 1.0), ("fixup", D**-0.5), ("gpt2", 0.02), ("bert", 0.0175925)):
        initialize_model(model, scheme, g())
        assert float(model.embeddings.position_embeddings.detach().std()) == pytest.approx(std, rel=0.06)
        for token in (model.embeddings.cls_token, model.embeddings.mask_token):
            assert float(token.detach().std()) == pytest.approx(std, rel=0.5)


def test_a_model_with_unknown_parameters_is_refused_or_left():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.linear, self.gru = nn.Parameter(torch.full((3,), 5.0)), nn.Linear(3, 3), nn.GRU(3, 3)

    model = Own()
    before = state(model)
    with pytest.raises(ValueError, match=r"no rule knows scale, gru.weight_ih_l0, .*unknown='leave'"):
        initialize_model(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    initialize_model(model, unknown="leave")
    assert torch.equal(model.scale, before["scale"])
    assert torch.equal(model.gru.weight_ih_l0, before["gru.weight_ih_l0"])
    assert not torch.equal(model.linear.weight, before["linear.weight"])


def test_a_matrix_in_a_module_that_is_called_a_norm_is_no_gain():
    class NormLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

    with pytest.raises(ValueError, match="no rule knows weight"):
        initialize_model(NormLinear())


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (
            nn.Linear(2, 2),
            {"scheme": "kaiming"},
            ValueError,
            "scheme must be one of 'lecun', 'xavier', .*got 'kaiming'",
        ),
        (nn.Linear(2, 2), {"std": 0.1}, ValueError, "scheme 'lecun' does not read std; it reads mode, nonlinearity"),
        (
            nn.Linear(2, 2),
            {"scheme": "ntk", "mode": "fan_in"},
            ValueError,
            "'ntk' does not read mode; it reads no options",
        ),
        (nn.Linear(2, 2), {"mode": "fan_avg"}, ValueError, "mode must be one of"),
        (nn.Linear(2, 2), {"nonlinearity": "relux"}, ValueError, "got 'relux'"),
        (nn.Linear(2, 2), {"distribution": "cauchy"}, ValueError, "distribution must be one of"),
        (nn.Linear(2, 2), {"scheme": "bert", "std": 0}, ValueError, "std must be greater than 0"),
        (nn.Linear(2, 2), {"scheme": "t5", "factor": -1}, ValueError, "factor must be greater than 0"),
        (
            nn.Linear(2, 2),
            {"scheme": "t5", "qk_split": "k"},
            ValueError,
            "qk_split must be one of 'q', 'both'; got 'k'",
        ),
        (nn.Linear(2, 2), {"scheme": "deepnorm", "post_norm": False}, ValueError, "post_norm must be True or None"),
        (nn.Linear(2, 2), {"unknown": "skip"}, ValueError, "unknown must be one of 'error', 'leave'"),
        (nn.Linear(2, 2), {"generator": 3}, TypeError, "generator must be a torch.Generator or None"),
        (nn.Linear(2, 2).to("meta"), {}, ValueError, "weight must have memory; got a tensor on the meta device"),
        (nn.LazyLinear(2), {}, ValueError, "weight has no shape yet"),
        (nn.Linear(2, 2).half(), {"scheme": "gpt2", "std": 1e-9}, ValueError, "std must be at least"),
        (torch.zeros(2), {}, TypeError, "model must be a torch.nn.Module; got Tensor"),
        ("bert", {}, TypeError, "model must be a torch.nn.Module; got str"),
    ],
)
def test_bad_input_is_refused_and_the_model_is_unchanged(model, options, error, message):
    ready = isinstance(model, nn.Linear) and not isinstance(model, nn.LazyLinear) and not model.weight.is_meta
    before = state(model) if ready else {}
    with pytest.raises(error, match=message):
        initialize_model(model, **options)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_an_empty_parameter_and_one_of_integers_are_refused_by_name():
    empty = nn.Sequential(nn.Linear(3, 3), nn.Embedding(0, 3))
    with pytest.raises(ValueError, match=r"1.weight must not be empty; got shape \(0, 3\)"):
        initialize_model(empty)
    whole = nn.Module()
    whole.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="codes must be of dtype .*; got torch.int8"):
        initialize_model(whole)


def test_the_plan_changes_nothing_and_a_model_without_parameters_is_fine():
    model = build("bert")
    before, rng = state(model), torch.get_rng_state()
    rows = initialization_plan(model, "ntk")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert any(isinstance(m, nn.Linear) for m in model.modules())
    assert {row.std for row in rows} == {0.0, 1.0}
    assert initialization_plan(nn.ReLU()) == []
    assert isinstance(initialize_model(nn.ReLU()), nn.ReLU)
