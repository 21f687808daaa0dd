from __future__ import annotations

import copy
import json
import os
import signal

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from kexue.adversarial import BiGANQP, PairCritic, QPLoss, bigan_networks
from kexue.adversarial.games import BiGANGame
from kexue.training import TrainingInterrupted
from reference import bigan_qp as reference

RNG = np.random.default_rng(0)
X = RNG.uniform(-1, 1, (40, 6)).astype(np.float32)


def small(**options):
    return BiGANQP(**{"z_dim": 3, "lr": 1e-3, **options})


def networks(norm=False):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(8)] if norm else []
    generator = nn.Sequential(nn.Linear(3, 8), *middle, nn.ReLU(), nn.Linear(8, 6), nn.Tanh())
    encoder = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 3))
    critic = PairCritic(nn.Linear(6, 4), nn.Sequential(nn.Linear(7, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1)))
    return generator, encoder, critic


@pytest.fixture(scope="module")
def fitted():
    return small().fit(X, steps=12, batch_size=8)


@pytest.mark.parametrize("norm", [False, True])
def test_losses_and_every_gradient_agree_with_the_article(norm):
    generator, encoder, critic = (m.double() for m in networks(norm))
    x, z = (torch.randn(7, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d)) for d in (6, 3))
    game = BiGANGame(generator, encoder, critic, QPLoss(7.0), 4.0, 6.0, True)
    critic_side, *players = reference.bigan_losses(generator, encoder, critic, x, z, 7.0, 4.0, 6.0)
    (got,) = game.critic_terms(x, z).values()
    torch.testing.assert_close(got, critic_side)
    weights = list(critic.parameters())
    for a, b in zip(
        torch.autograd.grad(got, weights), torch.autograd.grad(critic_side, weights, retain_graph=True), strict=True
    ):
        torch.testing.assert_close(a, b)
    terms = game.player_terms(x, z)
    assert list(terms) == ["generator", "codes", "pictures"]
    for name, a, b in zip(terms, terms.values(), players, strict=True):
        torch.testing.assert_close(a, b)
        mine = torch.autograd.grad(a, game.players(), retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(b, game.players(), retain_graph=True, allow_unused=True)
        for p, q in zip(mine, theirs, strict=True):
            assert (p is None) == (q is None), name
            if p is not None:
                torch.testing.assert_close(p, q)


def test_the_critic_step_builds_no_graph_through_the_players_and_the_other_way_round():
    generator, encoder, critic = networks()
    game = BiGANGame(generator, encoder, critic, QPLoss(), 4.0, 6.0, True)
    x, z = torch.randn(5, 6), torch.randn(5, 3)
    sum(game.critic_terms(x, z).values()).backward()
    assert all(p.grad is None for p in game.players())
    assert all(p.grad is not None for p in critic.parameters())


def test_each_reconstruction_teaches_one_network():
    for stop in (True, False):
        generator, encoder, critic = networks()
        game = BiGANGame(generator, encoder, critic, QPLoss(), 4.0, 6.0, stop)
        terms = game.player_terms(torch.randn(5, 6), torch.randn(5, 3))
        terms["codes"].backward(retain_graph=True)
        assert all((p.grad is None) == stop for p in generator.parameters())
        assert all(p.grad is not None for p in encoder.parameters())
        game.zero_grad()
        terms["pictures"].backward()
        assert all((p.grad is None) == stop for p in encoder.parameters())


def test_one_pass_through_the_critic_gives_the_scores_of_two():
    generator, encoder, critic = networks()
    game = BiGANGame(generator, encoder, critic, QPLoss(), 0.0, 0.0, True)
    x, z, fake, code = torch.randn(5, 6), torch.randn(5, 3), torch.randn(5, 6), torch.randn(5, 3)
    calls = []
    critic.head.register_forward_hook(lambda *_: calls.append(1))  # a hook may look at the batch: two passes then
    apart = game._scores(x, code, fake, z)
    assert len(calls) == 2
    critic.head._forward_hooks.clear()
    for a, b in zip(game._scores(x, code, fake, z), apart, strict=True):
        torch.testing.assert_close(a, b)
    normed = PairCritic(nn.Linear(6, 4), nn.Sequential(nn.BatchNorm1d(7), nn.Linear(7, 1)))
    game = BiGANGame(generator, encoder, normed, QPLoss(), 0.0, 0.0, True)
    torch.testing.assert_close(game._scores(x, code, fake, z)[0], normed(x, code))


def test_shapes_and_what_comes_back(fitted):
    assert fitted.sample(3).shape == (3, 6)
    assert np.abs(fitted.sample(50)).max() <= 1
    assert np.array_equal(fitted.sample(3), fitted.sample(3))
    assert not np.array_equal(fitted.sample(3), fitted.sample(3, random_state=1))
    codes = fitted.transform(X)
    assert codes.shape == (40, 3)
    assert np.array_equal(codes, fitted.codes_)
    assert fitted.inverse_transform(codes).shape == X.shape
    assert {name: len(terms) for name, terms in fitted.history_.items()} == dict.fromkeys(
        ("critic", "generator", "codes", "pictures"), 12
    )
    assert np.array_equal(fitted.transform(torch.from_numpy(X)), codes)
    assert not fitted.generator_.training
    assert all(p.requires_grad for p in fitted.critic_.parameters())


def test_interpolation_is_linear_in_codes_and_includes_both_ends(fitted):
    path = fitted.interpolate(X[0], X[1:2], 5)
    a, b = fitted.transform(X[:2])
    line = np.stack([a + (b - a) * t for t in np.linspace(0, 1, 5)]).astype(np.float32)
    np.testing.assert_allclose(path, fitted.inverse_transform(line), atol=1e-5)
    np.testing.assert_allclose(path[[0, -1]], fitted.inverse_transform(fitted.codes_[:2]), atol=1e-6)


def test_neighbours(fitted):
    distances, numbers = fitted.neighbors(X[:4], k=40)
    assert np.array_equal(numbers[:, 0], np.arange(4))
    assert (distances[:, 0] == 0).all()
    codes = fitted.codes_.astype(float)
    full = np.linalg.norm(codes[:4, None] - codes[None], axis=2)
    np.testing.assert_allclose(distances, np.sort(full, 1), atol=1e-7)
    distances, numbers = fitted.neighbors(X[2], k=3, metric="cosine")
    unit = codes / np.linalg.norm(codes, axis=1, keepdims=True)
    np.testing.assert_allclose(distances[0], np.sort(1 - unit @ unit[2])[:3], atol=1e-7)
    assert numbers[0, 0] == 2


def test_equal_seeds_give_equal_weights_and_the_callers_random_state_stays(fitted):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = small().fit(X, steps=12, batch_size=8)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(again.codes_, fitted.codes_)
    other = small(random_state=1).fit(X, steps=12, batch_size=8)
    assert not np.array_equal(other.codes_, fitted.codes_)
    assert clone(fitted).get_params() == small().get_params()


def test_given_networks_are_copied(fitted):
    generator, encoder, critic = networks(norm=True)
    before = [p.clone() for m in (generator, encoder, critic) for p in m.parameters()]
    data = X.copy()
    model = small(generator=generator, encoder=encoder, critic=critic).fit(data, steps=3, batch_size=8)
    after = [p for m in (generator, encoder, critic) for p in m.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert model.generator_ is not generator
    assert generator.training
    assert np.array_equal(data, X)


def test_bytes_and_float64_are_the_same_data():
    raw = RNG.integers(0, 256, (20, 6), dtype=np.uint8)
    a = small().fit(raw, steps=3, batch_size=4)
    scaled = raw.astype(np.float32) / np.float32(127.5) - 1
    b = small().fit(scaled.astype(float), steps=3, batch_size=4)
    assert np.array_equal(a.codes_, b.codes_)
    double = tuple(m.double() for m in networks())
    c = small(generator=double[0], encoder=double[1], critic=double[2]).fit(X, steps=2, batch_size=4)
    assert c.sample(2).dtype == np.float64


def test_frozen_weights_of_given_networks_stay_as_they_are():
    generator, encoder, critic = networks()
    critic.features.requires_grad_(False)
    model = small(generator=generator, encoder=encoder, critic=critic).fit(X, steps=3, batch_size=8)
    assert torch.equal(model.critic_.features.weight, critic.features.weight)
    assert [p.requires_grad for p in model.critic_.parameters()] == [False, False, True, True, True, True]
    assert not torch.equal(model.critic_.head[0].weight, critic.head[0].weight)


def test_new_settings_wait_for_the_next_fit(fitted, tmp_path):
    model = copy.deepcopy(fitted).set_params(z_dim=7)
    assert np.array_equal(model.sample(3), fitted.sample(3))
    assert np.array_equal(model.inverse_transform(model.codes_), fitted.inverse_transform(fitted.codes_))
    model.save(tmp_path / "model")
    loaded = BiGANQP.load(tmp_path / "model")
    assert loaded.z_dim == 7
    assert np.array_equal(loaded.sample(3), fitted.sample(3))


def test_reversed_arrays_and_lists_are_samples(fitted):
    assert np.array_equal(small().fit(X[::-1], steps=2, batch_size=8).codes_,
                          small().fit(X[::-1].copy(), steps=2, batch_size=8).codes_)  # fmt: skip
    assert np.array_equal(fitted.interpolate(X[0].tolist(), X[1][::-1], 3), fitted.interpolate(X[0], X[1, ::-1], 3))
    with pytest.raises(TypeError, match="a must be an array"):
        fitted.interpolate("a", X[0])


class Stop(Exception):
    pass


def test_a_killed_run_continues_to_the_same_bits(tmp_path):
    whole = small().fit(X, steps=9, batch_size=8)

    def die(record):
        if record["step"] == 7:
            raise Stop

    with pytest.raises(Stop):
        small().fit(X, steps=9, batch_size=8, checkpoint=tmp_path, checkpoint_every=4, on_step=die)
    steps = []
    rest = small().fit(
        X, steps=9, batch_size=8, checkpoint=tmp_path, checkpoint_every=4, on_step=lambda r: steps.append(r["step"])
    )
    assert steps == [5, 6, 7, 8, 9]
    assert np.array_equal(rest.codes_, whole.codes_)
    assert rest.history_ == whole.history_
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    done = small().fit(X, steps=9, batch_size=8, checkpoint=tmp_path)
    assert np.array_equal(done.codes_, whole.codes_)
    with pytest.raises(ValueError, match="lam was"):
        small(lam=1.0).fit(X, steps=9, batch_size=8, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="fingerprint"):
        small().fit(X / 2, steps=9, batch_size=8, checkpoint=tmp_path)


def test_ctrl_c_finishes_the_step_and_leaves_a_usable_estimator(tmp_path):
    def press(record):
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    model = small()
    with pytest.raises(TrainingInterrupted) as stop:
        model.fit(X, steps=6, batch_size=8, checkpoint=tmp_path, on_step=press)
    assert stop.value.step == 3
    assert np.array_equal(model.codes_, small().fit(X, steps=3, batch_size=8).codes_)
    rest = small().fit(X, steps=6, batch_size=8, checkpoint=tmp_path)
    assert np.array_equal(rest.codes_, small().fit(X, steps=6, batch_size=8).codes_)
    model = small()
    with pytest.raises(KeyboardInterrupt, match="step 3 of 6, which is not saved"):
        model.fit(X, steps=6, batch_size=8, on_step=press)
    assert model.sample(1).shape == (1, 6)


def test_on_step_can_end_the_training():
    model = small().fit(X, steps=50, batch_size=8, on_step=lambda record: record["step"] == 2)
    assert len(model.history_["critic"]) == 2


def test_saving_and_loading(fitted, tmp_path):
    fitted.save(tmp_path / "own")
    loaded = BiGANQP.load(tmp_path / "own")
    assert np.array_equal(loaded.sample(4), fitted.sample(4))
    assert np.array_equal(loaded.transform(X), fitted.codes_)
    assert loaded.history_ == fitted.history_
    assert loaded.get_params() == fitted.get_params()
    assert np.array_equal(loaded.neighbors(X, 3)[1], fitted.neighbors(X, 3)[1])
    fitted.save(tmp_path / "own")  # replaces
    given = dict(zip(("generator", "encoder", "critic"), networks(), strict=True))
    model = small(**given).fit(X, steps=2, batch_size=8)
    model.save(tmp_path / "theirs")
    with pytest.raises(ValueError, match="give all three"):
        BiGANQP.load(tmp_path / "theirs")
    assert np.array_equal(BiGANQP.load(tmp_path / "theirs", **given).sample(2), model.sample(2))
    with pytest.raises(ValueError, match="no saved BiGAN-QP"):
        BiGANQP.load(tmp_path)
    (tmp_path / "own" / "weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="no complete BiGAN-QP"):
        BiGANQP.load(tmp_path / "own")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="choose another folder"):
        fitted.save(tmp_path / "other")


def test_a_loss_that_is_not_finite_names_its_term():
    class Wild(nn.Linear):
        def forward(self, x):
            return super().forward(x) * torch.inf

    generator, _, critic = networks()
    encoder = nn.Sequential(nn.Linear(6, 3), Wild(3, 3))
    with pytest.raises(FloatingPointError, match="'critic' of the critic's loss is nan in step 1"):
        small(generator=generator, encoder=encoder, critic=critic).fit(X, steps=2, batch_size=8)


@pytest.mark.parametrize(
    ("options", "fit", "data", "error", "message"),
    [
        ({}, {}, np.zeros((0, 6), np.float32), ValueError, "at least one sample"),
        ({}, {}, np.zeros(6, np.float32), ValueError, r"\(6,\)"),
        ({}, {}, X * 2, ValueError, r"lie in \[-1, 1\]"),
        ({}, {}, np.where(X > 0.9, np.nan, X), ValueError, "finite"),
        ({}, {}, X.astype(int), TypeError, "int64"),
        ({}, {}, "digits", TypeError, "str"),
        ({}, {"steps": 0}, X, ValueError, "steps must be at least 1; got 0"),
        ({}, {"batch_size": 2.5}, X, TypeError, "batch_size"),
        ({}, {"batch_size": 1}, X, ValueError, "batch_size must be at least 2 where there is batch normalisation"),
        ({}, {}, X.astype(object), TypeError, "dtype object"),
        ({}, {"critic_steps": 0}, X, ValueError, "critic_steps"),
        ({"z_dim": 0}, {}, X, ValueError, "z_dim"),
        ({"lam": 0}, {}, X, ValueError, "lam"),
        ({"beta_z": -1}, {}, X, ValueError, "beta_z"),
        ({"beta_x": "a"}, {}, X, TypeError, "beta_x"),
        ({"stop_gradient": 2}, {}, X, TypeError, "stop_gradient"),
        ({"power": 3}, {}, X, ValueError, "even"),
        ({"metric": "cos"}, {}, X, ValueError, "cos"),
        ({"lr": 0.0}, {}, X, ValueError, "lr"),
        ({"betas": (0.5, 1.0)}, {}, X, ValueError, "below 1"),
        ({"betas": 0.5}, {}, X, TypeError, "two numbers"),
        ({"random_state": -1}, {}, X, ValueError, "random_state"),
        ({"generator": nn.Linear(3, 6)}, {}, X, ValueError, "encoder, critic missing"),
    ],
)
def test_bad_input_is_rejected(options, fit, data, error, message):
    with pytest.raises(error, match=message):
        small(**options).fit(data, **{"steps": 1, "batch_size": 4, **fit})


def test_networks_that_do_not_fit_are_rejected(fitted):
    g, e, c = networks()
    for change, message in [
        ({"encoder": nn.Linear(6, 4)}, r"z_dim = 3\); got \(2, 4\)"),
        ({"generator": nn.Linear(3, 5)}, r"\(B, 6\); got \(2, 5\)"),
        ({"critic": PairCritic(nn.Linear(6, 4), nn.Linear(7, 2))}, r"scores .* got \(2, 2\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            small(**{"generator": g, "encoder": e, "critic": c, **change}).fit(X, steps=1)
    with pytest.raises(TypeError, match="encoder must be a torch"):
        small(generator=g, encoder=len, critic=c).fit(X, steps=1)
    with pytest.raises(ValueError, match=r"\(N, 6\)"):
        fitted.transform(X[:, :5])
    with pytest.raises(ValueError, match=r"\(N, 3\)"):
        fitted.inverse_transform(X)
    with pytest.raises(ValueError, match="at most the 40"):
        fitted.neighbors(X, k=41)
    with pytest.raises(ValueError, match="at least 2"):
        fitted.interpolate(X[0], X[1], 1)
    with pytest.raises(ValueError, match="'manhattan'"):
        fitted.neighbors(X, metric="manhattan")


def test_networks_for_pictures():
    generator, encoder, critic = bigan_networks((32, 32), 5, kind="conv", width=16)
    x = generator(torch.randn(2, 5))
    assert x.shape == (2, 32, 32)
    assert encoder(x).shape == (2, 5)
    assert critic(x, encoder(x)).shape == (2, 1)
    assert not any(name.endswith("bias") for name, _ in critic.named_parameters())
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in critic.modules())
    with pytest.raises(ValueError, match="power of 2"):
        bigan_networks((3, 20, 20), 5, kind="conv")
