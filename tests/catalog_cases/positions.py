"""Models and their parts."""

from __future__ import annotations

from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _position_table(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.models import hierarchical_positions

    inputs = (normal(rows, 5, dtype=dtype, generator=generator), normal(4, 5, dtype=dtype, generator=generator))
    return lambda x, weight: x[:, None] * hierarchical_positions(weight, 14, 0.3), inputs


def _positions(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.models import HierarchicalPositionEmbedding

    class WithPositions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = HierarchicalPositionEmbedding(6, 5, length=14, offset=2, padding_idx=1, save_table=True)

        def forward(self, x: Any, ids: Any) -> Any:
            return x + self.positions(ids)

    module = WithPositions().to(dtype)
    with torch.no_grad():
        module.positions.weight[2:].copy_(normal(4, 5, dtype=dtype, generator=generator))
    ids = torch.randint(16, (rows, 3), generator=generator)
    return module, (normal(rows, 3, 5, dtype=dtype, generator=generator), ids)


CASES["hierarchical-positions"] = [
    TensorCase("table", _position_table, row_independent=True),
    TensorCase("module", _positions, row_independent=True, module=True),
]
