"""Where functions keep the models whose mode decides what they return."""

import functools

import pytest
import torch
from torch import nn

from kexue.explain import integrated_gradients


class Holder:
    def __init__(self, module):
        self.module = module

    def __call__(self, v):
        return self.module(v)


@pytest.mark.parametrize("kind", ["object", "closure", "list", "dict", "keyword", "nested", "wrapped"])
def test_models_are_found_where_functions_keep_them(kind):
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    holder, listed, named = Holder(module), [module], {"m": module}

    def keyword(v, *, module=module):
        return module(v)

    f = {
        "object": holder,
        "closure": lambda v: holder.module(v),
        "list": lambda v: listed[0](v),
        "dict": lambda v: named["m"](v),
        "keyword": keyword,
        "nested": lambda v: (lambda w: module(w))(v),
        "wrapped": functools.wraps(module.forward)(lambda v: module(v)),
    }[kind]
    x = torch.tensor([[0.5, -1.0, 2.0, 0.1]])
    random_state = torch.get_rng_state()
    first, second = (integrated_gradients(f, x, target=1) for _ in range(2))
    assert torch.equal(first.attributions, second.attributions)
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(m.training for m in module.modules())
    assert int(module[1].num_batches_tracked) == 0
