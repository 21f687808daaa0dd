"""Path kernel (SGD 路径核): which training examples made a prediction, exactly.

Source: 科学空间 8009 (从动力学角度看优化算法(七):SGD ≈ SVM?), on "Every Model Learned by Gradient
Descent Is Approximately a Kernel Machine" (Domingos, 2020).

Gradient flow on L = sum_i l(y_i, f(x_i)) moves the output at any x by

    f_T(x) - f_0(x) = -sum_i int l'_i(t) K_t(x, x_i) dt,   K_t(x, x') = <grad f_t(x), grad f_t(x')>

a kernel machine f_0 + sum_i alpha_i(x) K(x, x_i), path kernel K = int K_t dt. What differs here: optimisers take
steps. For the step delta = theta_(s+1) - theta_s = -lr sum_i l'_i grad f(x_i) the change of the output is
int_0^1 <grad f(theta_s + u delta), delta> du without any approximation, and three Gauss points on the chord give the
integral to rounding ("chord3"); taking the gradient at theta_s alone ("left") is the article's sum, off by O(lr). No
Jacobian is formed for the layers that ``_layers.py`` knows; the sums over the path are in ``_contributions.py``.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kexue._checks import check_choice, check_int, check_real
from kexue.explain._contributions import RULES, contributions
from kexue.explain._inputs import check_inputs, check_model, check_rows, check_targets
from kexue.explain._layer_gram import Gradients
from kexue.explain._path import Path, Settings, train
from kexue.training.order import batch_indices, check_seed

__all__ = ["PathKernel"]
LOSSES = ("mse", "bce", "ce")


class PathKernel:
    """Train a model and say afterwards what each training example gave to any prediction.

    ``f_T(x) = f_0(x) + sum_i contributions(x)[i] (+ decay_term(x))``, with ``rule="chord3"`` to rounding for smooth
    models and steps well below instability; ReLU has kinks that the quadrature does not see (off by about 1e-3).
    :meth:`error` reports how far off it is.

    A contribution is no similarity, and this is no support vector machine: alpha_i and f_0 depend on x, and large
    contributions of both signs cancel.

    Args:
        model: Returns (N,), (N, 1) or (N, C) for a tensor of N examples; float32 or float64, trained in place
            in the mode (train or eval) that the model is in. Frozen parameters stay out. Refused are what makes an
            example's output random or dependent on the others: active dropout, batch statistics.
        loss: Mean over the samples of: "mse" the squared error, "bce" the binary cross-entropy of logits (both summed
            over the outputs), "ce" the cross-entropy of logits with class indices.
        rule: "chord3", three Gauss points on the chord of each step as it was taken, or "left", the gradient at the
            start of each step alone: a third of the work, error O(lr).
        memory: Bytes for what the training leaves: the parameters of each step (with Adam twice as many numbers).
            A path that does not fit is kept as about sqrt(steps) checkpoints, and trained again piece by piece for each
            explanation.

    Attributes:
        losses_: (steps,) loss before each step, float64.
        batches_: (steps, n) rows of each step.
        n_steps_: Steps that were done.

    Raises:
        TypeError: Not a module, or parameters of another dtype.
        ValueError: An unknown loss or rule, nothing to train, or a module that is refused (also one with sparse
            gradients, or an embedding with max_norm).

    Reference:
        https://spaces.ac.cn/archives/8009

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        >>> X = torch.randn(20, 2, dtype=torch.float64)
        >>> pk = PathKernel(model, loss="mse").fit(X, X[:, 0] * X[:, 1], lr=0.1, steps=50)
        >>> shares = pk.contributions(X[:3])
        >>> shares.shape, bool(pk.error(X[:3]) < 1e-10)
        (torch.Size([3, 20]), True)
        >>> bool(((pk.f0(X[:3]) + shares.sum(1) - model(X[:3])[:, 0]).abs() < 1e-10).all())
        True
        >>> torch.allclose(pk.kernel(X[:3]) * pk.alpha(X[:3]), shares)
        True
    """

    losses_: Tensor
    batches_: Tensor
    n_steps_: int

    def __init__(self, model: nn.Module, loss: str = "mse", rule: str = "chord3", memory: int = 1 << 30) -> None:
        check_choice("loss", loss, LOSSES)
        check_choice("rule", rule, tuple(RULES))
        check_int("memory", memory, 0)
        check_model(model)
        self.model, self.loss, self.rule, self.memory = model, loss, rule, int(memory)
        self._path: Path | None = None
        self._known: dict[str, Tensor] | None = None

    @torch.inference_mode(False)
    def fit(
        self,
        X: Tensor,
        y: Tensor,
        lr: float = 0.01,
        steps: int = 100,
        batch_size: int | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        optimizer: str = "sgd",
        seed: int = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> PathKernel:
        """Train the model in place, from its current parameters, and keep the path.

        Updates are those of ``torch.optim.SGD`` and ``torch.optim.Adam``. Ctrl-C leaves the model, and this object, at
        the last complete step, and is raised again; a training that diverges leaves both as they were.

        Args:
            X: (N, ...) examples.
            y: (N,) or (N, 1), or (N, C) as the model's outputs, floating, for "mse" and "bce" (there in [0, 1]); (N,)
                class indices for "ce".
            lr: Learning rate, of the MEAN loss.
            steps: Number of updates.
            batch_size: Examples per step; None takes all. Each epoch is a new order, what does not fill a batch is left
                out.
            momentum: Of "sgd", in [0, 1).
            weight_decay: L2 penalty, added to the gradient; its effect is a term of its own, :meth:`decay_term`.
            optimizer: "sgd" or "adam".
            seed: Of the order of the batches.
            betas: Of "adam".
            eps: Of "adam".

        Returns:
            self.

        Raises:
            TypeError: Wrong kind of argument or dtype.
            ValueError: A value or shape out of range, NaN, no example; a model that cannot take X, is random, lets the
                output of an example depend on the others, whose outputs have no gradient, or that uses checkpointing.
            FloatingPointError: The training diverged; names the step.
        """
        settings = self._settings(lr, steps, momentum, weight_decay, optimizer, betas, eps)
        check_model(self.model)
        check_inputs("X", X, self.model)
        if not len(X):
            raise ValueError("X must have at least one example; got none")
        batches = self._batches(len(X), steps, batch_size, seed, X.device)
        X = X.detach().clone()  # first of all: a model may change its inputs in place
        check_rows(self.model, X.clone())
        # a copy, so that what the caller does to the model afterwards does not change the explanation
        gradients = Gradients(copy.deepcopy(self.model), X)
        targets = check_targets(self.loss, y, X, gradients.width, gradients.squeezed, gradients.parameters[0].dtype)
        path, stopped = train(gradients, settings, X, targets, batches, self.memory)
        if path.steps:
            self._path, self._gradients, self._known = path, gradients, None
            self.losses_, self.n_steps_ = path.losses, path.steps
            self.batches_ = torch.arange(len(X)).expand(steps, -1) if batches is None else batches
            self.batches_ = self.batches_[: path.steps]
            with torch.no_grad():
                trained = [p for p in self.model.parameters() if p.requires_grad]
                for p, value in zip(trained, gradients.split(path.last), strict=True):
                    p.copy_(value)
        if stopped is not None:
            raise stopped
        return self

    def _settings(
        self, lr: Any, steps: Any, momentum: Any, weight_decay: Any, optimizer: Any, betas: Any, eps: Any
    ) -> Settings:
        check_real("lr", lr, above=0.0)
        check_int("steps", steps, 1)
        check_choice("optimizer", optimizer, ("sgd", "adam"))
        check_real("weight_decay", weight_decay, minimum=0.0)
        check_real("momentum", momentum, minimum=0.0)
        if momentum >= 1:
            raise ValueError(f"momentum must be below 1; got {momentum!r}")
        if momentum and optimizer == "adam":
            raise ValueError(f"momentum belongs to 'sgd'; with 'adam' it must be 0, got {momentum!r}")
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise TypeError(f"betas must be two numbers; got {betas!r}")
        for number, beta in enumerate(betas):
            check_real(f"betas[{number}]", beta, minimum=0.0)
            if beta >= 1:
                raise ValueError(f"betas[{number}] must be below 1; got {beta!r}")
        check_real("eps", eps, minimum=0.0)
        pair = (float(betas[0]), float(betas[1]))
        return Settings(
            self.loss, float(lr), int(steps), float(momentum), float(weight_decay), optimizer, pair, float(eps)
        )

    @staticmethod
    def _batches(n: int, steps: int, size: Any, seed: int, device: torch.device) -> Tensor | None:
        check_seed(seed)
        if size is None:
            return None
        check_int("batch_size", size, 1)
        if size > n:
            raise ValueError(f"batch_size must be at most {n}, the number of examples; got {size}")
        if size == n:  # the sum over the batch has no order
            return None
        order = np.stack([batch_indices(seed, step, size, n, drop_last=True) for step in range(steps)])
        return torch.from_numpy(order).to(device)

    # --- explanations -----------------------------------------------------------------------------------------------

    def contributions(self, X_test: Tensor) -> Tensor:
        """What each training example added to each output: c_i(x).

        Args:
            X_test: (M, ...) points, shaped like the training examples.

        Returns:
            (M, N), or (M, N, C) for a model with outputs (N, C), in the model's dtype (added up in float64). Examples
            that were never in a batch have 0. Computed once for the same points: a pass over the path.

        Raises:
            RuntimeError: Before :meth:`fit`.
            TypeError: Wrong kind of points.
            ValueError: Points of another shape, NaN.

        The other explanations take the same points and raise the same errors.
        """
        return self._shaped(self._explain(X_test)["shares"])

    def f0(self, X_test: Tensor) -> Tensor:
        """The model's outputs before the training: (M,) or (M, C), the beta of the kernel machine."""
        return self._shaped(self._explain(X_test)["before"])

    def decay_term(self, X_test: Tensor) -> Tensor:
        """What weight decay added to each output: (M,) or (M, C); 0 without weight decay."""
        return self._shaped(self._explain(X_test)["decay"])

    def reconstruct(self, X_test: Tensor) -> Tensor:
        """f_0 + sum of the contributions + the decay term: (M,) or (M, C), to be compared with the model's outputs."""
        return self._shaped(self._sum(self._explain(X_test)))

    def error(self, X_test: Tensor) -> float:
        """Relative error of the reconstruction: ||reconstruct - f_T|| / ||f_T - f_0||, Euclidean over all outputs.

        f_T and f_0 are run in the model's dtype. 0.0 for no points, and where nothing changed and nothing was added up
        to rounding; infinite where nothing changed but something was added.
        """
        known = self._explain(X_test)
        off = float((self._sum(known) - known["after"].double()).norm())
        change = float((known["after"].double() - known["before"].double()).norm())
        if change == 0:
            rounding = 64 * torch.finfo(known["after"].dtype).eps * float(known["after"].norm())
            return 0.0 if off <= rounding else float("inf")
        return off / change

    def kernel(self, X_test: Tensor) -> Tensor:
        """The path kernel K(x, x_i): the sum over the steps of lr / n <grad f(x), grad f(x_i)>.

        grad f(x) is the mean over the chord of the step, grad f(x_i) is taken at its start; with momentum and Adam it
        is the kernel of the share that the example had in the steps. Not symmetric in general.

        Returns:
            (M, N), or (M, N, C, C): output of the test point, output of the example.
        """
        out = self._kernel(X_test)
        return (out[:, :, 0, 0] if self._gradients.squeezed else out).to(self._gradients.parameters[0].dtype)

    def alpha(self, X_test: Tensor) -> Tensor:
        """The coefficients of the kernel machine: contributions = K alpha, a weighted average of -l'_i over the path.

        They depend on x. Where the kernel changes its sign along the path, K can be 0 or singular, the contribution
        not: no alpha exists then, which gives NaN and one warning with the number of such places. Where both are 0 (an
        example that was in no batch) alpha is 0. Near a zero of K alpha is large: use the contributions.

        Returns:
            (M, N), or (M, N, C).
        """
        shares = self._explain(X_test)["shares"]
        kernel = self._kernel(X_test)
        if not len(X_test):
            return self._shaped(shares)
        eps = torch.finfo(self._gradients.parameters[0].dtype).eps
        tolerance = (
            64 * eps * kernel.abs().amax((1, 2, 3), keepdim=True)
        )  # below it a kernel is a rounding error of the sum
        if self._gradients.width == 1:
            zero = (kernel.abs() <= tolerance)[..., 0]
            alpha = (shares / kernel[..., 0].masked_fill(zero, 1)).masked_fill(zero, 0)
            off = (shares.abs() > 64 * eps * shares.abs().amax(1, keepdim=True)) & zero
        else:
            alpha = (torch.linalg.pinv(kernel, atol=tolerance[..., 0, 0].expand(kernel.shape[:2])) @ shares[..., None])[
                ..., 0
            ]
            rest = ((kernel @ alpha[..., None])[..., 0] - shares).abs()
            off = (rest > eps**0.5 * shares.abs().amax(1, keepdim=True)).any(-1, keepdim=True).expand_as(rest)
        if bool(off.any()):
            warnings.warn(
                f"alpha does not exist at {int(off.any(-1).sum())} of {off[..., 0].numel()} places, where the path "
                "kernel is 0 and the contribution is not; it is NaN there: use contributions",
                stacklevel=2,
            )
        return self._shaped(alpha.masked_fill(off, torch.nan))

    # --- inside -----------------------------------------------------------------------------------------------------

    def _fitted(self, X_test: Tensor) -> Path:
        if self._path is None:
            raise RuntimeError("fit must be called first: there is no training to explain")
        check_inputs("X_test", X_test, self._gradients.model, self._path.x)
        return self._path

    @torch.inference_mode(False)  # gradients are needed wherever the caller is
    def _explain(self, X_test: Tensor) -> dict[str, Tensor]:
        """Everything about the points but the kernel; kept for the last ones asked for."""
        path = self._fitted(X_test)
        if self._known is not None and torch.equal(self._known["x"], X_test):
            return self._known
        gradients, x = self._gradients, X_test.detach().clone()
        before, after = (gradients.outputs(theta, x) for theta in (path.first, path.last))
        if len(x):
            shares, decay = contributions(path, gradients, x, self.rule, kernel=False)
            shares = shares.transpose(1, 2)
        else:
            shares = torch.zeros(0, len(path.x), gradients.width, dtype=torch.float64, device=x.device)
            decay = shares[:, 0]
        self._known = {"x": x, "before": before, "after": after, "shares": shares, "decay": decay}
        return self._known

    @torch.inference_mode(False)
    def _kernel(self, X_test: Tensor) -> Tensor:
        """(M, N, C, C) in float64."""
        path, gradients = self._fitted(X_test), self._gradients
        if not len(X_test):
            return torch.zeros(0, len(path.x), gradients.width, gradients.width, dtype=torch.float64)
        return contributions(path, gradients, X_test.detach().clone(), self.rule, kernel=True)[0].transpose(1, 2)

    @staticmethod
    def _sum(known: dict[str, Tensor]) -> Tensor:
        return known["before"].double() + known["shares"].sum(1) + known["decay"]

    def _shaped(self, values: Tensor) -> Tensor:
        """Without the axis of one output, in the model's dtype."""
        values = values[..., 0] if self._gradients.squeezed else values
        return values.to(self._gradients.parameters[0].dtype, copy=True)  # what is known stays as it is
