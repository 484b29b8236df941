"""Small networks that several tests adapt."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_ref import LoraConfig, get_peft_model
from lora_ref.core.layer_types import LoraLayer


class Conv1D(nn.Module):
    """transformers' linear layer of GPT-2: the weight is stored (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / nx**0.5), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


class Stacks(nn.Module):
    """Raw weights of no layer of their own: a matrix and a stack of experts."""

    def __init__(self, matrix: Tensor, stack: Tensor, is_transposed: bool) -> None:
        super().__init__()
        self.matrix, self.stack, self.is_transposed = nn.Parameter(matrix), nn.Parameter(stack), is_transposed

    def forward(self, x: Tensor) -> Tensor:
        per_expert = "ti,eio->eto" if self.is_transposed else "ti,eoi->eto"
        return torch.einsum(per_expert, F.linear(x, self.matrix), self.stack)


class Experts(nn.Module):
    """One raw parameter: a matrix (out, in) of each of n experts, whose outputs are added after a tanh."""

    def __init__(self, n: int, n_out: int, n_in: int) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(n, n_out, n_in))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("...i,eoi->...eo", x, self.stack)).sum(-2)


class UpAndDown(nn.Module):
    """Two raw parameters: for each of n experts a matrix to `inner` numbers and one back; for n=0 one matrix each.

    Stored (n, out, in), or (n, in, out) with `is_transposed`. The outputs of the experts are added.
    """

    def __init__(self, n: int, width: int, inner: int, is_transposed: bool) -> None:
        super().__init__()
        shapes = ((n, inner, width), (n, width, inner)) if n else ((inner, width), (width, inner))
        if n and is_transposed:
            shapes = shapes[::-1]
        if is_transposed:
            self.is_transposed = True
        self.up, self.down = (nn.Parameter(torch.randn(shape) / 2) for shape in shapes)
        self.transposed = bool(n) and is_transposed

    def forward(self, x: Tensor) -> Tensor:
        up, down = (w if self.transposed else w.mT for w in (self.up, self.down))
        if up.ndim == 2:
            return torch.tanh(x @ up) @ down
        return (torch.tanh(x.unsqueeze(-3) @ up) @ down).sum(-3)


class Twice(nn.Module):
    """One linear layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.block = nn.Sequential(self.a)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.a(x))


class ScaledEmbedding(nn.Embedding):
    """Gemma's: the rows are multiplied by a constant."""

    embed_scale = 2.5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale


def adapt(module: nn.Module, r: int = 2, **options: Any) -> tuple[nn.Module, LoraLayer]:
    """The adapted model around one module, and its layer. A and B are random unless told otherwise."""
    options = {"init_lora_weights": False, "fan_in_fan_out": isinstance(module, Conv1D)} | options
    model = get_peft_model(nn.Sequential(OrderedDict(m=module)), LoraConfig(r=r, target_modules=["m"], **options))
    return model, model.lora_layers()["m"]


def randomise(model: nn.Module, scale: float = 0.5) -> nn.Module:
    """Normal numbers for what is trained, for each factor and for each copy of modules_to_save: no factor is zero."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name or "modules_to_save" in name:
            parameter.data = scale * torch.randn(parameter.shape).to(parameter)
    return model


VOCABULARY = 32
WIDTHS = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}


def gpt2(**options: Any) -> Any:
    """transformers' GPT-2 of two blocks with random weights, in float64."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": VOCABULARY, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 24}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    return GPT2LMHeadModel(GPT2Config(**shape | ends | options)).double()


def llama(**options: Any) -> Any:
    """transformers' Llama of two blocks with random weights, in float64. Its norms and its loss are float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": VOCABULARY, "num_key_value_heads": 1, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**WIDTHS | shape | options)).double()


def bert(**options: Any) -> Any:
    """transformers' BERT of two blocks with random weights and three classes, in float64."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(**WIDTHS | {"vocab_size": VOCABULARY, "num_labels": 3} | options)
    ).double()


def stored(layer: LoraLayer, adapter: str = "default") -> list[nn.Parameter]:
    """A and B of an adapter, in the shapes of the adapter file."""
    return [parameter for name, parameter in layer.adapter_parameters() if name == adapter]


class Snapshot:
    """All that an operation could change of a model. Two snapshots are equal where nothing has changed.

    Modules and parameters are compared by identity, numbers by their bytes, flags and other attributes by value.

    >>> model, layer = adapt(nn.Linear(2, 2))
    >>> before = Snapshot(model)
    >>> Snapshot(model) == before
    True
    >>> layer.scaling["default"] = 2.0
    >>> Snapshot(model) == before
    False
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        tensors = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        self.alive = (*tensors.values(), *(t.grad for t in tensors.values()))  # so that no identity is used again
        seen: dict[int, str] = {}
        self.tensors = {name: (tensor_of(t), tensor_of(t.grad), t.requires_grad) for name, t in tensors.items()}
        self.attributes = {
            name: {
                key: plain(value, seen)
                for key, value in vars(module).items()
                if key not in ("_parameters", "_buffers", "_modules")
            }
            for name, module in self.modules.items()
        }

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Snapshot)
            and {name: id(m) for name, m in self.modules.items()} == {n: id(m) for n, m in other.modules.items()}
            and self.tensors == other.tensors
            and self.attributes == other.attributes
        )

    __hash__ = None  # type: ignore[assignment]


def tensor_of(tensor: Tensor | None) -> tuple[Any, ...]:
    """Which tensor it is, where its numbers are, and their bytes."""
    if tensor is None or tensor.is_meta:
        return (id(tensor),)
    numbers = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return id(tensor), tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), numbers


def plain(value: Any, seen: dict[int, str]) -> Any:
    """A value that does not change when the attribute does: containers are copied, objects replaced by attributes."""
    if isinstance(value, Tensor):
        return tensor_of(value)
    if isinstance(value, nn.Module) or callable(value):
        return id(value)
    if isinstance(value, str | int | float | bool | None):
        return repr(value)  # NaN is NaN
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = f"number {len(seen)}"
    if isinstance(value, dict):
        return [(plain(k, seen), plain(v, seen)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return [plain(v, seen) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if not hasattr(value, "__dict__"):
        return id(value)
    return [type(value).__name__, *((key, plain(v, seen)) for key, v in vars(value).items())]


def factors(seed: int, batch: tuple[int, ...], n_out: int, n_in: int, r: int) -> tuple[np.ndarray, np.ndarray]:
    """Normal A (*batch, r, in) and B (*batch, out, r) in float64."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((*batch, r, n_in)), rng.standard_normal((*batch, n_out, r))


def decomposing(n_out: int, n_in: int, r: int) -> int:
    """Roundings of `svd_of_product`: QR of B and of A, and SVD of what is between.

    A decomposition of m by n numbers has 8 m n (Higham, Accuracy and Stability, 19.4, with 8 for his constant c).
    """
    return 8 * (n_out * r + n_in * r + min(n_out, r) * min(n_in, r)) + r
