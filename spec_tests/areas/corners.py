"""What lies between two features: layers that nobody calls, a flag that does not fit, odd names, exact keys."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from .. import folder as folders
from ..check import Check
from ..contract import Implementation, LayerSpec, Model, ModelSpec, ModuleSpec
from ..generate import layers, reals, seeds
from ..registry import requirement
from . import biases, saved_modules
from .operations import fill, gives, holds, small

SPELLINGS = {"gaussian": "Gaussian", "orthogonal": "Orthogonal", "pissa": "PiSSA", "olora": "OLoRA", "mica": "MiCA"}


@requirement(
    "INIT-023",
    "A start whose name is written in other letters is refused or is that start, never silently another one.",
    "PEFT's documentation of init_lora_weights names the starts (I7)",
    "linear init:gaussian",
    lambda i: st.tuples(
        layers(i, ("linear",), r=2, lora_alpha=4.0, W=np.arange(1.0, 33.0).reshape(4, 8) ** 0.5, b=None),
        st.sampled_from([name for name in SPELLINGS if f"init:{name}" in i.claims]),
    ),
)
def init_023(implementation: Implementation, case: tuple[LayerSpec, str], check: Check) -> None:
    spec, init = case
    want = implementation.layer(spec.but(init_lora_weights=init)).read()
    try:
        got = implementation.layer(spec.but(init_lora_weights=SPELLINGS[init])).read()
    except Exception:
        return  # refused, which the sentence allows
    for letter in "WAB":
        check.equal(getattr(got, letter), getattr(want, letter), f"{letter} of {SPELLINGS[init]!r}")


@requirement(
    "MODEL-017",
    "fan_in_fan_out that does not fit the storage of a layer is refused or corrected: the output is right, merged too.",
    "PEFT's documentation of fan_in_fan_out: whether the layer stores (in, out) (F2)",
    "model linear transposed merge write",
    lambda i: small(i, fan_in_fan_out=st.booleans()),
    slow=2,
)
def model_017(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    try:
        model = implementation.model(spec)
    except Exception:
        return
    states = fill(model, spec)
    gives(check, model, spec, [states], "the output")
    model.merge()
    holds(check, model.base(), spec, [states], "the merged model")


@st.composite
def attentions(draw: Any, implementation: Implementation) -> ModelSpec:
    """A linear layer, and an attention whose out_proj is targeted."""
    rng = np.random.default_rng(draw(seeds))
    modules = {
        "first": ModuleSpec("linear", reals(rng, (4, 4)), reals(rng, (4,))),
        "block.attn.out_proj": ModuleSpec("attention", reals(rng, (4, 4)), reals(rng, (4,))),
    }
    targets = draw(st.sampled_from((["out_proj"], ["first", "out_proj"], ".*out_proj")))
    config = {"r": draw(st.sampled_from((1, 2))), "lora_alpha": 4, "target_modules": targets}
    return ModelSpec(modules, config, seed=draw(seeds))


@requirement(
    "TARGET-025",
    "A layer whose parent reads its weight without calling it, as an attention's out_proj, is refused, or its adapter "
    "acts.",
    "PEFT's documentation of target_modules: modules that are named get an adapter (D6, D1)",
    "model linear attention merge write targets:regex",
    attentions,
    slow=2,
)
def target_025(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    try:
        model = implementation.model(spec)
    except Exception:
        return
    states = fill(model, spec)
    check.that("block.attn.out_proj" in states, "the target has been left out without an error")
    gives(check, model, spec, [states], "the output")
    model.merge()
    gives(check, model, spec, [states], "the output of the merged model")


@requirement(
    "ADAPTER-022",
    "An adapter whose name has a dot, or is empty, is refused, or works as any other.",
    "PEFT's documentation of add_adapter: adapters have names (X10)",
    "model adapters write",
    lambda i: st.tuples(small(i), st.sampled_from(("", "v1.0", ".", "a.proj"))),
    slow=2,
)
def adapter_022(implementation: Implementation, case: tuple[ModelSpec, str], check: Check) -> None:
    spec, name = case
    model = implementation.model(spec)
    first = fill(model, spec)
    try:
        model.add(name, spec.config)
        model.set([name])
        states = fill(model, spec, name, salt=1)
    except Exception:
        states = first  # refused, and so the model is as before
    gives(check, model, spec, [states], f"the output after adding {name!r}")


def keys_of(model: Model) -> list[str]:
    """The keys of the file that `save` writes, without their prefix, sorted."""
    with tempfile.TemporaryDirectory() as place:
        model.save(Path(place))
        return sorted(key.removeprefix(folders.PREFIX) for key in folders.read(Path(place))[1])


@requirement(
    "FILE-030",
    "The biases that a mode trains are under the keys of the format: <module>.base_layer.bias of an adapted module, "
    "<module>.bias of another.",
    "PEFT's documentation of its checkpoint format (X4)",
    "model linear bias files",
    lambda i: biases.small(i, bias=biases.MODES),
    slow=2,
)
def file_030(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    adapted, found = model.adapted(), keys_of(model)
    want = [
        f"{name}.base_layer.bias" if name in adapted else f"{name}.bias"
        for name, module in spec.modules.items()
        if module.b is not None and (spec.config["bias"] == "all" or name in adapted)
    ]
    check.equal(sorted(key for key in found if key.endswith("bias")), sorted(want), "the keys of biases")


@requirement(
    "FILE-031",
    "A copy of modules_to_save is under <module>.<parameter>, as the base model names it.",
    "PEFT's documentation of its checkpoint format (X5)",
    "model modules_to_save files",
    saved_modules.saving,
    slow=2,
)
def file_031(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    check.equal([key for key in keys_of(model) if key.startswith("head.")], ["head.bias", "head.weight"], "its keys")
