"""Adapter folders in PEFT's format, written and read by hand: adapter_config.json and adapter_model.safetensors.

A safetensors file is the length of its header (8 bytes, little endian), the header in JSON, and the numbers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .contract import Array

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
KINDS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def encoded(value: Array, dtype: str) -> bytes:
    """The numbers' bytes; BF16 is the upper half of float32."""
    if dtype == "BF16":
        bits = np.asarray(value, dtype="<f4").view("<u4")
        return (bits >> 16).astype("<u2").tobytes()
    return np.asarray(value).astype(np.dtype(KINDS[dtype]).newbyteorder("<")).tobytes()


def decoded(data: bytes, dtype: str, shape: list[int]) -> Array:
    if dtype == "BF16":
        bits = np.frombuffer(data, "<u2").astype("<u4") << 16
        return bits.view("<f4").astype(np.float64).reshape(shape)
    return np.frombuffer(data, np.dtype(KINDS[dtype]).newbyteorder("<")).astype(np.float64).reshape(shape)


def write(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Array], dtype: str = "F32", minimal: bool = False
) -> None:
    """A folder with these tensors (without `PREFIX`). minimal: only what the config needs to say."""
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"peft_type": "LORA"}
    if not minimal:
        about |= {"base_model_name_or_path": None, "task_type": None, "inference_mode": True, "bias": "none"}
        about |= {"fan_in_fan_out": False, "lora_dropout": 0.0, "init_lora_weights": True, "modules_to_save": None}
    (folder / CONFIG).write_text(json.dumps(about | dict(config), indent=2), encoding="utf-8")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for key in sorted(tensors):
        part = encoded(tensors[key], dtype)
        where = [len(data), len(data) + len(part)]
        header[PREFIX + key] = {"dtype": dtype, "shape": list(tensors[key].shape), "data_offsets": where}
        data += part
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """The config and {full key: numbers}."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    raw = (folder / TENSORS).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    data = raw[8 + size :]
    found = {}
    for key, entry in header.items():
        start, end = entry["data_offsets"]
        found[key] = decoded(data[start:end], entry["dtype"], entry["shape"])
    return config, found


def keys(module: str, kind: str) -> tuple[str, str]:
    """The names of A and B of a module, without `PREFIX`."""
    if kind == "embedding":
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"
