"""On the line: sorts float64 numbers, with their masses if need be, and sums the cost of the monotone plan.

Most numbers are sorted by equal cells of their range, half as many as there are numbers, which leaves few in each;
comparing neighbours does the rest. Numbers that crowd in few cells take a radix sort, which moves every number a fixed
number of times: 11 bits at a time, the lowest first; digits that are the same in all numbers are skipped. Floats become
unsigned integers of the same order by turning the sign bit (all bits of negative numbers).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kexue.words._numba import compiled

BITS = 11
DIGITS = 6  # 6 * 11 bits cover 64
CROWD = 16  # mean number of others that a number shares its cell with
_u64 = np.uint64

_exact = compiled(nogil=True, error_model="numpy")


@_exact
def _radix(keys, payload, other_keys, other_payload):  # type: ignore[no-untyped-def]
    """Sort uint64 keys with their payload; whether the result lies in the second pair of arrays."""
    n = keys.shape[0]
    size = 1 << BITS
    mask = _u64(size - 1)
    counts = np.zeros((DIGITS, size), np.int64)
    for i in range(n):
        key = keys[i]
        for d in range(DIGITS):
            counts[d, (key >> _u64(BITS * d)) & mask] += 1
    swapped = False
    for d in range(DIGITS):
        shift = _u64(BITS * d)
        if counts[d, (keys[0] >> shift) & mask] == n:
            continue
        start = 0
        for k in range(size):
            count = counts[d, k]
            counts[d, k] = start
            start += count
        for i in range(n):
            digit = (keys[i] >> shift) & mask
            place = counts[d, digit]
            counts[d, digit] = place + 1
            other_keys[place] = keys[i]
            other_payload[place] = payload[i]
        keys, other_keys = other_keys, keys
        payload, other_payload = other_payload, payload
        swapped = not swapped
    return swapped


def _keys(x: Any) -> Any:
    bits = (x + 0.0).view(np.int64)  # + 0.0: a zero has one sign
    return (bits ^ ((bits >> 63) | np.int64(-(2**63)))).view(np.uint64)


def _values(keys: Any) -> Any:
    bits = keys.view(np.int64)
    return (bits ^ (~(bits >> 63) | np.int64(-(2**63)))).view(np.float64)


@_exact
def _cells(x, payload, out, out_payload):  # type: ignore[no-untyped-def]
    """Sort x into out, with the payload unless that is empty; False if too many numbers share a cell."""
    n = x.shape[0]
    carry = payload.shape[0] > 0
    low = high = x[0]
    for i in range(n):
        low, high = min(low, x[i]), max(high, x[i])
    cells = max(n // 2, 1)
    factor = (cells - 1) / (high - low)
    if not 0.0 < factor < np.inf or n >= 2**31:
        return False
    starts = np.zeros(cells + 2, np.int32)
    for i in range(n):
        starts[np.int64((x[i] - low) * factor) + 2] += 1
    pairs = 0
    for cell in range(2, cells + 2):
        pairs += np.int64(starts[cell]) * starts[cell]
        starts[cell] += starts[cell - 1]
    if pairs > CROWD * n:
        return False
    for i in range(n):
        cell = np.int64((x[i] - low) * factor) + 1
        place = starts[cell]
        starts[cell] = place + 1
        out[place] = x[i]
        if carry:
            out_payload[place] = payload[i]
    for i in range(1, n):
        value = out[i]
        if out[i - 1] > value:
            j = i
            if carry:
                taken = out_payload[i]
            while j > 0 and out[j - 1] > value:
                out[j] = out[j - 1]
                if carry:
                    out_payload[j] = out_payload[j - 1]
                j -= 1
            out[j] = value
            if carry:
                out_payload[j] = taken
    return True


def sort_with(x: Any, payload: Any) -> tuple[Any, Any]:
    """Sorted x and the payload in that order; equal numbers keep theirs."""
    out, moved = np.empty_like(x), np.empty_like(payload)
    if _cells(x, payload, out, moved):
        return out, moved
    keys, payload = _keys(x), payload.copy()
    others = np.empty_like(keys), np.empty_like(payload)
    if _radix(keys, payload, *others):
        keys, payload = others
    return _values(keys), payload


def sort(x: Any) -> Any:
    """Sorted x."""
    out, nothing = np.empty_like(x), np.empty(0)
    return out if _cells(x, nothing, out, nothing) else np.sort(x)


@_exact
def matched_cost(x, y, power):  # type: ignore[no-untyped-def]
    """Mean cost of x_i and y_i."""
    total = 0.0
    for i in range(x.shape[0]):
        apart = abs(x[i] - y[i])
        if power == 2.0:
            apart *= apart
        elif power != 1.0:
            apart = apart**power
        total += apart
    return total / x.shape[0]


@_exact
def merge_cost(x, y, a, b, power):  # type: ignore[no-untyped-def]
    """Cost of the monotone plan of sorted x and y with masses a and b, by running sums of both."""
    n, m = x.shape[0], y.shape[0]
    i = j = 0
    left, right = a[0], b[0]
    done = total = 0.0
    while True:
        apart = abs(x[i] - y[j])
        if power == 2.0:
            apart *= apart
        elif power != 1.0:
            apart = apart**power
        if j == m - 1 or (i < n - 1 and left <= right):
            if i == n - 1:
                return total + apart * max(max(left, right) - done, 0.0)
            total += apart * max(left - done, 0.0)
            done = max(left, done)
            i += 1
            left += a[i]
        else:
            total += apart * max(right - done, 0.0)
            done = max(right, done)
            j += 1
            right += b[j]
