"""SimSiam's loss, its gradients and the collapse figures in plain float64, row by row."""

import math

import torch


def cosine(p, z):
    """Cosine of two vectors; 0 for one without a direction."""
    if min(p.norm().item(), z.norm().item()) <= 1e-12:
        return (p * z).sum() * 0
    return (p * z).sum() / (p.norm() * z.norm())


def loss_rows(p1, p2, z1, z2):
    """Loss of each row, (B,)."""
    rows = [-(cosine(a, d) + cosine(b, c)) / 2 for a, b, c, d in zip(p1, p2, z1, z2, strict=True)]
    return torch.stack(rows) if rows else (p1 * z2).sum(1)


def predictor_gradient(p, z):
    """Gradient of minus the cosine by p, by hand."""
    u, v = p / p.norm(), z / z.norm()
    return -(v - (u * v).sum() * u) / p.norm()


def two_passes(model, x1, x2):
    """The published training step: each view on its own through all parts; p1, p2, z1, z2."""
    z1 = model.projector(model.encoder(x1))
    z2 = model.projector(model.encoder(x2))
    return model.predictor(z1), model.predictor(z2), z1, z2


def unit(z):
    """Rows of length 1; zero rows stay."""
    z = z.double()
    return torch.stack([row / row.norm() if row.norm() > 0 else row for row in z])


def std(z):
    """Mean standard deviation of the columns of the unit rows, times sqrt(D)."""
    u = unit(z)
    total = 0.0
    for column in u.T:
        mean = column.sum() / len(column)
        total += math.sqrt(((column - mean) ** 2).sum() / (len(column) - 1))
    return total / u.shape[1] * math.sqrt(u.shape[1])


def rank(z):
    """Participation ratio from the eigenvalues of the covariance."""
    values = torch.linalg.eigvalsh(torch.cov(unit(z).T)).clamp(min=0)
    return float(values.sum() ** 2 / (values**2).sum())
