"""Second instances of the deviations of mlx-lm, on other models and sizes, with MLX alone."""

from __future__ import annotations

import mlx.core as mx
from mlx import nn
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import remove_lora_layers

mx.set_default_device(mx.cpu)


def removed_embedding() -> None:
    net = nn.Sequential(LoRAEmbedding.from_base(nn.Embedding(7, 6), r=3), LoRALinear.from_base(nn.Linear(6, 5), r=2))
    remove_lora_layers(net)
    kinds = [type(layer).__name__ for layer in net.layers]
    print("    left after remove_lora_layers:", kinds)
    assert kinds == ["LoRAEmbedding", "Linear"]


def experts_in_half() -> None:
    failed = []
    for dtype in (mx.float32, mx.bfloat16):
        base = SwitchLinear(6, 5, 3, bias=True)
        base.set_dtype(dtype)
        try:
            mx.eval(LoRASwitchLinear.from_base(base, r=1)(mx.ones((3, 1, 6)).astype(dtype), mx.array([2, 0, 1])))
        except RuntimeError as error:
            print("   ", dtype, "fails:", str(error)[:80])
            failed.append(dtype)
    assert failed == [mx.bfloat16]
