"""The sequences of operations accuse no correct implementation, and say what is missing in words."""

from __future__ import annotations

import numpy as np
import pytest

from spec_tests.areas.machine import Expected, apply
from spec_tests.bugs import harmless
from spec_tests.check import Broken, Check
from spec_tests.contract import METHODS, Implementation, Layer, Model, ModelSpec, ModuleSpec
from spec_tests.engine import examine, load


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
@pytest.mark.parametrize("id", ["STATE-001", "STATE-003", "STATE-005"])
def test_an_unmerge_that_subtracts_is_accepted(id: str, seed: int | None) -> None:
    result = examine("variant", harmless.variant("unmerging subtracts"), load()[id], "default", seed)
    assert result.outcome == "PASS", result.message


def test_rounding_is_relative_to_the_largest_update_that_was_merged() -> None:
    W = np.float32([[1 / 3, -1 / 7], [0.6, 1 / 9]]).astype(float)
    spec = ModelSpec({"a": ModuleSpec("linear", W)}, {"r": 1, "lora_alpha": 1.0, "target_modules": ["a"]})
    implementation = harmless.variant("unmerging subtracts")
    model, check = implementation.model(spec), Check()
    now = Expected(spec, model)

    def write(factor: float) -> None:
        model.write("a", np.full((1, 2), factor), np.full((2, 1), factor))
        now.adapters["default"] = {"a": model.read("a")}

    write(64.0)
    for operation in (("merge",), ("unmerge",)):
        apply(operation, model, now, implementation, check)
        now.check(model, check, operation[0])
    W_now = model.base()["a"][0]
    assert (abs(W_now - W) > 24 * 2.0**-24 * abs(W)).any()  # more than is allowed relative to W alone
    write(0.0)
    now.check(model, check, "smaller factors")


@pytest.mark.parametrize("owner", [Layer, Model, Implementation])
def test_a_method_that_is_not_written_says_its_name_and_its_claim(owner: type) -> None:
    for claim, methods in METHODS.items():
        for method in (name for name in methods if name.startswith(f"{owner.__name__}.")):
            function = getattr(owner, method.split(".")[1])
            arguments = [None] * (function.__code__.co_argcount - 1)
            with pytest.raises(NotImplementedError, match=f"{method} is not there: leave .*`{claim}`"):
                function(owner(), *arguments)


def test_the_difference_of_two_sets_is_named() -> None:
    check = Check()
    check.same_set({"a", "b"}, ["b", "a"], "the names")
    check.equal(["a", "b"], ["a", "b"], "the names")
    with pytest.raises(Broken, match=r"^the names: missing: c; too many: a$"):
        check.equal(["a", "b"], ["b", "c"], "the names")
    with pytest.raises(Broken, match=r"^dL/dA: there is none$"):
        check.present(None, "dL/dA")
    with pytest.raises(Broken, match="has the shape"):
        check.equal(["a", "a"], ["a"], "a name that is there twice")
