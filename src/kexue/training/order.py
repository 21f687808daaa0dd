"""Which samples and which noise belong to a step: pure functions of (seed, step, rank), so nothing is replayed.

The order of an epoch is the sort order of one block of random 64-bit words from a counter-based generator (Philox)
keyed by (seed, epoch); the noise of a step comes from generators keyed by (seed, step, rank). A run that is resumed at
step t therefore needs the number t and nothing else: skipping is O(1), and no generator state has to be stored. The
words of a bit generator are stable between numpy versions (its permutation is not promised to be), so the order is too.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from kexue._checks import check_int

__all__ = ["batch_indices", "numpy_generator", "shuffled_batches", "torch_generator"]

# The highest word of Philox's 256-bit counter separates the uses: streams with different words never meet.
_ORDER = 1 << 192
_NOISE = 2 << 192


def check_seed(seed: int) -> int:
    """Return ``seed`` as an int; it must fit into the 64 bits of a generator's key."""
    check_int("seed", seed, 0)
    if seed >= 1 << 64:
        raise ValueError(f"seed must be below 2**64; got {seed}")
    return int(seed)


def _check_rank(rank: int, world: int) -> None:
    check_int("world", world, 1)
    check_int("rank", rank, 0)
    if rank >= world:
        raise ValueError(f"rank must be below world = {world}; got {rank}")


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """Order of the n samples in an epoch; the current epoch and its neighbour stay in memory, 8 n bytes each."""
    words = np.random.Philox(key=seed | epoch << 64, counter=_ORDER).random_raw(n)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


def batch_indices(
    seed: int, step: int, batch_size: int, n: int, rank: int = 0, world: int = 1, drop_last: bool = False
) -> np.ndarray:
    """Samples that a step sees: every epoch is a fresh permutation of all n samples, cut into batches.

    Args:
        seed: Seed of the order, 0 <= seed < 2**64.
        step: Number of the step, from 0; any step can be asked for directly.
        batch_size: Samples of one step over all ranks.
        n: Number of samples.
        rank: This process; the ranks of a step partition its samples into contiguous parts of almost equal size.
        world: Number of processes.
        drop_last: False (default): an epoch has ceil(n / batch_size) steps and its last batch holds the n mod
            batch_size samples that are left (a rank may then get none). True: the epoch has floor(n / batch_size)
            steps and those samples are left out, others in each epoch.

    Returns:
        Read-only int64 array of at most batch_size indices in [0, n).

    Raises:
        ValueError: A size is out of range, or ``drop_last`` leaves no batch because batch_size > n.

    Example:
        >>> [batch_indices(0, step, 4, 10).size for step in range(4)]
        [4, 4, 2, 4]
        >>> sorted(int(i) for step in range(3) for i in batch_indices(0, step, 4, 10))
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    seed = check_seed(seed)
    check_int("step", step, 0)
    check_int("batch_size", batch_size, 1)
    check_int("n", n, 1)
    _check_rank(rank, world)
    if drop_last and batch_size > n:
        raise ValueError(f"drop_last=True needs at least one full batch; batch_size is {batch_size}, n is {n}")
    per_epoch = n // batch_size if drop_last else -(-n // batch_size)
    epoch, place = divmod(int(step), per_epoch)
    batch = _permutation(seed, epoch, int(n))[place * batch_size : (place + 1) * batch_size]
    return batch[len(batch) * rank // world : len(batch) * (rank + 1) // world]


def shuffled_batches(
    data: Mapping[str, Any],
    batch_size: int,
    *,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    drop_last: bool = False,
) -> Callable[[int], dict[str, Any]]:
    """Turn aligned tensors into the ``batches`` argument of :func:`kexue.training.fit`.

    Args:
        data: Name -> tensor or numpy array with N rows on the first axis, for example ``{"x": x, "labels": y}``.
        batch_size: Samples of one step over all ranks.
        seed: Seed of the order.
        rank: See :func:`batch_indices`.
        world: See :func:`batch_indices`.
        drop_last: See :func:`batch_indices`.

    Returns:
        Function ``step -> dict`` with the rows of that step.

    Raises:
        ValueError: ``data`` is empty or its members have different numbers of rows.

    Example:
        >>> batches = shuffled_batches({"x": torch.arange(6), "labels": torch.arange(6) * 10}, batch_size=4)
        >>> batch = batches(0)
        >>> torch.equal(batch["x"] * 10, batch["labels"])
        True
    """
    rows = {name: len(values) for name, values in data.items()}
    if not rows or len(set(rows.values())) != 1:
        raise ValueError(f"data must hold tensors with one common number of rows; got {rows}")
    n = next(iter(rows.values()))
    batch_indices(seed, 0, batch_size, n, rank, world, drop_last)  # bad settings show here, not at the first step

    def batch(step: int) -> dict[str, Any]:
        chosen = batch_indices(seed, step, batch_size, n, rank, world, drop_last)
        index = torch.from_numpy(chosen.copy())  # the cached order is read-only, which torch cannot express
        return {
            name: values[index.to(values.device)] if isinstance(values, torch.Tensor) else values[chosen]
            for name, values in data.items()
        }

    return batch


def numpy_generator(seed: int, step: int, rank: int = 0) -> np.random.Generator:
    """Generator for the noise of one step (masks, spans, dropping), the same whenever that step is computed.

    Args:
        seed: Seed of the run, 0 <= seed < 2**64.
        step: Number of the step, from 0.
        rank: This process.

    Returns:
        A fresh numpy Generator; different (seed, step, rank) give streams that never overlap.

    Raises:
        ValueError: An argument is negative or does not fit.

    Example:
        >>> bool(numpy_generator(0, 7).random() == numpy_generator(0, 7).random())
        True
        >>> bool(numpy_generator(0, 7).random() == numpy_generator(0, 8).random())
        False
    """
    seed = check_seed(seed)
    check_int("step", step, 0)
    check_int("rank", rank, 0)
    # The streams of two ranks are 2**128 numbers apart.
    return np.random.Generator(np.random.Philox(key=seed | int(step) << 64, counter=_NOISE + (int(rank) << 128)))


def _derived_seed(seed: int, step: int, rank: int) -> int:
    """63 well mixed bits for generators that take one integer."""
    digest = hashlib.blake2b(b"%d,%d,%d" % (seed, step, rank), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def torch_generator(seed: int, step: int, rank: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    """Torch's counterpart of :func:`numpy_generator`.

    Args:
        seed: Seed of the run, 0 <= seed < 2**64.
        step: Number of the step, from 0.
        rank: This process.
        device: Device of the generator; the numbers differ between kinds of devices.

    Returns:
        A fresh torch.Generator.

    Raises:
        ValueError: An argument is negative or does not fit.

    Example:
        >>> a, b = (torch.rand(3, generator=torch_generator(0, 7)) for _ in range(2))
        >>> torch.equal(a, b)
        True
    """
    seed = check_seed(seed)
    check_int("step", step, 0)
    check_int("rank", rank, 0)
    return torch.Generator(device).manual_seed(_derived_seed(seed, int(step), int(rank)))


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed the global generators (dropout reads them) for one step.

    torch.manual_seed would also visit every backend and costs 0.3 ms; only the generators in use are seeded here.
    """
    number = _derived_seed(seed, step, rank)
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)
    elif device.type == "mps":
        torch.mps.manual_seed(number)
    np.random.seed(number & 0xFFFFFFFF)  # noqa: NPY002 - the global state that a user's code may read
    random.seed(number)


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Give the caller's global generators back as they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
        if accelerator is not None:
            torch.cuda.set_rng_state(accelerator, device)


def random_states() -> dict[str, Any]:
    """States of the global generators as tensors and plain values, which torch stores without pickled code."""
    state: Any = np.random.get_state()  # noqa: NPY002
    _, words, place, has_gauss, gauss = state
    version, numbers, next_gauss = random.getstate()
    started = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if started else [],
        "numpy": [torch.from_numpy(words.view(np.int32).copy()), int(place), int(has_gauss), float(gauss)],
        "python": [version, torch.tensor(np.array(numbers, np.uint32).view(np.int32)), next_gauss],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put the global generators where :func:`random_states` found them; those of devices that are gone are left out."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    words, place, has_gauss, gauss = states["numpy"]
    np.random.set_state(("MT19937", words.numpy().view(np.uint32), place, has_gauss, gauss))  # noqa: NPY002
    version, numbers, next_gauss = states["python"]
    random.setstate((version, tuple(numbers.numpy().view(np.uint32).tolist()), next_gauss))
