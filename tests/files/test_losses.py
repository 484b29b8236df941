"""No save loses a changed base weight without a word: resized vocabularies, trained weights, changed configs."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import gpt2, llama, randomise
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from lora_ref import LoraConfig, PeftModel, get_peft_model
from spec_tests import agree

TOKENS = torch.tensor([[3, 5, 33]])  # 33 is new
NETS = {"llama": llama, "llama, tied": lambda: llama(tie_word_embeddings=True), "gpt2": gpt2}
TARGETS = {
    "attention": {"target_modules": ["q_proj", "c_attn"]},
    "with embed_tokens": {"target_modules": ["q_proj", "c_attn", "embed_tokens", "wte"]},
    "with lm_head": {"target_modules": ["q_proj", "c_attn", "lm_head"]},
    "embed_tokens saved": {"target_modules": ["q_proj", "c_attn"], "modules_to_save": ["embed_tokens", "wte"]},
}


def resized(net: Any) -> Any:
    net.resize_token_embeddings(34, mean_resizing=False)
    return net.eval()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.filterwarnings("ignore")
def test_a_vocabulary_that_was_resized_comes_back_with_the_adapter(name: str, targets: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    NETS[name]().save_pretrained(tmp_path / "base")
    net = resized(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model = randomise(get_peft_model(net, LoraConfig(r=2, **TARGETS[targets])), 0.1).eval()
    with pytest.warns(UserWarning, match=r"the vocabulary was resized \(it had 32 tokens\): the embeddings are saved"):
        model.save_pretrained(tmp_path / "adapter")
    want = model(input_ids=TOKENS).logits
    torch.manual_seed(1)  # the new rows are drawn again, and replaced by the file's
    again = PeftModel.from_pretrained(
        resized(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), tmp_path / "adapter"
    )
    agree(again(input_ids=TOKENS).logits, want)
    with pytest.raises(ValueError, match="has shape"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore")
def test_peft_reads_a_resized_vocabulary(tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    net = resized(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model = randomise(get_peft_model(net, LoraConfig(r=2, target_modules=["q_proj"])), 0.1).eval()
    model.save_pretrained(tmp_path / "adapter")
    want = model(input_ids=TOKENS).logits
    torch.manual_seed(1)
    other = resized(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    agree(peft.PeftModel.from_pretrained(other, tmp_path / "adapter")(input_ids=TOKENS).logits, want)


def test_without_a_saved_base_the_size_when_adapted_counts(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if "lora_" not in key]
    model.resize_token_embeddings(40, mean_resizing=False)
    with pytest.warns(UserWarning, match=r"was resized \(it had 32 tokens\)"):
        model.save_pretrained(tmp_path)
    kept = {key: len(t) for key, t in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_" not in key}
    assert kept == {"base_model.model.model.embed_tokens.weight": 40, "base_model.model.lm_head.weight": 40}
    with pytest.warns(UserWarning, match=r"resized .*but .*embed_tokens.weight.* is not saved: say save_embedding"):
        model.save_pretrained(tmp_path, save_embedding_layers=False)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("option", ["target_modules", "modules_to_save"])
def test_embeddings_with_an_adapter_are_not_resized(target: str, option: str) -> None:
    options = {"target_modules": ["q_proj"]}
    options[option] = [*options.get(option, []), target]
    model = get_peft_model(llama(), LoraConfig(r=2, **options))
    with pytest.raises(ValueError, match="resize the base model first, then add the adapter"):
        model.resize_token_embeddings(40)
    assert len(model.get_base_model().model.embed_tokens.weight) == 32


@pytest.mark.parametrize("bias", ["none", "all"])
def test_base_weights_that_train_and_are_not_in_the_file_are_named(bias: Any, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"], bias=bias))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    net[1].weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"1 parameters of the base model require gradients \(1\.weight\)") as caught:
        model.save_pretrained(tmp_path)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(m.peft_config["default"], "r", 4), "0 holds factors of rank 2 and s=4, but the .* r=4"),
        (lambda m: setattr(m.peft_config["default"], "lora_alpha", 2), "s=4, but the configuration .* s=1"),
        (lambda m: setattr(m.peft_config["default"], "use_rslora", True), "s=4, but"),
        (lambda m: setattr(m.peft_config["default"], "rank_pattern", {"0": 3}), "rank 2 .* r=3"),
        (lambda m: setattr(m.peft_config["default"], "target_modules", ["2"]), "0 is adapted, but"),
        (
            lambda m: setattr(m.peft_config["default"], "target_modules", ["0", "2"]),
            "2 is not adapted, but the configuration",
        ),
        (lambda m: setattr(m.model[0].lora_A["default"], "weight", nn.Parameter(torch.ones(5, 3))), "rank 5"),
    ],
)
def test_a_folder_that_nobody_could_read_is_not_written(change: Any, words: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
    change(model)
    with pytest.raises(ValueError, match=words):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("part", "shape"), [("lora_A", (2, 5)), ("lora_B", (4, 3)), ("lora_B", (5, 2))])
def test_factors_of_another_shape_are_not_written(part: str, shape: tuple[int, int], tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    getattr(model.model[0], part)["default"].weight = nn.Parameter(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"0 holds factors (for|of rank)"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("empty_folder", [False, True])
def test_a_base_whose_configuration_is_gone_is_named(name: str, empty_folder: bool, tmp_path: Path) -> None:
    """As in PEFT. With modules_to_save, or save_embedding_layers, nothing can be lost."""
    NETS[name]().save_pretrained(tmp_path / "base")
    net = resized(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    shutil.rmtree(tmp_path / "base")
    if empty_folder:  # transformers reads a configuration of defaults from it
        (tmp_path / "base").mkdir()
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["q_proj", "c_attn"], fan_in_fan_out=name == "gpt2"))
    with pytest.warns(
        UserWarning, match="cannot be read: if the vocabulary was resized before the adapter, say save_em"
    ):
        model.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert any("embed" in key or "wte" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


def test_embeddings_that_are_left_out_by_choice_are_not_asked_for(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(net, LoraConfig(r=2, target_modules=["q_proj"]))
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
