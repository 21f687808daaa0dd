"""SimSiam (孪生网络自监督学习): two views of each sample, no negatives, and the parts that prevent collapse.

Source: 科学空间 7980 (从动力学角度看优化算法(六):为什么SimSiam不退化?); Chen and He, https://arxiv.org/abs/2011.10566.

With z = projector(encoder(x)), p = predictor(z) and sg the stop-gradient:

    loss = -1/2 [cos(p1, sg z2) + cos(p2, sg z1)]

A constant z has the best loss, -1. The article's account of why training does not end there: the predictor is the fast
variable and the encoder the slow one; with the stop-gradient both rates carry the derivative of the loss by p, which
vanishes before the encoder can collapse, and the term that is cut off would lead to collapse even then. It is an
account, not a proof: even its scalar model collapses from some starts (``kexue reproduce simsiam-dynamics``). So the
stop-gradient, the predictor, its rate and the normalised output are options here, and
:class:`kexue.models.CollapseMeter` tells what became of them. What differs from the published code: both views share
one forward pass with the statistics of two (``_views.py``), and the cosines are one pass with the gradient in closed
form (``_cosine.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kexue._checks import check_choice, check_int, check_real
from kexue._tensors import check_float
from kexue.models._cosine import negative_cosines
from kexue.models._views import VIEWS, joins, run_both, run_joined, uses_batch_statistics

__all__ = ["SimSiam", "simsiam_loss"]


def simsiam_loss(
    p1: Tensor,
    p2: Tensor,
    z1: Tensor,
    z2: Tensor,
    *,
    stop_gradient: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Minus the mean of cos(p1, z2) and cos(p2, z1): -1 at best.

    Lengths do not matter, entries up to the largest float32 are fine. A row shorter than 1e-12 has no direction: its
    cosine counts as 0 and it gets no gradient. The loss is differentiable once.

    Args:
        p1: (B, D) predictions from the first view; fp16, bf16, float32 or float64. Computed in float32 (float64 stays).
        p2: (B, D) predictions from the second view.
        z1: (B, D) targets from the first view.
        z2: (B, D) targets from the second view.
        stop_gradient: Targets get no gradient.
        reduction: "none" (B,), "mean" or "sum" over rows; the mean over no rows is 0.

    Returns:
        The loss in float32 (float64 for float64 inputs).

    Raises:
        TypeError: Not floating tensors.
        ValueError: Shapes that differ, unknown reduction.

    Reference:
        https://spaces.ac.cn/archives/7980

    Example:
        >>> z = torch.eye(2)
        >>> simsiam_loss(z, z, z, 3 * z), simsiam_loss(z, z.flip(0), z, z)
        (tensor(-1.), tensor(-0.5000))
    """
    check_choice("reduction", reduction, ("none", "mean", "sum"))
    for name, x in (("p1", p1), ("p2", p2), ("z1", z1), ("z2", z2)):
        check_float(name, x, 2)
        if x.shape != p1.shape:
            raise ValueError(f"{name} must have the shape of p1, {tuple(p1.shape)}; got {tuple(x.shape)}")
    if stop_gradient:
        z1, z2 = z1.detach(), z2.detach()
    mean = reduction == "mean"
    loss = (negative_cosines(p1, z2, mean=mean) + negative_cosines(p2, z1, mean=mean)) / 2
    return loss.sum() if reduction == "sum" else loss


def _perceptron(sizes: list[int], output_norm: bool) -> nn.Sequential:
    """Linear layers with batch norm and ReLU between them; no bias where a batch norm follows."""
    layers: list[nn.Module] = []
    for i in range(1, len(sizes)):
        last = i == len(sizes) - 1
        layers.append(nn.Linear(sizes[i - 1], sizes[i], bias=last and not output_norm))
        if not last:
            layers += [nn.BatchNorm1d(sizes[i]), nn.ReLU()]
    return nn.Sequential(*layers)


def _check_part(name: str, part: Any) -> None:
    if not (part is None or part == "mlp" or isinstance(part, nn.Module)):
        raise TypeError(f'{name} must be "mlp", a Module or None; got {part!r}')


class SimSiam(nn.Module):
    """Self-supervised training of an encoder from pairs of views.

    ``forward(x1, x2)`` returns the loss. Train with the rates of :meth:`param_groups`, watch
    :class:`kexue.models.CollapseMeter` on :meth:`project`, and keep ``encoder`` afterwards.

    The defaults are those of the paper: a projector of three layers with batch norm, also on its output (without
    scale and shift), a predictor with a bottleneck of D / 4. The other settings exist to see what each part does:
    without stop-gradient or without predictor the representation collapses.

    Args:
        encoder: Maps a batch of views to (B, dim). A view may be a tensor (B, ...) or whatever else the encoder takes
            as its one argument (a dict of tensors, say). Held, not copied.
        dim: Width of the encoder's output, at least 2.
        projector: "mlp": three layers; None: none, z is the encoder's output; or a Module from (B, dim) to (B, D).
        predictor: "mlp": D -> bottleneck -> D; None: none, p = z; or a Module from (B, D) to (B, D).
        projection_dim: D, width of z, at least 2; None is ``dim``.
        hidden_dim: Width of the hidden layers of the projector; None is D.
        bottleneck: Width of the hidden layer of the predictor; None is D / 4.
        output_norm: Batch norm on z.
        stop_gradient: No gradient through the targets.
        views: How the two views pass through each part (encoder, projector, predictor). "auto": together where this
            gives what two passes give, running statistics included, that is, through layers of torch that are known to
            treat the rows one by one, batch norms aside, which take the halves in turn; twice through everything else.
            "apart": always twice. "split": together, batch norms by halves; you vouch for the rest of the encoder.
            "mixed": together, batch norms over both views, which is the fastest and not what the paper does. Views
            that are not tensors of equal shape pass twice through the encoder.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: A value out of range; in ``forward``: views of different batch sizes, an encoder that does not
            return (B, dim), fewer than 2 rows in training mode with batch norm.

    Reference:
        https://spaces.ac.cn/archives/7980

    Example:
        >>> model = SimSiam(torch.nn.Linear(8, 16), dim=16)
        >>> optimizer = torch.optim.SGD(model.param_groups(lr=0.05, predictor_lr=0.5), momentum=0.9)
        >>> x = torch.randn(32, 8)
        >>> loss = model(x + 0.1 * torch.randn(32, 8), x + 0.1 * torch.randn(32, 8))
        >>> loss.backward()
        >>> loss.shape, [group["name"] for group in optimizer.param_groups]
        (torch.Size([]), ['encoder', 'predictor'])
    """

    def __init__(
        self,
        encoder: nn.Module,
        dim: int,
        *,
        projector: str | nn.Module | None = "mlp",
        predictor: str | nn.Module | None = "mlp",
        projection_dim: int | None = None,
        hidden_dim: int | None = None,
        bottleneck: int | None = None,
        output_norm: bool = True,
        stop_gradient: bool = True,
        views: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder must be a Module; got {type(encoder).__name__}")
        check_int("dim", dim, 2)
        _check_part("projector", projector)
        _check_part("predictor", predictor)
        for name, flag in (("output_norm", output_norm), ("stop_gradient", stop_gradient)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False; got {flag!r}")
        check_choice("views", views, VIEWS)
        width = dim if projection_dim is None else projection_dim
        check_int("projection_dim", width, 2)
        if projector is None and width != dim:
            raise ValueError(f"without a projector, projection_dim must be dim, {dim}; got {width}")
        hidden = width if hidden_dim is None else hidden_dim
        narrow = max(width // 4, 1) if bottleneck is None else bottleneck
        check_int("hidden_dim", hidden, 1)
        check_int("bottleneck", narrow, 1)
        self.dim, self.projection_dim = int(dim), int(width)
        self.stop_gradient, self.views = stop_gradient, views
        self.encoder = encoder
        if projector == "mlp":
            projector = _perceptron([dim, hidden, hidden, width], output_norm)
        layers = [projector] if isinstance(projector, nn.Module) else []
        if output_norm:
            layers.append(nn.BatchNorm1d(width, affine=False))
        self.projector = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
        if predictor == "mlp":
            predictor = _perceptron([width, narrow, width], False)
        self.predictor = predictor if isinstance(predictor, nn.Module) else nn.Identity()

    def extra_repr(self) -> str:
        """What print shows."""
        return f"dim={self.dim}, stop_gradient={self.stop_gradient}, views={self.views!r}"

    def _check_rows(self, rows: int) -> None:
        if rows < 2 and (uses_batch_statistics(self.projector) or uses_batch_statistics(self.predictor)):
            raise ValueError(f"batch norm needs at least 2 rows in training mode; got a batch of {rows} (use eval())")

    def _check_features(self, x: Any, rows: int | None) -> Tensor:
        expected = f"(B, {self.dim})" if rows is None else f"({rows}, {self.dim})"
        if not isinstance(x, Tensor):
            raise TypeError(f"encoder must return a tensor of shape {expected}; got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"encoder must return a floating tensor; got dtype {x.dtype}")
        if x.dim() != 2 or x.shape[1] != self.dim or (rows is not None and x.shape[0] != rows):
            raise ValueError(f"encoder must return shape {expected}; got {tuple(x.shape)}")
        return x

    def _check_width(self, name: str, x: Any, shape: tuple[int, ...]) -> Tensor:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        if got != shape:
            raise ValueError(f"{name} must return shape {shape}; got {got}")
        return x

    def _encode(self, encoder: nn.Module, x1: Any, x2: Any) -> Tensor:
        """Encoder's output for both views, (2 B, dim)."""
        if isinstance(x1, Tensor) and isinstance(x2, Tensor):
            if x1.shape[:1] != x2.shape[:1] or x1.dim() == 0:
                raise ValueError(f"views must have equal batch sizes; got {tuple(x1.shape)} and {tuple(x2.shape)}")
            rows = x1.shape[0]
            self._check_rows(rows)  # before anything has changed running statistics
            alike = x1.shape == x2.shape and x1.dtype == x2.dtype and x1.device == x2.device
            if alike and rows and joins(encoder, self.views):
                return self._check_features(run_joined(encoder, torch.cat([x1, x2]), self.views), 2 * rows)
        first = self._check_features(encoder(x1), None)
        self._check_rows(first.shape[0])
        return torch.cat([first, self._check_features(encoder(x2), first.shape[0])])

    def _project(self, projector: nn.Module, features: Tensor) -> Tensor:
        z = run_both(projector, features, self.views)
        return self._check_width("projector", z, (features.shape[0], self.projection_dim))

    def _targets(self, x1: Any, x2: Any, z: Tensor) -> Tensor:
        """What the predictions are compared with, (2 B, D), in the order of the views."""
        return z.detach() if self.stop_gradient else z

    def forward(self, x1: Any, x2: Any) -> Tensor:
        """Loss of a batch.

        Args:
            x1: First view: a tensor (B, ...), or whatever the encoder takes.
            x2: Second view of the same samples, in the same order.

        Returns:
            The loss, a scalar in float32 (float64 for float64 outputs); 0 for a batch of no rows in evaluation mode.
        """
        z = self._project(self.projector, self._encode(self.encoder, x1, x2))
        p = self._check_width("predictor", run_both(self.predictor, z, self.views), tuple(z.shape))
        target = self._targets(x1, x2, z)
        return negative_cosines(p, target, shift=z.shape[0] // 2)  # each view against the other one's target

    def project(self, x: Any) -> Tensor:
        """The z of one view, (B, D), which the loss compares and a CollapseMeter reads (in evaluation mode).

        Args:
            x: A tensor (B, ...), or whatever the encoder takes.
        """
        features = self._check_features(self.encoder(x), None)
        self._check_rows(features.shape[0])
        return self._check_width("projector", self.projector(features), (features.shape[0], self.projection_dim))

    def param_groups(
        self, lr: float = 0.05, predictor_lr: float | None = None, weight_decay: float | None = None
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer: the encoder with its projector, and the predictor with a rate of its own.

        Each trained parameter is in one group, once; frozen ones (and BYOL's teacher) are in none. Groups hold named
        parameters. ``fix_lr`` is True for the predictor, whose rate stays constant in the paper while that of the
        encoder decays: a schedule should look at it.

        Args:
            lr: Rate of encoder and projector, at least 0.
            predictor_lr: Rate of the predictor; None is ``lr``. A larger one keeps the predictor ahead.
            weight_decay: For both; None leaves it to the optimizer.

        Returns:
            A list of at most two groups with keys params, name, lr, fix_lr and, if given, weight_decay.

        Raises:
            ValueError: A rate that is negative or not finite, or nothing to train.
        """
        rates = {"lr": lr, "predictor_lr": lr if predictor_lr is None else predictor_lr}
        for name, rate in rates.items():
            check_real(name, rate, minimum=0.0)
        options = {}
        if weight_decay is not None:
            check_real("weight_decay", weight_decay, minimum=0.0)
            options["weight_decay"] = float(weight_decay)
        seen: set[int] = set()
        groups = []
        for name, parts, rate in (
            ("encoder", ("encoder", "projector"), rates["lr"]),
            ("predictor", ("predictor",), rates["predictor_lr"]),
        ):
            params = []
            for part in parts:
                for own, parameter in getattr(self, part).named_parameters(prefix=part):
                    if parameter.requires_grad and id(parameter) not in seen:
                        seen.add(id(parameter))
                        params.append((own, parameter))
            if params:
                made = {"params": params, "name": name, "lr": float(rate), "fix_lr": name == "predictor"}
                groups.append({**made, **options})
        if not groups:
            raise ValueError("no parameter requires a gradient; expected at least one in encoder or predictor")
        return groups
