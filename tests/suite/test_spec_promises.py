"""A column claims what its library's documentation promises, with the sentence that does."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import ClassVar

import pytest

from spec_tests import promises
from spec_tests.adapters.loralib_ import Loralib
from spec_tests.contract import CLAIMS, DECISIONS, Layer, LayerSpec
from spec_tests.engine import BUNDLED, HERE, find, run
from spec_tests.reference.plain import Plain

OWN = ("lora_ref", "lora_ref_core", "lora_ref_numpy", "plain", "parametrized", "javascript")
LIBRARIES = sorted(BUNDLED.keys() - set(OWN))
#: Read from peft.toml: {claim: why it is not promised}.
NOT_OF_PEFT = {
    "init:loftq": "it needs CUDA and bitsandbytes",
    "merged_copy": "it merges in place",
    "model:rescale": "LoraLayer.set_scale is about one layer",
    "bias:every": "its documentation says the corresponding biases, and not which",
    "model:held_twice": "its documentation does not say which of two names of a module gets the adapter",
    "model:tied": "its warning says that merging the adapters of tied modules can have complications",
    "fused": "it has no layer of which parts are adapted",
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_each_claim_of_a_column_has_its_sentence(name: str) -> None:
    made = promises.promised(name)
    assert made
    for promise in made:
        assert promise.link.startswith("https://") and 5 < len(promise.document) < 120, promise
        assert 5 < len(promise.sentence) < 130 and promise.claim not in DECISIONS, promise


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_adapter_class_reads_its_claims_from_there(name: str) -> None:
    """In the source: not every library is installed."""
    path = HERE.parent / (BUNDLED[name].partition(":")[0].replace(".", "/") + ".py")
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    read = [ast.unparse(call) for call in calls if ast.unparse(call.func) in ("claims", "promises.claims")]
    assert read == [f"{ast.unparse(ast.parse(read[0], mode='eval').body.func)}({name!r})"]


@pytest.mark.parametrize("name", ["peft", "loralib"])
def test_the_columns_that_are_installed_claim_no_more(name: str) -> None:
    assert find(name)[1].claims <= promises.claims(name)


def test_every_claim_that_peft_does_not_make_has_its_reason() -> None:
    assert promises.unpromised("peft") == [claim for claim in CLAIMS if claim in NOT_OF_PEFT]


def test_a_claim_that_is_unknown_or_has_no_sentence_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promises, "HERE", tmp_path)
    entry = '[[claim]]\nname = "{}"\ndocument = "a"\nlink = "b"\nsentence = "{}"\n'
    for name, text, why in (
        ("unknown", entry.format("flying", "c"), "flying is unknown"),
        ("twice", entry.format("linear linear", "c"), "linear stands there twice"),
        ("silent", entry.format("linear", ""), "linear lacks"),
    ):
        (tmp_path / f"{name}.toml").write_text(text)
        with pytest.raises(ValueError, match=why):
            promises.promised(name)


class Unscaled(Plain):
    """W + B A: there is no s. What it is asked for has lora_alpha = r."""

    conventions: ClassVar = {"scaling": "none"}
    claims = Loralib.claims - {"alpha", "embedding", "transposed"}

    def layer(self, spec: LayerSpec) -> Layer:
        return super().layer(spec.but(lora_alpha=float(spec.r)))


def test_a_library_without_scaling_is_accused_of_nothing() -> None:
    results = list(run("unscaled", Unscaled(), profile="quick"))
    assert [(r.id, r.message) for r in results if r.outcome not in ("PASS", "UNSUPPORTED")] == []
    assert sum(result.outcome == "PASS" for result in results) >= 40
    assert {r.id: r.message for r in results}["SCALE-001"] == "it has no scaling, by convention"
