"""Cases of the prefix language model of SPACES."""

from __future__ import annotations

from typing import Any

from catalog_cases.base import TensorCase, normal

SEGMENTS = (0, 0, 0, 0, 1, 1, 1)


def _models(kind: str) -> dict[Any, Any]:
    """The same model in each precision."""
    import torch

    from kexue import models

    config = models.KexueConfig(
        12, 8, 1, 2, attn_mode="prefix", position="rope", type_vocab_size=2, head_transform=False
    )
    found = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found[dtype] = getattr(models, kind)(config).eval().to(dtype).requires_grad_(False)
    return found


def _stack(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    models, weights = _models("KexueModel"), torch.linspace(0.0, 0.7, 8)  # the plain sum of a norm is constant
    segments = torch.tensor([SEGMENTS] * max(rows, 1))
    mask = torch.ones_like(segments)
    mask[:, 2] = 0

    def function(vectors: Any) -> Any:
        n = len(vectors)
        out = models[vectors.dtype](None, mask[:n], segments[:n], inputs_embeds=vectors).last_hidden_state
        return out * weights.to(out.dtype)

    return function, (normal(rows, 7, 8, dtype=dtype, generator=generator),)


def _scores(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.models.prefix_lm import latest, said_so_far

    models = _models("KexueForPrefixLM")
    ids = torch.randint(1, 12, (max(rows, 1), 7), generator=generator)
    target = torch.tensor([SEGMENTS] * max(rows, 1)).bool()

    def function(features: Any) -> Any:
        words, after = ids[: len(features)], target[: len(features)]
        model = models[features.dtype]
        memory = model.remember(words, features, ~after)
        return model.scores(features, memory, latest(words), said_so_far(memory, words, after))

    return function, (normal(rows, 7, 8, dtype=dtype, generator=generator),)


CASES: dict[str, list[Any]] = {
    "spaces-summarization": [
        TensorCase("prefix attention", _stack, row_independent=True),
        TensorCase("scores of KexueForPrefixLM", _scores, row_independent=True),
    ],
}
