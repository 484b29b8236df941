"""A second instance of each deviation of diffusers, on another model, with diffusers, PEFT and torch alone."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from peft import LoraConfig
from torch import nn


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, which is shown."""
    found = float((a - b).detach().abs().max())
    print(f"    a difference of {found:.3g}")
    return found


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def output(model: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    x, context = (torch.randn(*shape, generator=generator) for shape in ((1, 2, 8, 8), (1, 3, 8)))
    with torch.no_grad():
        return model(x, 3, context).sample


def config(*targets: str, dropout: float = 0.0) -> LoraConfig:
    """Random factors."""
    return LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, lora_dropout=dropout)


def set_while_fused() -> None:
    model = unet()
    model.add_adapter(config("to_q", "to_v"), "one")
    model.add_adapter(config("to_q", "to_v"), "two")
    found = {}
    for name in ("two", "one"):
        model.set_adapter(name)
        found[name] = output(model)
    model.fuse_lora(adapter_names=["one"])
    assert gap(output(model), found["one"]) < 1e-3
    model.set_adapters(["two"])
    assert model.active_adapters() == ["two"]
    assert gap(output(model), found["two"]) > 0.01 and gap(output(model), found["one"]) < 1e-3


def deleted_while_fused() -> None:
    model = unet()
    before = output(model)
    model.add_adapter(config("conv1", "to_k"), "one")
    model.fuse_lora()
    model.delete_adapters(["one"])
    model.unfuse_lora()
    assert gap(output(model), before) > 0.01


def written_while_fused() -> None:
    model = unet()
    W = model.conv_in.weight.detach().clone()
    model.add_adapter(config("conv_in"), "one")
    model.fuse_lora()
    model.unfuse_lora()
    assert gap(model.conv_in.weight, W) < 1e-3
    model.fuse_lora()
    model.conv_in.lora_A["one"].weight.data.zero_()
    model.unfuse_lora()
    assert gap(model.conv_in.weight, W) > 0.1


class Dilated(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Padded, so that its output is as large as its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, dilation=3, padding=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def conv_dilation() -> None:
    model, x = Dilated(), torch.ones(1, 3, 8, 8)
    assert model(x).shape == x.shape
    model.add_adapter(LoraConfig(target_modules=["layer"]))
    try:
        model(x)
    except RuntimeError as error:
        print("   ", error)
    else:
        raise AssertionError("the adapter can be used")
    model.disable_lora()
    assert model(x).shape == x.shape


def dropout_in_evaluation() -> None:
    model = unet()
    model.add_adapter(config("to_q", "to_v", dropout=0.8))
    assert not model.training and gap(output(model), output(model)) > 1e-2
    model.eval()
    assert gap(output(model), output(model)) < 1e-3
