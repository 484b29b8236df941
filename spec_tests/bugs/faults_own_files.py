"""Faults of saving and loading in a format of one's own."""

# ruff: noqa: E501 - a planted line is quoted whole

from __future__ import annotations

from .bug import PEFT, Bug

SAVES = "    def save_own(self, folder: Path) -> None:\n        self.save(folder)"
LOADS = "    def load_own(self, spec: ModelSpec, folder: Path) -> Model:\n        return self.load(spec, folder)"
LOADED = "model: Any = self.load(spec, folder)"


def loads(*lines: str) -> str:
    """Loading with more lines before the end."""
    return LOADS.replace("return self.load(spec, folder)", "\n        ".join((LOADED, *lines, "return model")))


BUGS: tuple[Bug, ...] = (
    Bug(
        "own_files_drop_trained_biases",
        LOADS,
        loads("for name, module in spec.modules.items():", "    model.sites[name].b = module.b"),
        PEFT + "issues/3306",
    ),
)
MUTANTS: tuple[Bug, ...] = (
    Bug(
        "own_files_hold_no_b",
        LOADS,
        loads("for site in model.sites.values():", "    for a in site.adapters.values():", "        a.B = 0 * a.B"),
    ),
    Bug("saving_own_files_switches_the_adapter_off", SAVES, SAVES + "\n        self.enable(False)"),
    Bug(
        "own_files_of_a_merged_model_hold_half",
        SAVES,
        SAVES.replace(
            "self.save(folder)",
            "[setattr(a, 'B', a.B / 2) for site in self.sites.values() if site.merged for a in site.adapters.values()]\n        self.save(folder)",
        ),
    ),
    Bug(
        "own_files_hold_no_copies",
        LOADS,
        loads(
            "for site in model.sites.values():",
            "    for name in site.copies:",
            "        site.copies[name] = [site.W, site.b]",
        ),
    ),
    Bug(
        "own_files_forget_the_patterns",
        LOADS,
        loads(
            "for site in model.sites.values():",
            "    for a in site.adapters.values():",
            "        a.s = spec.config['lora_alpha'] / spec.config['r']",
        ),
    ),
)
