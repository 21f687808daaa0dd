"""Slow, obvious float64 versions of the filters of decoding, of greedy continuation and of exhaustive beam search."""

import math

import torch


def softmax(logits):
    top = max(logits)
    weights = [math.exp(x - top) if x > -math.inf else 0.0 for x in logits]
    return [w / sum(weights) for w in weights]


def filtered(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, penalty=1.0, sequence=(), ngram=0):
    """Probabilities of one row, a list of floats."""
    logits = [float(x) for x in logits]
    for token in set(sequence) if penalty != 1 else ():
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    if ngram:
        grams = {tuple(sequence[i : i + ngram]) for i in range(len(sequence) - ngram + 1)}
        start = tuple(sequence[len(sequence) - ngram + 1 :]) if ngram > 1 else ()
        for token in range(len(logits)):
            if (*start, token) in grams:
                logits[token] = -math.inf
    if temperature == 0:
        best = max(range(len(logits)), key=lambda i: (logits[i], -i))
        return [float(i == best) for i in range(len(logits))]
    logits = [x / temperature for x in logits]
    if top_k:
        order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
        logits = [x if i in order[:top_k] else -math.inf for i, x in enumerate(logits)]
    if top_p < 1:
        p = softmax(logits)
        order = sorted(range(len(p)), key=lambda i: (-p[i], i))
        kept, total = set(), 0.0
        for i in order:
            kept.add(i)
            total += p[i]
            if total >= top_p:
                break
        logits = [x if i in kept else -math.inf for i, x in enumerate(logits)]
    if min_p:
        p = softmax(logits)
        logits = [x if p[i] >= min_p * max(p) else -math.inf for i, x in enumerate(logits)]
    return softmax(logits)


def next_logits(model, ids):
    """Logits after a sequence, the whole of it computed anew."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1]


def greedy(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(next_logits(model, ids).argmax()))
    return ids[len(prompt) :]


def best_continuations(model, prompt, count, alpha, stops, number):
    """All continuations of at most ``count`` tokens with their normalised scores; the best ``number``."""
    vocabulary = model.config.vocab_size
    found = []

    def extend(tokens, total):
        logp = next_logits(model, [*prompt, *tokens]).double().log_softmax(-1).tolist()
        for token in range(vocabulary):
            new, score = [*tokens, token], total + logp[token]
            if token in stops or len(new) == count:
                found.append((score / len(new) ** alpha, new))
            else:
                extend(new, score)

    extend([], 0.0)
    return sorted(found, key=lambda item: -item[0])[:number]
