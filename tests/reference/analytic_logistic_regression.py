"""Closed-form classifiers in plain float64, row by row and class by class."""

import numpy as np


def moments(X, y, classes, weight=None):
    """Weights, means and covariance (divided by the weight) of each class, from sums over rows."""
    X = np.asarray(X, np.float64)
    w = np.ones(len(X)) if weight is None else np.asarray(weight, np.float64)
    counts, means, covariances = [], [], []
    for k in classes:
        rows = [i for i in range(len(X)) if y[i] == k]
        total = sum(w[i] for i in rows)
        mean = sum(w[i] * X[i] for i in rows) / total
        counts.append(total)
        means.append(mean)
        covariances.append(sum(w[i] * np.outer(X[i] - mean, X[i] - mean) for i in rows) / total)
    return np.array(counts), np.array(means), np.array(covariances)


def oas(R, n):
    """Oracle approximating shrinkage from the traces of R and R^2."""
    d = len(R)
    t1, t2 = np.trace(R), np.trace(R @ R)
    return min(1.0, (t2 / d**2 + (t1 / d) ** 2) / ((n + 1) * (t2 / d**2 - t1**2 / d**3)))


def regularised(sigma, deviation, n, shrinkage, ridge):
    """The covariance whose correlations are shrunk, and the shrinkage."""
    R = sigma / np.outer(deviation, deviation)
    s = oas(R, n) if shrinkage == "auto" else shrinkage
    R = (1 - s) * R + (s + ridge) * np.eye(len(R))
    return R * np.outer(deviation, deviation), s


def linear(X, y, *, shrinkage=0.0, ridge=0.0, weight=None, priors=None):
    """The article's w_k = mu_k Sigma^-1 and b_k, (C, D) and (C,), and the shrinkage."""
    counts, means, covariances = moments(X, y, np.unique(y), weight)
    p = counts / counts.sum()
    sigma = sum(share * covariance for share, covariance in zip(p, covariances, strict=True))
    sigma, s = regularised(sigma, np.sqrt(np.diag(sigma)), counts.sum(), shrinkage, ridge)
    inverse = np.linalg.inv(sigma)
    prior = p if priors is None else priors
    W = np.array([mean @ inverse for mean in means])
    b = np.array([np.log(prior[k]) - 0.5 * means[k] @ inverse @ means[k] for k in range(len(p))])
    return W, b, s


def article(X, y):
    """Weights from the law of total covariance, Sigma~ + mu~ mu~ - sum p_k mu_k mu_k, as the article writes it."""
    counts, means, _ = moments(X, y, np.unique(y))
    p = counts / counts.sum()
    total, mean = np.cov(X.T, ddof=0), X.mean(0)
    sigma = total + np.outer(mean, mean) - sum(p[k] * np.outer(means[k], means[k]) for k in range(len(p)))
    return means @ np.linalg.inv(sigma), p


def quadratic_scores(X, Q, y, *, shrinkage=0.0, ridge=0.0):
    """log p_k + log N(q; mu_k, Sigma_k) of rows Q under the classes of (X, y), (N, C)."""
    counts, means, covariances = moments(X, y, np.unique(y))
    p = counts / counts.sum()
    deviation = np.sqrt(np.diag(sum(share * covariance for share, covariance in zip(p, covariances, strict=True))))
    scores = np.empty((len(Q), len(p)))
    for k in range(len(p)):
        sigma, _ = regularised(covariances[k], deviation, counts[k], shrinkage, ridge)
        for i, q in enumerate(Q):
            gap = q - means[k]
            distance = gap @ np.linalg.inv(sigma) @ gap
            scores[i, k] = np.log(p[k]) - 0.5 * (len(gap) * np.log(2 * np.pi) + np.linalg.slogdet(sigma)[1] + distance)
    return scores


def softmax(scores):
    """Probabilities, row by row."""
    return np.array([np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in scores])


def accuracy_of_folds(X, y, folds, shrinkages, ridge):
    """Accuracy of a fresh fit for every fold and shrinkage, (S, folds)."""
    classes = np.unique(y)
    out = np.empty((len(shrinkages), len(folds)))
    for j, (train, test) in enumerate(folds):
        for i, s in enumerate(shrinkages):
            W, b, _ = linear(X[train], y[train], shrinkage=s, ridge=ridge)
            out[i, j] = np.mean(
                [classes[np.argmax(W @ x + b)] == label for x, label in zip(X[test], y[test], strict=True)]
            )
    return out
