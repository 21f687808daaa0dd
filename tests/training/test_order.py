import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kexue.training import batch_indices, numpy_generator, shuffled_batches, torch_generator
from kexue.training.order import kept_random_state, seed_step
from training.runs import draw_globals, seed_globals

SIZES = st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 40), st.integers(1, 9), st.integers(0, 3))


@given(SIZES)
def test_every_epoch_is_a_permutation_of_all_samples(sizes):
    seed, n, batch_size, epoch = sizes
    per_epoch = -(-n // batch_size)
    seen = [batch_indices(seed, epoch * per_epoch + i, batch_size, n) for i in range(per_epoch)]
    assert sorted(np.concatenate(seen)) == list(range(n))
    assert [len(batch) for batch in seen[:-1]] == [batch_size] * (per_epoch - 1)
    assert len(seen[-1]) == n - batch_size * (per_epoch - 1)


@given(SIZES)
def test_drop_last_gives_full_batches_of_distinct_samples(sizes):
    seed, n, batch_size, epoch = sizes
    n += batch_size
    per_epoch = n // batch_size
    seen = [batch_indices(seed, epoch * per_epoch + i, batch_size, n, drop_last=True) for i in range(per_epoch)]
    assert {len(batch) for batch in seen} == {batch_size}
    assert len(set(np.concatenate(seen))) == per_epoch * batch_size


@given(SIZES, st.integers(1, 5))
def test_ranks_partition_the_batch_in_order(sizes, world):
    seed, n, batch_size, step = sizes
    parts = [batch_indices(seed, step, batch_size, n, rank, world) for rank in range(world)]
    np.testing.assert_array_equal(np.concatenate(parts), batch_indices(seed, step, batch_size, n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_step_is_the_same_whatever_was_asked_before():
    forward = [batch_indices(5, step, 3, 11) for step in range(20)]
    for step in (19, 0, 7, 13, 1, 7):
        np.testing.assert_array_equal(batch_indices(5, step, 3, 11), forward[step])


def test_a_far_step_needs_no_replay():
    words = np.random.Philox(key=3 | 10**12 << 64, counter=1 << 192).random_raw(4)
    expected = sorted(range(4), key=lambda i: words[i])
    assert batch_indices(3, 10**12, 4, 4).tolist() == expected


def test_epochs_and_seeds_give_different_orders():
    orders = {tuple(batch_indices(seed, epoch, 50, 50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_positions_are_uniform_over_epochs():
    first = np.bincount([batch_indices(0, 5 * epoch, 1, 5)[0] for epoch in range(2000)], minlength=5)
    # Five standard deviations of a count with p = 1/5 and 2000 draws.
    assert abs(first - 400).max() < 5 * (2000 * 0.2 * 0.8) ** 0.5


def test_the_cached_order_cannot_be_changed_by_the_caller():
    with pytest.raises(ValueError):
        batch_indices(0, 0, 4, 4)[0] = 7


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 0, 1, 1), ValueError, "seed must be at least 0"),
        ((2**64, 0, 1, 1), ValueError, "below 2"),
        ((0, -1, 1, 1), ValueError, "step must be at least 0"),
        ((0, 0, 0, 1), ValueError, "batch_size must be at least 1"),
        ((0, 0, 1, 0), ValueError, "n must be at least 1"),
        ((0, 0, 1, 1, 2, 2), ValueError, "rank must be below world = 2; got 2"),
        ((0, 0, 1.5, 1), TypeError, "batch_size must be an integer"),
        ((0, 0, 5, 4, 0, 1, True), ValueError, "batch_size is 5, n is 4"),
    ],
)
def test_bad_order_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        batch_indices(*arguments)


@pytest.mark.parametrize("make", [numpy_generator, torch_generator])
def test_noise_is_a_function_of_seed_step_and_rank(make):
    def draw(*key):
        generator = make(*key)
        if isinstance(generator, torch.Generator):
            return tuple(torch.rand(8, generator=generator).tolist())
        return tuple(generator.random(8))

    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]
    drawn = [draw(*key) for key in keys]
    assert [draw(*key) for key in keys] == drawn
    assert len(set(drawn)) == len(keys)


@pytest.mark.parametrize("make", [numpy_generator, torch_generator])
def test_noise_rejects_negative_steps(make):
    with pytest.raises(ValueError, match="step must be at least 0; got -1"):
        make(0, -1)


def test_global_generators_are_seeded_by_the_step_and_given_back():
    cpu = torch.device("cpu")

    seed_globals(9)
    expected = draw_globals()
    seed_globals(9)
    with kept_random_state(cpu):
        seed_step(0, 3, 0, cpu)
        first = draw_globals()
        seed_step(0, 4, 0, cpu)
        second = draw_globals()
        seed_step(0, 3, 0, cpu)
        assert draw_globals() == first
        assert all(a != b for a, b in zip(first, second, strict=True))
    assert draw_globals() == expected


def test_shuffled_batches_keeps_rows_together_and_takes_numpy():
    data = {"x": torch.arange(10), "y": np.arange(10) * 2}
    batches = shuffled_batches(data, 4, seed=1)
    seen = [batches(step) for step in range(3)]
    assert sorted(torch.cat([b["x"] for b in seen]).tolist()) == list(range(10))
    assert all((b["x"].numpy() * 2 == b["y"]).all() for b in seen)


@pytest.mark.parametrize("data", [{}, {"x": torch.zeros(3), "y": torch.zeros(4)}])
def test_shuffled_batches_rejects_data_that_is_not_aligned(data):
    with pytest.raises(ValueError, match="one common number of rows"):
        shuffled_batches(data, 2)
