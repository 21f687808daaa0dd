import math
import signal

import numpy as np
import pytest
import torch

from kexue.generation import Constant, Geometric, Linear, Logarithmic, SimulatedAnnealing, Target
from reference import search_sampling as reference


def step(x, generator):
    return x + int(generator.choice([-1, 1])), 0.0


def hills(x):
    return -abs(x - 30) + 8.0 * (x % 10 == 0)


def edge(x, generator):
    """Right with .8, left with .2: not symmetric."""
    right = generator.random() < 0.8
    there, back = (0.8, 0.2) if right else (0.2, 0.8)
    return (x + 1) % 5 if right else (x - 1) % 5, math.log(back / there)


def test_schedules_are_their_formulas():
    assert [Geometric(2.0, 0.1, c=0.5)(t, 100) for t in (0, 1, 3, 50)] == [2.0, 1.0, 0.25, 0.1]
    assert Geometric(1.0, 0.01)(0, 1000) == 1.0
    assert Geometric(1.0, 0.01)(999, 1000) == pytest.approx(0.01)
    assert Geometric(1.0, 0.01)(0, 1) == 1.0
    assert Logarithmic(2.0)(6, 10) == pytest.approx(2 / math.log(8))
    assert Logarithmic(2.0, 1.5)(10**6, 10) == 1.5
    assert Linear(0.5, 0.1, 0.05)(3, 10) == pytest.approx(0.2)
    assert Linear(0.5, 0.1, 0.05)(9, 10) == 0.05
    assert Constant(0.7)(5, 10) == 0.7


def test_annealing_crosses_valleys_that_stop_hill_climbing():
    annealed = SimulatedAnnealing(hills, step, Geometric(5.0, 0.1)).run(0, 3000, restarts=8)
    climbed = SimulatedAnnealing(hills, step).run(0, 3000, restarts=8)
    assert (annealed.best, annealed.best_value) == (30, 8.0)
    assert climbed.best == 0
    assert climbed.best_value == hills(0)


def test_climbing_takes_equal_values_and_never_worse_ones():
    plateau = SimulatedAnnealing(lambda x: float(min(x, 0) + max(0, x - 5)), step, schedule=0)
    result = plateau.run(-3, 400, restarts=4)
    assert result.best > 6
    assert (np.diff(result.trace, axis=0) >= 0).all()


def test_best_visited_is_returned_not_the_last():
    result = SimulatedAnnealing(lambda x: -float(abs(x)), step, schedule=50.0).run(3, 500, seed=1)
    assert result.best == 0
    assert result.states[0] != 0
    assert result.best_value == 0.0


def test_fixed_temperature_samples_its_law_also_with_a_move_that_is_not_symmetric():
    f = np.array([0.0, 1.0, 0.5, -1.0, 0.2])
    for tau in (1.0, 0.5):
        result = SimulatedAnnealing(lambda x: f[x], edge, schedule=tau).run(0, 300, restarts=3000, seed=2)
        found = np.bincount(result.states, minlength=5) / 3000
        assert np.abs(found - reference.law(f / tau)).max() < 5 * math.sqrt(0.25 / 3000)


def test_target_is_asked_for_all_restarts_at_once_and_lists_become_tuples():
    sizes = []

    def lm(texts):
        sizes.append(len(texts))
        assert all(type(text) is tuple for text in texts)
        return [-float(sum(text)) for text in texts]

    def move(ids, generator):
        i = int(torch.randint(len(ids), (1,), generator=generator))
        return [*ids[:i], int(generator.integers(4)), *ids[i + 1 :]], 0.0

    target = Target(lm, cache_size=0)
    result = SimulatedAnnealing(target, [move, move], Geometric(1.0, 0.01)).run([3, 3, 3], 400, restarts=5)
    assert result.best == (0, 0, 0)
    assert max(sizes) > 1
    assert result.values.shape == (5,)
    assert len(result.bests) == 5
    batched = SimulatedAnnealing(lambda xs: [hills(x) for x in xs], step, batched=True).run(29, 50)
    assert batched.best == 30


def test_seed_decides_and_starts_may_differ():
    search = SimulatedAnnealing(hills, step, Geometric(5.0, 0.1))
    first, second = search.run(starts=[0, 5, 9], steps=200, seed=4), search.run(starts=[0, 5, 9], steps=200, seed=4)
    assert first.states == second.states
    np.testing.assert_array_equal(first.trace, second.trace)
    assert first.trace.shape[1] == 3
    assert search.run(starts=[0, 5, 9], steps=200, seed=5).states != first.states
    drawn = search.run(lambda generator: int(generator.integers(100)), 0, restarts=20)
    assert len(set(drawn.states)) > 5


def test_impossible_and_forbidden_moves_stay():
    result = SimulatedAnnealing(lambda x: float(x), lambda x, g: None, 1.0).run(3, 20)
    assert (result.best, result.steps, result.acceptance) == (3, 20, 0.0)
    result = SimulatedAnnealing(lambda x: -math.inf if x else 0.0, step, 1e9).run(0, 20)
    assert result.states == [0]
    result = SimulatedAnnealing(lambda x: float(x), lambda x, g: (x + 1, -math.inf), 0).run(0, 5)
    assert result.states == [0]


@pytest.mark.parametrize("by_signal", [False, True])
def test_interrupted_run_keeps_the_best_and_goes_on_as_if_nothing_had_been(by_signal):
    calls = []

    def broken(x):
        calls.append(x)
        if len(calls) == 101:
            if not by_signal:
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)
        return hills(x)

    schedule = Geometric(5.0, 0.1)
    whole = SimulatedAnnealing(hills, step, schedule).run(0, 300)
    part = SimulatedAnnealing(broken, step, schedule).run(0, 300)
    assert part.interrupted
    assert not whole.interrupted
    assert 90 < part.steps < 110
    assert part.best_value == max(map(hills, calls[: part.steps]))
    if by_signal:  # the step was finished
        search, before = SimulatedAnnealing(hills, step, schedule), list(part.states)
        for _ in range(2):
            rest = search.run(steps=300, resume=part)
            assert (rest.states, rest.best, rest.acceptance) == (whole.states, whole.best, whole.acceptance)
        assert part.states == before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda: SimulatedAnnealing(3, step), TypeError),
        (lambda: SimulatedAnnealing(hills, []), ValueError),
        (lambda: SimulatedAnnealing(hills, [3]), TypeError),
        (lambda: SimulatedAnnealing(hills, 3), TypeError),
        (lambda: SimulatedAnnealing(hills, step, -1.0), ValueError),
        (lambda: SimulatedAnnealing(hills, step, "hot"), TypeError),
        (lambda: SimulatedAnnealing(hills, step).run(), ValueError),
        (lambda: SimulatedAnnealing(hills, step).run(0, -1), ValueError),
        (lambda: SimulatedAnnealing(hills, step).run(0, restarts=0), ValueError),
        (lambda: SimulatedAnnealing(hills, step).run(starts=[]), ValueError),
        (lambda: SimulatedAnnealing(lambda x: -math.inf, step).run(0), ValueError),
        (lambda: SimulatedAnnealing(lambda x: math.nan, step).run(0), ValueError),
        (lambda: SimulatedAnnealing(lambda x: math.inf, step).run(0), ValueError),
        (lambda: SimulatedAnnealing(hills, lambda x, g: x).run(0), TypeError),
        (lambda: SimulatedAnnealing(hills, lambda x, g: (x, math.nan)).run(0), ValueError),
        (lambda: SimulatedAnnealing(hills, lambda x, g: (x, math.inf)).run(0), ValueError),
        (lambda: SimulatedAnnealing(hills, step, lambda t, n: -1.0).run(0), ValueError),
        (lambda: SimulatedAnnealing(hills, step, lambda t, n: math.nan).run(0), ValueError),
        (lambda: Geometric(0.0, 0.1), ValueError),
        (lambda: Geometric(1.0, 0.0), ValueError),
        (lambda: Geometric(1.0, 2.0), ValueError),
        (lambda: Geometric(1.0, 0.1, c=1.5), ValueError),
        (lambda: Geometric(1.0, 0.1, c=0.0), ValueError),
        (lambda: Logarithmic(-1.0), ValueError),
        (lambda: Linear(1.0, -0.1), ValueError),
        (lambda: Constant(-0.1), ValueError),
    ],
)
def test_bad_arguments(build, error):
    with pytest.raises(error):
        build()
