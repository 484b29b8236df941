"""Readers of adapter folders in PEFT's format, whoever wrote them: a reader need not write, merge or train."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from .. import folder as folders
from ..check import Check
from ..contract import Array, Implementation, LayerState, ModelSpec
from ..generate import reals
from ..registry import requirement
from .files import plain, states_for, tensors_of
from .operations import gives, small

FORMAT = "PEFT's documentation of its checkpoint format (X1, X2)"
CONFIG = "PEFT, LoraConfig: "


def read(
    check: Check,
    implementation: Implementation,
    spec: ModelSpec,
    states: Mapping[str, LayerState],
    dtype: str = "F32",
    minimal: bool = False,
    more: Mapping[str, Array] | None = None,
) -> None:
    """A folder with these factors, written by the suite, gives the output of the oracle."""
    with tempfile.TemporaryDirectory() as place:
        tensors = tensors_of(spec, dict(states)) | dict(more or {})
        folders.write(Path(place), spec.config, tensors, dtype, minimal)
        model = implementation.load(spec, Path(place))
    gives(check, model, spec, [states], "the output")


@requirement("READER-001", "A folder that another program wrote acts as it says.", FORMAT, "reads_peft", small, slow=2)
def reader_001(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    read(check, implementation, spec, plain(spec))


@requirement(
    "READER-002",
    "Tensors in float16 and in bfloat16 are read.",
    "safetensors, format: the dtypes of tensors include the two half precision ones (X1)",
    "reads_peft",
    lambda i: st.tuples(small(i), st.sampled_from(("F16", "BF16"))),
    slow=2,
)
def reader_002(implementation: Implementation, case: Any, check: Check) -> None:
    spec, dtype = case
    read(check, implementation, spec, plain(spec), dtype)


@requirement(
    "READER-003",
    "A configuration with the type, rank, alpha and target modules alone is enough.",
    f"{CONFIG}every option has a default (X8)",
    "reads_peft",
    small,
    slow=2,
)
def reader_003(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    read(check, implementation, spec, plain(spec), minimal=True)


@requirement(
    "READER-004",
    "use_rslora in the configuration divides alpha by the root of r.",
    "rsLoRA, arXiv 2312.03732; PEFT, LoraConfig.use_rslora (S1)",
    "reads_peft rslora",
    lambda i: small(i, use_rslora=True, r=st.sampled_from((2, 3))),
    slow=2,
)
def reader_004(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    read(check, implementation, spec, plain(spec))


@requirement(
    "READER-005",
    "rank_pattern and alpha_pattern set r and alpha of the modules that they name.",
    f"{CONFIG}rank_pattern and alpha_pattern map names or expressions to ranks and alphas (N8)",
    "reads_peft patterns",
    lambda i: small(i, rank_pattern={"up": 4}, alpha_pattern={"a.proj": 3, "head": 5}),
    slow=2,
)
def reader_005(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    alphas = {"a.proj": 3, "head": 5}

    def r(name: str) -> int:
        return 4 if name == "a.up" else spec.config["r"]

    states = states_for(spec, r, lambda name: alphas.get(name, spec.config["lora_alpha"]) / r(name))
    read(check, implementation, spec, states)


@requirement(
    "READER-006",
    "target_modules may be an expression for the whole name.",
    f"{CONFIG}target_modules as a string is a regular expression (N3)",
    "reads_peft targets:regex",
    lambda i: small(i, target_modules=["proj", "up"]),
    slow=2,
)
def reader_006(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    states = plain(spec)
    with tempfile.TemporaryDirectory() as place:
        config = {**spec.config, "target_modules": r"a\.(proj|up)"}
        folders.write(Path(place), config, tensors_of(spec, states))
        model = implementation.load(spec, Path(place))
    gives(check, model, spec, [states], "the output")


@requirement(
    "READER-007",
    "Options of a newer release that are null or off change nothing.",
    f"{CONFIG}an option that is null or off has no effect (X8)",
    "reads_peft",
    lambda i: small(i, layers_to_transform=None, layers_pattern=None, use_dora=False, loftq_config={}),
    slow=2,
)
def reader_007(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    read(check, implementation, spec, plain(spec))


@requirement(
    "READER-008",
    "Biases in the folder of an adapter with bias='all' replace those of the base.",
    f"{CONFIG}with bias 'all' the biases are updated in training, and the folder holds them (B5, X2)",
    "reads_peft bias",
    lambda i: small(i, bias="all"),
    slow=2,
)
def reader_008(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    states, rng = plain(spec), np.random.default_rng([spec.seed, 31])
    biases = {name: reals(rng, m.b.shape) for name, m in spec.modules.items() if m.b is not None}
    more = {f"{name}.base_layer.bias" if name in states else f"{name}.bias": b for name, b in biases.items()}
    with tempfile.TemporaryDirectory() as place:
        folders.write(Path(place), {**spec.config, "bias": "all"}, tensors_of(spec, states) | more)
        model = implementation.load(spec, Path(place))
    modules = {name: type(m)(m.kind, m.W, biases.get(name)) for name, m in spec.modules.items()}
    gives(check, model, ModelSpec(modules, spec.config, spec.dtype, spec.seed), [states], "the output")
