"""The reader of adapter folders in JavaScript, vectors/consumer.mjs, in a process of Node.js."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..contract import Array, Implementation, Model, ModelSpec
from ..vectors import PLACE


def node(*arguments: str, given: str = "") -> str:
    """What Node.js prints.

    Raises:
        RuntimeError: it fails; the message is what it says.
    """
    done = subprocess.run(["node", *arguments], input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return done.stdout


class JavascriptModel(Model):
    """It keeps a copy of the folder, which each pass reads."""

    def __init__(self, spec: ModelSpec, folder: Path) -> None:
        self.kept = tempfile.TemporaryDirectory()
        shutil.copytree(folder, self.kept.name, dirs_exist_ok=True)
        self.modules = {
            name: {"kind": m.kind, "W": m.W.tolist(), "b": None if m.b is None else m.b.tolist()}
            for name, m in spec.modules.items()
        }

    def forward(self, x: Array, train: bool | None = False, seed: int = 0, adapter_names: Any = None) -> Array:
        given = json.dumps({"modules": self.modules, "x": x.tolist()})
        return np.array(json.loads(node(str(PLACE / "consumer.mjs"), self.kept.name, given=given)), dtype=float)


class Javascript(Implementation):
    """It finds the adapted modules by their tensors, so target_modules may be a list or an expression."""

    name = "javascript"
    claims = frozenset({"linear", "embedding", "float32", "reads_peft", "rslora", "patterns", "targets:regex"})

    def version(self) -> str:
        return f"consumer.mjs, Node.js {node('--version').strip().removeprefix('v')}"

    def load(self, spec: ModelSpec, folder: Path) -> Model:
        return JavascriptModel(spec, folder)
