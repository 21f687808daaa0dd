"""Adversarial training: the losses of GAN-QP as tensor functions, BiGAN-QP as an estimator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _critic(metric: str, power: int) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        from kexue.adversarial import QPLoss

        x, y = (normal(rows, 5, dtype=dtype, generator=generator) for _ in range(2))
        scores = tuple(normal(rows, dtype=dtype, generator=generator) for _ in range(2))
        return lambda s, t: QPLoss(10.0, metric, power).critic(s, t, x[: len(s)].to(s), y[: len(s)].to(s)), scores

    return build


def _generator(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.adversarial import QPLoss

    return QPLoss().generator, tuple(normal(rows, 1, dtype=dtype, generator=generator) for _ in range(2))


class _Few:
    """The shared test calls ``fit`` with the data alone; the default of 2000 steps would be too many."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def fit(self, data: Any) -> Any:
        self.model.fit(data, steps=4, batch_size=4)
        return self


def _bigan(seed: int) -> tuple[Any, Any]:
    import numpy as np

    from kexue.adversarial import BiGANQP

    data = np.random.default_rng(0).uniform(-1, 1, (12, 5)).astype(np.float32)
    return _Few(BiGANQP(z_dim=3, random_state=seed)), data


def _output(few: Any) -> Any:
    import numpy as np

    return np.concatenate([few.model.codes_.ravel(), few.model.sample(3).ravel()])


def _saved(few: Any, folder: Any) -> Any:
    few.model.save(folder / "model")
    return _Few(type(few.model).load(folder / "model"))


CASES["bigan-qp"] = [
    TensorCase("critic, l1", _critic("l1", 2)),
    TensorCase("critic, l2", _critic("l2", 2)),
    TensorCase("critic, power 4", _critic("l1", 4)),
    TensorCase("generator", _generator),
    EstimatorCase("BiGANQP", _bigan, _output, [[]], _saved),
]
