"""The groups of options that some inits have: `EvaConfig`, `LoftQConfig`, `CordaConfig`, `LoraGAConfig`."""

import dataclasses
import math

from ..core.config import require
from ..safe.strict import Strict
from .lora_ga import DIRECTIONS, SCALES


def is_number(x: object) -> bool:
    """A finite int or float; True and False are no numbers."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < math.inf


@dataclasses.dataclass
class EvaConfig(Strict):
    """Options of `init_lora_weights="eva"`. Source: arXiv 2410.07170.

    rho >= 1: a layer's rank may grow to round(r * rho). 0 <= tau <= 1: the cosine between successive
    components above which they count as converged.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        require(is_number(self.rho) and self.rho >= 1, "rho", self.rho, "a number >= 1")
        require(is_number(self.tau) and 0 <= self.tau <= 1, "tau", self.tau, "a number in [0, 1]")
        require(type(self.label_mask_value) is int, "label_mask_value", self.label_mask_value, "an int")
        for name in ("use_label_mask", "whiten", "adjust_scaling_factors"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")


@dataclasses.dataclass
class LoftQConfig(Strict):
    """Options of `init_lora_weights="loftq"`. Source: arXiv 2310.08659."""

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        bits, steps = self.loftq_bits, self.loftq_iter
        require(type(bits) is int and bits in (2, 4, 8), "loftq_bits", bits, "2, 4 or 8")
        require(type(steps) is int and steps > 0, "loftq_iter", steps, "an int > 0")

    def keywords(self) -> dict[str, int]:
        return {"bits": self.loftq_bits, "iterations": self.loftq_iter}


@dataclasses.dataclass
class CordaConfig(Strict):
    """Options of `init_lora_weights="corda"`: "ipm" learns the task, "kpm" keeps world knowledge.

    Source: arXiv 2406.05223.
    """

    corda_method: str = "ipm"

    def __post_init__(self) -> None:
        require(self.corda_method in ("ipm", "kpm"), "corda_method", self.corda_method, "'ipm' or 'kpm'")


@dataclasses.dataclass
class LoraGAConfig(Strict):
    """Options of `init_lora_weights="lora_ga"`: which singular directions of the gradient A and B get, how long.

    Source: arXiv 2407.05000.
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: float = 16

    def __post_init__(self) -> None:
        require(self.direction in DIRECTIONS, "direction", self.direction, f"one of {', '.join(DIRECTIONS)}")
        require(self.scale in SCALES, "scale", self.scale, f"one of {', '.join(SCALES)}")
        gamma = self.stable_gamma
        require(is_number(gamma) and gamma > 0, "stable_gamma", gamma, "a number > 0")
