"""The adapter class of libraries on PyTorch that have PEFT's interface: PEFT itself, and lora_ref."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..contract import MESH, Array, Implementation, Layer, LayerSpec, LayerState, Model, ModelSpec, ModuleSpec

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def to_torch(x: Array, dtype: str = "float64") -> Tensor:
    return torch.tensor(np.ascontiguousarray(x)).to(getattr(torch, dtype))


def to_numpy(x: Tensor) -> Array:
    return x.detach().double().numpy().copy()


# -- base layers and models --------------------------------------------------------------------


class Norm(nn.Module):
    """y = W * x + b."""

    def __init__(self, W: Tensor, b: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(W)
        self.bias = None if b is None else nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x + (0 if self.bias is None else self.bias)


class ScaledEmbedding(nn.Embedding):
    """An embedding that multiplies what it looks up, as Gemma's and others of transformers do."""

    embed_scale = 1.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class Same(nn.Module):
    """A parametrisation that changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Raw(nn.Module):
    """x W^T with a raw parameter (out, in), or one for each expert: x (experts, tokens, in)."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.mT


class Conv1D(nn.Module):
    """What transformers' Conv1D is: y = x W^T + b, stored as W^T (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def transposed() -> type[nn.Module]:
    """transformers' Conv1D; where there is no transformers, its like, which lora_ref takes for it."""
    try:
        from transformers.pytorch_utils import Conv1D as Theirs
    except ModuleNotFoundError:
        return Conv1D
    return Theirs


#: the options of a convolution that are given as torch has them
CONVOLVED = ("groups", "padding_mode", "stride", "padding", "dilation")


def base_module(kind: str, W: Array, b: Array | None, dtype: str, spec: LayerSpec | None = None) -> nn.Module:
    """A layer of torch (or transformers' Conv1D) with these logical weights."""
    if kind == "norm":
        return Norm(to_torch(W, dtype), None if b is None else to_torch(b, dtype))
    if kind in ("parameter", "experts"):
        return Raw(to_torch(W, dtype))
    out, n_in = W.shape[:2]
    if kind == "linear":
        module: nn.Module = nn.Linear(n_in, out, bias=b is not None)
    elif kind == "transposed":
        module = transposed()(out, n_in)
        if b is None:
            module.bias.data.zero_()
    elif kind == "embedding":
        module = embedding(n_in, out, spec)
    elif kind == "attention":
        module = nn.MultiheadAttention(out, 1, batch_first=True)
        module.in_proj_weight.data = torch.eye(out).repeat(3, 1)  # over one token the output is its value
        module.out_proj.weight.data, module.out_proj.bias.data = to_torch(W, dtype), to_torch(b, dtype)
        return module.to(getattr(torch, dtype))
    else:
        assert spec is not None
        make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[MESH[kind] - 1]
        options = {"stride": spec.stride, "padding": spec.padding, "dilation": spec.dilation, "bias": b is not None}
        options |= {name: spec.base[name] for name in CONVOLVED if name in spec.base}
        module = make(spec.n_in, out, W.shape[2:], **options)
    stored = W.T if kind in ("transposed", "embedding") else W
    module.weight.data = to_torch(stored, dtype)
    if b is not None:
        module.bias.data = to_torch(b, dtype)
    module = module.to(getattr(torch, dtype))
    if spec and spec.base.get("parametrized"):
        parametrize.register_parametrization(module, "weight", Same())
    if spec and "hook" in spec.base:
        module.register_forward_hook(lambda _, given, y: y * spec.base["hook"])
    return module


def of_model(module: ModuleSpec, dtype: str) -> nn.Module:
    """A module of a model."""
    spec = LayerSpec(module.kind, module.W, module.b) if MESH.get(module.kind) else None
    return base_module(module.kind, module.W, module.b, dtype, spec)


def embedding(rows: int, dimension: int, spec: LayerSpec | None) -> nn.Embedding:
    """An embedding with the options of the base layer."""
    options = dict(spec.base) if spec else {}
    options.pop("parametrized", None)
    options.pop("hook", None)
    scale = options.pop("embed_scale", None)
    kind = nn.Embedding if scale is None else ScaledEmbedding
    module = kind(rows, dimension, padding_idx=spec.padding_idx if spec else None, **options)
    if scale is not None:
        module.embed_scale = scale
    return module


def in_groups(B: Array, groups: int) -> Array:
    """B (out, r / groups) of a convolution in groups as (out, r): zero outside of the group of each output."""
    parts = B.reshape(groups, -1, B.shape[1])
    full = np.zeros((groups, parts.shape[1], groups, B.shape[1]))
    for group, part in enumerate(parts):
        full[group, :, group] = part
    return full.reshape(len(B), -1)


def of_groups(B: Array, groups: int) -> Array:
    """The inverse of `in_groups`."""
    parts = B.reshape(groups, len(B) // groups, groups, -1)
    return np.concatenate([parts[group, :, group] for group in range(groups)])


def logical(kind: str, weight: Tensor) -> Array:
    return to_numpy(weight.T if kind in ("transposed", "embedding") else weight)


def encoder(linear1: Any) -> nn.TransformerEncoderLayer:
    """A TransformerEncoderLayer for this first linear layer; over one token its attention gives back its input.

    torch has a fast path for an even number of heads alone.
    """
    hidden, width = linear1.weight.shape
    made = nn.TransformerEncoderLayer(width, 2, hidden, 0.0, batch_first=True, dtype=linear1.weight.dtype)
    made.self_attn.in_proj_weight.data = torch.eye(width, dtype=linear1.weight.dtype).repeat(3, 1)
    made.self_attn.out_proj.weight.data = torch.eye(width, dtype=linear1.weight.dtype)
    return made


class Chain(nn.Module):
    """Modules of dotted names, one after the other."""

    def __init__(self, modules: Mapping[str, nn.Module], spec: ModelSpec | None = None) -> None:
        super().__init__()
        self.order: list[str] = []
        for name in spec.encoders if spec else ():
            self.add_module(name, encoder(modules[f"{name}.linear1"]))
        for name, module in modules.items():
            *path, last = name.split(".")
            if isinstance(module, nn.MultiheadAttention):  # what is named is its out_proj, and it is what is called
                *path, last = path
            self.order.append(".".join([*path, last]))
            self.put(path, last, module)
        if spec is None:
            return
        self.order = list(spec.order) or self.order
        for name, other in spec.same.items():
            *path, last = name.split(".")
            self.put(path, last, self.get_submodule(other))
        for name, other in spec.tied.items():
            self.get_submodule(name).weight = self.get_submodule(other).weight

    def put(self, path: list[str], last: str, module: nn.Module) -> None:
        """Hold the module under its name, in modules without a forward."""
        parent: nn.Module = self
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]  # type: ignore[assignment]
        parent.add_module(last, module)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            module = self.get_submodule(name)
            if isinstance(module, nn.MultiheadAttention):
                x = module(x[:, None], x[:, None], x[:, None], need_weights=False)[0][:, 0]  # one token a sample
            elif isinstance(module, nn.TransformerEncoderLayer):
                x = module(x[:, None])[:, 0]
            else:
                x = module(x)
        return x


def bare(module: nn.Module) -> nn.Module:
    """The base layer inside the wrappers."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def configuration(library: ModuleType, options: Mapping[str, Any]) -> Any:
    """A LoraConfig; the options of an initialisation are given as mappings."""
    made = dict(options)
    for name, kind in (("eva_config", "EvaConfig"), ("loftq_config", "LoftQConfig"), ("corda_config", "CordaConfig")):
        if isinstance(made.get(name), Mapping):
            home = library if hasattr(library, kind) else library.tuners.lora.config
            made[name] = getattr(home, kind)(**made[name])
    return library.LoraConfig(**made)


# -- the two handles ---------------------------------------------------------------------------


class PeftStyleModel(Model):
    """A PeftModel of either library."""

    looking: ClassVar[dict[str, Any]] = {"show_progress_bar": False}  # how initialize_lora_eva_weights is called

    def __init__(
        self, library: ModuleType, spec: ModelSpec, net: nn.Module | None = None, folder: Path | None = None
    ) -> None:
        self.library, self.spec = library, spec
        self.kinds = {name: module.kind for name, module in spec.modules.items()}
        self.net = net or Chain({n: of_model(m, spec.dtype) for n, m in spec.modules.items()}, spec)
        torch.manual_seed(spec.seed)
        self.peft = self.adapted_net(folder)

    def adapted_net(self, folder: Path | None) -> Any:
        """The network with the adapter "default", of the configuration or of a folder."""
        if folder is None:
            return self.library.get_peft_model(self.net, self.config(self.spec.config))
        return self.library.PeftModel.from_pretrained(self.net, folder)

    @property
    def lora_model(self) -> Any:
        """PEFT's LoraModel: its `model` is the network."""
        return self.peft.base_model

    def output(self, x: Tensor, adapter_names: list[str]) -> Tensor:
        """The output for a batch with one adapter for each sample."""
        return self.peft(x, adapter_names=adapter_names)

    def config(self, options: Mapping[str, Any]) -> Any:
        return configuration(self.library, options)

    def module(self, name: str) -> nn.Module:
        return self.lora_model.model.get_submodule(name)

    def adapted(self, adapter: str = "default") -> dict[str, tuple[int, float]]:
        found = {}
        for name in self.spec.modules:
            module = self.module(name)
            if adapter in getattr(module, "scaling", {}):
                found[name] = int(module.r[adapter]), float(module.scaling[adapter])
        return found

    def factors(self, module: nn.Module, adapter: str) -> tuple[Any, Any]:
        """The parameters that hold A and B."""
        if adapter in getattr(module, "lora_embedding_A", {}):
            return module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
        return module.lora_A[adapter].weight, module.lora_B[adapter].weight

    def read(self, module: str, adapter: str = "default") -> LayerState:
        layer = self.module(module)
        base = bare(layer)
        A, B = map(to_numpy, self.factors(layer, adapter))
        if MESH.get(self.kinds[module]):
            B = B.reshape(B.shape[:2])
        b = getattr(base, "bias", None)
        W = logical(self.kinds[module], base.weight)
        return LayerState(W, None if b is None else to_numpy(b), A, B, float(layer.scaling[adapter]))

    def write(self, module: str, A: Array, B: Array, adapter: str = "default") -> None:
        for parameter, value in zip(self.factors(self.module(module), adapter), (A, B), strict=True):
            parameter.data = torch.tensor(value).to(parameter.dtype).reshape(parameter.shape)

    def train(self, mode: bool) -> None:
        self.peft.train(mode)

    def training(self) -> bool:
        return bool(self.peft.training)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with self.peft.disable_adapter():
            yield

    @contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        with self.library.helpers.rescale_adapter_scale(self.peft, factor):
            yield

    def forward(
        self, x: Array, train: bool | None = False, seed: int = 0, adapter_names: Sequence[str] | None = None
    ) -> Array:
        if train is not None:
            self.peft.train(train)
        torch.manual_seed(seed)
        given = torch.tensor(x) if x.dtype.kind == "i" else to_torch(x, self.spec.dtype)
        with torch.no_grad():
            y = self.peft(given) if adapter_names is None else self.output(given, list(adapter_names))
        if train is not None:
            self.peft.eval()
        return to_numpy(y)

    def parameters(self) -> Iterator[tuple[str, str, Tensor]]:
        """Every parameter that could train, as "module.what", and what it is."""
        for name in self.spec.modules:
            module = self.module(name)
            if self.kinds[name] == "attention":
                holder = name.rpartition(".")[0]
                yield f"{holder}.in_proj_bias", "in_proj_bias", bare(self.module(holder)).in_proj_bias
            if hasattr(module, "modules_to_save"):
                for adapter, copy in module.modules_to_save.items():
                    for what, value in copy.named_parameters():
                        yield f"{name}.{what}:{adapter}", what, value
                module = module.original_module
            for what, parameter in bare(module)._parameters.items():
                if parameter is not None:
                    yield f"{name}.{what}", what, parameter
            for adapter in getattr(module, "scaling", {}):
                for letter, value in zip("AB", self.factors(module, adapter), strict=True):
                    yield f"{name}.{letter}:{adapter}", letter, value

    def trainable(self) -> set[str]:
        return {key for key, _, value in self.parameters() if value.requires_grad}

    def grad(self, x: Array, dy: Array) -> dict[str, Array]:
        self.peft.zero_grad()
        self.peft.eval()
        y = self.peft(torch.tensor(x) if x.dtype.kind == "i" else to_torch(x, self.spec.dtype))
        if y.requires_grad:  # nothing trains where the adapters are off
            (y * to_torch(dy, self.spec.dtype)).sum().backward()
        found = {}
        for key, what, value in self.parameters():
            if value.grad is not None:
                kind = self.kinds[key.rpartition(".")[0]] if what == "weight" else ""
                found[key] = logical(kind, value.grad)
        return found

    def _written(self, name: str) -> nn.Module:
        """The module that training would change: the active copy of modules_to_save, or the base."""
        module = self.module(name)
        if hasattr(module, "modules_to_save"):
            return module.modules_to_save[self.active()[0]]
        return bare(module)

    def write_base(self, module: str, W: Array | None = None, b: Array | None = None) -> None:
        target = self._written(module)
        if W is not None:
            stored = W.T if self.kinds[module] in ("transposed", "embedding") else W
            target.weight.data = to_torch(stored, self.spec.dtype)
        if b is not None:
            target.bias.data = to_torch(b, self.spec.dtype)

    def base(self) -> dict[str, tuple[Array, Array | None]]:
        return self.plain(self.lora_model.model)

    def plain(self, net: nn.Module) -> dict[str, tuple[Array, Array | None]]:
        found = {}
        for name, kind in self.kinds.items():
            module = net.get_submodule(name)
            module = bare(getattr(module, "original_module", module))
            b = getattr(module, "bias", None)
            found[name] = logical(kind, module.weight), None if b is None else to_numpy(b)
        return found

    def merge(self, adapters: Sequence[str] | None = None, safe: bool = False) -> None:
        options = {"safe_merge": True} if safe else {}  # early releases do not have it
        self.peft.merge_adapter(*([] if adapters is None else [list(adapters)]), **options)

    def unmerge(self) -> None:
        self.peft.unmerge_adapter()

    def enable(self, enabled: bool) -> None:
        (self.peft.enable_adapter_layers if enabled else self.peft.disable_adapter_layers)()

    def add(self, adapter: str, config: Mapping[str, Any]) -> None:
        self.peft.add_adapter(adapter, self.config(config))

    def set(self, adapters: Sequence[str]) -> None:
        if len(adapters) == 1:
            self.peft.set_adapter(adapters[0])
        else:
            self.lora_model.set_adapter(list(adapters))

    def active(self) -> list[str]:
        return list(self.peft.active_adapters)

    def delete(self, adapter: str) -> None:
        self.peft.delete_adapter(adapter)

    def combine(self, adapters: Sequence[str], weights: Sequence[float], name: str, how: str) -> None:
        self.peft.add_weighted_adapter(list(adapters), list(weights), name, combination_type=how)

    def look(self, batches: Sequence[Array]) -> None:
        data = [to_torch(x, self.spec.dtype) for x in batches]
        self.library.initialize_lora_eva_weights(self.peft, data, **self.looking)

    def unload(self, merge: bool) -> dict[str, tuple[Array, Array | None]]:
        return self.plain(self.peft.merge_and_unload() if merge else self.peft.unload())

    def save(self, folder: Path, **options: Any) -> None:
        self.peft.save_pretrained(str(folder), **options)

    def save_converted(self, folder: Path, start: Path) -> None:
        self.save(folder)

    def save_own(self, folder: Path) -> None:
        self.save(folder)

    def load(self, folder: Path, adapter: str) -> None:
        self.peft.load_adapter(str(folder), adapter)


class PeftStyleLayer(Layer):
    """One adapted layer, in a model of its own."""

    NAME = "layer"

    def __init__(self, implementation: PeftStyle, spec: LayerSpec) -> None:
        self.spec, library = spec, implementation.library
        raw = spec.kind in ("parameter", "experts")
        where = (
            {"target_modules": [], "target_parameters": [f"{self.NAME}.w"]} if raw else {"target_modules": [self.NAME]}
        )
        config = {
            "r": spec.r,
            "lora_alpha": int(spec.lora_alpha) if spec.lora_alpha == int(spec.lora_alpha) else spec.lora_alpha,
            **where,
            **implementation.layer_options(spec),
        }
        for option, default in (("use_rslora", False), ("lora_dropout", 0.0), ("init_lora_weights", True)):
            if getattr(spec, option) is not default:  # what is not asked for need not be there, in old releases
                config[option] = getattr(spec, option)
        if spec.kind == "transposed":
            config["fan_in_fan_out"] = True
        net = Chain({self.NAME: base_module(spec.kind, spec.W, spec.b, spec.dtype, spec)})
        implementation.prepare(net, config, spec)
        whole = ModelSpec({self.NAME: ModuleSpec(spec.kind, spec.W, spec.b)}, config, spec.dtype, spec.seed)
        self.model = implementation.model_class(library, whole, net)
        if spec.init_lora_weights == "eva":
            implementation.after(self.model, spec)
        self.model.peft.eval()

    @property
    def wrapper(self) -> Any:
        return self.model.module(self.NAME)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.model.factors(self.wrapper, "default")

    def read(self) -> LayerState:
        kind, wrapper = self.spec.kind, self.wrapper
        if kind not in ("parameter", "experts"):
            state = self.model.read(self.NAME)
            if MESH.get(kind):
                return state._replace(B=self._unpacked("B", state.B))
            return state if kind != "transposed" or self.spec.b is not None else state._replace(b=None)
        A, B = map(to_numpy, self.factors())
        if kind == "experts":
            A, B = self._unpacked("A", A), self._unpacked("B", B)
        return LayerState(to_numpy(bare(wrapper).w), None, A, B, float(wrapper.scaling["default"]))

    def write(self, A: Array, B: Array) -> None:
        if self.spec.kind == "experts":
            E, out, r = B.shape
            A, B = A.reshape(-1, A.shape[-1]), B.transpose(1, 2, 0).reshape(out, r * E)
        if "groups" in self.spec.base:
            B = of_groups(B, self.spec.base["groups"])
        self.model.write(self.NAME, A, B)

    def forward(self, x: Array, train: bool = False, seed: int = 0) -> Array:
        y = self.model.forward(self._oriented(x), train, seed)
        return y

    def update(self) -> Array:
        return logical(self.spec.kind, self.wrapper.get_delta_weight("default"))

    def _oriented(self, x: Array) -> Array:
        return x

    def merge(self, safe: bool = False) -> None:
        self.model.merge(safe=safe)

    def unmerge(self) -> None:
        self.model.unmerge()

    def enable(self, enabled: bool) -> None:
        self.model.enable(enabled)

    def rescale(self, how: str, factor: float | None) -> None:
        if how == "set":
            self.wrapper.set_scale("default", factor)
        else:
            getattr(self.wrapper, f"{how}_layer")(factor)

    def grad(self, x: Array, dy: Array, train: bool = False, seed: int = 0) -> dict[str, Array | None]:
        self.model.peft.zero_grad()
        self.model.peft.train(train)
        given = torch.tensor(x) if x.dtype.kind == "i" else to_torch(x, self.spec.dtype).requires_grad_()
        torch.manual_seed(seed)
        y = self.model.peft(given)
        (y * to_torch(dy).to(y.dtype)).sum().backward()
        A, B = self.factors()
        base = bare(self.wrapper)
        W = base.w if hasattr(base, "w") else base.weight
        found = {"x": given, "A": A, "B": B, "W": W, "b": getattr(base, "bias", None)}
        grads = {k: None if v is None or v.grad is None else to_numpy(v.grad) for k, v in found.items()}
        return {k: None if v is None else self._unpacked(k, v) for k, v in grads.items()}

    def _unpacked(self, name: str, value: Array) -> Array:
        """As the contract has it. In torch B of a convolution is (out, r, 1, 1); of experts A is (r E, in), expert
        after expert, and B (out, r E) with the expert innermost."""
        if self.spec.kind == "experts" and name in "AB":
            E = len(self.spec.W)
            return (
                value.reshape(E, -1, value.shape[-1])
                if name == "A"
                else value.reshape(len(value), -1, E).transpose(2, 0, 1)
            )
        if name == "B" and MESH.get(self.spec.kind, 0):
            return in_groups(value.reshape(value.shape[:2]), self.spec.base.get("groups", 1))
        return value

    def trainable(self) -> set[str]:
        A, B = self.factors()
        base = bare(self.wrapper)
        W = base.w if hasattr(base, "w") else base.weight
        found = {"A": A, "B": B, "W": W, "b": getattr(base, "bias", None)}
        return {name for name, value in found.items() if value is not None and value.requires_grad}


class PeftStyle(Implementation):
    """What is common; a subclass gives `library`, `claims` and how an initialisation gets its data."""

    library: ModuleType
    model_class = PeftStyleModel

    def version(self) -> str:
        return f"{self.library.__name__} {self.library.__version__}, torch {torch.__version__}"

    def layer(self, spec: LayerSpec) -> Layer:
        return PeftStyleLayer(self, spec)

    def model(self, spec: ModelSpec) -> Model:
        return self.model_class(self.library, spec)

    def load(self, spec: ModelSpec, folder: Path) -> Model:
        return self.model_class(self.library, dataclasses.replace(spec, config={}), folder=folder)

    def load_own(self, spec: ModelSpec, folder: Path) -> Model:
        return self.load(spec, folder)

    def layer_options(self, spec: LayerSpec) -> dict[str, Any]:
        """More options of the configuration, for the initialisation."""
        options, init = spec.init_options, spec.init_lora_weights
        if init == "loftq":
            return {"loftq_config": {"loftq_bits": options["bits"], "loftq_iter": options["iterations"]}}
        if init == "corda":
            return {"corda_config": {"corda_method": options["method"]}}
        if init == "eva":
            return {"eva_config": {"rho": options.get("rho", 1.0), "whiten": options.get("whiten", False)}}
        return {}

    def prepare(self, net: nn.Module, config: dict[str, Any], spec: LayerSpec) -> None:
        """What must run before get_peft_model."""

    def after(self, model: PeftStyleModel, spec: LayerSpec) -> None:
        """What must run after get_peft_model."""
