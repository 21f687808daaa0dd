"""Kernels of template mining: pairs of words, the graphs of the sentences, growth of templates, fillers of holes.

Positions number all words of the corpus; sentence s has the positions offsets[s] up to offsets[s + 1]. The step from
one word of a template to the next is the key 2 * word + (1 if there is a hole between them); the first word's key has
a 1 if a hole comes before it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue.words._numba import kernel, prefetch

_AHEAD = 16  # occurrences of a word between the request for its neighbours and their use


@kernel
def _more(values: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    grown = np.empty(max(2 * values.size, size), np.int64)
    grown[: values.size] = values
    return grown


@kernel
def skip_grams(ids: NDArray[np.int32], offsets: NDArray[np.int64], window: int, words: int, min_share: float) -> Any:
    """Count ordered pairs of words at most ``window`` apart in a sentence.

    Word by word over its occurrences, with one counter per second word: nothing has to be sorted.

    Returns:
        (keys (first << 32 | second), counts, total): the pairs whose share of all ``total`` ones exceeds ``min_share``,
        or is so close to it that the caller has to divide exactly.
    """
    n, total = ids.size, 0
    end = np.empty(n, np.int32)
    starts = np.zeros(words + 1, np.int64)
    for s in range(offsets.size - 1):
        for p in range(offsets[s], offsets[s + 1]):
            end[p] = min(offsets[s + 1], p + window + 1)
            total += end[p] - p - 1
            starts[ids[p] + 1] += 1
    for word in range(words):
        starts[word + 1] += starts[word]
    places, fill = np.empty(n, np.int32), starts.copy()
    for p in range(n):
        places[fill[ids[p]]] = p
        fill[ids[p]] += 1
    floor = min_share * total * (1 - 1e-9)
    count, seen = np.zeros(words, np.int64), np.empty(words, np.int64)
    keys, counts, found = np.empty(1024, np.int64), np.empty(1024, np.int64), 0
    for word in range(words):
        if (starts[word + 1] - starts[word]) * window <= floor:
            continue  # too rare for any pair
        different = 0
        for k in range(starts[word], starts[word + 1]):
            p = places[k]
            coming = np.int64(places[min(k + _AHEAD, n - 1)])
            prefetch(ids, coming)
            prefetch(end, coming)
            for q in range(p + 1, end[p]):
                other = ids[q]
                if count[other] == 0:
                    seen[different] = other
                    different += 1
                count[other] += 1
        for k in range(different):
            other = seen[k]
            if count[other] > floor:
                if found == keys.size:
                    keys, counts = _more(keys, 0), _more(counts, 0)
                keys[found], counts[found] = np.int64(word) << 32 | other, count[other]
                found += 1
            count[other] = 0
    return keys[:found].copy(), counts[:found].copy(), total


def pair_table(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """An open hash table of the given keys (>= 0) for :func:`_linked`; free slots hold -1."""
    size = 16
    while size < 2 * keys.size + 2:
        size *= 2
    table = np.full(size, -1, np.int64)
    _fill(table, keys)
    return table


@kernel
def _slot(key: Any, mask: int) -> Any:
    code = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64((code ^ (code >> np.uint64(31))) & np.uint64(mask))


@kernel
def _fill(table: NDArray[np.int64], keys: NDArray[np.int64]) -> None:
    for key in keys:
        slot = _slot(key, table.size - 1)
        while table[slot] >= 0:
            slot = (slot + 1) & (table.size - 1)
        table[slot] = key


@kernel
def _linked(table: NDArray[np.int64], first: int, second: int) -> bool:
    """Whether an edge leads from an earlier ``first`` to a later ``second`` word."""
    key = np.int64(first) << 32 | second
    slot = _slot(key, table.size - 1)
    while table[slot] >= 0:
        if table[slot] == key:
            return True
        slot = (slot + 1) & (table.size - 1)
    return False


@kernel
def graphs(ids: NDArray[np.int32], offsets: NDArray[np.int64], window: int, table: NDArray[np.int64]) -> Any:
    """The edges of all sentences.

    Returns:
        (first (N + 1,), to (E,)): edges from position p go to ``to[first[p] : first[p + 1]]``, ascending;
        source (N,) bool: no edge leads here; steps (N,): least number of edges to a position without outgoing edge;
        paths (N,): number of ways to such positions; total (sentences,): number of maximal paths.
    """
    n = ids.size
    first, to = np.zeros(n + 1, np.int64), np.empty(n + 16, np.int32)
    source, steps, paths = np.ones(n, np.bool_), np.zeros(n, np.int32), np.ones(n)
    total = np.zeros(offsets.size - 1)
    filled = 0
    for sentence in range(offsets.size - 1):
        begin, end = offsets[sentence], offsets[sentence + 1]
        for p in range(begin, end):
            for q in range(p + 1, min(end, p + window + 1)):
                if _linked(table, ids[p], ids[q]):
                    if filled == to.size:
                        grown = np.empty(2 * filled, np.int32)
                        grown[:filled] = to
                        to = grown
                    to[filled] = q
                    filled += 1
                    source[q] = False
            first[p + 1] = filled
        for p in range(end - 1, begin - 1, -1):
            if first[p] < first[p + 1]:
                least, ways = 1 << 30, 0.0
                for e in range(first[p], first[p + 1]):
                    least = min(least, steps[to[e]] + 1)
                    ways += paths[to[e]]
                steps[p], paths[p] = least, ways
            if source[p]:
                total[sentence] += paths[p]
    return first, to[:filled].copy(), source, steps, paths, total


@kernel
def _cutoff(weight: NDArray[np.int64], found: int, limit: int, kept: NDArray[np.int64]) -> Any:
    """Choose the ``limit`` largest weights, of equal ones those found first: (smallest weight taken, number taken)."""
    least = np.sort(weight[:found])[found - limit]
    spare = limit
    for k in range(found):
        if weight[k] > least:
            spare -= 1
    taken = 0
    for k in range(found):
        if weight[k] > least or (weight[k] == least and spare > 0):
            if weight[k] == least:
                spare -= 1
            kept[taken] = k
            taken += 1
    return least, taken


@kernel
def grow(
    ids: NDArray[np.int32],
    offsets: NDArray[np.int64],
    words: int,
    first: NDArray[np.int64],
    to: NDArray[np.int32],
    source: NDArray[np.bool_],
    steps: NDArray[np.int32],
    paths: NDArray[np.float64],
    least: int,
    longest: int,
    by_path: bool,
    limit: int,
) -> Any:
    """All templates of maximal paths that at least ``least`` sentences (``by_path``: paths) have.

    Depth first over beginnings of templates. A beginning is kept as the set of positions where it can end, each with
    the number of ways to get there; it is given up when fewer than ``least`` sentences (paths through it) remain. A
    position from which no end is near enough for ``longest`` words is left out.

    When more than 2 * ``limit`` templates are found, the ``limit`` best stay and ``least`` rises to above the weakest
    of them; it also rises by half when 100 * ``limit`` beginnings were tried.

    Returns:
        (bounds (M + 1,), keys, opened (M,), weight (M,), sentences (M,), complete): template t has the keys
        ``keys[bounds[t] : bounds[t + 1]]``, a hole at its end if ``opened[t]``; every template of a weight of at least
        ``complete`` is there.
    """
    n, tokens = ids.size, 2 * ids.size
    sentence = np.empty(n, np.int32)
    for s in range(offsets.size - 1):
        sentence[offsets[s] : offsets[s + 1]] = s
    # Beginnings of one word: the positions without incoming edge, by key.
    starts = np.zeros(2 * words + 1, np.int64)
    for p in range(n):
        if source[p] and steps[p] < longest:
            starts[2 * ids[p] + (p > offsets[sentence[p]]) + 1] += 1
    for key in range(2 * words):
        starts[key + 1] += starts[key]
    fill = starts[:-1].copy()
    roots = np.empty(starts[-1], np.int64)
    for p in range(n):
        if source[p] and steps[p] < longest:
            key = 2 * ids[p] + (p > offsets[sentence[p]])
            roots[fill[key]] = p
            fill[key] += 1

    place, ways = np.empty(1024, np.int64), np.empty(1024, np.int64)  # positions of the beginnings that wait
    waiting = np.empty((1024, 4), np.int64)  # key, begin and end in place, words
    here, here_ways = np.empty(1024, np.int64), np.empty(1024, np.int64)  # positions of the beginning at hand
    reached, reached_ways = np.empty(1024, np.int64), np.empty(1024, np.int64)  # 2 * position + hole, of the next word
    where = np.zeros(tokens, np.int32)  # index in reached, if that holds the same number
    touched, touched_at = np.empty(2 * words, np.int64), np.zeros(2 * words, np.int64)
    size, support, last = np.empty(2 * words, np.int64), np.empty(2 * words, np.int64), np.empty(2 * words, np.int64)
    through = np.empty(2 * words)
    current = np.empty(longest, np.int64)
    bounds, keys = np.zeros(1025, np.int64), np.empty(4096, np.int64)
    opened, weight, sentences = np.empty(1024, np.int64), np.empty(1024, np.int64), np.empty(1024, np.int64)
    found, tried, complete = 0, 0, least

    for root in range(2 * words):
        count = starts[root + 1] - starts[root]
        if count == 0:
            continue
        if place.size < count:
            place, ways = _more(place, count), _more(ways, count)
        for k in range(count):
            place[k], ways[k] = roots[starts[root] + k], 1
        waiting[0] = (root, 0, count, 1)
        depth = 1
        while depth > 0:
            depth -= 1
            key, begin, end, length = waiting[depth]
            current[length - 1] = key
            tried += 1
            if tried > 100 * limit:
                tried = 0
                least = max(least + 1, least + least // 2)
                complete = least
            if here.size < end - begin:
                here, here_ways = _more(here, end - begin), _more(here_ways, end - begin)
            for k in range(end - begin):
                here[k], here_ways[k] = place[begin + k], ways[begin + k]
            # Paths that end here, without and with words behind them.
            for behind in range(2):
                amount, supporting, before = 0, 0, -1
                for k in range(end - begin):
                    p = here[k]
                    s = sentence[p]
                    if first[p] == first[p + 1] and (p < offsets[s + 1] - 1) == (behind == 1):
                        amount += here_ways[k]
                        if s != before:
                            supporting += 1
                            before = s
                value = amount if by_path else supporting
                if supporting == 0 or value < least:
                    continue
                if found == opened.size:
                    opened, weight, sentences = _more(opened, 0), _more(weight, 0), _more(sentences, 0)
                    bounds = _more(bounds, 0)
                if keys.size < bounds[found] + length:
                    keys = _more(keys, 0)
                keys[bounds[found] : bounds[found] + length] = current[:length]
                opened[found], weight[found], sentences[found] = behind, value, supporting
                bounds[found + 1] = bounds[found] + length
                found += 1
                if found == 2 * limit:
                    kept = np.empty(found, np.int64)
                    weakest, found = _cutoff(weight, found, limit, kept)
                    for k in range(found):
                        old = kept[k]
                        opened[k], weight[k], sentences[k] = opened[old], weight[old], sentences[old]
                        for j in range(bounds[old + 1] - bounds[old]):
                            keys[bounds[k] + j] = keys[bounds[old] + j]
                        bounds[k + 1] = bounds[k] + bounds[old + 1] - bounds[old]
                    least = max(least, weakest + 1)
                    complete = least
            if length == longest:
                continue
            # One word more.
            amount, kinds = 0, 0
            for k in range(end - begin):
                p = here[k]
                for e in range(first[p], first[p + 1]):
                    q = np.int64(to[e])
                    if steps[q] + length >= longest:
                        continue
                    hole = np.int64(q > p + 1)
                    code = 2 * q + hole
                    index = where[code]
                    if index < amount and reached[index] == code:
                        reached_ways[index] += here_ways[k]
                        through[touched_at[2 * ids[q] + hole]] += here_ways[k] * paths[q]
                        continue
                    if amount == reached.size:
                        reached, reached_ways = _more(reached, 0), _more(reached_ways, 0)
                    where[code] = amount
                    reached[amount], reached_ways[amount] = code, here_ways[k]
                    amount += 1
                    step = 2 * ids[q] + hole
                    kind = touched_at[step]
                    if kind >= kinds or touched[kind] != step:
                        kind = kinds
                        kinds += 1
                        touched[kind], touched_at[step] = step, kind
                        size[kind], support[kind], last[kind], through[kind] = 0, 0, -1, 0.0
                    size[kind] += 1
                    through[kind] += here_ways[k] * paths[q]
                    if last[kind] != sentence[q]:
                        last[kind] = sentence[q]
                        support[kind] += 1
            top = begin
            for jump in range(1, -1, -1):  # what is pushed last, neighbouring words, is tried first
                for kind in range(kinds):
                    if touched[kind] & 1 != jump:
                        continue
                    if (through[kind] if by_path else float(support[kind])) < least:
                        last[kind] = -1  # given up
                        continue
                    if depth == waiting.shape[0]:
                        taller = np.empty((2 * depth, 4), np.int64)
                        taller[:depth] = waiting
                        waiting = taller
                    waiting[depth] = (touched[kind], top, top + size[kind], length + 1)
                    last[kind] = top
                    top += size[kind]
                    depth += 1
            if place.size < top:
                place, ways = _more(place, top), _more(ways, top)
            for k in range(amount):
                q = reached[k] >> 1
                kind = touched_at[2 * ids[q] + (reached[k] & 1)]
                if last[kind] >= 0:
                    place[last[kind]], ways[last[kind]] = q, reached_ways[k]
                    last[kind] += 1
    if found > limit:
        kept = np.empty(found, np.int64)
        weakest, taken = _cutoff(weight, found, limit, kept)
        complete = max(complete, weakest + 1)
    else:
        kept, taken = np.arange(found), found
    length = 0
    for k in range(taken):
        length += bounds[kept[k] + 1] - bounds[kept[k]]
    out_bounds, out_keys = np.zeros(taken + 1, np.int64), np.empty(length, np.int64)
    for k in range(taken):
        old = kept[k]
        width = bounds[old + 1] - bounds[old]
        out_bounds[k + 1] = out_bounds[k] + width
        out_keys[out_bounds[k] : out_bounds[k + 1]] = keys[bounds[old] : bounds[old + 1]]
    kept = kept[:taken]
    return out_bounds, out_keys, opened[kept], weight[kept], sentences[kept], complete


@kernel
def blocks(
    ids: NDArray[np.int32],
    offsets: NDArray[np.int64],
    window: int,
    table: NDArray[np.int64],
    keys: NDArray[np.int64],
    opened: bool,
    gap: int,
) -> NDArray[np.int64]:
    """The blocks (begin, end) that fill one hole, each once, sentence by sentence.

    ``gap`` is the number of fixed words before the hole. A block counts when it is the hole of some maximal path with
    this template; positions from which the rest of the path is possible are found from both sides, so that no path is
    listed.
    """
    length = keys.size
    out, filled = np.empty((64, 2), np.int64), 0
    widest = 0
    for s in range(offsets.size - 1):
        widest = max(widest, offsets[s + 1] - offsets[s])
    fits = np.empty((length, widest), np.bool_)
    opening = keys[0] >> 1
    for s in range(offsets.size - 1):
        begin, end = offsets[s], offsets[s + 1]
        n = end - begin
        there = False
        for p in range(begin, end):
            if ids[p] == opening:
                there = True
                break
        if not there:
            continue
        # Forwards: where the first k words of the template can end.
        any_left = False
        for p in range(n):
            fits[0, p] = False
            if ids[begin + p] != opening or (p > 0) != (keys[0] & 1 == 1):
                continue
            alone = True
            for q in range(max(0, p - window), p):
                if _linked(table, ids[begin + q], opening):
                    alone = False
                    break
            if alone:
                fits[0, p] = True
                any_left = True
        for k in range(1, length):
            if not any_left:
                break
            any_left = False
            word, hole = keys[k] >> 1, keys[k] & 1
            follows = _linked(table, keys[k - 1] >> 1, word)
            for p in range(n):
                fits[k, p] = False
                if not follows or ids[begin + p] != word:
                    continue
                if hole == 0:
                    fits[k, p] = p > 0 and fits[k - 1, p - 1]
                else:
                    for q in range(max(0, p - window), p - 1):
                        if fits[k - 1, q]:
                            fits[k, p] = True
                            break
                any_left = any_left or fits[k, p]
        if not any_left:
            continue
        # Backwards: of these, where the rest is possible.
        any_left = False
        for p in range(n):
            if fits[length - 1, p]:
                if (p < n - 1) != opened:
                    fits[length - 1, p] = False
                    continue
                for q in range(p + 1, min(n, p + window + 1)):
                    if _linked(table, ids[begin + p], ids[begin + q]):
                        fits[length - 1, p] = False
                        break
                any_left = any_left or fits[length - 1, p]
        if not any_left:
            continue
        for k in range(length - 2, -1, -1):
            hole = keys[k + 1] & 1
            for p in range(n):
                if fits[k, p]:
                    rest = False
                    if hole == 0:
                        rest = p + 1 < n and fits[k + 1, p + 1]
                    else:
                        for q in range(p + 2, min(n, p + window + 1)):
                            if fits[k + 1, q]:
                                rest = True
                                break
                    fits[k, p] = rest
        for p in range(n):
            if gap == 0:
                if fits[0, p]:
                    if filled == out.shape[0]:
                        grown = np.empty((2 * filled, 2), np.int64)
                        grown[:filled] = out
                        out = grown
                    out[filled] = (begin, begin + p)
                    filled += 1
            elif fits[gap - 1, p]:
                stop = n + 1 if gap == length else min(n, p + window + 1)
                for q in range(n if gap == length else p + 2, stop):
                    if gap == length or fits[gap, q]:
                        if filled == out.shape[0]:
                            grown = np.empty((2 * filled, 2), np.int64)
                            grown[:filled] = out
                            out = grown
                        out[filled] = (begin + p + 1, begin + q)
                        filled += 1
    return out[:filled].copy()
