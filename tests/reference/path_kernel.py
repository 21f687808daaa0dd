"""Path kernel, the slow and obvious way, in float64: one backward pass per example and output, at every point.

The training is done by torch.optim. What an example has in the optimiser's buffer is carried forwards, one vector of
parameters per example, so that nothing is shared with the implementation: it never exchanges the order of sums.
"""

import copy

import numpy as np
import torch
from torch.nn import functional as F


def loss_of(name, out, y):
    if name == "mse":
        return (out - y).square().sum(-1)
    if name == "bce":
        return F.binary_cross_entropy_with_logits(out, y, reduction="none").sum(-1)
    return F.cross_entropy(out, y, reduction="none")


def flat(tensors, like):
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(tensors, like, strict=True)]
    )


def gradients(model, x, reduce):
    """Gradients (R, U, P) of ``reduce(output of one example, its number)``, a vector (U,), example by example."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    made = []
    for i in range(len(x)):
        values = reduce(model(x[i : i + 1]).reshape(1, -1), i)
        made.append(
            torch.stack(
                [
                    flat(torch.autograd.grad(v, parameters, retain_graph=True, allow_unused=True), parameters)
                    for v in values
                ]
            )
        )
    return torch.stack(made)


def path_kernel(
    model, x, y, x_test, loss="mse", rule="chord3", lr=0.01, batches=None, momentum=0.0, weight_decay=0.0,
    optimizer="sgd", betas=(0.9, 0.999), eps=1e-8,
):  # fmt: skip
    """Train a copy of ``model``; returns contributions (M, N, C), kernel (M, N, C, C), decay (M, C), f0, f_T (M, C)."""
    model = copy.deepcopy(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if optimizer == "adam":
        opt = torch.optim.Adam(parameters, lr, betas, eps, weight_decay)
    else:
        opt = torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay)
    with torch.no_grad():
        f0 = model(x_test).reshape(len(x_test), -1)
    c, n, size = f0.shape[1], len(x), sum(p.numel() for p in parameters)
    if loss != "ce":
        y = y.reshape(n, -1)
    points, weights = np.polynomial.legendre.leggauss(3)
    points, weights = ([0.0], [1.0]) if rule == "left" else ((points + 1) / 2, weights / 2)
    shares, kernel, decay = f0.new_zeros(len(x_test), n, c), f0.new_zeros(len(x_test), n, c, c), f0.new_zeros(f0.shape)
    buffer, outputs, decayed = f0.new_zeros(n, size), f0.new_zeros(n, c, size), f0.new_zeros(size)
    fade, own = (betas[0], 1 - betas[0]) if optimizer == "adam" else (momentum, 1.0)
    for rows in batches:
        before = flat(parameters, parameters).detach().clone()
        new, new_outputs = torch.zeros_like(buffer), torch.zeros_like(outputs)
        own_y = y[rows]
        new[rows] = gradients(model, x[rows], lambda out, i, t=own_y: loss_of(loss, out, t[i : i + 1]))[:, 0] / len(
            rows
        )
        new_outputs[rows] = gradients(model, x[rows], lambda out, i: out[0]) / len(rows)
        buffer = fade * buffer + own * new
        outputs = fade * outputs + own * new_outputs
        opt.zero_grad()
        loss_of(loss, model(x[rows]).reshape(len(rows), -1), y[rows]).mean().backward()
        unused = torch.cat([torch.full_like(p, p.grad is None).flatten() for p in parameters]).bool()
        opt.step()
        decayed = (fade * decayed + own * weight_decay * before).masked_fill(unused, 0)  # torch skips those
        after = flat(parameters, parameters).detach().clone()
        rate = torch.full_like(before, lr)
        if optimizer == "adam":
            step = max(int(s["step"]) for s in opt.state.values())
            v = [opt.state[p]["exp_avg_sq"] if p in opt.state else torch.zeros_like(p) for p in parameters]
            v = flat(v, v) / (1 - betas[1] ** step)
            rate = lr / (1 - betas[0] ** step) / (v.sqrt() + eps)
        torch.testing.assert_close(after - before, -rate * (buffer.sum(0) + decayed), rtol=1e-6, atol=1e-12)
        mean = 0
        for u, w in zip(points, weights, strict=True):
            set_parameters(parameters, (1 - u) * before + u * after)
            mean = mean + w * gradients(model, x_test, lambda out, i: out[0])
        set_parameters(parameters, after)
        shares -= torch.einsum("mcp,np->mnc", mean, rate * buffer)
        kernel += torch.einsum("mcp,nep->mnce", mean, rate * outputs)
        decay -= mean @ (rate * decayed)
    with torch.no_grad():
        f_t = model(x_test).reshape(len(x_test), -1)
    return {"shares": shares, "kernel": kernel, "decay": decay, "f0": f0, "f_T": f_t, "model": model}


def set_parameters(parameters, theta):
    start = 0
    with torch.no_grad():
        for p in parameters:
            p.copy_(theta[start : start + p.numel()].view_as(p))
            start += p.numel()
