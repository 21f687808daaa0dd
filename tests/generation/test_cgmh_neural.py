"""CGMH over neural models: continuing from the edit, masked proposals, screens, special tokens."""

import numpy as np
import pytest
import torch
from torch import nn

from kexue.generation import CGMH, ContainsKeywords, LengthBetween, Target, transition_matrix
from kexue.generation._scoring import CausalScorer, TargetScorer, token_terms
from kexue.models import KexueConfig, KexueForCausalLM, KexueForMaskedLM, KexueForTextAutoencoding

V, BOS, EOS, MASK = 9, 6, 7, 8


def sharp(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.dim() > 1:
            p.data.normal_(0, 0.4, generator=generator)
    return model


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12}
    return sharp(GPT2LMHeadModel(GPT2Config(bos_token_id=BOS, eos_token_id=EOS, **sizes)))


def causal(**options):
    options = {"bos_token_id": BOS, "eos_token_id": EOS} | options
    return sharp(KexueForCausalLM(KexueConfig(V, 16, 2, 2, attn_mode="causal", max_position=12, **options)))


LMS = {
    "gpt2": gpt2,
    "learned": causal,
    "rope, padding": lambda: causal(position="rope", pad_token_id=0),
    "no beginning": lambda: causal(bos_token_id=None),
    "no end": lambda: causal(eos_token_id=None),
    "neither": lambda: causal(bos_token_id=None, eos_token_id=None),
}


def bert():
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return sharp(BertForMaskedLM(BertConfig(vocab_size=V, max_position_embeddings=16, **sizes)), 1)


class Bare(nn.Module):
    """A masked model without configuration and without attention_mask."""

    def __init__(self):
        super().__init__()
        self.inner = sharp(KexueForMaskedLM(KexueConfig(V, 16, 1, 2, mask_token_id=MASK)), 2)

    def forward(self, input_ids):
        return self.inner(input_ids).logits


MLMS = {
    "none": lambda: None,
    "masked": lambda: sharp(KexueForMaskedLM(KexueConfig(V, 16, 1, 2, mask_token_id=MASK)), 2),
    "one pass": lambda: sharp(
        KexueForTextAutoencoding(KexueConfig(V, 16, 1, 2, attn_mode="diagonal", mask_token_id=MASK)), 2
    ),
    "bert": bert,
    "bare": Bare,
}


def make(lm="learned", mlm="none", screen=None, sim=None, **options):
    more = options.pop("more", None)
    constraint = ContainsKeywords([[2], [3, 4]])
    target = Target(LMS[lm](), sim, constraint if more is None else constraint & more, 0.8)
    settings = {"vocab": [1, 2, 3, 4, 5], "max_length": 8, "n_chains": 16, "candidates": 3, "eps": 0.1, "seed": 1}
    return CGMH(target, MLMS[mlm](), screen=screen, mask_token_id=MASK, **(settings | options))


@pytest.mark.slow
@pytest.mark.parametrize("screen", [None, "next"])
@pytest.mark.parametrize("lm", LMS)
def test_scores_from_kept_prefixes_are_those_of_the_whole_sentences(lm, screen):
    sampler = make(lm, screen=screen, sim=lambda ids: 0.1 + ids.count(5), more=LengthBetween(2, 7))
    assert sampler.continues()
    result = sampler.run(None, 150, 0, 5, progress=False)
    texts = [text for chain in result.samples for text in chain]
    sampler.target.clear()
    np.testing.assert_allclose(result.log_rho.ravel(), sampler.target.log_rho(texts), atol=5e-5)
    assert len(set(texts)) > 20
    assert max(map(len, texts)) <= 7
    again = make(lm, screen=screen, sim=lambda ids: 0.1 + ids.count(5), more=LengthBetween(2, 7))
    assert again.run(None, 150, 0, 5, progress=False).samples == result.samples


@pytest.mark.slow
@pytest.mark.parametrize("mlm", MLMS)
@pytest.mark.parametrize("screen", [None, "next"])
@pytest.mark.parametrize("lm", ["gpt2", "neither"])
def test_stationary_law_of_a_neural_target(lm, mlm, screen):
    sampler = make(lm, mlm, screen, max_length=4)
    states = sampler.states()
    pi = np.exp(sampler.target.log_rho([ids for ids, _ in states]))
    pi /= pi.sum()
    p = transition_matrix(sampler, states)
    assert np.abs(pi @ p - pi).max() < 1e-12
    assert not any(token in (BOS, EOS, MASK, 0) for ids, _ in states for token in ids)


@pytest.mark.slow
@pytest.mark.parametrize(("mlm", "screen"), [("none", None), ("none", "next"), ("masked", "next"), ("one pass", None)])
def test_runs_follow_the_law(mlm, screen):
    sampler = make("learned", mlm, screen, max_length=4, n_chains=128)
    states = sampler.states()
    pi = np.exp(sampler.target.log_rho([ids for ids, _ in states]))
    pi /= pi.sum()
    result = sampler.run(None, 420, 20, 5, progress=False)
    place = {state: i for i, state in enumerate(states)}
    counts = np.zeros(len(states))
    for texts, starts in zip(result.samples, result.positions.tolist(), strict=True):
        for text, where in zip(texts, starts, strict=True):
            counts[place[text, tuple(where)]] += 1
    floor = np.sqrt(pi * (1 - pi) / (2 * np.pi * counts.sum())).sum()
    assert 0.5 * np.abs(counts / counts.sum() - pi).sum() < 3 * floor


def test_the_quick_first_stage_uses_the_factors_that_a_full_pass_gives():
    sampler = make("gpt2", screen="next")
    scorer = CausalScorer(sampler.target, 8)
    from kexue.generation._edits import Batch

    state = ((2, 1, 3, 4), (0, 2))
    batch = Batch.of([state] * 4, 8, 2)
    scorer.begin(batch)
    op, place = np.array([0, 1, 2, 0]), np.array([4, 1, 1, 0])
    hole = sampler.edits.open_hole(batch, op, place)
    new, closed = sampler.edits.fill(hole, place, np.array([5, 5, 5, 1])), sampler.edits.close(hole, place)
    new.put(np.array([1]), closed.rows(np.array([1])))
    assert new.tuples() == [(2, 1, 3, 4, 5), (2, 3, 4), (2, 5, 3, 4), (1, 2, 1, 3, 4)]
    old, *rest = token_terms(sampler.target, [state[0], *new.tuples()])
    expected = [
        rest[0][4] + rest[0][5] - old[4],
        rest[1][1] - old[1] - old[2],
        rest[2][1] + rest[2][2] - old[1] - old[2],
        rest[3][0] + rest[3][1] - old[0],
    ]
    rows = np.arange(4)
    np.testing.assert_allclose(scorer.local(rows, new, place, op), 0.8 * np.array(expected), atol=1e-5)
    some = np.array([0, 2])
    np.testing.assert_allclose(
        scorer.score(some, new.rows(some), place[some]), sampler.target.log_rho(new.rows(some).tuples()), atol=1e-5
    )


class NoCache(nn.Module):
    """A causal model that cannot be continued."""

    def __init__(self):
        super().__init__()
        self.inner = causal()
        self.config = self.inner.config

    def forward(self, input_ids):
        return self.inner(input_ids).logits


def test_a_model_without_kept_keys_is_scored_as_a_whole_with_the_same_law():
    plain, kept = make(), make()
    plain.target.lm = NoCache()
    assert not plain.continues()
    plain = CGMH(plain.target, vocab=plain.vocab.tolist(), max_length=8, n_chains=16, candidates=3, eps=0.1, seed=1)
    a, b = plain.run(None, 60, 0, 1, progress=False), kept.run(None, 60, 0, 1, progress=False)
    assert a.samples == b.samples
    np.testing.assert_allclose(a.log_rho, b.log_rho, atol=5e-5)
    plain.screen = "next"
    with pytest.raises(ValueError, match="kept keys and values"):
        plain.run(None, 5, 0, 1, progress=False)


def test_models_stay_as_they_were():
    sampler = make("learned", "masked")
    sampler.target.lm.train()
    sampler.proposal.train()
    before = {k: v.clone() for k, v in sampler.target.lm.state_dict().items()}
    sampler.run(None, 5, 0, 1, progress=False)
    assert sampler.target.lm.training
    assert sampler.proposal.training
    assert all(torch.equal(v, before[k]) for k, v in sampler.target.lm.state_dict().items())
    assert all(p.grad is None for p in sampler.target.lm.parameters())


def test_special_tokens_are_never_written():
    lm = causal(pad_token_id=0)
    target = Target(lm, constraint=ContainsKeywords([[2]]))
    mlm = MLMS["masked"]()
    assert set(CGMH(target, mlm).vocab.tolist()) == {1, 2, 3, 4, 5}
    given = CGMH(target, mlm, vocab=range(V))  # the mask and the ends go, whatever is asked for
    assert set(given.vocab.tolist()) == {0, 1, 2, 3, 4, 5}
    result = CGMH(target, mlm, n_chains=8, max_length=6, eps=1.0).run([2], 60, 0, 1, progress=False)
    assert {token for chain in result.samples for text in chain for token in text} <= {1, 2, 3, 4, 5}


def test_masked_proposals_read_prefix_and_suffix_and_ignore_padding():
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = KexueConfig(V, 16, 1, 2)

        def forward(self, input_ids, attention_mask=None):
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            seen.extend(tuple(row[keep.bool()].tolist()) for row, keep in zip(input_ids, real, strict=True))
            return torch.zeros(*input_ids.shape, V)

    target = Target(lambda texts: [0.0] * len(texts))
    sampler = CGMH(target, Spy(), vocab=[1, 2], max_length=3, mask_token_id=MASK, prefix=[BOS], suffix=[EOS, 0])
    sampler.transitions((1, 2))
    assert set(seen) == {
        (BOS, MASK, 1, 2, EOS, 0), (BOS, 1, MASK, 2, EOS, 0), (BOS, 1, 2, MASK, EOS, 0),
        (BOS, MASK, 2, EOS, 0), (BOS, 1, MASK, EOS, 0),
    }  # fmt: skip


def test_low_precision_models_run():
    lm = causal().to(torch.bfloat16)
    target = Target(lm, constraint=ContainsKeywords([[2]]))
    result = CGMH(target, vocab=[1, 2, 3], max_length=6, n_chains=4).run([2], 30, 0, 1, progress=False)
    assert np.isfinite(result.log_rho).all()


def test_generic_scorer_refuses_the_quick_stage():
    with pytest.raises(ValueError, match="causal model"):
        TargetScorer(Target(lambda texts: [0.0])).local(*[None] * 4)
