"""Per-example gradients of a model at many points of its training path at once, as layers' inputs and output gradients.

:class:`Gradients` runs a model for K parameter vectors in one call. If all trained parameters have a layer form, the
points are so many more rows of one batch (``_stacked.py``). Otherwise it is ``torch.vmap`` over the parameters: the
input of a layer comes from a hook, the gradient of its output from a tensor of zeros that is added to it. Parameters
without a layer form (used directly, tied, or of other modules) get per-example gradients by ``vmap(grad)``, and so do
layers whose gradients turn out not to be those of autograd, which is checked once. What vmap cannot run is run point by
point.

Letters: K points on the path = k steps times q points of the quadrature, R rows (examples), C outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from kexue.explain._layers import Layer, Side, inner, layer_of, pairs
from kexue.explain._stacked import replaced

__all__ = ["Gradients", "Sides", "Use"]

Tap = Callable[[int, Tensor, Tensor], Tensor | None]
Upstream = Callable[[Tensor], Tensor]
_ROWS = 3  # examples of the check


@dataclass
class Use:
    """One call of a layer: what the rest of the model does with rows and shapes.

    Attributes:
        layer: Number of the layer.
        repeat: Leading entries per example (more than 1 where a model folds time into the batch).
        a: Shape of the input behind the rows.
        z: Shape of the output behind the rows.
        constant: The input does not depend on the parameters.
    """

    layer: int
    repeat: int
    a: tuple[int, ...]
    z: tuple[int, ...]
    constant: bool = False


@dataclass
class Sides:
    """What some rows left at all layers, and their gradients (k, C R, p) for the loose parameters."""

    layers: list[Side]
    loose: list[Tensor]


class Gradients:
    """The per-example gradients of a model, which this object owns.

    Args:
        model: A copy of the user's model.
        x: Training inputs; some rows serve the check.

    Raises:
        TypeError: The model does not return a tensor of its parameters' dtype.
        ValueError: It does not return (N,), (N, 1) or (N, C), or gradients are missing or not those of the parameters.

    Attributes:
        width: C, outputs per example (1 for outputs (N,) and (N, 1)).
        squeezed: Whether outputs are (N,) or (N, 1).
        layers: Number -> layer form.
        loose: Names of the trainable parameters without a layer form.
        uses: Calls of the layers, in the order of the forward pass.
        slices: Where the parameter of each part lies in the flat vector; parts are those of the layers, then the loose.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model = model
        found = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names = list(found)
        self.shapes = [tuple(p.shape) for p in found.values()]
        self.sizes = [p.numel() for p in found.values()]
        self.parameters = list(found.values())
        self._batched = self._batched_loose = self._stacked = False
        rows = x[torch.arange(_ROWS, device=x.device) * (len(x) - 1) // (_ROWS - 1)]  # from the first to the last
        with torch.no_grad():
            out = model(rows)
        self._check_output(out)
        self._check_gradients(rows)
        self.squeezed = out.dim() == 1 or out.shape[1] == 1
        self.width = 1 if out.dim() == 1 else int(out.shape[1])
        self.uses: list[Use] = []
        self._find_layers()
        self._find_uses(rows)
        self._drop_wrong_layers(rows)
        covered = {name for layer in self.layers.values() for name in layer.names}
        self.loose = [name for name in self.names if name not in covered]
        self._try_batched(rows)
        ends = [0]
        for size in self.sizes:
            ends.append(ends[-1] + size)
        place = {name: slice(ends[i], ends[i + 1]) for i, name in enumerate(self.names)}
        order = [name for layer in self.layers.values() for name in layer.names] + self.loose
        self.slices = [place[name] for name in order]

    def _check_output(self, out: Any) -> None:
        if not isinstance(out, Tensor):
            raise TypeError(f"the model must return a tensor; got {type(out).__name__}")
        if out.shape[:1] != (_ROWS,) or out.dim() > 2 or out.numel() == 0:
            raise ValueError(f"the model must return (N,), (N, 1) or (N, C); got {tuple(out.shape)} for N = {_ROWS}")
        if out.dtype != self.parameters[0].dtype:
            raise TypeError(f"the model must return {self.parameters[0].dtype}, like its parameters; got {out.dtype}")

    @torch.enable_grad()
    def _check_gradients(self, rows: Tensor) -> None:
        """There are some, and they follow parameters that are passed instead of the model's own."""
        start, theta = self.theta(), self._nearby(2)
        self.move(theta)
        out = self.model(rows)
        if out.requires_grad:
            exact = torch.autograd.grad(out, self.parameters, torch.ones_like(out), allow_unused=True)
        if not out.requires_grad or all(g is None for g in exact):  # or a forward bound to another object
            raise ValueError("the outputs must depend on the trained parameters; got outputs without their gradients")
        self.move(start)
        values = [v.clone().requires_grad_() for v in self.split(theta)]
        out = functional_call(self.model, dict(zip(self.names, values, strict=True)), (rows,))
        passed = torch.autograd.grad(out, values, torch.ones_like(out), allow_unused=True)
        allowed = torch.finfo(theta.dtype).eps ** 0.5 * sum(g.abs().sum() for g in exact if g is not None)
        for name, a, b in zip(self.names, exact, passed, strict=True):
            if (a is None) != (b is None) or (a is not None and b is not None and bool((a - b).abs().sum() > allowed)):
                raise ValueError(
                    f"gradients must follow the parameters that the model is run with; got others for {name}: turn "
                    "checkpointing off, which runs layers again with the parameters of then"
                )

    # --- parameters -------------------------------------------------------------------------------------------------

    def theta(self) -> Tensor:
        """The current parameters as one vector (P,)."""
        return torch.cat([p.detach().reshape(-1) for p in self.parameters])

    def _nearby(self, seed: int) -> Tensor:
        """(P,) parameters near the current ones, none of them 0: what starts at 0 hides what lies before it."""
        theta = self.theta()
        random = torch.randn(len(theta), generator=torch.Generator().manual_seed(seed), dtype=theta.dtype)
        return theta + random.to(theta.device) * (float(theta.abs().mean()) or 1.0) / 8

    def split(self, theta: Tensor) -> list[Tensor]:
        """(..., P) -> views (..., *shape), one per parameter."""
        lead = theta.shape[:-1]
        return [v.view(lead + s) for v, s in zip(theta.split(self.sizes, -1), self.shapes, strict=True)]

    def move(self, theta: Tensor) -> None:
        """Set the parameters of the model to views of ``theta`` (P,)."""
        for p, value in zip(self.parameters, self.split(theta), strict=True):
            p.data = value

    @torch.no_grad()
    def outputs(self, theta: Tensor, x: Tensor) -> Tensor:
        """(R, C): the model's outputs at ``theta`` (P,)."""
        self.move(theta)
        return torch.cat([self.model(rows).reshape(len(rows), self.width) for rows in x.split(1024)])

    # --- which layers -----------------------------------------------------------------------------------------------

    def _find_layers(self) -> None:
        owners: dict[int, int] = {}
        for module in self.model.modules():
            for p in module._parameters.values():
                owners[id(p)] = owners.get(id(p), 0) + 1
        trained = {id(p): name for p, name in zip(self.parameters, self.names, strict=True)}
        self.layers: dict[int, Layer] = {}
        for module in self.model.modules():
            own = {key: p for key, p in module._parameters.items() if id(p) in trained}
            layer = layer_of(module, {key: trained[id(p)] for key, p in own.items()})
            if layer is not None and all(owners[id(p)] == 1 for p in own.values()):  # else tied to another module
                self.layers[len(self.layers)] = layer

    @contextmanager
    def tapped(self, tap: Tap) -> Iterator[None]:
        """Call ``tap(layer, input, output)`` at every layer; what it returns replaces the output."""
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder layer calls no submodule

        def hook_of(number: int) -> Callable[..., Tensor | None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
                return tap(number, args[0] if args else kwargs["input"], output)

            return hook

        handles = [
            layer.module.register_forward_hook(hook_of(number), with_kwargs=True)
            for number, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            torch.backends.mha.set_fastpath_enabled(fast)

    def _drop(self, numbers: set[int]) -> None:
        self.layers = {number: layer for number, layer in self.layers.items() if number not in numbers}
        self.uses = [use for use in self.uses if use.layer not in numbers]

    def _find_uses(self, rows: Tensor) -> None:
        wrong: set[int] = set()

        def look(number: int, a: Tensor, z: Tensor) -> Tensor | None:
            if self.layers[number].accepts(a, z) and z.shape[0] % len(rows) == 0:
                self.uses.append(Use(number, z.shape[0] // len(rows), tuple(a.shape[1:]), tuple(z.shape[1:])))
            else:
                wrong.add(number)
            return None

        with torch.no_grad(), self.tapped(look):
            self.model(rows)
        self._drop(wrong | (set(self.layers) - {use.layer for use in self.uses}))

    def _drop_wrong_layers(self, rows: Tensor) -> None:
        """Compare with autograd, for single rows: time before batch, or a weight that is also used directly."""
        theta, count = self._nearby(2), len(rows)
        start = self.theta()
        self.move(theta)
        self.loose = []
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(self.width, generator=generator, dtype=theta.dtype).to(theta.device)
        wrong: set[int] = set()
        unseen, eps = set(self.names), torch.finfo(theta.dtype).eps  # a gradient of 0 shows nothing
        for row in (0, count - 1):
            upstream = torch.zeros(count, self.width, dtype=theta.dtype, device=theta.device)
            upstream[row] = random
            with torch.enable_grad():
                out = self.model(rows).reshape(count, -1)
                exact = torch.autograd.grad(out, self.parameters, upstream, allow_unused=True)
            truth = dict(zip(self.names, exact, strict=True))
            rounding = 16 * eps * max(float(g.abs().max()) for g in exact if g is not None and g.numel())
            unseen -= {name for name, own in truth.items() if own is None or not own.numel() or bool(own.any())}
            _, sides = self.sides(theta[None], rows, lambda _out, u=upstream: u[None, None])  # type: ignore[misc]
            for side, (number, layer) in zip(sides.layers, self.layers.items(), strict=True):
                for name, part in zip(layer.names, layer.gradients(side), strict=True):
                    expected, own = torch.zeros_like(part[0]), truth[name]
                    if not expected.numel():
                        continue
                    if own is not None:
                        expected[row] = own.reshape(-1)
                    allowed = eps**0.5 * expected.abs().max() + rounding
                    if not bool((part[0] - expected).abs().max() <= allowed):
                        wrong.add(number)
        self._drop(wrong | {number for number, layer in self.layers.items() if unseen & set(layer.names)})
        self.move(start)

    def _try_batched(self, rows: Tensor) -> None:
        """Whether one call runs the model at many points, and which inputs do not depend on the parameters."""
        two = torch.stack([self.theta(), self._nearby(1)])
        alone = self._forward(two, rows)[0].detach()
        close = torch.finfo(two.dtype).eps ** 0.5
        self._batched = True
        try:
            together, _, inputs = self._forward(two, rows)
            self._batched = torch.allclose(together.detach(), alone, rtol=close, atol=close)
            for use, a in zip(self.uses, inputs, strict=True):
                use.constant = self._batched and a.stride(0) == 0
        except Exception:  # whatever the model does that vmap does not know
            self._batched = False
        upstream = torch.ones(1, *alone.shape, dtype=alone.dtype, device=alone.device)
        if self.loose:
            self._batched_loose = True
            try:
                self._loose_gradients(two, rows[None].expand(2, *rows.shape), upstream)
            except Exception:
                self._batched_loose = False
        elif len(self.layers):
            exact = self.sides(two, rows, lambda _: upstream)[1]
            self._stacked = True
            try:
                out, sides = self.sides(two, rows, lambda _: upstream)
                self._stacked = torch.allclose(out, alone, rtol=close, atol=close) and all(
                    torch.allclose(x, y, rtol=close, atol=close)
                    for a, b in zip(self.gradients(sides), self.gradients(exact), strict=True)
                    for x, y in zip(a, b, strict=True)
                )
            except Exception:  # a model that wants its own number of rows
                self._stacked = False

    # --- gradients --------------------------------------------------------------------------------------------------

    def _forward(self, thetas: Tensor, x: Tensor, each: bool = False) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Outputs (K, R, C), the zeros added to the layers' outputs, and the layers' inputs (K, R t, ...)."""
        count, rows = len(thetas), x.shape[1] if each else len(x)
        zeros = [thetas.new_zeros(count, rows * use.repeat, *use.z).requires_grad_() for use in self.uses]

        def run(parameters: dict[str, Tensor], added: list[Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
            seen: list[Tensor] = []

            def tap(_number: int, a: Tensor, z: Tensor) -> Tensor:
                seen.append(a)
                return z + added[len(seen) - 1]

            with self.tapped(tap):
                out = functional_call(self.model, parameters, (x,))
            return out.reshape(rows, -1), seen

        values = dict(zip(self.names, self.split(thetas), strict=True))
        with torch.enable_grad():
            if self._batched:
                with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no rule for vmap
                    out, seen = vmap(run, (0, 0, 0 if each else None))(values, zeros, x)
            else:
                made = [
                    run({n: v[j] for n, v in values.items()}, [z[j] for z in zeros], x[j] if each else x)
                    for j in range(count)
                ]
                out = torch.stack([one[0] for one in made])
                seen = [torch.stack(a) for a in zip(*(one[1] for one in made), strict=True)]
        return out, zeros, [a.detach() for a in seen]

    def sides(
        self,
        thetas: Tensor,
        x: Tensor,
        upstream: Upstream,
        q: int = 1,
        each: bool = False,
        repeated: Tensor | None = None,
    ) -> tuple[Tensor, Sides]:
        """Run the model and keep what inner products of gradients need.

        Args:
            thetas: (k q, P) parameter vectors, the q points of a step next to each other.
            x: (R, ...) inputs; (K, R, ...) with ``each``: other rows at each point.
            upstream: Outputs (K, R, C) -> gradients with respect to them (U, K, R, C), U of them.
            q: Points per step; gradients are summed over them.
            each: See ``x``.
            repeated: (K R, ...) the inputs of all points, if they are at hand.

        Returns:
            Outputs (K, R, C), and what the rows left.
        """
        if self._stacked:
            return self._stacked_sides(thetas, x, upstream, q, each, repeated)
        out, zeros, inputs = self._forward(thetas, x, each)
        weights = upstream(out.detach())
        taken: list[list[Tensor]] = []
        if zeros:
            for number, weight in enumerate(weights):
                more = number + 1 < len(weights)
                grads = torch.autograd.grad(out, zeros, weight, retain_graph=more, allow_unused=True)
                taken.append([torch.zeros_like(z) if g is None else g for g, z in zip(grads, zeros, strict=True)])
        stacked = [g[0][:, None] if len(g) == 1 else torch.stack(g, 1) for g in zip(*taken, strict=True)]
        sides = Sides(self.sides_of(inputs, stacked, out.shape[1], q, each), [])
        if self.loose:
            rows = x if each else x[None].expand(len(thetas), *x.shape)
            for part in self._loose_gradients(thetas, rows, weights):
                sides.loose.append(part.unflatten(0, (-1, q)).sum(1).flatten(1, 2))
        return out.detach(), sides

    def _stacked_sides(
        self, thetas: Tensor, x: Tensor, upstream: Upstream, q: int, each: bool, repeated: Tensor | None
    ) -> tuple[Tensor, Sides]:
        """The same for a model of layers only: the points are so many more rows of one batch."""
        count, rows = len(thetas), x.shape[1] if each else len(x)
        values = dict(zip(self.names, self.split(thetas), strict=True))
        one = thetas.new_zeros(()).requires_grad_()
        inputs: list[Tensor] = []
        grads: list[Tensor | None] = []
        if repeated is None:
            repeated = (x if each else x[None].expand(count, *x.shape)).flatten(0, 1)
        with torch.enable_grad(), replaced(self.layers.values(), values, count, one, inputs, grads):
            out = self.model(repeated).reshape(count, rows, -1)
        weights = upstream(out.detach())
        taken: list[list[Tensor]] = []
        shapes = [(count, rows * use.repeat, *use.z) for use in self.uses]
        for number, weight in enumerate(weights):
            grads[:] = [None] * len(inputs)
            torch.autograd.grad(out, one, weight, retain_graph=number + 1 < len(weights), allow_unused=True)
            pairs = zip(grads, shapes, strict=True)
            taken.append([thetas.new_zeros(shape) if g is None else g.reshape(shape) for g, shape in pairs])
        stacked = [g[0][:, None] if len(g) == 1 else torch.stack(g, 1) for g in zip(*taken, strict=True)]
        inputs = [a.unflatten(0, (count, -1)) for a in inputs]
        return out.detach(), Sides(self.sides_of(inputs, stacked, rows, q, each), [])

    def sides_of(
        self, inputs: list[Tensor], grads: list[Tensor], rows: int, q: int = 1, each: bool = False
    ) -> list[Side]:
        """Sides of the layers from the inputs (K, R t, ...) and output gradients (K, U, R t, ...) of their uses."""
        made: dict[int, list[tuple[Tensor, Tensor, bool]]] = {number: [] for number in self.layers}
        for use, a, d in zip(self.uses, inputs, grads, strict=True):
            layer, (count, ups) = self.layers[use.layer], d.shape[:2]
            k = count // q
            if use.constant and not each:  # computed once, whatever K
                one = layer.inputs(a[:1].reshape(1, rows, use.repeat, *use.a))
                a = one[None].expand(k, q, *one.shape[1:])
            else:
                a = layer.inputs(a.reshape(count, rows, use.repeat, *use.a)).unflatten(0, (k, q))
            d = layer.outputs(d.reshape(count * ups, rows, use.repeat, *use.z)).unflatten(0, (k, q, ups))
            made[use.layer].append((a, d, use.constant and not each))
        sides = []
        for uses in made.values():  # several uses of a layer are so many more positions
            a = uses[0][0] if len(uses) == 1 else torch.cat([u[0] for u in uses], 3)
            d = uses[0][1] if len(uses) == 1 else torch.cat([u[1] for u in uses], 4)
            sides.append(Side(a, d, all(u[2] for u in uses)))
        return sides

    def _loose_gradients(self, thetas: Tensor, x: Tensor, upstream: Tensor) -> list[Tensor]:
        """(K, U, R, p) for each loose parameter; x (K, R, ...)."""
        values = dict(zip(self.names, self.split(thetas), strict=True))
        loose = {name: values[name] for name in self.loose}
        rest = {name: value for name, value in values.items() if name not in loose}

        def one(own: dict[str, Tensor], others: dict[str, Tensor], row: Tensor, weight: Tensor) -> Tensor:
            return (functional_call(self.model, {**others, **own}, (row[None],)).reshape(-1) * weight).sum()

        if self._batched_loose:
            every = vmap(vmap(grad(one), (None, None, 0, 0)), (0, 0, 0, 0))
            with sdpa_kernel(SDPBackend.MATH):
                found = [every(loose, rest, x, weight) for weight in upstream]
            return [torch.stack([f[name].flatten(2) for f in found], 1) for name in self.loose]
        made = thetas.new_zeros(len(thetas), len(upstream), x.shape[1], sum(v[0].numel() for v in loose.values()))
        for j in range(len(thetas)):
            own = {name: v[j].clone().requires_grad_() for name, v in loose.items()}
            others = {name: v[j] for name, v in rest.items()}
            with torch.enable_grad():
                for r in range(x.shape[1]):
                    out = functional_call(self.model, {**others, **own}, (x[j, r : r + 1],)).reshape(-1)
                    for u in range(len(upstream)):
                        grads = torch.autograd.grad(
                            out, list(own.values()), upstream[u, j, r], retain_graph=True, allow_unused=True
                        )
                        flat = [
                            v.new_zeros(v.numel()) if g is None else g.flatten()
                            for g, v in zip(grads, own.values(), strict=True)
                        ]
                        made[j, u, r] = torch.cat(flat)
        return list(made.split([v[0].numel() for v in loose.values()], -1))

    def inner(self, test: Sides, train: Sides, total: bool) -> Tensor:
        """Inner products of all gradients: (C M, U N) summed over the steps, or (k, C M, U N)."""
        triples = zip(self.layers.values(), test.layers, train.layers, strict=True)
        found = [inner(layer, a, b, total) for layer, a, b in triples]
        if self.loose:
            found.append(pairs(test.loose, train.loose, total))
        out = found[0]
        for more in found[1:]:
            out += more
        return out

    def gradients(self, sides: Sides) -> list[Tensor]:
        """(k, U R, p) for each part, in the order of ``slices``."""
        made: list[Tensor] = []
        for layer, side in zip(self.layers.values(), sides.layers, strict=True):
            made += layer.gradients(side)
        return made + sides.loose

    def layer_sizes(self) -> list[tuple[int, int, int, int]]:
        """Of each use: numbers of a row's input and output, positions, and numbers of a row's gradient matrix."""
        made = []
        for use in self.uses:
            layer = self.layers[use.layer]
            z = use.repeat * math.prod(use.z)
            weight = sum(p.numel() for p in layer.module.parameters(recurse=False))
            made.append((use.repeat * math.prod(use.a), z, z // layer.width(use.z), weight))
        return made

    def loose_size(self) -> int:
        """Number of loose parameters."""
        return sum(p.numel() for p, name in zip(self.parameters, self.names, strict=True) if name in self.loose)
