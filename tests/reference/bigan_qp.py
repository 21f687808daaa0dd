"""GAN-QP, BiGAN-QP and the neighbour metrics in float64, by loops over pairs."""

from __future__ import annotations

import math

import numpy as np


def distance(x, y, metric):
    """Mean absolute, or root mean square, difference of two samples."""
    a, b = np.asarray(x, np.float64).ravel(), np.asarray(y, np.float64).ravel()
    if metric == "l1":
        return sum(abs(p - q) for p, q in zip(a, b, strict=True)) / len(a)
    return math.sqrt(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / len(a))


def critic_loss(score_real, score_fake, distances, lam=10.0, power=2):
    """mean(-D + D^power / (power (lam d)^(power - 1))) of float64 scores and given distances."""
    total = 0.0
    for real, fake, d in zip(score_real, score_fake, distances, strict=True):
        delta = real - fake
        total = total - delta + delta**power / (power * (lam * float(d)) ** (power - 1))
    return total / len(score_real)


def best_two_point(p, q, d, lam):
    """Optimal antisymmetric critic on a finite set: D*(i, j) and the divergence, from p, q (K,) and d (K, K)."""
    k = len(p)
    delta, divergence = np.zeros((k, k)), 0.0
    for i in range(k):
        for j in range(k):
            forward, back = p[i] * q[j], p[j] * q[i]
            if forward + back > 0:
                delta[i, j] = lam * d[i, j] * (forward - back) / (forward + back)
            if d[i, j] > 0:
                divergence += forward * (delta[i, j] - delta[i, j] ** 2 / (2 * lam * d[i, j]))
    return delta, divergence


def bigan_losses(generator, encoder, critic, x, z, lam, beta_z, beta_x):
    """The critic's loss and the players' terms, written as in the article; two passes through everything."""
    fake, code = generator(z), encoder(x)
    delta = critic(x, code).squeeze(1) - critic(fake, z).squeeze(1)
    norm = lam * ((x - fake).abs().flatten(1).mean(1) + (code - z).abs().mean(1)).detach()
    critic_side = (-delta + 0.5 * delta**2 / norm).mean()
    codes = beta_z * (z - encoder(fake.detach())).square().mean()
    pictures = beta_x * (x - generator(code.detach())).square().mean()
    return critic_side, delta.mean(), codes, pictures


def quality(real, fake, k):
    """Precision, recall, density, coverage by loops over points."""
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)

    def distances(x, points):  # one way to measure, so that what ties is equal to the bit
        return np.sqrt(((points - x) ** 2).sum(1))

    r_real, r_fake = ([np.sort(distances(x, points))[k] for x in points] for points in (real, fake))
    inside = np.array([distances(x, fake) <= r for x, r in zip(real, r_real, strict=True)])
    recall = np.mean([(distances(x, fake) <= r_fake).any() for x in real])
    return inside.any(0).mean(), recall, inside.sum() / (k * len(fake)), inside.any(1).mean()
