"""The scaling s in W + s B A: alpha / r, or alpha / sqrt(r) (rsLoRA)."""

import math
import sys


def scaling(r: int, lora_alpha: float, use_rslora: bool = False) -> float:
    """s = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.

    A larger r lowers s. rsLoRA lowers it less: the size of the update, and of its gradients, does not depend on r.
    Raises: ValueError if r is not an int > 0, or lora_alpha is not a finite number.
    Source: LoRA, arXiv 2106.09685, section 4.1; rsLoRA, arXiv 2312.03732, section 3.

    >>> scaling(8, 16), scaling(16, 16), scaling(64, 16)
    (2.0, 1.0, 0.25)
    >>> scaling(16, 16, use_rslora=True), scaling(64, 16, use_rslora=True)
    (4.0, 2.0)
    """
    check_rank(r)
    check_alpha(lora_alpha)
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def check_rank(r: int, name: str = "r") -> None:
    """ValueError unless r is an int > 0, of a size that a float can hold."""
    if type(r) is bool or not isinstance(r, int) or not 0 < r < 2**53:
        raise ValueError(f"{name}={_shown(r)}: the rank must be an int > 0")


def check_alpha(lora_alpha: float, name: str = "lora_alpha") -> None:
    """ValueError unless lora_alpha is a finite real number."""
    is_number = isinstance(lora_alpha, (int, float)) and not isinstance(lora_alpha, bool)
    if not is_number or not abs(lora_alpha) <= sys.float_info.max:  # float() of a huge int overflows
        raise ValueError(f"{name}={_shown(lora_alpha)}: must be a finite number")


def check_scaling(s: float, largest: float) -> float:
    """s, or ValueError if numbers up to `largest` cannot be multiplied by 2 s: dropout scales up what it keeps."""
    if not abs(s) <= largest / 2:
        limit = f"numbers up to {largest:.2g} allow {largest / 2:.2g} at most"
        raise ValueError(f"the scaling is {s:g}: {limit}; lower lora_alpha or the factor")
    return s


def _shown(value: object) -> str:
    """repr, cut short. Python refuses to print an int of more than 4300 digits."""
    return "<an int of more than 80 digits>" if isinstance(value, int) and abs(value) > 10**80 else repr(value)[:80]
