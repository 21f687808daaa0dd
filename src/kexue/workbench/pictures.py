"""Pictures in: scikit-learn's digits by name, a folder of images, or an array in a .npy file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue._checks import check_int

__all__ = ["DIGITS", "Pictures", "read_pictures"]

DIGITS = "digits"
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_USUAL, _LARGEST_AS_IS = 32, 64  # side that pictures of several sizes get; largest side of equal ones that is kept


@dataclass(frozen=True)
class Pictures:
    """What :func:`read_pictures` returns.

    Args:
        data: (N, H, W), (N, C, H, W) or (N, D): bytes for -1 to 1, or float32 in [-1, 1].
        source: What was read, in words.
        labels: Classes, if known.

    Example:
        >>> Pictures(np.zeros((3, 8, 8), np.uint8), "nothing").shape
        (8, 8)
    """

    data: NDArray[Any]
    source: str
    labels: NDArray[np.int64] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one picture."""
        return tuple(self.data.shape[1:])

    def digest(self) -> str:
        """Fingerprint of the data."""
        digest = hashlib.sha256(str((self.data.dtype, self.data.shape)).encode())
        digest.update(np.ascontiguousarray(self.data).data)
        return digest.hexdigest()


def read_pictures(
    source: str | Path, size: int | None = None, *, skip_bad: bool = False, log: Callable[[str], None] | None = None
) -> Pictures:
    """Read pictures.

    Args:
        source: "digits" for the 1797 digits of scikit-learn; a folder, whose images are read with those of its
            subfolders (gray of 16 bits as 0 to 65535, of floats as 0 to 1); or a .npy file with an array (N, H, W),
            (N, C, H, W), (N, H, W, C) or (N, D). Bytes stand for -1 to 1; other numbers are stretched from their least
            and largest to that, unless they are in it.
        size: Side that images of a folder are cut (to their middle square) and scaled to; None keeps squares of one
            size up to 64 and makes 32 of others.
        skip_bad: Leave out images that cannot be read.
        log: Takes a line about each that is left out.

    Raises:
        ValueError: Nothing there, no picture, an image that cannot be read, or an array of another kind.
    """
    if size is not None:
        check_int("size", size, 2)
    path = Path(source)
    if str(source) == DIGITS:
        if size not in (None, 8):
            raise ValueError(f"the digits are 8 x 8; got size {size}")
        from sklearn.datasets import load_digits

        found = load_digits()
        return Pictures((found.images / 8 - 1).astype(np.float32), "scikit-learn's digits", found.target)
    if path.is_dir():
        return _folder(path, size, skip_bad, log or (lambda line: None))
    if not path.exists():
        raise ValueError(f"{source} does not exist; give {DIGITS!r}, a folder of images or a .npy file")
    if path.suffix.lower() != ".npy":
        raise ValueError(f"{source} is no folder and no .npy file; give {DIGITS!r}, a folder of images or a .npy file")
    if size is not None:
        raise ValueError("a size can be chosen for a folder of images only")
    return Pictures(_array(path), f"{path.name}")


def _array(path: Path) -> NDArray[Any]:
    try:
        x = np.load(path, allow_pickle=False)
        if not isinstance(x, np.ndarray):
            raise ValueError("it is an archive of several; give one of them")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} holds no array that can be read: {error}") from None
    if x.dtype == bool:
        x = x.astype(np.uint8) * 255
    if x.ndim not in (2, 3, 4) or x.size == 0 or not (np.issubdtype(x.dtype, np.number) and np.isrealobj(x)):
        raise ValueError(
            f"{path} must hold real numbers of shape (N, H, W), (N, C, H, W), (N, H, W, C) or (N, D); "
            f"got {x.dtype} of shape {x.shape}"
        )
    if x.ndim == 4 and x.shape[1] not in (1, 3):
        if x.shape[3] not in (1, 3):
            raise ValueError(f"{path} must hold pictures of 1 or 3 planes; got shape {x.shape}")
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    if x.dtype == np.uint8:
        return x
    x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise ValueError(f"{path} must hold finite numbers; got {int((~np.isfinite(x)).sum())} that are not")
    low, high = float(x.min()), float(x.max())
    if -1 <= low < 0 and high <= 1:
        return x
    if low == high:
        raise ValueError(f"{path} must hold pictures; all its numbers are {low:g}")
    return ((x - low) * np.float32(2 / (high - low)) - 1).clip(-1, 1)


def _folder(folder: Path, size: int | None, skip_bad: bool, log: Callable[[str], None]) -> Pictures:
    from PIL import Image, ImageOps, UnidentifiedImageError

    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    if not files:
        raise ValueError(f"{folder} holds no image ({', '.join(ENDINGS)})")
    images: list[Any] = []
    read: list[tuple[Path, tuple[int, int], bool]] = []
    for path in files:  # sizes and colours first: they decide what all of them become
        try:
            with Image.open(path) as image:
                read.append((path, image.size, _coloured(image)))
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            _bad(path, error, skip_bad, log)
    sizes = {found for _, found, _ in read}
    if size is None:
        only = next(iter(sizes)) if len(sizes) == 1 else (0, 1)
        size = only[0] if only[0] == only[1] and only[0] <= _LARGEST_AS_IS else _USUAL
    mode = "RGB" if any(coloured for _, _, coloured in read) else "L"
    for path, _, _ in read:
        try:
            with Image.open(path) as image:
                upright = _bytes(ImageOps.exif_transpose(image))
                images.append(_square(upright.convert("RGBA" if _transparent(upright) else mode), size, mode))
        except (OSError, SyntaxError, ValueError) as error:
            _bad(path, error, skip_bad, log)
    if not images:
        raise ValueError(f"{folder} holds no image that can be read")
    data = np.stack(images)
    return Pictures(data if mode == "L" else data.transpose(0, 3, 1, 2).copy(), f"{len(data)} images of {folder.name}")


def _coloured(image: Any) -> bool:
    return image.mode not in ("1", "L", "LA", "F") and not image.mode.startswith("I")


def _bytes(image: Any) -> Any:
    """Gray of 16 bits or of floats as bytes; a conversion of Pillow's would cut it off at 255."""
    from PIL import Image

    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    x, top = np.asarray(image, np.float64), 1 if image.mode == "F" else 65535
    if not (x.min() >= 0 and x.max() <= top):
        raise ValueError(f"its numbers must lie within 0 to {top}; got {x.min():g} to {x.max():g}")
    return Image.fromarray((x * (255 / top)).round().astype(np.uint8))


def _transparent(image: Any) -> bool:
    return image.mode in ("RGBA", "LA") or "transparency" in image.info


def _square(image: Any, size: int, mode: str) -> NDArray[np.uint8]:
    """The middle square, scaled; what is transparent becomes white."""
    from PIL import Image

    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert(mode)
    side = min(image.size)
    left, top = (image.size[0] - side) // 2, (image.size[1] - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=box))


def _bad(path: Path, error: Exception, skip_bad: bool, log: Callable[[str], None]) -> None:
    if not skip_bad:
        raise ValueError(f"{path} cannot be read as an image ({error}). --skip-bad leaves out what cannot be read")
    log(f"left out  {path}: {error}")
