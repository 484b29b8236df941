"""The helpers and the status agree with PEFT's, on the same models in the same states."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import peft
import pytest
import torch
from models import llama
from peft.helpers import check_if_peft_model as peft_check
from peft.helpers import rescale_adapter_scale as peft_rescale
from peft.optimizers import create_loraplus_optimizer as peft_loraplus
from torch import nn

import lora_ref
from lora_ref import LoraConfig, get_peft_model
from lora_ref.api.helpers import (
    check_if_peft_model,
    create_loraplus_optimizer,
    disable_input_dtype_casting,
    rescale_adapter_scale,
)
from lora_ref.api.status import get_layer_status, get_model_status

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.fc, self.conv = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Conv1d(4, 4, 1)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(self.fc(self.emb(tokens)).mT).mT))


def made(library: Any, **options: Any) -> Any:
    config = {"r": 2, "target_modules": ["emb", "fc", "conv"], "modules_to_save": ["head"]} | options
    model = library.get_peft_model(Net(), library.LoraConfig(**config))
    model.add_adapter("other", library.LoraConfig(r=1, target_modules=["fc"]))
    return model


STATES: dict[str, Callable[[Any], Any]] = {
    "new": lambda m: None,
    "other active": lambda m: m.set_adapter("other"),
    "disabled": lambda m: m.base_model.disable_adapter_layers(),
    "one layer off": lambda m: m.base_model.model.fc.enable_adapters(False),
    "merged": lambda m: m.merge_adapter(["default"]),
    "one layer merged": lambda m: m.base_model.model.fc.merge(adapter_names=["default"]),
    "both active": lambda m: m.base_model.set_adapter(["default", "other"]),
    "inference": lambda m: m.set_adapter("default", inference_mode=True),
    "one factor frozen": lambda m: m.base_model.model.fc.lora_A["default"].requires_grad_(False),
}


@pytest.mark.parametrize("state", STATES)
def test_the_status_is_pefts(state: str) -> None:
    found = []
    for library, of_layers, of_model in (
        (peft, peft.get_layer_status, peft.get_model_status),
        (lora_ref, get_layer_status, get_model_status),
    ):
        model = made(library)
        STATES[state](model)
        assert of_layers(model) == model.get_layer_status() and of_model(model) == model.get_model_status()
        layers = {s.name: dataclasses.asdict(s) for s in of_layers(model)}
        found.append((layers, dataclasses.asdict(of_model(model))))
    (layers, whole), (layers_here, whole_here) = found
    assert layers.keys() == layers_here.keys() == {"model.emb", "model.fc", "model.conv", "model.head"}
    for name, status in layers.items():
        here = layers_here[name]
        same = status.keys() - {"available_adapters", "active_adapters"}
        assert {key: here[key] for key in same} == {key: status[key] for key in same}, name
        assert sorted(here["available_adapters"]) == sorted(status["available_adapters"])
        # a layer of PEFT calls an adapter active that it does not have
        assert here["active_adapters"] == [a for a in status["active_adapters"] if a in here["available_adapters"]]
    same = whole.keys() - {"requires_grad", "trainable_params", "total_params"}
    assert {key: whole_here[key] for key in same} == {key: whole[key] for key in same}


@pytest.mark.parametrize("make", [Net, llama])
def test_the_status_of_a_model_without_a_wrapper_is_pefts(make: Callable[[], nn.Module]) -> None:
    found = []
    for library, of_model in ((peft, peft.get_model_status), (lora_ref, get_model_status)):
        config = library.LoraConfig(r=1, target_modules=["fc" if make is Net else "q_proj"])
        model = library.inject_adapter_in_model(config, make())
        s = of_model(model)
        found.append(
            (s.base_model_type, s.adapter_model_type, s.peft_types, s.active_adapters, list(model.peft_config))
        )
    assert found[0] == found[1]


def test_the_names_of_saved_modules_are_pefts() -> None:
    for options in ({}, {"modules_to_save": None}):
        names = [made(library, **options).modules_to_save for library in (peft, lora_ref)]
        assert names[0] == names[1]


def test_a_model_without_adapters_has_no_status() -> None:
    for function in (get_layer_status, get_model_status):
        with pytest.raises(ValueError, match="the Linear holds no adapters"):
            function(nn.Linear(2, 2))


@pytest.mark.parametrize("factor", [0.5, 2, -1, 0])
def test_rescaling_is_pefts_and_is_undone(factor: float) -> None:
    found = []
    for library, rescale in ((peft, peft_rescale), (lora_ref, rescale_adapter_scale)):
        model = made(library)
        layer = model.base_model.model.fc
        before, kept = dict(layer.scaling), layer.scaling
        with rescale(model, factor):
            found.append(dict(layer.scaling))
            assert kept == before  # a script may have kept the dict
        assert layer.scaling == before
        with pytest.raises(RuntimeError, match="inside"), rescale(model, factor):
            raise RuntimeError("inside")
        assert layer.scaling == before
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ("2", TypeError, "multiplier='2': must be a number"),
        (True, TypeError, "multiplier=True"),
        (float("inf"), ValueError, "inf"),
        (float("nan"), ValueError, "nan"),
    ],
)
def test_a_multiplier_that_is_no_number_is_refused(value: Any, error: type[Exception], words: str) -> None:
    model = made(lora_ref)
    before = {name: dict(layer.scaling) for name, layer in model.lora_layers().items()}
    with pytest.raises(error, match=words), rescale_adapter_scale(model, value):
        raise AssertionError("must not begin")
    assert {name: dict(layer.scaling) for name, layer in model.lora_layers().items()} == before
    with pytest.raises(ValueError, match="has no adapted layer"), rescale_adapter_scale(nn.Linear(2, 2), 2.0):
        pass
    model.merge_adapter()
    with pytest.raises(ValueError, match="default is merged"), rescale_adapter_scale(model, 2.0):
        pass


def test_loraplus_groups_are_pefts() -> None:
    found = []
    for library, create in ((peft, peft_loraplus), (lora_ref, create_loraplus_optimizer)):
        model = made(library, bias="all")
        options = {"lr": 0.01, "loraplus_lr_ratio": 4, "loraplus_lr_embedding": 1e-3, "loraplus_weight_decay": 0.1}
        optimizer = create(model=model, optimizer_cls=torch.optim.AdamW, betas=(0.8, 0.9), **options)
        names = {id(p): name for name, p in model.named_parameters()}
        found.append(
            {
                names[id(p)].replace(".base_layer", ""): (group["lr"], group["weight_decay"], group["betas"])
                for group in optimizer.param_groups
                for p in group["params"]
            }
        )
        assert isinstance(optimizer, torch.optim.AdamW)
    theirs, ours = found
    assert theirs.keys() == ours.keys() and len(ours) > 8
    assert {name: ours[name] for name in ours if ours[name] != theirs[name]} == {}


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"loraplus_lr_ratio": -1.0}, {"loraplus_lr_embedding": float("nan")}])
def test_rates_that_are_not_positive_are_refused(options: dict[str, float]) -> None:
    arguments = {"lr": 0.1, "loraplus_lr_ratio": 2.0} | options
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*: must be a positive number"):
        create_loraplus_optimizer(made(lora_ref), torch.optim.SGD, **arguments)
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["fc"], inference_mode=True))
    with pytest.raises(ValueError, match="no factor trains"):
        create_loraplus_optimizer(model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=2.0)


def test_a_folder_is_known_for_an_adapter(tmp_path: Path) -> None:
    made(lora_ref).save_pretrained(tmp_path / "adapter", selected_adapters=["default"])
    llama().save_pretrained(tmp_path / "base")
    for folder in ("adapter", "base", "nothing"):
        path = str(tmp_path / folder)
        assert check_if_peft_model(path) is peft_check(path) is (folder == "adapter")


def test_casting_of_inputs_needs_no_switch() -> None:
    model = made(lora_ref).eval()
    tokens = torch.tensor([[1, 2]])
    with disable_input_dtype_casting(model):
        assert torch.equal(model(tokens), model(tokens))
    with pytest.raises(ValueError, match="the Linear has no adapters"), disable_input_dtype_casting(nn.Linear(2, 2)):
        pass
    with disable_input_dtype_casting(nn.Linear(2, 2), active=False):
        pass


def test_adapters_of_different_layers_are_no_irregularity_as_in_peft() -> None:
    found = []
    for library in (lora_ref, peft):
        model = made(library, target_modules=["fc", "emb"], modules_to_save=None)
        model.add_adapter("third", library.LoraConfig(r=2, target_modules=["conv"]))
        states = []
        for names in ("default", "third", ["default", "third"]):
            model.base_model.set_adapter(names)
            states.append(model.get_model_status().active_adapters)
        found.append(states)
        assert len(model.get_layer_status()) == 3
    assert found[0] == found[1] == [["default"], ["third"], ["default", "third"]]
    model = made(lora_ref, target_modules=["fc", "conv"])
    model.model.fc.set_adapter("other")
    assert get_model_status(model).active_adapters == "irregular"


def test_an_adapter_that_was_deleted_inside_of_the_block_stays_deleted() -> None:
    model = made(lora_ref, target_modules=["fc"])
    with rescale_adapter_scale(model, 0.5):
        model.delete_adapter("default")
    assert list(model.model.fc.scaling) == ["other"]


def test_names_that_scripts_import_are_where_peft_has_them() -> None:
    from importlib import import_module

    names = {
        "auto": ["AutoPeftModelForCausalLM"],
        "mapping_func": ["get_peft_model"],
        "tuners.lora": ["LoraLayer", "LoraModel", "Linear", "Embedding"],
        "tuners.lora.config": ["LoraConfig", "EvaConfig"],
        "tuners.lora.corda": ["preprocess_corda"],
        "tuners.lora.eva": ["initialize_lora_eva_weights"],
        "tuners.lora.layer": ["LoraLayer", "Linear"],
        "tuners.lora.loraga": ["preprocess_loraga"],
        "tuners.lora.model": ["LoraModel"],
        "tuners.tuners_utils": ["BaseTunerLayer"],
        "utils.constants": ["TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"],
        "utils.hotswap": ["hotswap_adapter"],
        "utils.loftq_utils": ["replace_lora_weights_loftq"],
        "utils.other": ["prepare_model_for_kbit_training", "ModulesToSaveWrapper"],
        "utils.peft_types": ["PeftType", "TaskType"],
        "utils.save_and_load": ["get_peft_model_state_dict", "set_peft_model_state_dict"],
    }
    for module, wanted in names.items():
        for name in wanted:
            assert hasattr(import_module(f"peft.{module}"), name), "PEFT has it elsewhere"
            found = getattr(import_module(f"lora_ref.{module}"), name)
            assert found is getattr(lora_ref, name, found) and isinstance(found, type | dict | FunctionType)
    model = made(lora_ref, target_modules=["fc"], modules_to_save=["head"])
    assert isinstance(model.model.fc, import_module("lora_ref.tuners.tuners_utils").BaseTunerLayer)
    assert isinstance(model.model.head, import_module("lora_ref.utils").ModulesToSaveWrapper)
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = import_module("lora_ref.utils").no_such_name


@pytest.mark.parametrize("merged", [[], ["default"], ["default", "other"]])
def test_the_status_of_a_merged_model_is_pefts(merged: list[str]) -> None:
    found = []
    for library in (peft, lora_ref):
        model = made(library, target_modules=["fc"])
        if merged:
            model.merge_adapter(merged)
        status = library.get_model_status(model)
        found.append((status.merged_adapters, [x.merged_adapters for x in library.get_layer_status(model)]))
    assert found[0] == found[1]
    for mine in (get_model_status(model), *get_layer_status(model)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            mine.enabled = False
