"""Training a text classifier with DropToken, with the approach of timm's PatchDropout, and without dropping.

timm is an image library; what it does is written out here: embed and norm all tokens, draw a random set of those after
the class token (padding like any other), gather the hidden states. All contenders share the model and everything else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Table, compare
from kexue.models import DropToken, KexueConfig, KexueForSequenceClassification
from kexue.models._passes import Pass, padding_mask

SECTION = "Dropping tokens in training"

PEER = "no dropping"
VOCABULARY, LENGTH, BATCH = 8000, 256, 16


def model() -> KexueForSequenceClassification:
    torch.manual_seed(0)
    config = KexueConfig(
        VOCABULARY, 256, 6, 8, max_position=LENGTH, embedding_norm=True, dropout=0.1, pad_token_id=0, num_labels=10
    )
    return KexueForSequenceClassification(config).train()


def patch_dropout(x: Tensor, mask: Tensor | None, rate: float) -> tuple[Tensor, Tensor | None]:
    """Hidden states (B, T, D) of all tokens -> the first one and a random set of the others, unordered."""
    rest = x[:, 1:]
    keys = torch.randn(rest.shape[:2], device=x.device)
    kept = keys.argsort(-1)[:, : max(1, int(rest.shape[1] * (1 - rate)))]
    gathered = rest.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
    if mask is not None:
        mask = torch.cat([mask[:, :1], mask[:, 1:].gather(1, kept)], 1)
    return torch.cat([x[:, :1], gathered], 1), mask


def step(ids: Tensor, mask: Tensor | None, drop: DropToken | None = None, rate: float = 0.0) -> Callable[[], None]:
    """One training step: ``drop`` acts on ids, ``rate`` on hidden states."""
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=True)
    labels = torch.randint(10, (BATCH,), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)

    def call() -> None:
        tokens, places, taken = ids, positions, mask
        if drop is not None:
            tokens, places, taken, _ = drop(ids, mask)
        x = net.kexue.embeddings(net.kexue.embeddings.token(tokens), places, None)
        if rate:
            x, taken = patch_dropout(x, taken, rate)
        now = Pass(causal=False, weights=False)
        if taken is not None and (taken := padding_mask(taken, (x.shape[0], x.shape[1]))) is not None:
            now.mask = taken[:, None, None]
        for layer in net.kexue.layers:
            x, _ = layer(x, now)
        scores = net.classifier(net.pooler(net.kexue.final_norm(x[:, 0])))
        optimizer.zero_grad()
        F.cross_entropy(scores, labels).backward()
        optimizer.step()

    return call


def run(repeats: int = 5) -> list[Table]:
    """Measure texts of one length, and of lengths from 64 to 256 in one batch."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (BATCH, LENGTH), generator=g)
    workload = (
        f"A training step (forward, backward, AdamW), width 256, 6 layers, vocabulary {VOCABULARY}, float32, "
        f"{torch.get_num_threads()} thread(s), batch {BATCH}"
    )
    contenders = {PEER: step(ids, None)}
    for rate in (0.25, 0.5):
        contenders[f"PatchDropout's approach, {rate:g}"] = step(ids, None, rate=rate)
        contenders[f"DropToken, {rate:g}"] = step(ids, None, DropToken(rate, prefix=1))
    same = compare(
        f"Texts of {LENGTH} tokens",
        f"{workload}.",
        contenders,
        peer=PEER,
        packages=("torch",),
        repeats=repeats,
        remarks=["Both drop the same number of tokens; the class token stays."],
    )
    lengths = torch.linspace(64, LENGTH, BATCH).long()
    mask = torch.arange(LENGTH) < lengths[:, None]
    padded = ids.masked_fill(~mask, 0)
    contenders = {
        PEER: step(padded, mask),
        "PatchDropout's approach, 0.5": step(padded, mask, rate=0.5),
        "DropToken, 0.5, fixed": step(padded, mask, DropToken(0.5, prefix=1)),
        "DropToken, 0.5, dense": step(padded, mask, DropToken(0.5, prefix=1, mode="dense")),
    }
    mixed = compare(
        "Texts of 64 to 256 tokens in one batch",
        f"{workload}, padded to {LENGTH}, {int(mask.sum())} of {mask.numel()} places hold tokens.",
        contenders,
        peer=PEER,
        packages=("torch",),
        repeats=repeats,
        remarks=[
            "PatchDropout draws padding like tokens: a text keeps half of its tokens on average only. DropToken keeps "
            "exactly half of each text (fixed), or as many of each as half of the mean length (dense), without padding "
            "but for texts that are shorter than that."
        ],
    )
    return [same, mixed]
