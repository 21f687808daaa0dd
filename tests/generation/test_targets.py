import math

import numpy as np
import pytest
import torch

from kexue._transformers import GPT2Config, GPT2LMHeadModel
from kexue.generation import BannedTokens, ContainsKeywords, LengthBetween, Target
from kexue.models import KexueConfig, KexueForCausalLM
from reference import search_sampling as reference

TEXTS = [(1, 2, 3, 4, 5), (5,), (7, 7), (0, 19, 0), (1, 2, 3, 4, 5)]


def kexue(**options):
    torch.manual_seed(0)
    return KexueForCausalLM(KexueConfig(20, 16, 2, 4, "causal", **options)).double()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16)).double()


@pytest.mark.parametrize("build", [kexue, gpt2, lambda: kexue(position="rope", pad_token_id=0)])
@pytest.mark.parametrize("ends", [{}, {"bos_id": 3}, {"eos_id": 4}, {"bos_id": 3, "eos_id": 4}])
def test_log_p_is_the_sum_of_the_factors_of_each_text_alone(build, ends):
    model = build().eval()
    found = Target(model, **ends).log_p(TEXTS)
    wanted = [reference.log_causal(model, text, ends.get("bos_id"), ends.get("eos_id")) for text in TEXTS]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-10)


def test_padding_token_inside_a_text_counts_as_a_token():
    model = kexue(pad_token_id=0).eval()
    with torch.no_grad():  # every token takes part
        logits = model(torch.tensor([[5, 0, 6]]), attention_mask=torch.ones(1, 3)).logits.log_softmax(-1)
    wanted = float(logits[0, 0, 0] + logits[0, 1, 6])
    assert Target(model).log_p([(5, 0, 6), (1,) * 9])[0] == pytest.approx(wanted, abs=1e-12)


def test_ids_of_configuration_are_used_and_those_outside_the_vocabulary_are_not():
    assert (Target(gpt2()).bos_id, Target(gpt2()).eos_id) == (None, None)  # 50256 of 20
    model = kexue(bos_token_id=2, eos_token_id=5)
    assert (Target(model).bos_id, Target(model).eos_id) == (2, 5)
    assert Target(model, bos_id=None, eos_id=None).bos_id is None

    class Tokenizer:
        bos_token_id, eos_token_id = 1, None

    assert Target(kexue(), tokenizer=Tokenizer()).bos_id == 1


def test_batches_and_cache_change_nothing_and_repeats_are_not_scored_again():
    model = kexue()
    whole, small, none = Target(model), Target(model, batch_size=1), Target(model, cache_size=0)
    np.testing.assert_allclose(whole.log_p(TEXTS), small.log_p(TEXTS), atol=1e-12)
    assert whole.evaluations == 4  # one text twice
    whole.log_p(TEXTS[:3])
    assert whole.evaluations == 4
    none.log_p(TEXTS)
    np.testing.assert_allclose(none.log_p(TEXTS), whole.log_p(TEXTS), atol=1e-12)
    assert none.evaluations == 8
    bounded = Target(model, cache_size=2)
    bounded.log_p(TEXTS)
    assert len(bounded._log_p) == 2
    with torch.no_grad():
        model.lm_head.decoder.weight.mul_(2.0)
    stale = whole.log_p(TEXTS)
    whole.clear()
    assert abs(whole.log_p(TEXTS) - stale).max() > 1e-3


def test_dropout_is_off_and_flags_return():
    model = kexue(dropout=0.5).train()
    model.kexue.layers[0].eval()
    flags = [module.training for module in model.modules()]
    first = Target(model).log_p(TEXTS)
    np.testing.assert_array_equal(first, Target(model).log_p(TEXTS))
    assert [module.training for module in model.modules()] == flags


def test_low_precision_is_scored_in_float32():
    model = kexue()
    exact, low = Target(model).log_p(TEXTS), Target(kexue().bfloat16()).log_p(TEXTS)
    np.testing.assert_allclose(low, exact, rtol=0.03, atol=0.05)


def test_log_rho_joins_the_three_factors_and_scores_nothing_that_is_forbidden():
    seen = []

    def lm(texts):
        seen.extend(texts)
        return torch.tensor([-1.5 * len(text) for text in texts])

    target = Target(lm, sim=lambda ids: ids[0] / 4, constraint=LengthBetween(2) & BannedTokens([9]), gamma=0.8)
    rho = target.log_rho([(1, 2), (0, 2), (3,), (2, 9), [4, 4, 4], torch.tensor([2, 2])])
    wanted = [-2.4 + math.log(0.25), -math.inf, -math.inf, -math.inf, -3.6, -2.4 + math.log(0.5)]
    np.testing.assert_allclose(rho, wanted)
    assert (3,) not in seen
    assert (2, 9) not in seen
    np.testing.assert_array_equal(target([(1, 2)]), rho[:1])
    np.testing.assert_allclose(target.log_rho(torch.tensor([[1, 2], [4, 4]])), [rho[0], -2.4])
    assert target.log_rho([]).shape == (0,)


def test_gamma_zero_does_not_ask_the_model():
    def lm(texts):
        raise AssertionError

    np.testing.assert_array_equal(Target(lm, gamma=0.0).log_rho([(1,), (2,)]), [0.0, 0.0])


def test_relation_may_take_all_texts_at_once():
    class Near:
        def __call__(self, ids):
            raise AssertionError

        def batch(self, texts):
            return np.array([0.5] * len(texts))

    target = Target(lambda texts: np.zeros(len(texts)), sim=Near())
    np.testing.assert_allclose(target.log_rho([(1,), (2,)]), [math.log(0.5)] * 2)


def test_empty_text_has_a_probability_after_bos_only():
    model = kexue().eval()
    assert Target(model, bos_id=1, eos_id=2).log_p([()])[0] == pytest.approx(reference.log_causal(model, (), 1, 2))
    with pytest.raises(ValueError, match="empty text"):
        Target(model).log_p([()])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"lm": 3}, TypeError),
        ({"lm": len, "sim": 3}, TypeError),
        ({"lm": len, "constraint": [1]}, TypeError),
        ({"lm": len, "gamma": -0.1}, ValueError),
        ({"lm": len, "gamma": math.nan}, ValueError),
        ({"lm": len, "gamma": "1"}, TypeError),
        ({"lm": len, "batch_size": 0}, ValueError),
        ({"lm": len, "cache_size": -1}, ValueError),
        ({"lm": len, "constraint": ContainsKeywords(["good"])}, ValueError),
    ],
)
def test_bad_arguments(arguments, error):
    with pytest.raises(error):
        Target(**arguments)


def test_bad_states_and_scores():
    model = kexue()
    with pytest.raises(ValueError, match="below the size of the vocabulary, 20"):
        Target(model).log_p([(1, 20)])
    with pytest.raises(ValueError, match="bos_id"):
        Target(model, bos_id=20)
    with pytest.raises(ValueError, match="refuses|positions"):
        Target(gpt2()).log_p([(1,) * 30])
    target = Target(lambda texts: [0.0] * len(texts))
    for states, error in (((1, 2), TypeError), ([(1.5,)], TypeError), (["ab"], TypeError), ([(-1,)], ValueError)):
        with pytest.raises(error):
            target.log_rho(states)
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="log-probability"):
            Target(lambda texts, value=value: [value] * len(texts)).log_rho([(1,)])
        with pytest.raises(ValueError, match="sim"):
            Target(lambda texts: [0.0], sim=lambda ids, value=value: value).log_rho([(1,)])
    with pytest.raises(ValueError, match="sim"):
        Target(lambda texts: [0.0], sim=lambda ids: -1.0).log_rho([(1,)])
    with pytest.raises(ValueError, match="shape"):
        Target(lambda texts: 0.0).log_rho([(1,)])
