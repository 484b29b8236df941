"""Layers that torch.utils.checkpoint computes again: with the adapters of the forward, or not at all."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import randomise
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint
from transformers.pytorch_utils import Conv1D

from lora_ref import LoraConfig, PeftModel, get_peft_model


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.reentrant = False

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))

    def forward(self, x: torch.Tensor, checkpointed: bool = True) -> torch.Tensor:
        return checkpoint(self.block, x, use_reentrant=self.reentrant) if checkpointed else self.block(x)


def made(reentrant: bool = False) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(Blocks().double(), LoraConfig(r=2, target_modules=["up", "down"]))
    model.model.reentrant = reentrant
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up", "down"]))
    return randomise(model)


X = torch.linspace(-1, 1, 12).double().reshape(3, 4).requires_grad_()
SWITCHES: dict[str, Callable[[Any], Any]] = {
    "set_adapter": lambda m: m.set_adapter("other"),
    "both": lambda m: m.set_adapter(["default", "other"]),
    "none": lambda m: m.set_adapter([]),
    "disable": lambda m: m.disable_adapter_layers(),
    "merge": lambda m: m.merge_adapter(),
    "set_scale": lambda m: m.set_scale("default", 0.5),
    "one layer": lambda m: m.model.up.enable_adapters(False),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_between_forward_and_backward_is_refused(switch: str, reentrant: bool) -> None:
    model = made(reentrant)
    y = model(X).square().sum()
    SWITCHES[switch](model)
    # where other shapes are saved, torch notices first
    words = r"in forward the active adapters were \['default'\]; switch after|different metadata|number"
    with pytest.raises((ValueError, CheckpointError), match=words):
        y.backward()


@pytest.mark.parametrize("switch", ["both", "set_scale"])
def test_without_checkpoints_the_gradients_are_those_of_the_forward(switch: str) -> None:
    grads = []
    for switched in (False, True):
        model = made()
        y = model(X, checkpointed=False).square().sum()
        if switched:
            SWITCHES[switch](model)
        y.backward()
        grads.append([layer.factors("default")[1].grad for layer in model.lora_layers().values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_switch_that_is_undone_before_backward_is_right(reentrant: bool) -> None:
    """As in preference training: the reference is the base model, computed without gradients in between."""
    grads = []
    for checkpointed in (False, True):
        model = made(reentrant)
        y = model(X, checkpointed=checkpointed).square().sum()
        with model.disable_adapter(), torch.no_grad():
            model(X, checkpointed=checkpointed)
        y.backward()
        grads.append([layer.factors("default")[1].grad for layer in model.lora_layers().values()])
    assert all(a is not None and torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_graphs_of_two_adapters_are_told_apart(reentrant: bool) -> None:
    model = made(reentrant)
    first = model(X).sum()
    model.set_adapter("other")
    second = model(X).sum()
    second.backward()
    assert model.model.up.factors("other")[1].grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"the active adapters were \['default'\]"):
        first.backward()


class Nested(Blocks):
    """A checkpoint inside of a checkpoint."""

    def forward(self, x: torch.Tensor, checkpointed: bool = True) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=self.reentrant) if checkpointed else self.block(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_in_checkpoints_are_right_or_refused(reentrant: bool) -> None:
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = randomise(get_peft_model(Nested().double(), LoraConfig(r=2, target_modules=["up", "down"])))
        model.model.reentrant = reentrant
        y = model(X, checkpointed=checkpointed).square().sum()
        y.backward()
        grads.append([layer.factors("default")[1].grad for layer in model.lora_layers().values()])
    assert all(a is not None and torch.equal(a, b) for a, b in zip(*grads, strict=True))
    y = model(X).square().sum()
    model.set_scale("default", 0.5)
    with pytest.raises(ValueError, match="switch after backward"):
        y.backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.delete_adapter("other"),
        lambda m: m.add_adapter("third", LoraConfig(r=1, target_modules=["up"])),
        lambda m: m.set_scale("other", 0.5),
    ],
    ids=["delete", "add", "scale"],
)
def test_a_change_of_an_adapter_that_is_not_active_is_no_switch(change: Callable[[Any], Any], reentrant: bool) -> None:
    model = made(reentrant)
    y = model(X).square().sum()
    change(model)
    y.backward()
    assert model.model.up.factors("default")[1].grad.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_switch_of_copies_that_are_saved_whole_is_refused(reentrant: bool) -> None:
    """The checkpoint has no adapted layer in it, but a module that is saved whole."""
    net = nn.Sequential(nn.Linear(4, 4), Blocks()).double()
    net[1].reentrant = reentrant
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], modules_to_save=["up"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"], modules_to_save=["up"]))
    y = model(X).square().sum()
    model.set_adapter("other")
    with pytest.raises(ValueError, match=r"the active adapters were \['default'\]"):
        y.backward()


class Own(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden)


@pytest.mark.parametrize(
    ("layer", "key", "x"),
    [
        (nn.Linear(4, 2), "input", X.detach().float()),
        (nn.Linear(4, 2), "x", X.detach().float()),
        (Conv1D(2, 4), "x", X.detach().float()),
        (Own(4, 2), "hidden", X.detach().float()),
        (nn.Embedding(4, 2), "input", torch.tensor([1, 2])),
        (nn.Conv1d(3, 2, 1), "input", X.detach().float()),
    ],
)
@pytest.mark.filterwarnings("ignore:.*forward of its own", "ignore:fan_in_fan_out")
def test_an_adapted_layer_takes_its_input_by_name(layer: nn.Module, key: str, x: torch.Tensor) -> None:
    model = randomise(get_peft_model(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"])))
    assert torch.equal(model.model[0](**{key: x}), model.model[0](x))


def test_an_adapter_that_is_named_twice_in_one_layer_counts_once_or_is_refused() -> None:
    layer: Any = made().model.up
    before = layer(X)
    with pytest.raises(ValueError, match=r"an adapter is named twice: \['other', 'other'\]"):
        layer.merge(adapter_names=["other", "other"])
    with pytest.raises(ValueError, match=r"adapter_names=\[\]: name an adapter"):
        layer.merge(adapter_names=[])
    assert torch.equal(layer(X), before)
    layer.set_adapter(["other", "other"])
    assert layer.active_adapters == ["other"]
    layer.set_adapter("other")
    assert layer.active_adapters == ["other"]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [True, False])
def test_prompts_of_several_adapters_are_right_or_refused(reentrant: bool, inside: bool) -> None:
    """A mixed batch, whose names are there in forward: they must be there in backward."""
    names, grads = ["other", "__base__", "default"], []
    for checkpointed in (False, True):
        model = made(reentrant)
        layers = model.adapter_wrappers()
        for layer in layers:
            layer.adapter_names = names
        y = model(X, checkpointed=checkpointed).square().sum()
        if not inside:
            for layer in layers:
                layer.adapter_names = None
        if checkpointed and not inside:
            words = r"adapter_names was .*other|different metadata|different number"
            with pytest.raises((ValueError, CheckpointError), match=words):
                y.backward()
            return
        y.backward()
        grads.append([layer.factors("default")[1].grad for layer in layers])  # the active one trains
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_reentrant_checkpoints_are_checked_in_evaluation_mode_too(training: bool) -> None:
    model = made(reentrant=True).train(training)
    y = model(X).sum()
    model.set_adapter("other")
    with pytest.raises(ValueError, match="switch after backward"):
        y.backward()


def test_a_layer_takes_one_name_or_several_and_pefts_keywords() -> None:
    layer: Any = made().model.up
    layer.set_adapter("other")
    assert layer.active_adapters == ["other"] and layer.factors("other")[0].requires_grad
    layer.set_adapter(adapter_names=["default", "other"])
    assert layer.active_adapters == ["default", "other"]
    layer.merge(adapter_names="other")
    assert layer.merged_adapters == ["other"]
    layer.unmerge()
    with pytest.raises(ValueError, match="an adapter is named twice"):
        layer.merge(adapter_names=["other", "other"])
    layer.set_scale(adapter="other", scale=2)
    layer.set_scale("of another layer", 2)
    assert layer.scaling == {"default": 4.0, "other": 8.0}
    layer.delete_adapter(adapter_name="other")
    assert list(layer.r) == ["default"]


def test_a_module_that_is_saved_whole_takes_one_name() -> None:
    model = get_peft_model(Blocks(), LoraConfig(r=2, target_modules=["up"], modules_to_save=["down"]))
    model.add_adapter("b", LoraConfig(r=2, target_modules=["up"], modules_to_save=["down"]))
    model.model.down.set_adapter("b")
    assert model.model.down.active_adapters == ["b"]


class Scaled(nn.Linear):
    def forward(self, hidden: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        return factor * super().forward(hidden)


@pytest.mark.filterwarnings("ignore:.*forward of its own")
def test_further_arguments_by_keyword_reach_the_base_layer() -> None:
    net = nn.Sequential(Scaled(4, 2).double())
    x, want = X.detach(), 3 * net[0](X.detach())
    assert torch.equal(get_peft_model(net, LoraConfig(r=2, target_modules=["0"])).model[0](x, factor=3.0), want)


def test_a_scaling_cannot_be_divided_by_zero() -> None:
    layer: Any = made().model.up
    before = dict(layer.scaling)
    with pytest.raises(ValueError, match="scale=0: the scaling cannot be divided by it; give None"):
        layer.unscale_layer(0)
    assert layer.scaling == before


class Pair(nn.Linear):
    """It returns more than a tensor."""

    form: Any = tuple

    def forward(self, x: torch.Tensor) -> Any:
        y = super().forward(x)
        return self.form((y, None)) if self.form is tuple else {"y": y}


class ChecksPair(nn.Module):
    def __init__(self, form: type) -> None:
        super().__init__()
        self.first, self.pair = nn.Linear(4, 4), Pair(4, 4)
        self.pair.form = form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = checkpoint(self.pair, self.first(x), use_reentrant=False)
        return y[0] if self.pair.form is tuple else y["y"]


@pytest.mark.parametrize("form", [tuple, dict])
def test_a_saved_module_that_returns_more_than_a_tensor_is_checked_as_far_as_it_is_a_tuple(form: type) -> None:
    settings: dict[str, Any] = {"r": 2, "target_modules": ["first"], "modules_to_save": ["pair"]}
    model = get_peft_model(ChecksPair(form).double(), LoraConfig(**settings))
    model.add_adapter("other", LoraConfig(**settings))
    model(X).sum().backward()
    assert model.model.pair.modules_to_save["default"].weight.grad.abs().sum() > 0
    y = model(X).sum()
    model.set_adapter("other")
    if form is tuple:
        with pytest.raises(ValueError, match=r"the active adapters were \['default'\]"):
            y.backward()
