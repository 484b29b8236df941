"""The inits that read the weight's numbers, or data: one paper, one function, one file.

The import of this package adds them to `METHODS` of `lora_ref.core.inits`. A new init is a function and an entry there.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from ..core.inits import METHODS, Method, find, method_of, uniform
from ..core.update import Factors
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


def _changes_base(name: str, function: Callable[..., Factors], check: Any = None, **others: Any) -> Method:
    check = check or partial(check_shape, name)
    return Method({"linear": function}, changes_base=True, reads_weight=True, check=check, **others)


def _loftq_options(config: LoftQConfig) -> dict[str, Any]:
    return {"bits": config.loftq_bits, "iterations": config.loftq_iter}


# mica does not divide by the scaling; `initialize_lora_eva_weights` sets A of eva later
METHODS["orthogonal"] = Method({"linear": orthogonal}, check=lambda shape, r, scaling: check_even(r))
METHODS["pissa"] = _changes_base("pissa", pissa, number="niter")
METHODS["olora"] = _changes_base("olora", olora)
METHODS["loftq"] = _changes_base("loftq", loftq, config=LoftQConfig, options=_loftq_options)
METHODS["corda"] = _changes_base("corda", corda.corda, prepare="preprocess_corda", config=CordaConfig)
METHODS["eva"] = Method({"linear": uniform}, config=EvaConfig)
METHODS["mica"] = Method(
    {"linear": mica, "embedding": mica},
    reads_weight=True,
    train_B=False,
    check=lambda shape, r, scaling: check_shape("mica", shape, r),
)
METHODS["lora_ga"] = _changes_base(
    "lora_ga", lora_ga.lora_ga, lora_ga.check_lora_ga, prepare="preprocess_loraga", config=LoraGAConfig
)
