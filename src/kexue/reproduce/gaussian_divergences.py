"""Divergences of normals: the identities of the article, one by one.

1. Random pairs, n = 2 to 32: version 1 of W2 (symmetric roots), version 2 (eigenvalues of the product) and ``w2``.
2. KL and Bhattacharyya against quadrature in one and two dimensions.
3. W2 of samples in one dimension (sorted, which is the optimal assignment) against the formula, relative error.
4. Entropy and KL against Monte Carlo, in standard errors.
5. Gradients of KL, Bhattacharyya and W2 against float64 central differences, also at Sp = Sq = I.

Rule, fixed before measuring: (1) at most 1e-10, (2) at most 1e-8, (3) at most .05, (4) at most 4 standard errors,
(5) at most 1e-6, all relative. "reproduced": all of them; "partly": (1) only; otherwise "not reproduced".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kexue.reproduce.runner import Measurement, Verdict
from kexue.stats import Gaussian, barycenter, bhattacharyya, kl, w2

CLAIM = (
    "KL, Bhattacharyya and Wasserstein distances of two multivariate normals have closed forms, and the two usual "
    "formulas of the Wasserstein distance are equal."
)


def _draw(n: int, g: torch.Generator, batch: int = 1) -> tuple[Tensor, Tensor]:
    a = torch.randn(batch, n, n, generator=g, dtype=torch.float64) / n**0.5
    return torch.randn(batch, n, generator=g, dtype=torch.float64), a @ a.mT + 0.1 * torch.eye(n).double()


def _root(s: Tensor) -> Tensor:
    w, v = torch.linalg.eigh(s)
    return (v * w.clamp(min=0).sqrt().unsqueeze(-2)) @ v.mT


def _versions(pairs: int, g: torch.Generator) -> tuple[float, float]:
    """Largest relative differences of version 2, and of ``w2``, from version 1."""
    second, ours = 0.0, 0.0
    sizes = (2, 3, 5, 8, 16, 32)
    for n in sizes:
        (mp, sp), (mq, sq) = (_draw(n, g, max(1, pairs // len(sizes))) for _ in range(2))

        def trace(x: Tensor) -> Tensor:
            return x.diagonal(dim1=-2, dim2=-1).sum(-1)

        fixed = (mp - mq).square().sum(-1) + trace(sp) + trace(sq)
        root = _root(sp)
        one = fixed - 2 * trace(_root(root @ sq @ root))
        two = fixed - 2 * torch.linalg.eigvals(sp @ sq).sqrt().real.sum(-1)
        second = max(second, float(((two - one) / one).abs().max()))
        ours = max(ours, float(((w2(Gaussian(mp, sp), Gaussian(mq, sq)) - one) / one).abs().max()))
    return second, ours


def _quadrature(n: int, g: torch.Generator) -> float:
    """Largest relative error of KL and Bhattacharyya against a sum over a fine grid."""
    pairs = [_draw(n, g) for _ in range(2)]
    p, q = (Gaussian(m[0], s[0]) for m, s in pairs)
    axis = torch.linspace(-16, 16, 4001 if n == 1 else 1201, dtype=torch.float64)
    points = torch.cartesian_prod(*[axis] * n).reshape(-1, n)
    cell = float(axis[1] - axis[0]) ** n
    logs = [torch.distributions.MultivariateNormal(x.mean, x.covariance).log_prob(points) for x in (p, q)]
    divergence = (logs[0].exp() * (logs[0] - logs[1])).sum() * cell
    distance = -torch.log((0.5 * (logs[0] + logs[1])).exp().sum() * cell)
    return max(float(abs(kl(p, q) / divergence - 1)), float(abs(bhattacharyya(p, q) / distance - 1)))


def _sorted_samples(count: int, g: torch.Generator) -> float:
    (mp, sp), (mq, sq) = (_draw(1, g) for _ in range(2))
    p, q = Gaussian(mp[0], sp[0]), Gaussian(mq[0], sq[0])
    x, y = (z.rsample((count,), g).squeeze(-1).sort().values for z in (p, q))
    return float(abs((x - y).square().mean() / w2(p, q) - 1))


def _monte_carlo(count: int, g: torch.Generator) -> tuple[float, float]:
    """Deviations of entropy and KL from sample means, in standard errors."""
    pairs = [_draw(4, g) for _ in range(2)]
    p, q = (Gaussian(m[0], s[0]) for m, s in pairs)
    x = p.rsample((count,), g)
    logs = [torch.distributions.MultivariateNormal(z.mean, z.covariance).log_prob(x) for z in (p, q)]
    out = []
    for values, exact in ((-logs[0], p.entropy()), (logs[0] - logs[1], kl(p, q))):
        out.append(float(abs(values.mean() - exact) / (values.std() / count**0.5)))
    return out[0], out[1]


def _gradients(function: Callable[[Gaussian, Gaussian], Tensor], equal: bool, g: torch.Generator) -> float:
    """Largest error of the gradient against central differences along random directions, relative to its length."""
    (mp, sp), (mq, sq) = (_draw(4, g) for _ in range(2))
    if equal:
        sp = sq = torch.eye(4).double()[None]
    inputs = [x[0].clone().requires_grad_() for x in (mp, sp, mq, sq)]

    def value(x: list[Tensor]) -> Tensor:
        return function(Gaussian(x[0], x[1]), Gaussian(x[2], x[3]))

    gradient = torch.autograd.grad(value(inputs), inputs)
    length = float(torch.cat([x.flatten() for x in gradient]).norm())
    worst, h = 0.0, 1e-4
    with torch.no_grad():
        for _ in range(5):
            moves = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in inputs]
            moves = [m if m.dim() == 1 else (m + m.mT) / 2 for m in moves]
            ends = [value([x + step * m for x, m in zip(inputs, moves, strict=True)]) for step in (h, -h)]
            ends += [value([x + step * m for x, m in zip(inputs, moves, strict=True)]) for step in (2 * h, -2 * h)]
            found = float((8 * (ends[0] - ends[1]) - (ends[2] - ends[3])) / (12 * h))  # fourth order
            exact = sum(float((a * m).sum()) for a, m in zip(gradient, moves, strict=True))
            worst = max(worst, abs(found - exact) / max(length, 1e-3))
    return worst


def measure(quick: bool, seed: int) -> Measurement:
    """Measure the claim; see the module for the rule.

    Args:
        quick: Fewer pairs and samples.
        seed: Of everything.
    """
    g = torch.Generator().manual_seed(seed)
    second, ours = _versions(60 if quick else 1000, g)
    grids = [_quadrature(1, g), _quadrature(2, g)]
    samples = _sorted_samples(100_000 if quick else 1_000_000, g)
    entropy, divergence = _monte_carlo(20_000 if quick else 500_000, g)
    methods: dict[str, Callable[..., Tensor]] = {"KL": kl, "Bhattacharyya": bhattacharyya, "W2": w2}
    general = [_gradients(f, False, g) for f in methods.values()]
    identity = [_gradients(f, True, g) for f in methods.values()]
    figures: dict[str, Any] = {
        "W2: version 2 against version 1": second,
        "W2: ours against version 1": ours,
        "quadrature, 1-D": grids[0],
        "quadrature, 2-D": grids[1],
        "W2 of sorted samples, relative error": samples,
        "entropy, standard errors": entropy,
        "KL, standard errors": divergence,
        "gradient error": {"method": list(methods), "random": general, "Sp = Sq = I": identity},
    }
    first = max(second, ours) <= 1e-10
    rest = max(grids) <= 1e-8 and samples <= 0.05 and max(entropy, divergence) <= 4 and max(*general, *identity) <= 1e-6
    verdict: Verdict = "reproduced" if first and rest else "partly" if first else "not reproduced"
    return Measurement(figures, verdict, _plot, f"Seed {seed}; all errors are relative unless they say otherwise.")


def _plot(figure: Any) -> None:
    """Ellipses of one standard deviation between two normals, along three barycentres."""
    p = Gaussian(torch.zeros(2).double(), torch.tensor([[2.0, 0.0], [0.0, 0.1]]).double())
    q = Gaussian(torch.tensor([6.0, 3.0]).double(), torch.tensor([[0.3, 0.4], [0.4, 1.5]]).double())
    angle = np.linspace(0, 2 * np.pi, 100)
    circle = torch.tensor(np.stack([np.cos(angle), np.sin(angle)]))
    titles = {"w2": "W2", "kl": "KL(p_k|q)", "reverse_kl": "KL(q|p_k)"}
    for i, (metric, title) in enumerate(titles.items()):
        axis = figure.add_subplot(1, 3, i + 1)
        for t in np.linspace(0, 1, 7):
            middle = barycenter([p, q], [1 - t, t], metric)
            x, y = (torch.linalg.cholesky(middle.covariance) @ circle + middle.mean[:, None]).numpy()
            axis.plot(x, y, color=(t, 0.2, 1 - t))
        axis.set(title=f"barycentres, {title}", aspect="equal", xlim=(-4.5, 9.5), ylim=(-3, 6.5))
        axis.set_xlabel("blue = first, red = second")
