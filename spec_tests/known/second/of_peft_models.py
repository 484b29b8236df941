"""A second instance of each deviation of PEFT's operations on models: from its reason, with PEFT and torch alone."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, which is shown."""
    found = float((a - b).detach().abs().max())
    print(f"    a difference of {found:.3g}")
    return found


def config(*targets: str, **options: Any) -> LoraConfig:
    """Random factors."""
    return LoraConfig(target_modules=list(targets), **{"init_lora_weights": False, **options})


def net(*widths: int) -> nn.Sequential:
    """Linear layers, the first from the first width to the second."""
    torch.manual_seed(7)
    return nn.Sequential(*map(nn.Linear, widths, widths[1:]))


def trains(model: nn.Module) -> list[str]:
    """The parameters that train."""
    return [name for name, p in model.named_parameters() if p.requires_grad]


def disable_unfreezes() -> None:
    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(net(3, 4), config("0")).save_pretrained(folder)
        model = PeftModel.from_pretrained(net(3, 4), folder)
    assert not trains(model)
    with model.disable_adapter():
        model(torch.ones(1, 3))
    print("   ", trains(model))
    assert len(trains(model)) == 2


def deleted_active() -> None:
    model = get_peft_model(net(4, 5, 6), config("0", "1", r=1), adapter_name="first")
    model.add_adapter("second", config("1", r=2))
    layers, x = model.base_model.model, torch.randn(2, 4)
    plain = layers[1].base_layer(layers[0].base_layer(x))
    model.delete_adapter("first")
    print("   ", model.active_adapters, [name.partition("lora")[2] for name in trains(model)])
    assert model.active_adapters == [] and list(model.peft_config) == ["second"]
    assert len(trains(model)) == 2 and layers[1].active_adapters == ["second"]
    assert gap(layers(x), plain) > 0.1
    try:
        model(x)
    except KeyError as error:
        print("    KeyError", error)
    else:
        raise AssertionError("forward works")


def batch_length() -> None:
    model = get_peft_model(net(3, 4), config("0")).eval()
    x, layer = torch.ones(5, 3), model.base_model.model[0]
    for rows, names in ((2, ["__base__"] * 5), (3, None), (1, None)):
        try:
            model(x[:rows], **({"adapter_names": names} if names else {}))
        except ValueError as error:
            print("   ", error)
            assert "5 and" in str(error)
        else:
            raise AssertionError("a batch of another size is taken")
    model(x[:3], adapter_names=["default"] * 3)  # a batch with a list of its own is taken
    assert gap(model(x), layer.base_layer(x)) < 1e-3  # one of five is computed with the list that was refused
    assert (
        gap(model(x), x @ (layer.base_layer.weight + layer.get_delta_weight("default")).T + layer.base_layer.bias) > 0.1
    )


def unload_merged() -> None:
    base = net(3, 4)
    W = base[0].weight.detach().clone()
    model = get_peft_model(base, config("0"))
    model.merge_adapter()
    assert gap(model.unload()[0].weight, W) > 0.1


def unload_saved_modules() -> None:
    base = net(3, 4, 2)
    W = base[1].weight.detach().clone()
    model = get_peft_model(base, config("0", modules_to_save=["1"]))
    copied = model.base_model.model[1].modules_to_save["default"]
    copied.weight.data += 1
    plain = model.unload()
    assert type(plain[1]) is nn.Linear and gap(plain[1].weight, W) > 0.5


def unload_base_layer() -> None:
    for work in ("merge_and_unload", "unload"):
        base = net(3, 4).append(nn.Module())
        base[1].base_layer = nn.Linear(4, 4)
        base[1].forward = base[1].base_layer.forward
        model = get_peft_model(base, config("0"))
        model(torch.ones(1, 3))
        try:
            getattr(model, work)()
        except AttributeError as error:
            print("   ", error)
        else:
            raise AssertionError("it is unloaded")


def deleted_beside_two() -> None:
    model = get_peft_model(net(3, 4), config("0"))
    for name in ("b", "c"):
        model.add_adapter(name, config("0"))
    model.base_model.set_adapter(["b", "c"])
    model(torch.ones(1, 3))
    model.delete_adapter("default")
    try:
        model(torch.ones(1, 3))
    except KeyError as error:
        print("    KeyError", error)
    else:
        raise AssertionError("it works")
    model.set_adapter("b")
    model(torch.ones(1, 3))


def combination_freezes() -> None:
    base = nn.Sequential()
    base.add_module("encoder", nn.Linear(3, 3))
    base.add_module("mixer", nn.Linear(3, 3))
    model = get_peft_model(base, config("encoder", "mixer"))
    model.add_adapter("b", config("encoder", "mixer"))
    before = trains(model)
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "mix", combination_type="cat")
    print("   ", sorted(set(before) - set(trains(model))))
    assert model.active_adapters == ["default"]
    assert sorted(set(before) - set(trains(model))) == [name for name in before if "mixer" in name]


def weights_of_another_number() -> None:
    for how in ("cat", "linear", "svd"):
        model = get_peft_model(net(6, 6), config("0", r=2, lora_alpha=2))
        model.add_adapter("b", config("0", r=2, lora_alpha=2))
        model.add_weighted_adapter(["default", "b"], [1.0], "one", combination_type=how)
        layer = model.base_model.model[0]
        found = [layer.get_delta_weight(name) for name in ("one", "default", "b")]
        assert gap(found[0], found[1]) < 1e-3 and gap(found[0], found[1] + found[2]) > 0.1


def combination_of_rslora() -> None:
    model = get_peft_model(net(6, 6), config("0", r=2, use_rslora=True))
    model.add_adapter("b", config("0", r=2))
    layer = model.base_model.model[0]
    for names, factor in ((["default", "b"], 2.0), (["b", "default"], 1.0)):
        model.add_weighted_adapter(names, [1.0, 1.0], names[0] + "_first", combination_type="cat")
        whole = layer.get_delta_weight("default") + layer.get_delta_weight("b")
        assert gap(layer.get_delta_weight(names[0] + "_first"), factor * whole) < 1e-3
