"""Faults about base layers with options of their own."""

# ruff: noqa: E501 - a planted line is quoted whole

from __future__ import annotations

from .bug import PEFT, Bug

HOOK = 'y = y * self.base.get("hook", 1.0)'
BRANCH = "y = y + self.branch(x, self.adapters[name], rng)"
SCALED = 'return adapter.s * (A.T[x] @ B.T) * self.base.get("embed_scale", 1.0)'
GROUPS = 'raise ValueError("A sees the inputs of all groups: there is no weight of one group for its update")'
COMPUTED = 'raise ValueError("W is computed from other parameters: nothing can be added to it")'
CONV_BRANCH = "return adapter.s * np.moveaxis(self.convolved(x, A) @ B.T, -1, 1)"
CONV_DELTA = "return adapter.s * np.tensordot(adapter.B, adapter.A, 1)"

BUGS: tuple[Bug, ...] = (
    Bug(
        "groups_are_merged_as_if_there_were_one",
        GROUPS,
        "return self.held + self.delta(self.adapters[new[0]])[:, : self.W.shape[1]], [*self.merged, *new]",
        "tiiuae/Falcon-H1/issues/13",
    ),
    Bug(
        "the_branch_pads_with_zeros",
        CONV_BRANCH,
        'self.base = {**self.base, "padding_mode": "zeros"}\n            ' + CONV_BRANCH,
        PEFT + "issues/3697",
    ),
    Bug("embed_scale_leaves_out_the_branch", SCALED, "return adapter.s * (A.T[x] @ B.T)", PEFT + "pull/2825"),
    Bug(
        "each_group_sees_the_first_inputs",
        "parts = zip(np.split(x, self.groups, 1), np.split(W, self.groups), strict=True)",
        "parts = zip([x[:, : W.shape[1]]] * self.groups, np.split(W, self.groups), strict=True)",
        PEFT + "pull/2403",
    ),
)
MUTANTS: tuple[Bug, ...] = (
    Bug(
        "every_axis_of_a_branch_has_the_first_stride",
        "x = np.pad(x, [(0, 0), (0, 0), *[(p, p) for p in padding]], PADDED",
        "stride = (stride[0],) * d\n        x = np.pad(x, [(0, 0), (0, 0), *[(p, p) for p in padding]], PADDED",
    ),
    Bug(
        "a_merged_convolution_pads_with_zeros",
        "everything = [*self.merged, *new]",
        'everything = [*self.merged, *new]\n        self.base = {**self.base, "padding_mode": "zeros"}',
    ),
    Bug(
        "a_kernel_of_length_1_loses_its_other_axes",
        CONV_BRANCH,
        "A = A * (np.indices(A.shape[2:]).sum(0) == 0) if A.shape[2] == 1 else A\n            " + CONV_BRANCH,
    ),
    Bug(
        "a_kernel_of_length_1_is_merged_at_its_first_place",
        CONV_DELTA,
        "return adapter.s * np.tensordot(adapter.B, adapter.A * (np.indices(adapter.A.shape[2:]).sum(0) == 0 if adapter.A.shape[2] == 1 else 1), 1)",
    ),
    Bug(
        "max_norm_is_ignored",
        'raise ValueError("an embedding with max_norm rewrites its rows while it looks them up")',
        "pass",
    ),
    Bug(
        "max_norm_is_followed_until_a_merge",
        'raise ValueError("an embedding with max_norm rewrites its rows while it looks them up")',
        "spec = spec.but(W=spec.W / np.maximum(np.linalg.norm(spec.W, axis=0), 1.0), base={})\n            self.merge = lambda safe=False: setattr(self.site, 'W', 2 * self.site.W)",
    ),
    Bug(
        "rows_that_are_not_looked_up_are_rewritten",
        HOOK,
        'if self.base and self.kind == "embedding":\n            self.W = np.where(np.isin(np.arange(len(self.W)), x)[:, None], self.W, 2 * self.W)\n        '
        + HOOK,
        profile="default",
    ),
    Bug("scale_grad_by_freq_is_ignored", 'if self.base.get("scale_grad_by_freq"):', "if False:"),
    Bug(
        "a_sparse_gradient_is_lost",
        "np.add.at(dW.T, x, dy)",
        'np.add.at(dW.T, x, 0 * dy if self.base.get("sparse") else dy)',
    ),
    Bug("a_sparse_embedding_has_no_branch", SCALED, SCALED + ' * (1 - self.base.get("sparse", False))'),
    Bug(
        "embed_scale_is_lost_in_a_merge",
        'return W[x] * self.base.get("embed_scale", 1.0)',
        'return W[x] * (1.0 if self.merged else self.base.get("embed_scale", 1.0))',
    ),
    Bug("embed_scale_is_not_in_the_gradient", 'dy = dy * self.base.get("embed_scale", 1.0)', "pass"),
    Bug("what_is_added_to_a_computed_weight_is_lost", COMPUTED, "return self.held, [*self.merged, *new]"),
    Bug(
        "a_computed_weight_has_no_branch",
        BRANCH,
        'y = y + self.branch(x, self.adapters[name], rng) * (not self.base.get("parametrized"))',
    ),
    Bug(
        "a_hook_changes_the_branch_too",
        BRANCH,
        'y = y + self.base.get("hook", 1.0) * self.branch(x, self.adapters[name], rng)',
    ),
    Bug("a_hook_is_not_called", HOOK, "pass"),
    Bug(
        "training_rewrites_the_weight_of_a_hooked_layer",
        HOOK,
        'self.W = self.W * 2 if rng is not None and "hook" in self.base else self.W\n        ' + HOOK,
    ),
    Bug(
        "a_hook_is_called_once_more_each_time",
        HOOK,
        HOOK
        + '\n        self.base = {**self.base, "hook": self.base["hook"] ** 2} if "hook" in self.base else self.base',
    ),
)
