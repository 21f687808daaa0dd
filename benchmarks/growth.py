"""Growing a model: ours against building the larger model and filling it tensor by tensor."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Table, compare, peak_memory
from kexue.models import grow

SECTION = "Lossless growth"

FACTOR = 2


def _models() -> dict[str, Any]:
    sizes: dict[str, Any] = {"num_hidden_layers": 6, "num_attention_heads": 8, "vocab_size": 16000}
    torch.manual_seed(0)
    return {
        "BERT (width 512, 6 layers, 16000 tokens)": BertForMaskedLM(
            BertConfig(hidden_size=512, intermediate_size=2048, **sizes)
        ).eval(),
        "Llama (width 512, 6 layers, 16000 tokens, untied)": LlamaForCausalLM(
            LlamaConfig(
                hidden_size=512, intermediate_size=1376, num_key_value_heads=4, tie_word_embeddings=False, **sizes
            )
        ).eval(),
    }


def _config(model: Any) -> Any:
    config = copy.deepcopy(model.config)
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    for name in (name for name in names if getattr(config, name, None) is not None):
        setattr(config, name, getattr(config, name) * FACTOR)
    return config


@torch.no_grad()
def _repeat_interleave(model: Any) -> Any:
    """What everybody writes: build the larger model, then repeat every tensor and load it.

    Only the work is that of growth (every axis repeated, inputs divided); whole heads would have to be tiled.
    """
    large = type(model)(_config(model))
    grown = {}
    for name, target in large.state_dict().items():
        value = model.state_dict()[name]
        for axis, (have, want) in enumerate(zip(value.shape, target.shape, strict=True)):
            if have != want:
                value = value.repeat_interleave(want // have, axis)
                if axis == 1 and "embeddings" not in name:
                    value = value / (want // have)
        grown[name] = value
    large.load_state_dict(grown)
    return large.eval()


def _random(model: Any) -> Any:
    return type(model)(_config(model))


def run() -> list[Table]:
    """One table a family; the extra column is the peak of the memory above the small model, relative to the result."""
    tables = []
    for title, model in _models().items():
        contenders = {
            "build and repeat_interleave": lambda model=model: _repeat_interleave(model),
            "build only (random weights)": lambda model=model: _random(model),
            "kexue grow": lambda model=model: grow(model, width=FACTOR),
        }
        size = sum(p.numel() * p.element_size() for p in grow(model, width=FACTOR).parameters()) / 2**20
        extra = {
            name: {"peak memory / size of the result": f"{peak_memory(function) / size:.2f}"}
            for name, function in contenders.items()
        }
        tables.append(
            compare(
                f"Width times {FACTOR}: {title}",
                f"float32, one thread; the result has {size:.0f} MiB of parameters.",
                contenders,
                peer="build and repeat_interleave",
                packages=("torch", "transformers"),
                repeats=5,
                extra=extra,
            )
        )
    return tables
