"""A second instance of each deviation of PEFT's starts: written from its reason alone, with PEFT and torch alone."""

from __future__ import annotations

from typing import Any

import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, which is shown."""
    found = float((a - b).detach().abs().max())
    print(f"    a difference of {found:.3g}")
    return found


def started(n: int, m: int, start: str, **options: Any) -> tuple[Any, Any, torch.Tensor]:
    """A model of one linear layer of n inputs and m outputs with this start, the layer, and its weight before."""
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(n, m))
    W, x = net[0].weight.detach().clone(), torch.randn(40, n)
    config = LoraConfig(target_modules=["0"], init_lora_weights=start, **options)
    if start == "corda":
        config.corda_config = CordaConfig(corda_method="kpm")
        preprocess_corda(net, config, run_model=lambda: net(x))
    elif start == "lora_ga":
        preprocess_loraga(net, config, lambda: (net(x) * torch.randn(40, m)).sum().backward())
    model = get_peft_model(net, config)
    return model, model.base_model.model[0], W


def product(layer: Any) -> torch.Tensor:
    """s B A."""
    return layer.scaling["default"] * layer.lora_B["default"].weight.data @ layer.lora_A["default"].weight.data


def disable_after_a_start() -> None:
    for start in ("pissa", "olora", "pissa_niter_4"):
        model, layer, W = started(9, 6, start, r=3)
        x = torch.randn(2, 9)
        y = x @ W.T + layer.base_layer.bias
        assert gap(model(x), y) < 1e-3
        with model.disable_adapter():
            assert gap(model(x), y) > 0.1
            assert gap(model(x), y - x @ product(layer).T) < 1e-3


def disable_after_a_start_from_data() -> None:
    for start, options in (("corda", {}), ("lora_ga", {"lora_ga_config": LoraGAConfig(scale="unit")})):
        model, layer, W = started(9, 6, start, r=2, **options)
        x = torch.randn(2, 9)
        y = x @ W.T + layer.base_layer.bias
        assert gap(model(x), y) < 1e-3
        with model.disable_adapter():
            assert gap(model(x), y) > 0.1


def pissa_without_alpha() -> None:
    model, layer, W = started(4, 6, "pissa", r=2, lora_alpha=0)
    assert layer.base_layer.weight.isnan().all() and W.isfinite().all()
    assert model(torch.ones(1, 4)).isnan().all()


def corda_without_alpha() -> None:
    model, layer, W = started(4, 6, "corda", r=2, lora_alpha=0)
    assert layer.base_layer.weight.isnan().all() and W.isfinite().all()
    assert model(torch.ones(1, 4)).isnan().all()


def rank_too_large() -> None:
    for start in ("pissa", "olora", "pissa_niter_4"):
        _, layer, _ = started(7, 3, start, r=5)
        shapes = tuple(layer.lora_A["default"].weight.shape), tuple(layer.lora_B["default"].weight.shape)
        print("   ", layer.r["default"], shapes)
        assert layer.r["default"] == 5 and shapes == ((3, 7), (3, 3))


def eva_scaling_with_rslora() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 3))
    for rslora in (False, True):
        config = LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["0", "1"],
            use_rslora=rslora,
            init_lora_weights="eva",
            eva_config=EvaConfig(rho=2.0, adjust_scaling_factors=True),
        )
        model = get_peft_model(net, config)
        found = {f"base_model.model.{i}": torch.linalg.qr(torch.randn(12, k)).Q.T for i, k in (("0", 6), ("1", 2))}
        initialize_lora_eva_weights(model, eva_state_dict=found)
        layers = [model.base_model.model[i] for i in (0, 1)]
        print("   ", [(layer.r["default"], layer.scaling["default"]) for layer in layers])
        assert [layer.r["default"] for layer in layers] == [6, 2]
        first, second = (layer.scaling["default"] for layer in layers)
        assert abs(first - second) > 1 if rslora else first == second == 2
        net = model.unload()


def lora_ga_singular_values() -> None:
    for direction in ("ArB2r", "A2rBr"):
        options = LoraGAConfig(scale="unit", direction=direction)
        _, layer, _ = started(8, 8, "lora_ga", r=3, lora_ga_config=options)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert gap(A.norm(dim=1), torch.ones(3)) < 1e-3
        assert gap(B.norm(dim=0), torch.ones(3)) > 1
        assert float(B.norm(dim=0)[0] / B.norm(dim=0)[2]) > 1.1


def lora_ga_width() -> None:
    A, B = {}, {}
    for m in (4, 64):
        config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
        net = nn.Sequential(nn.Linear(6, m, bias=False))
        G = torch.zeros(m, 6)
        G[:4, :4] = torch.diag(torch.tensor([8.0, 4, 2, 1]))  # the same gradient, beside rows of zeros
        preprocess_loraga(
            net, config, lambda net=net, G=G: (net[0].weight * G).sum().add(net(torch.zeros(1, 6)).sum()).backward()
        )
        layer = get_peft_model(net, config).base_model.model[0]
        A[m], B[m] = (float(w["default"].weight.detach().norm()) for w in (layer.lora_A, layer.lora_B))
    print("    A", A, "B", B)
    assert abs(A[64] / A[4] - 1) < 0.01  # in the paper both grow with the fourth root: 2
    assert abs(B[64] / B[4] - 2) < 0.01


def combination_of_starts() -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights="orthogonal"))
    model.add_adapter("b", LoraConfig(r=3, target_modules=["0"]))
    try:
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "both", combination_type="cat")
    except ValueError as error:
        print("   ", error)
    else:
        raise AssertionError("they are combined")
    model.add_weighted_adapter(
        ["b", "default"], [1.0, 1.0], "other way", combination_type="cat"
    )  # in this order they are
    assert model.base_model.model[0].r["other way"] == 5
