"""Models whose modules are shared, read past their forward, computed, or of a class of their own."""

import dataclasses
import json

import pytest
import torch
from models import randomise
from torch import Tensor, nn

from lora_ref import LoraConfig, get_peft_model
from lora_ref.safe.atomic import transaction
from spec_tests import agree, distance


class Twice(nn.Module):
    """One linear layer under two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.block = nn.Sequential(self.a)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.a(x))


def test_a_shared_module_is_adapted_wherever_it_is_held_where_peft_adapts_the_first_place_only():
    torch.manual_seed(0)
    net = Twice().double()
    layer = net.a
    model = randomise(get_peft_model(net, LoraConfig(r=2, target_modules=["a"])))
    x = torch.randn(3, 4).double()
    W = (layer.weight + model.layers()["a"].delta("default")).detach()
    want = (x @ W.T + layer.bias) @ W.T + layer.bias
    assert net.block[0] is net.a
    agree(model(x), want)
    model.merge_adapter()
    agree(model(x), want)
    model.unmerge_adapter()
    assert model.unload() is net
    assert net.block[0] is net.a is layer


def test_a_shared_module_is_not_called_tied(recwarn):
    get_peft_model(Twice(), LoraConfig(r=2, target_modules=["a"]))
    assert not [w for w in recwarn if "tied" in str(w.message)]


def test_a_linear_layer_with_a_forward_of_its_own_is_warned_about():
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    with pytest.warns(UserWarning, match="Doubled has a forward of its own"):
        get_peft_model(nn.Sequential(Doubled(3, 3)), LoraConfig(r=2, target_modules=["0"]))


@pytest.mark.parametrize("base", [nn.Embedding, nn.Conv1d])
def test_an_embedding_or_convolution_with_a_forward_of_its_own_is_refused(base):
    class Own(base):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.long() if base is nn.Embedding else nn.functional.pad(x, (2, 0)))

    net = nn.Sequential(Own(*((5, 3) if base is nn.Embedding else (3, 3, 3))))
    with pytest.raises(ValueError, match="0: Own computes its output in a forward of its own"):
        get_peft_model(net, LoraConfig(r=1, target_modules=["0"]))


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_weight_that_is_computed_from_others_is_refused(wrap):
    net = nn.Sequential(wrap(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"0: .*its weight is computed from other parameters"):
        get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))


def test_the_projection_of_an_attention_is_not_saved_by_itself():
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    config = LoraConfig(r=2, target_modules=["linear1"], modules_to_save=["out_proj"])
    with pytest.raises(ValueError, match="save the attention whole"):
        get_peft_model(net, config)


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


def test_an_encoder_that_makes_nested_tensors_is_warned_about():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    with pytest.warns(UserWarning, match="enable_nested_tensor=False"):
        get_peft_model(encoder, LoraConfig(r=2, target_modules=["linear1"]))


def test_beams_multiply_the_adapter_names():
    torch.manual_seed(0)
    pytest.importorskip("transformers")
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
    model = randomise(get_peft_model(llama, LoraConfig(r=2))).double().eval()
    prompts = torch.randint(3, 20, (2, 4))
    kwargs = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    kwargs["attention_mask"] = torch.ones_like(prompts)
    mixed = model.generate(input_ids=prompts, adapter_names=["default", "__base__"], **kwargs)
    assert torch.equal(mixed[0], model.generate(input_ids=prompts, **kwargs)[0])
    with model.disable_adapter():
        assert torch.equal(mixed[1], model.generate(input_ids=prompts, **kwargs)[1])
    asked = GenerationConfig(**{k: v for k, v in kwargs.items() if k != "attention_mask"})  # a configuration, likewise
    names = ["default", "__base__"]
    said = {"generation_config": asked, "attention_mask": kwargs["attention_mask"]}
    assert torch.equal(mixed, model.generate(input_ids=prompts, adapter_names=names, **said))


def test_an_adapter_added_to_a_merged_layer_starts_from_the_original_weight():
    torch.manual_seed(0)
    model = randomise(get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(r=2, target_modules=["0"])))
    layer = model.layers()["0"]
    original = layer.base_weight.detach().clone()
    model.merge_adapter()
    assert not torch.equal(layer.base_weight, original)
    assert torch.equal(layer.logical_weight(), original)


def test_one_name_may_stand_for_a_list_of_one():
    model = get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(r=2, target_modules=["0"]))
    model.merge_adapter("default")
    model.unmerge_adapter()
    assert isinstance(model.merge_and_unload(adapter_names="default"), nn.Sequential)


def test_a_configuration_is_made_from_what_to_dict_says(tmp_path):
    config = LoraConfig(r=4, target_modules=["q"], rank_pattern={"q": 2})
    assert LoraConfig(**config.to_dict()) == config == dataclasses.replace(config)
    config.save_pretrained(tmp_path / "new")
    assert LoraConfig.from_pretrained(tmp_path / "new") == config
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_misspelt_option_is_an_error_when_it_is_set_too():
    config = LoraConfig()
    with pytest.raises(AttributeError, match="did you mean 'lora_alpha'"):
        config.lora_alhpa = 32
    config.r = -1  # a bad value is found when it is used
    with pytest.raises(ValueError, match="r=-1"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), config)


def test_an_inner_transaction_leaves_undoing_to_the_outer_one():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ValueError, match="late"), transaction(net):
        with transaction(net[0]):
            net[0].weight.requires_grad_(False)
        net[1] = nn.Identity()
        raise ValueError("late")
    assert net[0].weight.requires_grad
    assert isinstance(net[1], nn.ReLU)
    with pytest.raises(ValueError, match="inside"), transaction(net[0]), transaction(net):
        net[1] = nn.Identity()  # not covered by the outer one
        raise ValueError("inside")
    assert isinstance(net[1], nn.ReLU)
