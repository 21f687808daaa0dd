"""Divergences of normals in plain float64, pair by pair, from their definitions."""

import math

import torch


def sqrtm(s):
    """Symmetric square root by eigenvectors; differentiable where the eigenvalues differ."""
    w, v = torch.linalg.eigh(s)
    return v @ torch.diag(w.clamp(min=0).sqrt()) @ v.T


def kl(mp, sp, mq, sq):
    d, inverse = mp - mq, torch.linalg.inv(sq)
    return 0.5 * (d @ inverse @ d - torch.logdet(inverse @ sp) + torch.trace(inverse @ sp) - len(d))


def jeffreys(mp, sp, mq, sq):
    return kl(mp, sp, mq, sq) + kl(mq, sq, mp, sp)


def renyi(mp, sp, mq, sq, alpha):
    d, mixed = mp - mq, alpha * sq + (1 - alpha) * sp
    logs = torch.logdet(mixed) - (1 - alpha) * torch.logdet(sp) - alpha * torch.logdet(sq)
    return alpha / 2 * d @ torch.linalg.inv(mixed) @ d - logs / (2 * (alpha - 1))


def bhattacharyya(mp, sp, mq, sq):
    d, mixed = mp - mq, (sp + sq) / 2
    logs = torch.logdet(mixed) - 0.5 * (torch.logdet(sp) + torch.logdet(sq))
    return 0.5 * logs + d @ torch.linalg.inv(mixed) @ d / 8


def hellinger(mp, sp, mq, sq):
    return (1 - torch.exp(-bhattacharyya(mp, sp, mq, sq))).sqrt()


def w2(mp, sp, mq, sq):
    """Version 1 of the article, with the symmetric root of Sp."""
    root = sqrtm(sp)
    return (mp - mq).square().sum() + torch.trace(sp) + torch.trace(sq) - 2 * torch.trace(sqrtm(root @ sq @ root))


def w2_frechet(mp, sp, mq, sq):
    """Version 2: the eigenvalues of the product."""
    roots = torch.linalg.eigvals(sp @ sq).sqrt().real.sum()
    return (mp - mq).square().sum() + torch.trace(sp) + torch.trace(sq) - 2 * roots


def ot_map(mp, sp, mq, sq):
    root = sqrtm(sp)
    inverse = torch.linalg.inv(root)
    t = inverse @ sqrtm(root @ sq @ root) @ inverse
    return t, mq - t @ mp


def entropy(s):
    n = s.shape[0]
    return n / 2 * (1 + math.log(2 * math.pi)) + 0.5 * torch.logdet(s)
