"""A second instance of the deviation of LyCORIS, on another model, with LyCORIS and torch alone."""

from __future__ import annotations

import torch
from lycoris import LycorisNetwork, create_lycoris
from torch import nn


def restore_on_the_cpu() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    before = [net[i].weight.detach().clone() for i in (0, 2)]
    LycorisNetwork.apply_preset({"target_module": ["Linear"], "target_name": [".*"]})
    wrapped = create_lycoris(net, 1.0, linear_dim=2, linear_alpha=1.0, algo="lora")
    for lora in wrapped.loras:
        nn.init.normal_(lora.lora_up.weight)
    wrapped.onfly_merge()
    merged = [net[i].weight.detach().clone() for i in (0, 2)]
    wrapped.onfly_restore()
    for i, W, M in zip((0, 2), before, merged, strict=True):
        off = float((net[i].weight - W).abs().max())
        print(f"    after onfly_restore the weight is off by {off:.3g}")
        assert off > 0.01 and torch.equal(net[i].weight, M)
    # a copy of what onfly_merge keeps is the base weight: then the same call restores it
    for lora, W in zip(wrapped.loras, before, strict=True):
        lora.cached_org_weight, lora.cached_org_bias = W, None
    wrapped.onfly_restore()
    assert all(torch.equal(net[i].weight, W) for i, W in zip((0, 2), before, strict=True))
