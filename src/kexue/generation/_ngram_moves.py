"""Markov chains over n-gram targets, compiled: a step touches only the factors around the place that changes.

A text of n tokens has n + 1 factors w_t = table[x_{t-k+1} ... x_{t-1}, x_t], t = 0 ... n, where x_t = V before the
beginning and at t >= n. The table holds p^gamma itself, not logarithms: a step compares products of at most k + 1 of
them. Random numbers are xoshiro256++ with its state in an array, so that a run can go on where it stopped.
"""

from __future__ import annotations

import numpy as np

from kexue.words._numba import kernel

REPLACE, EDIT, GIBBS = 0, 1, 2


@kernel
def _uniform(s):  # type: ignore[no-untyped-def]
    """A number in [0, 1) from the four words of the state."""
    mixed = s[0] + s[3]
    result = ((mixed << np.uint64(23)) | (mixed >> np.uint64(41))) + s[0]
    t = s[1] << np.uint64(17)
    s[2] ^= s[0]
    s[3] ^= s[1]
    s[1] ^= s[2]
    s[0] ^= s[3]
    s[2] ^= t
    s[3] = (s[3] << np.uint64(45)) | (s[3] >> np.uint64(19))
    return (result >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@kernel
def _factors(y, n, first, last, table, size, order):  # type: ignore[no-untyped-def]
    """Product of the factors first ... last (at most n); ``size`` is V + 1.

    The text of n tokens lies in y[order - 1 : order - 1 + n], V before and after it: factor t reads y[t : t + order].
    """
    product = 1.0
    last = min(last, n)
    if order == 2:  # the usual case, without a loop inside
        for t in range(first, last + 1):
            product *= table[y[t] * size + y[t + 1]]
        return product
    for t in range(first, last + 1):
        code = 0
        for k in range(t, t + order):
            code = code * size + y[k]
        product *= table[code]
    return product


@kernel
def chain(kind, y, n, steps, done, burn_in, thin, low, high, table, size, order, s, out, lengths, scratch):  # type: ignore[no-untyped-def]
    """Run ``steps`` steps on the text of n tokens in y, in place; kept texts go to ``out`` and ``lengths``.

    ``y`` is as in ``_factors``, with room for one token more than ``high``. ``out`` is (rows, capacity). Returns the
    new length, the number of accepted steps and the number of kept texts.
    """
    vocabulary, lead = size - 1, order - 1
    accepted = kept = 0
    for step in range(done + 1, done + steps + 1):
        operation = int(_uniform(s) * 3) if kind == EDIT else 0
        if kind == GIBBS:
            i = int(_uniform(s) * n)
            total = 0.0
            for v in range(vocabulary):
                y[i + lead] = v
                total += _factors(y, n, i, i + lead, table, size, order)
                scratch[v] = total
            goal = _uniform(s) * total
            v = 0
            while v < vocabulary - 1 and not scratch[v] > goal:
                v += 1
            y[i + lead] = v
            accepted += 1
        elif operation == 0:
            if n > 0:
                i = int(_uniform(s) * n)
                old = y[i + lead]
                before = _factors(y, n, i, i + lead, table, size, order)
                y[i + lead] = int(_uniform(s) * vocabulary)
                after = _factors(y, n, i, i + lead, table, size, order)
                if _uniform(s) * before < after:
                    accepted += 1
                else:
                    y[i + lead] = old
        elif operation == 1:
            if n < high:
                i = int(_uniform(s) * (n + 1))
                before = _factors(y, n, i, i + lead - 1, table, size, order)
                for k in range(n + lead + 1, i + lead, -1):
                    y[k] = y[k - 1]
                y[i + lead] = int(_uniform(s) * vocabulary)
                after = _factors(y, n + 1, i, i + lead, table, size, order)
                # q(x<-y) / q(y<-x) = V: as many places to delete from as there were slots
                if _uniform(s) * before < after * vocabulary:
                    n += 1
                    accepted += 1
                else:
                    for k in range(i + lead, n + lead + 1):
                        y[k] = y[k + 1]
        elif n > low:
            i = int(_uniform(s) * n)
            old = y[i + lead]
            before = _factors(y, n, i, i + lead, table, size, order)
            for k in range(i + lead, n + lead):
                y[k] = y[k + 1]
            after = _factors(y, n - 1, i, i + lead - 1, table, size, order)
            if _uniform(s) * before * vocabulary < after:
                n -= 1
                accepted += 1
            else:
                for k in range(n + lead, i + lead, -1):
                    y[k] = y[k - 1]
                y[i + lead] = old
        if step > burn_in and (step - burn_in) % thin == 0:
            for k in range(n):
                out[kept, k] = y[k + lead]
            lengths[kept] = n
            kept += 1
    return n, accepted, kept
