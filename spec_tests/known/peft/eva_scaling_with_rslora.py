"""EVA with rsLoRA: a layer whose rank has doubled has another scaling, though scalings are adjusted to stay."""

import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))
x = torch.randn(64, 6) * torch.tensor([4.0, 4.0, 0.1, 0.1, 0.1, 0.1])  # two directions
net[0].weight.data = torch.diag(torch.tensor([0.025, 0.025, 1.0, 1.0, 1.0, 1.0]))  # behind it all are alike

for use_rslora in (False, True):
    eva = EvaConfig(rho=2.0, adjust_scaling_factors=True)
    options = {"r": 1, "lora_alpha": 4, "init_lora_weights": "eva", "eva_config": eva, "use_rslora": use_rslora}
    model = get_peft_model(nn.Sequential(*net), LoraConfig(target_modules=["0", "1"], **options))
    initialize_lora_eva_weights(
        model,
        [x, x],
        forward_fn=lambda net, batch: net(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda inputs, *_: inputs[0] if isinstance(inputs, tuple) else inputs,
        show_progress_bar=False,
    )
    layers = [m for m in model.modules() if hasattr(m, "scaling") and "default" in getattr(m, "r", {})]
    found = [(layer.r["default"], layer.scaling["default"]) for layer in layers]
    print(f"use_rslora={use_rslora}: rank and scaling are {found}; before, the scaling was 4")
    assert found[0][0] == 2 and (found[0][1] == 4) is not use_rslora
