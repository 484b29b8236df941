"""`lora-ref inspect DIR`: the contents of an adapter folder, module by module.

The singular values of an update D = s*B@A show how much of its rank it uses. If r of them are equal, it uses all of
it. If one is large and the others are small, a smaller r would suffice.
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
    """The contents of a folder. `extra` are the tensors that are not LoRA factors."""

    directory: str
    config: dict[str, Any]
    modules: list[Update]
    extra: list[dict[str, Any]]
    parameters: int
    bytes: int


def read_contents(directory: Path) -> Contents:
    """Read an adapter folder.

    Raises:
        OSError, ValueError: the folder cannot be read or is not an adapter (see `read_adapter`), or two factors do
            not fit the configured rank.
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
    patterns = (
        Rule("rank_pattern", config.rank_pattern, config.pattern_type),
        Rule("alpha_pattern", config.alpha_pattern, config.pattern_type),
    )
    modules = []
    for name, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"{name}: lora_{'B' if 'A' in pair else 'A'} is missing")
        modules.append(describe_update(name, pair["A"][1], pair["B"][1], "embedding" in pair["A"][0], config, patterns))
    return Contents(
        directory=str(directory),
        config=main_options(config),
        modules=modules,
        extra=extra,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
    )


def describe_update(
    module: str, A: Tensor, B: Tensor, embedding: bool, config: LoraConfig, patterns: tuple[Rule, Rule]
) -> Update:
    """One module, from its stored factors A (r, in, ...) and B (out, r, ...)."""
    # For a raw parameter the file has the module's name, "experts", the config "experts.down_proj".
    name = module.replace(".base_layer", "")
    targets = [target.rpartition(".") for target in config.target_parameters or []]
    parameters = [
        f"{name}.{parameter}" for parent, _, parameter in targets if name == parent or name.endswith(f".{parent}")
    ]
    r = look_up(patterns[0], config.rank_pattern, [name, *parameters], config.r)
    alpha = look_up(patterns[1], config.alpha_pattern, [name, *parameters], config.lora_alpha)
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
    # Experts are the blocks of a block-diagonal update. Its singular values are those of all blocks.
    values = np.sort(singular_values(a, b, s).ravel())[::-1]
    norm = math.hypot(*values)  # without overflow of the squares
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


def look_up(rule: Rule, values: dict[str, Any], names: list[str], default: Any) -> Any:
    """The value in rank_pattern or alpha_pattern of the first name that matches a key, else the default."""
    keys = (rule.match(name) for name in names)
    return next((values[key] for key in keys if key is not None), default)


def main_options(config: LoraConfig) -> dict[str, Any]:
    """The options for the header."""
    always = ["r", "lora_alpha", "use_rslora", "target_modules", "bias", "init_lora_weights"]
    where_set = ["target_parameters", "rank_pattern", "alpha_pattern", "modules_to_save", "base_model_name_or_path"]
    shown = {name: getattr(config, name) for name in always}
    return shown | {name: value for name in where_set if (value := getattr(config, name))}


def print_contents(directory: Path, as_json: bool = False, figure: Path | None = None) -> None:
    """Print the folder's contents as a table or as one JSON document. With `figure`, draw them too."""
    found = read_contents(directory)
    if figure is not None:
        draw_spectra(found.modules, figure)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    console.print(found.directory, style="bold")
    for name, value in found.config.items():
        console.print(f"  {name}: {printable(str(value))}")
    console.print(modules_table(found.modules))
    for tensor in found.extra:
        console.print(f"  also stored: {printable(tensor['name'])} {tensor['shape']}")
    console.print(f"{len(found.modules)} adapted modules, {found.parameters:,} parameters, {found.bytes:,} bytes")
    if figure is not None:
        console.print(f"Drawn to {figure}", soft_wrap=True)


def printable(text: str) -> str:
    """Text of a downloaded file without control characters: it must not control the terminal.

    >>> printable("fc1\\x1b[2J")
    'fc1�[2J'
    """
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def modules_table(modules: list[Update]) -> Any:
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


def draw_spectra(modules: list[Update], path: Path) -> None:
    """The figure of `--figure`: a row for each module, its singular values divided by the largest.

    Raises:
        ImportError: matplotlib is not installed. ValueError: there are no modules.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError(f"--figure needs {error.name}: pip install 'lora_ref[demo]'") from None
    if not modules:
        raise ValueError("the folder has no adapted module, so there are no singular values to draw")
    longest = max(len(update.singular_values) for update in modules)
    values = np.full((len(modules), longest), np.nan)  # NaN is drawn white
    for row, update in zip(values, modules, strict=True):
        largest = update.singular_values[0] or 1.0  # 0 if the update is 0
        row[: len(update.singular_values)] = [value / largest for value in update.singular_values]

    height = min(1.6 + 0.3 * len(modules), 60)
    figure = Figure(figsize=(8, height), layout="constrained", facecolor="white")
    axis = figure.subplots()
    # cividis is readable for colour-blind readers and in grey; reversed: large is dark
    image = axis.imshow(values, aspect="auto", cmap="cividis_r", vmin=0, vmax=1, interpolation="nearest")
    # parse_math=False: a "$" in a name is a dollar sign, not a formula
    names = [f"{printable(update.module)}   ‖sBA‖ = {update.frobenius_norm:.3g}" for update in modules]
    axis.set_yticks(range(len(modules)), names, fontsize=9, parse_math=False)
    axis.set_xticks(sorted({*range(0, longest, -(-longest // 16)), longest - 1}))
    axis.set_xticklabels([str(int(tick) + 1) for tick in axis.get_xticks()])
    axis.set(xlabel="singular value of s·B·A, in falling order")
    figure.suptitle("How much of its rank each update uses", fontweight="bold")
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, label="share of the largest", pad=0.02)
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})
