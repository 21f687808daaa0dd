"""Losses that make their gradient in the forward pass do not make it where none is recorded."""

import pytest
import torch

from kexue.losses import _margin_kernel, combination, contrastive, info_nce, margin_softmax_loss, nt_xent
from kexue.models import _cosine

Z, W = torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(9, 4))


@pytest.mark.parametrize(
    ("loss", "module", "kernel", "wants"),
    [
        (lambda: margin_softmax_loss(Z, W, torch.arange(6)), _margin_kernel, "_run", lambda a: a[5] is not None),
        (lambda: info_nce(Z, W[:6]), contrastive, "run_pairs", lambda a: any(x is not None for x in a[5:6])),
        (lambda: nt_xent(Z, W[:6]), contrastive, "run_self", lambda a: isinstance(a[1], torch.Tensor)),
        (
            lambda: combination.combination_cross_entropy(Z, (Z > 0).detach()),
            combination,
            "run_combination",
            lambda a: a[-1],
        ),
        (lambda: _cosine.negative_cosines(Z, W[:6]), _cosine, "_numba_rows", lambda a: any(a[-1])),
    ],
    ids=["margin", "info_nce", "nt_xent", "combination", "cosine"],
)
def test_no_gradient_is_made_under_no_grad(loss, module, kernel, wants, monkeypatch):
    calls, run = [], getattr(module, kernel)

    def recorded(*args, **options):
        calls.append(bool(wants(args)))
        return run(*args, **options)

    monkeypatch.setattr(module, kernel, recorded)
    with_gradient = loss()
    with torch.no_grad():
        torch.testing.assert_close(loss(), with_gradient.detach(), rtol=1e-6, atol=1e-6)
    assert calls == [True, False]
