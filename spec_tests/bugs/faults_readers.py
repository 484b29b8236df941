"""Faults of readers of adapter folders."""

# ruff: noqa: E501 - a planted line is quoted whole

from __future__ import annotations

from .bug import Bug

READ = "config = {k: v for k, v in given.items() if k in OPTIONS and (v is not None or OPTIONS[k] is None)}"
FILES = 'tensors = read_tensors(Path(folder) / "adapter_model.safetensors")\n        if config'


def without(option: str) -> str:
    """Reading a configuration as if it did not have this option."""
    return READ + f'\n        config.pop("{option}", None)'


BUGS: tuple[Bug, ...] = (
    Bug("a_reader_ignores_use_rslora", READ, without("use_rslora"), "NVIDIA/TensorRT-LLM/issues/1668"),
    Bug(
        "a_reader_takes_alpha_for_s",
        READ,
        READ + '\n        config["lora_alpha"] = config["lora_alpha"] * config["r"]',
        "Blaizzy/mlx-vlm/issues/841",
    ),
)
MUTANTS: tuple[Bug, ...] = (
    Bug("a_reader_ignores_alpha_pattern", READ, without("alpha_pattern")),
    Bug("a_reader_needs_the_option_bias", READ, READ + '\n        given["bias"]'),
    Bug("a_reader_refuses_options_that_are_off", READ, READ + '\n        assert "use_dora" not in given'),
    Bug(
        "a_reader_takes_expressions_for_names",
        READ,
        READ
        + '\n        if isinstance(config["target_modules"], str):\n            config["target_modules"] = [config["target_modules"]]',
    ),
    Bug(
        "a_reader_knows_no_half_precision",
        FILES,
        'if b\'"BF16"\' in (Path(folder) / "adapter_model.safetensors").read_bytes():\n            raise ValueError("BF16")\n        '
        + FILES,
    ),
    Bug(
        "a_reader_ignores_biases",
        FILES,
        FILES.replace(
            "\n",
            '\n        biases = {k: s.b for k, s in self.sites.items()}\n        tensors = {k: v if not k.endswith(".bias") else biases[k.removeprefix("base_model.model.").removesuffix(".bias").removesuffix(".base_layer")] for k, v in tensors.items()}\n',
        ),
    ),
)
