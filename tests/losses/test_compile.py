import pytest
import torch

from kexue.losses import MarginSoftmax, info_nce, margin_softmax_loss, nt_xent, unified_pair_loss


def inputs():
    g = torch.Generator().manual_seed(0)
    q, k, weight = (torch.randn(6, 5, generator=g).requires_grad_() for _ in range(3))
    return q, k, weight, torch.randint(6, (6,), generator=g)


def cases():
    q, k, weight, labels = inputs()
    margin = torch.full((6,), 0.2, requires_grad=True)
    mask = torch.rand(6, 6, generator=torch.Generator().manual_seed(1)) < 0.8
    head = MarginSoftmax(5, 6, kind="metric", filter_eps=1e-3)
    return {
        "callable": (
            lambda a, b, m: margin_softmax_loss(a, b, labels, lambda c: c - m[0] * c**2),
            (q, weight, margin),
        ),
        "learned margin": (lambda a, b, m: margin_softmax_loss(a, b, labels, "arc", margin=m), (q, weight, margin)),
        "head": (lambda a: head(a, labels), (q,)),
        "symmetric, masked": (lambda a, b: info_nce(a, b, symmetric=True, negative_mask=mask, margin=0.2), (q, k)),
        "own negatives": (lambda a, b, n: info_nce(a, b, n[None].expand(6, 6, 5), mode="flat"), (q, k, weight)),
        "views, cold": (lambda a, b: nt_xent(a, b, 0.01, report="info"), (q, k)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", list(cases()))
def test_options_compile_as_one_graph_and_give_the_same(name):
    function, leaves = cases()[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    value, expected = compiled(*leaves), function(*leaves)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.slow
def test_a_number_that_varies_from_call_to_call_compiles():
    scores, positive = torch.randn(4, 5, requires_grad=True), torch.eye(4, 5)
    compiled = torch.compile(unified_pair_loss, fullgraph=True, backend="aot_eager")
    for gamma in (1.0, 2.0, 2.5):  # the second value makes it symbolic
        value, expected = compiled(scores, positive, gamma), unified_pair_loss(scores, positive, gamma)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value, scores), torch.autograd.grad(expected, scores))
