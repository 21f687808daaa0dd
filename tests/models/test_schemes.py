"""Schemes applied to whole models, tiny ones: every tensor's realised std against the one asked for."""

import math

import pytest
import torch
import transformers as t
from torch import nn

from kexue.models import NTKLinear, deepnorm_constants, initialization_plan, initialize_model
from models.scheme_models import FF, HEADS, HF, LAYERS, T5, D, V, build, check, g, is_table, norm_or_bias, state
from reference.non_square_initialization import MEANS

pytestmark = pytest.mark.slow  # each builds models of transformers

ENCODER_LIKE = ["bert", "bert classifier", "roberta", "distilbert", "gpt2", "llama", "bart", "opt", "t5"]


@pytest.mark.parametrize("name", ENCODER_LIKE)
@pytest.mark.parametrize("scheme", ["lecun", "he"])
def test_variances_by_fan_in(name, scheme):
    model = build(name)
    tied = any(p is q for p in [model.get_input_embeddings().weight] for q in head_weights(model))

    def expected(key, p):
        if norm_or_bias(key, p) is not None:
            return norm_or_bias(key, p)
        if "relative" in key:
            return 0.0
        if is_table(key) and "LayerNorm" not in key:
            return p.shape[1] ** -0.5 if tied else 1.0
        fan_in = p.shape[0] if "transformer.h." in key else p.shape[1]  # Conv1D is (in, out)
        return ((2 if scheme == "he" else 1) / fan_in) ** 0.5

    check(model, scheme, expected)


def head_weights(model):
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [] if head is None else [head.weight]


@pytest.mark.parametrize("mode", [None, "geometric", "contraharmonic", "fan_out"])
def test_fused_matrices_are_initialised_by_thirds(mode):
    model, used = build("gpt2"), MEANS[mode or "arithmetic"]

    def expected(key, p):
        if norm_or_bias(key, p) is not None:
            return norm_or_bias(key, p)
        if is_table(key):
            return D**-0.5
        m, n = p.shape
        return used(m, n // 3 if "c_attn" in key else n) ** -0.5

    check(model, "xavier", expected, mode=mode)
    parts = [row for row in initialization_plan(model, "xavier") if "c_attn.weight" in row.name]
    assert [row.name.split()[-1] for row in parts] == ["(query)", "(key)", "(value)"] * LAYERS


@pytest.mark.parametrize("kdim", [None, 40])
def test_multihead_attention(kdim):
    model = nn.MultiheadAttention(64, 4, kdim=kdim, vdim=kdim, add_bias_kv=True)

    def expected(key, p):
        if "bias" in key:
            return 0.0
        inputs = kdim if kdim and key[0] in "kv" else 64
        return (2 / (inputs + 64)) ** 0.5  # of (192, 64) as of its thirds (64, 64)

    check(model, "xavier", expected)
    seen = [row.name for row in initialization_plan(model, "xavier") if "proj_weight" in row.name]
    assert len(seen) == 3


def test_convolutions_by_their_own_fans():
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3, groups=4), nn.BatchNorm2d(32), nn.PReLU(32), nn.ConvTranspose2d(32, 16, (3, 5), groups=2),
        nn.Conv1d(16, 64, 7), nn.ConvTranspose1d(64, 48, 2), nn.GroupNorm(4, 48), nn.InstanceNorm1d(48, affine=True),
    )  # fmt: skip
    fan_in = {"0.weight": 4 * 9, "3.weight": 16 * 15, "4.weight": 16 * 7, "5.weight": 64 * 2}
    fan_out = {"0.weight": 8 * 9, "3.weight": 8 * 15, "4.weight": 64 * 7, "5.weight": 48 * 2}
    before = {k: b.clone() for k, b in model.named_buffers()}

    def expected(key, p, fans=fan_in):
        if key == "2.weight":
            return 0.25
        return fans[key] ** -0.5 if key in fans else norm_or_bias(key, p)

    check(model, "lecun", expected)
    check(model, "lecun", lambda key, p: expected(key, p, fan_out), mode="fan_out", distribution="uniform")
    check(
        model, "he", lambda key, p: expected(key, p) * (2 / 1.0001 if key in fan_in else 1) ** 0.5, nonlinearity=lrelu
    )
    for key, b in model.named_buffers():
        assert torch.equal(b, before[key])


def lrelu(x):
    return torch.nn.functional.leaky_relu(x, 0.01)


@pytest.mark.parametrize("split", ["q", "both"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_t5_is_its_table(split, gated, tied):
    change = {"feed_forward_proj": "gated-gelu" if gated else "relu", "tie_word_embeddings": tied}
    model = build("t5", **change)
    factor = {"q": 16**-0.5, "both": 16**-0.25}[split]

    def expected(key, p):
        if key.startswith(("shared", "lm_head")):
            return 0.5
        if norm_or_bias(key, p) is not None:
            return norm_or_bias(key, p)
        leaf = key.split(".")[-2]
        std = {"o": (5 * 16) ** -0.5, "wo": FF**-0.5}.get(leaf, D**-0.5)  # q, k, v, wi, wi_0, wi_1, relative bias
        if leaf == "q" or (leaf == "k" and split == "both"):
            std *= factor
        return 0.5 * std

    check(model, "t5", expected, qk_split=split)
    if split == "q":
        theirs = build("t5", **change)  # transformers' own initialisation
        for key, p in theirs.named_parameters():
            if p.dim() > 1:
                assert float(p.detach().std()) == pytest.approx(expected(key, p), rel=5 / math.sqrt(2 * p.numel())), key


def test_t5_scheme_on_models_that_divide_their_scores():
    rows = {row.name: row.std for row in initialization_plan(build("bert"), "t5")}
    assert rows["bert.encoder.layer.0.attention.self.query.weight"] == D**-0.5
    assert rows["bert.embeddings.word_embeddings.weight"] == D**-0.5  # tied, and nothing divides the hidden states
    rows = {row.name: row.std for row in initialization_plan(build("llama"), "t5", factor=2.0)}
    assert rows["model.layers.0.self_attn.q_proj.weight"] == 2 * D**-0.5
    assert rows["model.embed_tokens.weight"] == 2


def test_unscaled_scores_have_variance_one_under_both_splits():
    for split in ("q", "both"):
        model = initialize_model(build("t5"), "t5", g(), qk_split=split, factor=1.0)
        attention = model.encoder.block[0].layer[0].SelfAttention
        x = torch.randn(500, D, generator=g(1))
        q, k = (m(x).view(500, 5, 16) for m in (attention.q, attention.k))
        scores = torch.einsum("ihd,jhd->hij", q, k)
        assert float(scores.detach().std()) == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_gpt2_scales_what_ends_a_branch(layers):
    model = build("gpt2", n_layer=layers)

    def expected(key, p):
        if norm_or_bias(key, p) is not None:
            return norm_or_bias(key, p)
        return 0.02 * (2 * layers) ** -0.5 if "c_proj" in key else 0.02

    check(model, "gpt2", expected)
    check(model, "gpt2", lambda key, p: expected(key, p) * (4 if p.dim() > 1 else 1), std=0.08)


ENDS = {
    "bert": ("output.dense",), "roberta": ("output.dense",), "distilbert": ("out_lin", "lin2"),
    "llama": ("o_proj", "down_proj"), "opt": ("out_proj", "fc2"), "torch encoder": ("out_proj", "linear2"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(ENDS))
def test_the_ends_of_branches_are_found_in_other_models(name):
    model = build(name)
    for row in initialization_plan(model, "gpt2"):
        end = any(row.name.endswith(f"{leaf}.weight") for leaf in ENDS[name])
        if row.std:
            assert row.std == pytest.approx(0.02 * ((2 * LAYERS) ** -0.5 if end else 1)), row.name
    found = [row for row in initialization_plan(model, "gpt2") if 0 < row.std < 0.02]
    assert len(found) == 2 * LAYERS


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "torch encoder"])
def test_bert_is_cut_before_the_std_is_corrected(name):
    model, realised = build(name), 0.02 * 0.8796256610
    check(model, "bert", lambda key, p: realised if norm_or_bias(key, p) is None else norm_or_bias(key, p))
    for p in model.parameters():
        if p.dim() > 1:
            assert 0.035 < float(p.detach().abs().max()) <= 0.04 or p.numel() < 500


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "torch encoder"])
def test_deepnorm_of_one_stack(name):
    model, beta = build(name), (8 * LAYERS) ** -0.25
    ungained = ("query", "key", "q_lin", "k_lin")

    def expected(key, p):
        if norm_or_bias(key, p) is not None:
            return norm_or_bias(key, p)
        if is_table(key):
            return D**-0.5
        n, m = p.shape
        if "in_proj_weight" in key:  # q and k with gain 1, v with beta
            return (2 / (m + n / 3) * (2 + beta**2) / 3) ** 0.5
        inside = "layer." in key or "layers." in key
        gain = beta if inside and not any(k in key for k in ungained) else 1.0
        return gain * (2 / (m + n)) ** 0.5

    check(model, "deepnorm", expected)


def test_deepnorm_of_encoder_and_decoder():
    n, m = 2, 3
    found = deepnorm_constants(n, m)
    assert found == pytest.approx(
        (0.81 * (n**4 * m) ** (1 / 16), 0.87 * (n**4 * m) ** (-1 / 16), (3 * m) ** 0.25, (12 * m) ** -0.25)
    )
    for name in ("bart", "torch transformer"):
        for row in initialization_plan(build(name), "deepnorm"):
            if row.name.endswith(("fc1.weight", "linear1.weight")):
                beta = found.decoder_beta if "decoder" in row.name else found.encoder_beta
                assert row.std == pytest.approx(beta * (2 / (D + FF)) ** 0.5)


def test_deepnorm_constants():
    assert deepnorm_constants(8) == pytest.approx((2.0, 64**-0.25, None, None))
    assert deepnorm_constants(0, 8) == pytest.approx((None, None, 2.0, 64**-0.25))
    for arguments, error, message in (
        ((0,), ValueError, "at least 1; got 0 and 0"),
        ((-1,), ValueError, "encoder_layers must be at least 0"),
        ((1, 2.5), TypeError, "decoder_layers must be an integer"),
    ):
        with pytest.raises(error, match=message):
            deepnorm_constants(*arguments)


class Custom(nn.Module):
    """A block of somebody's own; nothing says where its norms are."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)


class TransformerBlock(Custom):
    """Has the name of DistilBERT's block, but is not it."""


def test_deepnorm_refuses_blocks_that_are_not_post_norm():
    for name, change in (("gpt2", {}), ("llama", {}), ("t5", {}), ("opt", {}), ("torch encoder", {"norm_first": True})):
        model = build(name, **change)
        before = state(model)
        for post_norm in (None, True):
            with pytest.raises(ValueError, match="deepnorm needs Post-LN blocks.* is Pre-LN"):
                initialize_model(model, "deepnorm", post_norm=post_norm)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for kind in (Custom, TransformerBlock):
        own = nn.Sequential(kind(), kind())
        with pytest.raises(ValueError, match=f"cannot tell for 0 .{kind.__name__}.; pass post_norm=True"):
            initialize_model(own, "deepnorm")
        rows = {row.name: row.std for row in initialization_plan(own, "deepnorm", post_norm=True)}
        assert rows["1.fc1.weight"] == pytest.approx(16**-0.25 * (2 / 24) ** 0.5)
        assert rows["1.q_proj.weight"] == pytest.approx((2 / 16) ** 0.5)
    with pytest.raises(ValueError, match="deepnorm needs Transformer blocks; Linear has none"):
        initialize_model(nn.Linear(3, 3), "deepnorm")


def test_a_single_block_is_a_stack_of_one():
    layer = nn.TransformerEncoderLayer(D, HEADS, FF)
    rows = {row.name: row.std for row in initialization_plan(layer, "deepnorm")}
    assert rows["linear1.weight"] == pytest.approx(8**-0.25 * (2 / (D + FF)) ** 0.5)
    assert rows["self_attn.in_proj_weight (query)"] == pytest.approx((1 / D) ** 0.5)
    assert rows["self_attn.in_proj_weight (value)"] == pytest.approx(8**-0.25 * (1 / D) ** 0.5)


@pytest.mark.parametrize("name", ["gpt2", "roberta", "torch encoder"])
def test_fixup(name):
    model = build(name)
    branches = 2 * LAYERS

    def expected(key, p):
        if norm_or_bias(key, p) is not None:
            return norm_or_bias(key, p)
        if is_table(key):
            return D**-0.5
        if key == "classifier.out_proj.weight":
            return 0.0
        if any(k in key for k in ("c_proj", "output.dense", "self_attn.out_proj", "linear2")):
            return 0.0
        fan_in = p.shape[0] if "transformer.h." in key else p.shape[1]
        inside = "layer." in key or "layers." in key or ".h." in key
        return (2 / fan_in / (branches if inside else 1)) ** 0.5

    check(model, "fixup", expected)


def test_under_fixup_each_block_is_the_identity():
    model = initialize_model(build("gpt2"), "fixup", g()).eval()
    states = model(torch.arange(20)[None], output_hidden_states=True).hidden_states
    assert torch.equal(states[0], states[LAYERS - 1])
    with pytest.raises(ValueError, match="fixup needs Transformer blocks"):
        initialize_model(nn.Linear(3, 3), "fixup")


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "roberta"])
def test_ntk_replaces_linear_layers_and_keeps_the_function_of_a_lecun_model(name):
    model = build(name).eval()
    weights = dict(model.named_parameters())
    ids = torch.randint(5, V, (2, 12), generator=g())
    made = initialize_model(model, "ntk", g())
    assert made is model
    assert {key: id(p) for key, p in model.named_parameters()} == {key: id(p) for key, p in weights.items()}
    assert not [m for m in model.modules() if isinstance(m, nn.Linear)]
    for key, p in model.named_parameters():
        if p.dim() > 1:
            assert float(p.detach().square().mean()) == pytest.approx(1, abs=6 / p.numel() ** 0.5 + 0.06), key
    plain = build(name).eval()
    with torch.no_grad():
        for key, p in plain.named_parameters():  # a table is not scaled; a head that is tied to one is, in the layer
            p.copy_(weights[key])
        for module in plain.modules():
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                fan_in = module.in_features if isinstance(module, nn.Linear) else module.nx
                module.weight = nn.Parameter(module.weight * fan_in**-0.5)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    model(ids).logits.square().sum().backward()
    again = state(model)
    initialize_model(model, "ntk", g())  # NTK layers stay NTK layers
    assert all(torch.equal(v, again[k]) for k, v in model.state_dict().items())


def test_a_model_inside_another_module_keeps_its_settings():
    def rules(model, scheme):
        return [(row.rule, row.std) for row in initialization_plan(model, scheme)]

    albert = t.AlbertModel(t.AlbertConfig(embedding_size=16, **HF))
    for model, scheme in ((build("t5"), "t5"), (albert, "gpt2")):
        assert rules(nn.ModuleDict({"wrapped": model}), scheme) == rules(model, scheme)


def test_the_experts_of_a_layer_are_one_branch():
    config = {**T5, "num_layers": 2, "num_decoder_layers": 2, "num_experts": 3}
    model = t.SwitchTransformersForConditionalGeneration(
        t.SwitchTransformersConfig(num_sparse_encoder_layers=2, **config)
    )
    stds = {row.name: row.std for row in initialization_plan(model, "gpt2")}
    ends = [name for name in stds if name.startswith("encoder") and name.endswith(("wo.weight", ".o.weight"))]
    assert sum("experts" in name for name in ends) >= 3
    assert {stds[name] for name in ends} == {0.02 * 4**-0.5}


def test_ntk_replaces_a_layer_at_each_of_its_names():
    linear = nn.Linear(6, 6)
    model = initialize_model(nn.Sequential(linear, nn.ReLU(), linear), "ntk", g())
    assert type(model[2]) is NTKLinear
    assert model[2] is model[0]


def test_ntk_refuses_what_it_cannot_convert():
    for model, message in (
        (build("t5"), "divides its scores by sqrt.d.; encoder.block.0.layer.0.SelfAttention does not"),
        (nn.Conv2d(2, 3, 1), "ntk can convert nn.Linear .*; weight belongs to Conv2d"),
        (build("torch encoder"), "layers.0.self_attn.in_proj_weight belongs to MultiheadAttention"),
    ):
        with pytest.raises(ValueError, match=message):
            initialize_model(model, "ntk")
    single = nn.Linear(30, 40)
    made = initialize_model(single, "ntk")
    assert isinstance(made, NTKLinear)
    assert made.weight is single.weight
