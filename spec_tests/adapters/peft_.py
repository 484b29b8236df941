"""Hugging Face PEFT, any release: what a release has no option or class for is not claimed.

Some releases import from torchao what it does not have any more: for these there is no torchao, whose quantised
weights no requirement uses.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import peft
from torch import nn

from .. import promises
from ..contract import LayerSpec
from .peft_style import PeftStyle, PeftStyleModel, configuration, to_torch

RELEASE = tuple(int(part) for part in peft.__version__.split(".")[:2])
if (0, 13) < RELEASE < (0, 19):  # they import from torchao what it does not have any more
    importlib.import_module("peft.tuners.lora.torchao").is_torchao_available = lambda: False  # type: ignore[attr-defined]

OPTION_OF = {
    "rslora": "use_rslora",
    "patterns": "rank_pattern",
    "exclude": "exclude_modules",
    "parameter": "target_parameters",
    "experts": "target_parameters",
    "target_parameters": "target_parameters",
    "layers_to_transform": "layers_to_transform",
    "init:corda": "corda_config",
    "init:eva": "eva_config",
    "eva_ranks": "eva_config",
    "init:lora_ga": "lora_ga_config",
}  # claim: the option of LoraConfig that it needs
CLASS_OF = {"conv1d": "Conv1d", "conv2d": "Conv2d", "conv3d": "Conv3d", "embedding": "Embedding"}
CLASS_OF |= {f"update:{kind}": name for kind, name in CLASS_OF.items() if kind != "embedding"}
SINCE = {
    "delete": (0, 4),
    "unload": (0, 4),
    "files": (0, 4),  # before, they are no safetensors
    "reads_peft": (0, 4),
    "weighted": (0, 5),  # before, without "cat"
    "rescale": (0, 6),
    "summed": (0, 7),  # set_adapter and merge_adapter take several names
    "init:gaussian": (0, 6),
    "all-linear": (0, 7),
    "init:pissa": (0, 11),
    "init:pissa_niter": (0, 11),
    "init:olora": (0, 12),
    "batch": (0, 11),
    "init:orthogonal": (0, 17),
    "init:mica": (0, 20),
    "experts": (0, 20),  # before, a stack of weights is read as (experts, in, out)
    "converts": (0, 12),
}  # claim: the release whose notes announce it


def claims_of_this_release() -> frozenset[str]:
    """What the documentation promises, without what this release does not have yet."""
    options = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    missing = {claim for claim, option in OPTION_OF.items() if option not in options}
    layers = getattr(peft.tuners.lora, "layer", peft.tuners.lora)  # one module in early releases
    missing |= {claim for claim, name in CLASS_OF.items() if not hasattr(layers, name)}
    missing |= {claim for claim, first in SINCE.items() if first > RELEASE}
    if not hasattr(getattr(peft, "helpers", None), "rescale_adapter_scale"):
        missing.add("scale_context")
    return promises.claims("peft") - missing


class PeftModel(PeftStyleModel):
    looking: ClassVar[dict[str, Any]] = {
        "forward_fn": lambda net, batch: net(batch),
        "prepare_model_inputs_fn": None,
        "prepare_layer_inputs_fn": lambda x, *_: (x[0] if isinstance(x, tuple) else x).flatten(0, -2),
        "show_progress_bar": False,
    }

    def adapted_net(self, folder: Path | None) -> Any:
        if RELEASE < (0, 4):  # it asks every model for its configuration, as transformers' have one
            self.net.config = {"model_type": "custom"}
        return super().adapted_net(folder)

    def config(self, options: Mapping[str, Any]) -> Any:
        old = {"lora_dropout": 0.0} if RELEASE < (0, 4) else {}  # its default is None, which its layers cannot take
        return super().config(old | dict(options))

    def active(self) -> list[str]:
        return super().active() if hasattr(self.peft, "active_adapters") else [self.peft.active_adapter]

    def save(self, folder: Path, **options: Any) -> None:
        kept = {"safe_serialization": True} if (0, 4) <= RELEASE < (0, 7) else {}  # its default was pickle
        super().save(folder, **(kept | options))

    def save_start(self, folder: Path) -> None:
        """As the README of PEFT's PiSSA example has it: the start is saved as that of an ordinary adapter."""
        config = self.peft.peft_config["default"]
        init, config.init_lora_weights = config.init_lora_weights, True
        self.save(folder)
        config.init_lora_weights = init

    def save_converted(self, folder: Path, start: Path) -> None:
        self.save(folder, path_initial_model_for_weight_conversion=str(start))


class Peft(PeftStyle):
    """Claims what its documentation does."""

    name = "peft"
    library = peft
    model_class = PeftModel
    claims = claims_of_this_release()

    def layer_options(self, spec: LayerSpec) -> dict[str, Any]:
        if spec.init_lora_weights == "lora_ga":
            options = {name: spec.init_options[name] for name in ("direction",) if name in spec.init_options}
            return {"lora_ga_config": peft.tuners.lora.config.LoraGAConfig(**options)}
        return super().layer_options(spec)

    def prepare(self, net: nn.Module, config: dict[str, Any], spec: LayerSpec) -> None:
        if spec.init_lora_weights == "corda":
            from peft.tuners.lora.corda import preprocess_corda

            data = [to_torch(X, spec.dtype) for X in spec.init_options["inputs"]]
            preprocess_corda(net, configuration(peft, config), run_model=lambda: [net(x) for x in data])
        if spec.init_lora_weights == "lora_ga":
            from peft.tuners.lora.loraga import preprocess_loraga

            x, dy = (to_torch(spec.init_options[name], spec.dtype) for name in ("x", "dy"))
            preprocess_loraga(net, configuration(peft, config), lambda: (net(x) * dy).sum().backward())

    def after(self, model: PeftStyleModel, spec: LayerSpec) -> None:
        data = [{"x": to_torch(X, spec.dtype)} for X in spec.init_options["inputs"]]
        peft.initialize_lora_eva_weights(
            model.peft,
            data,
            forward_fn=lambda net, batch: net(**batch),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=lambda x, *_: (x[0] if isinstance(x, tuple) else x).reshape(-1, spec.W.shape[1]),
            show_progress_bar=False,
        )
