"""A second instance of each deviation of transformers, on another model, with transformers and PEFT alone."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2Model


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, which is shown."""
    found = float((a - b).detach().abs().max())
    print(f"    a difference of {found:.3g}")
    return found


def bert() -> BertForSequenceClassification:
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    return BertForSequenceClassification(BertConfig(vocab_size=11, **sizes)).eval()


def gpt2() -> GPT2Model:
    torch.manual_seed(1)
    return GPT2Model(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)).eval()


def config(*targets: str, **options: Any) -> LoraConfig:
    """Random factors."""
    return LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **options)


X = torch.tensor([[1, 2, 3, 4]])


def added_is_active() -> None:
    model = gpt2()
    model.add_adapter(config("c_attn", fan_in_fan_out=True), "one")
    model.set_adapter("one")
    before = model(X)[0]
    model.add_adapter(config("c_fc", fan_in_fan_out=True), "two")
    print("   ", model.active_adapters())
    assert gap(model(X)[0], before) > 0.01
    model.set_adapter("one")
    assert gap(model(X)[0], before) < 1e-3


def copy_stays_off() -> None:
    model = bert()
    model.add_adapter(config("query", modules_to_save=["classifier"]))
    model.classifier.modules_to_save["default"].bias.data += 5
    before = model(X).logits
    model.disable_adapters()
    model.enable_adapters()
    assert gap(model(X).logits, before) > 4
    assert gap(model(X).logits + 5, before) < 1e-3  # the adapter acts, the copy does not


def copy_trains_on() -> None:
    model = bert()
    for name in ("one", "two", "three"):
        model.add_adapter(config("query", modules_to_save=["classifier"]), name)
    found = {}
    for name in ("three", "one", "two"):
        model.set_adapter(name)
        names = [key.split(".") for key, p in model.named_parameters() if p.requires_grad]
        found[name] = {
            kind: {key[key.index(kind) + 1] for key in names if kind in key} for kind in ("modules_to_save", "lora_A")
        }
        assert found[name]["lora_A"] == {name}
    print("   ", found)
    assert found["three"]["modules_to_save"] == {"one", "two", "three"}
    assert found["one"]["modules_to_save"] == {"one", "two"}
    assert found["two"]["modules_to_save"] == {"two"}  # each call freezes the copy of the adapter that was active


def copy_of_one() -> None:
    model = bert()
    model.add_adapter(config("query", modules_to_save=["classifier"]), "one")
    try:
        model.add_adapter(config("value"), "two")  # this sets it
        model.set_adapter("two")
    except ValueError as error:
        print("   ", str(error)[:90])
    else:
        raise AssertionError("it can be set")


def dropout_in_evaluation() -> None:
    model = bert()
    model.add_adapter(config("dense", lora_dropout=0.7))
    assert not model.training and gap(model(X).logits, model(X).logits) > 0.01
    model.eval()
    assert gap(model(X).logits, model(X).logits) < 1e-3
