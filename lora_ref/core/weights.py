"""Which weight the base layer has: its own, a merged one, or what an initialisation left of it.

    merged        W + s * B @ A, the original kept beside it: unmerging is exact
    taken out     W - s0 * B0 @ A0 (PiSSA, OLoRA, CorDA, LoRA-GA) or a quantised W (LoftQ)

What an adapter's initialisation took out of the base weight is kept, so that the base model is
itself again whenever that adapter does not speak: switched off, another one active, deleted.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .. import numerics
from ..safe.sharded import gathered
from .adapter_modules import AdapterModule, on_demand, put, unwrapped
from .formula import add_product, at_least_float32


class Taken(nn.Module):
    """What was taken out of a weight (out, in): s * B @ A as it was at the start, or any D.

    Buffers, since nothing here trains; they move, and are saved, with the model.
    """

    D: Any
    A: Any
    B: Any

    def __init__(self, D: Tensor | None = None, A: Tensor | None = None, B: Tensor | None = None, s: float = 1.0):
        super().__init__()
        self.scaling = s
        for name, tensor in (("D", D), ("A", A), ("B", B)):
            self.register_buffer(name, None if tensor is None else tensor.detach().clone())

    def delta(self) -> Float[Tensor, "out in"]:
        """What is missing, in at least float32."""
        if self.D is not None:
            return at_least_float32(self.D)
        return self.scaling * (at_least_float32(self.B) @ at_least_float32(self.A))

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y + D x: the part of the base's output that is missing from y."""
        if self.D is not None:
            return y + F.linear(x.to(self.D.dtype), self.D)  # (*tokens, in) @ (in, out) -> (*tokens, out)
        return add_product(y, x, self.A, self.B, self.scaling)


class WeightKeeper(AdapterModule):
    """A wrapped module with a weight that adapters may replace, and that can be had back."""

    weight_name = "weight"  # the base parameter that updates are added to
    merged_adapters: list[str]
    # while merged: the unmerged weight, so that unmerging gives it back bit for bit; while merged
    # and disabled: the merged weight. In a list, for a parameter here would count as the model's
    spare: list[nn.Parameter]
    lora_taken = on_demand("lora_taken")  # {adapter: what it took out of the weight}

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self._modules["base_layer"] = base_layer
        self.have(merged_adapters=[], spare=[], training=base_layer.training)

    @property
    def base(self) -> nn.Module:
        """The module that is wrapped."""
        return self.base_layer

    def frame(self) -> Iterable[nn.Module]:
        """The base layer, and what was taken out of its weight."""
        taken = self._modules.get("lora_taken")
        return [self.base_layer] if taken is None else [self.base_layer, taken]

    def get_base_layer(self) -> nn.Module:
        """The module at the bottom of nested wrappers."""
        return unwrapped(self._modules["base_layer"])  # type: ignore[arg-type]

    @property
    def base_weight(self) -> nn.Parameter:
        """The base parameter that the update belongs to, as stored."""
        return getattr(self.get_base_layer(), self.weight_name)

    def put_weight(self, weight: Tensor) -> None:
        """Replace the base parameter. Another module that shared it keeps the old one."""
        setattr(self.get_base_layer(), self.weight_name, self.as_weight(weight))

    def as_weight(self, weight: Tensor) -> nn.Parameter:
        """A parameter that can take the place of the base's."""
        now = self.base_weight
        if not isinstance(weight, nn.Parameter):
            weight = nn.Parameter(weight, requires_grad=now.requires_grad)
        if weight.device != now.device or weight.dtype != now.dtype:
            weight.data = weight.data.to(now)  # the model moved while this weight was put aside
        return weight

    @property
    def unmerged_weight(self) -> nn.Parameter:
        """The base parameter as it was before any merge."""
        return self.spare[0] if self.spare and not self.disable_adapters else self.base_weight

    def original_weight(self) -> Tensor:
        """The weight that the base model came with, as stored; bit for bit, or to rounding where some was taken."""
        return self.whole(self.unmerged_weight, self.lora_taken)

    def whole(self, W: Tensor, names: Iterable[str]) -> Tensor:
        """A weight as stored, together with what these adapters have taken out of it; rounded once."""
        parts = [self.stored(self.lora_taken[name].delta()) for name in names if name in self.lora_taken]
        W = gathered(W.detach())
        W = W.to(self.base_weight.device) if self.spare else W  # the model may have moved while W was put aside
        return (at_least_float32(W) + sum(parts)).to(W.dtype) if parts else W

    def unmerge(self) -> None:
        """Put the weight back that was there before merging, bit for bit."""
        if self.spare:
            self.become(self.as_weight(self.unmerged_weight), spare=[], merged_adapters=[])

    def become(self, weight: nn.Parameter, spare: list[nn.Parameter], merged_adapters: list[str]) -> None:
        """Merged, or not any more: nothing is computed here that could fail."""
        setattr(self.get_base_layer(), self.weight_name, weight)
        self.have(spare=spare, merged_adapters=merged_adapters)

    def logical_weight(self) -> Float[Tensor, "*batch out in"]:
        """The original weight as (out, in): transposed storage is undone here and in `stored`."""
        return self.logical(self.original_weight())

    def logical(self, W: Tensor) -> Float[Tensor, "*batch out in"]:
        """A weight as stored, seen as (out, in): the inverse of `stored`."""
        return W

    def stored(self, D: Float[Tensor, "*batch out in"]) -> Tensor:
        """A logical update in the shape that the base weight is stored in."""
        return D.reshape(self.base_weight.shape)

    # -- what an initialisation takes out of the weight, and gives back ------------------------

    def take(self, name: str, residual: Float[Tensor, "out in"], product: tuple[Tensor, Tensor, float] | None) -> None:
        """Leave only `residual` of the original weight; the adapter `name` has the rest: s * B @ A if `product`
        is (A, B, s), else all the difference.

        Raises:
            ValueError: an adapter is merged, or what is left is not finite in the dtype of the weight.
        """
        if self.spare:
            raise ValueError(f"{', '.join(self.merged_adapters)} is merged: call unmerge_adapter first")
        now = self.base_weight.detach()
        taken = Taken(None, *product) if product else Taken(self._without(residual).to(now.dtype))
        # where others have taken their parts already, this one's comes off what they left
        after = now - self.stored(self._without(residual)) if self.lora_taken else self.stored(residual)
        after = after.to(now).contiguous()
        if not numerics.is_finite(after):
            raise ValueError(f"what the initialisation leaves of the base weight is not finite in {now.dtype}")
        self.put_weight(after)
        put(self, "lora_taken", name, taken)

    def _without(self, residual: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        return at_least_float32(self.logical_weight()) - residual

    def left_by(self, name: str) -> Tensor:
        """The base weight as stored, had this adapter alone taken its part."""
        return self.whole(self.unmerged_weight, [other for other in self.lora_taken if other != name])

    def give_back(self, names: Iterable[str]) -> None:
        """Put what these adapters took out of the weight back into it, for good."""
        names = [name for name in names if name in self.lora_taken]
        if names:
            now, *spare = (self.whole(W, names) for W in (self.base_weight, *self.spare))
            self.put_weight(now)
            self.spare = [nn.Parameter(W, requires_grad=self.base_weight.requires_grad) for W in spare]
        for name in names:
            del self.lora_taken[name]

    def add_missing(self, y: Tensor, x: Tensor, speaking: Iterable[str]) -> Tensor:
        """y + what the adapters that do not speak have taken out of the base weight."""
        for name, taken in self.lora_taken.items():
            if name not in speaking:
                y = taken.add_to(y, x)
        return y

    # -- switching -----------------------------------------------------------------------------

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters off, or on again as they were: a merged weight is put aside meanwhile."""
        if enabled is self.disable_adapters and self.spare:
            now, then = self.base_weight, self.spare[0]
            self.put_weight(then)
            self.spare = [now]
        super().enable_adapters(enabled)

    def delete_adapter(self, name: str) -> None:
        self.give_back([name])
        super().delete_adapter(name)

    def rename_adapter(self, old: str, new: str) -> None:
        super().rename_adapter(old, new)
        self.merged_adapters = [new if x == old else x for x in self.merged_adapters]

    def state(self) -> dict[str, Any]:
        weights = {"weight": self.base_weight, "spare": self.spare, "taken": set(self.lora_taken.values())}
        return super().state() | {"merged": self.merged_adapters} | weights

    def restore(self, state: dict[str, Any], names: Mapping[str, str]) -> None:
        """... and to the earlier weight; where that is not right any more, to the unmerged one, enabled."""
        self.unmerge()
        super().restore(state, names)
        if all(name in names for name in state["merged"]) and set(self.lora_taken.values()) == state["taken"]:
            self.put_weight(state["weight"])
            self.merged_adapters, self.spare = [names[name] for name in state["merged"]], state["spare"]
        else:  # weights were taken or given back meanwhile, or a merged adapter deleted
            self.disable_adapters = False
