"""Pictures side by side in one picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue._checks import check_int

__all__ = ["image_grid"]

_TARGET = 48  # side in pixels up to which small pictures are enlarged


def image_grid(images: Any, columns: int = 8, scale: int | None = None, gap: int = 1) -> NDArray[np.uint8]:
    """One picture with all of them in rows, for ``PIL.Image.fromarray`` or ``matplotlib.pyplot.imshow``.

    Args:
        images: (N, H, W) or (N, C, H, W) with C of 1 or 3, in [-1, 1]; tensor or array. What is outside is cut off.
        columns: Pictures in a row.
        scale: Pixels that a pixel becomes on each side; None enlarges small pictures.
        gap: Pixels between pictures.

    Returns:
        (height, width) or (height, width, 3) bytes.

    Raises:
        ValueError: Another shape, no picture, or values that are not finite.

    Example:
        >>> image_grid(np.zeros((3, 8, 8)), columns=2, scale=1).shape
        (17, 17)
    """
    x = np.asarray(images.detach().cpu() if hasattr(images, "detach") else images, np.float64)
    if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[1] not in (1, 3)) or x.size == 0:
        raise ValueError(f"images must be (N, H, W) or (N, C, H, W) with C of 1 or 3, and at least one; got {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"images must be finite; got {int((~np.isfinite(x)).sum())} values that are not")
    check_int("columns", columns, 1)
    check_int("gap", gap, 0)
    if scale is None:
        scale = max(1, _TARGET // max(x.shape[-2:]))
    check_int("scale", scale, 1)
    x = x[:, None] if x.ndim == 3 else x
    pixels = ((x.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).repeat(scale, 2).repeat(scale, 3)
    n, planes, height, width = pixels.shape
    rows = -(-n // columns)
    columns = min(columns, n)
    out = np.full((planes, rows * (height + gap) - gap, columns * (width + gap) - gap), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        out[:, top : top + height, left : left + width] = image
    return out[0] if planes == 1 else out.transpose(1, 2, 0)
