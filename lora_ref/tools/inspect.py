"""`lora-ref inspect DIR`: what is in an adapter folder, module by module.

The singular values of an update D = s*B@A say how much of its rank it uses: r equal bars use all of it, one high bar
and a row of low ones would have done with a smaller r.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, float64

from ..core.config import LoraConfig
from ..core.names import Rule
from ..core.scaling import scaling
from ..core.update import unpack_experts
from ..files.adapter_folder import PREFIX, read_adapter
from .spectrum import bar, block_diagonal, singular_values

# <module>.lora_A.weight for layers, <module>.lora_embedding_A for embeddings
FACTOR = re.compile(r"(?P<module>.+)\.(?P<kind>lora_|lora_embedding_)(?P<factor>[AB])(\.weight)?")


@dataclass(frozen=True)
class Update:
    """One adapted module of the folder. `singular_values` are those of s*B@A, in falling order."""

    module: str
    kind: str  # "linear", "embedding", "conv1d", "conv2d", "conv3d" or "4 experts"
    r: int
    lora_alpha: float
    scaling: float
    A: list[int]
    B: list[int]
    dtype: str
    parameters: int
    frobenius_norm: float
    singular_values: list[float]


@dataclass(frozen=True)
class Contents:
    """All that `inspect` tells of a folder; `extra` are the tensors that are no LoRA factor."""

    directory: str
    config: dict[str, Any]
    modules: list[Update]
    extra: list[dict[str, Any]]
    parameters: int
    bytes: int


def contents(directory: Path) -> Contents:
    """Read a folder and describe it.

    Raises:
        OSError, ValueError: the folder cannot be read, or is no adapter (see `storage.read_adapter`), or the shapes
            of two factors fit neither each other nor the configured rank.
    """
    config, tensors = read_adapter(directory)
    pairs: dict[str, dict[str, tuple[str, Tensor]]] = {}
    extra = []
    for key, tensor in sorted(tensors.items()):
        name = key.removeprefix(PREFIX)
        if match := FACTOR.fullmatch(name):
            pairs.setdefault(match["module"], {})[match["factor"]] = (match["kind"], tensor)
        else:
            extra.append({"name": name, "shape": list(tensor.shape), "parameters": tensor.numel()})
    ranks, alphas = (
        Rule("rank_pattern", config.rank_pattern, config.pattern_type),
        Rule("alpha_pattern", config.alpha_pattern, config.pattern_type),
    )
    modules = []
    for name, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"{name}: lora_{'B' if 'A' in pair else 'A'} is missing")
        modules.append(describe(name, pair["A"][1], pair["B"][1], "embedding" in pair["A"][0], config, (ranks, alphas)))
    return Contents(
        directory=str(directory),
        config=main_options(config),
        modules=modules,
        extra=extra,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
    )


def describe(
    module: str, A: Tensor, B: Tensor, embedding: bool, config: LoraConfig, patterns: tuple[Rule, Rule]
) -> Update:
    """The row of one module, from its stored factors A (r, in, ...) and B (out, r, ...)."""
    # The file names the module of a raw parameter, the config the parameter: "experts" and "experts.down_proj".
    name = module.replace(".base_layer", "")
    targets = [target.rpartition(".") for target in config.target_parameters or []]
    parameters = [
        f"{name}.{parameter}" for parent, _, parameter in targets if name == parent or name.endswith(f".{parent}")
    ]
    r = first(patterns[0], config.rank_pattern, [name, *parameters], config.r)
    alpha = first(patterns[1], config.alpha_pattern, [name, *parameters], config.lora_alpha)
    s = scaling(r, alpha, config.use_rslora)

    a = A.detach().to(float64).cpu().numpy().reshape(A.shape[0], -1)  # (r, in) or (r, in * kernel)
    b = B.detach().to(float64).cpu().numpy().reshape(B.shape[0], -1)  # (out, r) or (out, r / groups)
    kind = "embedding" if embedding else "linear" if A.ndim == 2 else f"conv{A.ndim - 2}d"
    if A.ndim > 2 and b.shape[1] != r and r % b.shape[1] == 0:
        b = block_diagonal(b, r // b.shape[1])
    if parameters and len(a) != r and len(a) % r == 0 and a.shape[0] == b.shape[1]:
        kind = f"{len(a) // r} experts"
        a, b = unpack_experts(a, b, len(a) // r)  # (E, r, in), (E, out, r)
    if not a.shape[-2] == b.shape[-1] == r:
        raise ValueError(f"{module}: A {tuple(A.shape)} and B {tuple(B.shape)} do not fit the configured rank {r}")
    # Experts are the blocks of one block-diagonal update, whose singular values are those of all blocks together.
    values = np.sort(singular_values(a, b, s).ravel())[::-1]
    norm = math.hypot(*values)  # with no squares that overflow
    if not math.isfinite(norm):
        raise ValueError(f"{module}: its update s*B*A, with s = {s:g}, is beyond the numbers of float64")
    return Update(
        module=module,
        kind=kind,
        r=r,
        lora_alpha=alpha,
        scaling=s,
        A=list(A.shape),
        B=list(B.shape),
        dtype=str(A.dtype).removeprefix("torch."),
        parameters=A.numel() + B.numel(),
        frobenius_norm=norm,
        singular_values=values.tolist(),
    )


def first(rule: Rule, values: dict[str, Any], names: list[str], default: Any) -> Any:
    """The value of rank_pattern or alpha_pattern for the first of several names that it knows."""
    keys = (rule.match(name) for name in names)
    return next((values[key] for key in keys if key is not None), default)


def main_options(config: LoraConfig) -> dict[str, Any]:
    """What the header shows: the options that say what was adapted and how."""
    always = ["r", "lora_alpha", "use_rslora", "target_modules", "bias", "init_lora_weights"]
    where_set = ["target_parameters", "rank_pattern", "alpha_pattern", "modules_to_save", "base_model_name_or_path"]
    shown = {name: getattr(config, name) for name in always}
    return shown | {name: value for name in where_set if (value := getattr(config, name))}


def run(directory: Path, as_json: bool = False, figure: Path | None = None) -> None:
    """Print the folder's contents, as a table or as one JSON document; with `figure`, draw them as well."""
    found = contents(directory)
    if figure is not None:
        from .inspect_figure import draw

        draw(found.modules, figure)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    console.print(found.directory, style="bold")
    for name, value in found.config.items():
        console.print(f"  {name}: {printable(str(value))}")
    console.print(table(found.modules))
    for tensor in found.extra:
        console.print(f"  also stored: {printable(tensor['name'])} {tensor['shape']}")
    console.print(f"{len(found.modules)} adapted modules, {found.parameters:,} parameters, {found.bytes:,} bytes")
    if figure is not None:
        console.print(f"Drawn to {figure}", soft_wrap=True)


def printable(text: str) -> str:
    """Text out of a downloaded file, which must not steer the terminal.

    >>> printable("fc1\\x1b[2J")
    'fc1�[2J'
    """
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def table(modules: list[Update]) -> Any:
    """The modules as a rich table."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    view = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    view.add_column("module", overflow="fold")
    view.add_column("kind")
    for heading in ("r", "alpha", "s", "A", "B", "‖sBA‖"):
        view.add_column(heading, justify="right")
    view.add_column("singular values", no_wrap=True)
    for update in modules:
        view.add_row(
            Text(printable(update.module)),
            update.kind,
            *(f"{number:.4g}" for number in (update.r, update.lora_alpha, update.scaling)),
            *("×".join(map(str, shape)) for shape in (update.A, update.B)),
            f"{update.frobenius_norm:.3g}",
            bar(update.singular_values),
        )
    return view
