"""Layers on which an adapter would not act are refused by name, and left out by "all-linear", which says so."""

import ast
import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from models import randomise
from torch import nn

from lora_ref import LoraConfig, explain, get_peft_model
from lora_ref.safe.unreached import why_not
from spec_tests import close

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1}


def mamba() -> Any:
    return transformers.MambaForCausalLM(transformers.MambaConfig(**SMALL, state_size=4))


def jamba() -> Any:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24, "num_experts": 1}
    layout = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    config = transformers.JambaConfig(**SMALL | {"num_hidden_layers": 2}, **heads, **layout, use_mamba_kernels=False)
    return transformers.JambaForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "attribute"),
    [
        (mamba, "out_proj"),
        (mamba, "conv1d"),
        (mamba, "dt_proj"),
        (mamba, "x_proj"),
        (jamba, "dt_proj"),
        (jamba, "conv1d"),
    ],
)
def test_what_a_kernel_reads_is_refused(make: Any, attribute: str) -> None:
    net = make()
    with pytest.raises(ValueError, match=rf"{attribute}: \w+Mixer passes {attribute}\.weight to \w+, in place of"):
        get_peft_model(net, LoraConfig(r=2, target_modules=[attribute]))
    assert not any("lora_" in name for name, _ in net.named_parameters())


def test_a_class_derived_from_one_with_a_kernel_is_refused_too() -> None:
    net = mamba()
    mixer = net.backbone.layers[0].mixer
    mixer.__class__ = type("Mine", (type(mixer),), {})
    with pytest.raises(ValueError, match=r"out_proj: Mine passes out_proj\.weight to"):
        get_peft_model(net, LoraConfig(r=2, target_modules=["out_proj"]))


@pytest.mark.parametrize(("make", "left"), [(mamba, ["dt_proj", "out_proj", "x_proj"]), (jamba, ["dt_proj"])])
def test_all_linear_leaves_out_what_a_kernel_reads_and_says_so(make: Any, left: list[str]) -> None:
    net = make()
    config = LoraConfig(r=2, target_modules="all-linear")
    rules = {m.name: m.rule for m in explain(net, config).matches}
    out = {name.rpartition(".")[2] for name, rule in rules.items() if "in place of calling" in rule}
    assert sorted(out) == left and rules["lm_head"] == "the output layer"
    model = get_peft_model(net, config)
    reached = {name.rpartition(".")[2] for name in model.lora_layers()}
    assert "in_proj" in reached and not reached & set(left)
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 32)


class Pair(nn.Linear):
    """A router: logits and something else, as those of Llama 4 and PhiMoE."""

    def forward(self, x: torch.Tensor) -> Any:
        logits = super().forward(x)
        return logits, logits.argmax(-1)


class Wider(nn.Linear):
    """A decoupled layer: more outputs than the weight has rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return torch.cat([y, y], -1)


class Grouped(nn.Linear):
    """The weight is applied to two groups of the input, which has twice in_features."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.unflatten(-1, (2, self.in_features))).flatten(-2)


class Stateful(nn.Linear):
    """It needs what an earlier call of the model leaves in it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("what an earlier call left")


class Scaled(nn.Linear):
    """Another number, of the same shape: that is only warned about."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Masked(nn.Linear):
    """It wants a further argument, which an adapted layer passes on."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * mask


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Pair, "Pair returns a tuple, so it is no x W^T + b"),
        (Wider, "Wider returns a tensor of 6 features"),
        (Grouped, "Grouped does not take an input of 4 features, so it is no x W^T + b"),
        (Stateful, "Stateful does not take .*KeyError: 'what an earlier call left'"),
    ],
)
def test_a_subclass_that_is_no_linear_map_of_its_weight_is_refused(cls: Any, words: str) -> None:
    net = nn.Sequential(nn.Linear(4, 4), cls(4, 3))
    with pytest.raises(ValueError, match=words.replace("^", r"\^").replace("+", r"\+")):
        get_peft_model(net, LoraConfig(r=2, target_modules=["1"]))
    assert list(get_peft_model(net, LoraConfig(r=2, target_modules="all-linear")).lora_layers()) == ["0"]


class OfSequences(nn.Linear):
    """It takes inputs of three dimensions only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        return super().forward(x).view(batch, tokens, -1)


class OfImages(nn.Linear):
    """It takes inputs of four dimensions only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bhwi,oi->bhwo", x, self.weight) + self.bias


@pytest.mark.parametrize("cls", [Scaled, Masked, OfSequences, OfImages])
def test_a_subclass_of_the_same_shape_is_adapted_with_a_warning(cls: Any) -> None:
    with pytest.warns(UserWarning, match=f"{cls.__name__} has a forward of its own"):
        get_peft_model(nn.Sequential(cls(4, 3)), LoraConfig(r=2, target_modules=["0"]))


def test_the_routers_of_transformers_are_refused() -> None:
    from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear
    from transformers.models.llama4.modeling_llama4 import Llama4Router

    router = Llama4Router(transformers.Llama4TextConfig(hidden_size=8, num_local_experts=4, num_experts_per_tok=1))
    wide = IdeficsDecoupledLinear(4, 3, out_additional_features=2, bias=False)
    for layer in (router, wide):
        assert "so it is no x W^T + b" in str(why_not(layer, nn.Sequential(layer), "0"))


def mixtral() -> Any:
    experts = {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, **experts))


def qwen3_moe(**options: Any) -> Any:
    heads = {"intermediate_size": 24, "moe_intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SMALL | heads | experts | options))


@pytest.mark.parametrize(
    ("make", "targets", "wanted"),
    [
        (mixtral, ["w1", "w2", "w3"], ["down_proj", "gate_up_proj"]),
        (mixtral, ["q_proj", "w2"], ["down_proj"]),
        (qwen3_moe, ["gate_proj", "up_proj", "down_proj"], ["down_proj", "gate_up_proj"]),
        (qwen3_moe, ["q_proj", "experts.up_proj"], ["gate_up_proj"]),
        (mixtral, r".*\.(w1|w3)", ["gate_up_proj"]),
        (qwen3_moe, r".*\.(q_proj|gate_proj|down_proj)", ["down_proj", "gate_up_proj"]),
    ],
)
def test_targets_that_mean_fused_experts_are_refused_with_the_parameters_that_are_meant(
    make: Any, targets: list[str] | str, wanted: list[str]
) -> None:
    net = make()
    with pytest.raises(ValueError, match="the experts are fused into raw parameters") as raised:
        get_peft_model(net, LoraConfig(r=2, target_modules=targets))
    assert f"give target_parameters={wanted}" in str(raised.value)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=wanted))
    assert sum(layer.kind == "parameter" for layer in model.lora_layers().values()) == len(wanted)


def test_dense_layers_beside_fused_experts_are_adapted_with_a_warning() -> None:
    net = qwen3_moe(num_hidden_layers=2, mlp_only_layers=[0])
    with pytest.warns(
        UserWarning, match=r"layers\.0\.mlp\.down_proj: this layer is dense; model\.layers\.1\.mlp\.experts"
    ) as said:
        model = get_peft_model(net, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert "model.layers.0.mlp.down_proj" in model.lora_layers()
    assert str(said[0].message).endswith("exclude_modules=['down_proj'] leaves them out")


def test_what_the_warning_about_dense_layers_names_makes_the_folder_right_for_peft(tmp_path: Path) -> None:
    net = qwen3_moe(num_hidden_layers=2, mlp_only_layers=[0]).requires_grad_(False).eval()
    x = torch.arange(6).view(1, 6)
    with pytest.warns(UserWarning, match="this layer is dense") as said:
        get_peft_model(copy.deepcopy(net), LoraConfig(r=2, target_modules="all-linear"))
    (names,) = re.findall(r"exclude_modules=(\[.*\])", str(said[0].message))
    model = get_peft_model(
        copy.deepcopy(net), LoraConfig(r=2, target_modules="all-linear", exclude_modules=ast.literal_eval(names))
    )
    randomise(model).save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)
    assert not theirs.peft_config["default"].target_parameters, "PEFT adds adapters of the experts"
    assert any("experts" in name for name, _ in net.named_parameters())
    got, want = (m.eval()(input_ids=x).logits.detach() for m in (model, theirs))
    close(got, want, terms=4 * (16 + 24 + 16), size=float(want.abs().max()))  # two blocks in float32
