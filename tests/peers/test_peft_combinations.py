"""Combinations of adapters give PEFT's numbers, random ones with the same coins."""

from typing import Any

import peft
import pytest
import torch
from torch import nn

import lora_ref
from lora_ref.api import sparse
from spec_tests import agree, close

pytestmark = pytest.mark.filterwarnings("ignore")
FACTORS = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
UPDATES = ["svd", *(f"{name}_svd" for name in FACTORS[1:])]


def combined(library: Any, kind: str, weights: list[float], **options: Any) -> dict[str, torch.Tensor]:
    """{layer: the update of the combination} of adapters with the same numbers in both libraries."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    model = library.get_peft_model(net, library.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"]), "a")
    model.add_adapter("b", library.LoraConfig(r=3, lora_alpha=3, target_modules=["0", "2"]))
    model.add_adapter("c", library.LoraConfig(r=3, lora_alpha=9, target_modules=["2"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.manual_seed(sum(map(ord, name)))
            parameter.data = torch.randn(parameter.shape).to(parameter)
    model.base_model.add_weighted_adapter(["a", "b", "c"], weights, "new", combination_type=kind, **options)
    layers = {"0": model.base_model.model[0], "2": model.base_model.model[2]}
    return {name: layer.get_delta_weight("new").detach() for name, layer in layers.items()}


@pytest.fixture(autouse=True)
def the_same_coins(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT draws an init for the new adapter first, so a seed alone does not give the same ones."""

    def bernoulli(p: torch.Tensor) -> torch.Tensor:
        order = torch.arange(p.numel()) * 7919 % 97 / 97
        return (order.reshape(p.shape) < p).to(p)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Both sum three adapters' factors in float32, decompose a product and multiply again."""
    for name, theirs in want.items():
        close(got[name], theirs, terms=64, size=float(theirs.abs().max()), what=name)


@pytest.mark.parametrize("density", [0.25, 0.6, 1.0])
@pytest.mark.parametrize("weights", [[1.0, 0.5, 2.0], [0.3, -0.7, 1.0]], ids=str)
@pytest.mark.parametrize("kind", [*FACTORS, *UPDATES])
def test_the_combination_is_pefts(kind: str, weights: list[float], density: float) -> None:
    options = {} if kind in ("linear", "svd") else {"density": density}
    same(combined(lora_ref, kind, weights, **options), combined(peft, kind, weights, **options))


@pytest.mark.parametrize("kind", ["ties", "dare_ties", "ties_svd", "dare_ties_svd"])
@pytest.mark.parametrize("method", ["total", "frequency"])
def test_the_majority_is_pefts(kind: str, method: str) -> None:
    options = {"density": 0.5, "majority_sign_method": method}
    weights = [1.0, 1.0, -1.0]
    same(combined(lora_ref, kind, weights, **options), combined(peft, kind, weights, **options))


def test_both_libraries_of_arrays_give_the_same() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(4, 5).double() for _ in range(3)]
    for kind in ("ties", "magnitude_prune"):
        for method in ("total", "frequency"):
            tensors = sparse.merged(parts, [1.0, -2.0, 0.5], kind, 0.4, method)
            arrays = sparse.merged([x.numpy() for x in parts], [1.0, -2.0, 0.5], kind, 0.4, method)
            agree(tensors, arrays)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"combination_type": "ties"}, "density=None: combination_type='ties' needs a number above 0"),
        ({"combination_type": "dare_linear_svd", "density": 0}, "density=0"),
        ({"combination_type": "dare_linear", "density": 1.5}, "density=1.5"),
        ({"combination_type": "ties", "density": True}, "density=True"),
        ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "mean"}, "majority_sign_method='mean'"),
        (
            {"combination_type": "dare"},
            "combination_type='dare': must be one of linear, cat, svd, magnitude_prune, ties",
        ),
        ({"combination_type": "svd", "svd_clamp": 0.99}, "svd_clamp=0.99 is not supported"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    model = lora_ref.get_peft_model(nn.Sequential(nn.Linear(3, 3)), lora_ref.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=words):
        model.add_weighted_adapter(["default"], [1.0], "new", **options)
    assert list(model.peft_config) == ["default"]


def test_unequal_ranks_are_refused_where_factors_are_merged() -> None:
    model = lora_ref.get_peft_model(nn.Sequential(nn.Linear(4, 4)), lora_ref.LoraConfig(r=2, target_modules=["0"]))
    model.add_adapter("other", lora_ref.LoraConfig(r=1, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"combination_type='ties' needs equal ranks, got \[2, 1\]"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "new", "ties", density=0.5)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "new", "ties_svd", density=0.5)
    assert model.lora_layers()["0"].r["new"] == 2
