"""A requirement needs the claims of every method and option that its body uses.

The NumPy reference is tried with the claims of one requirement alone. What it does not claim raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

import spec_tests
from spec_tests.contract import CLAIMS, Implementation, LayerSpec, ModelSpec
from spec_tests.engine import examine
from spec_tests.reference.plain import Plain

REQUIREMENTS = spec_tests.load()
#: {method: its claims, from its arguments}.
BOTH: dict[str, Callable[..., set[str]]] = {
    "write": lambda *_, **__: {"write"},
    "trainable": lambda *_, **__: {"trainable"},
    "merge": lambda *_, safe=False, **__: {"merge"} | ({"safe_merge"} if safe else set()),
    "unmerge": lambda: {"unmerge"},
    "enable": lambda _: {"disable"},
}
OF_LAYERS = BOTH | {
    "grad": lambda *_, **__: {"grad"},
    "rescale": lambda *_: {"rescale"},
    "merged_copy": lambda: {"merged_copy"},
    "update": lambda: {"update"},
    "forward": lambda x, *_, **__: {"unbatched"} if np.ndim(x) == 1 and np.asarray(x).dtype.kind == "f" else set(),
}
OF_MODELS = BOTH | {
    "forward": lambda _, train=False, adapter_names=None, **__: (
        (set() if adapter_names is None else {"batch"}) | (set() if train is not None else {"modes"})
    ),
    "train": lambda _: {"modes"},
    "training": lambda: {"modes"},
    "rescale": lambda *_: {"model:rescale"},
    "disabled": lambda: {"disable_context"},
    "scaled": lambda _: {"scale_context"},
    "add": lambda _, config: {"adapters"} | options(config),
    "set": lambda names: {"summed" if len(names) > 1 else "adapters"},
    "delete": lambda _: {"delete"},
    "combine": lambda *_: {"weighted"},
    "look": lambda _: {"eva_ranks"},
    "unload": lambda merge: {"unload"},  # "gives the plain model back, merged or not"
    "save": lambda *_, **__: {"files"},
    "save_own": lambda _: {"own_files"},
    "save_converted": lambda *_: {"converts"},
    "grad": lambda *_, **__: {"model_grad"},
    "load": lambda *_: {"files", "adapters"},
}
OPTIONS = {
    "use_rslora": "rslora",
    "lora_dropout": "dropout",
    "rank_pattern": "patterns",
    "alpha_pattern": "patterns",
    "exclude_modules": "exclude",
    "layers_to_transform": "layers_to_transform",
    "modules_to_save": "modules_to_save",
    "target_parameters": "target_parameters",
}
OPERATIONS = (
    {"write", "trainable", "merge", "safe_merge", "unmerge", "merged_copy", "disable", "grad", "rescale", "unbatched"}
    | {"adapters", "summed", "delete", "weighted", "batch", "eva_ranks", "unload", "files", "bias", "alpha"}
    | {"targets:regex", "all-linear", "modes", "disable_context", "scale_context", *OPTIONS.values()}
    | {"reads_peft", "own_files", "converts", "model_grad", "update", "model:rescale"}
    | {claim for claim in CLAIMS if claim.startswith("init:")}
)


def start(init: bool | str) -> set[str]:
    """What a start needs; the default one is what every library has."""
    name = re.sub(r"^pissa_niter_\d+$", "pissa_niter", str(init).lower())
    return set() if init is True else {f"init:{'False' if init is False else name}"} & CLAIMS.keys()


def options(config: Mapping[str, Any]) -> set[str]:
    """What is given needs its claim even where it has the default: a library may not know its name."""
    found = {claim for name, claim in OPTIONS.items() if name in config} | start(config.get("init_lora_weights", True))
    if isinstance(target := config.get("target_modules"), str):
        found.add("all-linear" if target.lower() == "all-linear" else "targets:regex")
    return found | ({"bias"} if config.get("bias", "none") != "none" else set())


class Undeclared(BaseException):
    """No Exception, so that no body takes it for a refusal."""


class Watched:
    """A handle that raises where what is called is not claimed."""

    def __init__(self, handle: Any, methods: Mapping[str, Callable[..., set[str]]], claims: frozenset[str]) -> None:
        self.handle, self.methods, self.claims = handle, methods, claims

    def __getattr__(self, name: str) -> Any:
        value, needed = getattr(self.handle, name), self.methods.get(name)
        if needed is None:
            return value

        def call(*args: Any, **named: Any) -> Any:
            declared(needed(*args, **named), self.claims, name)
            return value(*args, **named)

        return call


def declared(used: set[str], claims: frozenset[str], where: str) -> None:
    if missing := used - claims:
        raise Undeclared(f"{where} needs {', '.join(sorted(missing))}")


class Narrow(Plain):
    """The reference with the claims of one requirement, and with what is no operation and no option."""

    def __init__(self, needs: frozenset[str]) -> None:
        self.claims = (frozenset(CLAIMS) - OPERATIONS) | needs

    def layer(self, spec: LayerSpec) -> Any:
        odd = spec.lora_alpha <= 0 or spec.lora_alpha != int(spec.lora_alpha)
        options = {"rslora": spec.use_rslora, "dropout": spec.lora_dropout > 0, "alpha": odd}
        used = {claim for claim, on in options.items() if on} | start(spec.init_lora_weights)
        declared(used, self.claims, "the layer")
        return Watched(super().layer(spec), OF_LAYERS, self.claims)

    def model(self, spec: ModelSpec) -> Any:
        declared(options(spec.config), self.claims, "the configuration")
        return Watched(super().model(spec), OF_MODELS, self.claims)

    def load(self, spec: ModelSpec, folder: Any) -> Any:
        declared({"reads_peft"} if "reads_peft" in self.claims else {"files"}, self.claims, "load")
        return Watched(super().load(spec, folder), OF_MODELS, self.claims)

    def load_own(self, spec: ModelSpec, folder: Any) -> Any:
        declared({"own_files"}, self.claims, "load_own")
        return Watched(Plain().load_own(spec, folder), OF_MODELS, self.claims)


@pytest.mark.parametrize(
    "id", [pytest.param(id, marks=[pytest.mark.deep] * (number % 8 > 0)) for number, id in enumerate(REQUIREMENTS)]
)
def test_a_requirement_needs_what_its_body_uses(id: str) -> None:
    requirement = REQUIREMENTS[id]
    narrow: Implementation = Narrow(requirement.needs)
    result = examine("plain", narrow, requirement, "quick", shrink=False)
    assert result.outcome == "PASS", result.message
