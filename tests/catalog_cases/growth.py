"""Grown models."""

from __future__ import annotations

from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _grown(rows: int, dtype: Any, generator: Any) -> Any:
    import torch
    from transformers import BertConfig, BertModel

    from kexue.models import grow

    class Encoder(torch.nn.Module):
        """Vectors (B, T, 8) in, repeated as a grown model wants them; the mean of the copies of its output."""

        def __init__(self) -> None:
            super().__init__()
            sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
            config = BertConfig(vocab_size=5, max_position_embeddings=6, attn_implementation="eager", **sizes)
            small = BertModel(config, add_pooling_layer=False).to(dtype).eval()
            with torch.no_grad():
                for parameter in small.parameters():
                    parameter.copy_(0.3 * normal(*parameter.shape, dtype=dtype, generator=generator))
            self.model = grow(small, 2, noise=0.1, generator=generator)

        def forward(self, x: Any) -> Any:
            mask = x.new_ones(x.shape[:2])
            out = self.model(inputs_embeds=x.repeat_interleave(2, -1), attention_mask=mask).last_hidden_state
            return out.unflatten(-1, (8, 2)).mean(-1)

    return Encoder(), (normal(rows, 4, 8, dtype=dtype, generator=generator),)


# The library's BERT does not take an empty batch, grown or not, nor is one graph promised of it.
CASES["lossless-growth"] = [
    TensorCase("grown encoder", _grown, empty=RuntimeError, row_independent=True, compile=False, module=True)
]
