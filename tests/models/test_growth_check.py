"""verify_growth: what it measures, what it blames on casts, and that wrong models do not pass."""

import copy
import math

import pytest
import torch
import transformers as t

from kexue.models import GrowthReport, grow, verify_growth
from reference.growth_models import build, padded, tokens

pytestmark = pytest.mark.slow


def spoiled(big, change):
    wrong = copy.deepcopy(big)
    with torch.no_grad():
        change(wrong)
    return wrong


def test_traps_are_noticed():
    model = build("gpt2")
    big = grow(model, 2)
    wrongs = {
        "tied head not divided": lambda m: (m.transformer.ln_f.weight.mul_(2), m.transformer.ln_f.bias.mul_(2)),
        "bias of the last norm not divided": lambda m: m.transformer.ln_f.bias.mul_(2),
        "inputs not averaged": lambda m: m.transformer.h[0].mlp.c_proj.weight.mul_(2),
        "bias divided": lambda m: m.transformer.h[1].mlp.c_proj.bias.div_(2),
        "heads interleaved": lambda m: m.transformer.h[0].attn.c_proj.weight.copy_(
            m.transformer.h[0].attn.c_proj.weight.unflatten(0, (2, 4, 8)).transpose(0, 1).flatten(0, 2)
        ),
        "one copy moved": lambda m: m.transformer.wte.weight[:, 1].add_(0.01),
    }
    for name, change in wrongs.items():
        report = verify_growth(model, spoiled(big, change), **padded())
        assert report.max_abs > 1e-3, name
        assert not report.dtype_limited
        assert "not the same function" in str(report)
    assert verify_growth(model, big, **padded()).max_abs < 1e-12


def test_casts_of_llama_are_blamed_only_for_what_they_do():
    model = build("llama", dtype=torch.float32)
    big = grow(model, 3)
    report = verify_growth(model, big, **padded())
    assert report.dtype_limited
    assert 1e-9 < report.max_abs < 1e-4
    assert report.rounding > report.max_abs_uncast / 4 > 1e-9  # weights are of float32: w / 3 is rounded
    assert "rounding the weights" in str(report)
    exact = verify_growth(model.double(), grow(model.double(), 3), **padded())
    assert exact.max_abs_uncast < 1e-12
    assert "casts to float32" in str(exact)
    wrong = spoiled(grow(model, 2), lambda m: m.model.norm.weight.mul_(1 + 1e-5))
    report = verify_growth(model, wrong, **padded())
    assert report.max_rel < 1e-4
    assert not report.dtype_limited


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_weights_are_told_from_wrong_ones(kind, dtype):
    model = build(kind, dtype=dtype)
    big = grow(model, 3, noise=0.1)
    report = verify_growth(model, big, **padded())
    assert report.max_rel > 1e-9
    assert report.dtype_limited
    factor = 1 + 64 * torch.finfo(dtype).eps
    wrong = spoiled(
        big, lambda m: [p.mul_(factor) for n, p in m.named_parameters() if n.endswith("bias") or "norm" in n]
    )
    assert not verify_growth(model, wrong, **padded()).dtype_limited
    for k in (2, 4):  # powers of two are exact in every dtype
        assert verify_growth(model, grow(model, k), **padded()).max_abs_uncast < 1e-12


def test_what_is_computed_without_casts_is_not_what_the_casts_give():
    model = build("llama", attn_implementation="eager")
    report = verify_growth(model, grow(model, 2), **padded())
    assert report.max_abs_uncast < 1e-12 < report.max_abs


def test_models_keep_everything():
    model = build("bert", dtype=torch.float32).train()
    big = grow(model, 2)
    big.bert.encoder.eval()
    flags = [[m.training for m in one.modules()] for one in (model, big)]
    before = [{k: v.clone() for k, v in one.state_dict().items()} for one in (model, big)]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    report = verify_growth(model, big, **padded())
    assert torch.equal(torch.rand(2), expected)
    assert report.max_abs < 1e-5  # dropout is off
    assert [[m.training for m in one.modules()] for one in (model, big)] == flags
    for one, values in zip((model, big), before, strict=True):
        assert all(torch.equal(v, values[k]) and v.dtype == values[k].dtype for k, v in one.state_dict().items())
        assert all(p.grad is None for p in one.parameters())


def test_every_output_counts():
    model = build("bert", t.BertForPreTraining)
    big = grow(model, 2)
    report = verify_growth(model, big, **padded())
    assert report.outputs == ("prediction_logits", "seq_relationship_logits")
    wrong = spoiled(big, lambda m: m.cls.seq_relationship.bias.add_(1.0))
    assert verify_growth(model, wrong, **padded()).max_abs == pytest.approx(1.0)


def test_hidden_states_are_compared_copy_by_copy():
    model = build("bert", t.BertModel)
    big = grow(model, 3)
    report = verify_growth(model, big, **padded())
    assert report.outputs == ("last_hidden_state", "pooler_output")
    assert report.max_abs < 1e-12
    wrong = spoiled(big, lambda m: m.encoder.layer[1].output.LayerNorm.bias[4].add_(0.5))
    assert verify_growth(model, wrong, **padded()).max_abs > 0.1


def test_more_inputs_and_odd_batches():
    model = build("bert")
    big = grow(model, 2)
    kinds = torch.randint(0, 2, (2, 12), generator=torch.Generator().manual_seed(0))
    for inputs in ({"token_type_ids": kinds}, {"labels": tokens()}, {"position_ids": torch.arange(12)[None] + 3}):
        assert verify_growth(model, big, tokens(), **inputs).max_abs < 1e-12
    assert verify_growth(model, big, tokens(1, 1)).max_abs < 1e-12
    assert "loss" in verify_growth(model, big, tokens(), labels=tokens()).outputs


def test_values_that_are_not_finite_never_pass():
    model = build("gpt2")
    wrong = spoiled(grow(model, 2), lambda m: m.transformer.ln_f.bias.fill_(torch.nan))
    report = verify_growth(model, wrong, **padded())
    assert math.isinf(report.max_abs)
    assert not report.dtype_limited


def test_a_token_that_is_ruled_out_hides_no_difference():
    model = build("bert")
    with torch.no_grad():
        model.cls.predictions.bias[5] = -torch.inf
    big = grow(model, 2)
    assert verify_growth(model, big, **padded()).max_rel < 1e-12
    wrong = spoiled(big, lambda m: m.bert.encoder.layer[1].output.dense.weight.mul_(1.5))
    report = verify_growth(model, wrong, **padded())
    assert report.max_rel > 1e-3
    assert "not the same function" in str(report)


def test_outputs_that_are_not_numbers_in_both_models_are_no_difference():
    model = build("bert")
    with torch.no_grad():
        model.cls.predictions.bias[5] = torch.nan
    assert verify_growth(model, grow(model, 2), **padded()).max_rel < 1e-12


def test_few_outputs_raise_no_false_alarm():
    config = build("bert").config
    for seed in (7, 20, 24, 41):  # where the first draw of roundings happens to move the two outputs by little
        torch.manual_seed(seed)
        model = t.BertForNextSentencePrediction(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.3)
        report = verify_growth(model, grow(model, 3), torch.randint(1, 50, (1, 7)))
        assert report.dtype_limited, (seed, report)


def test_bad_input():
    model, big = build("gpt2"), grow(build("gpt2"), 2)
    for ids, error, text in (
        (tokens().double(), TypeError, "integers.*got one of torch.float64"),
        (tokens() > 3, TypeError, "integers.*got one of torch.bool"),
        (tokens().tolist(), TypeError, "integers.*got list"),
        (tokens()[0], ValueError, r"\(B, T\).*got shape \(12,\)"),
        (tokens()[:0], ValueError, r"hold a token at least; got shape \(0, 12\)"),
        (tokens() + 50, ValueError, "from 0 to 49, the vocabulary"),
        (tokens() - 50, ValueError, "from 0 to 49, the vocabulary"),
    ):
        with pytest.raises(error, match=text):
            verify_growth(model, big, ids)
    with pytest.raises(TypeError, match="model must be"):
        verify_growth(None, big, tokens())
    with pytest.raises(TypeError, match="big must be"):
        verify_growth(model, torch.nn.Linear(2, 2), tokens())
    with pytest.raises(ValueError, match="same class; got GPT2LMHeadModel and BertForMaskedLM"):
        verify_growth(model, build("bert"), tokens())
    with pytest.raises(ValueError, match="shape"):
        verify_growth(model, build("gpt2", vocab_size=49), tokens() % 49)


def test_the_report_reads_well():
    text = str(GrowthReport(1e-15, 2e-16, False, 1e-15, 0.0, ("logits",)))
    assert text == "logits: largest difference 1.00e-15, 2.00e-16 of the largest value"
