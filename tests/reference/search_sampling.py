"""Search and sampling, slowly: laws by enumeration, kernels from their formulas, one text at a time, float64."""

from itertools import product

import numpy as np


def texts(vocabulary, lengths):
    """All texts of the given lengths."""
    return [text for length in lengths for text in product(range(vocabulary), repeat=length)]


def log_markov(text, table):
    """Log-probability of a text under a Markov chain; index V is the start and the end."""
    end = len(table) - 1
    total, previous = 0.0, end
    for token in (*text, end):
        total += np.log(table[previous][token])
        previous = token
    return total


def law(log_rho):
    """The normalised law."""
    weights = np.exp(np.asarray(log_rho) - np.max(log_rho))
    return weights / weights.sum()


def log_causal(model, text, bos=None, eos=None):
    """Log-probability of one text under a causal model, factor by factor, without padding or batches."""
    import torch

    row = [*([] if bos is None else [bos]), *text, *([] if eos is None else [eos])]
    total = 0.0
    for t in range(1, len(row)):
        context = torch.tensor([row[:t]])
        logits = model(context, attention_mask=torch.ones_like(context)).logits[0, -1].detach().double()
        total += float(logits[row[t]] - logits.logsumexp(-1))
    return total


def hastings_matrix(states, pi, q, article=False):
    """Metropolis-Hastings from the matrix q of the proposal (row: from): alpha q, the rest stays."""
    count = len(states)
    matrix = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            if i != j and q[i, j] > 0:
                accept = q[j, i] * pi[j] if article else min(1.0, pi[j] * q[j, i] / (pi[i] * q[i, j]))
                matrix[i, j] = q[i, j] * accept
        matrix[i, i] = 1 - matrix[i].sum()
    return matrix


def replace_matrix(states, vocabulary):
    """Uniform replacement at a uniform position."""
    q = np.zeros((len(states), len(states)))
    for i, x in enumerate(states):
        for j, y in enumerate(states):
            if len(x) == len(y):
                different = sum(a != b for a, b in zip(x, y, strict=True))
                q[i, j] = {0: 1 / vocabulary, 1: 1 / (len(x) * vocabulary)}.get(different, 0.0)
    return q


def gibbs_matrix(states, pi, place, width=1):
    """Redraw the tokens place ... place + width - 1 from the conditional of pi."""
    matrix = np.zeros((len(states), len(states)))
    for i, x in enumerate(states):
        same = [
            j
            for j, y in enumerate(states)
            if all(x[t] == y[t] for t in range(len(x)) if not place <= t < place + width)
        ]
        matrix[i, same] = pi[same] / pi[same].sum()
    return matrix


def stationary(matrix):
    """The stationary law, by solving pi (P - 1) = 0, sum pi = 1."""
    count = len(matrix)
    system = np.vstack([matrix.T - np.eye(count), np.ones(count)])
    return np.linalg.lstsq(system, np.append(np.zeros(count), 1.0), rcond=None)[0]


def total_variation(samples, states, pi):
    """Half the absolute difference between frequencies and the law."""
    place = {state: i for i, state in enumerate(states)}
    counts = np.bincount([place[s] for s in samples], minlength=len(states))
    return 0.5 * np.abs(counts / len(samples) - pi).sum()
