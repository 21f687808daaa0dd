from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from torch import nn

from kexue.adversarial import AdversarialTrainer, QPCritic, QPLoss, Ranking, gan_networks, rank_gans
from kexue.adversarial.judges import Judge
from kexue.stats import frechet_distance

G = torch.Generator().manual_seed(0)
X = torch.randn(120, 3, generator=G).tanh()
EVERY = ["sgan", "wgan-clip", "wgan-sn", "wgan-gp", "wgan-gp1", "wgan-div", "r1", "gn", "gran", "gan-qp", "bigan-qp"]


@pytest.fixture(scope="module")
def ranking():
    return rank_gans(X, EVERY, seeds=[3, 5], steps=4, batch_size=8, z_dim=2)


def test_every_method_is_trained_with_every_seed(ranking):
    assert {(run["method"], run["seed"]) for run in ranking.runs} == {(m, s) for m in EVERY for s in (3, 5)}
    assert not any(run["failed"] for run in ranking.runs)
    rows = ranking.summary()
    assert [row["fid"] for row in rows] == sorted(row["fid"] for row in rows)
    assert rows[0]["method"] == ranking.best
    assert min(row["cost"] for row in rows) == 1
    both = [run["fid"] for run in ranking.runs if run["method"] == "gn"]
    row = next(row for row in rows if row["method"] == "gn")
    assert row["fid"] == np.mean(both)
    assert row["fid_range"] == (min(both), max(both))
    assert all(method in str(ranking) for method in EVERY)
    assert json.loads(json.dumps(ranking.runs)) == ranking.runs
    assert set(ranking.samples) == set(EVERY)


def test_equal_seeds_give_equal_figures(ranking):
    again = rank_gans(X, ["gran", "gn"], seeds=[3], steps=4, batch_size=8, z_dim=2)
    old = {run["method"]: run["fid"] for run in ranking.runs if run["seed"] == 3}
    assert {run["method"]: run["fid"] for run in again.runs} == {m: old[m] for m in ("gran", "gn")}


def test_the_figure_names_every_method(ranking, tmp_path):
    figure = ranking.figure()
    figure.savefig(tmp_path / "ranking.png")
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert sorted(label.split()[0] for label in labels) == sorted(EVERY)


def test_classes_and_features_of_a_classifier():
    labels = (X[:, 0] > 0).long().numpy()
    judge = MLPClassifier((6, 4), max_iter=200, tol=0.1, random_state=0, activation="tanh").fit(X.numpy(), labels)
    hidden = np.tanh(
        np.tanh(X.numpy() @ judge.coefs_[0] + judge.intercepts_[0]) @ judge.coefs_[1] + judge.intercepts_[1]
    )
    np.testing.assert_allclose(Judge(judge).features(X).numpy(), hidden, atol=1e-6)
    assert Judge(judge).classes_found(X) == 2
    found = rank_gans(X, ["sgan"], judge, 1, steps=2, batch_size=8, z_dim=2)
    assert found.total == 2
    assert found.runs[0]["found"] in (1, 2)
    assert "found of 2" in str(found)


def test_modes_of_a_mixture_are_counted_in_the_samples():
    centres = torch.tensor([[0.0, 0.0, 0.0], [9.0, 9.0, 9.0]])
    found = rank_gans(X, ["sgan"], seeds=1, steps=2, batch_size=8, z_dim=2, modes=(centres, 2.0))
    assert (found.runs[0]["found"], found.total, found.runs[0]["inside"]) == (1, 2, 1.0)


def test_other_judges():
    assert torch.equal(Judge(lambda x: 2 * x).features(X), 2 * X.double())
    assert Judge(nn.Linear(3, 2)).features(X).shape == (120, 2)
    with pytest.raises(TypeError, match="got str"):
        Judge("clf")
    with pytest.raises(ValueError, match="120 samples; got 1"):
        Judge(lambda x: x[:1]).features(X)


@pytest.mark.parametrize("kind", [LogisticRegression, KNeighborsClassifier])
def test_any_classifier_judges(kind):
    judge = kind().fit(X.numpy(), (X > 0).sum(1).numpy())
    scores = judge.decision_function if hasattr(judge, "decision_function") else judge.predict_proba
    np.testing.assert_allclose(Judge(judge).features(X), scores(X.numpy()), rtol=1e-6)
    found = rank_gans(X, ["sgan"], judge, np.int64(1), steps=1, batch_size=8, z_dim=2)
    assert found.total == 4
    with pytest.raises(ValueError, match="not fitted"):
        rank_gans(X, ["sgan"], kind(), 1, steps=1)


def test_a_judge_of_other_samples_is_rejected():
    judge = MLPClassifier((4,), max_iter=200, tol=0.5).fit(X[:, :2].numpy(), (X[:, 0] > 0).numpy())
    with pytest.raises(ValueError, match="2 numbers a sample; got samples of 3"):
        Judge(judge).features(X)
    assert Judge(nn.Linear(3, 2).double()).features(X).shape == (120, 2)


def test_a_failed_training_is_said_and_ranks_last():
    class Broken(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x) * math.nan

    found = rank_gans(
        X, ["gan-qp"], seeds=1, steps=2, batch_size=8, z_dim=2,
        networks=lambda shape, z: (gan_networks(shape, z)[0], Broken(gan_networks(shape, z)[1])),
    )  # fmt: skip
    assert found.runs[0]["failed"]
    assert math.isnan(found.summary()[0]["fid"])
    assert "1 failed" in str(found)
    runs = [
        {"method": m, "seed": 0, "fid": f, "seconds": 1.0, "failed": b}
        for m, f, b in (("a", math.nan, True), ("b", 2.0, False))
    ]
    assert Ranking(runs, 0.1).best == "b"
    runs[0]["seconds"] = 0.001  # it ended early
    assert [row["cost"] for row in Ranking(runs, 0.1).summary()] == [1.0, 0.001]
    with pytest.raises(ValueError, match="no training was completed"):
        _ = Ranking(runs[:1], 0.1).best
    assert Ranking(runs[:1], 0.1).figure().axes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, ["ban"]), ValueError, "'ban'"),
        ((X, "sgan"), TypeError, "'sgan'"),
        ((X, []), ValueError, "at least one"),
        ((X, ["gn", "gn"]), ValueError, "different"),
        ((X, ["gn"], None, 0), ValueError, "at least one seed"),
        ((X, ["gn"], None, 1.5), TypeError, "1.5"),
        ((X, ["gn"], None, [-1]), ValueError, "random_state"),
        ((X[:6], ["gn"]), ValueError, "at least k \\+ 2 = 7 samples; got 6"),
        ((X / 0, ["gn"]), ValueError, "finite"),
    ],
)
def test_bad_input_is_rejected(arguments, error, message):
    with pytest.raises(error, match=message):
        rank_gans(*arguments, steps=1)


class Hinge(nn.Sequential):
    """A critic of the user's own."""

    bounded = 0

    def critic_loss(self, x_real, x_fake):
        return (1 - self(x_real)).relu().mean() + (1 + self(x_fake)).relu().mean()

    def generator_loss(self, x_fake):
        return -self(x_fake).mean()

    def constrain_(self):
        self.bounded += 1


def trainer(**options):
    torch.manual_seed(0)
    return AdversarialTrainer(nn.Linear(2, 3), Hinge(nn.Linear(3, 1)), 2, batch_size=8, lr=1e-2, **options)


def test_the_trainer_runs_any_critic_and_its_constraint():
    made = trainer(critic_steps=3)
    before = made.generator.weight.clone()
    made.fit(X, 5)
    assert made.critic.bounded == 15
    assert not torch.equal(made.generator.weight, before)
    assert {name: len(v) for name, v in made.history_.items()} == {"critic": 5, "generator": 5}
    assert made.sample(4).shape == (4, 3)
    assert torch.equal(made.sample(4), made.sample(4))
    assert all(p.requires_grad for p in made.critic.parameters())


def test_the_trainer_continues_a_killed_run(tmp_path):
    whole = trainer().fit(X, 8)

    def die(record):
        if record["step"] == 6:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        trainer().fit(X, 8, checkpoint=tmp_path, checkpoint_every=3, on_step=die)
    rest = trainer().fit(X, 8, checkpoint=tmp_path, checkpoint_every=3)
    assert torch.equal(rest.sample(5), whole.sample(5))
    assert rest.history_ == whole.history_


def test_gan_qp_pulls_a_generator_to_the_data():
    torch.manual_seed(0)
    generator, net = gan_networks((3,), 2, hidden=(16,))
    critic = QPCritic(net, QPLoss(metric="l2"))
    data = 0.1 * torch.randn(200, 3, generator=torch.Generator().manual_seed(1)) + torch.tensor([0.7, -0.7, 0.0])
    model = AdversarialTrainer(generator, critic, 2, batch_size=32, lr=5e-3, betas=(0.5, 0.9))
    before = frechet_distance(model.sample(200), data)
    assert frechet_distance(model.fit(data, 150).sample(200), data) < 0.1 * before


def test_one_pass_of_qp_critic_gives_the_loss_of_two():
    net = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.2), nn.Linear(4, 1)).double()
    x, y = (torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    torch.testing.assert_close(QPCritic(net).critic_loss(x, y), QPLoss().critic(net(x), net(y), x, y))
    torch.testing.assert_close(QPCritic(net).generator_loss(y), -net(y).mean())
    normed = nn.Sequential(net[0], nn.BatchNorm1d(4).double(), net[2])
    torch.testing.assert_close(QPCritic(normed).critic_loss(x, y), QPLoss().critic(normed(x), normed(y), x, y))


def test_the_trainer_rejects_bad_input():
    for change, message in [
        ({"critic": nn.Linear(3, 1)}, "method critic_loss; got Linear"),
        ({"generator": len}, "generator must be a torch"),
    ]:
        made = trainer()
        vars(made).update(change)
        with pytest.raises(TypeError, match=message):
            made.fit(X, 1)
    with pytest.raises(ValueError, match=r"\(8, 4\), as the data; got \(8, 3\)"):
        trainer().fit(torch.zeros(9, 4), 1)
    made = trainer()
    made.critic.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        made.fit(X, 1)
