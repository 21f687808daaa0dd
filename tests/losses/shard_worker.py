"""One process of the class-sharded head; its own module so that a spawned process can import it."""

import os

import torch

from kexue.losses import MarginSoftmax

CASES = [("am", 30.0, "mean"), ("arc", 64.0, "sum"), ("metric", 20.0, "none"), ("am", 64.0, "none")]
ROWS = (3, 5)


def whole_batch():
    g = torch.Generator().manual_seed(1)
    z = torch.randn(sum(ROWS), 6, generator=g, dtype=torch.float64)
    return z, torch.tensor([0, 10, 4, 5, 5, 9, 2, 6]), torch.randn(11, 6, generator=g, dtype=torch.float64)


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    z, labels, weight = whole_batch()
    own = slice(0, ROWS[0]) if rank == 0 else slice(ROWS[0], None)
    results = []
    for kind, scale, reduction in CASES:
        head = MarginSoftmax(
            6, 11, kind, scale, 0.3, reduction=reduction, process_group=torch.distributed.group.WORLD, block_rows=3
        ).double()
        with torch.no_grad():
            start = head.shards.start
            head.weight.copy_(weight[start : start + head.shards.count])
        mine = z[own].clone().requires_grad_()
        loss = head(mine, labels[own])
        (loss * torch.linspace(1, 2, len(z))[own] if reduction == "none" else loss).sum().backward()
        results.append((loss.detach(), mine.grad, head.weight.grad))
    margin = torch.nn.Parameter(torch.linspace(0.1, 0.4, 11).double())  # learned, one for each of all classes
    head = MarginSoftmax(6, 11, "arc", margin=margin, process_group=torch.distributed.group.WORLD).double()
    with torch.no_grad():
        head.weight.copy_(weight[head.shards.start : head.shards.start + head.shards.count])
    head(z[own], labels[own]).backward()
    head = MarginSoftmax(6, 11, sample_rate=0.9, process_group=torch.distributed.group.WORLD).double()
    sampled = head(z[own], labels[own])
    torch.save((results, sampled.detach(), margin.grad), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
