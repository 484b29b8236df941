"""Faults about names of modules that a library uses itself."""

# ruff: noqa: E501 - a planted line is quoted whole

from __future__ import annotations

from .bug import Bug

CALL = "x = self.sites[called].forward(x, names, rng)"

BUGS: tuple[Bug, ...] = ()
MUTANTS: tuple[Bug, ...] = (
    Bug(
        "what_has_lora_in_its_name_is_no_target",
        'if named(name, c["exclude_modules"]) or name in keep:',
        'if named(name, c["exclude_modules"]) or name in keep or "lora_" in name:',
    ),
    Bug("a_base_layer_has_no_branch", CALL, CALL.replace("names", '[] if "base_layer" in called else names')),
    Bug(
        "what_has_lora_in_its_name_stays_on",
        "self.enabled = enabled\n        for site in self.sites.values():\n            site.enabled = enabled",
        'self.enabled = enabled\n        for name, site in self.sites.items():\n            site.enabled = enabled or "lora" in name',
    ),
    Bug(
        "what_has_lora_in_its_name_trains",
        'found |= {f"{name}.bias" for name in self.biased(adapter)}',
        'found |= {f"{name}.bias" for name in self.biased(adapter)} | {f"{name}.weight" for name in self.sites if "lora_" in name}',
    ),
    Bug(
        "a_key_is_cut_at_the_first_weight",
        'place = f"base_model.model.{name}"\n            if adapter in site.adapters:\n                a = site',
        'place = f"base_model.model.{name}".split("weight")[0]\n            if adapter in site.adapters:\n                a = site',
    ),
    Bug(
        "base_layer_is_taken_out_of_a_plain_name",
        "found[name] = site.side(W).copy(), None if b is None else b.copy()",
        'found[name.replace("base_layer", "layer")] = site.side(W).copy(), None if b is None else b.copy()',
    ),
    Bug(
        "an_adapter_called_like_a_part_of_a_layer_does_not_act",
        "if name in self.adapters and name not in self.merged:",
        'if name in self.adapters and name not in self.merged and name not in ("lora_A", "base_layer", "weight"):',
    ),
    Bug(
        "deleting_an_adapter_empties_the_modules_of_its_name",
        "del self.configs[adapter]",
        "del self.configs[adapter]\n        [site.adapters.clear() for name, site in self.sites.items() if adapter in name]",
    ),
    Bug(
        "a_saved_module_with_lora_in_its_name_is_not_read",
        "site.copies[adapter] = [W, None if b is None else rounded(b, self.dtype)]",
        'site.copies[adapter] = [W, None if b is None else rounded(b, self.dtype)] if "lora_" not in name else site.copies[adapter]',
    ),
)
