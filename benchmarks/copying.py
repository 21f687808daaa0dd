"""Copying: masks of B/I/O decoding against n-grams that are built at each step, and the labels: one thread."""

from __future__ import annotations

import difflib
import random
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Table, compare
from kexue.generation import CopyConstraint, CopyLogitsProcessor
from kexue.tasks import copy_labels

SECTION = "Copying"

SOURCE, BEAMS, VOCABULARY, STEPS, EOS = 512, 3, 5000, 100, 1


def ngrams(source: list[int], n: int) -> dict[tuple[int, ...], set[int]]:
    """What follows each n - 1 tokens, as the published code builds it at each step."""
    found: dict[tuple[int, ...], set[int]] = {}
    for i in range(len(source) - n + 1):
        found.setdefault(tuple(source[i : i + n - 1]), set()).add(source[i + n - 1])
    return found


class Rebuild:
    """The published rule, with the end of text allowed at each step; its state follows the caller's rows."""

    def __init__(self, source: list[int], rows: int, vocabulary: int) -> None:
        self.source, self.rows, self.vocabulary = source, rows, vocabulary
        self.lengths = [0] * rows

    def allowed(self, outputs: list[list[int]], tags: list[int]) -> torch.Tensor:
        mask = torch.zeros(self.rows, self.vocabulary, dtype=torch.bool)
        for row, (output, tag) in enumerate(zip(outputs, tags, strict=True)):
            n = 0 if tag == 0 else 1 if tag == 1 else self.lengths[row] + 1
            if n == 0:
                mask[row] = True
            else:
                following = ngrams(self.source, n).get(tuple(output[len(output) - n + 1 :]) if n > 1 else ())
                if following is None:
                    n, following = 1, ngrams(self.source, 1)[()]
                mask[row, list(following)] = True
                mask[row, EOS] = True
            self.lengths[row] = n
        return mask


def trace(seed: int = 0) -> tuple[list[int], list[list[int]], list[list[int]]]:
    """A source with repeated phrases, and for each step the tags and the tokens of the rows."""
    rng = random.Random(seed)
    phrases = [[rng.randrange(2, VOCABULARY) for _ in range(rng.randint(2, 6))] for _ in range(60)]
    source: list[int] = []
    while len(source) < SOURCE:
        source += rng.choice(phrases)
    source = source[:SOURCE]
    rule, outputs = Rebuild(source, BEAMS, VOCABULARY), [[] for _ in range(BEAMS)]
    tags, tokens = [], []
    for _ in range(STEPS):
        drawn = [0 if (r := rng.random()) < 0.2 else 2 if n and r < 0.85 else 1 for n in rule.lengths]
        mask = rule.allowed(outputs, drawn)
        mask[:, EOS] = False
        # No other continuation than the end: the next phrase begins
        taken = [rng.choice(m.nonzero()[:, 0].tolist() or source) for m in mask]
        for output, token in zip(outputs, taken, strict=True):
            output.append(token)
        tags.append(drawn)
        tokens.append(taken)
    return source, tags, tokens


def decoding() -> list[Table]:
    source, tags, tokens = trace()
    logits = torch.nn.functional.one_hot(torch.tensor(tags), 3).float().unbind()
    taken = torch.tensor(tokens).unbind()
    constraint = CopyConstraint(source, EOS, VOCABULARY)

    def rebuilt(check: list[Any] | None = None) -> None:
        rule, outputs = Rebuild(source, BEAMS, VOCABULARY), [[] for _ in range(BEAMS)]
        for drawn, step in zip(tags, tokens, strict=True):
            mask = rule.allowed(outputs, drawn)
            if check is not None:
                check.append(mask)
            for output, token in zip(outputs, step, strict=True):
                output.append(token)

    def ours(check: list[Any] | None = None) -> None:
        state = constraint.start(BEAMS)
        use, mask = constraint.allow(state, constraint.choose(state, logits[0]))
        for t in range(STEPS):
            if t:
                state, use, mask = constraint.follow(state, use, taken[t - 1], logits[t])
            if check is not None:
                check.append(mask.clone())

    a: list[Any] = []
    b: list[Any] = []
    rebuilt(a)
    ours(b)
    same = all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    work = f"Source {SOURCE}, {BEAMS} beams, V {VOCABULARY}, {STEPS} steps with the same tags and tokens"
    masks = compare(
        f"Copy constraint, {STEPS} steps",
        f"{work}; the (3, V) mask of allowed tokens included (ours with the choice of the tag).",
        {"n-grams built at each step": rebuilt, "CopyConstraint": ours},
        peer="n-grams built at each step",
        packages=("torch",),
        remarks=[f"Masks of all steps equal: {'yes' if same else 'NO'}."],
    )
    return [masks, processors(source, tags, tokens, work)]


def processors(source: list[int], tags: list[list[int]], tokens: list[list[int]], work: str) -> Table:
    from kexue._transformers import find_class

    torch.manual_seed(0)
    scores = torch.randn(STEPS, BEAMS, VOCABULARY)
    ids = torch.cat([torch.zeros(BEAMS, 1, dtype=torch.long), torch.tensor(tokens).T], 1)
    logits = torch.nn.functional.one_hot(torch.tensor(tags), 3).float().unbind()

    @torch.no_grad()
    def rebuilt() -> None:
        rule = Rebuild(source, BEAMS, VOCABULARY)
        for t in range(STEPS):
            mask = rule.allowed(ids[:, 1 : t + 1].tolist(), logits[t].argmax(1).tolist())
            masked = scores[t].masked_fill(~mask, -torch.inf)
            floor = masked.topk(10).values[:, -1:]
            masked.masked_fill(masked < floor, -torch.inf).log_softmax(-1)

    ours = CopyLogitsProcessor(source, lambda input_ids: logits[input_ids.shape[1] - 1], EOS)
    peer = find_class("EncoderNoRepeatNGramLogitsProcessor")(3, torch.tensor(source))

    @torch.no_grad()  # as generate calls it
    def run(processor: Any) -> None:
        for t in range(STEPS):
            processor(ids[:, : t + 1], scores[t])

    return compare(
        f"Copying as a logits processor, {STEPS} steps",
        f"{work}; from input_ids to renormalised scores of the top 10.",
        {
            "n-grams built at each step": rebuilt,
            "transformers EncoderNoRepeatNGram, n 3": lambda: run(peer),
            "CopyLogitsProcessor": lambda: run(ours),
        },
        peer="n-grams built at each step",
        packages=("torch", "transformers"),
        remarks=[
            "The transformers processor does something else (it forbids n-grams of the source, for one n, and "
            "neither keeps a top k nor renormalises); it is the nearest in shape."
        ],
    )


def table_in_numpy(x: Any, y: Any) -> Any:
    """The usual table of LCS lengths, by anti-diagonals in numpy: what the labels are read from."""
    s, t = len(x), len(y)
    table = np.zeros((s + 1, t + 1), np.int32)
    for total in range(2, s + t + 1):
        i = np.arange(max(1, total - t), min(s, total - 1) + 1)
        j = total - i
        equal = x[i - 1] == y[j - 1]
        table[i, j] = np.where(equal, table[i - 1, j - 1] + 1, np.maximum(table[i - 1, j], table[i, j - 1]))
    return table


def table_in_python(x: list[int], y: list[int]) -> list[list[int]]:
    """The same by two loops."""
    rows = [[0] * (len(y) + 1)]
    for a in x:
        above, row = rows[-1], [0]
        for j, b in enumerate(y):
            row.append(above[j] + 1 if a == b else max(above[j + 1], row[j]))
        rows.append(row)
    return rows


def blocks(x: list[int], y: list[int]) -> Any:
    """Matching blocks of the standard library, which are not a longest common subsequence."""
    return difflib.SequenceMatcher(None, x, y, autojunk=False).get_matching_blocks()


def labels() -> Table:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2000, 1024)
    y = np.concatenate([x[100:300], rng.integers(0, 2000, 62), x[600:850]])
    plain = x.tolist(), y.tolist()
    return compare(
        "Copy labels",
        "Source 1024, target 512 tokens. The first two only make the table of LCS lengths; difflib's matching blocks "
        "are no LCS.",
        {
            "table, two loops in Python": lambda: table_in_python(*plain),
            "table, anti-diagonals in numpy": lambda: table_in_numpy(x, y),
            "difflib.SequenceMatcher": lambda: blocks(*plain),
            "copy_labels, author": lambda: copy_labels(x, y, "author"),
            "copy_labels, contiguous": lambda: copy_labels(x, y),
        },
        peer="table, two loops in Python",
        packages=("numpy", "numba"),
        repeats=5,
    )


def run() -> list[Table]:
    """All comparisons."""
    return [*decoding(), labels()]
