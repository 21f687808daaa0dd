import math

import numpy as np
import pytest
import torch

from kexue.generation import AutoregressiveProposal, ContainsKeywords, NGramLM, RejectionSampler, Target
from kexue.models import KexueConfig, KexueForCausalLM
from reference import search_sampling as reference

V = 3


def bigrams(order=2):
    table = np.random.default_rng(0).dirichlet(np.ones(V + 1), size=(V + 1,) * (order - 1))
    return NGramLM(np.log(table))


def causal():
    torch.manual_seed(0)
    config = KexueConfig(5, 16, 2, 4, "causal", bos_token_id=3, eos_token_id=4, initializer_range=0.5, dropout=0.5)
    return KexueForCausalLM(config).double()


def all_texts(end, maximum):
    return [(), *[t for t in reference.texts(5 if end == 4 else V, range(1, maximum + 1)) if end not in t]]


@pytest.mark.parametrize("build", [bigrams, lambda: bigrams(3), causal])
def test_law_sums_to_one_and_is_that_of_the_model_below_the_cut(build):
    lm = build()
    q = AutoregressiveProposal(lm, max_length=3)
    texts = all_texts(q.end, 3)
    log_q = q.log_prob(texts)
    assert float(log_q.exp().sum()) == pytest.approx(1, abs=1e-12)
    short = [text for text in texts if len(text) < 3]
    np.testing.assert_allclose(q.log_prob(short), Target(lm).log_p(short), atol=1e-12)


@pytest.mark.parametrize("build", [bigrams, causal])
def test_draws_have_the_law(build):
    q = AutoregressiveProposal(build(), max_length=2)
    texts = all_texts(q.end, 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = q.sample((20000,))
    assert reference.total_variation(drawn, texts, q.log_prob(texts).exp().numpy()) < 0.02


def test_rejection_accepts_as_often_as_the_model_writes_the_keywords_by_itself():
    lm = bigrams()
    q = AutoregressiveProposal(lm, max_length=4)
    texts = all_texts(q.end, 4)
    p = q.log_prob(texts).exp().numpy()
    rates = []
    for words in ([[1]], [[1]] * 2, [[1]] * 3):
        chi = ContainsKeywords(words)

        def target(x, chi=chi):
            return [float(v) if chi(text) else -math.inf for text, v in zip(x, q.log_prob(x), strict=True)]

        sampler = RejectionSampler(target, q, log_m=0.0)
        drawn = sampler.sample(2000, seed=1)
        wanted = np.array([chi(text) for text in texts]) * p
        assert sampler.acceptance == pytest.approx(wanted.sum(), rel=0.1)
        assert reference.total_variation(drawn, texts, wanted / wanted.sum()) < 0.06
        rates.append(sampler.acceptance)
    assert rates[0] > 1.5 * rates[1] > 2 * rates[2]


def test_texts_that_cannot_be_drawn():
    q = AutoregressiveProposal(causal(), max_length=2)
    assert q.log_prob([(0, 1, 2), (4,), (0,)]).isinf().tolist() == [True, True, False]
    assert q.sample((0,)) == []


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda: AutoregressiveProposal(len), TypeError),
        (lambda: AutoregressiveProposal(bigrams(), 0), ValueError),
        (lambda: AutoregressiveProposal(KexueForCausalLM(KexueConfig(5, 16, 1, 4, "causal"))), ValueError),
        (lambda: AutoregressiveProposal(bigrams()).sample(()), ValueError),
        (lambda: AutoregressiveProposal(bigrams()).sample((2, 3)), ValueError),
        (lambda: AutoregressiveProposal(bigrams()).log_prob([(0, 99)]), ValueError),
        (lambda: AutoregressiveProposal(causal()).log_prob([(0, 99)]), ValueError),
    ],
)
def test_bad_arguments(build, error):
    with pytest.raises(error):
        build()
