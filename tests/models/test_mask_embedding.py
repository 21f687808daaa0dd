"""Correcting the word embeddings of masked language models, tiny and random."""

import copy
import json
import warnings

import pytest
import torch
import transformers as t
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kexue.models import (
    GAUAlphaConfig,
    GAUAlphaForMaskedLM,
    KexueConfig,
    KexueForMaskedLM,
    KexueForPreTraining,
    KexueForTextAutoencoding,
    correct_mask_embedding,
    uncorrect_mask_embedding,
)
from reference import mlm_dropout as reference

MASK = 4
BERT = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
KIN = {**BERT, "pad_token_id": 1}
DISTIL = {"vocab_size": 40, "dim": 8, "hidden_dim": 8, "n_layers": 1, "n_heads": 2}
MODERN = {**KIN, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
GAU = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "attention_key_size": 4}
KEXUE = {"vocab_size": 40, "hidden_size": 8, "num_layers": 2, "num_heads": 2}
MODELS = {
    "bert": (t.BertForMaskedLM, t.BertConfig, BERT),
    "bert with two heads": (t.BertForPreTraining, t.BertConfig, BERT),
    "roberta": (t.RobertaForMaskedLM, t.RobertaConfig, KIN),
    "roberta, Pre-LN": (t.RobertaPreLayerNormForMaskedLM, t.RobertaPreLayerNormConfig, KIN),
    "camembert": (t.CamembertForMaskedLM, t.CamembertConfig, KIN),
    "distilbert": (t.DistilBertForMaskedLM, t.DistilBertConfig, DISTIL),
    "albert": (t.AlbertForMaskedLM, t.AlbertConfig, {**KIN, "embedding_size": 4}),
    "electra": (t.ElectraForMaskedLM, t.ElectraConfig, {**KIN, "embedding_size": 4}),
    "deberta": (t.DebertaV2ForMaskedLM, t.DebertaV2Config, KIN),
    "mpnet": (t.MPNetForMaskedLM, t.MPNetConfig, KIN),
    "modernbert": (t.ModernBertForMaskedLM, t.ModernBertConfig, MODERN),
    "gau": (GAUAlphaForMaskedLM, GAUAlphaConfig, GAU),
    "kexue": (KexueForMaskedLM, KexueConfig, KEXUE),
    "kexue with two heads": (KexueForPreTraining, KexueConfig, {**KEXUE, "type_vocab_size": 2}),
}
pytestmark = pytest.mark.slow  # each builds a model


def build(name="bert", spread=True, **change):
    kind, config, sizes = MODELS[name]
    torch.manual_seed(0)
    model = kind(config(**{**sizes, **change})).eval()
    if spread:  # the random start is small, and biases are 0
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.3)
    return model


def table(model):
    return model.get_input_embeddings().weight


def output(model, ids):
    with torch.no_grad():
        return model(ids)[0]


def tokens(rows=2, length=9):
    return torch.randint(5, 40, (rows, length), generator=torch.Generator().manual_seed(1))


def hidden_with(model, weight, ids):
    """The output with another input table but the decoder as it is, by words given as vectors."""
    vectors = torch.nn.functional.embedding(ids, weight.to(table(model).dtype))
    with torch.no_grad():
        return model(inputs_embeds=vectors)[0]


@pytest.mark.parametrize("name", list(MODELS))
def test_every_kind_is_corrected_by_the_formula_and_its_decoder_stays(name):
    model, ids = build(name), tokens()
    old, weight = table(model).detach().clone(), table(model)
    expected = reference.corrected(old, MASK)
    # the decoder and its bias are what they were: only the input changes
    want = hidden_with(model, expected, ids)
    assert correct_mask_embedding(model, mask_token_id=MASK) is model
    assert table(model) is weight  # an optimizer keeps its parameter
    torch.testing.assert_close(table(model).double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(model.get_output_embeddings().weight, old)
    assert model.config.mask_corrected is True
    assert model.config.tie_word_embeddings is False
    torch.testing.assert_close(output(model, ids), want, rtol=1e-5, atol=1e-5)
    assert all(p.requires_grad for p in (table(model), model.get_output_embeddings().weight))


@pytest.mark.parametrize("name", list(MODELS))
def test_every_kind_is_saved_and_loaded_and_undone_to_the_last_bit(name, tmp_path):
    model, ids = build(name), tokens()
    old, before = copy.deepcopy(model.state_dict()), output(model, ids)
    config = model.config.to_dict()
    correct_mask_embedding(model, mask_token_id=MASK)
    after = output(model, ids)
    assert not torch.equal(before, after)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(output(loaded, ids), after)
    for again in (model, loaded):
        with pytest.raises(ValueError, match="corrected already"):
            correct_mask_embedding(again, mask_token_id=MASK)
        assert torch.equal(output(again, ids), after)
        assert uncorrect_mask_embedding(again) is again
        assert torch.equal(output(again, ids), before)
        assert again.get_output_embeddings().weight is table(again)
        assert {k: v for k, v in again.state_dict().items() if not torch.equal(v, old[k])} == {}
        assert again.config.mask_corrected is False
        assert again.config.tie_word_embeddings is True
        kept = {k: v for k, v in again.config.to_dict().items() if k in config and k != "_name_or_path"}
        assert all(
            config[k] == v for k, v in kept.items() if k not in ("architectures", "dtype", "transformers_version")
        )
        with pytest.raises(ValueError, match="not corrected"):
            uncorrect_mask_embedding(again)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(output(type(model).from_pretrained(tmp_path / "again").eval(), ids), before)
    correct_mask_embedding(loaded, mask_token_id=MASK)
    assert torch.equal(output(loaded, ids), after)


@pytest.mark.parametrize("name", ["bert", "roberta", "albert", "gau"])
def test_a_loaded_model_trains_its_decoder_apart_and_the_bias_that_is_read(name, tmp_path):
    model = correct_mask_embedding(build(name), mask_token_id=MASK)
    decoder = model.get_output_embeddings()
    bias = decoder.bias
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    assert table(model).grad is not None
    assert decoder.weight.grad is not None
    assert not torch.equal(table(model).grad, decoder.weight.grad)
    assert bias is None or bias.grad.any()
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None and "pooler" not in n]
    assert unused == []  # DDP would wait for them
    if bias is not None:
        with torch.no_grad():
            bias.add_(1.0)
        uncorrect_mask_embedding(model)
        assert model.get_output_embeddings().bias is bias  # what was trained stays
        assert len([n for n, p in model.named_parameters(remove_duplicate=False) if p is bias]) == 2


@settings(max_examples=40)
@given(
    rows=st.integers(2, 30),
    select=st.floats(0, 1),
    shares=st.tuples(st.integers(0, 10), st.integers(1, 10), st.integers(0, 10)),
    subset=st.booleans(),
    seed=st.integers(0, 9),
)
def test_the_inverse_is_the_solution_of_the_two_equations(rows, select, shares, subset, seed):
    split = tuple(share / sum(shares) for share in shares)
    model = nn.Module()
    generator = torch.Generator().manual_seed(seed)
    model.table = nn.Embedding(rows, 3, dtype=torch.float64)
    model.table.weight.data = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    model.get_input_embeddings = lambda: model.table
    model.config = t.PretrainedConfig(mask_token_id=rows - 1)
    ids = None if not subset else list(range(rows // 2 + 1))
    old = model.table.weight.detach().clone()
    correct_mask_embedding(model, select, split, random_ids=ids)
    want = reference.corrected(old, rows - 1, select, split, ids)
    torch.testing.assert_close(model.table.weight.detach(), want)
    solved = reference.original(want, rows - 1, select, split, ids)
    torch.testing.assert_close(solved, old, rtol=1e-8, atol=1e-8)
    uncorrect_mask_embedding(model)
    torch.testing.assert_close(model.table.weight.detach(), old, rtol=1e-8, atol=1e-8)


def test_the_corrected_row_is_the_mean_over_corruptions():
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    select, split = 0.4, (0.5, 0.2, 0.3)
    mean = reference.monte_carlo(weight, 1, 3, 20000, select, split, torch.Generator().manual_seed(1))
    assert (mean - reference.corrected(weight, 1, select, split)[3]).abs().max() < 0.03
    assert (mean - weight[3]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("tied", [True, False])
def test_every_dtype_is_computed_in_float64_and_rounded_once(dtype, tied):
    model = build(tie_word_embeddings=tied).to(dtype)
    old = table(model).detach().clone()
    correct_mask_embedding(model, 0.4, mask_token_id=MASK)
    assert table(model).dtype == dtype
    expected = reference.corrected(old, MASK, 0.4)
    if dtype == torch.float64:
        torch.testing.assert_close(table(model).detach(), expected, rtol=1e-14, atol=1e-15)
    else:
        assert torch.equal(table(model), expected.to(dtype))
    decoder = model.get_output_embeddings().weight.detach().clone()
    uncorrect_mask_embedding(model)
    if tied:
        assert torch.equal(table(model), old)
        assert model.get_output_embeddings().weight is table(model)
    else:  # a table of its own is computed back: rounding of the corrected one, divided by c = .64
        error = (table(model).double() - old.double()).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * old.abs().max()
        assert torch.equal(model.get_output_embeddings().weight, decoder)
        assert model.config.tie_word_embeddings is False


def test_the_mean_over_a_large_low_precision_table_does_not_saturate():
    model = t.BertModel(t.BertConfig(**{**BERT, "vocab_size": 9000}))
    with torch.no_grad():
        table(model).fill_(1.0)
        table(model)[MASK] = 0
    correct_mask_embedding(model.to(torch.bfloat16), 0.5, (0.0, 0.0, 1.0), mask_token_id=MASK)
    assert torch.equal(table(model)[0], torch.ones(8, dtype=torch.bfloat16))  # a bfloat16 sum stops at 256
    assert torch.equal(table(model)[MASK], torch.full((8,), 0.5, dtype=torch.bfloat16))


def test_a_table_without_a_decoder_is_computed_back_and_the_tie_comes_back_with_a_head(tmp_path):
    model = t.BertModel(t.BertConfig(**BERT))
    old = table(model).detach().clone()
    correct_mask_embedding(model, mask_token_id=MASK, random_ids=range(5, 40))
    torch.testing.assert_close(table(model).double(), reference.corrected(old, MASK, random_ids=range(5, 40)))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["mask_corrected"] is True
    assert saved["tie_word_embeddings"] is False
    assert saved["mask_correction"]["random_ids"] == [[5, 40]]
    loaded = uncorrect_mask_embedding(t.BertModel.from_pretrained(tmp_path))
    torch.testing.assert_close(table(loaded), old, rtol=1e-6, atol=1e-7)
    assert loaded.config.tie_word_embeddings is True


def test_a_classifier_takes_the_corrected_table_from_a_masked_language_model(tmp_path):
    model = correct_mask_embedding(build(), mask_token_id=MASK)
    model.save_pretrained(tmp_path)
    classifier = t.BertForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(table(classifier), table(model))
    with pytest.raises(ValueError, match="corrected already"):
        correct_mask_embedding(classifier, mask_token_id=MASK)


@pytest.mark.parametrize("which", ["table", "decoder"])
def test_tables_that_were_trained_since_stay_apart(which):
    model = build()
    old = table(model).detach().clone()
    correct_mask_embedding(model, mask_token_id=MASK)
    trained = table(model) if which == "table" else model.get_output_embeddings().weight
    with torch.no_grad():
        trained[7] += 1e-3
    decoder, now = model.get_output_embeddings().weight.detach().clone(), table(model).detach().clone()
    with pytest.warns(UserWarning, match="no longer agree"):
        uncorrect_mask_embedding(model)
    assert torch.equal(model.get_output_embeddings().weight, decoder)
    assert model.config.tie_word_embeddings is False
    torch.testing.assert_close(table(model).double(), reference.original(now, MASK), rtol=1e-6, atol=1e-6)
    assert torch.allclose(table(model), old, atol=1e-6) is (which == "decoder")


def test_a_model_loaded_in_low_precision_is_still_tied_again(tmp_path):
    model = correct_mask_embedding(build(), mask_token_id=MASK)
    model.save_pretrained(tmp_path)
    loaded = t.BertForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    original = loaded.get_output_embeddings().weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uncorrect_mask_embedding(loaded)
    assert torch.equal(table(loaded), original)
    assert loaded.get_output_embeddings().weight is table(loaded)


def test_models_that_shared_a_configuration_or_memory_do_not_change_each_other():
    config = t.BertConfig(**BERT)
    first, second = t.BertForMaskedLM(config), t.BertForMaskedLM(config)
    untouched = table(second).detach().clone()
    correct_mask_embedding(first, mask_token_id=MASK)
    assert config.tie_word_embeddings is True
    assert not hasattr(config, "mask_corrected")
    assert first.bert.config is first.config
    correct_mask_embedding(second, mask_token_id=MASK)
    torch.testing.assert_close(table(second).double(), reference.corrected(untouched, MASK))
    # tied by memory only, as old code does
    model = build(tie_word_embeddings=False)
    model.get_output_embeddings().weight = nn.Parameter(table(model).data)
    old = table(model).detach().clone()
    correct_mask_embedding(model, mask_token_id=MASK)
    assert torch.equal(model.get_output_embeddings().weight, old)
    assert not torch.equal(table(model), old)


def test_frozen_tables_stay_frozen_and_the_mask_id_comes_from_the_configuration():
    model = build(mask_token_id=MASK)
    table(model).requires_grad_(False)
    old = table(model).detach().clone()
    correct_mask_embedding(model, 1.0)  # c = .1: still to be undone
    torch.testing.assert_close(table(model).double(), reference.corrected(old, MASK, 1.0), rtol=1e-6, atol=1e-7)
    assert not table(model).requires_grad
    assert not model.get_output_embeddings().weight.requires_grad
    other = build(mask_token_id=MASK)
    correct_mask_embedding(other, mask_token_id=6)  # the argument wins
    assert other.config.mask_correction["mask_token_id"] == 6
    torch.testing.assert_close(table(other).double(), reference.corrected(old, 6), rtol=1e-6, atol=1e-7)


def test_select_0_changes_no_bit_but_counts_as_a_correction():
    model = build()
    old = table(model).detach().clone()
    correct_mask_embedding(model, 0.0, mask_token_id=MASK)
    assert torch.equal(table(model), old)
    with pytest.raises(ValueError, match="corrected already"):
        correct_mask_embedding(model, mask_token_id=MASK)
    uncorrect_mask_embedding(model)
    assert torch.equal(table(model), old)


def test_padding_changes_no_output():
    model = correct_mask_embedding(build(pad_token_id=0), mask_token_id=MASK)
    ids = tokens(1, 6)
    padded, mask = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], 1), torch.arange(9)[None] < 6
    assert table(model)[0].any()  # the row of padding follows the formula too
    with torch.no_grad():
        torch.testing.assert_close(model(padded, mask.long()).logits[:, :6], model(ids).logits)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"select": -0.1}, ValueError, "select must be at least 0.*-0.1"),
        ({"select": 1.01}, ValueError, "select must be at most 1.*1.01"),
        ({"select": float("nan")}, ValueError, "select must be finite"),
        ({"select": "half"}, TypeError, "select must be a number"),
        ({"split": (0.8, 0.1)}, ValueError, "three shares"),
        ({"split": (0.8, 0.1, 0.05, 0.05)}, ValueError, "three shares"),
        ({"split": 0.8}, TypeError, "three shares"),
        ({"split": "123"}, TypeError, "three shares"),
        ({"split": (0.8, 0.1, 0.2)}, ValueError, "sum to 1.*1.1"),
        ({"split": (0.8, 0.1, 0.1 + 2e-6)}, ValueError, "sum to 1"),
        ({"split": (1.2, -0.1, -0.1)}, ValueError, "kept share of split must be at least 0"),
        ({"split": (0.8, True, 0.1)}, TypeError, "kept share"),
        ({"split": (float("nan"), 0.1, 0.1)}, ValueError, "finite"),
        ({"select": 1.0, "split": (1.0, 0.0, 0.0)}, ValueError, "leave something of the tokens"),
        ({"select": 1.0, "split": (0.9, 0.0, 0.1)}, ValueError, "leave something of the tokens"),
        ({"mask_token_id": None}, ValueError, "mask_token_id must be given"),
        ({"mask_token_id": 40}, ValueError, "below 40.*got 40"),
        ({"mask_token_id": -1}, ValueError, "at least 0"),
        ({"mask_token_id": 4.0}, TypeError, "integer"),
        ({"random_ids": []}, ValueError, "a token at least"),
        ({"random_ids": [40]}, ValueError, "below 40.*got 40"),
        ({"random_ids": [-1]}, ValueError, "at least 0"),
        ({"random_ids": [0.5]}, TypeError, "integer"),
        ({"random_ids": 7}, TypeError, "token ids"),
        ({"random_ids": "7"}, TypeError, "token ids"),
    ],
)
def test_bad_values_are_refused_and_the_model_stays(arguments, error, match):
    model = build()
    old, config = table(model).detach().clone(), model.config.to_dict()
    with pytest.raises(error, match=match):
        correct_mask_embedding(model, **{"mask_token_id": MASK, **arguments})
    assert torch.equal(table(model), old)
    assert model.get_output_embeddings().weight is table(model)
    assert model.config.to_dict() == config


def test_a_split_that_sums_to_1_but_for_rounding_is_accepted():
    model = build()
    old = table(model).detach().clone()
    correct_mask_embedding(model, split=torch.tensor([0.8, 0.1, 0.1]), mask_token_id=torch.tensor(MASK))
    torch.testing.assert_close(table(model).double(), reference.corrected(old, MASK), rtol=1e-6, atol=1e-7)


def test_models_whose_table_cannot_be_rewritten_are_refused():
    def refused(model, error, match, **arguments):
        with pytest.raises(error, match=match):
            correct_mask_embedding(model, mask_token_id=MASK, **arguments)

    refused(nn.Linear(2, 2), TypeError, "with a config; got Linear")
    refused("bert", TypeError, "got str")
    refused(nn.DataParallel(build()), TypeError, "pass its .module")
    with torch.device("meta"):
        refused(t.BertForMaskedLM(t.BertConfig(**BERT)), ValueError, "meta device")
    t5 = t.T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    refused(t.T5ForConditionalGeneration(t5), ValueError, "read by one module")
    empty = build()
    table(empty).data = torch.empty(0)  # as ZeRO-3 leaves it
    refused(empty, ValueError, "must be whole.*40, 8")
    computed = build()
    nn.utils.parametrizations.weight_norm(computed.get_input_embeddings())
    refused(computed, ValueError, "computed from others")
    broken = build()
    with torch.no_grad():
        table(broken)[MASK, 0] = torch.inf
    refused(broken, ValueError, "finite")
    assert not hasattr(broken.config, "mask_corrected")
    diagonal = KexueForTextAutoencoding(KexueConfig(**KEXUE, attn_mode="diagonal", mask_token_id=MASK))
    refused(diagonal, ValueError, "without masks")
    direct = build()
    direct.get_output_embeddings = direct.get_input_embeddings
    refused(direct, ValueError, "a decoder of its own")
    other = build()
    other.get_input_embeddings = lambda: nn.Linear(2, 2)
    refused(other, ValueError, "nn.Embedding; got Linear")
    marked = build()
    marked.config.mask_corrected = True
    with pytest.raises(ValueError, match="must record the correction"):
        uncorrect_mask_embedding(marked)


def test_sharded_embeddings_are_refused():
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model = build()
        sharded = distribute_tensor(table(model).detach(), DeviceMesh("cpu", [0]), [Shard(0)])
        model.get_input_embeddings().weight = nn.Parameter(sharded)
        with pytest.raises(ValueError, match="before it is sharded"):
            correct_mask_embedding(model, mask_token_id=MASK)
    finally:
        destroy_process_group()
