"""add_weighted_adapter starts the combination as its first parent started, and that start refuses the sum of ranks."""

from peft import LoraConfig, get_peft_model
from torch import nn

for init, n, r in (("orthogonal", 8, 1), ("mica", 3, 2)):
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=init)
    model = get_peft_model(nn.Sequential(nn.Linear(n, n)), config)
    model.add_adapter("other", LoraConfig(r=r, target_modules=["0"]))
    model.add_weighted_adapter(["other", "default"], [1.0, 1.0], "first", combination_type="cat")
    try:
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "second", combination_type="cat")
    except ValueError as error:
        print(f"{init}: with the other parent first it was accepted, now: {error}")
    else:
        raise AssertionError(f"{init}: the combination was accepted")
