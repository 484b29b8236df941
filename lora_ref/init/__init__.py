"""The inits that read the weight's numbers, or data: one paper, one function, one file.

The import of this package adds them to `METHODS` of `lora_ref.core.inits`. A new init is a function and an entry there.
"""

from functools import partial
from typing import Any

from ..core.inits import METHODS, Method, find, method_of, uniform
from . import corda, lora_ga
from .loftq import loftq
from .mica import mica
from .olora import olora
from .options import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from .orthogonal import check_even, orthogonal
from .pissa import pissa
from .residual import check_shape

__all__ = ["METHODS", "Method", "check", "find", "method_of"]


def check(init_lora_weights: bool | str, shape: tuple[int, ...], r: int, scaling: float) -> None:
    """Raise ValueError unless the method can start a layer of this shape with this rank and scaling."""
    method = METHODS[method_of(init_lora_weights)]
    if method.check:
        method.check(shape, r, scaling)


def _loftq_options(config: LoftQConfig) -> dict[str, Any]:
    return {"bits": config.loftq_bits, "iterations": config.loftq_iter}


def _check_orthogonal(shape: tuple[int, ...], r: int, scaling: float) -> None:
    check_even(r)


def _check_mica(shape: tuple[int, ...], r: int, scaling: float) -> None:
    check_shape("mica", shape, r)  # it does not divide by the scaling


CHANGES: Any = {"changes_base": True, "reads_weight": True}
METHODS.update(
    {
        "orthogonal": Method({"linear": orthogonal}, check=_check_orthogonal),
        "pissa": Method({"linear": pissa}, **CHANGES, check=partial(check_shape, "pissa"), number="niter"),
        "olora": Method({"linear": olora}, **CHANGES, check=partial(check_shape, "olora")),
        "loftq": Method(
            {"linear": loftq},
            **CHANGES,
            check=partial(check_shape, "loftq"),
            config=LoftQConfig,
            options=_loftq_options,
        ),
        "corda": Method(
            {"linear": corda.corda},
            **CHANGES,
            check=partial(check_shape, "corda"),
            prepare="preprocess_corda",
            config=CordaConfig,
        ),
        # `initialize_lora_eva_weights` sets A later
        "eva": Method({"linear": uniform}, config=EvaConfig),
        "mica": Method({"linear": mica, "embedding": mica}, reads_weight=True, train_B=False, check=_check_mica),
        "lora_ga": Method(
            {"linear": lora_ga.lora_ga},
            **CHANGES,
            check=lora_ga.check_lora_ga,
            prepare="preprocess_loraga",
            config=LoraGAConfig,
        ),
    }
)
