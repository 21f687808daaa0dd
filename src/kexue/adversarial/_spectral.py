"""Spectral normalisation (谱归一化) without changing the critic: W / sigma(W) is put in place of W for one call.

Miyato et al. 2018 (arXiv 1802.05957). One power iteration a call in training mode, on vectors that are kept as
buffers. Of a convolution the kernel reshaped to (out, -1) is normalised, which only bounds its norm by a surrogate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

FIRST = 15  # iterations from the start vector
EPS = 1e-12


def _matrix(weight: Tensor, transposed: bool) -> Tensor:
    return (weight.transpose(0, 1) if transposed else weight).flatten(1)


class SpectralNorms(nn.Module):
    """Left and right singular vectors of the weights of all linear and convolution layers of a critic.

    Args:
        net: The critic, which this object does not keep.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.names: list[tuple[str, bool]] = []
        g = torch.Generator().manual_seed(0)  # the caller's random state stays as it was
        known = {id(p): name for name, p in net.named_parameters()}
        for module in net.modules():
            if isinstance(module, nn.Linear | _ConvNd) and id(module.weight) in known:
                transposed = isinstance(module, _ConvTransposeNd)
                matrix = _matrix(module.weight.detach(), transposed)
                u = torch.randn(matrix.shape[0], generator=g).to(matrix)
                i = len(self.names)
                self.names.append((known.pop(id(module.weight)), transposed))
                self.register_buffer(f"u{i}", F.normalize(u, dim=0, eps=EPS))
                self.register_buffer(f"v{i}", torch.zeros(matrix.shape[1]).to(matrix))
                for _ in range(FIRST):
                    self._iterate(matrix, i)

    @torch.no_grad()
    def _iterate(self, matrix: Tensor, i: int) -> None:
        u, v = self.get_buffer(f"u{i}"), self.get_buffer(f"v{i}")
        v.copy_(F.normalize(torch.mv(matrix.T, u), dim=0, eps=EPS))
        u.copy_(F.normalize(torch.mv(matrix, v), dim=0, eps=EPS))

    def forward(self, net: nn.Module) -> dict[str, Tensor]:
        """Name -> normalised weight, differentiable in the weight."""
        found = {}
        for i, (name, transposed) in enumerate(self.names):
            weight = net.get_parameter(name)
            matrix = _matrix(weight, transposed)
            if self.training:
                self._iterate(matrix.detach(), i)
            u, v = self.get_buffer(f"u{i}").clone(), self.get_buffer(f"v{i}").clone()
            sigma = torch.dot(u, torch.mv(matrix, v))
            found[name] = weight / torch.where(sigma.abs() > EPS, sigma, 1)
        return found
