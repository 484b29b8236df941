"""Faults about names."""

# ruff: noqa: E501 - a planted line is quoted whole

from __future__ import annotations

from .bug import PEFT, Bug

TRAINS = 'found |= {f"{name}.bias" for name in self.biased(adapter)}'
WRITES = "site.write(adapter, A, B.reshape(B.shape[:2]))"
SET = "site.active = list(names)"

BUGS: tuple[Bug, ...] = (
    Bug(
        "all_with_lora_in_the_name_trains",
        TRAINS,
        TRAINS + ' | {f"{n}.weight" for n in self.sites if "lora_" in n}',
        "microsoft/LoRA/pull/133",
    ),
    Bug(
        "a_module_with_weight_in_its_name_is_not_loaded",
        WRITES,
        'site.write(adapter, A, B.reshape(B.shape[:2]) * ("weight" not in name))',
        PEFT + "pull/2773",
    ),
    Bug(
        "a_copy_with_lora_in_its_name_is_not_loaded",
        "site.copies[adapter] = [W, None if b is None else rounded(b, self.dtype)]",
        'site.copies[adapter] = site.copies[adapter] if "lora_" in name else [W, None if b is None else rounded(b, self.dtype)]',
        PEFT + "issues/3433",
    ),
    Bug(
        "what_ends_as_a_saved_module_is_saved_too",
        'any(ends(".".join(p[: i + 1]), c["modules_to_save"] or []) for i in range(len(p)))',
        'any(".".join(p[: i + 1]).endswith(tuple(c["modules_to_save"] or [])) for i in range(len(p)))',
        PEFT + "issues/1917",
    ),
    Bug(
        "the_adapter_whose_name_goes_on_is_saved",
        "a = site.adapters[adapter]\n                A, B = a.A, a.B",
        "a = site.adapters[max((n for n in site.adapters if n.startswith(adapter)), key=len)]\n                A, B = a.A, a.B",
        PEFT + "pull/3268",
    ),
    Bug(
        "many_names_are_cut_short",
        'return any(name == item or name.endswith("." + item) for item in items)',
        'return any(name == item or name.endswith("." + item) for item in list(items)[:20])',
        PEFT + "pull/2144",
    ),
)
MUTANTS: tuple[Bug, ...] = (
    Bug(
        "a_dot_is_an_underscore",
        "return re.fullmatch(rule, name) is not None",
        'return any(re.fullmatch(rule, n) for n in (name, name.replace("_", ".")))',
    ),
    Bug(
        "the_adapter_of_a_module_with_lora_in_its_name_does_not_act",
        "self.sites[name].forward(x, names, rng)",
        'self.sites[name].forward(x, [] if "lora_" in name and self.trains else names, rng)',
    ),
    Bug(
        "a_module_named_base_layer_trains",
        TRAINS,
        TRAINS + ' | {f"{n}.weight" for n in self.sites if "base_layer" in n}',
        profile="default",
    ),
    Bug(
        "a_module_with_lora_in_its_name_is_not_loaded",
        WRITES,
        'site.write(adapter, A, B.reshape(B.shape[:2]) * ("lora" not in name))',
        profile="default",
    ),
    Bug(
        "a_module_named_base_layer_is_unloaded_without_its_update",
        "W, b = site.held if merge and site.merged else site.W, site.b",
        'W, b = site.held if merge and site.merged and "base_layer" not in name else site.W, site.b',
        profile="default",
    ),
    Bug(
        "adapters_whose_names_go_on_are_set_too",
        SET,
        "site.active = [n for n in self.configs if n.startswith(tuple(names))]",
    ),
)
