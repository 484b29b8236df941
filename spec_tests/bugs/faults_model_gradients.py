"""Faults in the gradients of a whole model."""

# ruff: noqa: E501 - a planted line is quoted whole

from __future__ import annotations

from .bug import PEFT, Bug

ACTING = "acting = {name: self.adapters[name] for name in names if name in self.adapters and name not in self.merged}"
FACTORS = 'found |= {f"A:{name}": a.s * a.B.T @ dW, f"B:{name}": a.s * dW @ a.A.T}'
WITH = "dx, dW = dy @ sum((self.side(self.delta(a)) for a in acting.values()), W), dy.T @ x"
FILTER = "return {key: found[key] for key in self.trainable() & found.keys()}"
COPY = 'W, owner = self.copies[name][0], f":{name}"'
FOUND = 'found = {f"weight{owner}": dW, f"bias{owner}": dy.sum(0)}'
WEIGHT = 'W, owner = self.held if self.merged and self.enabled else self.shifted(names), ""'
NORM = "dx, dW = dy * W, (dy * x).sum(0)"
SEEN = "seen = []\n        for site in"

BUGS: tuple[Bug, ...] = (
    Bug(
        "only_the_first_of_several_has_gradients",
        ACTING,
        ACTING.replace("not in self.merged}", "not in self.merged and name == names[0]}"),
        PEFT + "issues/631",
    ),
    Bug(
        "after_a_switch_nothing_has_gradients",
        FILTER,
        'return {key: found[key] for key in self.trainable() & found.keys() if self.active()[0] == "default"}',
        PEFT + "issues/1303",
    ),
)
MUTANTS: tuple[Bug, ...] = (
    Bug("the_gradient_of_a_has_no_scaling", FACTORS, FACTORS.replace("a.s * a.B.T", "a.B.T")),
    Bug("the_gradient_stops_at_the_branch", WITH, WITH.replace("acting.values()), W)", "()), W)")),
    Bug("of_several_the_gradient_goes_through_one", WITH, WITH.replace("acting.values()", "list(acting.values())[:1]")),
    Bug(
        "one_module_has_no_gradient",
        FILTER,
        'return {key: found[key] for key in self.trainable() & found.keys() if "up.B" not in key}',
    ),
    Bug(
        "frozen_weights_have_gradients",
        FILTER,
        'return {key: value for key, value in found.items() if not key.endswith(".bias")}',
    ),
    Bug(
        "biases_have_no_gradient",
        FILTER,
        'return {key: found[key] for key in self.trainable() & found.keys() if not key.endswith(".bias")}',
    ),
    Bug(
        "the_gradient_of_a_bias_is_a_mean",
        FOUND,
        FOUND.replace("dy.sum(0)", "(dy.mean(0) if not owner else dy.sum(0))"),
    ),
    Bug("the_gradient_of_a_saved_weight_is_turned", FOUND, FOUND.replace('": dW', '": (dW[::-1] if owner else dW)')),
    Bug(
        "the_gradient_of_a_saved_bias_is_lost",
        FOUND,
        'found = {f"weight{owner}": dW} | ({} if owner else {"bias": dy.sum(0)})',
    ),
    Bug("a_saved_original_has_the_gradient", COPY, COPY.replace('f":{name}"', '""')),
    Bug(
        "switched_off_the_factors_have_gradients",
        FILTER,
        "was, self.enabled = self.enabled, True\n        keys, self.enabled = self.trainable(), was\n        return {key: found.get(key, np.zeros(1)) for key in keys if key in found or not was}",
    ),
    Bug("merged_factors_have_gradients", ACTING, ACTING.replace("and name not in self.merged}", "}")),
    Bug(
        "unmerging_leaves_the_factors_without_gradient",
        ACTING,
        "self.was = getattr(self, 'was', False) or bool(self.merged)\n        "
        + ACTING.replace("not in self.merged}", "not in self.merged and not (self.was and not self.merged)}"),
    ),
    Bug(
        "switching_on_again_leaves_the_factors_without_gradient",
        ACTING,
        "self.was_off = getattr(self, 'was_off', False) or not self.enabled\n        "
        + ACTING.replace("not in self.merged}", "not in self.merged and not self.was_off}"),
    ),
    Bug("the_gradient_goes_through_the_unmerged_weight", WEIGHT, 'W, owner = self.shifted(names), ""'),
    Bug("a_norm_passes_the_gradient_unchanged", NORM, NORM.replace("dy * W", "dy")),
    Bug(
        "an_embedding_s_row_has_the_last_gradient",
        "np.add.at(turned(dW), x, dy)",
        "dW[:, x] = dy.T",
    ),
    Bug(
        "after_a_switch_the_scaling_is_forgotten",
        FACTORS,
        FACTORS.replace("a.s * dW @", "(a.s if name == 'default' or len(acting) > 1 or self.merged else 1) * dW @"),
    ),
    Bug(
        "a_partly_merged_model_has_wrong_gradients",
        FACTORS,
        FACTORS.replace("a.s * dW @", "(2 * a.s if self.merged else a.s) * dW @"),
    ),
)
