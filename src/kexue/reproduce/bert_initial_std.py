"""Why 0.02: what of the input and of the gradients is left behind a random Post-LN stack, by the std of its weights.

1. Random models, nothing trained. BERT (Post-LN) of 12 layers, width 128, vocabulary 200, 4 x 32 random tokens and
   labels, no dropout; std = sqrt(r / 128) for r = .307 (0.02 at width 768), 1 (1/sqrt(d)) and 2. With h_0 and h_12 the
   embedded tokens and the output of the last layer: the cosine of h_0 and h_12 after subtracting the mean over all
   tokens; that of their gradients; the ratio of the norms of these gradients; the ratio of the norms of the gradients
   of all weights of layer 1 and layer 12; the ratio var F / var x, as a probe measures it, mean over the 24 sublayers.
   Pre-LN (RoBERTa-PreLayerNorm of transformers) alike, for comparison.
2. The logits of a head that is tied to the embeddings, behind a LayerNorm: std against sigma sqrt(d), d = 768.
3. Training. The same BERT with 4 layers, width 96 and the std of r = .307 predicts masked bytes of the standard
   library's help texts (``pydoc_data.topics``), Adam at 1e-3 after 200 steps of warm-up, 8 x 32 bytes, 1000
   steps, with and without Dense + LN before the tied head. Measured: mean |gamma| of every LayerNorm.

Rule, fixed before measuring. (a) Identity path: the mean centred cosine over the seeds is above .3 at r = .307, and
below .05 in absolute value at r = 1. (b) Vanishing gradients: the ratio of the norms of the weight gradients of layer
1 and layer 12 (geometric mean over the seeds) is smaller by a factor of 3 or more at r = 1 than at r = .307. (c) Gamma:
in every seed the LayerNorm of the extra layer has the largest mean |gamma|, .03 or more above all others, and without
the extra layer the last LayerNorm of the encoder has it, by the same distance. "reproduced": all three; "partly": (a);
otherwise "not reproduced".
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.models import gradient_norms, norm_gains, probe, skip_gain
from kexue.reproduce.runner import Measurement, Verdict

CLAIM = (
    "BERT's initial standard deviation of 0.02, about half of 1/sqrt(768), keeps Post-LN, which divides the direct "
    "path by sqrt(1 + r) in every sublayer, near the identity and the gradients of the first layers from vanishing; "
    "the extra Dense + LN before the MLM head takes over the growth of the last gamma."
)
RATIOS, WIDTH = (0.307, 1.0, 2.0), 128


def _model(pre: bool, layers: int, r: float, width: int = WIDTH, vocabulary: int = 200) -> Any:
    from kexue._transformers import (
        BertConfig,
        BertForMaskedLM,
        RobertaPreLayerNormConfig,
        RobertaPreLayerNormForMaskedLM,
    )

    sizes: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4,
        "intermediate_size": 4 * width, "initializer_range": math.sqrt(r / width), "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    if pre:
        return RobertaPreLayerNormForMaskedLM(RobertaPreLayerNormConfig(**sizes))
    return BertForMaskedLM(BertConfig(**sizes))


def _cosine(a: Tensor, b: Tensor, centred: bool) -> float:
    if centred:
        a, b = (x - x.mean((0, 1), keepdim=True) for x in (a, b))
    return float(F.cosine_similarity(a.flatten(0, 1), b.flatten(0, 1)).mean())


def _layer_norms(model: nn.Module, layers: int) -> tuple[float, float]:
    """Norms of the gradients of all weights of the first and of the last layer."""
    found = gradient_norms(model)
    first, last = (
        [v for name, v in found.items() if f".layer.{n}." in name and name.endswith("weight")] for n in (0, layers - 1)
    )
    return math.hypot(*first), math.hypot(*last)


def _branches(model: nn.Module, batch: dict[str, Tensor], pre: bool) -> list[float]:
    """The ratio var F / var x of each sublayer; x, normalized in Post-LN, is what F is added to."""
    rows = {row["name"]: row["rms_out"] for row in probe(model, batch).rows}
    branches = [n for n in rows if n.endswith(("attention.output.dense", "output.dense")) and ".layer." in n]
    ratios = []
    for name in branches:
        whole = name.removesuffix(".dense") if name.endswith("attention.output.dense") else name.split(".output.")[0]
        if pre:  # the sublayer gives x + F, of independent parts
            ratios.append(rows[name] ** 2 / max(rows[whole] ** 2 - rows[name] ** 2, 1e-30))
        else:  # x has left a LayerNorm: rms 1
            ratios.append(rows[name] ** 2)
    return ratios


@torch.random.fork_rng(devices=[])  # the caller's random state stays as it was
def _random_model(pre: bool, r: float, seed: int, layers: int) -> dict[str, float]:
    torch.manual_seed(seed)
    model = _model(pre, layers, r)
    batch = {"input_ids": torch.randint(200, (4, 32)), "labels": torch.randint(200, (4, 32))}
    out = model(**batch, output_hidden_states=True)
    h0, h1 = out.hidden_states[0], out.hidden_states[-1]
    ratios = _branches(model, batch, pre)
    g0, g1 = torch.autograd.grad(out.loss, (h0, h1), retain_graph=True)
    out.loss.backward()
    first, last = _layer_norms(model, layers)
    return {
        "cosine": _cosine(h0.detach(), h1.detach(), True),
        "gradients": _cosine(g0, g1, False),
        "norms": float(g0.norm() / g1.norm()),
        "weights": first / last,
        "r": float(np.mean(ratios)),
        "path": math.prod(skip_gain(ratio=ratio, sublayers=1) for ratio in ratios),
    }


def _stacks(seeds: list[int], layers: int) -> tuple[dict[str, list[Any]], dict[tuple[str, float], dict[str, Any]]]:
    table: dict[str, list[Any]] = {}
    runs = {}
    for kind in ("Post-LN", "Pre-LN"):
        for r in RATIOS:
            found = [_random_model(kind == "Pre-LN", r, seed, layers) for seed in seeds]
            run: dict[str, Any] = {key: [f[key] for f in found] for key in found[0]}
            runs[kind, r] = run
            row = {
                "norm": kind,
                "r": r,
                "cos of h, centred": float(np.mean(run["cosine"])),
                "cos of gradients": float(np.mean(run["gradients"])),
                "gradient norm, first / last": float(np.exp(np.mean(np.log(run["norms"])))),
                "lowest": min(run["norms"]),
                "highest": max(run["norms"]),
                "weight gradients, layer 1 / last": float(np.exp(np.mean(np.log(run["weights"])))),
                "of each seed": run["weights"],
                "(1 + r)^-L": skip_gain(ratio=r, sublayers=2 * layers) if kind == "Post-LN" else "-",
                "measured r": float(np.mean(run["r"])),
                "direct path by measured r": (
                    float(np.exp(np.mean(np.log(run["path"])))) if kind == "Post-LN" else "-"
                ),
            }
            for key, value in row.items():
                table.setdefault(key, []).append(value)
    return table, runs


def _formula(seed: int) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """The closed form at width 768, and the std of the logits of a tied head."""
    g = torch.Generator().manual_seed(seed)
    h = F.layer_norm(torch.randn(256, 768, generator=g), (768,))
    path: dict[str, list[Any]] = {"std": [], "r": [], "gain of a sublayer": [], "direct path after 24": []}
    logits: dict[str, list[Any]] = {"std": [], "sigma sqrt(d)": [], "std of the logits": []}
    standard = 768**-0.5
    for name, std, truncated in (("1/sqrt(d)", standard, False), ("0.02", 0.02, False), ("0.02, cut", 0.02, True)):
        one = skip_gain(768, std, 1, truncated=truncated)
        table = std * torch.randn(2000, 768, generator=g)
        if truncated:
            nn.init.trunc_normal_(table, std=std, a=-2 * std, b=2 * std, generator=g)
        for key, value in zip(
            path, (name, one**-2 - 1, one, skip_gain(768, std, 24, truncated=truncated)), strict=True
        ):
            path[key].append(value)
        realised = math.sqrt(one**-2 - 1)
        for key, value in zip(logits, (name, realised, float((h @ table.T).std())), strict=True):
            logits[key].append(value)
    return path, logits


def _bytes() -> Tensor:
    from pydoc_data.topics import topics

    text = "\n".join(topics[key] for key in sorted(topics)).encode("utf-8")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


@torch.random.fork_rng(devices=[])
def _gammas(dense: bool, seed: int, steps: int) -> list[float]:
    """Mean |gamma| of all LayerNorms after training: embeddings, sublayers, that of the extra layer if there is one."""
    data = _bytes()
    torch.manual_seed(seed)
    model = _model(False, 4, 0.307, width=96, vocabulary=257)
    if not dense:
        model.cls.predictions.transform = nn.Identity()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    g = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 200)
        starts = torch.randint(len(data) - 32, (8, 1), generator=g)
        ids = data[starts + torch.arange(32)]
        hidden = torch.rand(ids.shape, generator=g) < 0.15
        loss = model(input_ids=ids.masked_fill(hidden, 256), labels=ids.masked_fill(~hidden, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [row["gain"] for row in norm_gains(model)]


def measure(quick: bool, seed: int) -> Measurement:
    """Measure the claim; see the module for the rule.

    Args:
        quick: Two seeds, 4 layers, 10 steps of training: shows that everything runs; the figures mean little.
        seed: First of five seeds (two in the training).
    """
    layers, steps = (4, 10) if quick else (12, 1000)
    seeds = list(range(seed, seed + (2 if quick else 5)))
    table, runs = _stacks(seeds, layers)
    path, logits = _formula(seed)
    gammas = {dense: [_gammas(dense, s, steps) for s in seeds[: 1 if quick else 2]] for dense in (True, False)}

    kept, gone = (float(np.mean(runs["Post-LN", r]["cosine"])) for r in (0.307, 1.0))
    identity = kept > 0.3 and abs(gone) < 0.05
    small, large = (float(np.mean(np.log(runs["Post-LN", r]["weights"]))) for r in (0.307, 1.0))
    vanishing = math.exp(large - small) <= 1 / 3
    taken = all(g[-1] >= max(g[:-1]) + 0.03 for found in gammas.values() for g in found)
    names = ["with Dense + LN", "without"]
    figures: dict[str, Any] = {
        "random stacks": table,
        "direct path, formula": path,
        "logits of a tied head": logits,
        "mean |gamma| after training": {
            "head": names,
            "last LayerNorm": [float(np.mean([g[-1] for g in gammas[d]])) for d in (True, False)],
            "of each seed": [[g[-1] for g in gammas[d]] for d in (True, False)],
            "largest of the others": [float(np.mean([max(g[:-1]) for g in gammas[d]])) for d in (True, False)],
            "smallest": [float(np.mean([min(g) for g in gammas[d]])) for d in (True, False)],
        },
        "(a) identity path kept at .307 and gone at 1": str(identity),
        "(b) weight gradients of layer 1, r = 1 against .307": math.exp(large - small),
        "(b) vanishing without 0.02": str(vanishing),
        "(c) the last gamma grows most": str(taken),
    }
    verdict: Verdict = "not reproduced"
    if identity:
        verdict = "reproduced" if vanishing and taken else "partly"

    def plot(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        places = np.arange(len(RATIOS))
        for kind, shift in (("Post-LN", -0.08), ("Pre-LN", 0.08)):
            for axis, key in ((left, "cosine"), (right, "weights")):
                values = [runs[kind, r][key] for r in RATIOS]
                for place, points in zip(places, values, strict=True):
                    axis.plot([place + shift] * len(points), points, ".", color="grey", markersize=5, zorder=1)
                center = [float(np.mean(v)) if key == "cosine" else float(np.exp(np.mean(np.log(v)))) for v in values]
                axis.plot(places + shift, center, marker="o", label=kind)
        left.plot(
            places, [skip_gain(ratio=r, sublayers=2 * layers) for r in RATIOS], "k:", label="(1 + r)^-L, the formula"
        )
        left.axhline(0, color="grey", linewidth=0.5)
        left.set(ylabel="cosine", title="what is left of the input: cos(h0, hL), centred")
        right.axhline(1, color="grey", linewidth=0.5)
        right.set_yscale("log")
        right.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
        right.minorticks_off()
        right.set(ylabel="ratio", title="norm of weight gradients, layer 1 / last layer")
        for axis in (left, right):
            axis.set_xticks(places, [f"{r:g}" for r in RATIOS])
            axis.set_xlabel("r = d std^2 (.307 is 0.02 at d = 768)")
            axis.title.set_fontsize(9)
            axis.legend(fontsize=8)

    note = (
        "Two seeds, 4 layers and 10 training steps only: the figures mean little."
        if quick
        else f"5 seeds from {seed}, 12 layers of width {WIDTH}; training: 2 seeds, {steps} steps. What is shown is "
        "that 0.02 keeps the identity path; that it keeps gradient norms from vanishing is not."
    )
    return Measurement(figures, verdict, plot, note)
