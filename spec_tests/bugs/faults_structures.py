"""Faults of models that are more than chains of linear layers."""

# ruff: noqa: E501 - a planted line is quoted whole

from __future__ import annotations

from .bug import PEFT, Bug

CALL = "self.sites[name].forward(x, names, rng)"
ENTER = "self.sites[name].held, self.sites[name].merged = held, merged"
STEP = "for step in self.order:\n            name = self.same.get(step, step)"
TWIN = "sum(o.W is self.sites[name].W for o in self.sites.values()) > 1"
UNLOAD = "W, b = site.held if merge and site.merged else site.W, site.b"
BASE = "return {n: (s.side(s.weight()).copy(), None if s.b is None else s.b.copy()) for n, s in self.sites.items()}"
OTHER = "next((o.held for o in self.sites.values() if o.merged and o.W is {0}.W), {0}.W)"

BUGS: tuple[Bug, ...] = (
    Bug(
        "merging_writes_the_weight_that_another_module_shares",
        ENTER,
        "[(setattr(o, 'held', held), setattr(o, 'merged', merged)) for o in self.sites.values() if merged and o.W is self.sites[name].W]",
        PEFT + "issues/2018",
    ),
    Bug(
        "a_plain_model_ties_its_weights_again",
        UNLOAD,
        UNLOAD.replace("else site.W,", "else " + OTHER.format("site") + ","),
        "huggingface/transformers/issues/45127",
    ),
    Bug(
        "a_merged_convolution_multiplies_its_factors_otherwise",
        "return adapter.s * np.tensordot(adapter.B, adapter.A, 1)",
        "return adapter.s * np.tensordot(adapter.B, adapter.A[..., ::-1], 1)",
        PEFT + "pull/637",
    ),
)
MUTANTS: tuple[Bug, ...] = (
    Bug(
        "a_convolution_inside_a_block_is_left_out",
        "wanted = named(name, rule) and in_layer(name, c)",
        'wanted = named(name, rule) and in_layer(name, c) and not (kind.startswith("conv") and "." in name)',
    ),
    Bug(
        "the_adapter_of_a_convolution_acts_in_inference_alone",
        CALL,
        CALL.replace("names", "[] if self.sites[name].geometry is not None and self.trains else names"),
    ),
    Bug(
        "a_convolution_stays_merged",
        "def unmerge(self) -> None:\n        self.merged = []",
        "def unmerge(self) -> None:\n        self.merged = self.merged if MESH.get(self.kind) else []",
    ),
    Bug(
        "the_factors_of_a_convolution_are_loaded_as_zero",
        "site.write(adapter, A, B.reshape(B.shape[:2]))",
        "site.write(adapter, A, B.reshape(B.shape[:2]) * (B.ndim == 2))",
    ),
    Bug(
        "the_second_call_is_without_the_adapter",
        STEP,
        STEP.replace("step in self", "at, step in enumerate(self").replace("order:", "order):")
        + "\n            names = [] if step in self.order[:at] else names",
    ),
    Bug(
        "the_second_call_has_the_first_adapter_alone",
        STEP,
        STEP.replace("step in self", "at, step in enumerate(self").replace("order:", "order):")
        + "\n            names = self.sites[name].active[:1] if step in self.order[:at] and self.sites[name].active[1:] else names",
    ),
    Bug(
        "merging_adds_an_update_for_each_call",
        ENTER,
        ENTER.replace("= held", "= held + (held - self.sites[name].W) * max(0, self.order.count(name) - 1)"),
    ),
    Bug("the_second_name_is_without_the_adapter", CALL, CALL.replace("names", "[] if step in self.same else names")),
    Bug(
        "the_second_name_is_not_called_when_it_is_merged",
        CALL,
        "(x if step in self.same and self.sites[name].merged else " + CALL + ")",
    ),
    Bug(
        "the_second_name_is_not_switched_off",
        CALL,
        CALL.replace("names", "self.sites[name].active if step in self.same and names is None else names"),
    ),
    Bug("the_adapter_of_a_tied_module_does_not_act", CALL, CALL.replace("names", f"[] if {TWIN} else names")),
    Bug(
        "the_base_weight_of_a_tied_module_is_the_other_s",
        BASE,
        BASE.replace("s.weight()", "s.weight() if s.merged else " + OTHER.format("s")),
    ),
)
