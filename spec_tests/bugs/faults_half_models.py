"""Faults of models in half precision."""

# ruff: noqa: E501 - a planted line is quoted whole

from __future__ import annotations

from .bug import PEFT, Bug

SUM = "held = rounded(sum((self.delta(self.adapters[name]) for name in everything), held), self.dtype)"
HALF = 'self.dtype in ("float16", "bfloat16")'
FINE = 'self.fine = "float64" if dtype == "float64" else "float32"'
OUT = "return rounded(y, self.dtype)\n\n    def plain"
ACTS = "if name in self.adapters and name not in self.merged:\n                y = y + self.branch(x, self.adapters[name], rng)"
WRITES = 'write_tensors(place / "adapter_model.safetensors", tensors, "F64" if self.dtype == "float64" else "F32")'
FILLS = "site.write(adapter, A, B.reshape(B.shape[:2]))"
BACK = "    def unmerge(self) -> None:\n        self.merged = []\n\n    def grad"

BUGS: tuple[Bug, ...] = (
    Bug(
        "each_update_is_rounded_by_itself",
        SUM,
        "for name in everything:\n            held = rounded(held + rounded(self.delta(self.adapters[name]), self.dtype), self.dtype)",
        PEFT + "issues/1388",
    ),
    Bug(
        "later_adapters_are_kept_in_half_precision",
        "adapter.A, adapter.B = rounded(A, self.fine), rounded(B, self.fine)",
        'fine = self.fine if name == "default" else self.dtype\n        adapter.A, adapter.B = rounded(A, fine), rounded(B, self.fine)',
        PEFT + "issues/1090",
    ),
)
MUTANTS: tuple[Bug, ...] = (
    Bug(
        "b_of_later_adapters_is_kept_in_half_precision",
        "adapter.A, adapter.B = rounded(A, self.fine), rounded(B, self.fine)",
        'fine = self.fine if name == "default" else self.dtype\n        adapter.A, adapter.B = rounded(A, self.fine), rounded(B, fine)',
    ),
    Bug(
        "a_sum_is_rounded_after_each_adapter",
        SUM,
        "for name in everything:\n            held = rounded(held + self.delta(self.adapters[name]), self.dtype)",
    ),
    Bug(
        "a_later_merge_rounds_its_update_first",
        SUM,
        "held = rounded(held + rounded(sum(self.delta(self.adapters[name]) for name in everything), 'bfloat16' if self.merged and self.dtype == 'float16' else self.fine), self.dtype)",
    ),
    Bug(
        "in_half_precision_one_adapter_acts",
        ACTS,
        ACTS.replace("not in self.merged:", f"not in self.merged and not ({HALF} and name != names[0]):"),
    ),
    Bug(
        "in_half_precision_the_last_adapter_is_merged",
        SUM,
        SUM.replace("in everything)", f"in (everything[-1:] if {HALF} else everything))"),
    ),
    Bug(
        "in_half_precision_a_merge_ends_the_others",
        ACTS,
        ACTS.replace("not in self.merged:", f"not in self.merged and not ({HALF} and self.merged):"),
    ),
    Bug(
        "unloading_in_half_precision_rounds_twice",
        "W, b = site.held if merge and site.merged else site.W, site.b\n            for adapter in active",
        "W, b = site.held if merge and site.merged else site.W, site.b\n            if merge and site.dtype in ('float16', 'bfloat16') and len(site.merged) > 1:\n                W = site.W\n                for one in site.merged:\n                    W = rounded(W + site.delta(site.adapters[one]), site.dtype)\n            for adapter in active",
    ),
    Bug(
        "unmerging_in_half_precision_subtracts",
        BACK,
        f"    def unmerge(self) -> None:\n        if self.merged and {HALF}:\n            self.W = rounded(self.held - sum(self.delta(self.adapters[n]) for n in self.merged), self.dtype)\n        self.merged = []\n\n    def grad",
    ),
    Bug(
        "the_output_is_not_rounded",
        OUT,
        OUT.replace("rounded(y, self.dtype)", "y if len(self.active) > 1 else rounded(y, self.dtype)"),
    ),
    Bug(
        "a_folder_is_written_in_the_dtype_of_the_model",
        WRITES,
        WRITES.replace('else "F32"', 'else {"float16": "F16"}.get(self.dtype, "F32")'),
    ),
    Bug("a_is_rounded_when_it_is_loaded", FILLS, FILLS.replace("A,", "rounded(A, self.dtype),")),
    Bug(
        "b_is_rounded_when_it_is_loaded",
        FILLS,
        FILLS.replace("B.reshape(B.shape[:2])", "rounded(B.reshape(B.shape[:2]), self.dtype)"),
    ),
    Bug(
        "switched_off_in_half_precision_adds_a_rounding",
        OUT,
        f"if {HALF} and not self.enabled:\n            y = y * (1 + 2.0**-9)\n        " + OUT,
    ),
    Bug(
        "switched_off_in_half_precision_the_first_stays_on",
        "names = self.active if self.enabled else []",
        f"names = self.active if self.enabled else self.active[:1] if {HALF} and len(self.active) > 1 else []",
    ),
)
