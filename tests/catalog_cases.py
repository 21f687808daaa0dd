"""What the shared catalogue tests (test_catalog.py) run for each method: add one row per method.

A case builds one component with small inputs. The shared tests then check it in every dtype, on one row and on
none, for independence of rows, determinism, float64 gradients, `torch.compile(fullgraph=True)` and a state_dict round
trip, as far as the case says that they apply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TensorCase:
    """A tensor function (or Module) whose inputs have rows on their first axis.

    Attributes:
        name: Shown in the test id.
        build: ``build(rows, dtype, generator) -> (function, inputs)``: ``function(*inputs)`` returns a tensor; floating
            inputs are differentiated. It must work for rows = 1; what rows = 0 gives is said by ``empty``.
        empty: "value" (a finite tensor or an empty one comes back) or the exception type that rows = 0 raises.
        row_independent: With ``reduction="none"`` style output of shape (rows, ...), row i depends on row i only.
        dtypes: Names of the supported floating dtypes.
        compile: Whether `torch.compile(fullgraph=True)` is promised.
        module: The function is an nn.Module with a state_dict to be round-tripped.
    """

    name: str
    build: Callable[..., tuple[Callable[..., Any], tuple[Any, ...]]]
    empty: str | type[Exception] = "value"
    row_independent: bool = False
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16", "float16")
    compile: bool = True
    module: bool = False


@dataclass(frozen=True)
class EstimatorCase:
    """A scikit-learn style estimator.

    Attributes:
        name: Shown in the test id.
        build: ``build(seed) -> (estimator, data)``: unfitted; ``estimator.fit(data)`` must return the estimator.
        output: ``output(fitted) -> numpy array`` compared between two fits with equal seeds and after save and load.
        empty: ``data`` without any content; fitting it must raise ValueError.
        save_load: ``save_load(fitted, folder) -> loaded``; None when the estimator has no file format.
    """

    name: str
    build: Callable[[int], tuple[Any, Any]]
    output: Callable[[Any], Any]
    empty: Any
    save_load: Callable[[Any, Any], Any] | None = None


def _sentences(seed: int) -> list[str]:
    import numpy as np

    words = np.minimum(np.random.default_rng(seed).zipf(1.5, (60, 20)), 30)
    return [" ".join(f"w{k}" for k in row) for row in words]


def _pmi_embedding(solver: str) -> Callable[[int], tuple[Any, Any]]:
    def build(seed: int) -> tuple[Any, Any]:
        from kexue.words import CooccurrenceCounter, PMIEmbedding

        counter = CooccurrenceCounter(window=3, min_count=1)
        return PMIEmbedding(dim=8, solver=solver, reg=0.1, x_max=5, random_state=seed, counter=counter), _sentences(
            seed
        )

    return build


def _save_load_vectors(model: Any, folder: Any) -> Any:
    model.save(folder / "vectors")
    return type(model).load(folder / "vectors")


def _counter(seed: int) -> tuple[Any, Any]:
    from kexue.words import CooccurrenceCounter

    return CooccurrenceCounter(window=3, min_count=1), _sentences(seed)


CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _labels(rows: int, classes: int, generator: Any) -> Any:
    import torch

    return torch.randint(classes, (rows,), generator=generator)


def _normal(*shape: int, dtype: Any, generator: Any) -> Any:
    import torch

    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def _margin(kind: str, reduction: str) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        from kexue.losses import margin_softmax_loss

        weight = _normal(9, 5, dtype=dtype, generator=generator)
        inputs = (_normal(rows, 5, dtype=dtype, generator=generator), _labels(rows, 9, generator), weight)
        return lambda z, y, w: margin_softmax_loss(z, w, y, kind, 10.0, reduction=reduction), inputs

    return build


def _margin_head(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.losses import MarginSoftmax

    head = MarginSoftmax(5, 9, scale=10.0, reduction="none").to(dtype)
    with torch.no_grad():
        head.weight.copy_(_normal(9, 5, dtype=dtype, generator=generator))
    return head, (_normal(rows, 5, dtype=dtype, generator=generator), _labels(rows, 9, generator))


def _margin_cosines(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.losses import margin_cross_entropy

    cosines = _normal(rows, 9, dtype=dtype, generator=generator).tanh()
    inputs = (cosines, _labels(rows, 9, generator))
    return lambda c, y: margin_cross_entropy(c, y, "arc", 10.0, reduction="none"), inputs


def _margin_soft(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.losses import margin_softmax_loss

    soft = _normal(rows, 9, dtype=dtype, generator=generator).softmax(-1)
    weight = _normal(9, 5, dtype=dtype, generator=generator)
    z = _normal(rows, 5, dtype=dtype, generator=generator)
    return lambda a, w: margin_softmax_loss(a, w, soft.to(a.dtype), "am", 10.0), (z, weight)


def _flat_scores(mode: str) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        from kexue.losses import flat_cross_entropy

        inputs = (_normal(rows, 6, dtype=dtype, generator=generator), _labels(rows, 6, generator))
        return lambda s, t: flat_cross_entropy(s, t, mode=mode, reduction="none"), inputs

    return build


def _info_nce(shared: bool, **options: Any) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        from kexue.losses import info_nce

        q, k = (_normal(rows, 5, dtype=dtype, generator=generator) for _ in range(2))
        negatives = _normal(4, 5, dtype=dtype, generator=generator)
        if shared:
            return lambda a, b, n: info_nce(a, b, n, temperature=0.3, **options), (q, k, negatives)
        return lambda a, b: info_nce(a, b, negatives.to(a.dtype), temperature=0.3, in_batch=True, **options), (q, k)

    return build


def _views(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.losses import nt_xent

    extra = _normal(2, 2, 5, dtype=dtype, generator=generator)  # one pair alone has no negatives, by design

    def function(a: Any, b: Any) -> Any:
        more = extra.to(a.dtype)
        return nt_xent(torch.cat([a, more[0]]), torch.cat([b, more[1]]), 0.3)

    return function, tuple(_normal(rows, 5, dtype=dtype, generator=generator) for _ in range(2))


def _flat_module(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.losses import FlatNCELoss

    module = FlatNCELoss(0.3)
    q, k = (_normal(rows, 5, dtype=dtype, generator=generator) for _ in range(2))
    return module, (q, k, _normal(4, 5, dtype=dtype, generator=generator))


CASES["margin-softmax"] = [
    *(TensorCase(kind, _margin(kind, "none"), row_independent=True) for kind in ("am", "arc", "a", "metric")),
    TensorCase("mean", _margin("simpler_a", "mean")),
    TensorCase("head", _margin_head, row_independent=True, module=True),
    TensorCase("cosines", _margin_cosines, row_independent=True),
    TensorCase("soft labels", _margin_soft),
]
CASES["flatnce"] = [
    TensorCase("scores", _flat_scores("flat"), row_independent=True),
    TensorCase("scores info", _flat_scores("info"), row_independent=True),
    TensorCase("shared negatives", _info_nce(True, reduction="none"), row_independent=True),
    TensorCase("in batch", _info_nce(False, mode="flat")),
    TensorCase("views", _views),
    TensorCase("module", _flat_module, module=True),
]
CASES["geometric-word-vectors"] = [
    EstimatorCase("CooccurrenceCounter", _counter, lambda fitted: fitted.matrix_.toarray(), []),
    *(
        EstimatorCase(
            f"PMIEmbedding-{solver}", _pmi_embedding(solver), lambda fitted: fitted.vectors_, [], _save_load_vectors
        )
        for solver in ("als", "adagrad", "spectral")
    ),
]


def _spaceless(seed: int) -> list[str]:
    return [line.replace(" ", "") for line in _sentences(seed)]


def _gram_counter(seed: int) -> tuple[Any, Any]:
    from kexue.words import NGramCounter

    return NGramCounter(order=3), _spaceless(seed)


def _word_discovery(method: str) -> Callable[[int], tuple[Any, Any]]:
    def build(seed: int) -> tuple[Any, Any]:
        from kexue.words import WordDiscovery

        return WordDiscovery(min_count=3, method=method), _spaceless(seed)

    return build


def _phrases(seed: int) -> tuple[Any, Any]:
    from kexue.words import PhraseMiner

    return PhraseMiner(min_count=2, min_npmi=0.0), [line.split() for line in _sentences(seed)]


def _templates(count: str) -> Callable[[int], tuple[Any, Any]]:
    def build(seed: int) -> tuple[Any, Any]:
        from kexue.words import TemplateMiner

        return TemplateMiner(min_support=2, min_pmi=0.5, window=3, count=count), _sentences(seed)

    return build


def _save_load_json(model: Any, folder: Any) -> Any:
    model.save(folder / "model.json")
    return type(model).load(folder / "model.json")


def _gram_counts(fitted: Any) -> Any:
    import numpy as np

    return np.array([f"{gram} {count}" for n in (1, 2, 3) for gram, count in fitted.items(n)])


def _rows(attribute: str) -> Callable[[Any], Any]:
    def output(fitted: Any) -> Any:
        import numpy as np

        found = getattr(fitted, attribute)
        return np.array([repr(row) for row in (found.items() if isinstance(found, dict) else found)])

    return output


CASES["sentence-templates"] = [
    EstimatorCase("NGramCounter", _gram_counter, _gram_counts, []),
    *(
        EstimatorCase(f"WordDiscovery-{method}", _word_discovery(method), _rows("vocabulary_"), [])
        for method in ("solidity", "adjacent")
    ),
    EstimatorCase("PhraseMiner", _phrases, _rows("phrases_"), [], _save_load_json),
    *(
        EstimatorCase(f"TemplateMiner-{count}", _templates(count), _rows("templates_"), [], _save_load_json)
        for count in ("sentences", "paths")
    ),
]
