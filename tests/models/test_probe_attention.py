"""Entropy of attention, against probabilities that are written out."""

import math

import pytest
import torch
import transformers as t
from torch import nn
from torch.nn import functional as F

from kexue.attention import GatedAttentionUnit
from kexue.models import GAUAlphaConfig, GAUAlphaForMaskedLM, probe
from kexue.models._attention_watch import sdpa_entropy
from reference import bert_initial_std as reference

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1}
MODELS = {
    "bert": lambda: t.BertForMaskedLM(t.BertConfig(initializer_range=0.7, **SIZES)),
    "roberta": lambda: t.RobertaModel(t.RobertaConfig(initializer_range=0.7, **SIZES)),
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(initializer_range=0.7, **GROUPED)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(initializer_range=0.7, **GPT2)),
    "albert": lambda: t.AlbertModel(t.AlbertConfig(embedding_size=8, initializer_range=0.7, **SIZES)),
}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def build(name, implementation):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.set_attn_implementation(implementation)
    return model


def tokens(rows=3, length=7):
    ids = torch.randint(5, 40, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1, 4:] = 0
    mask[2, 2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def entropies(report):
    return [row["attention_entropy"] for row in report.rows if row["attention_entropy"] is not None]


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", list(MODELS))
def test_transformers_models_with_padding(name, implementation):
    batch = tokens()
    model = build(name, implementation)
    got = entropies(probe(model, batch))
    with torch.no_grad():
        weights = build(name, "eager")(**batch, output_attentions=True).attentions
    assert got == pytest.approx([reference.entropy(w, batch["attention_mask"]) for w in weights], rel=1e-5)
    assert got[0] < math.log(7) - 0.05  # not near-uniform: the weights matter


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_does_not_count(name, side):
    model = build(name, "sdpa")
    batch = {key: value[:1] for key, value in tokens().items()}
    plain = entropies(probe(model, batch))
    width = (0, 3) if side == "right" else (3, 0)
    positions = {} if side == "right" else {"position_ids": torch.tensor([[0, 0, 0, *range(7)]])}
    padded = {key: F.pad(value, width) for key, value in batch.items()}
    assert entropies(probe(model, {**padded, **positions})) == pytest.approx(plain, rel=1e-5)
    assert entropies(probe(model, (padded["input_ids"], padded["attention_mask"]))) == entropies(probe(model, padded))


@pytest.mark.slow
def test_an_encoder_and_decoder():
    torch.manual_seed(0)
    model = t.T5ForConditionalGeneration(t.T5Config(decoder_start_token_id=0, initializer_factor=3.0, **T5)).eval()
    batch = tokens()
    other = torch.ones(3, 5, dtype=torch.long)
    other[0, 3:] = 0
    batch |= {"decoder_input_ids": batch["input_ids"][:, :5].contiguous(), "decoder_attention_mask": other}
    rows = {row["name"]: row["attention_entropy"] for row in probe(model, batch).rows}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**batch, output_attentions=True)
    for n in range(2):
        for kind, name, keep in (
            (out.encoder_attentions, f"encoder.block.{n}.layer.0.SelfAttention", batch["attention_mask"]),
            (out.decoder_attentions, f"decoder.block.{n}.layer.0.SelfAttention", other),
            (out.cross_attentions, f"decoder.block.{n}.layer.1.EncDecAttention", other),
        ):
            assert rows[name] == pytest.approx(reference.entropy(kind[n], keep), rel=1e-5)


@pytest.mark.slow
def test_our_gated_units_are_computed_once_more():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = GAUAlphaConfig(attention_key_size=8, attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0, **sizes)
    model, batch = GAUAlphaForMaskedLM(config).eval(), tokens()
    for p in model.parameters():
        p.data *= 3
    with torch.no_grad():
        weights = model(**batch, output_attentions=True).attentions
    report = probe(model, batch)
    assert entropies(report)[0] == pytest.approx(reference.entropy(weights[0], batch["attention_mask"]), rel=1e-5)
    assert entropies(report)[1] == pytest.approx(reference.entropy(weights[1], batch["attention_mask"]), rel=1e-5)
    assert entropies(probe(model, batch, training=True))[0] == entropies(report)[0]  # dropped weights do not count
    unit = GatedAttentionUnit(16, key_size=8, normalization="relu2_n")
    assert entropies(probe(unit, normal(1, 4, 16, dtype=torch.float32))) == []


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_multihead_attention_of_torch(need_weights, dropout):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, dropout, batch_first=True, dtype=torch.float64)

        def forward(self, x, hidden):
            return self.attention(x, x, x, key_padding_mask=hidden, need_weights=need_weights)[0]

    torch.manual_seed(0)
    model, x = Model().train(), 3 * normal(2, 5, 8)
    hidden = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    rows = probe(model, (x, hidden)).rows
    projected = F.linear(x, model.attention.in_proj_weight, model.attention.in_proj_bias)
    q, k, _ = (y.view(2, 5, 2, 4).transpose(1, 2) for y in projected.chunk(3, -1))
    weights = reference.attention(q, k, ~hidden[:, None, None])
    assert rows[0]["name"] == "attention"
    assert rows[0]["attention_entropy"] == pytest.approx(reference.entropy(weights, ~hidden))


def test_layers_of_torch_in_the_fast_path():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for p in model.parameters():
        p.requires_grad_(False)  # torch would take a fused path that calls no submodule
    rows = {row["name"]: row for row in probe(model, normal(2, 5, 8, dtype=torch.float32)).rows}
    assert 0 < rows["layers.0.self_attn"]["attention_entropy"] < math.log(5)
    assert rows["layers.1"]["rms_grad"] == pytest.approx(1)


class Written(nn.Module):
    """Attention as it is written by hand; ``form`` is how."""

    def __init__(self, form, heads=2, width=8):
        super().__init__()
        self.form, self.heads = form, heads
        self.qkv = nn.Linear(width, 3 * width, dtype=torch.float64)
        self.soft, self.drop = nn.Softmax(-1), nn.Dropout(0.5)

    def split(self, x):
        b, length, _ = x.shape
        return (y.view(b, length, self.heads, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))

    def forward(self, x, mask=None):
        q, k, v = self.split(x)
        if self.form == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, mask)
        if self.form == "sdpa causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        if self.form == "module":
            return self.drop(self.soft(scores)) @ v
        if self.form == "method":
            return torch.matmul(scores.softmax(dim=-1).to(v.dtype), v)
        if self.form == "einsum":
            return torch.einsum("bhts,bhsd->bthd", torch.softmax(scores, 3), v)
        if self.form == "bmm":
            return torch.bmm(F.dropout(F.softmax(scores, -1), 0.1).flatten(0, 1), v.flatten(0, 1))
        raise KeyError(self.form)


@pytest.mark.parametrize("form", ["sdpa", "module", "method", "einsum", "bmm"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_attention_written_by_hand(form, masked, nested):
    torch.manual_seed(0)
    model, x = Written(form).train(), 4 * normal(2, 5, 8)
    mask = torch.tensor([1, 1, 1, 0, 0], dtype=torch.bool)[None, None, None] if masked else None
    q, k, _ = model.split(x)
    weights = reference.attention(q, k, mask)
    keep = None if mask is None or form != "sdpa" else mask[0, 0].expand(2, 5)  # a plain softmax tells no mask
    whole = nn.Sequential(model) if nested and not masked else model
    report = probe(whole, x if mask is None else (x, mask))
    (row,) = [row for row in report.rows if row["attention_entropy"] is not None]
    assert row["name"] == ("0" if whole is not model else "")
    assert row["attention_entropy"] == pytest.approx(reference.entropy(weights, keep))


def test_causal_attention_and_uniform_weights():
    model = Written("sdpa causal")
    model.qkv.weight.data.zero_()
    (value,) = entropies(probe(model, normal(2, 6, 8)))
    assert value == pytest.approx(sum(math.log(n) for n in range(1, 7)) / 6)  # log of the visible keys


@pytest.mark.parametrize("kind", ["bool", "float", "lowest"])
def test_queries_that_see_nothing_do_not_count(kind):
    q, k = normal(1, 2, 4, 8), normal(1, 2, 4, 8, seed=1)
    shown = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    shown[..., :2] = False  # two padded tokens on the left: rows 0 and 1 see nothing
    low = -math.inf if kind == "float" else torch.finfo(torch.float64).min
    mask = shown if kind == "bool" else torch.zeros(1, 1, 4, 4).double().masked_fill(~shown, low)
    got, keep, seen = sdpa_entropy(q, k, k, mask)
    assert keep.flatten().tolist() == [False, False, True, True]
    assert seen.flatten().tolist() == [False, False, True, True]
    want = reference.attention(q, k, shown)[:, :, 2:]
    assert float(got[:, :, 2:].mean()) == pytest.approx(reference.entropy(want))
    assert torch.isfinite(got).all()


def test_tiles_and_grouped_heads(monkeypatch):
    q, k = normal(2, 4, 7, 8), normal(2, 2, 9, 8, seed=1)
    want = torch.special.entr(reference.attention(q, k.repeat_interleave(2, 1))).sum(-1)
    monkeypatch.setattr("kexue.models._attention_watch.TILE", 16)
    got, _, _ = sdpa_entropy(q, k, k, enable_gqa=True)
    torch.testing.assert_close(got, want)
    whole = sdpa_entropy(q, k, k, torch.zeros(7, 9).double(), scale=0.3, enable_gqa=True)[0]
    scaled = torch.special.entr((0.3 * q @ k.repeat_interleave(2, 1).mT).softmax(-1)).sum(-1)
    torch.testing.assert_close(whole, scaled)


def test_a_softmax_over_classes_is_no_attention():
    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.ones(6, 4))
            self.layer = nn.Linear(4, 6)

        def forward(self, x):
            p = self.layer(x).softmax(-1)
            return p @ self.table  # a mean of classes: the table is no batch of keys

    assert entropies(probe(Classes(), torch.ones(2, 3, 4))) == []


def test_two_attentions_in_one_module_are_averaged():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, dtype=torch.float64)

        def forward(self, x):
            x = self.layer(x)
            return F.scaled_dot_product_attention(x, x, x) + F.scaled_dot_product_attention(0 * x, x, x)

    model, x = Two(), 3 * normal(1, 3, 4)
    y = model.layer(x)
    sharp = reference.entropy(reference.attention(y, y)[:, None])
    (value,) = entropies(probe(model, x))
    assert value == pytest.approx((sharp + math.log(3)) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision(dtype):
    q, k = normal(1, 2, 40, 8, dtype=dtype), normal(1, 2, 40, 8, seed=1, dtype=dtype)
    got, _, _ = sdpa_entropy(q, k, k)
    assert got.dtype == torch.float32
    assert float(got.mean()) == pytest.approx(reference.entropy(reference.attention(q, k)), rel=1e-5)


def test_the_figure_of_the_entropy():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3, enable_nested_tensor=False)
    figure = probe(model.eval(), normal(2, 5, 8, dtype=torch.float32)).plot("entropy")
    axes = figure.axes[0]
    assert axes.get_yscale() == "linear"
    assert [text.get_text() for text in axes.get_xticklabels()] == [f"layers.{n}.self_attn" for n in range(3)]
