"""Attention that does not see itself, and the one-pass masked language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _attention(padded: bool, start: int) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        import torch

        from kexue.attention import diagonal_attention

        q, k, v = (normal(rows, 2, n, 4, dtype=dtype, generator=generator) for n in (5, 5 + start, 5 + start))
        if not padded:
            return diagonal_attention, (q, k, v)
        # The first texts are the shortest ones; the very first has no key at all.
        mask = torch.arange(5 + start)[None] < torch.arange(rows)[:, None]
        return lambda a, b, c, m: diagonal_attention(a, b, c, m), (q, k, v, mask)

    return build


def _model(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.models import KexueConfig, KexueForTextAutoencoding

    class OnEmbeddings(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"vocab_size": 12, "hidden_size": 8, "num_layers": 2, "num_heads": 2}
            config = KexueConfig(**sizes, attn_mode="diagonal", mask_token_id=3, position="rope")
            self.model = KexueForTextAutoencoding(config)

        def forward(self, x: Any, mask: Any) -> Any:
            return self.model(inputs_embeds=x, attention_mask=mask).logits

    module = OnEmbeddings().eval().to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * normal(*parameter.shape, dtype=dtype, generator=generator))
    mask = torch.arange(4)[None] <= torch.arange(rows)[:, None]
    return module, (normal(rows, 4, 8, dtype=dtype, generator=generator), mask)


CASES["one-pass-mlm"] = [
    TensorCase("attention", _attention(False, 0), row_independent=True),
    TensorCase("attention with a start key", _attention(False, 1), row_independent=True),
    TensorCase("attention, padded", _attention(True, 0), row_independent=True),
    TensorCase("model", _model, row_independent=True, module=True),
]
