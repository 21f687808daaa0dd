"""Kernels of the template parser: an interval programme over a trie of templates.

Only words that some template of the sentence fixes can border a block. Let R be their positions; a block starts at 0 or
behind one of them (start s: 0, or R[s - 1] + 1) and ends before one of them or at the end (end t: R[t], or n for
t = |R|). best[t, s] is the score of that block (rows of one t: holes that end at the same word are looked up together).
The blocks of one start are found together, ends in ascending order.

A partial match is an entry: node of the trie, position of its last fixed word, the entry before it, score so far. Of
the entries of one node at one position, those that cannot win any more are dropped: with the same words behind them,
two entries keep their difference in score, so one that lies further behind than the width of the rounding is lost, and
one that is no better and further to the right is, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue.words._numba import kernel
from kexue.words._wordtrie import step

DIGITS = 1e4  # scores are compared after rounding to 4 digits
_SAME = 1e-9  # scores closer than this are the same sum in another order of adding


@kernel
def restrict(
    first: NDArray[np.int64],
    keys: NDArray[np.int64],
    child: NDArray[np.int32],
    ends: NDArray[np.bool_],
    present: NDArray[np.int64],
) -> Any:
    """The part of the trie that belongs to templates whose words all stand in the sentence.

    ``first``, ``keys`` and ``child`` are the trie, ``ends`` (nodes,) tells where a template ends, and ``present`` holds
    the distinct numbers of the words of the sentence, ascending.

    Returns:
        (node (L,) of the trie, link (L + 1,), link_word, link_hole, link_to): the local node k has the links
        ``link[k] : link[k + 1]``; words are indices into ``present``.
    """
    node, link = np.empty(16, np.int64), np.zeros(17, np.int64)
    link_word, link_hole, link_to = np.empty(16, np.int64), np.empty(16, np.int64), np.empty(16, np.int64)
    node[0] = 0
    known, links, k = 1, 0, 0
    while k < known:
        here = node[k]
        begin, end = first[here], first[here + 1]
        few = 2 * present.size < end - begin  # look the words up instead of walking over all children
        for c in range(2 * present.size if few else end - begin):
            if few:
                local = c >> 1
                key = 2 * present[local] + (c & 1)
                target = step(first, keys, child, here, key)
                if target < 0:
                    continue
            else:
                key = keys[begin + c]
                local = np.searchsorted(present, key >> 1)
                if local == present.size or present[local] != key >> 1:
                    continue
                target = child[begin + c]
            if links == link_word.size:
                link_word, link_hole, link_to = _wide(link_word), _wide(link_hole), _wide(link_to)
            if known == node.size:
                node = _wide(node)
                link = np.concatenate((link, np.zeros(node.size + 1 - link.size, np.int64)))
            link_word[links], link_hole[links], link_to[links] = local, key & 1, known
            node[known] = target
            links += 1
            known += 1
        k += 1
        link[k] = links
    # Children come after their parents, so one pass from the end finds the nodes from which a template can be finished.
    useful = np.empty(known, np.bool_)
    for k in range(known - 1, -1, -1):
        useful[k] = k == 0 or ends[node[k]]
        for x in range(link[k], link[k + 1]):
            useful[k] = useful[k] or useful[link_to[x]]
    number = np.cumsum(useful) - 1
    kept, after = 0, np.int64(0)
    for k in range(known):
        begin, end = after, link[k + 1]  # link[k] may have been written over
        after = end
        if not useful[k]:
            continue
        link[number[k]] = kept
        for x in range(begin, end):
            if useful[link_to[x]]:
                link_word[kept], link_hole[kept], link_to[kept] = link_word[x], link_hole[x], number[link_to[x]]
                kept += 1
        node[number[k]] = node[k]
    known = number[-1] + 1
    link[known] = kept
    return node[:known], link[: known + 1], link_word[:kept], link_hole[:kept], link_to[:kept]


@kernel
def _wide(values: NDArray[np.int64]) -> NDArray[np.int64]:
    grown = np.empty(2 * values.size, np.int64)
    grown[: values.size] = values
    return grown


@kernel
def _wide_score(values: NDArray[np.float64]) -> NDArray[np.float64]:
    grown = np.empty(2 * values.size)
    grown[: values.size] = values
    return grown


@kernel
def _left_of(
    a: int,
    b: int,
    before: NDArray[np.int64],
    at: NDArray[np.int64],
    first: NDArray[np.int64],
    second: NDArray[np.int64],
) -> int:
    """Compare the positions of the fixed words of two entries of equal length: -1 if a is further left, 1, or 0."""
    k = 0
    while a != b and a >= 0:
        first[k], second[k] = at[a], at[b]
        a, b = before[a], before[b]
        k += 1
    for j in range(k - 1, -1, -1):
        if first[j] != second[j]:
            return -1 if first[j] < second[j] else 1
    return 0


@kernel
def _row(
    s: int,
    n: int,
    places: NDArray[np.int64],
    at_word: NDArray[np.int64],
    link: NDArray[np.int64],
    link_word: NDArray[np.int64],
    link_hole: NDArray[np.int64],
    link_to: NDArray[np.int64],
    depth: NDArray[np.int64],
    closed: NDArray[np.float64],
    opened: NDArray[np.float64],
    root: NDArray[np.int64],
    null_score: float,
    best: NDArray[np.float64],
) -> Any:
    """Fill best[:, s]; all later starts must be there.

    Returns:
        (winner (m + 1,), trailing (m + 1,), before, at): for each end the last entry of the winning match, or -1, and
        whether a hole follows it; chains of entries.
    """
    m = places.size
    start = 0 if s == 0 else places[s - 1] + 1
    winner, trailing = np.full(m + 1, -1, np.int64), np.zeros(m + 1, np.bool_)
    before, at, kind = np.empty(64, np.int64), np.empty(64, np.int64), np.empty(64, np.int64)
    score, alive = np.empty(64), np.empty(64, np.int64)
    entries = 0
    newest = np.full(depth.size, -1, np.int64)  # of each node, the entries at the position at hand
    older = np.empty(64, np.int64)
    wait = np.full(root.size // 2, -1, np.int64)  # for each word, entries that wait for it across a hole
    wait_entry, wait_to, wait_next = np.empty(64, np.int64), np.empty(64, np.int64), np.empty(64, np.int64)
    waiting = 0
    ends, final = 0, np.empty(64, np.int64)  # entries that are complete with a hole behind them
    deepest = depth.max() + 1
    one, two = np.empty(deepest, np.int64), np.empty(deepest, np.int64)
    previous = 0  # entries of the position before start here
    width = 1.001 / DIGITS
    for t in range(s, m + 1):
        end = n if t == m else places[t]
        # The block from start to end.
        if end > start:
            best_score, best_rank = 0.0, 0.0
            chosen, hole = -1, False
            for behind in range(2):
                if behind == 0 and (t == s or places[t - 1] != end - 1):
                    continue
                low, high = (0, ends) if behind else (previous, entries)
                for x in range(low, high):
                    entry = final[x] if behind else x
                    if alive[entry] == 0:
                        continue
                    node = kind[entry]
                    if behind:
                        if places[at[entry]] + 1 >= end:
                            continue
                        value = score[entry] + opened[node] + best[t, at[entry] + 1]
                    else:
                        value = score[entry] + closed[node]
                    if not value > -np.inf:
                        continue
                    if chosen >= 0:
                        if value < best_score - width:
                            continue
                        # The usual tie, before anything is rounded: the same template further to the right.
                        same = node == kind[chosen] and before[entry] == before[chosen]
                        if value <= best_score and same and at[entry] > at[chosen]:
                            continue
                    rank = np.rint(value * DIGITS)
                    if chosen >= 0:
                        if rank < best_rank:
                            continue
                        if rank == best_rank:
                            if depth[node] < depth[kind[chosen]]:
                                continue
                            if depth[node] == depth[kind[chosen]]:
                                if before[entry] == before[chosen]:
                                    if at[entry] > at[chosen]:
                                        continue
                                elif _left_of(entry, chosen, before, at, one, two) > 0:
                                    continue
                    best_score, best_rank = value, rank
                    chosen, hole = entry, behind == 1
            winner[t], trailing[t] = chosen, hole
            best[t, s] = best_score if chosen >= 0 else null_score * (end - start - 1)
        if t == m:
            break
        # The word at this end.
        word = at_word[t]
        arrived = entries
        adjacent = t > s and places[t - 1] == end - 1
        for source in range(3):
            # 0: from the root; 1: from the position before; 2: across a hole.
            if source == 0:
                low = root[2 * word + (end > start)]
                high = low + 1
            elif source == 1:
                low, high = (previous, arrived) if adjacent else (0, 0)
            else:
                low, high = wait[word], 0
            while low >= 0 and (source == 2 or low < high):
                x = low
                low = wait_next[x] if source == 2 else x + 1
                if source == 0:
                    begin, stop = x, x + 1
                    origin = -1
                    value = best[t, s] if end > start else 0.0
                elif source == 1:
                    if alive[x] == 0:
                        continue
                    begin, stop = link[kind[x]], link[kind[x] + 1]
                    origin = x
                    value = score[x]
                else:
                    origin = wait_entry[x]
                    if places[at[origin]] + 1 >= end:
                        continue
                    begin, stop = wait_to[x], wait_to[x] + 1
                    value = score[origin] + best[t, at[origin] + 1]
                for y in range(begin, stop):
                    if source == 1 and (link_word[y] != word or link_hole[y] == 1):
                        continue
                    node = link_to[y]
                    if entries == before.size:
                        before, at, kind = _wide(before), _wide(at), _wide(kind)
                        alive, older, score = _wide(alive), _wide(older), _wide_score(score)
                    before[entries], at[entries], kind[entries], score[entries] = origin, t, node, value
                    keep = True
                    other = newest[node]
                    while other >= 0:
                        if alive[other] == 1:
                            side = _left_of(entries, other, before, at, one, two)
                            if score[other] > value + width or (side >= 0 and score[other] >= value - _SAME):
                                keep = False
                                break
                            if value > score[other] + width or (side < 0 and value >= score[other] - _SAME):
                                alive[other] = 0
                        other = older[other]
                    if keep:
                        alive[entries] = 1
                        older[entries] = newest[node]
                        newest[node] = entries
                        entries += 1
        previous = arrived
        for x in range(arrived, entries):
            node = kind[x]
            newest[node] = -1
            if alive[x] == 0:
                continue
            if opened[node] > -np.inf:
                if ends == final.size:
                    final = _wide(final)
                final[ends] = x
                ends += 1
            for y in range(link[node], link[node + 1]):
                if link_hole[y] == 1:
                    if waiting == wait_next.size:
                        wait_entry, wait_to, wait_next = _wide(wait_entry), _wide(wait_to), _wide(wait_next)
                    wait_entry[waiting], wait_to[waiting] = x, y
                    wait_next[waiting] = wait[link_word[y]]
                    wait[link_word[y]] = waiting
                    waiting += 1
    return winner, trailing, before, at


@kernel
def parse(
    n: int,
    places: NDArray[np.int64],
    at_word: NDArray[np.int64],
    link: NDArray[np.int64],
    link_word: NDArray[np.int64],
    link_hole: NDArray[np.int64],
    link_to: NDArray[np.int64],
    depth: NDArray[np.int64],
    closed: NDArray[np.float64],
    opened: NDArray[np.float64],
    words: int,
    null_score: float,
) -> Any:
    """The best tree of a sentence of ``n`` words.

    ``places`` is R, ascending, ``at_word`` the word at each as of :func:`restrict`, of ``words`` different ones; the
    links are the local trie, ``depth`` the number of fixed words of a node, ``closed`` and ``opened`` the logarithm of
    the share of the template that ends there (with a hole), or -inf.

    Returns:
        (bounds (blocks, 2), score (blocks,), fixed (blocks + 1,), positions): block b has the fixed words
        ``positions[fixed[b] : fixed[b + 1]]``, none if no template fits. Every block comes after the one around it.
    """
    m = places.size
    root = np.full(2 * words, -1, np.int64)  # the link from the root for each word without and with a hole
    for x in range(link[0], link[1]):
        root[2 * link_word[x] + link_hole[x]] = x
    best = np.full((m + 1, m + 1), -np.inf)
    for s in range(m, -1, -1):
        _row(s, n, places, at_word, link, link_word, link_hole, link_to, depth, closed, opened, root, null_score, best)
    # Rows are found again for the blocks of the tree, which costs less memory than keeping them. Blocks with one start
    # lie in each other, each the leading hole of the one before.
    todo_s, todo_t = np.empty(m + 2, np.int64), np.empty(m + 2, np.int64)
    todo_s[0], todo_t[0] = 0, m
    todo = 1
    bounds, score = np.empty((2 * n + 1, 2), np.int64), np.empty(2 * n + 1)
    fixed, positions = np.zeros(2 * n + 2, np.int64), np.empty(n + 1, np.int64)
    blocks = 0
    while todo > 0:
        todo -= 1
        s, t = todo_s[todo], todo_t[todo]
        start = 0 if s == 0 else places[s - 1] + 1
        winner, trailing, before, at = _row(
            s, n, places, at_word, link, link_word, link_hole, link_to, depth, closed, opened, root, null_score, best
        )
        while t >= 0:
            end = n if t == m else places[t]
            bounds[blocks] = (start, end)
            score[blocks] = best[t, s]
            count, entry = 0, winner[t]
            while entry >= 0:
                count += 1
                entry = before[entry]
            fixed[blocks + 1] = fixed[blocks] + count
            entry, following, leading = winner[t], -1, -1
            if entry >= 0 and trailing[t]:
                todo_s[todo], todo_t[todo] = at[entry] + 1, t
                todo += 1
            for k in range(fixed[blocks + 1] - 1, fixed[blocks] - 1, -1):
                positions[k] = places[at[entry]]
                if following >= 0 and places[at[entry]] + 1 < places[following]:
                    todo_s[todo], todo_t[todo] = at[entry] + 1, following
                    todo += 1
                following = at[entry]
                entry = before[entry]
            if following >= 0 and places[following] > start:
                leading = following
            blocks += 1
            t = leading
    return bounds[:blocks], score[:blocks], fixed[: blocks + 1], positions[: fixed[blocks]]
