"""The inits that look at the weight, or at data: one paper, one function, one file.

Importing this enters them into the table of `lora_ref.core.inits`. To add one, write the function and enter it there.
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
    residual.check("mica", shape, r)  # any scaling will do: nothing is divided by it


METHODS.update(
    {
        "orthogonal": Method({"linear": orthogonal}, check=_check_orthogonal),
        "pissa": Method({"linear": pissa}, True, True, check=partial(residual.check, "pissa"), number="niter"),
        "olora": Method({"linear": olora}, True, True, check=partial(residual.check, "olora")),
        "loftq": Method({"linear": loftq}, True, True, check=partial(residual.check, "loftq"), options=_loftq_options),
        "corda": Method(
            {"linear": corda.corda}, True, True, check=partial(residual.check, "corda"), prepare="preprocess_corda"
        ),
        # until its pass over the data (`initialize_lora_eva_weights`) as True
        "eva": Method({"linear": uniform}),
        "mica": Method(
            {"linear": mica, "embedding": mica},
            reads_weight=True,
            train_B=False,
            check=_check_mica,
        ),
        "lora_ga": Method({"linear": lora_ga.lora_ga}, True, True, check=lora_ga.check, prepare="preprocess_loraga"),
    }
)
