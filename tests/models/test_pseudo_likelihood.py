import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from kexue.models import KexueConfig, KexueForMaskedLM, masked_token_log_probs

MASK, VOCABULARY = 4, 40


def bert(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, initializer_range=0.3, **sizes, **options)).double().eval()


def ids(batch=3, length=7):
    return torch.randint(5, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def one_by_one(model, input_ids, mask, **inputs):
    """The definition: one text, one masked token, one pass at a time, without padding."""
    out = torch.zeros(input_ids.shape, dtype=torch.float64)
    for b in range(len(input_ids)):
        kept = mask[b].nonzero().squeeze(1)
        for i, column in enumerate(kept):
            copy = input_ids[b, kept][None].clone()
            copy[0, i] = MASK
            given = {name: value[b, kept][None] for name, value in inputs.items()}
            with torch.no_grad():
                scores = model(input_ids=copy, **given).logits[0, i]
            out[b, column] = scores.log_softmax(-1)[input_ids[b, column]]
    return out


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_equals_the_definition_for_texts_of_several_lengths(batch_size):
    model, input_ids = bert(), ids()
    mask = torch.arange(7)[None] < torch.tensor([[4], [7], [1]])
    segments = (ids() % 2).contiguous()
    got = masked_token_log_probs(
        model, input_ids, mask, mask_token_id=MASK, batch_size=batch_size, token_type_ids=segments
    )
    torch.testing.assert_close(got, one_by_one(model, input_ids, mask, token_type_ids=segments))
    assert not got[~mask].any()
    full = masked_token_log_probs(model, input_ids, mask_token_id=MASK, batch_size=batch_size)
    torch.testing.assert_close(full, one_by_one(model, input_ids, torch.ones_like(mask)))


def test_the_head_of_our_own_model_runs_on_masked_rows_alone():
    torch.manual_seed(0)
    model = KexueForMaskedLM(KexueConfig(VOCABULARY, 16, 2, 2, mask_token_id=MASK, type_vocab_size=2)).double().eval()
    input_ids, segments = ids(), (ids() % 2).contiguous()
    mask = torch.arange(7)[None] < torch.tensor([[4], [7], [1]])
    rows = []
    model.lm_head.register_forward_hook(lambda _, args, out: rows.append(out.shape[:-1].numel()))
    got = masked_token_log_probs(model, input_ids, mask, batch_size=5, token_type_ids=segments)
    assert sum(rows) == mask.sum()
    torch.testing.assert_close(got, one_by_one(model, input_ids, mask, token_type_ids=segments))


def test_the_id_of_the_mask_is_taken_from_the_configuration():
    model = bert()
    with pytest.raises(ValueError, match="mask_token_id must be given"):
        masked_token_log_probs(model, ids())
    model.config.mask_token_id = MASK
    assert torch.equal(masked_token_log_probs(model, ids()), masked_token_log_probs(model, ids(), mask_token_id=MASK))


def test_dropout_is_off_and_the_mode_of_every_module_comes_back():
    model = bert()
    expected = masked_token_log_probs(model, ids(), mask_token_id=MASK)
    model.train()
    model.bert.embeddings.eval()
    before = [m.training for m in model.modules()]
    assert torch.equal(masked_token_log_probs(model, ids(), mask_token_id=MASK), expected)
    assert [m.training for m in model.modules()] == before


def test_a_text_with_holes_and_left_padding():
    model, input_ids = bert(), ids(2, 5)
    mask = torch.tensor([[False, True, True, True, True], [True, True, True, True, False]])
    got = masked_token_log_probs(model, input_ids, mask.long(), mask_token_id=MASK)
    assert not got[~mask].any()
    assert (got[mask] < 0).all()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
def test_nothing_to_score(shape):
    got = masked_token_log_probs(bert(), torch.zeros(shape, dtype=torch.long), mask_token_id=MASK)
    assert got.shape == shape
    all_padding = masked_token_log_probs(bert(), ids(), torch.zeros(3, 7), mask_token_id=MASK)
    assert torch.equal(all_padding, torch.zeros(3, 7))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": len}, TypeError, "model must be a torch module"),
        ({"input_ids": [[1]]}, TypeError, "input_ids must be a tensor; got list"),
        ({"input_ids": torch.zeros(2, 3)}, TypeError, "integers; got dtype torch.float32"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, ValueError, r"\(B, T\); got shape \(3,\)"),
        ({"attention_mask": torch.ones(3, 6)}, ValueError, r"shape \(3, 7\); got \(3, 6\)"),
        ({"attention_mask": torch.full((3, 7), 2)}, ValueError, "1 .takes part. and 0 only"),
        ({"mask_token_id": -1}, ValueError, "mask_token_id must be at least 0"),
        ({"mask_token_id": 1.5}, TypeError, "mask_token_id must be an integer"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"token_type_ids": torch.zeros(3, 6)}, ValueError, "token_type_ids must be a tensor of shape"),
    ],
)
def test_bad_input_is_rejected(change, error, words):
    given = {"model": bert(), "input_ids": ids(), "mask_token_id": MASK} | change
    with pytest.raises(error, match=words):
        masked_token_log_probs(given.pop("model"), given.pop("input_ids"), **given)


def test_inputs_are_not_changed():
    class Copying(nn.Module):
        def forward(self, input_ids, attention_mask):
            return type("Output", (), {"logits": nn.functional.one_hot(input_ids, VOCABULARY).double()})

    input_ids, mask = ids(), torch.ones(3, 7)
    copies = input_ids.clone(), mask.clone()
    got = masked_token_log_probs(Copying(), input_ids, mask, mask_token_id=MASK)
    assert torch.equal(input_ids, copies[0])
    assert torch.equal(mask, copies[1])
    # The model repeats its input, so that the masked token is one of 39 with equal scores.
    torch.testing.assert_close(
        got, torch.full_like(got, -float(torch.log(torch.tensor(39 + torch.e)))), rtol=1e-6, atol=0
    )
