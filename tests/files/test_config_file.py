"""adapter_config.json: what is written is what is read."""

import dataclasses
import inspect
import json
from pathlib import Path

import pytest
from configs import configs
from hypothesis import given
from torch import nn

from lora_ref import CordaConfig, EvaConfig, LoftQConfig, LoraConfig, PeftModel, get_peft_model
from lora_ref.files import config_file
from lora_ref.files.config_file import OFF_IN_PEFT


@given(config=configs)
def test_json_gives_an_equal_config_back(config: LoraConfig) -> None:
    text = config_file.dumps(config)
    assert config_file.from_dict(json.loads(text)) == config
    assert text == config_file.dumps(config_file.from_dict(json.loads(text)))
    assert json.loads(text)["peft_type"] == "LORA" and list(json.loads(text)) == sorted(json.loads(text))


def test_a_configuration_is_made_from_what_to_dict_says(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q"], rank_pattern={"q": 2})
    assert LoraConfig(**config.to_dict()) == config == dataclasses.replace(config)
    config.save_pretrained(tmp_path / "new")
    assert LoraConfig.from_pretrained(tmp_path / "new") == config
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    dataclasses.replace(config, r=8).save_pretrained(tmp_path / "new")  # the folder is there
    assert LoraConfig.from_pretrained(tmp_path / "new").r == 8


@pytest.mark.parametrize("init, option", [("corda", "corda_config"), ("eva", "eva_config"), ("loftq", "loftq_config")])
def test_further_fields_of_peft_are_for_its_computation_and_dropped(init: str, option: str) -> None:
    made = {"corda": CordaConfig(), "eva": EvaConfig(rho=3.0), "loftq": LoftQConfig()}[init]
    data = LoraConfig(init_lora_weights=init, **{option: made}).to_dict()
    data[option]["cache_file"] = "covariances.pt"
    assert getattr(config_file.from_dict(data), option) == made


def test_a_configuration_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    monkeypatch.setattr("lora_ref.files.config_file.MAX_BYTES", 100)
    with pytest.raises(ValueError, match="larger than 100 bytes"):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), tmp_path)


@pytest.mark.parametrize("name", sorted(OFF_IN_PEFT))
def test_options_of_peft_can_be_set_to_their_off_value_and_to_no_other(name: str) -> None:
    config = LoraConfig(r=2)
    setattr(config, name, OFF_IN_PEFT[name])
    assert getattr(config, name) == OFF_IN_PEFT[name] and config == LoraConfig(r=2)
    with pytest.raises(ValueError, match=rf"{name}=True: is not supported; {name}={OFF_IN_PEFT[name]} is accepted"):
        setattr(config, name, True)


def test_a_subclass_with_an_option_of_its_own_takes_those_of_peft_that_are_off() -> None:
    @dataclasses.dataclass
    class Mine(LoraConfig):
        mine: int = 3

    made = Mine(use_dora=False, mine=4, r=2)
    assert (made.mine, made.r) == (4, 2) and dataclasses.replace(made, r=3).mine == 4
    with pytest.raises(ValueError, match="use_dora=True: is not supported"):
        Mine(use_dora=True)
    with pytest.raises(TypeError, match="Mine has no option 'lora_alhpa'; did you mean 'lora_alpha'"):
        Mine(lora_alhpa=2)
    assert list(inspect.signature(Mine).parameters)[-1] == "mine"
