"""What a wrapped model does with attributes, arguments, modes and names."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import Snapshot, llama, randomise
from safetensors.torch import load_file, save_file
from torch import nn

import lora_ref
from lora_ref import (
    EvaConfig,
    LoraConfig,
    LoraModel,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from lora_ref.api.peft_model import HUB


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()


def adapted(**options: Any) -> PeftModel:
    return randomise(get_peft_model(net(), LoraConfig(**{"r": 2, "target_modules": ["0", "2"]} | options)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapted().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_loaded_model_is_in_evaluation_mode_unless_it_trains(folder: Path, is_trainable: bool) -> None:
    model = PeftModel.from_pretrained(net().train(), folder, is_trainable=is_trainable)
    assert {m.training for m in model.modules()} == {is_trainable}
    x = torch.ones(5, 4).double()
    assert torch.equal(model(x), model(x)) is not is_trainable  # the dropout of the base model
    model.train()
    model.load_adapter(folder, "other", is_trainable=is_trainable)
    assert {m.training for m in model.modules()} == {is_trainable}


def test_a_load_that_fails_leaves_the_mode(folder: Path) -> None:
    model = adapted()
    before = Snapshot(model)
    with pytest.raises(ValueError, match="there is an adapter 'default' already"):
        model.load_adapter(folder, "default")
    assert Snapshot(model) == before


def test_an_attribute_of_the_base_model_is_set_there() -> None:
    model = get_peft_model(llama(), LoraConfig())
    base = model.get_base_model()
    model.generation_config = settings = type(base.generation_config)(num_beams=3)
    assert base.generation_config is settings and "generation_config" not in vars(model)
    model.note, model._private = 1, 2  # the base model has neither
    assert not hasattr(base, "note") and vars(model)["note"] == 1 and vars(model)["_private"] == 2
    model.forward = patched = lambda *args: None  # an engine's
    assert vars(model)["forward"] is patched


@pytest.mark.parametrize("name", ["active_adapter", "active_adapters"])
def test_the_active_adapter_is_not_assigned(name: str) -> None:
    model = adapted()
    with pytest.raises(AttributeError, match=rf"{name} cannot be assigned: call set_adapter\(\['default'\]\)"):
        setattr(model, name, ["default"])
    assert model.active_adapters == ["default"] and name not in vars(model)


def test_a_lora_model_takes_a_configuration_as_in_peft() -> None:
    base = net()
    model = LoraModel(base, LoraConfig(r=2, target_modules=["0"]), "first")
    assert list(model.peft_config) == model.active_adapters == ["first"] and model.model is base
    assert [p.requires_grad for p in model.lora_layers()["0"].parameters()] == [False, False, True, True]
    plain = net()
    before = Snapshot(plain)
    with pytest.raises(ValueError, match="nothing to adapt"):
        LoraModel(plain, LoraConfig(target_modules=["nothing"]), "default")
    assert Snapshot(plain) == before


def test_arguments_of_pefts_scripts_change_nothing(folder: Path) -> None:
    x = torch.ones(5, 4).double()
    want = PeftModel.from_pretrained(net(), folder)(x)
    arguments = dict.fromkeys(HUB) | {"device_map": "auto", "local_files_only": True}
    model = PeftModel.from_pretrained(net(), folder, low_cpu_mem_usage=True, torch_device="cpu", **arguments)
    assert torch.equal(model(x), want)
    config = LoraConfig(r=2, target_modules=["0", "2"])
    noted = get_peft_model(net(), config, low_cpu_mem_usage=True, revision="v2", mixed=False)
    assert noted.peft_config["default"].revision == "v2" and config.revision is None
    result = noted.load_adapter(folder, "other", low_cpu_mem_usage=True)
    assert result.missing_keys == result.unexpected_keys == []
    assert set_peft_model_state_dict(noted, load_file(folder / "adapter_model.safetensors"), "other").missing_keys == []


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"ephemeral_gpu_offload": True}, ValueError, "ephemeral_gpu_offload=True is not supported"),
        ({"key_maping": {}}, TypeError, "no argument 'key_maping'; did you mean 'key_mapping'?"),
    ],
)
def test_arguments_that_would_change_something_are_refused(
    folder: Path, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    base = net()
    before = Snapshot(base)
    with pytest.raises(error) as raised:
        PeftModel.from_pretrained(base, folder, **arguments)
    assert words in str(raised.value) and Snapshot(base) == before


def test_mixed_kinds_of_adapters_are_refused() -> None:
    with pytest.raises(ValueError, match="mixed=True mixes kinds of adapters"):
        get_peft_model(net(), LoraConfig(target_modules=["0"]), "default", True)


def test_a_subfolder_a_configuration_and_other_keys(tmp_path: Path) -> None:
    model = adapted()
    x = torch.ones(5, 4).double()
    model.eval().save_pretrained(tmp_path / "inner")
    tensors = load_file(tmp_path / "inner" / "adapter_model.safetensors")
    old = {key.replace(".0.", ".first.").replace(".2.", ".last."): tensor for key, tensor in tensors.items()}
    save_file(old, tmp_path / "inner" / "adapter_model.safetensors")
    mapping = {"^first": "0", "^last": "2", "^l": "never, since the first that matches counts"}
    config = LoraConfig(r=2, lora_alpha=16, target_modules=["0", "2"])
    again = PeftModel.from_pretrained(net(), tmp_path, subfolder="inner", key_mapping=mapping, config=config)
    assert again.lora_layers()["0"].scaling == {"default": 8.0} and config.inference_mode is False
    again.set_scale("default", 0.5)
    assert torch.equal(again(x), model(x))
    with pytest.raises(ValueError, match=r"two tensors would be called 0\.lora_[AB]\.weight"):
        PeftModel.from_pretrained(net(), tmp_path, subfolder="inner", key_mapping={"^first|^last": "0"})


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_merging_wants_each_adapter_once(call: str) -> None:
    model = adapted()
    before = Snapshot(model)
    for names, words in (
        (["default"] * 2, "an adapter is named twice"),
        ([], "name an adapter"),
        (["no"], "no adapter"),
    ):
        with pytest.raises(ValueError, match=words):
            getattr(model, call)(adapter_names=names)
    assert Snapshot(model) == before


def test_options_of_peft_that_are_off_are_accepted_and_those_that_are_on_are_named() -> None:
    off = {"use_dora": False, "lora_bias": False, "layer_replication": None, "megatron_config": None}
    config = LoraConfig(r=2, target_modules=["0"], megatron_core="megatron.core", qalora_group_size=16, **off)
    assert config == LoraConfig(r=2, target_modules=["0"])
    assert config.use_dora is False and config.layer_replication is None and not hasattr(config, "use_dorra")
    for options in ({"use_dora": True}, {"layer_replication": [[0, 1]]}, {"trainable_token_indices": [1]}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}=.* is not supported"):
            LoraConfig(**options)


@pytest.mark.parametrize("name", ["eva", "corda", "lora_ga", "loftq"])
def test_options_of_an_init_that_is_not_used_are_said_to_be_ignored(name: str) -> None:
    cls = {f.name: f for f in dataclasses.fields(LoraConfig)}[f"{name}_config"].name
    value = {"eva": EvaConfig(rho=1.5), "loftq": {"loftq_bits": 4}}.get(name) or {"corda": {"corda_method": "kpm"}}.get(
        name, {"direction": "ArBr"}
    )
    with pytest.warns(UserWarning, match=f"{cls} is given but init_lora_weights is not '{name}'") as caught:
        LoraConfig(**{cls: value})
    assert caught[0].filename == __file__


@dataclasses.dataclass
class WithNote(LoraConfig):
    note: str = "mine"


def test_a_subclass_with_a_field_of_its_own_is_a_configuration(tmp_path: Path) -> None:
    config = WithNote(r=2, target_modules=["0"], note="hello")
    model = get_peft_model(net(), config)
    assert model.peft_config["default"].note == "hello"
    with pytest.warns(UserWarning, match="WithNote: note is not written"):
        model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(net(), tmp_path).peft_config["default"].r == 2


def test_an_adapted_layer_is_called_by_keyword_as_torchs() -> None:
    model = adapted()
    x = torch.ones(5, 4).double()
    assert torch.equal(model.model[0](input=x), model.model[0](x))
    assert "input" in inspect.signature(nn.Linear.forward).parameters


def test_a_gathered_state_dict_is_saved_in_place_of_the_parameters(tmp_path: Path) -> None:
    """As `accelerate` gives it: accelerator.get_state_dict(model)."""
    model = randomise(get_peft_model(net(), LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])))
    state = {key: x + 1 for key, x in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state, save_function=torch.save, is_main_process=True)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    live = get_peft_model_state_dict(model)
    assert saved.keys() == live.keys() and all(torch.equal(saved[key], x + 1) for key, x in live.items())
    state.pop(next(key for key in state if "lora_A" in key))
    with pytest.raises(ValueError, match=r"state_dict holds no base_model\.model\.0\.lora_A\.default\.weight"):
        model.save_pretrained(tmp_path, state_dict=state)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"push_to_hub": True}, ValueError, "push_to_hub=True is not supported"),
        ({"state_dic": {}}, TypeError, "no argument 'state_dic'; did you mean 'state_dict' or"),
    ],
)
def test_arguments_of_a_save_that_would_change_something_are_refused(
    tmp_path: Path, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as raised:
        adapted().save_pretrained(tmp_path, **arguments)
    assert words in str(raised.value) and not any(tmp_path.iterdir())


def test_a_configuration_is_read_and_written_with_pefts_arguments(tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules=["0"])
    config.save_pretrained(save_directory=tmp_path / "inner")
    again = PeftConfig.from_pretrained(pretrained_model_name_or_path=tmp_path, subfolder="inner", token=None)
    assert again == config
    with pytest.raises(TypeError, match="no argument 'revison'; did you mean 'revision'"):
        LoraConfig.from_pretrained(tmp_path, revison="main")
    assert config.is_prompt_learning is False and config.auto_mapping is None and config.qalora_group_size == 16


@pytest.mark.parametrize("names", [[], ["default"], ["default"] * 2, ["default"] * 3])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_generate_wants_one_name_for_each_prompt(names: list[str], by_keyword: bool) -> None:
    model = get_peft_model(llama(), LoraConfig()).eval()
    prompts = torch.ones(4, 3, dtype=torch.long)
    inputs: Any = {"input_ids": prompts} if by_keyword else {"inputs": prompts}
    with pytest.raises(ValueError, match=f"adapter_names has {len(names)} names for 4 prompts: give one for each"):
        model.generate(**inputs, adapter_names=names, max_new_tokens=1)
    assert len(model.generate(**inputs, adapter_names=["default"] * 4, max_new_tokens=1)) == 4


def test_the_model_of_a_lora_model_is_set_where_it_is_read() -> None:
    model, other = adapted(), net()
    model.model = other
    assert model.model is model.base_model.model is other


def test_a_configuration_is_read_with_the_hubs_arguments(folder: Path) -> None:
    adapted(r=3).save_pretrained(folder / "inner")
    assert LoraConfig.from_pretrained(folder, revision="main", token=None).r == 2
    assert LoraConfig.from_pretrained(folder, subfolder="inner").r == 3


def test_another_revision_than_the_configurations_is_named_as_in_peft() -> None:
    for library in (peft, lora_ref):
        config = library.LoraConfig(r=1, target_modules=["0"], revision="v1")
        with pytest.warns(UserWarning, match="revision"):
            model = library.get_peft_model(net(), config, revision="v2")
        assert model.peft_config["default"].revision == "v2"


@pytest.mark.parametrize("names", ["other", ["default", "other"]])
@pytest.mark.parametrize("init", [True, "mica"])
def test_gradients_are_switched_by_adapter_as_in_peft(names: Any, init: Any) -> None:
    found = []
    for library in (peft, lora_ref):
        options = {"r": 2, "target_modules": ["0", "2"], "init_lora_weights": init}
        model = library.get_peft_model(net().float(), library.LoraConfig(**options))
        model.add_adapter("other", library.LoraConfig(**options))
        steps = []
        for on in (True, False, True):
            model.set_requires_grad(names, requires_grad=on)
            steps.append([name for name, p in model.named_parameters() if p.requires_grad])
        found.append((steps, model.active_adapters))
    assert found[0] == found[1] and found[1][0][0]
    with pytest.raises(ValueError, match="there is no adapter 'nobody'"):
        adapted().set_requires_grad("nobody")


def test_a_mapping_of_keys_that_is_no_pattern_is_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"key_mapping=.*'\(' is no regular expression"):
        PeftModel.from_pretrained(net(), tmp_path, key_mapping={"(": "x"})


@pytest.mark.parametrize("given", [{"r": 2}, None, "default"])
def test_a_configuration_that_is_none_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match=r"a lora_ref\.LoraConfig is needed"):
        get_peft_model(net(), given)


def test_a_layer_that_is_merged_already_says_so() -> None:
    layer: Any = next(iter(adapted().base_model.lora_layers().values()))
    layer.merge()
    with pytest.warns(UserWarning, match="default is merged already: nothing is added"):
        layer.merge()


@pytest.mark.parametrize("width", [1, 5])
def test_tensors_of_another_shape_are_ignored_on_request(folder: Path, width: int) -> None:
    """Smaller and larger ones; what fits is loaded, and the others start anew."""
    other = nn.Sequential(nn.Linear(width, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    with pytest.raises(ValueError, match="does not fit the model"):
        PeftModel.from_pretrained(other, folder)
    model = get_peft_model(other, LoraConfig(r=2, target_modules=["0", "2"]))
    saved = {key: x + 1 for key, x in get_peft_model_state_dict(adapted()).items()}
    with pytest.warns(UserWarning, match="1 tensors have another shape than the model's and are ignored"):
        set_peft_model_state_dict(model, saved, ignore_mismatched_sizes=True)
    layer = other[0]
    assert layer.lora_A["default"].weight.shape == (2, width)
    assert torch.equal(layer.lora_B["default"].weight, saved["base_model.model.0.lora_B.weight"])


def test_a_folder_without_the_tensors_of_a_layer_is_refused(tmp_path: Path) -> None:
    """Its configuration names the layer, and no layers_to_transform says that it may be left out."""
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0", "2"]))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: x for key, x in load_file(path).items() if ".2." not in key}, path)
    with pytest.raises(ValueError, match=r"2\.lora_A\.weight: is missing"):
        PeftModel.from_pretrained(net(), tmp_path)


@pytest.mark.parametrize("base", [nn.Embedding(5, 4), nn.Conv1d(4, 4, 1)])
def test_only_a_linear_layer_is_told_how_it_stores_its_weight(base: nn.Module, recwarn: Any) -> None:
    get_peft_model(nn.Sequential(base), LoraConfig(r=2, target_modules=["0"], fan_in_fan_out=True))
    assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message)]
    with pytest.warns(UserWarning, match=r"fan_in_fan_out=True, but Linear stores \(out, in\)"):
        get_peft_model(net(), LoraConfig(r=2, target_modules=["0"], fan_in_fan_out=True))
