"""A tenth of the zoo: each class still comes out as in results.json. `make zoo` runs all of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("peft")

sys.path.insert(0, str(Path(__file__).parent))
import examine
import outcomes

COMMITTED = outcomes.read()
ROWS: dict[str, dict[str, Any]] = COMMITTED["classes"]
SAMPLE = {
    "text": (
        *("LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM"),
        *("GPT2LMHeadModel", "GPTNeoXForCausalLM", "OPTForCausalLM", "BloomForCausalLM", "FalconForCausalLM"),
        *(
            "BertLMHeadModel",
            "RobertaForCausalLM",
            "DebertaV2ForMaskedLM",
            "DistilBertForMaskedLM",
            "AlbertForMaskedLM",
        ),
        *("T5ForConditionalGeneration", "BartForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM"),
        *("DeepseekV3ForCausalLM", "LagunaForCausalLM", "MambaForCausalLM"),
    ),
    "vision": (
        *("ViTForImageClassification", "CLIPForImageClassification", "Dinov2ForImageClassification"),
        *("MobileViTForImageClassification", "MaskFormerModel", "UperNetForSemanticSegmentation"),
    ),
    "audio": (
        "Wav2Vec2ForSequenceClassification",
        "HubertForSequenceClassification",
        "MoonshineForConditionalGeneration",
    ),
    "multimodal": (
        *("LlavaForConditionalGeneration", "Qwen3VLForConditionalGeneration", "PaliGemmaForConditionalGeneration"),
        "FlavaForPreTraining",
    ),
}
NAMES = [(family, name) for family, names in SAMPLE.items() for name in names]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The layers are tiny: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("family", "name"), NAMES, ids=[name for _, name in NAMES])
def test_a_class_comes_out_as_in_the_report(family: str, name: str) -> None:
    row = examine.examine(name)
    assert row == ROWS[name], "make zoo"
    assert row["family"] == family
    assert [step for step, said in outcomes.wrong(row).items() if outcomes.cause(name, step, said) is None] == []


def test_the_tenth_has_each_family_and_each_cause() -> None:
    names = {name for _, name in NAMES}
    assert len(names) == len(NAMES) >= len(ROWS) / 10
    assert SAMPLE.keys() == {row["family"] for row in ROWS.values()}
    assert [why.why for why in outcomes.CAUSES if not names & {*why.classes}] == []


def test_whatever_is_not_right_has_a_cause_and_each_cause_its_classes() -> None:
    assert outcomes.unexplained(COMMITTED) == []
    for why in outcomes.CAUSES:
        said = [outcomes.wrong(ROWS[name]).get(why.step, "") for name in why.classes]
        assert all(text.startswith(why.says) for text in said), why


def test_a_mixture_of_experts_that_peft_misreads_has_a_warning_that_names_the_way_out() -> None:
    for why in outcomes.CAUSES:
        if "A warning names `exclude_modules`" in why.why:
            for name in why.classes:
                assert any("exclude_modules=" in text for text in ROWS[name]["warnings"]), name


def test_a_row_without_a_cause_is_told() -> None:
    made = {"classes": {"LlamaForCausalLM": {"family": "text", "layers": 1, "merged": "the merged output differs"}}}
    assert outcomes.unexplained(made) == ["LlamaForCausalLM: merged: the merged output differs"]
    assert "0 of 1 classes are right" in outcomes.summary(made)


def test_an_adapter_that_does_not_act_is_told() -> None:
    model = torch.nn.Linear(2, 2)
    outputs = [model(torch.ones(1, 2))]
    assert examine.near(outputs, outputs) and not examine.near([1.01 * outputs[0]], outputs)
    tiny_ones = [1e-9 * outputs[0]]
    assert not examine.near([torch.zeros(1, 2)], tiny_ones), "the size of the outputs does not count"


def test_the_report_is_about_all_classes_and_the_pinned_versions() -> None:
    assert list(ROWS) == json.loads((outcomes.HERE / "classes.json").read_text(encoding="utf-8"))
    pins = (outcomes.HERE.parents[1] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert {f"{name}=={number}" for name, number in COMMITTED["versions"].items()} <= set(pins)
    assert outcomes.TABLE.read_text(encoding="utf-8") == outcomes.page(COMMITTED), "make zoo"
