"""Models whose modules are shared, read past their forward, computed, or of a class of their own."""

import pytest
import torch
from models import Twice, llama, randomise
from torch import nn

from lora_ref import LoraConfig, get_peft_model
from spec_tests import agree, distance


def test_a_shared_module_is_adapted_wherever_it_is_held_where_peft_adapts_the_first_place_only():
    torch.manual_seed(0)
    net = Twice().double()
    layer = net.a
    model = randomise(get_peft_model(net, LoraConfig(r=2, target_modules=["a"])))
    x = torch.randn(3, 4).double()
    W = (layer.weight + model.lora_layers()["a"].delta("default")).detach()
    want = (x @ W.T + layer.bias) @ W.T + layer.bias
    assert net.block[0] is net.a
    agree(model(x), want)
    model.merge_adapter()
    agree(model(x), want)
    model.unmerge_adapter()
    assert model.unload() is net
    assert net.block[0] is net.a is layer


def test_samples_of_a_batch_are_told_apart_in_a_saved_layer_that_the_fast_path_would_bypass():
    torch.manual_seed(0)
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2)).double().eval()
    x = torch.randn(2, 3, 8).double()
    config = LoraConfig(r=2, target_modules=["1"], modules_to_save=["linear1"])
    with torch.no_grad():
        base = net(x)
        model = randomise(get_peft_model(net, config)).eval()
        y = model(x, adapter_names=["default", "__base__"])
        agree(y[1], base[1])
        agree(y[0], model(x)[0])
        assert distance(y[0], base[0]) > 0.01


def test_beams_multiply_the_adapter_names():
    torch.manual_seed(0)
    transformers = pytest.importorskip("transformers")
    model = randomise(get_peft_model(llama().eval(), LoraConfig(r=2))).eval()
    prompts = torch.randint(3, 20, (2, 4))
    kwargs = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    kwargs["attention_mask"] = torch.ones_like(prompts)
    mixed = model.generate(input_ids=prompts, adapter_names=["default", "__base__"], **kwargs)
    assert torch.equal(mixed[0], model.generate(input_ids=prompts, **kwargs)[0])
    with model.disable_adapter():
        assert torch.equal(mixed[1], model.generate(input_ids=prompts, **kwargs)[1])
    options = {k: v for k, v in kwargs.items() if k != "attention_mask"}
    asked = transformers.GenerationConfig(**options)  # a configuration, likewise
    names = ["default", "__base__"]
    said = {"generation_config": asked, "attention_mask": kwargs["attention_mask"]}
    assert torch.equal(mixed, model.generate(input_ids=prompts, adapter_names=names, **said))


def test_an_adapter_added_to_a_merged_layer_starts_from_the_original_weight():
    torch.manual_seed(0)
    model = randomise(get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(r=2, target_modules=["0"])))
    layer = model.lora_layers()["0"]
    original = layer.base_weight.detach().clone()
    model.merge_adapter()
    assert not torch.equal(layer.base_weight, original)
    assert torch.equal(layer.logical_weight(), original)


def test_one_name_may_stand_for_a_list_of_one():
    model = get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(r=2, target_modules=["0"]))
    model.merge_adapter("default")
    model.unmerge_adapter()
    assert isinstance(model.merge_and_unload(adapter_names="default"), nn.Sequential)
