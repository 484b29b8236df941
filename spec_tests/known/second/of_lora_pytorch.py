"""A second instance of each deviation of lora-pytorch, on another model, with lora-pytorch and torch alone."""

from __future__ import annotations

import torch
from lora_pytorch import LoRA
from torch import nn


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, which is shown."""
    found = float((a - b).detach().abs().max())
    print(f"    a difference of {found:.3g}")
    return found


def gradient_of_the_input() -> None:
    torch.manual_seed(0)
    base = nn.Conv1d(2, 3, 3, padding=1)
    x, dy = torch.randn(1, 2, 5, requires_grad=True), torch.randn(1, 3, 5)
    (whole,) = torch.autograd.grad((base(x) * dy).sum(), x)  # B is zero: the layer is the base layer
    layer = LoRA.from_module(base, rank=2)
    (found,) = torch.autograd.grad((layer(x) * dy).sum(), x)
    assert gap(layer(x), base(x)) < 1e-3 and gap(whole, found) > 0.1
    assert gap(found, torch.zeros(1)) < 1e-3  # nothing goes through W
    layer.disable_lora()
    assert not layer(x).requires_grad
    # so, behind an adapted layer, the adapter of the layer before learns nothing while B is zero
    net = LoRA.from_module(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), rank=1)
    net(torch.ones(1, 4)).square().sum().backward()
    first = net.module[0].lora_module
    assert all(p.grad is None or not p.grad.any() for p in first.parameters())


def padding_idx() -> None:
    layer = LoRA.from_module(nn.Embedding(6, 3, padding_idx=4), rank=2)
    for p in layer.lora_module.parameters():
        p.data.fill_(0.5)
    layer(torch.tensor([[4, 4, 2]])).sum().backward()
    lengths = layer.lora_module.in_proj.grad.norm(dim=1).tolist()
    print("    the lengths of the gradients of A's rows:", lengths)
    assert lengths[4] > lengths[2] > 0.1 and lengths[0] == 0
    plain = nn.Embedding(6, 3, padding_idx=4)
    plain(torch.tensor([[4, 4, 2]])).sum().backward()
    assert not plain.weight.grad[4].any() and plain.weight.grad[2].all()
