"""Norms of gradients in one call against a loop, and what a probe costs beside a training step."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from benchmarks.harness import Table, compare, cpu_seconds, peak_memory
from kexue.models import gradient_norms, probe

SECTION = "Probe of signal and gradient"
LOOP = "loop of .grad.norm().item()"
SIZES = {"vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}


def model_and_batch() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(intermediate_size=1024, **SIZES)).train()
    ids = torch.randint(5, 1000, (8, 64))
    return model, {"input_ids": ids, "labels": ids}


def loop(model: torch.nn.Module) -> dict[str, float]:
    return {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}


def bare(model: torch.nn.Module, batch: dict[str, Tensor]) -> None:
    """A forward and a backward pass."""
    model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)


def hooked(model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, list[float]]:
    """What is written by hand: full hooks on every module that print norms; they count gradients, not entropies."""
    rows: dict[str, list[float]] = {}
    handles = []
    for name, module in model.named_modules():

        def forward(_: Any, __: Any, out: Any, name: str = name) -> None:
            if isinstance(out, Tensor):
                rows.setdefault(name, []).append(out.detach().square().mean().sqrt().item())

        def backward(_: Any, __: Any, grads: Any, name: str = name) -> None:
            if isinstance(grads[0], Tensor):
                rows.setdefault(name, []).append(grads[0].square().mean().sqrt().item())

        handles += [module.register_forward_hook(forward), module.register_full_backward_hook(backward)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's hooks warn of outputs that are no tensors
        bare(model, batch)
    for handle in handles:
        handle.remove()
    return rows


def milliseconds(function: Callable[[], Any], repeats: int) -> float:
    samples = []
    for _ in range(repeats + 1):
        start = cpu_seconds()
        function()
        samples.append(cpu_seconds() - start)
    return statistics.median(samples[1:]) * 1e3


def norms() -> Table:
    model, batch = model_and_batch()
    step = milliseconds(lambda: bare(model, batch), 7)
    model(**batch).loss.backward()
    held = [p.grad for p in model.parameters() if p.grad is not None]
    contenders: dict[str, Callable[[], Any]] = {
        LOOP: lambda: loop(model),
        "gradient_norms": lambda: gradient_norms(model),
        "limit: torch._foreach_norm alone": lambda: torch._foreach_norm(held),
        "limit: the memory read once, sum()": lambda: [g.sum() for g in held],
    }
    share = {
        name: {"of a training step": f"{100 * milliseconds(function, 31) / step:.2f} %"}
        for name, function in contenders.items()
    }
    return compare(
        "Norms of all gradients",
        f"BERT of width 256, 4 layers, {len(held)} tensors, {sum(g.numel() for g in held) / 1e6:.1f} million numbers, "
        "float32, one thread; the values as Python floats.",
        contenders,
        peer=LOOP,
        packages=("torch", "transformers"),
        repeats=41,
        extra=share,
        remarks=[
            f"A training step of 8 x 64 tokens, forward and backward, takes {step:.0f} ms.",
            "On the CPU all of them read the same memory once; what the one call saves is Python and dispatch. On a "
            "GPU the loop also waits for each number.",
        ],
    )


def overhead() -> Table:
    model, batch = model_and_batch()
    contenders: dict[str, Callable[[], Any]] = {
        "forward and backward": lambda: bare(model, batch),
        "hooks by hand": lambda: hooked(model, batch),
        "probe": lambda: probe(model, batch),
    }
    memory = {name: {"peak MiB": f"{peak_memory(function):.0f}"} for name, function in contenders.items()}
    return compare(
        "One probe of a model",
        "The same BERT, 8 x 64 tokens, train mode, float32, one thread.",
        contenders,
        peer="forward and backward",
        packages=("torch", "transformers"),
        repeats=9,
        extra=memory,
        remarks=[
            "The hooks give rms of outputs and of their gradients where a module returns a tensor; the probe gives "
            "gains and entropies of attention too, and computes no gradient of a parameter.",
        ],
    )


def run() -> list[Table]:
    """All comparisons of this room."""
    return [norms(), overhead()]
