"""One process of a contrastive loss over two; its own module so that a spawned process can import it."""

import os

import torch

from kexue.losses import FlatNCELoss, FlatNegativesRankingLoss, InfoNCELoss, info_nce, nt_xent

ROWS = {"uneven": (2, 5), "single": (1, 4), "none here": (0, 4)}
EXTRA = (3, 1)  # shared negatives of each process


def batch():
    """Two views of each row, shared negatives, negatives and positives of their own, a mask of all columns."""
    g = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mask = torch.rand(7, 11, generator=g) < 0.8
    mask[:, :2] = mask[:2] = True
    return normal(7, 5), normal(7, 5), normal(sum(EXTRA), 5), normal(7, 2, 5), normal(7, 3, 5), mask


def cases(group):
    """Name -> (sizes, loss of the tensors of :func:`batch`, whether it is the loss of each row)."""
    options = {"process_group": group}
    both = {"in_batch": True} | options

    def ranking(q, k, n):
        loss = FlatNegativesRankingLoss(lambda column: {"sentence_embedding": column}, report="flat", **options)
        return loss([q, k, n])

    return {
        "info": ("uneven", lambda q, k, n, o, p, m: info_nce(q, k, margin=0.1, **options)),
        "flat, sum": ("single", lambda q, k, n, o, p, m: info_nce(q, k, mode="flat", reduction="sum", **options)),
        "cold, masked": ("uneven", lambda q, k, n, o, p, m: info_nce(q, k, negative_mask=m[:, : m.shape[1] - 4],
                                                                     temperature=0.01, reduction="none", **options)),
        "symmetric": ("uneven", lambda q, k, n, o, p, m: InfoNCELoss(0.2, symmetric=True, **options)(
            q, k, negative_mask=m[:, : m.shape[1] - 4])),
        "symmetric, none": ("none here", lambda q, k, n, o, p, m: FlatNCELoss(
            0.3, symmetric=True, report="info", reduction="none", **options)(q, k)),
        "shared": ("none here", lambda q, k, n, o, p, m: info_nce(q, k, n, temperature=0.2, **options)),
        "both, masked": ("uneven", lambda q, k, n, o, p, m: info_nce(q, k, n, negative_mask=m, **both)),
        "own": ("single", lambda q, k, n, o, p, m: info_nce(q, k, o, mode="flat", **options)),
        "positives": ("uneven", lambda q, k, n, o, p, m: info_nce(q, p, n, temperature=0.5, **options)),
        "views": ("uneven", lambda q, k, n, o, p, m: nt_xent(q, k, 0.2, **options)),
        "views, none": ("none here", lambda q, k, n, o, p, m: nt_xent(q, k, 0.01, "info", reduction="none", **options)),
        "ranking": ("single", lambda q, k, n, o, p, m: ranking(q, k, n)),
    }  # fmt: skip


def one(name, group, rank):
    """Loss and gradients of a case: all rows for rank None, else those of the process."""
    sizes, loss = cases(group)[name]
    first, second = ROWS[sizes]
    q, k, extra, own, several, mask = batch()
    total = first + second
    here = {None: slice(0, total), 0: slice(0, first), 1: slice(first, total)}[rank]
    given = {None: slice(None), 0: slice(0, EXTRA[0]), 1: slice(EXTRA[0], None)}[rank]
    mask = torch.cat([mask[:, :total], mask[:, 7:]], 1)
    leaves = [x.clone().requires_grad_() for x in (q[here], k[here], extra[given], own[here], several[here])]
    value = loss(*leaves, mask[here])
    weights = torch.linspace(1, 2, total, dtype=torch.float64)[here]
    weights = torch.cat([weights, weights]) if value.numel() == 2 * len(weights) else weights
    scalar = (value * weights).sum() if value.dim() else 1.5 * value
    grads = torch.autograd.grad(scalar, leaves, allow_unused=True)
    return value.detach(), [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    group = torch.distributed.group.WORLD
    results = {name: one(name, group, rank) for name in cases(group)}
    q, k, *_ = batch()
    half = info_nce(q[3 * rank : 3 * rank + 3].half(), k[3 * rank : 3 * rank + 3].half(), process_group=group)
    with torch.no_grad():
        value = nt_xent(q[3 * rank : 3 * rank + 3], k[3 * rank : 3 * rank + 3], process_group=group)
    messages = []
    for call in (info_nce, nt_xent):
        try:
            call(q[:rank], k[:rank], process_group=group)
        except ValueError as error:
            messages.append(str(error))
    torch.save((results, half, value, messages), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
