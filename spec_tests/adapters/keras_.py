"""Keras' LoRA of Dense, EinsumDense, Embedding and Conv1D to Conv3D, on any of its backends (KERAS_BACKEND).

A layer gets it from enable_lora, a model's layers from their constructor. A linear layer whose seed is odd is an
EinsumDense.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

from typing import Any

import keras
import numpy as np

from .. import promises
from ..contract import MESH, Array, Implementation, Layer, LayerSpec, LayerState, Model, ModelSpec


def to_numpy(variable: Any) -> Array:
    return keras.ops.convert_to_numpy(variable).astype(np.float64)


def to_keras(x: Array, dtype: str) -> Any:
    """Indices stay integers."""
    return x if x.dtype.kind == "i" else keras.ops.convert_to_tensor(x, dtype=dtype)


@keras.saving.register_keras_serializable("spec_tests")
class Norm(keras.layers.Layer):
    """y = W * x + b."""

    def build(self, shape: Any) -> None:
        self.weight = self.add_weight(name="weight", shape=shape[-1:])
        self.bias = self.add_weight(name="bias", shape=shape[-1:])
        self.built = True

    def call(self, x: Any) -> Any:
        return self.weight * x + self.bias


def make(kind: str, W: Array, biased: bool, **options: Any) -> Any:
    """A layer of this kind and shape, not built yet."""
    out, n_in = W.shape[0], W.shape[-1]
    if kind == "norm":
        return Norm(**options)
    if kind == "embedding":
        return keras.layers.Embedding(n_in, out, **options)
    if kind == "linear":
        return keras.layers.Dense(out, use_bias=biased, **options)
    if kind == "einsum":
        return keras.layers.EinsumDense("bx,xy->by", out, bias_axes="y" if biased else None, **options)
    conv = {1: keras.layers.Conv1D, 2: keras.layers.Conv2D, 3: keras.layers.Conv3D}[MESH[kind]]
    return conv(out, W.shape[2:], use_bias=biased, **options)


class Adapted:
    """A layer of Keras that is built. Keras stores a kernel as (*kernel, in, out)."""

    def __init__(self, kind: str, module: Any) -> None:
        self.module, self.dims, self.embedding = module, MESH.get(kind, 0), kind == "embedding"
        self.adaptable = kind != "norm"
        self.W: Any = module.weight if kind == "norm" else module._embeddings if self.embedding else module._kernel
        self.bias = getattr(module, "bias", None)

    @property
    def factors(self) -> tuple[Any, Any]:
        m = self.module
        return (m.lora_embeddings_a, m.lora_embeddings_b) if self.embedding else (m.lora_kernel_a, m.lora_kernel_b)

    @property
    def on(self) -> bool:
        return self.adaptable and bool(self.module.lora_enabled)

    @property
    def scaling(self) -> float:
        return float(self.module.lora_alpha / self.module.lora_rank)

    def logical(self, value: Array) -> Array:
        return np.moveaxis(value, (-1, -2), (0, 1)) if self.dims else value.T

    def stored(self, value: Array) -> Array:
        return np.moveaxis(value, (0, 1), (-1, -2)) if self.dims else value.T

    def named(self) -> list[tuple[str, Any]]:
        """The variables by the contract's names."""
        factors = zip(("A:default", "B:default"), self.factors if self.on else (), strict=False)
        return [("weight", self.W), *([] if self.bias is None else [("bias", self.bias)]), *factors]

    def fill(self, W: Array, b: Array | None) -> None:
        self.W.assign(self.stored(W))
        if b is not None:
            self.bias.assign(b)

    def base(self) -> tuple[Array, Array | None]:
        return self.logical(to_numpy(self.W.value)), None if self.bias is None else to_numpy(self.bias.value)

    def read(self) -> LayerState:
        W, b = self.base()
        A, B = (to_numpy(factor.value) for factor in self.factors)
        return LayerState(W, b, self.logical(A), B.T, self.scaling)

    def write(self, A: Array, B: Array) -> None:
        self.factors[0].assign(self.stored(A))
        self.factors[1].assign(B.T)


class KerasLayer(Layer):
    """It takes (batch, *size, in)."""

    def __init__(self, spec: LayerSpec) -> None:
        self.spec, self.dims = spec, MESH[spec.kind]
        keras.utils.set_random_seed(spec.seed)
        kind = "einsum" if spec.kind == "linear" and spec.seed % 2 else spec.kind
        options: dict[str, Any] = {"dtype": spec.dtype}
        if self.dims:
            options |= {"strides": spec.stride, "dilation_rate": spec.dilation, "data_format": "channels_last"}
        self.module = make(kind, spec.W, spec.b is not None, **options)
        if spec.kind == "embedding":
            self.module.build()
        else:
            self.module.build((None, *[16] * self.dims, spec.W.shape[1]))
        self.adapted = Adapted(spec.kind, self.module)
        self.adapted.fill(spec.W, spec.b)
        self.module.enable_lora(spec.r, lora_alpha=spec.lora_alpha)
        self.read, self.write = self.adapted.read, self.adapted.write

    def forward(self, x: Array, train: bool = False, seed: int = 0) -> Array:
        if self.dims:
            p = self.spec.padding
            x = np.moveaxis(np.pad(x, [(0, 0), (0, 0)] + [(p, p)] * self.dims), 1, -1)
        if isinstance(self.module, keras.layers.EinsumDense):  # its equation has one axis of tokens
            y = to_numpy(self.module(to_keras(x.reshape(-1, x.shape[-1]), self.spec.dtype)))
            return y.reshape(*x.shape[:-1], len(self.spec.W))
        given = to_keras(x, self.spec.dtype)
        y = to_numpy(self.module(given, training=train) if self.dims else self.module(given))
        return np.moveaxis(y, -1, 1) if self.dims else y

    def merged_copy(self) -> tuple[Array, Array | None]:
        """What the layer saves as its own is the state of a plain layer."""
        saved: dict[str, Any] = {}
        self.module.save_own_variables(saved)
        return self.adapted.logical(to_numpy(saved["0"])), to_numpy(saved["1"]) if "1" in saved else None


def called(name: str) -> str:
    """A layer's name: on the torch backend it must not have dots."""
    return name.replace(".", "-")


class KerasModel(Model):
    def __init__(self, spec: ModelSpec, folder: Path | None = None) -> None:
        self.spec = spec
        keras.utils.set_random_seed(spec.seed)
        self.net = self.made() if folder is None else keras.models.load_model(folder / "model.keras")
        self.layers = {name: Adapted(m.kind, self.net.get_layer(called(name))) for name, m in spec.modules.items()}
        if folder is None:
            for name, module in spec.modules.items():
                self.layers[name].fill(module.W, module.b)

    def made(self) -> Any:
        config, first = self.spec.config, next(iter(self.spec.modules.values()))
        lora = {"lora_rank": config.get("r", 8), "lora_alpha": config.get("lora_alpha", 8)}
        if first.kind == "embedding":
            start = keras.Input((), dtype="int32")
        else:
            start = keras.Input((first.W.shape[1], *[None] * MESH[first.kind]), dtype=self.spec.dtype)
        x = start
        for name, module in self.spec.modules.items():
            targeted = any(f".{name}".endswith(f".{end}") for end in config["target_modules"])
            options: dict[str, Any] = {"data_format": "channels_first"} if MESH.get(module.kind) else {}
            options |= {"name": called(name), "dtype": self.spec.dtype} | (lora if targeted else {})
            x = make(module.kind, module.W, module.b is not None, **options)(x)
        return keras.Model(start, x)

    def loras(self) -> dict[str, Adapted]:
        return {name: layer for name, layer in self.layers.items() if layer.on}

    def adapted(self, adapter: str = "default") -> dict[str, tuple[int, float]]:
        return {name: (int(layer.module.lora_rank), layer.scaling) for name, layer in self.loras().items()}

    def read(self, module: str, adapter: str = "default") -> LayerState:
        return self.layers[module].read()

    def write(self, module: str, A: Array, B: Array, adapter: str = "default") -> None:
        self.layers[module].write(A, B)

    def forward(self, x: Array, train: bool | None = False, seed: int = 0, adapter_names: Any = None) -> Array:
        return to_numpy(self.net(to_keras(x, self.spec.dtype), training=bool(train)))

    def base(self) -> dict[str, tuple[Array, Array | None]]:
        return {name: layer.base() for name, layer in self.layers.items()}

    def grad(self, x: Array, dy: Array) -> dict[str, Array]:
        """As Keras' guides to training loops do: stateless_call and jax.grad, or backward."""
        variables, given, weights = self.net.trainable_variables, to_keras(x, self.spec.dtype), dy.astype(np.float32)
        if keras.backend.backend() == "jax":
            import jax

            fixed = [variable.value for variable in self.net.non_trainable_variables]

            def loss(values: Any) -> Any:
                return (self.net.stateless_call(values, fixed, given)[0] * weights).sum()

            grads = jax.grad(loss)([variable.value for variable in variables])
        else:
            self.net.zero_grad()
            (self.net(given) * keras.ops.convert_to_tensor(weights)).sum().backward()
            grads = [variable.value.grad for variable in variables]
        names = {id(variable): (name, what) for name, layer in self.layers.items() for what, variable in layer.named()}
        found = {}
        for variable, value in zip(variables, grads, strict=True):
            name, what = names[id(variable)]
            turned = self.layers[name].logical if what in ("weight", "A:default") else np.transpose
            found[f"{name}.{what}"] = turned(to_numpy(value))
        return found

    def save_own(self, folder: Path) -> None:
        self.net.save(folder / "model.keras")


class Keras(Implementation):
    name = "keras"
    claims = promises.claims("keras")

    def version(self) -> str:
        return f"keras {keras.__version__}, {keras.backend.backend()}"

    def layer(self, spec: LayerSpec) -> Layer:
        return KerasLayer(spec)

    def model(self, spec: ModelSpec) -> Model:
        return KerasModel(spec)

    def load_own(self, spec: ModelSpec, folder: Path) -> Model:
        return KerasModel(spec, folder)
