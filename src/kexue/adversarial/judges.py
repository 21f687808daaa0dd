"""What looks at generated samples: features for distances, classes for coverage, from whatever judge the user has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kexue.adversarial.trainer import in_blocks

__all__ = ["Judge"]

_ACTIVATIONS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "identity": lambda h: h,
    "relu": lambda h: np.maximum(h, 0),
    "tanh": np.tanh,
    "logistic": lambda h: 0.5 * (1 + np.tanh(h / 2)),
}
_SCORES = ("decision_function", "predict_proba")


class Judge:
    """Features and classes of samples.

    Args:
        judge: None: the samples themselves, flattened. A fitted scikit-learn ``MLPClassifier``: its last hidden layer.
            A ``torch.nn.Module``, an object with ``transform``, or a function of an (N, ...) array: what it gives.
            Another fitted classifier: its ``decision_function``, or else its ``predict_proba``. ``predict``, where
            there is one, tells the classes.

    Raises:
        TypeError: Something else.
    """

    def __init__(self, judge: Any = None) -> None:
        known = judge is None or isinstance(judge, nn.Module) or callable(judge)
        if not known and not any(hasattr(judge, name) for name in ("coefs_", "transform", *_SCORES)):
            raise TypeError(
                "judge must be None, a classifier, a torch Module, an object with transform, or a function; "
                f"got {type(judge).__name__}"
            )
        self.judge = judge

    def features(self, x: Tensor) -> Tensor:
        """(N, d) features in float64."""
        judge, flat = self.judge, x.detach().cpu().flatten(1)
        if judge is None:
            found: Any = flat
        elif isinstance(judge, nn.Module):
            like = next((p for p in judge.parameters() if p.is_floating_point()), None)
            found = in_blocks(judge, x.detach() if like is None else x.detach().to(like.device, like.dtype))
        elif hasattr(judge, "coefs_"):
            found = _hidden(judge, flat.double().numpy())
        elif hasattr(judge, "transform"):
            found = judge.transform(flat.numpy())
        elif callable(judge):
            found = judge(x.detach().cpu().numpy())
        else:
            found = next(getattr(judge, name) for name in _SCORES if hasattr(judge, name))(flat.numpy())
        found = torch.as_tensor(found).detach().cpu().double().flatten(1)
        if len(found) != len(x):
            raise ValueError(f"judge must give a row of features for each of {len(x)} samples; got {len(found)}")
        return found

    @property
    def total(self) -> int | None:
        """Number of classes, if the judge has any."""
        classes = getattr(self.judge, "classes_", None)
        return None if classes is None or not hasattr(self.judge, "predict") else len(classes)

    def classes_found(self, x: Tensor, share: float = 0.01) -> int | None:
        """Classes that get more than ``share`` of the samples."""
        if self.total is None:
            return None
        labels = self.judge.predict(x.detach().cpu().flatten(1).numpy())
        return int((np.unique(labels, return_counts=True)[1] > share * len(x)).sum())


def _hidden(judge: Any, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The last hidden layer of an MLPClassifier."""
    width = len(judge.coefs_[0])
    if x.shape[1] != width:
        raise ValueError(f"judge was fitted to {width} numbers a sample; got samples of {x.shape[1]}")
    activation = _ACTIVATIONS[judge.activation]
    for weight, bias in list(zip(judge.coefs_, judge.intercepts_, strict=True))[:-1]:
        x = activation(x @ weight + bias)
    return x
