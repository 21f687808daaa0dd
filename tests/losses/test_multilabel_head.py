import copy
import pickle

import pytest
import torch
from scipy import stats

from kexue.losses import MultiLabelHead, ZLPRLoss, mixup_multilabel, zlpr_loss


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_head_scores_decides_at_zero_and_reads_probabilities_with_twice_the_score():
    torch.manual_seed(0)
    head = MultiLabelHead(6, 4)
    h = torch.randn(2, 3, 6)
    scores = h @ head.weight.T + head.bias
    torch.testing.assert_close(head(h), scores)
    assert torch.equal(head.predict(h), head(h) > 0)
    torch.testing.assert_close(head.predict_proba(h), 1 / (1 + torch.exp(-2 * scores)))
    assert head.num_labels == 4
    assert set(head.state_dict()) == {"weight", "bias"}
    assert set(MultiLabelHead(6, 4, bias=False).state_dict()) == {"weight"}


def test_head_loss_equals_zlpr_of_its_scores_and_reaches_the_parameters():
    torch.manual_seed(0)
    head, h = MultiLabelHead(6, 4), torch.randn(3, 6)
    dense = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]])
    index = torch.tensor([[0, 3], [-1, -1], [1, -1]])
    expected = zlpr_loss(head(h), dense)
    torch.testing.assert_close(head.loss(h, dense), expected)
    torch.testing.assert_close(head.loss(h, index, indices=True), expected)
    criterion = ZLPRLoss(label_smoothing=0.2)
    torch.testing.assert_close(head.loss(h, dense, criterion), criterion(head(h), dense))
    assert not torch.equal(head.loss(h, dense, criterion), expected)
    assert head.loss(h, dense, reduction="none").shape == (3,)
    (a, b), (c, d) = (torch.autograd.grad(x, (head.weight, head.bias)) for x in (head.loss(h, dense), expected))
    torch.testing.assert_close((a, b), (c, d))


@pytest.mark.parametrize(("arguments", "error"), [((0, 4), ValueError), ((6, 0), ValueError), ((6, 2.5), TypeError)])
def test_head_rejects_sizes_that_are_none(arguments, error):
    with pytest.raises(error, match=r"in_features|num_labels"):
        MultiLabelHead(*arguments)


def test_head_is_not_trained_at_another_threshold_than_it_decides_at():
    head, h, target = MultiLabelHead(6, 4), torch.zeros(2, 6), torch.ones(2, 4)
    for options in (
        {"threshold": 1.0},
        {"threshold": torch.zeros(2, 1)},
        {"criterion": ZLPRLoss(threshold=-0.5)},
        {"criterion": ZLPRLoss(learn_threshold=True)},
    ):
        with pytest.raises(ValueError, match="threshold must be 0"):
            head.loss(h, target, **options)
    with pytest.raises(TypeError, match="BCEWithLogitsLoss"):
        head.loss(h, target, torch.nn.BCEWithLogitsLoss())
    assert torch.equal(head.loss(h, target, threshold=0.0), head.loss(h, target))


def test_copies_of_a_head_and_a_round_trip_of_its_state_score_alike():
    torch.manual_seed(0)
    head, h = MultiLabelHead(6, 4), torch.randn(3, 6)
    other = MultiLabelHead(6, 4)
    other.load_state_dict(head.state_dict())
    for same in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), other):
        assert torch.equal(same(h), head(h))
        assert same.num_labels == 4


def test_head_rejects_inputs_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(\.\.\., 6\).*\(2, 5\)"):
        MultiLabelHead(6, 4)(torch.zeros(2, 5))
    with pytest.raises(TypeError, match="floating"):
        MultiLabelHead(6, 4).predict(torch.zeros(2, 6, dtype=torch.long))


def test_mixup_mixes_inputs_and_labels_with_one_weight_and_one_partner():
    x, t = torch.randn(7, 2, 3, generator=generator()), torch.eye(7)
    kept = x.clone(), t.clone()
    for seed in range(5):
        mixed, soft = mixup_multilabel(x, t, 1.0, generator(seed))
        # Rows of the identity show the weight and the partner: lam at the own place, 1 - lam at the partner's.
        order = torch.where(soft.diagonal() == 1, torch.arange(7), (soft - torch.diag(soft.diagonal())).argmax(1))
        assert sorted(order.tolist()) == list(range(7))
        lam = soft.diagonal()[order != torch.arange(7)]
        assert (lam - lam[0]).abs().max() < 1e-6
        torch.testing.assert_close(mixed, lam[0] * x + (1 - lam[0]) * x[order])
        torch.testing.assert_close(soft.sum(1), torch.ones(7))
    assert torch.equal(x, kept[0])
    assert torch.equal(t, kept[1])


def test_mixup_is_ruled_by_the_generator_alone():
    x, t = torch.randn(9, 4, generator=generator()), torch.rand(9, 5, generator=generator(1))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = mixup_multilabel(x, t, 0.4, generator(5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    again = mixup_multilabel(x, t, 0.4, generator(5))
    other = mixup_multilabel(x, t, 0.4, generator(6))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    g = generator(5)
    assert not torch.equal(mixup_multilabel(x, t, 0.4, g)[1], mixup_multilabel(x, t, 0.4, g)[1])
    torch.manual_seed(8)
    default = mixup_multilabel(x, t, 0.4)
    torch.manual_seed(8)
    assert torch.equal(mixup_multilabel(x, t, 0.4)[0], default[0])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_mixup_weights_follow_the_beta_distribution(alpha):
    g, x, t = generator(11), torch.zeros(2, 1), torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    drawn = []
    while len(drawn) < 400:
        soft = mixup_multilabel(x, t, alpha, g)[1]
        if not torch.equal(soft, t):  # the permutation moved something: the second row holds lam
            drawn.append(float(soft[1, 0]))
    assert stats.kstest(drawn, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_mixup_dtypes_gradients_and_small_batches():
    x = torch.randn(4, 3, dtype=torch.bfloat16, generator=generator()).requires_grad_()
    mixed, soft = mixup_multilabel(x, torch.ones(4, 2, dtype=torch.bool), 0.4, generator())
    assert mixed.dtype == torch.bfloat16
    assert soft.dtype == torch.float32
    assert torch.equal(soft, torch.ones(4, 2))
    mixed.float().sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x), rtol=2e-2, atol=0)
    assert mixup_multilabel(x.detach(), torch.ones(4, 2).double(), 0.4)[1].dtype == torch.float64
    one, label = mixup_multilabel(torch.ones(1, 3), torch.ones(1, 2), 0.4)
    assert torch.equal(one, torch.ones(1, 3))
    assert torch.equal(label, torch.ones(1, 2))
    assert mixup_multilabel(torch.ones(0, 3), torch.ones(0, 2), 0.4)[0].shape == (0, 3)


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"alpha": 0.0}, ValueError, "alpha"),
    ({"alpha": -1.0}, ValueError, "alpha"),
    ({"alpha": float("nan")}, ValueError, "alpha"),
    ({"alpha": "1"}, TypeError, "alpha"),
    ({"t": torch.ones(3, 2)}, ValueError, r"\(2, 3\).*\(3, 2\)"),
    ({"t": torch.full((2, 2), 2)}, ValueError, r"\[0, 1\]"),
    ({"t": torch.full((2, 2), torch.nan)}, ValueError, "nan"),
    ({"t": [[1], [0]]}, TypeError, "list"),
    ({"x": torch.ones(2, 3, dtype=torch.long)}, TypeError, "floating"),
    ({"generator": 0}, TypeError, "generator"),
])  # fmt: skip
def test_mixup_rejects_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        mixup_multilabel(**({"x": torch.ones(2, 3), "t": torch.ones(2, 2), "alpha": 0.4} | change))
