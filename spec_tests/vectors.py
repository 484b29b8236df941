"""Numbers for engines that are not in Python, or only load adapters: `python -m spec_tests.vectors --write`.

`vectors/vectors.json` has layers with their inputs and outputs, `vectors/folders/*` adapter folders in PEFT's format,
each with `model.json`: the base model, an input and the output. Weights are small integers, s is a power of two: every
number is exact in float32 and float16, so outputs can be compared with `==`.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import folder, oracle
from .contract import Array, LayerSpec, LayerState
from .generate import integers

PLACE = Path(__file__).parent / "vectors"
LAYERS = (
    # kind, (out, in), r, lora_alpha, use_rslora, bias
    ("linear", (2, 3), 1, 1.0, False, True),
    ("linear", (3, 2), 2, 4.0, False, False),
    ("linear", (2, 3), 4, 4.0, True, True),
    ("linear", (3, 3), 2, -1.0, False, True),
    ("embedding", (2, 5), 2, 4.0, False, False),
    ("embedding", (3, 4), 4, 1.0, True, False),
    ("conv1d", (2, 3, 2), 1, 2.0, False, True),
    ("conv2d", (2, 2, 2, 2), 2, 1.0, False, False),
)
FOLDERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 2, "lora_alpha": 4, "target_modules": ["up", "down"]},
    "defaults": {"target_modules": ["up"]},
    "rslora": {"r": 4, "lora_alpha": 2, "use_rslora": True, "target_modules": ["up", "down"]},
    "patterns": {
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["up", "down"],
        "rank_pattern": {r"1\.up": 1},
        "alpha_pattern": {"layers.0.down": 8},
    },
    "embedding": {"r": 1, "lora_alpha": 2, "target_modules": ["emb", "down"]},
}
MODULES = {"emb": ("embedding", 3, 6), "layers.0.up": ("linear", 4, 3), "layers.0.down": ("linear", 3, 4),
           "layers.1.up": ("linear", 4, 3), "layers.1.down": ("linear", 3, 4)}  # fmt: skip
RANKS = {"patterns": {"layers.1.up": (1, 2)}}  # {folder: {module: (r, alpha)}}, where patterns change them
ALPHAS = {"patterns": {"layers.0.down": (2, 8)}}


def plain(value: Array | None) -> Any:
    """Nested lists."""
    if value is None:
        return None
    return value.tolist()


def layer_vectors() -> list[dict[str, Any]]:
    found = []
    for number, (kind, shape, r, alpha, root, bias) in enumerate(LAYERS):
        rng = np.random.default_rng(number)
        W = integers(rng, shape)
        b = integers(rng, shape[:1]) if bias else None
        A, B = integers(rng, (r, *shape[1:]), 2), integers(rng, (shape[0], r), 2)
        spec = LayerSpec(kind, W, b, r, alpha, root)
        size = {"conv1d": (1, shape[1], 4), "conv2d": (1, shape[1], 3, 3)}.get(kind, (2, shape[1]))
        x = np.arange(shape[1]) if kind == "embedding" else integers(rng, size, 2)
        state = LayerState(W, b, A, B, spec.scaling)
        y, _ = oracle.forward(spec, state, x)
        merged = W + oracle.delta(A, B, spec.scaling)
        found.append(
            {"kind": kind, "r": r, "lora_alpha": alpha, "use_rslora": root, "scaling": spec.scaling}
            | {
                name: plain(v)
                for name, v in (("W", W), ("b", b), ("A", A), ("B", B), ("x", x), ("y", y), ("merged", merged))
            }
        )
    return found


def write_folder(place: Path, name: str) -> None:
    """An adapter folder, and next to it the model that it is for."""
    config = FOLDERS[name]
    rng = np.random.default_rng(len(name))
    tensors: dict[str, Array] = {}
    modules, y = {}, None
    x = np.array([0, 2, 5])
    for module, (kind, out, n_in) in MODULES.items():
        W = integers(rng, (out, n_in), 2)
        modules[module] = {"kind": kind, "W": plain(W)}
        if any(module == t or module.endswith("." + t) for t in config["target_modules"]):
            r, alpha = config.get("r", 8), config.get("lora_alpha", 8)
            r, alpha = RANKS.get(name, {}).get(module, ALPHAS.get(name, {}).get(module, (r, alpha)))
            A, B = integers(rng, (r, n_in), 1), integers(rng, (out, r), 1)
            tensors |= dict(zip(folder.keys(module, kind), (A, B), strict=True))
            W = W + oracle.delta(A, B, alpha / (r**0.5 if config.get("use_rslora") else r))
        y = W.T[x] if kind == "embedding" else np.asarray(y) @ W.T
    folder.write(place / name, config, tensors, minimal=name == "defaults")
    text = {"modules": modules, "x": plain(x), "y": plain(np.asarray(y))}
    (place / name / "model.json").write_text(json.dumps(text, indent=1) + "\n")


def write(place: Path = PLACE) -> None:
    place.mkdir(parents=True, exist_ok=True)
    about = {
        "orientation": "W (out, in, *kernel), A (r, in, *kernel), B (out, r); an embedding has (dimension, rows)",
        "formula": "y = W x + b + s B A x, s = lora_alpha / r, with use_rslora alpha / sqrt(r); merged = W + s B A",
        "layers": layer_vectors(),
    }
    (place / "vectors.json").write_text(json.dumps(about, indent=1) + "\n")
    shutil.rmtree(place / "folders", ignore_errors=True)
    for name in FOLDERS:
        write_folder(place / "folders", name)


def main(arguments: Sequence[str]) -> int:
    if arguments != ["--write"]:
        print("usage: python -m spec_tests.vectors --write", file=sys.stderr)
        return 2
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
