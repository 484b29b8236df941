"""Hooks that see the inputs of layers."""

import torch
from torch import nn

from lora_ref.calibration.hooks import record_inputs


def test_a_hook_sees_the_first_argument_of_a_layer() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor, factor: float) -> torch.Tensor:
            return super().forward(x) * factor

    seen = []
    layer = Scaled(2, 2)
    with record_inputs({"a": layer}, lambda name, x: seen.append(x)):
        layer(x := torch.ones(1, 2), 3.0)
    assert seen[0] is x
