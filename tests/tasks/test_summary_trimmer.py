from __future__ import annotations

import itertools

import numpy as np

from kexue.tasks._summary_trimmer import Words, runs


def test_runs_are_the_best_of_all_choices() -> None:
    rng = np.random.default_rng(0)
    decided = 0
    for _ in range(150):
        n = int(rng.integers(1, 8))
        values, threshold, cost = rng.random(n).astype(np.float32), rng.random(), 1.5 * rng.random()

        def worth(
            written: tuple[bool, ...],
            values: np.ndarray = values,
            threshold: float = threshold,
            cost: float = cost,
        ) -> float:
            starts = sum(w and not before for before, w in itertools.pairwise((False, *written)))
            return sum(float(v) - threshold for v, w in zip(values, written, strict=True) if w) - cost * starts

        best = max(worth(written) for written in itertools.product((False, True), repeat=n))
        found = runs(values, threshold, cost)
        if best > 1e-9:
            decided += 1
            assert abs(worth(tuple(any(a <= k < b for a, b in found) for k in range(n))) - best) < 1e-6
        else:
            assert found == [(int(values.argmax()), int(values.argmax()) + 1)]
    assert 20 < decided < 150


def test_words_stand_where_they_say_and_are_labelled_by_pairs() -> None:
    words = Words(["Return the mean.", "..", "The mean of x is y."], [0, 2], np.array([0.5, 0.1, 0.3], np.float32))
    assert words.words == ["return", "the", "mean", "the", "mean", "of", "x", "is", "y"]
    assert words.write([(0, 2), (4, 6)]) == "Return the mean of"
    assert words.labels(["the", "mean", "x"]).tolist() == [False, True, True, True, True, False, False, False, False]
    assert words.vectors.shape[0] == 9
