"""Labels for the pieces of a document by gated convolutions (门控卷积序列标注, DGCNN).

Source: 科学空间 8046 (SPACES:“抽取-生成”式长文本摘要); the details are those of the published code.

Each piece of a document has a vector; which pieces belong into the summary is a labelling of the sequence:

    x = W dropout(mask(vectors)),   six times: x = dropout(block(x)),   logit = w . x + c
    block:  x <- x * mask,   (a, b) = convolution(x),   out = x + alpha * LayerNorm(a * sigmoid(b))

with kernel 3 and dilations 1, 2, 4, 8, 1, 1. alpha is one learned number per block that starts at 0 (ReZero), so an
untrained stack is the identity. A logit depends on the 17 pieces to its left and to its right, and on nothing else.

What we do differently, and why: the mask is applied by ``where``, so that nothing in the padding (not even NaN) reaches
a piece, and a padded document gets the logits that it gets alone; a convolution is one matrix product of the k shifted
copies side by side, which on a CPU needs no change of layout. The weights keep the shape of ``torch.nn.Conv1d``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue._checks import check_int, check_real

__all__ = ["GatedConvLabeler", "ResidualGatedConv", "labeler_loss"]


class ResidualGatedConv(nn.Module):
    """One residual gated convolution.

    Args:
        input_size: Width of the input.
        hidden_size: Width of the output; if it is another one, the input goes through a Linear without bias.
        dilation: Distance of the taps.
        kernel_size: Taps, an odd number.
    """

    def __init__(self, input_size: int, hidden_size: int, dilation: int = 1, kernel_size: int = 3) -> None:
        super().__init__()
        self.dilation, self.kernel_size = dilation, kernel_size
        self.weight = nn.Parameter(torch.empty(2 * hidden_size, input_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(2 * hidden_size))
        self.norm = nn.LayerNorm(hidden_size)
        self.alpha = nn.Parameter(torch.zeros(()))
        self.project = None if input_size == hidden_size else nn.Linear(input_size, hidden_size, bias=False)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Conv1d
        bound = 1 / math.sqrt(input_size * kernel_size)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, T, input_size) and (B, T, 1) bool to (B, T, hidden_size)."""
        x = torch.where(mask, x, 0)
        time, reach = x.shape[1], self.dilation * (self.kernel_size // 2)
        if self.kernel_size > 1:
            wide = F.pad(x, (0, 0, reach, reach))
            taps = [wide[:, i * self.dilation : i * self.dilation + time] for i in range(self.kernel_size)]
            columns = torch.cat(taps, 2)
        else:
            columns = x
        a, b = F.linear(columns, self.weight.transpose(1, 2).flatten(1), self.bias).chunk(2, 2)
        y = self.norm(a * torch.sigmoid(b))
        if self.project is not None:
            x = self.project(x)
        return x + self.alpha * y

    def extra_repr(self) -> str:
        size = self.weight.shape
        return f"{size[1]}, {size[0] // 2}, dilation={self.dilation}, kernel_size={self.kernel_size}"


class GatedConvLabeler(nn.Module):
    """Say of each piece of a document whether it belongs into the summary.

    Args:
        input_size: Width of a piece's vector.
        hidden_size: Width of the convolutions.
        dilations: One block for each.
        kernel_size: Taps of each convolution, an odd number.
        dropout: Rate, before and after the first Linear and after each block.

    Inputs:
        - x: (B, T, input_size), vectors of the pieces.
        - mask: (B, T) bool, True for a piece, False for padding; None takes all.

    Output:
        (B, T) logits, 0 at padding. A piece belongs into the summary with probability sigmoid(logit).

    Raises:
        TypeError: ``x`` is not a floating tensor, ``mask`` not a bool tensor, or an argument of the wrong kind.
        ValueError: Shapes that do not fit, or settings out of range.

    Memory: B T (2 + kernel_size) hidden_size numbers per block for the backward pass; 10 million for B = 8, T = 256
    and the default width.

    Reference:
        https://spaces.ac.cn/archives/8046

    Example:
        >>> _ = torch.manual_seed(0)
        >>> labeler = GatedConvLabeler(input_size=16, hidden_size=8).eval()
        >>> x, mask = torch.randn(1, 5, 16), torch.tensor([[True, True, True, False, False]])
        >>> logits = labeler(x, mask)
        >>> logits.shape, torch.allclose(logits[:, :3], labeler(x[:, :3]))
        (torch.Size([1, 5]), True)
        >>> labeler.reach
        17
    """

    def __init__(
        self,
        input_size: int = 768,
        hidden_size: int = 384,
        dilations: Sequence[int] = (1, 2, 4, 8, 1, 1),
        kernel_size: int = 3,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_int("input_size", input_size, 1)
        check_int("hidden_size", hidden_size, 1)
        check_int("kernel_size", kernel_size, 1)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that a piece stands in the middle; got {kernel_size}")
        if isinstance(dilations, str | bytes) or not isinstance(dilations, Sequence):
            raise TypeError(f"dilations must be a sequence of integers; got {dilations!r}")
        for i, dilation in enumerate(dilations):
            check_int(f"dilations[{i}]", dilation, 1)
        check_real("dropout", dropout, minimum=0.0)
        if dropout >= 1:
            raise ValueError(f"dropout must be below 1; got {dropout}")
        self.input_size = input_size
        self.project = nn.Linear(input_size, hidden_size, bias=False)
        self.blocks = nn.ModuleList(ResidualGatedConv(hidden_size, hidden_size, d, kernel_size) for d in dilations)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, 1)
        #: Pieces to each side on which a logit depends.
        self.reach = sum(dilations) * (kernel_size // 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x must be a floating tensor; got {getattr(x, 'dtype', type(x).__name__)}")
        if x.dim() != 3 or x.shape[2] != self.input_size:
            raise ValueError(f"x must be (B, T, {self.input_size}); got {tuple(x.shape)}")
        if mask is None:
            mask = x.new_ones(x.shape[:2], dtype=torch.bool)
        check_mask(mask, x.shape[:2])
        keep = mask[..., None]
        x = self.dropout(self.project(self.dropout(torch.where(keep, x, 0))))
        for block in self.blocks:
            x = self.dropout(block(x, keep))
        return torch.where(mask, self.head(x)[..., 0], 0)


def check_mask(mask: Tensor, shape: torch.Size) -> None:
    """Raise unless ``mask`` is a bool tensor of this shape."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor; got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.shape != shape:
        raise ValueError(f"mask must be {tuple(shape)} like the pieces; got {tuple(mask.shape)}")


def labeler_loss(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, averaged over the pieces and not over the padding.

    Args:
        logits: (B, T).
        labels: (B, T), bool or numbers in [0, 1].
        mask: (B, T) bool, True for a piece; None takes all.

    Returns:
        A scalar in float32 (float64 for float64 logits); 0 if there is no piece.

    Raises:
        TypeError: ``logits`` is not a floating tensor or ``mask`` not a bool tensor.
        ValueError: Shapes that differ.

    Example:
        >>> logits, labels = torch.tensor([[0.0, 0.0, 5.0]]), torch.tensor([[True, False, False]])
        >>> round(labeler_loss(logits, labels, torch.tensor([[True, True, False]])).item(), 4)
        0.6931
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"logits must be a floating tensor; got {getattr(logits, 'dtype', type(logits).__name__)}")
    if not isinstance(labels, Tensor) or labels.is_complex():
        raise TypeError(f"labels must be a tensor of 0 and 1; got {getattr(labels, 'dtype', type(labels).__name__)}")
    if labels.shape != logits.shape:
        raise ValueError(f"labels must be {tuple(logits.shape)} like logits; got {tuple(labels.shape)}")
    if mask is None:
        mask = torch.ones_like(logits, dtype=torch.bool)
    check_mask(mask, logits.shape)
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    x, y = torch.where(mask, wide, 0), torch.where(mask, labels.to(wide.dtype), 0)
    each = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    return torch.where(mask, each, 0).sum() / mask.sum().clamp(min=1)
