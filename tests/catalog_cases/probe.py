"""A model that is probed each time before it is run: the probe must not show in what it computes."""

from __future__ import annotations

from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _probed(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.models import probe, skip_gain

    class Probed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.LayerNorm(6))

        def forward(self, x: Any) -> Any:
            last = probe(self.block, x.detach()).rows[-1]
            out = self.block(x) * skip_gain(width=16, std=0.1, sublayers=3)
            size = float(out.detach().double().square().mean().sqrt()) / skip_gain(width=16, std=0.1, sublayers=3)
            if abs(last["rms_out"] / size - 1) > 0.02:
                raise AssertionError(f"the probe saw {last}, the output has rms {size}")
            return out

    module = Probed().to(dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(normal(*p.shape, dtype=dtype, generator=generator))
    return module, (normal(rows, 4, dtype=dtype, generator=generator),)


CASES["bert-initial-std"] = [
    TensorCase("probed", _probed, ValueError, row_independent=True, compile=False, module=True)
]
