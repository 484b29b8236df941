"""The helper for layers of PyTorch libraries keeps the contract for every kind that it is used with."""

from __future__ import annotations

import loralib
import numpy as np
import pytest
import torch

from spec_tests import smoke
from spec_tests.adapters.torch_layer import TorchLayer
from spec_tests.contract import Implementation, Layer, LayerSpec
from spec_tests.engine import examine, load


class OnHelper(TorchLayer):
    """loralib's layers once more."""

    def make(self, spec: LayerSpec) -> torch.nn.Module:
        (out, n_in), options = spec.W.shape, {"r": spec.r, "lora_alpha": spec.lora_alpha, "merge_weights": False}
        if spec.kind == "embedding":
            made = loralib.Embedding(n_in, out, **options, padding_idx=spec.padding_idx)
        else:
            options["fan_in_fan_out"] = spec.kind == "transposed"
            made = loralib.Linear(n_in, out, **options, bias=spec.b is not None)
        made = made.to(getattr(torch, spec.dtype))
        self.fill(made)
        loralib.mark_only_lora_as_trainable(made)
        return made

    def weight(self) -> torch.Tensor:
        return self.module.weight

    def bias(self) -> torch.Tensor | None:
        return getattr(self.module, "bias", None)

    def factors(self) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        return self.module.lora_A, self.module.lora_B

    def scaling(self) -> float:
        return self.module.scaling


class Made(Implementation):
    name = "loralib on the helper"
    claims = frozenset({"linear", "transposed", "embedding", "float32", "float64", "write", "grad", "trainable"})

    def layer(self, spec: LayerSpec) -> Layer:
        return OnHelper(spec)


def test_the_adapter_class_is_right() -> None:
    smoke.check(Made())


@pytest.mark.parametrize("id", ["GRAD-009", "GRAD-013", "FORWARD-001", "FORWARD-002", "FORWARD-003"])
def test_requirements_hold(id: str) -> None:
    result = examine("made", Made(), load()[id], "quick")
    assert result.outcome in ("PASS", "UNSUPPORTED"), result.message


@pytest.mark.parametrize("kind", ["linear", "transposed", "embedding"])
def test_indices_and_orientation(kind: str) -> None:
    W = np.arange(6.0).reshape(2, 3)
    layer = OnHelper(LayerSpec(kind, W, r=1))
    A, B = np.array([[1.0, -1.0, 2.0]]), np.array([[3.0], [1.0]])
    layer.write(A, B)
    x = np.array([2, 0]) if kind == "embedding" else np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert np.array_equal(layer.read().W, W)
    assert np.array_equal(layer.forward(x), (W + B @ A)[:, [2, 0]].T)
    assert (layer.grad(x, np.ones((2, 2)))["x"] is None) == (kind == "embedding")
