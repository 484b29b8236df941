"""A second instance of the deviation of loralib, on another model, with loralib and torch alone."""

from __future__ import annotations

import loralib
import torch


def written_while_merged() -> None:
    torch.manual_seed(0)
    layer = loralib.Embedding(5, 3, r=2, lora_alpha=4)
    layer.lora_B.data.normal_()
    layer.lora_A.data.normal_()
    W, A = layer.weight.detach().clone(), layer.lora_A.detach().clone()
    layer.eval()
    layer.lora_A.data = A + 1
    layer.train()
    D = (layer.lora_B @ torch.ones(2, 5)).T * 2  # s B (the change of A)
    print(f"    the weight is off by {float((layer.weight - W).abs().max()):.3g}")
    assert float((layer.weight - W).abs().max()) > 0.1
    assert float((layer.weight - (W - D)).abs().max()) < 1e-3
