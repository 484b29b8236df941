"""A second instance of each deviation of PEFT's layers: written from its reason alone, with PEFT and torch alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, which is shown."""
    found = float((a - b).detach().abs().max())
    print(f"    a difference of {found:.3g}")
    return found


def adapted(module: nn.Module, **options: Any) -> tuple[PeftModel, Any]:
    """A model of one module, whose adapter has random factors, and its layer."""
    torch.manual_seed(3)
    options = {"target_modules": ["0"], "init_lora_weights": False, **options}
    model = get_peft_model(nn.Sequential(module), LoraConfig(**options)).eval()
    return model, model.base_model.model[0]


def plus(layer: Any, name: str = "default") -> torch.Tensor:
    """s B A of a linear layer."""
    return layer.scaling[name] * layer.lora_B[name].weight.data @ layer.lora_A[name].weight.data


def merged_beside_active() -> None:
    torch.manual_seed(2)
    base = nn.Conv1d(3, 4, 1, bias=False)
    W, x = base.weight.detach().clone()[..., 0], torch.randn(2, 3, 5)
    model, layer = adapted(base, r=2)
    model.add_adapter("b", LoraConfig(r=1, target_modules=["0"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "b"])
    first, second = (layer.get_delta_weight(name).detach()[..., 0] for name in ("default", "b"))
    assert gap(model(x), (W + first + second) @ x) < 1e-3
    model.merge_adapter(["b"])
    assert layer.active_adapters == ["default", "b"]
    assert gap(model(x), (W + first + second) @ x) > 0.1  # what both give
    assert gap(model(x), (W + second) @ x) < 1e-3  # what the merged one gives


def dropout_in_evaluation() -> None:
    torch.manual_seed(2)
    model = get_peft_model(nn.Sequential(nn.Linear(40, 2)), LoraConfig(target_modules=["0"], r=1)).eval()
    model.add_adapter("late", LoraConfig(target_modules=["0"], lora_dropout=0.5, init_lora_weights=False))
    model.set_adapter("late")
    layer, x = model.base_model.model[0], torch.ones(1, 40)
    assert not model.training and layer.lora_dropout["late"].training
    W = layer.base_layer.weight.data + plus(layer, "late")
    assert gap(model(x), F.linear(x, W, layer.base_layer.bias)) > 0.01
    assert gap(model.eval()(x), F.linear(x, W, layer.base_layer.bias)) < 1e-3


def conv_dilation() -> None:
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        base = kind(2, 3, 3, dilation=2, padding=2)
        dims = base.weight.ndim - 2
        model, layer = adapted(base, r=2)
        assert set(layer.lora_A["default"].dilation) == {1}
        try:
            model(torch.ones(1, 2, *(7,) * dims))
        except RuntimeError as error:
            print("   ", error)
        else:
            raise AssertionError("the output has a shape")
    model, layer = adapted(nn.Conv1d(2, 3, 3, dilation=3, padding=3), r=2)
    layer.lora_A["default"].dilation, x = (3,), torch.randn(1, 2, 9)
    whole = F.conv1d(x, layer.base_layer.weight + layer.get_delta_weight("default"), layer.base_layer.bias, 1, 3, 3)
    assert gap(model(x), whole) < 1e-3  # with torch's dilation it is


def padding_mode() -> None:
    for mode in ("reflect", "circular", "replicate"):
        base = nn.Conv1d(2, 3, 3, padding=1, padding_mode=mode)
        model, layer = adapted(base, r=2)
        x, whole = torch.randn(1, 2, 6), copy.deepcopy(base)
        whole.weight.data += layer.get_delta_weight("default").detach()
        assert layer.lora_A["default"].padding_mode == "zeros"
        assert gap(model(x)[..., 1:-1], whole(x)[..., 1:-1]) < 1e-3  # away from the edges
        assert gap(model(x), whole(x)) > 0.05


def conv3d_of_one() -> None:
    model, layer = adapted(nn.Conv3d(4, 5, 1), r=2)
    before, x = layer.base_layer.weight.data.clone(), torch.randn(2, 4, 2, 2, 2)
    model(x)  # unmerged it works
    for work in (lambda: layer.get_delta_weight("default"), model.merge_adapter, model.merge_and_unload):
        try:
            work()
        except RuntimeError as error:
            print("   ", error)
        else:
            raise AssertionError("it is merged")
    assert torch.equal(before, layer.base_layer.weight)
    for kind in (nn.Conv1d, nn.Conv2d):  # in other dimensions it works
        adapted(kind(4, 5, 1), r=2)[0].merge_adapter()


def max_norm() -> None:
    model, layer = adapted(nn.Embedding(6, 8, max_norm=0.5), r=4, lora_alpha=4)
    before = layer.lora_embedding_A["default"].detach().clone()
    x = torch.tensor([1, 4])
    found, after = model(x), layer.lora_embedding_A["default"].detach()
    assert gap(before, after) > 0.1
    assert gap(after.norm(dim=0)[x], torch.full((2,), 0.5)) < 1e-3
    assert gap(before[:, [0, 2, 3, 5]], after[:, [0, 2, 3, 5]]) < 1e-3  # those that were not looked up
    base = F.embedding(x, layer.base_layer.weight.detach(), max_norm=0.5)
    assert gap(found, base + (layer.lora_embedding_B["default"] @ before)[:, x].T) > 0.1


def max_norm_merged() -> None:
    model, layer = adapted(nn.Embedding(6, 8, max_norm=0.5), r=2)
    layer.lora_embedding_A["default"].data *= 0.01
    A, x = layer.lora_embedding_A["default"].detach().clone(), torch.arange(6)
    before = model(x)
    assert torch.equal(A, layer.lora_embedding_A["default"])  # it is short: the branch leaves it alone
    model.merge_adapter()
    lengths, found = before.norm(dim=1), model(x).norm(dim=1)
    print("    the lengths", lengths.tolist(), "and merged", found.tolist())
    assert gap(found, lengths.clamp(max=0.5)) < 1e-3 and int((lengths > 0.5).sum()) >= 1


def sparse_embedding() -> None:
    model, layer = adapted(nn.Embedding(9, 3, sparse=True), r=2)
    loss = model(torch.tensor([[0, 3], [8, 8]])).square().sum()
    try:
        loss.backward()
    except RuntimeError as error:
        print("   ", str(error)[:90])
    else:
        raise AssertionError("the backward pass works")
    assert layer.lora_embedding_A["default"].grad is None
    nn.Embedding(9, 3, sparse=True)(torch.tensor([1])).sum().backward()  # torch's own works


def olora_transposed() -> None:
    torch.manual_seed(4)
    base, x = Conv1D(6, 6), torch.randn(3, 6)
    W = nn.init.normal_(base.weight).detach().clone()
    model, layer = adapted(base, r=2, fan_in_fan_out=True, init_lora_weights="olora", lora_alpha=2)
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    for stored, differs in ((W, False), (W.T, True)):  # W.T is the logical weight
        Q, R = torch.linalg.qr(stored)
        assert (gap(product, Q[:, :2] @ R[:2]) > 0.1) is differs
    assert gap(model(x), x @ W + base.bias) > 0.1
    wide = Conv1D(3, 7)  # 7 inputs, 3 outputs
    model, _ = adapted(wide, r=2, fan_in_fan_out=True, init_lora_weights="olora")
    try:
        model(torch.ones(1, 7))
    except RuntimeError as error:
        print("   ", error)
    else:
        raise AssertionError("the factors have the shapes of the layer")


def written_while_merged() -> None:
    base = nn.Embedding(5, 4)
    W = base.weight.detach().clone()
    model, layer = adapted(base, r=2)
    model.merge_adapter()
    layer.lora_embedding_A["default"].data *= 3
    model.unmerge_adapter()
    assert gap(layer.base_layer.weight, W) > 0.1


def rescaled_while_merged() -> None:
    base = nn.Conv2d(2, 3, 2)
    W = base.weight.detach().clone()
    model, layer = adapted(base, r=2)
    model.merge_adapter()
    layer.scale_layer(3)
    model.unmerge_adapter()
    assert gap(layer.base_layer.weight, W) > 0.1


def unmerged_while_scaled() -> None:
    base = Conv1D(3, 5)
    W = base.weight.detach().clone()
    model, layer = adapted(base, r=2, fan_in_fan_out=True)
    model.merge_adapter()
    with rescale_adapter_scale(model, 0.25):
        model.unmerge_adapter()
    assert gap(layer.base_layer.weight, W) > 0.1
    assert gap(layer.base_layer.weight, W + 0.75 * plus(layer).T) < 1e-3


def added_while_scaled() -> None:
    model, layer = adapted(nn.Embedding(5, 4), r=2)
    with rescale_adapter_scale(model, 2):
        model.add_adapter("b", LoraConfig(r=2, target_modules=["0"]))
    assert "b" in layer.lora_embedding_A and "b" not in layer.scaling
    model.set_adapter("b")
    try:
        model(torch.tensor([1]))
    except KeyError as error:
        print("    KeyError", error)
    else:
        raise AssertionError("it can be used")


def scale_of_embedding() -> None:
    _, layer = adapted(nn.Embedding(5, 4), r=2, lora_alpha=6)
    layer.set_scale("default", 5)
    assert layer.scaling["default"] == 15
    layer.scale_layer(2)
    assert layer.scaling["default"] == 15
    layer.unscale_layer()
    assert layer.scaling["default"] == 15
    _, linear = adapted(nn.Linear(5, 4), r=2, lora_alpha=6)
    linear.set_scale("default", 5)
    linear.scale_layer(2)
    assert linear.scaling["default"] == 30
    linear.unscale_layer()
    assert linear.scaling["default"] == 3


def encoder_in_evaluation() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    config = LoraConfig(target_modules=["linear1", "linear2"], init_lora_weights=False)
    plain, x = copy.deepcopy(layer).eval(), torch.randn(2, 3, 8)
    model = get_peft_model(layer, config)
    model.requires_grad_(False)
    with torch.no_grad():
        trained = model.train()(x)
        assert gap(model.eval()(x), plain(x)) < 1e-3
        assert gap(model(x), trained) > 0.1


def out_proj_of_attention() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0),
        LoraConfig(target_modules=["multihead_attn.out_proj"], init_lora_weights=False),
    ).eval()
    x, y = torch.randn(3, 1, 8), torch.randn(2, 1, 8)
    with torch.no_grad():
        found = model(x, y)
        with model.disable_adapter():
            assert gap(model(x, y), found) < 1e-3
        model.merge_adapter()
        assert gap(model(x, y), found) > 0.01


def negative_dropout() -> None:
    _, layer = adapted(nn.Linear(3, 2), lora_dropout=-0.5)
    assert isinstance(layer.lora_dropout["default"], nn.Identity)
    try:
        nn.Dropout(-0.5)
    except ValueError as error:
        print("    torch:", error)
    else:
        raise AssertionError("torch takes it")
