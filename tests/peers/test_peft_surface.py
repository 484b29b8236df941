"""Names and arguments are PEFT's: code that was written for it runs here."""

import inspect
import re
from pathlib import Path
from typing import Any

import peft
import peft.helpers
import peft.optimizers
import peft.tuners.lora.corda
import peft.tuners.lora.loraga
import peft.utils.hotswap
import pytest
import torch
import transformers
from torch import nn

import lora_ref
from lora_ref import LoraConfig, get_peft_model
from lora_ref.api import layers
from spec_tests import agree

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
PLACES = (peft, peft.helpers, peft.optimizers, peft.utils, peft.utils.hotswap, peft.tuners.lora)


def shared() -> dict[str, tuple[Any, Any]]:
    """{name: (ours, PEFT's)} of every public function and method that both have."""
    found = {}
    for name in lora_ref.__all__:
        theirs = next((getattr(place, name) for place in PLACES if hasattr(place, name)), None)
        if inspect.isfunction(theirs):
            found[name] = (getattr(lora_ref, name), theirs)
    layer = (layers.Linear, peft.tuners.lora.Linear)
    for kind, (ours, theirs) in {
        **{"PeftModel": (lora_ref.PeftModel, peft.PeftModel), "LoraModel": (lora_ref.LoraModel, peft.LoraModel)},
        "layer": layer,
    }.items():
        for name in ("__init__", *(name for name in dir(theirs) if not name.startswith("_"))):
            both = [getattr(cls, name, None) for cls in (ours, theirs)]
            if all(inspect.isroutine(one) for one in both) and not (kind == "layer" and hasattr(nn.Module, name)):
                found[f"{kind}.{name}"] = (both[0], both[1])
    return {name: pair for name, pair in found.items() if name not in ("layer.__init__", "layer.get_base_layer")}


BOTH = shared()


def positional(function: Any) -> list[str]:
    return [name for name, p in inspect.signature(function).parameters.items() if p.kind in POSITIONAL]


@pytest.mark.parametrize("name", BOTH)
def test_a_positional_argument_means_what_it_means_in_peft(name: str) -> None:
    """Ours may have fewer of them. What PEFT has not is an argument by keyword."""
    ours, theirs = BOTH[name]
    mine, other = ([name for name in positional(f) if name != "self"] for f in (ours, theirs))
    if ours.__name__ == "add_weighted_adapter":  # a function that is made a method
        mine = mine[1:]
    assert mine == other[: len(mine)]


def test_no_public_name_of_ours_hides_an_attribute_that_models_of_transformers_have() -> None:
    """A lookup on an adapted model or a saved module finds PEFT's names, names that no model has, or the model's."""
    saved = get_peft_model(
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), LoraConfig(target_modules=["0"], modules_to_save=["1"])
    )
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"], modules_to_save=["1"])
    )
    pairs = [(saved, theirs), (saved.base_model, theirs.base_model)]
    pairs += [(saved.base_model.model[1], theirs.base_model.model[1])]
    ours: set[str] = set()
    for mine, other in pairs:
        names = {name for name in [*dir(type(mine)), *vars(mine), *mine._modules] if not name.startswith("_")}
        ours |= names - {*dir(other)} - {*dir(nn.Module)}
    assert "lora_layers" in ours and "adapter_wrappers" in ours
    used: set[str] = set()
    for file in (Path(transformers.__file__).parent / "models").rglob("modeling_*.py"):
        text = file.read_text(encoding="utf-8")
        used |= {*re.findall(r"self\.(\w+)(?::[^=\n]+)? =", text)} | {*re.findall(r"    def (\w+)\(self", text)}
    assert len(used) > 3000 and {"layers", "encoder", "classifier"} <= used
    assert ours & used == {"resize_token_embeddings"}  # it calls the model's


@pytest.mark.parametrize("name", ["layers", "wrappers", "explain", "sampled", "plan", "progress", "refuse", "base"])
def test_attributes_of_the_base_model_are_its_own(name: str) -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    setattr(net, name, marker := object())
    model = get_peft_model(net, LoraConfig(target_modules=["0"]))
    assert getattr(model, name) is getattr(model.base_model, name) is marker


LAYERS = {
    "linear": lambda: nn.Linear(3, 5),
    "embedding": lambda: nn.Embedding(7, 4),
    "conv1d": lambda: nn.Conv1d(3, 6, 2),
    "conv2d": lambda: nn.Conv2d(4, 6, (1, 2)),
    "Conv1D": lambda: transformers.pytorch_utils.Conv1D(5, 3),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_have_pefts_names_with_pefts_values(kind: str) -> None:
    found = []
    for library in (peft, lora_ref):
        torch.manual_seed(0)
        net = nn.Sequential(LAYERS[kind]().double())
        config = library.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False)
        layer = library.get_peft_model(net, config).base_model.model[0]
        for key, parameter in layer.named_parameters():
            if "lora_" in key:
                parameter.data = torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape).to(parameter)
        if kind != "embedding":  # PEFT does not scale those
            layer.scale_layer(2.0)
        before, D = layer.get_base_layer().weight.detach().clone(), layer.get_delta_weight("default").detach()
        layer.merge()
        merged, W = layer.merged, layer.get_base_layer().weight.detach().clone()
        layer.unmerge()
        numbers = (layer.in_features, layer.out_features, merged, layer.merged, layer.scaling["default"])
        found.append((numbers, D, W - before, layer.active_adapters, tuple(layer.get_base_layer().weight.shape)))
        if kind != "embedding":
            layer.unscale_layer(4.0)
            assert layer.scaling["default"] == 0.75
    (numbers, D, added, *rest), (numbers_here, D_here, added_here, *rest_here) = found
    assert numbers == numbers_here and rest == rest_here
    for theirs, ours in ((D, D_here), (added, added_here)):
        assert theirs.shape == ours.shape
        agree(ours, theirs)


def test_small_names_are_there_with_pefts_values(tmp_path: Path) -> None:
    found = []
    for library in (peft, lora_ref):
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        config = library.LoraConfig(r=2, target_modules=["0"], target_parameters=["1.weight"])
        model = library.get_peft_model(net, config)
        library.LoraConfig(r=3, target_modules=["q"]).save_pretrained(tmp_path)
        written = library.LoraConfig.from_json_file(str(tmp_path / "adapter_config.json"))
        errors: list[type] = []
        try:
            library.get_peft_model(nn.Sequential(nn.Linear(2, 2)), library.LoraConfig(target_modules=["nothing"]))
        except ValueError as error:
            errors += [cls.__name__ for cls in type(error).__mro__]
        found.append(
            {
                "prefix": model.base_model.prefix,
                "type": (model.peft_config["default"].peft_type.value, library.PeftType.LORA.value),
                "modules": list(model.base_model.targeted_module_names),
                "parameters": list(model.base_model.targeted_parameter_names),
                "read": (written["r"], written["peft_type"]),
                "errors": "NoMatchingPeftModuleError" in errors and "PeftError" in errors,
                "prepared": model.prepare_model_for_gradient_checkpointing(net),
            }
        )
    assert {k: v for k, v in found[0].items() if k != "errors"} == {k: v for k, v in found[1].items() if k != "errors"}
    assert found[1]["errors"]


def test_an_adapter_that_is_loaded_to_train_trains_before_it_is_active(tmp_path: Path) -> None:
    found = []
    for library in (peft, lora_ref):
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        config = library.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
        model = library.get_peft_model(net, config)
        model.save_pretrained(tmp_path / library.__name__)
        model.load_adapter(tmp_path / library.__name__, "other", is_trainable=True)
        trains = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
        found.append((trains, model.active_adapters))
    assert found[0] == found[1]


def test_what_a_folder_holds_is_read_as_peft_reads_it(tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(3, 2)), LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path / "inner")
    theirs, ours = (library.load_peft_weights(str(tmp_path / "inner"), device="cpu") for library in (peft, lora_ref))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], x) for key, x in ours.items())
    assert lora_ref.load_peft_weights(tmp_path, subfolder="inner").keys() == ours.keys()
    with pytest.raises(FileNotFoundError, match="local folders only"):
        lora_ref.load_peft_weights("a/name/of/the/hub")
    with pytest.raises(ValueError, match="give it to PeftModel"):
        lora_ref.load_peft_weights(tmp_path / "inner", key_mapping={"a": "b"})


def test_mixed_precision_is_cast_as_in_peft() -> None:
    found = []
    for library in (peft, lora_ref):
        model = library.get_peft_model(
            nn.Sequential(nn.Linear(3, 2)).half(),
            library.LoraConfig(r=2, target_modules=["0"]),
            autocast_adapter_dtype=False,
        )
        library.cast_mixed_precision_params(model, torch.bfloat16)
        found.append([(name, p.dtype) for name, p in model.named_parameters()])
    assert found[0] == found[1] and {dtype for _, dtype in found[0]} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_delta_weight_has_the_dtype_of_the_factors(dtype: torch.dtype, autocast: bool) -> None:
    found = []
    for library in (peft, lora_ref):
        config = library.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        model = library.get_peft_model(
            nn.Sequential(nn.Linear(3, 2)).to(dtype), config, autocast_adapter_dtype=autocast
        )
        found.append(model.base_model.model[0].get_delta_weight("default").dtype)
    assert found[0] == found[1]


def test_a_merge_of_what_is_merged_is_named() -> None:
    for library in (peft, lora_ref):
        config = library.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        model = library.get_peft_model(nn.Sequential(nn.Linear(3, 2)), config)
        model.merge_adapter()
        merged = model.base_model.model[0].base_layer.weight.detach().clone()
        with pytest.warns(UserWarning, match="merged"):
            model.merge_adapter()
        assert torch.equal(merged, model.base_model.model[0].base_layer.weight)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    @classmethod
    def from_pretrained(cls, name: str, **kwargs: Any) -> "Own":
        return cls()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_pefts_auto_classes_find_the_class_of_the_base_model(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["layer"], base_model_name_or_path=str(tmp_path))
    get_peft_model(Own(), config).save_pretrained(tmp_path)
    read = peft.AutoPeftModel.from_pretrained(str(tmp_path), import_allowlist=[Own.__module__])
    assert isinstance(read.get_base_model(), Own)
    with_task = LoraConfig(r=2, target_modules=["layer"], task_type="FEATURE_EXTRACTION")
    get_peft_model(Own(), with_task).save_pretrained(tmp_path / "task")
    assert peft.LoraConfig.from_pretrained(str(tmp_path / "task")).auto_mapping is None


def test_no_adapter_is_named() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(3, 2)), LoraConfig(r=2, target_modules=["0"]))
    for call, words in (
        (lambda: model.save_pretrained("nowhere", selected_adapters=[]), r"selected_adapters=\[\]: name an adapter"),
        (lambda: model.merge_adapter([]), r"adapter_names=\[\]: name an adapter"),
        (lambda: model.delete_adapter(["default"]), r"there is no adapter \['default'\]"),
        (lambda: model.set_adapter([["default"]]), r"there is no adapter \['default'\]"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert not Path("nowhere").exists()
