"""Cases of the labeller of SPACES."""

from __future__ import annotations

from typing import Any

from catalog_cases.base import TensorCase, normal


def _labeler(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.tasks import GatedConvLabeler

    with torch.random.fork_rng():
        torch.manual_seed(0)
        labeler = GatedConvLabeler(6, 8).eval().to(dtype)
        with torch.no_grad():
            for block in labeler.blocks:
                block.alpha.fill_(0.5)
    mask = (torch.arange(7) < 5).expand(max(rows, 1), 7)[:rows].clone()
    labeler.register_forward_pre_hook(lambda _, inputs: (inputs[0], mask[: len(inputs[0])]))
    return labeler, (normal(rows, 7, 6, dtype=dtype, generator=generator),)


def _loss(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.tasks import labeler_loss

    labels = torch.rand(rows, 5, generator=generator) > 0.5
    return (lambda logits: labeler_loss(logits, labels[: len(logits)])), (
        normal(rows, 5, dtype=dtype, generator=generator),
    )


CASES: dict[str, list[Any]] = {
    "spaces-summarization": [
        TensorCase("GatedConvLabeler", _labeler, row_independent=True, module=True),
        TensorCase("labeler_loss", _loss),
    ],
}
