"""The first forward names the adapted layers that the model did not call."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lora_ref import LoraConfig, get_peft_model


class Reads(nn.Module):
    """The weight of `read` is used, and `read` is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.called(x), self.read.weight)


def silent(call: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


def test_a_layer_that_is_not_called_is_named_once() -> None:
    model = get_peft_model(Reads(), LoraConfig(r=2, target_modules=["called", "read"]))
    x = torch.ones(1, 3)
    with pytest.warns(UserWarning, match=r"1 adapted layers were not called in the first forward \(read\)") as caught:
        model(x)
    assert caught[0].filename == __file__
    silent(lambda: model(x))
    model.add_adapter("other", LoraConfig(r=1, target_modules=["called"]))
    model.set_adapter("other")
    silent(lambda: model(x))  # the layer has no active adapter
    model.add_adapter("third", LoraConfig(r=1, target_modules=["read"]))
    model.set_adapter("third")
    with model.disable_adapter():
        silent(lambda: model(x))


def test_nothing_is_said_where_all_layers_are_called() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Embedding(3, 3), nn.Conv1d(3, 3, 1))
    net.forward = lambda x: net[2](net[1](x)[None].mT) + net[0](net[1](x)).mT  # type: ignore[method-assign]
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "1", "2"]))
    silent(lambda: model(torch.tensor([0, 1])))


@pytest.mark.parametrize("way", ["compile a part", "replace a part", "compile all"])
def test_nothing_is_said_of_what_is_compiled(way: str) -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 3))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0.0", "1"]))
    if way == "compile a part":
        net[0].compile(backend="eager")
    elif way == "replace a part":
        net[0] = torch.compile(net[0], backend="eager")
    else:
        net.compile(backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(torch.ones(1, 3))
    assert not [w for w in caught if "were not called" in str(w.message)]
