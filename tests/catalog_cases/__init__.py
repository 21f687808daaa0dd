"""What the shared catalogue tests (test_catalog.py) run for each method, one row per method.

A case builds one component with small inputs. The shared tests then check it in every dtype, on one row and on
none, for independence of rows, determinism, float64 gradients, `torch.compile(fullgraph=True)` and a state_dict round
trip, as far as the case says that they apply. Every module beside ``base`` holds ``CASES`` of some methods.
"""

import importlib
import pkgutil

from catalog_cases.base import EstimatorCase, TensorCase

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}
for _module in pkgutil.iter_modules(__path__):
    if _module.name != "base":
        for _slug, _cases in importlib.import_module(f"catalog_cases.{_module.name}").CASES.items():
            CASES.setdefault(_slug, []).extend(_cases)

__all__ = ["CASES", "EstimatorCase", "TensorCase"]
