"""On the CPU a LoRASwitchLinear of half precision cannot run: MLX multiplies by experts in float32 alone."""

import mlx.core as mx
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRASwitchLinear

mx.set_default_device(mx.cpu)
worked = []
for dtype in (mx.float32, mx.float16, mx.bfloat16):
    base = SwitchLinear(4, 4, 2, bias=False)
    base.set_dtype(dtype)
    x, experts = mx.ones((2, 1, 4)).astype(dtype), mx.array([0, 1])
    try:
        mx.eval(LoRASwitchLinear.from_base(base, r=2)(x, experts))
    except RuntimeError as error:
        print(dtype, "fails:", error)
    else:
        worked.append(dtype)
print("it works in", worked)
assert worked == [mx.float32]
