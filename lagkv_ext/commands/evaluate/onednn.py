"""float32 linear layers through oneDNN, for evaluations on a CPU.

torch sends them to MKL, which takes 2.2 to 3.6 times as long on AMD processors (measured on Zen 5). torch has no public
switch for that, so this file calls the operator that torch's own compiler emits for the same purpose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class OneDnnLinear(nn.Linear):
    """``nn.Linear`` with the same weights, computed by oneDNN; for inference."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def available() -> bool:
    """True where this torch was built with oneDNN and has its operator."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def use(model: Any) -> bool:
    """Let the plain float32 linear layers of a model on the CPU run through oneDNN; whether any does.

    Results differ from MKL's by rounding. Weights stay where they are, and are shared as before.
    """
    found = [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear
        and layer.weight.dtype == torch.float32
        and layer.weight.device.type == "cpu"
    ]
    if not available():
        return False
    for layer in found:
        layer.__class__ = OneDnnLinear
    return bool(found)
