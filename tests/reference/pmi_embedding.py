"""PMI word vectors in plain float64 with dense matrices, from the formulas of article 4671."""

import numpy as np


def targets(counts, words, marginal="unigram", cds=1.0, shift=1.0):
    """PMI_ij = ln X_ij - ln X_tot - ln n_i - ln n_j + 2 ln n_tot (word i, context j); NaN where X_ij = 0 or i = j."""
    counts = np.array(counts, float)
    np.fill_diagonal(counts, 0)
    rows, columns = (counts.sum(1), counts.sum(0)) if marginal == "rowsum" else (words, words)
    rows, columns = np.array(rows, float), np.array(columns, float) ** cds
    with np.errstate(divide="ignore"):
        joint = np.log(counts / counts.sum())
    pmi = joint - np.log(rows / rows.sum())[:, None] - np.log(columns / columns.sum())[None, :] - np.log(shift)
    pmi[counts == 0] = np.nan
    return pmi


def weights(counts, x_max, alpha, truncate):
    """lambda = (X / x_max)^alpha, cut at 1; 0 where X = 0 or i = j."""
    counts = np.array(counts, float)
    np.fill_diagonal(counts, 0)
    scaled = np.minimum(counts / x_max, 1) if truncate else counts / x_max
    return np.where(counts > 0, scaled**alpha, 0)


def objective(v, u, pmi, lam, reg, w0, t0, one_table):
    """Weighted squared error of the seen pairs + w0 times that of the unseen ones against t0 + the penalty."""
    seen = ~np.isnan(pmi)
    inner = v @ u.T
    error = np.where(seen, lam * (inner - np.nan_to_num(pmi)) ** 2, w0 * (inner - t0) ** 2)
    np.fill_diagonal(error, 0)
    reg = np.broadcast_to(reg, (len(v),))
    if one_table:
        return error.sum() / 2 + (reg * (v**2).sum(1)).sum()
    return error.sum() + (reg * (v**2).sum(1)).sum() + (reg * (u**2).sum(1)).sum()


def solve_row(i, table, pmi, lam, reg, w0, t0):
    """The vector of word i from the normal equations, all other vectors fixed; every pair explicitly."""
    dim = table.shape[1]
    matrix, side = reg * np.eye(dim), np.zeros(dim)
    for j, vector in enumerate(table):
        if j == i:
            continue
        weight, target = (w0, t0) if np.isnan(pmi[i, j]) else (lam[i, j], pmi[i, j])
        matrix += weight * np.outer(vector, vector)
        side += weight * target * vector
    return np.linalg.solve(matrix, side)


def gauss_seidel(v, pmi, lam, reg, w0, t0, sweeps):
    """One table, word after word."""
    v = v.copy()
    for _ in range(sweeps):
        for i in range(len(v)):
            v[i] = solve_row(i, v, pmi, lam, reg, w0, t0)
    return v


def alternate(v, u, pmi, lam, reg, w0, t0, sweeps):
    """Two tables, one after the other."""
    v, u = v.copy(), u.copy()
    for _ in range(sweeps):
        v = np.array([solve_row(i, u, pmi, lam, reg, w0, t0) for i in range(len(v))])
        u = np.array([solve_row(i, v, pmi.T, lam.T, reg, w0, t0) for i in range(len(u))])
    return v, u


def adagrad_epoch(order, v, u, gv, gu, pmi, lam, rate, one_table):
    """One epoch of the published update, in place: first G += g*g, then the step; gradients from the old vectors."""
    for i in order:
        for j in range(i if one_table else len(u)):
            if i == j or np.isnan(pmi[i, j]):
                continue
            error = v[i] @ u[j] - pmi[i, j]
            grad_i, grad_j = lam[i, j] * error * u[j], lam[i, j] * error * v[i]
            gv[i] += grad_i**2
            gu[j] += grad_j**2
            v[i] -= rate * grad_i / np.sqrt(gv[i] + 1e-8)
            u[j] -= rate * grad_j / np.sqrt(gu[j] + 1e-8)


def glove_loss(v, u, b, c, log_counts, lam):
    """GloVe's loss with biases, over ordered pairs that were seen."""
    error = v @ u.T + b[:, None] + c[None, :] - np.nan_to_num(log_counts)
    return (np.where(np.isnan(log_counts), 0, lam) * error**2).sum()
