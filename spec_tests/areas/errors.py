"""What a configuration must not say: refused when it is made or used, instead of computing something else."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from ..check import Check
from ..contract import Implementation, ModelSpec
from ..registry import requirement
from .operations import small


def _refused(id: str, what: str, source: str, options: Any, needs: str = "", **fixed: Any) -> None:
    """options: a list of values for configurations that must be refused."""

    @requirement(
        id,
        f"{what} is refused.",
        source,
        f"model errors {needs}",
        lambda i: st.tuples(small(i, **fixed), st.sampled_from(options)),
        slow=2,
    )
    def body(implementation: Implementation, case: tuple[ModelSpec, dict[str, Any]], check: Check) -> None:
        spec = case[0].but(**case[1])
        check.refused(lambda: implementation.model(spec), f"{case[1]}")


DOC = "PEFT's documentation of "
EFFECT = "lora_ref's decision: what has no effect is refused"
STRICT = "lora_ref's decision: values that no formula can use are refused"
_refused("ERROR-001", "A rank of 0 or less", DOC + "r: a positive rank (D8)", [{"r": 0}, {"r": -1}])
_refused(
    "ERROR-002",
    "A rank of 0 or less for one module",
    "D8, N8",
    [{"rank_pattern": {"up": 0}}, {"rank_pattern": {"up": -2}}],
    "patterns",
)
_refused(
    "ERROR-003",
    "A dropout probability outside of [0, 1]",
    DOC + "lora_dropout: a probability (P4)",
    [{"lora_dropout": -0.1}, {"lora_dropout": 1.5}],
    "dropout",
)
_refused(
    "ERROR-004",
    "A bias mode that does not exist",
    DOC + "bias: none, all or lora_only (B7)",
    [{"bias": "some"}, {"bias": "lora"}],
    "bias",
)
_refused(
    "ERROR-005",
    "An initialisation that does not exist",
    DOC + "init_lora_weights (I5)",
    [{"init_lora_weights": "xavier"}, {"init_lora_weights": "pissa_niter_many"}],
)
_refused(
    "ERROR-006",
    "An odd rank for the orthogonal start",
    "G1",
    [{"r": 1}, {"r": 3}],
    "init:orthogonal",
    init_lora_weights="orthogonal",
)
_refused(
    "ERROR-007",
    "layers_pattern without layers_to_transform",
    EFFECT + " (N7)",
    [{"layers_pattern": ["layers"]}],
    "layers_to_transform decision:no_effect",
)
_refused(
    "ERROR-008",
    "layers_to_transform with a string for target_modules",
    DOC + "layers_to_transform (N7)",
    [{"target_modules": ".*proj", "layers_to_transform": [0]}],
    "layers_to_transform targets:regex",
)
_refused(
    "ERROR-009",
    "No target at all",
    EFFECT + " (N5)",
    [{"target_modules": []}, {"target_modules": ""}],
    "targets:regex decision:no_effect",
)
_refused(
    "ERROR-010",
    "A target that no module has",
    EFFECT + " (N9)",
    [{"target_modules": ["nothing"]}, {"target_modules": "nothing.*"}],
    "targets:regex decision:no_effect",
)
_refused(
    "ERROR-011", "A module of a type that cannot be adapted, as the only target", "N9", [{"target_modules": ["norm"]}]
)
_refused(
    "ERROR-012",
    "A lora_alpha that is no finite number",
    STRICT + " (S3)",
    [{"lora_alpha": math.nan}, {"lora_alpha": math.inf}],
    "strict_errors",
)
_refused(
    "ERROR-013",
    "A dropout probability that is no number",
    STRICT + " (P4)",
    [{"lora_dropout": math.nan}],
    "dropout strict_errors",
)
_refused("ERROR-014", "A rank that is no integer", STRICT + " (D8)", [{"r": 1.5}, {"r": "2"}], "strict_errors")
_refused(
    "ERROR-015",
    "A lora_alpha of a pattern that is no finite number",
    STRICT + " (N8)",
    [{"alpha_pattern": {"up": math.nan}}],
    "patterns strict_errors",
)
_refused("ERROR-016", "LoftQ without its configuration", "L5", [{"init_lora_weights": "loftq"}], "init:loftq")
_refused(
    "ERROR-017",
    "A rho below 1 or a tau outside of [0, 1]",
    "PEFT's documentation of EvaConfig (E9)",
    [{"eva_config": {"rho": 0.5}}, {"eva_config": {"tau": 1.5}}, {"eva_config": {"tau": -0.1}}],
    "init:eva",
    init_lora_weights="eva",
    target_modules=["proj", "up"],
)
_refused(
    "ERROR-018",
    "All targets excluded",
    EFFECT + " (N9)",
    [{"exclude_modules": ["proj", "up", "head", "emb"]}],
    "exclude decision:no_effect",
)
