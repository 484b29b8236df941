"""mlx-lm's LoRA on the CPU: its layers, and its functions for whole models.

They take s itself ("scale"), so it is lora_alpha / r here. `linear_to_lora_layers` takes the names of modules, whole or
in their block; target_modules are turned into them.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters, remove_lora_layers
from mlx_lm.utils import save_config

from .. import promises
from ..contract import Array, Implementation, Layer, LayerSpec, LayerState, Model, ModelSpec

mx.set_default_device(mx.cpu)


def to_numpy(value: Any) -> Array:
    mx.eval(value)  # an error raises here; where NumPy evaluates, it ends the process
    return np.array(value.astype(mx.float32)).astype(np.float64)


def to_mlx(value: Array, dtype: str = "float32") -> Any:
    """Indices stay integers."""
    given = mx.array(np.array(value, order="C"))
    return given if value.dtype.kind == "i" else given.astype(getattr(mx, dtype))


class Norm(nn.Module):
    """y = W * x + b."""

    def __init__(self, W: Any, b: Any) -> None:
        super().__init__()
        self.weight, self.bias = W, b

    def __call__(self, x: Any) -> Any:
        return self.weight * x + self.bias


def base_module(kind: str, W: Array, b: Array | None, dtype: str) -> Any:
    """A layer of mlx or mlx-lm with these logical weights."""
    if kind == "norm":
        return Norm(to_mlx(W, dtype), to_mlx(np.zeros(len(W)) if b is None else b, dtype))
    if kind == "embedding":
        made: Any = nn.Embedding(W.shape[1], W.shape[0])
    elif kind == "experts":
        made = SwitchLinear(W.shape[2], W.shape[1], len(W), bias=False)
    else:
        made = nn.Linear(W.shape[1], W.shape[0], bias=b is not None)
    made.weight = to_mlx(W.T if kind == "embedding" else W, dtype)
    if b is not None:
        made.bias = to_mlx(b, dtype)
    return made


def bare(module: Any) -> Any:
    """The base layer of a LoRA layer, or the module itself."""
    if isinstance(module, LoRAEmbedding):
        return module.embedding
    return module.linear if isinstance(module, LoRALinear | LoRASwitchLinear) else module


def logical(kind: str, name: str, value: Any) -> Array:
    """A parameter in the logical orientation: the factors are stored as (in, r) and (r, out), but not of experts."""
    turned = kind == "embedding" if name == "weight" else name.startswith("lora_") and kind != "experts"
    return to_numpy(value).T if turned else to_numpy(value)


def state(kind: str, module: Any) -> LayerState:
    base = bare(module)
    b = to_numpy(base.bias) if "bias" in base else None
    A, B = (logical(kind, name, module[name]) for name in ("lora_a", "lora_b"))
    return LayerState(logical(kind, "weight", base.weight), b, A, B, float(module.scale))


def write(kind: str, module: Any, A: Array, B: Array) -> None:
    module.lora_a, module.lora_b = (to_mlx(v if kind == "experts" else v.T) for v in (A, B))


class MlxLayer(Layer):
    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec
        mx.random.seed(spec.seed)
        base = base_module(spec.kind, spec.W, spec.b, spec.dtype)
        base.freeze()
        make = {"embedding": LoRAEmbedding, "experts": LoRASwitchLinear}.get(spec.kind, LoRALinear)
        self.module = make.from_base(base, r=spec.r, dropout=spec.lora_dropout, scale=spec.lora_alpha / spec.r)

    def read(self) -> LayerState:
        return state(self.spec.kind, self.module)

    def write(self, A: Array, B: Array) -> None:
        write(self.spec.kind, self.module, A, B)

    def output(self, x: Any, train: bool, seed: int) -> Any:
        mx.random.seed(seed)
        self.module.train(train)
        if self.spec.kind != "experts":
            return self.module(x)
        experts, tokens = x.shape[:2]  # each token is sent to its expert
        chosen = mx.repeat(mx.arange(experts), tokens)
        return self.module(x.reshape(experts * tokens, 1, -1), chosen).reshape(experts, tokens, -1)

    def forward(self, x: Array, train: bool = False, seed: int = 0) -> Array:
        return to_numpy(self.output(to_mlx(x, self.spec.dtype), train, seed))

    def grad(self, x: Array, dy: Array, train: bool = False, seed: int = 0) -> dict[str, Array | None]:
        given, weights = to_mlx(x, self.spec.dtype), to_mlx(dy, self.spec.dtype)

        def loss(x: Any) -> Any:
            return (self.output(x, train, seed) * weights).sum()

        _, tree = nn.value_and_grad(self.module, loss)(given)
        found: dict[str, Array | None] = {"x": None if x.dtype.kind == "i" else to_numpy(mx.grad(loss)(given))}
        grads = {name.rpartition(".")[2]: value for name, value in tree_flatten(tree)}
        for key, name in (("A", "lora_a"), ("B", "lora_b"), ("W", "weight"), ("b", "bias")):
            found[key] = logical(self.spec.kind, name, grads[name]) if name in grads else None
        return found

    def trainable(self) -> set[str]:
        words = {"lora_a": "A", "lora_b": "B", "weight": "W", "bias": "b"}
        return {words[name.rpartition(".")[2]] for name, _ in tree_flatten(self.module.trainable_parameters())}

    def merged_copy(self) -> tuple[Array, Array | None]:
        made = self.module.fuse()
        return logical(self.spec.kind, "weight", made.weight), to_numpy(made.bias) if "bias" in made else None


class Chain(nn.Module):
    """Modules of dotted names, one after the other. What holds modules is a block; a list, where its names are numbers.

    `layers` are the model's blocks, as mlx-lm's models have them.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self._order = list(spec.modules)
        self._blocks: list[str] = []
        for name, module in spec.modules.items():
            *path, last = name.split(".")
            parent: Any = self
            for place, part in enumerate(path):
                listed = path[place + 1 :][:1] and path[place + 1].isdigit()
                parent = held(parent, part, [] if listed else nn.Module())
                if isinstance(parent, nn.Module):
                    self._blocks += [] if (block := ".".join(path[: place + 1])) in self._blocks else [block]
            parent[last] = base_module(module.kind, module.W, module.b, spec.dtype)
        self._blocks = [b for b in self._blocks if not any(b.startswith(f"{other}.") for other in self._blocks)]

    @property
    def layers(self) -> list[Any]:
        return [self.at(name) for name in self._blocks]

    def at(self, name: str) -> Any:
        module: Any = self
        for part in name.split("."):
            module = module[int(part) if isinstance(module, list) else part]
        return module

    def __call__(self, x: Any) -> Any:
        for name in self._order:
            x = self.at(name)(x)
        return x

    def keys_for(self, targets: list[str]) -> list[str]:
        """What `linear_to_lora_layers` takes for these modules: names in a block where they say the same, or whole."""
        keys = []
        for name in targets:
            block = next((block for block in self._blocks if name.startswith(f"{block}.")), None)
            inside = name.removeprefix(f"{block}.")
            meant = {inside, *(f"{other}.{inside}" for other in self._blocks)} & set(self._order)
            keys.append(inside if meant <= set(targets) else name)
        return sorted(set(keys))


def held(parent: Any, part: str, new: Any) -> Any:
    """The part of a module or of a list, which is made if it is not there."""
    if not isinstance(parent, list):
        return parent.setdefault(part, new)
    parent += [nn.Module() for _ in range(len(parent), int(part) + 1)]
    return parent[int(part)]


class MlxModel(Model):
    def __init__(self, spec: ModelSpec, folder: Path | None = None) -> None:
        self.spec, config = spec, spec.config
        self.kinds = {name: module.kind for name, module in spec.modules.items()}
        self.net = Chain(spec)
        r = config.get("r", 8)
        ends = config["target_modules"]
        targets = [name for name in spec.modules if any(f".{name}".endswith(f".{end}") for end in ends)]
        self.parameters = {
            "rank": r,
            "scale": config.get("lora_alpha", 8) / r,
            "dropout": config.get("lora_dropout", 0.0),
            "keys": self.net.keys_for(targets),
        }
        mx.random.seed(spec.seed)
        if folder is not None:
            load_adapters(self.net, str(folder))
            return
        self.net.freeze()
        linear_to_lora_layers(self.net, -1, self.parameters)

    def loras(self) -> dict[str, Any]:
        return {name: m for name in self.spec.modules if "lora_a" in (m := self.net.at(name))}

    def adapted(self, adapter: str = "default") -> dict[str, tuple[int, float]]:
        found = {}
        for name, module in self.loras().items():
            found[name] = module.lora_a.shape[-1], float(module.scale)
        return found

    def read(self, module: str, adapter: str = "default") -> LayerState:
        return state(self.kinds[module], self.net.at(module))

    def write(self, module: str, A: Array, B: Array, adapter: str = "default") -> None:
        write(self.kinds[module], self.net.at(module), A, B)

    def train(self, mode: bool) -> None:
        self.net.train(mode)

    def training(self) -> bool:
        return bool(self.net.training)

    def forward(self, x: Array, train: bool | None = False, seed: int = 0, adapter_names: Any = None) -> Array:
        if train is not None:
            self.net.train(train)
        mx.random.seed(seed)
        y = self.net(to_mlx(x, self.spec.dtype))
        if train is not None:
            self.net.eval()
        return to_numpy(y)

    def named(self, tree: Any) -> dict[str, Array]:
        """Parameters by the contract's names, in the logical orientation."""
        found = {}
        for key, value in tree_flatten(tree):
            path, _, last = key.rpartition(".")
            name = path if path in self.kinds else path.rpartition(".")[0]
            what = {"lora_a": "A:default", "lora_b": "B:default"}.get(last, last)
            found[f"{name}.{what}"] = logical(self.kinds[name], last, value)
        return found

    def trainable(self) -> set[str]:
        return set(self.named(self.net.trainable_parameters()))

    def grad(self, x: Array, dy: Array) -> dict[str, Array]:
        self.net.eval()
        weights = to_mlx(dy, self.spec.dtype)
        _, tree = nn.value_and_grad(self.net, lambda x: (self.net(x) * weights).sum())(to_mlx(x, self.spec.dtype))
        return self.named(tree)

    def base(self) -> dict[str, tuple[Array, Array | None]]:
        found = {}
        for name, kind in self.kinds.items():
            base = bare(self.net.at(name))
            found[name] = logical(kind, "weight", base.weight), to_numpy(base.bias) if "bias" in base else None
        return found

    def unload(self, merge: bool) -> dict[str, tuple[Array, Array | None]]:
        if merge:  # what the command mlx_lm.fuse does
            fused = [(name, m.fuse()) for name, m in self.net.named_modules() if hasattr(m, "fuse")]
            self.net.update_modules(tree_unflatten(fused))
        else:
            remove_lora_layers(self.net)
        still = {name: m.fuse().weight for name, m in self.loras().items()}  # what is not removed acts with its update
        found = self.base()
        return found | {name: (logical(self.kinds[name], "weight", W), found[name][1]) for name, W in still.items()}

    def save_own(self, folder: Path) -> None:
        """What the command mlx_lm.lora does after training."""
        config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": self.parameters}
        save_config(config, folder / "adapter_config.json")
        weights = dict(tree_flatten(self.net.trainable_parameters()))
        mx.save_safetensors(str(folder / "adapters.safetensors"), weights)


class Mlx(Implementation):
    name = "mlx"
    claims = promises.claims("mlx")
    conventions: ClassVar = {"zero_factor_of_embedding": "B", "embedding_dropout": True}

    def version(self) -> str:
        return f"mlx-lm {importlib.metadata.version('mlx-lm')}, mlx {importlib.metadata.version('mlx')}"

    def layer(self, spec: LayerSpec) -> Layer:
        return MlxLayer(spec)

    def model(self, spec: ModelSpec) -> Model:
        return MlxModel(spec)

    def load_own(self, spec: ModelSpec, folder: Path) -> Model:
        return MlxModel(spec, folder)
