"""The card of an adapter folder: PEFT's metadata, and nothing of the user's is overwritten."""

import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from models import llama
from torch import nn

import lora_ref
from lora_ref import LoraConfig, get_peft_model
from lora_ref.files.model_card import model_card


def saved(folder: Path, name: str | None = None) -> Path:
    net = nn.Sequential(nn.Linear(2, 2))
    if name:
        net.config = types.SimpleNamespace(_name_or_path=name)  # as a model that the hub may know
    get_peft_model(net, LoraConfig(r=1, target_modules=["0"], base_model_name_or_path=name)).save_pretrained(folder)
    return folder / "README.md"


def test_a_card_is_written_and_one_that_is_there_stays(tmp_path: Path) -> None:
    path = saved(tmp_path, "somebody/some-model")
    text = path.read_text(encoding="utf-8")
    assert 'base_model: "somebody/some-model"' in text and "- lora" in text and "r=1, lora_alpha=8" in text
    path.write_text("mine", encoding="utf-8")
    saved(tmp_path)
    assert path.read_text(encoding="utf-8") == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_metadata_is_read_by_the_hubs_library() -> None:
    hub = pytest.importorskip("huggingface_hub")
    for name in ("somebody/some-model", "./a folder/with: signs", None):
        card = hub.ModelCard(model_card(LoraConfig(target_modules=["q"], base_model_name_or_path=name)))
        assert card.data.library_name == "peft" and "lora" in card.data.tags
        assert card.data.base_model == name


def test_the_card_names_the_option_that_targets() -> None:
    text = model_card(LoraConfig(target_modules=[], target_parameters=["experts.w"]))
    assert "target_parameters: experts.w." in text and "target_modules" not in text


def test_the_task_counts_however_it_is_written() -> None:
    for task in ("".join(["CAUSAL", "_LM"]), lora_ref.TaskType.CAUSAL_LM):
        assert "pipeline_tag: text-generation" in model_card(LoraConfig(target_modules=["q"], task_type=task))


def test_a_hostile_name_does_not_end_the_metadata() -> None:
    text = model_card(LoraConfig(target_modules=["q"], base_model_name_or_path="x\n---\nlicense: mit"))
    assert len(re.findall(r"^---$", text, re.M)) == 2


@pytest.mark.parametrize(("make", "task_type"), [(llama, "CAUSAL_LM"), (llama, None), (nn.Sequential, None)])
def test_the_metadata_is_pefts(make: Callable[..., Any], task_type: str | None, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    found = []
    for library in (peft, lora_ref):
        base = make() if make is llama else make(nn.Linear(2, 2))
        if make is llama:
            base.config._name_or_path = base.name_or_path = "somebody/some-model"
            base.add_model_tags(["tag: one", "null"])
        options = {"task_type": task_type, "base_model_name_or_path": "somebody/some-model"}
        config = library.LoraConfig(r=1, target_modules=["q_proj" if make is llama else "0"], **options)
        model = library.get_peft_model(base, config)
        model.save_pretrained(tmp_path / library.__name__)
        data = hub.ModelCard.load(tmp_path / library.__name__ / "README.md").data
        found.append((data.library_name, data.base_model, data.pipeline_tag, set(data.tags)))
    assert found[0] == found[1]
