"""Dropping tokens, and correcting what masking left in the embeddings."""

from __future__ import annotations

from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _drop(mode: str) -> Any:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        import torch

        from kexue.models import drop_token

        x = normal(rows, 6, 3, dtype=dtype, generator=generator)
        lengths = torch.tensor([6, 3, 1, 6, 4, 2])[:rows]
        mask = torch.arange(6) < lengths[:, None]

        def function(x: Any, mask: Any) -> Any:
            seeded = torch.Generator().manual_seed(7)
            tokens, positions, taken, _ = drop_token(x, 0.5, mask, prefix=1, mode=mode, generator=seeded)
            return tokens * (positions + 1)[..., None] * taken[..., None]

        return function, (x, mask)

    return build


def _gather(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.models import gather_attention_bias, gather_tokens

    x = normal(rows, 6, 3, dtype=dtype, generator=generator)
    bias = normal(2, 6, 6, dtype=dtype, generator=generator)
    kept = torch.tensor([[0, 2, 5], [1, 2, 3], [0, 1, 4], [3, 4, 5], [0, 2, 4], [1, 3, 5]])[:rows]
    return lambda x, bias: gather_attention_bias(bias, kept[: len(x)]) @ gather_tokens(x, kept[: len(x)])[:, None], (
        x,
        bias,
    )


def _module(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.models import DropToken, gather_tokens

    class Pooled(torch.nn.Module):
        """The linear schedule has a state; in evaluation mode nothing is dropped."""

        def __init__(self) -> None:
            super().__init__()
            self.drop = DropToken(0.5, prefix=1, schedule="linear", steps=4)
            self.head = torch.nn.Linear(3, 2)

        def forward(self, x: Any) -> Any:
            tokens, positions, _, kept = self.drop(x)
            return self.head(tokens) + gather_tokens(positions, kept)[..., None].to(x.dtype)

    module = Pooled().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(normal(*parameter.shape, dtype=torch.float32, generator=generator))
        module.drop.calls += int(torch.randint(9, (), generator=generator))
    return module.to(dtype), (normal(rows, 6, 3, dtype=dtype, generator=generator),)


CASES["mlm-dropout"] = [
    # torch.compile takes no generator: what it makes of the global one is in tests/models/test_token_dropping.py
    TensorCase("drop, a fixed count", _drop("fixed"), compile=False),
    TensorCase("drop, dense", _drop("dense"), compile=False),
    TensorCase("drop, each by itself", _drop("bernoulli"), compile=False),
    TensorCase("gather", _gather, row_independent=True),
    TensorCase("module", _module, row_independent=True, module=True),
]
