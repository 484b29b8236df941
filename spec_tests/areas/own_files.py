"""Adapters in a format of the library's own: what is saved and loaded again acts as before."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..check import Check
from ..contract import Implementation, Model, ModelSpec
from ..generate import model_inputs, reals
from ..registry import requirement
from .operations import fill, gives, small

TRIP = "torch.nn.Module.load_state_dict: the parameters that were saved are those that are loaded (X3)"
MERGED = "LoRA, arXiv 2106.09685, section 4.1: the merged weight is W + B A (U1)"
SAVED = "PEFT, LoraConfig: modules_to_save are modules that are trained and saved as well (N10)"
BIAS = "loralib's README: with bias='all' lora_state_dict holds the biases, too (B5)"


def moved(implementation: Implementation, model: Model, spec: ModelSpec) -> Model:
    """What is loaded from a folder that has changed its place since it was written."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        model.save_own(Path(first))
        shutil.copytree(first, second, dirs_exist_ok=True)
        shutil.rmtree(first)
        Path(first).mkdir()
        return implementation.load_own(spec, Path(second))


@requirement(
    "OWNFILE-001",
    "An adapter that is saved and loaded in the library's own format gives the same output.",
    TRIP,
    "model write own_files",
    small,
    slow=2,
)
def ownfile_001(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    gives(check, moved(implementation, model, spec), spec, [states], "the output of the loaded model")


@requirement(
    "OWNFILE-002",
    "Saving in the library's own format changes nothing in the model.",
    TRIP,
    "model write own_files",
    small,
    slow=2,
)
def ownfile_002(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    fill(model, spec)
    y = model.forward(model_inputs(spec))
    with tempfile.TemporaryDirectory() as place:
        model.save_own(Path(place))
    check.equal(model.forward(model_inputs(spec)), y, "the output after saving")


@requirement(
    "OWNFILE-003",
    "A merged model that is saved and loaded in the library's own format gives the same output.",
    f"{TRIP}; {MERGED}",
    "model write merge own_files",
    small,
    slow=2,
)
def ownfile_003(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    model.merge()
    gives(check, moved(implementation, model, spec), spec, [states], "the output of the loaded model")


@requirement(
    "OWNFILE-004",
    "Biases that were trained with bias='all' are saved and loaded in the library's own format.",
    f"{TRIP}; {BIAS}",
    "model write bias own_files",
    lambda i: small(i, bias=st.just("all")),
    slow=2,
)
def ownfile_004(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    fill(model, spec)
    rng = np.random.default_rng([spec.seed, 23])
    for name, module in spec.modules.items():
        if module.b is not None:
            model.write_base(name, b=reals(rng, module.b.shape))
    y = model.forward(model_inputs(spec))
    check.equal(moved(implementation, model, spec).forward(model_inputs(spec)), y, "the output of the loaded model")


@requirement(
    "OWNFILE-005",
    "The copies of modules_to_save are saved and loaded in the library's own format.",
    f"{TRIP}; {SAVED}",
    "model write modules_to_save own_files",
    lambda i: small(i, target_modules=["proj", "up"], modules_to_save=st.sampled_from((["head"], ["norm", "head"]))),
    slow=2,
)
def ownfile_005(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    fill(model, spec)
    rng = np.random.default_rng([spec.seed, 29])
    for name in spec.config["modules_to_save"]:
        model.write_base(name, W=reals(rng, spec.modules[name].W.shape))
    y = model.forward(model_inputs(spec))
    check.equal(moved(implementation, model, spec).forward(model_inputs(spec)), y, "the output of the loaded model")


def scaled(implementation: Implementation) -> Any:
    """Options that change s of single modules, and of all."""
    return small(implementation, use_rslora=True, rank_pattern={"up": 4}, alpha_pattern={"head": 5})


@requirement(
    "OWNFILE-006",
    "Ranks, alphas and use_rslora act after loading in the library's own format, too.",
    f"{TRIP}; rsLoRA, arXiv 2312.03732, section 3 (S1, N8)",
    "model write patterns rslora own_files",
    scaled,
    slow=2,
)
def ownfile_006(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    gives(check, moved(implementation, model, spec), spec, [states], "the output of the loaded model")
