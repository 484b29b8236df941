"""Each decision of tutorials/from_peft.toml is a difference that a script shows on both libraries."""

import tomllib
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lora_ref
from lora_ref.files.config_file import PEFT_VERSION

FILE = Path(__file__).parents[2] / "tutorials" / "from_peft.toml"
PAGE = tomllib.loads(FILE.read_text(encoding="utf-8"))
DECISIONS = PAGE["decision"]
RUN = [decision for decision in DECISIONS if "script" in decision]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def outcome(script: str, library: Any, folder: Path) -> str:
    """What a script leaves in `out`, or the name of the error that it raises."""

    def config(**options: Any) -> Any:
        return library.LoraConfig(**{"r": 2, "target_modules": ["0", "2"]} | options)

    def adapted(**options: Any) -> Any:
        model = library.get_peft_model(net(), config(**options))
        if "init_lora_weights" not in options:
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    torch.manual_seed(len(name))
                    parameter.data = torch.randn(parameter.shape).to(parameter)
        return model.eval()

    names = {
        **{"library": library, "net": net, "config": config, "adapted": adapted, "folder": str(folder)},
        **{
            "loftq": library.LoftQConfig(loftq_bits=4),
            "torch": torch,
            "nn": nn,
            "warnings": warnings,
            "X": torch.linspace(-1, 1, 12).double().reshape(3, 4),
        },
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exec(script, names)
        except Exception as error:  # its name is the outcome
            return type(error).__name__
    return str(names["out"])


@pytest.mark.parametrize("decision", RUN, ids=[decision["title"] for decision in RUN])
def test_the_difference_is_there(decision: dict[str, str], tmp_path: Path) -> None:
    for library, key in ((peft, "peft_out"), (lora_ref, "here_out")):
        folder = tmp_path / library.__name__
        folder.mkdir()
        assert outcome(decision["script"], library, folder) == decision[key], library.__name__
    assert decision["peft_out"] != decision["here_out"]


def test_every_decision_says_what_and_why() -> None:
    titles = [decision["title"] for decision in DECISIONS]
    assert len(set(titles)) == len(titles) > 15
    for decision in DECISIONS:
        assert all(decision[key].endswith(".") for key in ("peft", "here", "why"))
        assert ("script" in decision) is not ("not_run" in decision)


def test_every_name_of_peft_is_there_or_listed_as_missing_with_a_reason() -> None:
    listed = [name for row in PAGE["missing"] for name in row["names"]]
    assert len(set(listed)) == len(listed) and all(len(row["reason"]) > 15 for row in PAGE["missing"])
    if peft.__version__ == PEFT_VERSION:
        assert set(listed) == set(peft.__all__) - set(lora_ref.__all__)
