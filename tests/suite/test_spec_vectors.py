"""The vectors are what the formulas give, PEFT's format is what lora_ref reads, and a foreign program can use them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import lora_ref
from spec_tests import ModelSpec, ModuleSpec, find, vectors
from spec_tests.contract import LayerSpec

FILES = sorted(path.relative_to(vectors.PLACE) for path in vectors.PLACE.rglob("*") if path.is_file())


def test_the_committed_vectors_are_those_that_would_be_written(tmp_path: Path) -> None:
    vectors.write(tmp_path)
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert written == [path for path in FILES if path.name not in ("schema.json", "consumer.mjs")]
    for path in written:
        assert (tmp_path / path).read_bytes() == (vectors.PLACE / path).read_bytes(), path


def test_the_vectors_keep_to_the_schema() -> None:
    schema = json.loads((vectors.PLACE / "schema.json").read_text())["properties"]["layers"]["items"]
    layers = json.loads((vectors.PLACE / "vectors.json").read_text())["layers"]
    assert {layer["kind"] for layer in layers} == set(schema["properties"]["kind"]["enum"])
    for layer in layers:
        assert sorted(layer) == sorted(schema["required"]) == sorted(schema["properties"])


@pytest.mark.parametrize("number", range(len(vectors.LAYERS)))
def test_lora_ref_gives_the_vectors_exactly(number: int) -> None:
    given = json.loads((vectors.PLACE / "vectors.json").read_text())["layers"][number]
    arrays = {name: None if given[name] is None else np.array(given[name]) for name in ("W", "b", "A", "B", "x", "y")}
    spec = LayerSpec(
        given["kind"], arrays["W"], arrays["b"], given["r"], given["lora_alpha"], given["use_rslora"]
    )  # fmt: skip
    layer = find("lora_ref")[1].layer(spec)
    layer.write(arrays["A"], arrays["B"])
    assert np.array_equal(layer.forward(arrays["x"]), arrays["y"])
    layer.merge()
    assert np.array_equal(layer.read().W, np.array(given["merged"]))


@pytest.mark.parametrize("library", ["lora_ref", "peft"])
@pytest.mark.parametrize("name", vectors.FOLDERS)
def test_the_folders_load_and_give_their_outputs(name: str, library: str) -> None:
    place = vectors.PLACE / "folders" / name
    given = json.loads((place / "model.json").read_text())
    modules = {n: ModuleSpec(m["kind"], np.array(m["W"], dtype=float)) for n, m in given["modules"].items()}
    model = find(library)[1].load(ModelSpec(modules, {}), place)
    assert np.array_equal(model.forward(np.array(given["x"])), np.array(given["y"]))
    assert lora_ref.LoraConfig.from_pretrained(place).r == vectors.FOLDERS[name].get("r", 8)


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node.js here")
def test_a_program_in_javascript_holds_to_them() -> None:
    done = subprocess.run(
        ["node", str(vectors.PLACE / "consumer.mjs")], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "11 vectors and folders hold\n"
