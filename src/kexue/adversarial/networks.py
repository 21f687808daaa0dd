"""Networks for small pictures: fully connected ones, and the convolutions of BiGAN-QP's article.

Source: 科学空间 6214 (BiGAN-QP:简单清晰的编码&生成模型). Convolutions are 5 x 5 with stride 2 down to 4 x 4, channels
doubling up to 8 times the side of the picture; batch normalisation in generator and encoder, never in the critic, which
it would make look across the batch; LeakyReLU(.2) everywhere but in the generator (ReLU, tanh at its end).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from kexue._checks import check_choice, check_int

__all__ = ["PairCritic", "bigan_networks", "gan_networks"]

KINDS = ("auto", "mlp", "conv")
LARGEST_MLP = 1024  # entries of a picture above which convolutions are the better choice
_SMALLEST = 4  # side of the picture where the convolutions end


class PairCritic(nn.Module):
    """The critic of BiGAN-QP: T(x, z) = head(concat(features(x), z)).

    Args:
        features: Maps pictures (B, ...) to (B, F); it belongs to the critic and is not the encoder.
        head: Maps (B, F + z_dim) to (B, 1).

    Example:
        >>> critic = PairCritic(nn.Linear(3, 2), nn.Linear(2 + 4, 1))
        >>> critic(torch.zeros(5, 3), torch.zeros(5, 4)).shape
        torch.Size([5, 1])
    """

    def __init__(self, features: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.features, self.head = features, head

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Scores (B, 1) of pairs.

        Args:
            x: (B, ...) pictures.
            z: (B, z_dim) codes.
        """
        return self.head(torch.cat([self.features(x), z], 1))


def _leaky() -> nn.Module:
    return nn.LeakyReLU(0.2)


def _mlp(sizes: Sequence[int], activation: Callable[[], nn.Module], norm: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes[:-1]):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), activation()]
    return [*layers, nn.Linear(sizes[-2], sizes[-1])]


def _channels(side: int, width: int | None) -> list[int]:
    """Channels after each halving of the side, the last of them at 4 x 4."""
    halvings = int(math.log2(side // _SMALLEST))
    top = width or 8 * side
    return [max(1, top >> (halvings - 1 - i)) for i in range(halvings)]


def _down(shape: tuple[int, ...], out: int, norm: bool, bias: bool, width: int | None) -> nn.Sequential:
    planes, side = shape[0], shape[-1]
    layers: list[nn.Module] = []
    for i, channels in enumerate(_channels(side, width)):
        layers.append(nn.Conv2d(planes, channels, 5, 2, 2, bias=bias and not (norm and i)))
        if norm and i:
            layers.append(nn.BatchNorm2d(channels))
        layers.append(_leaky())
        planes = channels
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(planes * _SMALLEST**2, out, bias=bias))


def _up(shape: tuple[int, ...], z_dim: int, width: int | None) -> list[nn.Module]:
    channels = _channels(shape[-1], width)[::-1]
    top = channels[0]
    layers: list[nn.Module] = [
        nn.Linear(z_dim, top * _SMALLEST**2), nn.Unflatten(1, (top, _SMALLEST, _SMALLEST)), nn.BatchNorm2d(top),
        nn.ReLU(),
    ]  # fmt: skip
    for a, b in zip(channels, [*channels[1:], None], strict=True):
        layers.append(nn.ConvTranspose2d(a, shape[0] if b is None else b, 5, 2, 2, 1, bias=b is None))
        if b is not None:
            layers += [nn.BatchNorm2d(b), nn.ReLU()]
    return [*layers, nn.Tanh()]


def _plan(shape: Sequence[int], z_dim: int, hidden: Sequence[int], kind: str) -> tuple[tuple[int, ...], str]:
    check_choice("kind", kind, KINDS)
    check_int("z_dim", z_dim, 1)
    shape = tuple(shape)
    if not shape:
        raise ValueError("shape must be that of one sample, (D,), (H, W) or (C, H, W); got ()")
    for size in (*shape, *hidden):
        check_int("every size of shape and hidden", size, 1)
    side = shape[-1]
    fits = len(shape) in (2, 3) and shape[-2] == side and side > _SMALLEST and side & (side - 1) == 0
    if kind == "conv" and not fits:
        raise ValueError(f"convolutions need (C, H, H) or (H, H) with H a power of 2 from 8 on; got shape {shape}")
    if kind == "auto":
        kind = "conv" if fits and math.prod(shape) > LARGEST_MLP else "mlp"
    return shape, kind


def _generator(shape: tuple[int, ...], z_dim: int, hidden: Sequence[int], kind: str, width: int | None) -> nn.Module:
    if kind == "mlp":
        layers = [*_mlp([z_dim, *hidden, math.prod(shape)], nn.ReLU, True), nn.Tanh()]
        return nn.Sequential(*layers, *([nn.Unflatten(1, shape)] if len(shape) > 1 else []))
    layers = _up(shape if len(shape) == 3 else (1, *shape), z_dim, width)
    return nn.Sequential(*layers, *([nn.Flatten(1, 2)] if len(shape) == 2 else []))


def _planes(shape: tuple[int, ...]) -> list[nn.Module]:
    """(B, H, W) as (B, 1, H, W)."""
    return [nn.Unflatten(1, (1, shape[0]))] if len(shape) == 2 else []


def gan_networks(
    shape: Sequence[int], z_dim: int, hidden: Sequence[int] = (256, 256), kind: str = "auto", width: int | None = None
) -> tuple[nn.Module, nn.Module]:
    """Generator and critic for samples in [-1, 1].

    Args:
        shape: Of one sample: (D,), (H, W) or (C, H, W).
        z_dim: Width of the noise.
        hidden: Hidden layers of the fully connected networks.
        kind: "mlp", "conv", or "auto": convolutions for square pictures of more than 1024 entries whose side is a
            power of 2.
        width: Most channels of the convolutions; None: 8 times the side.

    Returns:
        The generator, (B, z_dim) -> (B, \\*shape), and the critic, (B, \\*shape) -> (B, 1).

    Raises:
        ValueError: Sizes below 1, or a shape that convolutions do not take.

    Example:
        >>> generator, critic = gan_networks((8, 8), z_dim=4)
        >>> critic(generator(torch.zeros(3, 4))).shape
        torch.Size([3, 1])
    """
    shape, kind = _plan(shape, z_dim, hidden, kind)
    generator = _generator(shape, z_dim, hidden, kind, width)
    if kind == "mlp":
        return generator, nn.Sequential(nn.Flatten(), *_mlp([math.prod(shape), *hidden, 1], _leaky, False))
    planes = shape if len(shape) == 3 else (1, *shape)
    return generator, nn.Sequential(*_planes(shape), *_down(planes, 1, False, True, width))


def bigan_networks(
    shape: Sequence[int], z_dim: int, hidden: Sequence[int] = (256, 256), kind: str = "auto", width: int | None = None
) -> tuple[nn.Module, nn.Module, PairCritic]:
    """Generator, encoder and critic of pairs for :class:`BiGANQP`; arguments as for :func:`gan_networks`.

    The convolutional critic has no bias anywhere, as in the article.

    Args:
        shape: Of one sample.
        z_dim: Width of the codes.
        hidden: Hidden layers of the fully connected networks.
        kind: "mlp", "conv" or "auto".
        width: Most channels of the convolutions.

    Returns:
        The generator, the encoder, (B, \\*shape) -> (B, z_dim), and the critic, a :class:`PairCritic`.

    Raises:
        ValueError: Sizes below 1, or a shape that convolutions do not take.

    Example:
        >>> generator, encoder, critic = bigan_networks((1, 64, 64), z_dim=4, width=32)
        >>> x = generator(torch.zeros(3, 4))
        >>> x.shape, critic(x, encoder(x)).shape
        (torch.Size([3, 1, 64, 64]), torch.Size([3, 1]))
    """
    shape, kind = _plan(shape, z_dim, hidden, kind)
    generator = _generator(shape, z_dim, hidden, kind, width)
    if kind == "mlp":
        size = math.prod(shape)
        encoder = nn.Sequential(nn.Flatten(), *_mlp([size, *hidden, z_dim], _leaky, True))
        features = nn.Sequential(nn.Flatten(), *_mlp([size, *hidden[:1], z_dim], _leaky, False))
        return generator, encoder, PairCritic(features, nn.Sequential(*_mlp([2 * z_dim, *hidden, 1], _leaky, False)))
    planes = shape if len(shape) == 3 else (1, *shape)
    encoder = nn.Sequential(*_planes(shape), *_down(planes, z_dim, True, True, width))
    features = nn.Sequential(*_planes(shape), *_down(planes, z_dim, False, False, width))
    head: list[nn.Module] = []
    for a, b in ((2 * z_dim, 1024), (1024, 1024)):
        head += [nn.Linear(a, b, bias=False), _leaky()]
    return generator, encoder, PairCritic(features, nn.Sequential(*head, nn.Linear(1024, 1, bias=False)))
