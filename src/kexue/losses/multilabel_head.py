"""A head for multi-label classification (多标签分类头) that is trained with ZLPR, and mixup of multi-label batches.

Source: 科学空间 7359 (将“Softmax+交叉熵”推广到多标签分类问题) and 9064 (多标签“Softmax+交叉熵”的软标签版本);
mixup: Zhang et al., https://arxiv.org/abs/1710.09412.

    scores s = W h + b,    predict s > 0,    probability sigmoid(2 s)

ZLPR's optimum for soft labels t is t = sigmoid(2 s), so that a probability read with sigmoid(s), as after binary
cross-entropy, would be too close to 1/2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kexue._checks import check_int, check_real
from kexue._tensors import check_float
from kexue.losses.zlpr import ZLPRLoss, zlpr_loss, zlpr_proba

__all__ = ["MultiLabelHead", "mixup_multilabel"]


class MultiLabelHead(nn.Linear):
    """Linear layer whose scores are trained with :func:`zlpr_loss` and decide at 0.

    Args:
        in_features: D, width of the input.
        num_labels: n.
        bias: Whether each label has a bias; it is what a learned threshold of its own would be.
        device: As in ``nn.Linear``.
        dtype: As in ``nn.Linear``.

    Raises:
        TypeError: Sizes that are no integers.
        ValueError: Sizes below 1.

    Reference:
        https://spaces.ac.cn/archives/7359

    Example:
        >>> head = MultiLabelHead(8, 5)
        >>> h = torch.randn(2, 8)
        >>> loss = head.loss(h, torch.tensor([[0, 3], [4, -1]]), indices=True)
        >>> head.predict(h).shape, head.predict(h).dtype
        (torch.Size([2, 5]), torch.bool)
        >>> bool(((head.predict_proba(h) > 0.5) == head.predict(h)).all())
        True
    """

    def __init__(
        self, in_features: int, num_labels: int, *, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        check_int("in_features", in_features, 1)
        check_int("num_labels", num_labels, 1)
        super().__init__(in_features, num_labels, bias, device, dtype)

    @property
    def num_labels(self) -> int:
        """Number of labels."""
        return self.out_features

    def forward(self, h: Tensor) -> Tensor:
        """Scores (..., n) of inputs (..., D)."""
        check_float("h", h)
        if h.dim() == 0 or h.shape[-1] != self.in_features:
            raise ValueError(f"h must have shape (..., {self.in_features}); got {tuple(h.shape)}")
        return super().forward(h)

    def loss(self, h: Tensor, target: Tensor, criterion: ZLPRLoss | None = None, **options: Any) -> Tensor:
        """Loss of a batch.

        Args:
            h: (..., D).
            target: As in :func:`zlpr_loss`: multi-hot, soft, or indices.
            criterion: A :class:`ZLPRLoss`, for label smoothing; None is :func:`zlpr_loss`.
            **options: Keyword arguments of :func:`zlpr_loss` (``indices``, ``mask``, ``reduction``, ...), or of the
                criterion's ``forward``.

        Returns:
            The loss in float32 (float64 for float64 inputs).

        Raises:
            TypeError: A criterion of another kind.
            ValueError: A threshold other than 0, at which the head would be trained but not decide.
        """
        if criterion is not None and not isinstance(criterion, ZLPRLoss):
            raise TypeError(f"criterion must be a ZLPRLoss or None; got {type(criterion).__name__}")
        threshold = options.get("threshold", 0.0) if criterion is None else criterion.threshold
        if isinstance(threshold, Tensor) or threshold != 0:
            raise ValueError(f"threshold must be 0, where the head decides (its bias can be learned); got {threshold}")
        return (zlpr_loss if criterion is None else criterion)(self(h), target, **options)

    def predict(self, h: Tensor) -> Tensor:
        """(..., n) bool: the labels with score above 0."""
        return self(h) > 0

    def predict_proba(self, h: Tensor) -> Tensor:
        """(..., n) probabilities, sigmoid(2 s)."""
        return zlpr_proba(self(h))


def mixup_multilabel(
    x: Tensor, t: Tensor, alpha: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Mix each row with another one of the batch: inputs and labels with the same weight, for soft-label ZLPR.

    One weight for the batch, lam from Beta(alpha, alpha), and one permutation:
    x' = lam x + (1 - lam) x[permutation], t' likewise.

    Args:
        x: (N, ...) floating inputs, such as features, images or embeddings (token ids cannot be mixed).
        t: (N, n) labels in [0, 1], bool, integers or floats; the dtype of floats stays, others become float32.
        alpha: Positive; small values mix little, 1 is uniform.
        generator: Draws lam and the permutation, and nothing else does; None is torch's default generator.

    Returns:
        Mixed inputs (N, ...) in the dtype of ``x`` and soft labels (N, n). The arguments are left as they are.

    Raises:
        TypeError: Inputs that are not floating, or a wrong kind of argument.
        ValueError: Different numbers of rows, labels outside [0, 1] or NaN, alpha not positive.

    Reference:
        https://spaces.ac.cn/archives/9064, https://arxiv.org/abs/1710.09412

    Example:
        >>> x, t = torch.eye(3), torch.tensor([[1, 0], [0, 1], [1, 1]])
        >>> mixed, soft = mixup_multilabel(x, t, 0.4, torch.Generator().manual_seed(0))
        >>> mixed.shape, soft.dtype, bool((mixed.sum(1) - 1).abs().max() < 1e-6)
        (torch.Size([3, 3]), torch.float32, True)
    """
    check_float("x", x)
    if not isinstance(t, Tensor):
        raise TypeError(f"t must be a tensor; got {type(t).__name__}")
    if t.is_complex():
        raise TypeError(f"t must be bool, integers or floats; got dtype {t.dtype}")
    check_real("alpha", alpha, above=0.0)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None; got {type(generator).__name__}")
    if x.dim() == 0 or t.dim() == 0 or x.shape[0] != t.shape[0]:
        raise ValueError(f"x and t must have equal numbers of rows; got {tuple(x.shape)} and {tuple(t.shape)}")
    if t.dtype != torch.bool and t.numel():
        low, high = (float(edge) for edge in torch.aminmax(t.detach()))
        if not (low >= 0 and high <= 1):  # written so that NaN fails
            raise ValueError(f"labels must lie in [0, 1]; got values from {low:g} to {high:g}")
    from scipy.special import betaincinv

    device = torch.device("cpu") if generator is None else generator.device
    # One uniform number through the inverse distribution function: torch's own Beta takes no generator.
    uniform = torch.rand((), generator=generator, device=device, dtype=torch.float64)
    lam = float(betaincinv(float(alpha), float(alpha), float(uniform)))
    order = torch.randperm(x.shape[0], generator=generator, device=device)
    soft = t if t.is_floating_point() else t.float()

    def mix(values: Tensor) -> Tensor:
        return torch.lerp(values[order.to(values.device)], values, lam)

    return mix(x), mix(soft)
