"""README.md of an adapter folder: what the adapter is, for people and for the hub."""

import json
import os
import uuid
from pathlib import Path
from typing import Any

from ..core.config import LoraConfig


def model_card(config: LoraConfig, base: Any = None) -> str:
    """The text, with the metadata that PEFT's cards have. The tags of the `base` model are kept.

    >>> print(model_card(LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path="gpt2")))
    ---
    base_model: "gpt2"
    library_name: peft
    tags:
    - "base_model:adapter:gpt2"
    - lora
    ---
    <BLANKLINE>
    # LoRA adapter
    <BLANKLINE>
    r=4, lora_alpha=8, target_modules: q_proj.
    <BLANKLINE>
    ```python
    model = PeftModel.from_pretrained(base_model, "this folder")  # of peft or lora_ref
    ```
    <BLANKLINE>
    """
    known = base is None or hasattr(base, "config")  # the hub does not know a model of one's own
    name = (config.base_model_name_or_path or "") if known else ""
    tags = {"lora", *(str(tag) for tag in getattr(base, "model_tags", None) or ())}
    tags |= {"transformers"} if is_of_transformers(base) else set()
    head = [f"base_model: {json.dumps(name)}"] * bool(name) + ["library_name: peft"]  # quoted as in YAML
    head += ["pipeline_tag: text-generation"] * (config.task_type == "CAUSAL_LM") + ["tags:"]
    head += [f"- {json.dumps(f'base_model:adapter:{name}')}"] * bool(name)
    head += [f"- {tag if tag in ('lora', 'transformers') else json.dumps(tag)}" for tag in sorted(tags)]
    option = "target_modules" if config.target_modules else "target_parameters"
    targets = getattr(config, option) or []
    named = targets if isinstance(targets, str) else ", ".join(targets[:8]) + ", ..." * (len(targets) > 8)
    said = f"r={config.r}, lora_alpha={config.lora_alpha:g}, {option}: {named}."
    load = '```python\nmodel = PeftModel.from_pretrained(base_model, "this folder")  # of peft or lora_ref\n```'
    return "\n".join(["---", *head, "---", "", "# LoRA adapter", "", said, "", load, ""])


def is_of_transformers(model: Any) -> bool:
    """Is it a model of transformers, which is not imported for that?"""
    return any(cls.__module__.startswith("transformers.") for cls in type(model).__mro__)


def write_card(directory: Path, config: LoraConfig, base: Any = None) -> None:
    """Write README.md, if there is none: a card that somebody wrote stays. OSError: the disk failed."""
    path = directory / "README.md"
    if path.exists():
        return
    new = directory / f"README.md.{uuid.uuid4().hex}.tmp"
    try:
        new.write_text(model_card(config, base), encoding="utf-8")
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
