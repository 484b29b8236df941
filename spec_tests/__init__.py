"""spec_tests: a conformance suite for LoRA. Give it an adapter class; it says which requirements hold.

    lora-ref check peft                                   from the command line
    pytest --pyargs spec_tests --lora-impl pkg.mod:Class  as tests
    install(globals(), MyAdapter)                         in a test module of your own

It needs NumPy, SciPy, Hypothesis and pytest, and no framework.
"""

from numpy import array

from .contract import CLAIMS, CONVENTIONS, Implementation, Layer, LayerSpec, LayerState, Model, ModelSpec, ModuleSpec
from .engine import Result, examine, find, reproduce, run
from .installation import install
from .registry import load
from .rounding import agree, close, distance

__all__ = [
    "CLAIMS",
    "CONVENTIONS",
    "Implementation",
    "Layer",
    "LayerSpec",
    "LayerState",
    "Model",
    "ModelSpec",
    "ModuleSpec",
    "Result",
    "agree",
    "array",
    "close",
    "distance",
    "examine",
    "find",
    "install",
    "load",
    "reproduce",
    "run",
]
