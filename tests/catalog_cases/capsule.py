"""Capsules: routing of votes, layers with shared and with dense weights, the text head, and the margin loss."""

from __future__ import annotations

from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _routing(rule: str, masked: bool = False) -> Any:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        import torch

        from kexue.models import capsule_routing

        keep = torch.rand(rows, 5, generator=generator) < 0.7

        def function(votes: Any) -> Any:
            return capsule_routing(votes, routing=rule, mask=keep[: len(votes)] if masked else None)

        return function, (normal(rows, 5, 3, 4, dtype=dtype, generator=generator),)

    return build


def _layer(shared: bool, rule: str) -> Any:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        import torch

        from kexue.models import Capsule

        torch.manual_seed(int(torch.randint(1000, (), generator=generator)))
        layer = Capsule(4, 3, 6, share_weights=shared, routing=rule, num_inputs=5).to(dtype)
        return layer, (normal(rows, 5, 4, dtype=dtype, generator=generator),)

    return build


def _pooler(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.models import CapsulePooler

    torch.manual_seed(int(torch.randint(1000, (), generator=generator)))
    lengths = torch.randint(1, 8, (rows, 1), generator=generator)
    mask = (torch.arange(7) < lengths).long()
    return CapsulePooler(6, 3).to(dtype), (normal(rows, 7, 6, dtype=dtype, generator=generator), mask)


def _squash(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.models import squash

    return squash, (normal(rows, 5, dtype=dtype, generator=generator),)


def _margin(reduction: str) -> Any:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        import torch

        from kexue.losses import capsule_margin_loss

        targets = torch.rand(rows, 6, generator=generator) < 0.4
        scores = torch.rand(rows, 6, generator=generator, dtype=torch.float64).to(dtype)
        return lambda s, t: capsule_margin_loss(s, t, reduction=reduction), (scores, targets)

    return build


CASES["capsule-routing"] = [
    *(TensorCase(f"votes {rule}", _routing(rule), row_independent=True) for rule in ("kmeans", "hinton", "squash")),
    TensorCase("votes masked", _routing("kmeans", masked=True), row_independent=True),
    TensorCase("shared", _layer(True, "kmeans"), row_independent=True, module=True),
    TensorCase("dense", _layer(False, "hinton"), row_independent=True, module=True),
    TensorCase("pooler", _pooler, row_independent=True, module=True),
    TensorCase("squash", _squash, row_independent=True),
    TensorCase("margin rows", _margin("none"), row_independent=True),
    TensorCase("margin mean", _margin("mean")),
]
