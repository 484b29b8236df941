"""TransformerEncoderLayer: in evaluation torch reads the weights of its linear layers without calling them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from .. import folder as folders
from ..check import Check
from ..contract import Implementation, ModelSpec, ModuleSpec
from ..generate import model_inputs, reals, seeds
from ..registry import requirement
from .operations import fill, holds
from .structures import ACTS, FILES, NAMED, OFF, SAME, expected, gives, loaded, options

FAST = "torch.nn.TransformerEncoderLayer: a fast path of evaluation gives what forward gives in training mode"
TARGETS: tuple[Any, ...] = (["linear1"], ["linear2"], ["linear1", "linear2"], r".*\.linear\d", ["first", "linear2"])


@st.composite
def encoders(draw: Any, implementation: Implementation) -> ModelSpec:
    """A linear layer, an encoder of four numbers with six hidden ones, and a head."""
    rng = np.random.default_rng(draw(seeds))
    shapes = {"first": (4, 4), "enc.linear1": (6, 4), "enc.linear2": (4, 6), "head": (3, 4)}
    modules = {n: ModuleSpec("linear", reals(rng, shape), reals(rng, shape[:1])) for n, shape in shapes.items()}
    config = options(draw, draw(st.sampled_from(TARGETS)))
    return ModelSpec(modules, config, seed=draw(seeds), order=("first", "enc", "head"), encoders=("enc",))


@requirement(
    "ENCODER-001",
    "In evaluation the adapters of an encoder's linear layers act.",
    f"{ACTS}; {NAMED}; {FAST}",
    "model linear model:encoder targets:regex write",
    encoders,
)
def encoder_001(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    gives(check, model, spec, [fill(model, spec)], "the output in evaluation")


@requirement(
    "ENCODER-002",
    "In training the adapters of an encoder's linear layers act.",
    f"{ACTS}; {NAMED}",
    "model linear model:encoder targets:regex write",
    encoders,
)
def encoder_002(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    gives(check, model, spec, [fill(model, spec)], "the output in training", train=True)


@requirement(
    "ENCODER-003",
    "A merged encoder gives what it gave.",
    f"{SAME}; {FAST}",
    "model linear model:encoder merge targets:regex write",
    encoders,
)
def encoder_003(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    model.merge()
    gives(check, model, spec, [states], "the merged output")


@requirement(
    "ENCODER-004",
    "With the adapter off, an encoder gives the output of the base model.",
    f"{OFF}; {FAST}",
    "model linear model:encoder disable targets:regex write",
    encoders,
)
def encoder_004(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    fill(model, spec)
    model.enable(False)
    gives(check, model, spec, [], "the output, off")


@requirement(
    "ENCODER-005",
    "Unloaded with merging, an encoder's linear layers have their updates.",
    SAME,
    "model linear model:encoder merge unload targets:regex write",
    encoders,
)
def encoder_005(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    holds(check, model.unload(merge=True), spec, [states], "the plain model")


@requirement(
    "ENCODER-006",
    "An adapter of an encoder's linear layers is saved and loaded again.",
    FILES,
    "model linear model:encoder files targets:regex write",
    encoders,
    slow=3,
)
def encoder_006(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    gives(check, loaded(implementation, spec, model), spec, [states], "the output of the loaded adapter")


@requirement(
    "ENCODER-007",
    "In a batch with an adapter for each sample, each sample's adapter acts in an encoder.",
    "PEFT, developer guide of LoRA: inference with different LoRA adapters in the same batch, adapter_names (U8)",
    "model linear model:encoder adapters batch targets:regex write",
    encoders,
)
def encoder_007(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = {"default": [fill(model, spec)], "__base__": []}
    model.add("other", spec.config)
    states["other"] = [fill(model, spec, "other", salt=1)]
    x, names = model_inputs(spec), ["other", "__base__", "default"]
    y = model.forward(x, adapter_names=names)
    for row, name in enumerate(names):
        want, size = expected(spec, states[name], x[row : row + 1])
        check.close(y[row : row + 1], want, size, spec.dtype, f"the output of {name!r}", 8.0 * 7)


@requirement(
    "FILE-032",
    "Where modules_to_save names a module and one inside of it, the file has each parameter once.",
    "PEFT's documentation of modules_to_save and of its checkpoint format: they are saved under their own names (X5)",
    "model linear model:encoder modules_to_save files",
    lambda i: st.tuples(encoders(i), st.permutations(("enc", "linear1"))),
    slow=3,
)
def file_032(implementation: Implementation, case: tuple[ModelSpec, list[str]], check: Check) -> None:
    spec, names = case
    spec = spec.but(target_modules=["first"], modules_to_save=names)
    with tempfile.TemporaryDirectory() as place:
        implementation.model(spec).save(Path(place))
        tensors = folders.read(Path(place))[1]
    found = sorted(key for key in tensors if "linear1" in key)
    want = [f"base_model.model.enc.linear1.{what}" for what in ("bias", "weight")]
    check.that(found == want, f"{', '.join(found)} in the file, must be {', '.join(want)}")
