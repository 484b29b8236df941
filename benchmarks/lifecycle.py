"""What an adapter costs outside of training: put in, saved, loaded, switched, merged; and the import of the library.

All over PEFT's time. "bare" is what no library can do without: of an injection the modules that the
adapter file's keys name, of loading these and the file's tensors, of saving the file, of switching a name or a
flag in each layer and which parameters train, of a merge the sums, and with a way back the copy of the weights,
of an unmerge that they are put back. No check, no way back from an error.
"""

import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import lora_ref
from lora_ref.fast.sums import add_in_place

from .measure import Bar, Case, Job
from .steps import LIBRARIES

R = 8
INJECTION, MERGING, IMPORT = "Putting adapters in, saving, loading, switching", "Merging", "Import"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def cases(options: Any) -> Iterator[Case]:
    """Injection by the number of layers and of patterns; then the rest on 32 layers; then merging by size."""
    width, many = (16, 2) if options.tiny else (64, 8 if options.quick else 32)
    numbers = [1, 2] if options.tiny else [8] if options.quick else [8, 32, 128]
    for layers in numbers:
        yield injection(layers, width, options)
    yield injection(many, width, options, patterns=many)
    for layers in numbers:
        yield loading(layers, width, options)
    yield saving(many, width, options)
    yield switching(many, width, options)
    yield disabling(many, width, options)
    sizes = [(1, 32)] if options.tiny else [(1, 512)] if options.quick else [(32, 256), (4, 1024), (1, 4096)]
    for dtype in options.dtypes:
        for layers, size in sizes:
            for operation in ("merge_adapter", "unmerge_adapter", "merge_and_unload"):
                yield merging(operation, layers, size, dtype, options)
    if not (options.cuda or options.tiny):  # each import is a process of its own, of seconds
        yield importing()


def network(layers: int, width: int, options: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Seven projections a layer, named as in a Llama; random weights, the same in each: drawing takes long."""
    names = {"self_attn": TARGETS[:4], "mlp": TARGETS[4:]}

    def block() -> nn.Module:
        parts = {
            part: nn.ModuleDict({name: nn.Linear(width, width, bias=False, device="meta") for name in own})
            for part, own in names.items()
        }
        return nn.ModuleDict(parts | {"input_layernorm": nn.LayerNorm(width, device="meta")})

    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([block() for _ in range(layers)])})})
    model = model.to_empty(device=options.device).to(dtype)
    drawn = {shape: torch.empty(shape).normal_(std=0.02) for shape in {p.shape for p in model.parameters()}}
    for parameter in model.parameters():
        parameter.data.copy_(drawn[parameter.shape])
    return model


def config(library: Any, patterns: int = 0) -> Any:
    """r = 8 everywhere, or by `patterns` regular expressions."""
    ranks = {rf"model\.layers\.{i}\..*": 4 + i % 3 for i in range(patterns)}
    return library.LoraConfig(r=R, lora_alpha=2 * R, target_modules=TARGETS, rank_pattern=ranks)


def adapted(library: Any, net: nn.Module, adapters: int = 1) -> Any:
    """With adapters a0, a1, ... (one: default) that do something."""
    model = library.get_peft_model(net, config(library), **({} if adapters == 1 else {"adapter_name": "a0"}))
    for i in range(1, adapters):
        model.add_adapter(f"a{i}", config(library))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def jobs(of: Callable[[Any], Job], bare: Callable[[], Job]) -> dict[str, Callable[[], Job]]:
    """The same of each library, and what none can do without."""
    return {name: partial(of, library) for name, library in LIBRARIES.items()} | {"bare": bare}


def versus_peft(row: dict[str, Any]) -> float:
    return row["ratios"]["lora_ref"]["median"]


def bare(row: dict[str, Any]) -> float:
    return row["ratios"]["bare"]["median"]


def injection(layers: int, width: int, options: Any, patterns: int = 0) -> Case:
    """`get_peft_model` on a fresh model."""

    def put_in(library: Any) -> Job:
        return partial(library.get_peft_model, network(layers, width, options), config(library, patterns))

    text = "get_peft_model, with rank patterns" if patterns else "get_peft_model"
    return Case(
        theme=INJECTION,
        about={"what": "inject", "layers": f"{layers} x 7", "rank patterns": patterns},
        jobs=jobs(put_in, lambda: partial(only_modules, network(layers, width, options))),
        floor="PEFT",
        fresh=True,
        bars=[Bar(f"{text}: time / PEFT's", versus_peft, 0.2, bare)],
    )


class Wrapper(nn.Module):
    """A layer and one adapter's factors, under the names that they have in the file."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.lora_A, self.lora_B = base, nn.ModuleDict(), nn.ModuleDict()
        n_out, n_in = base.weight.shape
        for part, shape in ((self.lora_A, (R, n_in)), (self.lora_B, (n_out, R))):
            factor = nn.Module()
            factor.weight = nn.Parameter(torch.empty(shape).uniform_(-1 / math.sqrt(n_in), 1 / math.sqrt(n_in)))
            part["default"] = factor


def only_modules(model: nn.Module) -> nn.Module:
    for parent in [m for m in model.modules() if isinstance(m, nn.ModuleDict)]:
        for name, child in list(parent.items()):
            if isinstance(child, nn.Linear):
                parent[name] = Wrapper(child)
    return model


def loading(layers: int, width: int, options: Any) -> Case:
    """`PeftModel.from_pretrained`: both read the folder that PEFT wrote."""
    folder = tempfile.TemporaryDirectory()
    adapted(LIBRARIES["PEFT"], network(layers, width, options)).save_pretrained(folder.name)

    def load(library: Any) -> Job:
        return partial(library.PeftModel.from_pretrained, network(layers, width, options), folder.name)

    def read_and_put(net: nn.Module) -> None:
        read = safetensors.torch.load((Path(folder.name) / "adapter_model.safetensors").read_bytes())
        places = {name: m for name, m in only_modules(net).named_modules() if isinstance(m, Wrapper)}
        for key, tensor in read.items():
            name, part = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
            getattr(places[name], part)["default"].weight = nn.Parameter(tensor)

    return Case(
        theme=INJECTION,
        about={"what": "load", "layers": f"{layers} x 7"},
        jobs=jobs(load, lambda: partial(read_and_put, network(layers, width, options))),
        floor="PEFT",
        fresh=True,
        bars=[Bar("from_pretrained: time / PEFT's", versus_peft, 0.2, bare)],
    )


def saving(layers: int, width: int, options: Any) -> Case:
    """`save_pretrained`; lora_ref's waits until the disk has it."""
    folder = tempfile.TemporaryDirectory()

    def save(library: Any) -> Job:
        model = adapted(library, network(layers, width, options))
        return partial(model.save_pretrained, Path(folder.name) / library.__name__)

    def write() -> Job:
        model = adapted(lora_ref, network(layers, width, options))
        model.save_pretrained(there := Path(folder.name) / "bare")
        tensors = safetensors.torch.load_file(there / "adapter_model.safetensors")
        return lambda: safetensors.torch.save_file(tensors, there / "adapter_model.safetensors")

    return Case(
        theme=INJECTION,
        about={"what": "save", "layers": f"{layers} x 7"},
        jobs=jobs(save, write),
        floor="PEFT",
        waits=True,
        bars=[Bar("save_pretrained: time / PEFT's", versus_peft, 1.0, bare)],
    )


def switching(layers: int, width: int, options: Any) -> Case:
    """`set_adapter` through ten adapters."""

    def switch(library: Any) -> Job:
        return partial(through, adapted(library, network(layers, width, options), adapters=10))

    def names_and_flags() -> Job:
        all_layers = adapted(lora_ref, network(layers, width, options), adapters=10).lora_layers().values()
        own = [
            (layer, [(name == f"a{i}", p) for name, p in layer.adapter_parameters()])
            for i in range(10)
            for layer in all_layers
        ]
        return partial(flags, own)

    return Case(
        theme=INJECTION,
        about={"what": "switch among 10 adapters", "layers": f"{layers} x 7"},
        jobs=jobs(switch, names_and_flags),
        floor="PEFT",
        bars=[Bar("set_adapter among 10: time / PEFT's", versus_peft, 1.0, bare)],
    )


def through(model: Any) -> None:
    for i in range(10):
        model.set_adapter(f"a{i}")


def flags(layers: list[tuple[nn.Module, list[tuple[bool, nn.Parameter]]]]) -> None:
    for layer, parameters in layers:
        layer.active = True
        for trains, parameter in parameters:
            parameter.requires_grad = trains


def disabling(layers: int, width: int, options: Any) -> Case:
    """`disable_adapter`: off, and on again."""

    def off_and_on(library: Any) -> Job:
        return partial(disabled, adapted(library, network(layers, width, options)))

    def twice() -> Job:
        own = [m for m in network(layers, width, options).modules() if isinstance(m, nn.Linear)]
        return partial(flags, [(module, []) for module in own] * 2)

    return Case(
        theme=INJECTION,
        about={"what": "disable_adapter", "layers": f"{layers} x 7"},
        jobs=jobs(off_and_on, twice),
        floor="PEFT",
        bars=[Bar("disable_adapter: time / PEFT's", versus_peft, 1.0, bare)],
    )


def disabled(model: Any) -> None:
    with model.disable_adapter():
        pass


def merging(operation: str, layers: int, width: int, dtype: torch.dtype, options: Any) -> Case:
    """One of the three. PEFT neither checks what it merges, nor gives the exact weights back.

    Bare: the sums, in float32, after a look at every weight (merge_and_unload) or into copies (merge_adapter).
    """

    def job(library: Any) -> Job:
        model = adapted(library, network(layers, width, options, dtype))
        if operation == "unmerge_adapter":
            model.merge_adapter()
        return getattr(model, operation)

    def sums() -> Job:
        net = network(layers, width, options, dtype)
        A, B = (torch.randn(shape, device=options.device) for shape in ((R, width), (width, R)))
        weights = [m.weight.data for m in net.modules() if isinstance(m, nn.Linear)]
        if operation == "unmerge_adapter":
            owners = [(m, m.weight) for m in net.modules() if isinstance(m, nn.Linear)]
            return lambda: [setattr(module, "weight", weight) for module, weight in owners]
        if operation == "merge_adapter":
            return lambda: [add(W.clone(), A, B) for W in weights]
        return lambda: [torch.linalg.vector_norm(W) for W in weights] + [add(W, A, B) for W in weights]

    bars = [Bar(f"{operation}: time / PEFT's", versus_peft, 0.125, bare)]
    if operation == "merge_and_unload":
        update = width * width * dtype.itemsize
        bars.append(Bar("merge_and_unload: peak / one update", lambda row: row["peak"]["lora_ref"] / update, 1.0))
    return Case(
        theme=MERGING,
        about={"what": operation, "layers": f"{layers} x 7 of {width}", "dtype": str(dtype).removeprefix("torch.")},
        jobs=jobs(job, sums),
        floor="PEFT",
        fresh=True,
        bytes=True,
        bars=bars,
    )


def add(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """W += 2 B A, of a half precision so many rows at a time that their float32 copies stay in the cache."""
    rows = len(W) if W.dtype == A.dtype else max(1, 2**18 // W.shape[1])
    for W_rows, B_rows in zip(W.split(rows), B.split(rows), strict=True):
        add_in_place(W_rows, B_rows, A, 2.0)
    return W


def importing() -> Case:
    """In fresh processes; what is imported is what `get_peft_model` needs."""

    def load(code: str) -> Job:
        return partial(subprocess.run, [sys.executable, "-c", f"import torch; {code}"], check=True)

    def on_top_of_torch(row: dict[str, Any]) -> float:
        clock = "from time import perf_counter; import torch; began = perf_counter()"
        code = f"{clock}; from lora_ref import get_peft_model; print(perf_counter() - began)"
        run = partial(subprocess.run, [sys.executable, "-c", code], check=True, capture_output=True, text=True)
        return statistics.median(float(run().stdout) for _ in range(5))

    return Case(
        theme=IMPORT,
        about={"what": "import, in a fresh process"},
        jobs={
            "torch": lambda: load("pass"),
            "lora_ref": lambda: load("from lora_ref import get_peft_model"),
            "PEFT": lambda: load("from peft import get_peft_model"),
        },
        floor="torch",
        waits=True,
        bars=[Bar("import, on top of torch: seconds", on_top_of_torch, 0.3)],
    )
