"""The inits that read the weight's numbers, or data: one paper, one function, one file.

The import of this package adds them to `METHODS` of `lora_ref.core.inits`. A new init is a function and an entry there.
"""

from functools import partial
from typing import Any

from ..core.inits import METHODS, Method, check, find, method_of, uniform
from . import corda, lora_ga, residual
from .loftq import loftq
from .mica import mica
from .olora import olora
from .orthogonal import check_even, orthogonal
from .pissa import pissa

__all__ = ["METHODS", "Method", "check", "find", "method_of"]


def _loftq_options(config: Any) -> dict[str, Any]:
    chosen = config.loftq_config
    return {"bits": chosen.loftq_bits, "iterations": chosen.loftq_iter} if chosen else {}


def _check_orthogonal(shape: tuple[int, ...], r: int, scaling: float) -> None:
    check_even(r)


def _check_mica(shape: tuple[int, ...], r: int, scaling: float) -> None:
    residual.check_shape("mica", shape, r)  # it does not divide by the scaling


METHODS.update(
    {
        "orthogonal": Method({"linear": orthogonal}, check=_check_orthogonal),
        "pissa": Method({"linear": pissa}, True, True, check=partial(residual.check_shape, "pissa"), number="niter"),
        "olora": Method({"linear": olora}, True, True, check=partial(residual.check_shape, "olora")),
        "loftq": Method(
            {"linear": loftq}, True, True, check=partial(residual.check_shape, "loftq"), options=_loftq_options
        ),
        "corda": Method(
            {"linear": corda.corda},
            True,
            True,
            check=partial(residual.check_shape, "corda"),
            prepare="preprocess_corda",
        ),
        # `initialize_lora_eva_weights` sets A later
        "eva": Method({"linear": uniform}),
        "mica": Method(
            {"linear": mica, "embedding": mica},
            reads_weight=True,
            train_B=False,
            check=_check_mica,
        ),
        "lora_ga": Method(
            {"linear": lora_ga.lora_ga}, True, True, check=lora_ga.check_lora_ga, prepare="preprocess_loraga"
        ),
    }
)
