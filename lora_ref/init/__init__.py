"""The inits that read the weight's numbers, or data: one function for each paper.

The import of this package adds them to `METHODS` of `lora_ref.core.inits`. A new init is a function and an entry there.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from ..core.inits import METHODS, Method, find, method_of, uniform
from ..core.update import Factors
from . import corda, lora_ga
from .decompositions import check_even, check_thin, loftq, mica, olora, orthogonal, pissa
from .options import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from .residual import check_shape

__all__ = ["METHODS", "Method", "find", "method_of"]


def _changes_base(name: str, function: Callable[..., Factors], check: Any = None, **others: Any) -> Method:
    check = check or partial(check_shape, name)
    return Method({"linear": function}, changes_base=True, reads_weight=True, check=check, **others)


# mica does not divide by the scaling; `initialize_lora_eva_weights` sets A of eva later
METHODS["orthogonal"] = Method({"linear": orthogonal}, check=lambda shape, r, scaling: check_even(r))
METHODS["pissa"] = _changes_base("pissa", pissa, number="niter")
METHODS["olora"] = _changes_base("olora", olora)
METHODS["loftq"] = _changes_base("loftq", loftq, config=LoftQConfig, options=LoftQConfig.keywords)
METHODS["corda"] = _changes_base("corda", corda.corda, prepare="preprocess_corda", config=CordaConfig)
METHODS["eva"] = Method({"linear": uniform}, config=EvaConfig)
METHODS["mica"] = Method({"linear": mica, "embedding": mica}, reads_weight=True, train_B=False, check=check_thin)
_ga = {"prepare": "preprocess_loraga", "config": LoraGAConfig}
METHODS["lora_ga"] = _changes_base("lora_ga", lora_ga.lora_ga, lora_ga.check_lora_ga, **_ga)
