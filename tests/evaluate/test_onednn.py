"""Linear layers through oneDNN: the same numbers up to rounding, and nothing else touched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lagkv_ext.commands.evaluate import onednn

pytestmark = pytest.mark.skipif(not onednn.available(), reason="this torch has no oneDNN")


class Odd(nn.Linear):
    """A layer that computes something else."""

    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 16), (1, 0, 16), (2, 3, 4, 16)])
def test_results_are_the_layers(shape):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8, bias=False))
    fast = copy.deepcopy(model)
    assert onednn.use(fast)
    x = torch.randn(shape)
    with torch.inference_mode():
        assert all(type(layer) is onednn.OneDnnLinear for layer in fast)
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)


def test_other_layers_dtypes_and_weights_stay():
    model = nn.ModuleList([nn.Linear(4, 4), Odd(4, 4), nn.Linear(4, 4).bfloat16(), nn.Embedding(4, 4)])
    model[0].weight = model[3].weight  # tied
    assert onednn.use(model)
    assert [type(x) for x in model] == [onednn.OneDnnLinear, Odd, nn.Linear, nn.Embedding]
    assert model[0].weight is model[3].weight
    assert not onednn.use(nn.ModuleList([nn.Embedding(4, 4)]))
