"""Decoding of causal language models: the filters of the next token's distribution.

The tensor functions of the slug; what else belongs to it has tests of its own.
"""

from __future__ import annotations

from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _probabilities(**options: Any) -> Any:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        import torch

        from kexue.generation import token_probabilities

        # Logits on a grid that bfloat16 holds, so that every dtype keeps the same tokens; no ties
        grid = torch.arange(12, dtype=torch.float64) / 4 - 1
        order = torch.stack([torch.randperm(12, generator=generator) for _ in range(rows)] or [torch.empty(0, 12)])
        logits = grid[order.long()].to(dtype)
        values = torch.arange(12, dtype=dtype)  # the sum of probabilities alone has no gradient

        def function(x: Any) -> Any:
            seen = (torch.arange(12) % 3 == 0).expand(x.shape)
            return token_probabilities(x, seen=seen, **options).to(dtype) * values

        return function, (logits,)

    return build


def _inversion(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.generation.filters import sample_tokens

    weights = normal(rows, 9, dtype=dtype, generator=generator)
    uniforms = torch.linspace(0, 0.99, 9, dtype=torch.float64)[:rows]

    def function(x: Any) -> Any:
        tokens = sample_tokens(x.detach().float().abs() + 0.1, uniforms[: len(x)])
        return x.gather(1, tokens[:, None]).squeeze(1)

    return function, (weights,)


CASES["cpm-gpt2"] = [
    TensorCase("probabilities", _probabilities(temperature=0.75), row_independent=True),
    TensorCase("top-k", _probabilities(top_k=5), row_independent=True),
    TensorCase("top-p and min-p", _probabilities(top_p=0.83, min_p=0.11), row_independent=True),
    TensorCase("repetition", _probabilities(repetition_penalty=1.5, top_k=9), row_independent=True),
    TensorCase("inversion", _inversion, row_independent=True, dtypes=("float64", "float32")),
]
