"""A second instance of each deviation of PEFT's names and files: from its reason alone, with PEFT and torch alone."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, which is shown."""
    found = float((a - b).detach().abs().max())
    print(f"    a difference of {found:.3g}")
    return found


def tree(modules: Mapping[str, nn.Module]) -> nn.Module:
    """A network of these modules by their dotted names."""
    torch.manual_seed(9)
    top = nn.Module()
    for name, module in modules.items():
        *parents, last = name.split(".")
        place = top
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, nn.Module())
            place = getattr(place, parent)
        place.add_module(last, module)
    return top


def linears(*names: str) -> nn.Module:
    return tree({name: nn.Linear(4, 4) for name in names})


def found(model: nn.Module) -> set[str]:
    """The modules that have an adapter."""
    names = (name for name, _ in model.named_modules() if name.endswith(".lora_A"))
    return {name.removeprefix("base_model.model.").removesuffix(".lora_A") for name in names}


def keys(model: PeftModel, **options: Any) -> dict[str, dict[str, torch.Tensor]]:
    """{folder: tensors} of what is saved."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **options)
        files = Path(folder).rglob("*.safetensors")
        return {str(file.parent.relative_to(folder)): load_file(file) for file in files}


def name_of_a_module() -> None:
    model = get_peft_model(linears("text.q", "image.q"), LoraConfig(target_modules=["q"]))
    assert len(keys(model)["."]) == 4
    model.add_adapter("text", LoraConfig(target_modules=["q"]))
    saved = keys(model)["."]
    print("   ", sorted(saved))
    assert len(saved) == 2 and all("image.q" in key for key in saved)


def adapter_named_weight() -> None:
    for name in ("weight", "lora_A", "q"):
        model = get_peft_model(linears("q", "v"), LoraConfig(target_modules=["q", "v"]))
        before = keys(model)["."]
        model.add_adapter(name, LoraConfig(target_modules=["q", "v"]))
        after = keys(model)
        print("   ", name, sorted(before.keys() ^ after["."].keys()), len(after[name]))
        assert before.keys() != after["."].keys()
    other = get_peft_model(linears("q", "v"), LoraConfig(target_modules=["q", "v"]))
    other.add_adapter("b", LoraConfig(target_modules=["q", "v"]))
    assert before.keys() == keys(other)["."].keys()


def order_of_patterns() -> None:
    config = LoraConfig(target_modules=["q"], rank_pattern={"z.q": 3, ".*q": 5}, alpha_pattern={"z.q": 6, ".*q": 20})
    model = get_peft_model(linears("a.q", "z.q"), config)
    layer = model.base_model.model.z.q
    assert (layer.r["default"], layer.scaling["default"]) == (3, 2)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        read = LoraConfig.from_pretrained(folder)
        print("   ", list(read.rank_pattern), list(read.alpha_pattern))
        assert list(read.rank_pattern) == list(read.alpha_pattern) == [".*q", "z.q"]
        try:
            PeftModel.from_pretrained(linears("a.q", "z.q"), folder)
        except RuntimeError as error:
            print("   ", str(error)[:80])
        else:
            raise AssertionError("it is loaded")


def all_linear_by_ending() -> None:
    names = {"proj": nn.Linear(3, 3), "c.proj": nn.Conv1d(3, 3, 1)}
    model = get_peft_model(tree(names), LoraConfig(target_modules="all-linear"))
    print("   ", found(model), model.peft_config["default"].target_modules)
    assert "c.proj" in found(model) and not isinstance(names["c.proj"], nn.Linear)
    names["b.proj"] = nn.LayerNorm(3)
    try:
        get_peft_model(tree(names), LoraConfig(target_modules="all-linear"))
    except ValueError as error:
        print("   ", str(error)[:60])
    else:
        raise AssertionError("a norm is left out")


def layers_given_in_full() -> None:
    names = [f"layers.{i}.{name}" for i in (0, 1, 2) for name in ("q", "v")]
    whole = LoraConfig(target_modules=["layers.0.q", "layers.2.q"], layers_to_transform=[2])
    print("   ", found(get_peft_model(linears(*names), whole)))
    assert found(get_peft_model(linears(*names), whole)) == {"layers.0.q", "layers.2.q"}
    ends = LoraConfig(target_modules=["q"], layers_to_transform=[2])
    try:
        root = found(get_peft_model(linears(*names), ends))
    except ValueError as error:
        root = set()
        print("   ", str(error)[:90])
    assert root == set()
    deeper = get_peft_model(linears(*(f"model.{name}" for name in names)), ends)
    assert found(deeper) == {"model.layers.2.q"}


def parameters_without_restriction() -> None:
    options = {"target_modules": [], "target_parameters": ["a.weight", "b.weight"]}
    for exclude in (["b"], r".*b"):
        model = get_peft_model(linears("a", "b"), LoraConfig(**options, exclude_modules=exclude))
        print("   ", found(model))
        assert found(model) == {"a", "b"}
