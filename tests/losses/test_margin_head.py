import math
import socket

import pytest
import torch
from torch import nn

from kexue.losses import MarginSoftmax, margin_softmax_loss
from losses.shard_worker import CASES, whole_batch, worker


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_head_is_the_function_with_its_weight():
    head = MarginSoftmax(6, 20, kind="arc", scale=16.0, margin=0.4, reduction="none")
    z, labels = torch.randn(5, 6, generator=generator()), torch.arange(5)
    torch.testing.assert_close(
        head(z, labels), margin_softmax_loss(z, head.weight, labels, "arc", 16.0, 0.4, reduction="none")
    )
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    assert "kind='arc'" in repr(head)


def test_project_sets_unit_length_and_leaves_zero_vectors():
    head = MarginSoftmax(6, 20)
    with torch.no_grad():
        head.weight[3] = 0
        direction = torch.nn.functional.normalize(head.weight)
        head.weight[5] *= 1e20
    assert head.project_() is head
    torch.testing.assert_close(head.weight.detach(), direction)
    assert head.weight[3].norm() == 0


def test_margin_can_be_learned_or_kept_as_a_buffer():
    z, labels = torch.randn(5, 6, generator=generator()), torch.arange(5)
    learned = MarginSoftmax(6, 20, margin=nn.Parameter(torch.tensor(0.2)))
    learned(z, labels).backward()
    assert float(learned.margin.grad) > 0
    fixed = MarginSoftmax(6, 20, margin=torch.linspace(0, 1, 20))
    assert "margin" in fixed.state_dict()


def test_sampling_keeps_the_classes_of_the_batch_and_the_wanted_number():
    head = MarginSoftmax(6, 50, sample_rate=0.2)
    labels = torch.tensor([7, 3, 7, 40])
    index, mapped, repeat = head._sample(labels, generator())
    assert len(index) == len(set(index.tolist())) == 10
    assert torch.equal(index[mapped], labels)
    assert repeat is None
    many, _, _ = head._sample(torch.arange(30), generator())
    assert torch.equal(many, torch.arange(30))


def test_sampled_loss_is_the_loss_over_the_chosen_classes():
    head = MarginSoftmax(6, 50, scale=8.0, sample_rate=0.2)
    z, labels = torch.randn(4, 6, generator=generator()), torch.tensor([7, 3, 7, 40])
    loss = head(z, labels, generator=generator(5))
    (grad,) = torch.autograd.grad(loss, head.weight)
    index, mapped, _ = head._sample(labels, generator(5))
    weight = head.weight.detach()[index].requires_grad_()
    expected = margin_softmax_loss(z, weight, mapped, "am", 8.0)
    torch.testing.assert_close(loss, expected)
    (part,) = torch.autograd.grad(expected, weight)
    torch.testing.assert_close(grad, torch.zeros_like(grad).index_add_(0, index, part))
    full = margin_softmax_loss(z, head.weight, labels, "am", 8.0)
    torch.testing.assert_close(head.eval()(z, labels), full)
    assert loss < full


def test_sparse_gradient_equals_the_dense_one():
    z, labels = torch.randn(4, 6, generator=generator()), torch.tensor([7, 3, 7, 40])
    dense = MarginSoftmax(6, 50, sample_rate=0.2)
    sparse = MarginSoftmax(6, 50, sample_rate=0.2, sparse_grad=True)
    sparse.load_state_dict(dense.state_dict())
    for head in (dense, sparse):
        head(z, labels, generator=generator(5)).backward()
    assert sparse.weight.grad.is_sparse
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)


def test_log_q_makes_the_sum_over_classes_unbiased():
    head = MarginSoftmax(4, 60, kind="softmax", scale=3.0, sample_rate=0.3, log_q=True, reduction="none").double()
    z, labels = torch.randn(2, 4, generator=generator(), dtype=torch.float64), torch.tensor([1, 2])
    with torch.no_grad():
        draws = torch.stack([head(z, labels, generator=generator(i)) for i in range(400)])
        exact = head.eval()(z, labels)
    xi, error = draws.expm1(), draws.expm1().std(0) / math.sqrt(len(draws))  # loss = log(1 + xi)
    assert ((xi.mean(0) - exact.expm1()).abs() < 4 * error).all()
    assert (error > 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_rate": 0.0}, "sample_rate"),
        ({"sample_rate": 1.5}, "at most 1; got 1.5"),
        ({"log_q": True}, "sample_rate below 1"),
        ({"sparse_grad": True}, "sample_rate below 1"),
        ({"num_classes": 0}, "num_classes"),
        ({"reduction": "avg"}, "reduction"),
        ({"block_rows": 0}, "block_rows"),
    ],
)
def test_bad_settings_are_rejected(change, message):
    with pytest.raises(ValueError, match=message):
        MarginSoftmax(**({"in_features": 4, "num_classes": 10} | change))


def test_sampling_rejects_soft_labels_and_labels_out_of_range():
    head = MarginSoftmax(4, 10, sample_rate=0.5)
    with pytest.raises(TypeError, match="integers"):
        head(torch.randn(2, 4), torch.rand(2, 10))
    with pytest.raises(ValueError, match=r"\[0, 10\); got values from 1 to 10"):
        head(torch.randn(2, 4), torch.tensor([1, 10]))


def single(kind, scale, reduction):
    z, labels, weight = whole_batch()
    z.requires_grad_()
    weight.requires_grad_()
    loss = margin_softmax_loss(z, weight, labels, kind, scale, 0.3, reduction)
    (loss * torch.linspace(1, 2, len(z)) if reduction == "none" else loss).sum().backward()
    return loss.detach(), z.grad, weight.grad


@pytest.mark.slow
def test_two_processes_with_half_the_classes_equal_one_process(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(tmp_path)), nprocs=2)
    (first, a, m), (second, b, n) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(a, b)
    z, labels, weight = whole_batch()
    margin = torch.linspace(0.1, 0.4, 11, dtype=torch.float64).requires_grad_()
    expected = torch.autograd.grad(margin_softmax_loss(z, weight, labels, "arc", 30.0, margin), margin)[0]
    torch.testing.assert_close(m, expected)
    torch.testing.assert_close(n, expected)
    for case, left, right in zip(CASES, first, second, strict=True):
        loss, grad_z, grad_w = single(*case)
        if case[2] == "none":
            torch.testing.assert_close(torch.cat([left[0], right[0]]), loss)
        else:
            torch.testing.assert_close(left[0], loss)
            torch.testing.assert_close(right[0], loss)
        torch.testing.assert_close(torch.cat([left[1], right[1]]), grad_z)
        torch.testing.assert_close(torch.cat([left[2], right[2]]), grad_w)
