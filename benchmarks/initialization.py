"""Initialisation: drawing a truncated normal, and a whole model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from benchmarks.harness import Table, compare
from kexue.models import initialize_model, truncated_normal_, variance_scaling_

SECTION = "Initialization"
SIZE, STD, EDGE = 2048, 0.02, 2.0 * 0.02 / 0.8796256610342398  # EDGE: the cut-off that gives std .02


def _std(w: Tensor) -> str:
    return f"{float(w.double().std()) / STD:.4f}"


def tensors(repeats: int) -> Table:
    w = torch.empty(SIZE, SIZE)
    own = STD / 0.8796256610342398
    contenders: dict[str, Callable[[], Tensor]] = {
        "torch.nn.init.normal_": lambda: torch.nn.init.normal_(w, std=STD),
        "torch.nn.init.trunc_normal_, cut-offs and std corrected by hand": lambda: torch.nn.init.trunc_normal_(
            w, std=own, a=-EDGE, b=EDGE
        ),
        "torch: uniform_, erfinv_, mul_ on the whole tensor": lambda: (
            w.uniform_(-0.9544997, 0.9544997).erfinv_().mul_(own * 2**0.5)
        ),
        "truncated_normal_": lambda: truncated_normal_(w, STD),
        "torch.nn.init.uniform_": lambda: torch.nn.init.uniform_(w, -STD * 3**0.5, STD * 3**0.5),
        'variance_scaling_(distribution="uniform")': lambda: variance_scaling_(
            w, distribution="uniform", gain=STD * SIZE**0.5
        ),
    }
    extra = {name: {"realised std / asked": _std(draw())} for name, draw in contenders.items()}
    torch.nn.init.trunc_normal_(w, std=STD)
    return compare(
        f"A truncated normal of {SIZE} x {SIZE}",
        f"float32, std {STD}, cut at two std, {torch.get_num_threads()} thread(s).",
        contenders,
        peer="torch.nn.init.normal_",
        packages=("torch", "numpy"),
        repeats=repeats,
        extra=extra,
        remarks=[
            "Target: at most the time of normal_.",
            f"trunc_normal_(w, std={STD}) with its own cut-offs -2 and 2 cuts nothing: largest weight / std "
            f"{float(w.abs().max()) / STD:.2f}.",
        ],
    )


def model(repeats: int) -> Table:
    config = BertConfig(
        vocab_size=8000, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048
    )
    bert = BertModel(config)
    count = sum(p.numel() for p in bert.parameters())

    def theirs() -> None:
        for p in bert.parameters():
            p._is_hf_initialized = False
        for module in bert.modules():
            module._is_hf_initialized = False
        bert.init_weights()

    probe = bert.encoder.layer[0].intermediate.dense.weight.detach()
    extra = {}
    for name, run in (("transformers", theirs), ("initialize_model", lambda: initialize_model(bert, "bert"))):
        probe.zero_()
        run()
        extra[name] = {"largest weight / .02": f"{float(probe.abs().max()) / STD:.2f}"}
    return compare(
        "All weights of a BERT",
        f"{count / 1e6:.0f} M parameters, float32, {torch.get_num_threads()} thread(s).",
        {
            "transformers": theirs,
            "initialize_model": lambda: initialize_model(bert, "bert"),
            "limit: normal_ of every parameter": lambda: [torch.nn.init.normal_(p, std=STD) for p in bert.parameters()],
        },
        peer="transformers",
        packages=("torch", "transformers"),
        repeats=repeats,
        extra=extra,
        remarks=[
            'transformers draws an uncut normal; "bert" draws what the original BERT does, cut at two std. '
            "transformers = its init_weights on the finished model.",
        ],
    )


def run() -> list[Table]:
    """All comparisons of this room."""
    return [tensors(15), model(7)]
