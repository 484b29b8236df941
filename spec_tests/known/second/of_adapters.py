"""A second instance of the deviation of adapters, on another model, with adapters and transformers alone."""

from __future__ import annotations

import adapters
import torch
from adapters import LoRAConfig
from transformers import GPT2Config, GPT2Model


def written_while_merged() -> None:
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=7, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    adapters.init(model)
    model.add_adapter(
        "a", config=LoRAConfig(r=2, alpha=4, attn_matrices=[], intermediate_lora=True, selfattn_lora=False)
    )
    layer = next(module for module in model.modules() if getattr(module, "loras", None))
    lora, W = layer.loras["a"], layer.weight.detach().clone()
    lora.lora_B.data.normal_()
    model.merge_adapter("a")
    model.reset_adapter()
    assert float((layer.weight - W).abs().max()) < 1e-3  # unchanged factors
    model.merge_adapter("a")
    lora.lora_A.data *= -1
    model.reset_adapter()
    off = float((layer.weight - W).abs().max())
    print(f"    {type(layer).__name__}: the weight is off by {off:.3g}")
    assert off > 0.1
