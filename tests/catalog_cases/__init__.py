"""What the shared catalogue tests (test_catalog.py) run for each method: one file per room, one row per method.

A case builds one component with small inputs. The shared tests then check it in every dtype, on one row and on
none, for independence of rows, determinism, float64 gradients, `torch.compile(fullgraph=True)` and a state_dict round
trip, as far as the case says that they apply.
"""

from catalog_cases import attention, losses, models, words
from catalog_cases.base import EstimatorCase, TensorCase

CASES = {**words.CASES, **attention.CASES, **losses.CASES, **models.CASES}

__all__ = ["CASES", "EstimatorCase", "TensorCase"]
