"""A second instance of the deviation of torchtune, on another model, with torchtune and torch alone."""

from __future__ import annotations

import torch
from torch import nn
from torchtune.modules.peft import LoRALinear, disable_adapter


def nested_disable() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(LoRALinear(6, 5, rank=3, alpha=6.0), nn.ReLU(), LoRALinear(5, 2, rank=1, alpha=1.0))
    for layer in (net[0], net[2]):
        nn.init.normal_(layer.lora_b.weight)
    x = torch.randn(7, 6)
    plain = nn.functional.linear(torch.relu(nn.functional.linear(x, net[0].weight)), net[2].weight)
    with disable_adapter(net):
        first = float((net(x) - plain).detach().abs().max())
        with disable_adapter(net):
            inner = float((net(x) - plain).detach().abs().max())
        after = float((net(x) - plain).detach().abs().max())
    print(f"    off the base by {first:.3g}, {inner:.3g} in the inner context and {after:.3g} after it")
    assert after > 0.01 > max(first, inner)
