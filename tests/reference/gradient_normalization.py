"""Gradient-normalised scores and slope penalties in float64, row by row, by differentiating twice."""

import torch


def row(net, x):
    """Score and slope of one row, with a graph."""
    x = x[None]
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    score = net(x).reshape(())
    (gradient,) = torch.autograd.grad(score, x, create_graph=True)
    return score, gradient


def normalize(net, x, kind, eps):
    """(B,) normalised scores."""
    found = []
    for item in x:
        score, gradient = row(net, item)
        if kind == "gn":
            slope = (gradient.square().sum() + eps).sqrt()
            found.append(score / (slope + score.abs()))
        else:
            slope = gradient.square().sum().sqrt()
            found.append(score * slope / (slope**2 + eps))
    return torch.stack(found)


def slopes(net, x):
    """(B,) norms of the gradients."""
    return torch.stack([row(net, item)[1].square().sum().sqrt() for item in x])


def penalty(net, x, kind, lam):
    """The penalty at given points."""
    n = slopes(net, x)
    if kind == "gp":
        return lam * ((n - 1) ** 2).mean()
    if kind == "gp1":
        return lam * (torch.clamp(n - 1, min=0) ** 2).mean()
    return lam / 2 * (n**2).mean()


def w_div(net, x_real, x_fake, k, p):
    """The penalty of the Wasserstein divergence."""
    return k / 2 * ((slopes(net, x_real) ** p).mean() + (slopes(net, x_fake) ** p).mean())


def qp(real, fake, x_real, x_fake, lam):
    """Loss of a GAN-QP critic."""
    found = []
    for r, f, a, b in zip(real, fake, x_real, x_fake, strict=True):
        distance = (a - b).abs().mean()
        found.append(-(r - f) + (r - f) ** 2 / (2 * lam * distance))
    return torch.stack(found).mean()
