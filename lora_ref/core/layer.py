"""An adapted layer: the base module, and A and B for each named adapter.

    y = base(x) + sum over active adapters of  s B A dropout(x) - D0 x

D0 is 0 for most inits. PiSSA, OLoRA, CorDA and LoRA-GA start from an update s0 B0 A0 that is not 0. LoftQ starts from
a quantised weight W - D0. The branch subtracts D0. W stays as it is, and so does the output without the adapter.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .adapter_modules import NOTHING, AdapterModule, unwrapped
from .config import LoraConfig
from .inits import METHODS, method_of
from .scaling import check_scaling, scaling
from .update import Factors, at_least_float32, delta

Init = Callable[[Tensor, int, float], Factors]  # (W (out, in), r, s) -> A, B and the residual
InitOf = Callable[[str], Init] | None  # a layer's name -> its init
# dicts {adapter: module}: A maps (*tokens, in) to (*tokens, r), B (*tokens, r) to (*tokens, out), lora_initial is D0
PARTS = ("lora_A", "lora_B", "lora_dropout", "lora_initial")
NUMBERS = ("r", "lora_alpha", "scaling", "initial_scaling", "train_B")  # dicts {adapter: value}


class InitialUpdate(nn.Module):
    """D0 x, where D0 (out, in) = s0 B0 A0 or a dense matrix. Its buffers move, and are saved, with the model."""

    A: Any
    B: Any
    D: Any

    def __init__(self, A: Tensor | None = None, B: Tensor | None = None, s: float = 1.0, D: Tensor | None = None):
        super().__init__()
        self.scaling = s
        for name, x in (("A", A), ("B", B), ("D", D)):
            self.register_buffer(name, x if x is None else x.detach().clone(memory_format=torch.contiguous_format))

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        if self.D is not None:
            return F.linear(x.to(self.D.dtype), self.D)
        return self.scaling * F.linear(F.linear(x.to(self.A.dtype), self.A), self.B)

    def matrix(self) -> Float[Tensor, "out in"]:
        """D0 in at least float32."""
        if self.D is not None:
            return at_least_float32(self.D)
        return delta(at_least_float32(self.A), at_least_float32(self.B), self.scaling)


class LoraLayer(AdapterModule):
    """What all adapted layers share. A layer type (`layer_types`) adds how A, B and the weight are stored.

    Differs from PEFT: an adapter without dropout has no entry in `lora_dropout`, where PEFT has an nn.Identity.
    """

    kind = "linear"  # the key in the table of inits
    weight_name = "weight"  # the base parameter that a merge adds the update to
    fan_in_fan_out = False  # is it stored as W^T?
    groups = 1  # pairs of factors that share the rank
    by_adapter: tuple[str, ...] = PARTS + NUMBERS

    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    initial_scaling: dict[str, float]
    train_B: dict[str, bool]
    merged_adapters: list[str]
    # the weight not in use: the original while merged, the merged while disabled. Bare, it would be registered
    set_aside: list[nn.Parameter]

    # most layers need neither: made when they are looked up
    lora_dropout: Any = property(lambda self: self._modules.setdefault("lora_dropout", nn.ModuleDict()))
    lora_initial: Any = property(lambda self: self._modules.setdefault("lora_initial", nn.ModuleDict()))

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self._modules.update(base_layer=base_layer, lora_A=nn.ModuleDict(), lora_B=nn.ModuleDict())
        vars(self).update({name: {} for name in NUMBERS})
        vars(self).update(merged_adapters=[], set_aside=[], training=base_layer.training)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.check_device(input)
        y = self.base_layer(input, *args, **kwargs)
        if self.disable_adapters:
            return y
        if self.adapter_names is not None:
            return self.add_by_sample(y, input)
        return self.add_branches(y, input, self.active_adapters)

    def check_device(self, x: Tensor) -> None:
        """ValueError: x, the base and the active factors are on different devices, and no hook will move them."""
        parts = {"the base": (self.base_layer, self.weight_name)}
        acting = {*(self.active_adapters if self.adapter_names is None else self.adapter_names)} & self.r.keys()
        for name in [] if self.disable_adapters else acting - {*self.merged_adapters}:
            parts.update({f"{key} of {name}": place for key, place in self.stored_in(name).items()})
        for part, (module, attribute) in parts.items():
            weight = module._parameters.get(attribute, [*module.parameters(), None][0])
            if weight is not None and weight.device != x.device and not is_observed(module):
                where = f"{type(self).__name__}: the input is on {x.device}, {part} on {weight.device}"
                raise ValueError(f"{where}: move the model to one device, for example model.to({str(x.device)!r})")

    def add_branches(self, y: Tensor, x: Tensor, names: Sequence[str]) -> Tensor:
        """y + the branches of these adapters: summed in the wider dtype, rounded once to y's."""
        total = y
        for name in names:
            if name not in self.merged_adapters:
                total = total + self.branch(x, name)
        return total.to(y.dtype)

    def branch(self, x: Tensor, name: str) -> Tensor:
        """s B A dropout(x) - D0 x."""
        modules: Any = self._modules
        lora_A, lora_B, dropout, initial = (modules.get(part, NOTHING)._modules.get(name) for part in PARTS)
        x = as_input_of(lora_A, x)
        dropped = x if dropout is None else dropout(x)
        z = self.scaling[name] * lora_B(lora_A(dropped))  # (*tokens, in) -> (*tokens, r) -> (*tokens, out)
        return z if initial is None else z - initial(x)

    def add_by_sample(self, y: Tensor, x: Tensor) -> Tensor:
        """y_i + the branch of sample i's own adapter."""
        y = y.clone()
        for name, rows in self.groups_of_batch(x):
            if name in self.r:
                y[rows] = self.add_branches(y[rows], x[rows], [name])
        return y

    def add_adapter(
        self, name: str, r: int, lora_alpha: float, config: LoraConfig, init: Init, autocast: bool, rounded: bool = True
    ) -> None:
        """Add an adapter, inactive and frozen. A and B are first rounded to the base weight's dtype (if `rounded`)."""
        W = self.unmerged_weight.detach()
        dtype = adapter_dtype(W.dtype, autocast)
        s = checked_scaling(scaling(r, lora_alpha, config.use_rslora), dtype)
        A, B, residual, exact = init(self.logical(W), r, s)
        # tensors without numbers yet (on "meta") get them, and a device, from a file
        A, B = (x.to(x.device if x.is_meta else W.device, W.dtype if rounded else dtype).to(dtype) for x in (A, B))
        self.build(name, A, B)
        if residual is not None and exact:
            self.lora_initial[name] = InitialUpdate(A, B, s)
        elif residual is not None:
            self.lora_initial[name] = InitialUpdate(D=at_least_float32(self.logical(W)) - at_least_float32(residual))
        if config.lora_dropout and self.kind != "embedding":
            self.lora_dropout[name] = nn.Dropout(config.lora_dropout).train(self.training)
        self.r[name], self.lora_alpha[name] = r, lora_alpha
        self.scaling[name] = self.initial_scaling[name] = s
        self.train_B[name] = METHODS[method_of(config.init_lora_weights)].train_B

    def set_adapter(self, adapter_names: str | Iterable[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        for name in self.r:
            if not self.train_B[name]:
                self.factors(name)[1].requires_grad_(False)

    def set_scale(self, name: str, factor: float) -> None:
        """s = factor * the scaling that the configuration gives. ValueError: s is not finite or too large."""
        self._rescale({name: factor * self.initial_scaling[name]})

    def _rescale(self, scalings: dict[str, float]) -> None:
        self.scaling.update({name: checked_scaling(s, self.base_weight.dtype) for name, s in scalings.items()})

    def build(self, name: str, A: Tensor, B: Tensor) -> None:
        """Create the modules that hold A (r, in) and B (out, r), in the shapes of the adapter file."""
        # ModuleDict's own assignment takes twice as long
        self.lora_A._modules[name], self.lora_B._modules[name] = linear_of(A), linear_of(B)

    def stored_in(self, name: str) -> dict[str, tuple[nn.Module, str]]:
        """{key in the adapter file: (module, attribute)} of the parameters A and B of one adapter."""
        modules: Any = self._modules
        return {f"{part}.weight": (modules[part]._modules[name], "weight") for part in ("lora_A", "lora_B")}

    def factors(self, name: str) -> tuple[Float[Tensor, "*batch r in"], Float[Tensor, "*batch out r"]]:
        """A and B of one adapter in logical orientation."""
        return self.lora_A[name].weight, self.lora_B[name].weight

    def logical(self, W: Tensor) -> Float[Tensor, "*batch out in"]:
        """A weight as stored, seen as (out, in): the inverse of `stored`."""
        return W.mT if self.fan_in_fan_out else W

    def stored(self, D: Float[Tensor, "*batch out in"]) -> Tensor:
        """A logical update in the shape that the base weight is stored in."""
        return D.mT if self.fan_in_fan_out else D

    get_base_layer = unwrapped

    @property
    def base_weight(self) -> nn.Parameter:
        """The base parameter that the update belongs to, as stored."""
        return getattr(unwrapped(self), self.weight_name)

    @property
    def unmerged_weight(self) -> nn.Parameter:
        """The base parameter as it was before any merge."""
        return self.set_aside[0] if self.set_aside and not self.disable_adapters else self.base_weight

    def logical_weight(self) -> Float[Tensor, "*batch out in"]:
        """The unmerged weight as (out, in)."""
        return self.logical(self.unmerged_weight.detach())

    def residual(self, name: str) -> Float[Tensor, "out in"]:
        """W - D0, the frozen weight of the papers: at the start the adapted weight is residual + s B A."""
        W, initial = self.logical_weight(), self.part("lora_initial", name)
        return W if initial is None else (at_least_float32(W) - initial.matrix()).to(W.dtype)

    def delta(self, name: str) -> Tensor:
        """s B A in the shape of the stored weight, in at least float32."""
        A, B = map(at_least_float32, self.factors(name))
        return self.stored(delta(A, B, self.scaling[name]))

    def update(self, name: str) -> Tensor:
        """s B A - D0 in the shape of the stored weight, in at least float32."""
        D, initial = self.delta(name), self.part("lora_initial", name)
        return D if initial is None else D - self.stored(initial.matrix())

    def merged_weight(self, names: Sequence[str]) -> Tensor:
        """The base weight + the updates of these adapters, in its dtype and storage. One rounding for the sum.

        Differs from PEFT: there each update is rounded to the weight's dtype first.
        """
        W = self.base_weight
        total = at_least_float32(W)
        for name in names:
            total = total + self.update(name)
        return total.to(W.dtype)

    def as_weight(self, weight: Tensor) -> nn.Parameter:
        """A parameter that can replace the base's: on its device and in its dtype, which may have changed meanwhile."""
        now = self.base_weight
        moved = weight.device != now.device or weight.dtype != now.dtype
        if not isinstance(weight, nn.Parameter) or (moved and now.is_meta is not weight.is_meta):
            return nn.Parameter(weight.detach().to(now), requires_grad=now.requires_grad)
        if moved:
            weight.data = weight.data.to(now)
        return weight

    def install_weight(self, weight: nn.Parameter, set_aside: list[nn.Parameter], merged_adapters: list[str]) -> None:
        """Install a weight and the list of adapters merged into it. Assignments only, so it cannot fail half-way."""
        setattr(unwrapped(self), self.weight_name, weight)
        vars(self).update(set_aside=set_aside, merged_adapters=merged_adapters)

    def unmerge(self) -> None:
        """Install the weight that was there before merging, bit for bit."""
        if self.set_aside:
            self.install_weight(self.as_weight(self.unmerged_weight), set_aside=[], merged_adapters=[])

    def enable_adapters(self, enabled: bool) -> None:
        if enabled is self.disable_adapters and self.set_aside:  # a merged weight is set aside while disabled
            now, then = self.base_weight, self.as_weight(self.set_aside[0])
            self.install_weight(then, [now], self.merged_adapters)
        super().enable_adapters(enabled)

    def __repr__(self) -> str:
        parts = [repr(self.base_layer)]
        for name, r in self.r.items():
            flags = ["active"] * (name in self.active_adapters) + ["merged"] * (name in self.merged_adapters)
            numbers = f"{name}: r={r} alpha={self.lora_alpha[name]:g} s={self.scaling[name]:.4g}"
            parts.append(numbers + (f" ({', '.join(flags)})" if flags else ""))
        parts += ["all disabled"] * self.disable_adapters
        return f"lora.{type(self).__name__}({'; '.join(parts)})"


def is_observed(module: nn.Module) -> bool:
    """Does a hook, or a forward that was patched in, run with the module? It may move or cast the weight."""
    hooks = module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    return bool(hooks) or "forward" in vars(module)


def as_input_of(module: nn.Module, x: Tensor) -> Tensor:
    """x in the dtype of the module's weight; not in a narrower one where a hook may still cast the weight."""
    weight = [*module.parameters(), None][0]  # not module.weight, which may be computed from others
    if weight is None or not weight.is_floating_point():
        return x
    return x if weight.itemsize < x.itemsize and is_observed(module) else x.to(weight.dtype)


def adapter_dtype(base: torch.dtype, autocast_adapter_dtype: bool = True) -> torch.dtype:
    """The dtype of A and B: the base's, but float32 for half and quarter precision."""
    return torch.float32 if autocast_adapter_dtype and base.itemsize < 4 else base


def checked_scaling(s: float, dtype: torch.dtype) -> float:
    """s, or ValueError if factors of this dtype (at least float32) cannot be multiplied by it."""
    return check_scaling(s, torch.finfo(torch.promote_types(dtype, torch.float32)).max)


def linear_of(weight: Float[Tensor, "n_out n_in"]) -> nn.Linear:
    """A frozen, bias-free nn.Linear around this weight; its own __init__ would draw another one first."""
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    vars(layer).update(out_features=weight.shape[0], in_features=weight.shape[1])
    layer._parameters.update(weight=nn.Parameter(weight.contiguous(), requires_grad=False), bias=None)
    return layer
