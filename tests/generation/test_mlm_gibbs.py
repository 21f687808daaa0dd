import math
import signal
from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from kexue._transformers import BertConfig, BertForMaskedLM
from kexue.generation import MLMGibbs, Target, transition_matrix
from kexue.models import KexueConfig, KexueForMaskedLM, KexueForTextAutoencoding
from reference import search_sampling as reference

V, MASK, L = 3, 3, 3
TABLE = np.random.default_rng(0).dirichlet(np.ones(V + 1), size=V + 1) * 0.9 + 0.1 / (V + 1)
STATES = reference.texts(V, [L])


def lm(texts):
    return [reference.log_markov(text, TABLE) for text in texts]


def kexue(vocabulary=V + 1, **options):
    torch.manual_seed(0)
    options = {"mask_token_id": MASK, "initializer_range": 0.4, **options}
    return KexueForMaskedLM(KexueConfig(vocabulary, 16, 2, 4, **options)).double()


def bert(vocabulary=V + 1, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(
        vocab_size=vocabulary, max_position_embeddings=12, pad_token_id=None, initializer_range=0.4, **sizes
    )
    config.mask_token_id = MASK
    return BertForMaskedLM(config).double()


def autoencoder(**options):
    torch.manual_seed(0)
    config = KexueConfig(V + 1, 16, 2, 4, "diagonal", mask_token_id=MASK, initializer_range=0.4, **options)
    return KexueForTextAutoencoding(config).double()


class OnePass(nn.Module):
    """Each token predicted from the sum of the others' vectors and its place: nothing of itself, no mask token."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(attn_mode="diagonal", vocab_size=V + 1, mask_token_id=MASK, pad_token_id=None)
        self.token, self.place = nn.Embedding(V + 1, 8).double(), nn.Embedding(9, 8).double()
        self.out = nn.Linear(8, V + 1).double()

    def forward(self, input_ids, attention_mask=None):
        x = self.token(input_ids) * (1 + self.place.weight[: input_ids.shape[1]])
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        others = x.sum(1, keepdim=True) - x
        return SimpleNamespace(logits=self.out(torch.sin(others) + self.place.weight[: input_ids.shape[1]]))


def conditional(model, text, places, i, temperature=1.0, top_k=0):
    """p(. | text without ``places``) at place i, from one forward pass, float64."""
    ids = torch.tensor([text])
    if getattr(model.config, "attn_mode", None) != "diagonal":
        ids[0, list(places)] = MASK
    with torch.no_grad():
        logits = model(ids).logits[0, i, :V].numpy() / temperature
    if top_k:
        logits[np.argsort(-logits, kind="stable")[top_k:]] = -np.inf
    p = np.exp(logits - logits.max())
    return p / p.sum()


def proposal(model, x, places, eps, **options):
    """{y: q(y<-x)} for the given places."""
    rows = [(1 - eps) * conditional(model, x, places, i, **options) + eps / V for i in places]
    law = {}
    for tokens in product(range(V), repeat=len(places)):
        y = list(x)
        for place, token in zip(places, tokens, strict=True):
            y[place] = token
        law[tuple(y)] = math.prod(row[token] for row, token in zip(rows, tokens, strict=True))
    return law


def exact_matrix(model, pi, block, eps, **options):
    """Metropolis-Hastings for each choice of places, averaged."""
    choices = list(combinations(range(L), block))
    matrix = np.zeros((len(STATES), len(STATES)))
    for places in choices:
        q = np.zeros_like(matrix)
        for i, x in enumerate(STATES):
            for y, p in proposal(model, x, places, eps, **options).items():
                q[i, STATES.index(y)] = p
        matrix += reference.hastings_matrix(STATES, pi, q) / len(choices)
    return matrix


@pytest.mark.parametrize("build", [kexue, bert, OnePass, autoencoder])
@pytest.mark.parametrize(("block", "top_k", "eps"), [(1, 0, 0.05), (2, 0, 0.05), (1, 2, 0.3), (2, 1, 0.3), (3, 0, 1.0)])
def test_exact_form_is_the_formula_and_keeps_the_target(build, block, top_k, eps):
    model, pi = build().eval(), reference.law(lm(STATES))
    kernel = MLMGibbs(model, L, temperature=0.7, top_k=top_k, target=lm, block=block, eps=eps)
    matrix = transition_matrix(kernel, STATES)
    np.testing.assert_allclose(matrix, exact_matrix(model, pi, block, eps, temperature=0.7, top_k=top_k), atol=1e-12)
    assert np.abs(pi @ matrix - pi).max() < 1e-12
    np.testing.assert_allclose(reference.stationary(matrix), pi, atol=1e-9)


@pytest.mark.parametrize("build", [kexue, bert, autoencoder])
@pytest.mark.parametrize(("block", "top_k", "eps"), [(1, 0, 0.0), (2, 2, 0.05), (2, 0, 0.0)])
def test_exact_form_keeps_the_target_with_a_model_in_float32(build, block, top_k, eps):
    pi = reference.law(lm(STATES))
    kernel = MLMGibbs(build().float().eval(), L, top_k=top_k, target=lm, block=block, eps=eps)
    matrix = transition_matrix(kernel, STATES)
    assert np.abs(matrix.sum(1) - 1).max() < 1e-12
    assert np.abs(pi @ matrix - pi).max() < 1e-12


@pytest.mark.parametrize("build", [kexue, bert, autoencoder])
def test_plain_form_of_a_float32_model_has_rows_that_sum_to_one(build):
    matrix = transition_matrix(MLMGibbs(build().float().eval(), L), STATES)
    assert np.abs(matrix.sum(1) - 1).max() < 1e-12


@pytest.mark.parametrize("build", [kexue, bert, OnePass, autoencoder])
def test_plain_form_is_the_mean_of_the_conditionals_and_has_another_law(build):
    model = build().eval()
    matrix = transition_matrix(MLMGibbs(model, L), STATES)
    wanted = np.zeros_like(matrix)
    for i, x in enumerate(STATES):
        for place in range(L):
            for y, p in proposal(model, x, (place,), 0.0).items():
                wanted[i, STATES.index(y)] += p / L
    np.testing.assert_allclose(matrix, wanted, atol=1e-12)
    pi = reference.law(lm(STATES))
    assert np.abs(pi @ matrix - pi).max() > 1e-3


def test_two_orders_of_the_same_updates_have_different_stationary_laws():
    model = kexue().eval()
    orders = []
    for order in ((0, 1, 2), (2, 1, 0)):
        matrix = np.eye(len(STATES))
        for place in order:
            one = np.zeros_like(matrix)
            for i, x in enumerate(STATES):
                for y, p in proposal(model, x, (place,), 0.0).items():
                    one[i, STATES.index(y)] = p
            matrix = matrix @ one
        orders.append(reference.stationary(matrix))
    assert np.abs(orders[0] - orders[1]).sum() > 1e-3  # no joint law has these conditionals


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "options"),
    [
        (kexue, {}),
        (kexue, {"target": lm}),
        (kexue, {"target": lm, "block": 2}),
        (OnePass, {"target": lm, "block": 2}),
        (OnePass, {}),
        (autoencoder, {"target": lm, "block": 2}),
    ],
)
def test_steps_have_the_law_that_transitions_say(build, options):
    chains = 4000
    kernel = MLMGibbs(build(), L, n_chains=chains, seed=1, **options)
    result = kernel.run((0, 1, 2), steps=2, burn_in=0, thin=1)
    matrix = transition_matrix(kernel, STATES)
    start = STATES.index((0, 1, 2))
    for n, law in ((0, matrix[start]), (1, (matrix @ matrix)[start])):
        found = np.bincount([STATES.index(texts[n]) for texts in result.samples], minlength=len(STATES)) / chains
        assert np.abs(found - law).max() < 5 * math.sqrt(0.25 / chains)
        assert (found[law == 0] == 0).all()


def test_exact_chains_reach_the_target():
    target, pi = Target(lm), reference.law(lm(STATES))
    result = MLMGibbs(kexue(), L, target=target, n_chains=50, eps=0.2, seed=1).run(steps=600, burn_in=100, thin=5)
    samples = [text for texts in result.samples for text in texts]
    assert reference.total_variation(samples, STATES, pi) < 0.06
    assert result.log_rho.shape == (50, 100)
    np.testing.assert_allclose(result.log_rho[3], lm(result.samples[3]))
    assert 0.1 < result.acceptance < 1


@pytest.mark.parametrize("fill", ["random", "left-to-right", "uniform"])
@pytest.mark.parametrize("build", [kexue, OnePass, autoencoder])
def test_first_fill_leaves_no_mask_and_lengths_are_kept(fill, build):
    gibbs = MLMGibbs(build(), (2, 6), n_chains=30, fill=fill, seed=2)
    start, later = gibbs.run(steps=0, burn_in=0), gibbs.run(steps=25, burn_in=5, thin=5)
    assert {len(text) for text in start.states} == {2, 3, 4, 5, 6}
    assert [len(text) for text in start.states] == [len(text) for text in later.states]
    assert all(token < V for texts in (start.states, *later.samples) for text in texts for token in text)
    assert [len(texts) for texts in later.samples] == [4] * 30
    assert later.acceptance is None
    assert later.log_rho is None


def test_left_to_right_fill_draws_every_token_from_those_before_it():
    model = kexue().eval()
    states = MLMGibbs(model, 2, n_chains=8000, fill="left-to-right", seed=0).run(steps=0, burn_in=0).states
    pairs = reference.texts(V, [2])
    first = conditional(model, (MASK, MASK), (0, 1), 0)
    law = [first[a] * conditional(model, (a, MASK), (1,), 1)[b] for a, b in pairs]
    assert reference.total_variation(states, pairs, np.array(law)) < 0.03


def test_padding_and_other_chains_change_no_conditional():
    from kexue.generation._mlm import Conditionals

    model = kexue(pad_token_id=0).eval()
    conditionals = Conditionals(model, None, None, 1.0, 0, [])
    ids, real = torch.tensor([[1, 2, 0, 0, 0], [1, 0, 2, 1, 2]]), torch.tensor([[True] * 2 + [False] * 3, [True] * 5])
    with torch.no_grad():
        both = conditionals.log_probs(ids, real, torch.tensor([[1], [3]]))
        first = conditionals.log_probs(ids[:1, :2], real[:1, :2], torch.tensor([[1]]))
        second = conditionals.log_probs(ids[1:], real[1:], torch.tensor([[3]]))
    torch.testing.assert_close(both[:1], first)
    torch.testing.assert_close(both[1:], second)


def test_decoder_runs_on_the_drawn_rows_only_and_the_model_is_left_as_it_was():
    model = bert().train()
    rows = []
    handle = model.get_output_embeddings().register_forward_hook(lambda m, a, out: rows.append(out.shape))
    MLMGibbs(model, 5, n_chains=4, fill="uniform").run(steps=3, burn_in=0)
    assert rows == [torch.Size([4, 1, V + 1])] * 3
    handle.remove()
    assert model.training
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert model(torch.zeros(1, 4, dtype=torch.long)).logits.shape == (1, 4, V + 1)


class Tokenizer:
    all_special_ids = [0, 1]  # noqa: RUF012
    mask_token_id, cls_token_id = 1, 0

    def get_vocab(self):
        return {"[CLS]": 0, "[MASK]": 1, "[unused1]": 2, "a": 3, "b": 4}


def test_special_tokens_are_never_drawn_and_stay_where_they_are():
    model = kexue(6, mask_token_id=None)
    gibbs = MLMGibbs(model, 4, tokenizer=Tokenizer(), prefix=(0,), suffix=(5,), n_chains=20)
    texts = gibbs.run(steps=30, burn_in=0, thin=1).samples
    assert {token for chain in texts for text in chain for token in text} == {3, 4, 5}
    fixed = MLMGibbs(model, 4, tokenizer=Tokenizer()).run([0, 3, 1, 5, 2], steps=40, burn_in=0, thin=1).samples[0]
    assert {(text[0], text[4]) for text in fixed} == {(0, 2)}
    assert {text[2] for text in fixed} <= {3, 4, 5}
    listed = MLMGibbs(model, 4, ban=[0, 2, 3], mask_token_id=1, n_chains=20).run(steps=30, burn_in=0).samples
    assert {token for chain in listed for text in chain for token in text} == {4, 5}


def test_top_one_is_deterministic_and_low_temperature_approaches_it():
    model = kexue()
    best = MLMGibbs(model, 4, top_k=1, seed=1).run((0, 1, 2, 0), steps=60, burn_in=0, thin=60).states
    assert MLMGibbs(model, 4, top_k=1, seed=9).run((0, 1, 2, 0), steps=60, burn_in=0, thin=60).states[0] in [best[0]]
    assert MLMGibbs(model, 4, temperature=1e-4, seed=1).run((0, 1, 2, 0), steps=60, burn_in=0).states == best


def test_seed_decides_resuming_is_exact_and_results_do_not_change():
    def gibbs(**options):
        return MLMGibbs(kexue(), (2, 5), n_chains=3, **options)

    whole = gibbs(seed=4).run(steps=40, burn_in=5, thin=5)
    assert whole.samples == gibbs(seed=4).run(steps=40, burn_in=5, thin=5).samples
    assert whole.samples != gibbs(seed=5).run(steps=40, burn_in=5, thin=5).samples
    for options in ({}, {"target": lm}):
        whole = gibbs(**options).run(steps=40, burn_in=5, thin=5)
        part = gibbs(**options).run(steps=22, burn_in=5, thin=5)
        for _ in range(2):
            rest = gibbs(**options).run(steps=40, burn_in=5, thin=5, resume=part)
            assert rest.samples == whole.samples
            assert rest.acceptance == whole.acceptance
            assert options == {} or np.array_equal(rest.log_rho, whole.log_rho)
        assert part.steps == 22


def test_interrupt_finishes_the_step_and_keeps_the_samples():
    calls = []

    def target(texts):
        calls.append(len(texts))
        if len(calls) == 11:
            signal.raise_signal(signal.SIGINT)
        return lm(texts)

    result = MLMGibbs(kexue(), 3, n_chains=2, target=target).run(steps=50, burn_in=0, thin=1)
    assert result.interrupted
    assert result.steps == 10
    assert [len(texts) for texts in result.samples] == [10, 10]
    assert result.log_rho.shape == (2, 10)


def test_low_precision_model_runs():
    texts = MLMGibbs(kexue().bfloat16(), 4, n_chains=3).run(steps=10, burn_in=0).samples
    assert all(token < V for chain in texts for text in chain for token in text)


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda: MLMGibbs(len), TypeError),
        (lambda: MLMGibbs(kexue(), 0), ValueError),
        (lambda: MLMGibbs(kexue(), (5, 4)), ValueError),
        (lambda: MLMGibbs(kexue(), (2.5, 4)), TypeError),
        (lambda: MLMGibbs(kexue(), temperature=0.0), ValueError),
        (lambda: MLMGibbs(kexue(), temperature=math.inf), ValueError),
        (lambda: MLMGibbs(kexue(), top_k=-1), ValueError),
        (lambda: MLMGibbs(kexue(), ban="all"), ValueError),
        (lambda: MLMGibbs(kexue(), ban=[9]), ValueError),
        (lambda: MLMGibbs(kexue(), ban=[0, 1, 2]), ValueError),
        (lambda: MLMGibbs(kexue(), eps=1.5), ValueError),
        (lambda: MLMGibbs(kexue(), eps=-0.1), ValueError),
        (lambda: MLMGibbs(kexue(), block=0), ValueError),
        (lambda: MLMGibbs(kexue(), n_chains=0), ValueError),
        (lambda: MLMGibbs(kexue(), fill="none"), ValueError),
        (lambda: MLMGibbs(kexue(mask_token_id=None)), ValueError),
        (lambda: MLMGibbs(kexue(mask_token_id=None), mask_token_id=4), ValueError),
        (lambda: MLMGibbs(kexue(), prefix=(7,)), ValueError),
        (lambda: MLMGibbs(nn.Linear(2, 2)), ValueError),
        (lambda: MLMGibbs(autoencoder(self_visible=True)), ValueError),
        (lambda: MLMGibbs(bert(), (8, 20)), ValueError),
        (lambda: MLMGibbs(kexue(), target=3), TypeError),
        (lambda: MLMGibbs(kexue(), 3).run(steps=5, burn_in=6), ValueError),
        (lambda: MLMGibbs(kexue(), 3).run((0, 9)), ValueError),
        (lambda: MLMGibbs(kexue(), 3).run([]), ValueError),
        (lambda: MLMGibbs(kexue(), 3, block=2).run((0,)), ValueError),
        (lambda: MLMGibbs(kexue(), 3, n_chains=3).run([(0,), (1,)]), ValueError),
        (lambda: MLMGibbs(kexue(), 3, target=lambda texts: [-math.inf] * len(texts)).run(), ValueError),
        (lambda: MLMGibbs(kexue(), 3, ban=[0], target=lm).run((0, 1, 2)), ValueError),
        (lambda: MLMGibbs(kexue(), 3, block=4).transitions((0, 1, 2)), ValueError),
    ],
)
def test_bad_arguments(build, error):
    with pytest.raises(error):
        build()
