"""Seeded bugs: one fault each, planted into the source of `plain`, and most named after a public bug.

A link says where such a bug was reported or mended; the fault is written anew, for `plain`.
"""

# ruff: noqa: E501 - a planted line is quoted whole

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
import types
from pathlib import Path
from typing import Any

from ..contract import Implementation
from ..reference import plain
from .bug import PEFT, Bug

SOURCE = Path(plain.__file__)


@functools.cache
def source() -> str:
    return SOURCE.read_text(encoding="utf-8")


def planted(bug: Bug) -> str:
    """The source with the bug in it."""
    found = source().count(bug.old)
    assert found == 1, f"{bug.name}: plain.py has {found} times {bug.old!r}"
    assert bug.old != bug.new, f"{bug.name} changes nothing"
    return source().replace(bug.old, bug.new)


def compiled(name: str, text: Any, **names: Any) -> types.ModuleType:
    """A module of this source (text or syntax tree) in the place of `plain`."""
    module = types.ModuleType(f"{plain.__package__}.planted_{name}")
    module.__package__ = plain.__package__
    module.__dict__.update(names)
    sys.modules[module.__name__] = module  # dataclasses look there
    exec(compile(text, f"<plain.py, {name}>", "exec"), module.__dict__)
    return module


@functools.cache
def broken(bug: Bug) -> Implementation:
    """The implementation with the bug."""
    made = compiled(bug.name, planted(bug)).Plain()
    made.name = f"plain with {bug.name}"
    return made


S = 's = alpha / (math.sqrt(r) if config.get("use_rslora") else r)'
DELTA = "return adapter.s * self.side(adapter.B @ adapter.A)"
DELTA_CONV = "return adapter.s * np.tensordot(adapter.B, adapter.A, 1)"
DROPS = "if rng is not None and p > 0:"
MASK = "x = x * (rng.random(x.shape) >= p) / (1 - p) if p < 1 else 0 * x"
BRANCH = "return adapter.s * (x @ turned(A) @ turned(B))"
BRANCH_CONV = "return adapter.s * np.moveaxis(self.convolved(x, A) @ B.T, -1, 1)"
BRANCH_EMBEDDING = 'return adapter.s * (A.T[x] @ B.T) * self.base.get("embed_scale", 1.0)'
ACTS = "if name in self.adapters and name not in self.merged:"
UNMERGED = "new = [name for name in names if name in self.adapters and name not in self.merged]"
ADDED = "held = rounded(sum((self.delta(self.adapters[name]) for name in everything), held), self.dtype)"
WEIGHT = "W, b = self.held if self.merged and self.enabled else self.shifted(names), self.b"
START = "return rng.uniform(-bound, bound, shape_A), np.zeros(shape_B)"
START_EMBEDDING = "return np.zeros(shape_A), rng.standard_normal(shape_B)"
BOUND = "bound = math.prod([n_in, *kernel]) ** -0.5"
MOVED = "made.moved = self.W - rounded(self.W - self.delta(made), self.dtype)"
KEY = 'if re.match(rf"(.*\\.)?({key})$", name):'
TARGETS = (
    'return {n: (looked_up(rank, full, c["r"]), looked_up(alpha, full, c["lora_alpha"])) for n, full in whole.items()}'
)
LAYER = "if wanted is None or wanted == []:"
NUMBER = "return found is not None and int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)"
BIASED = 'return [name for name in there if mode == "all" or adapter in self.sites[name].adapters]'
READ = "config = {k: v for k, v in given.items() if k in OPTIONS and (v is not None or OPTIONS[k] is None)}"
ROW = 'self.called(row[None], [] if name == "__base__" else [name])'
COMBINED = "return Adapter(A, B, len(A), len(A), 1.0, 1.0, 0.0, True, (A, B), np.sum(moved, 0) if moved else None)"
UNLOADED = "W, b = site.held if merge and site.merged else site.W, site.b"
PLAIN_OUTPUT = "y = self.plain(x, W, b)"

BUGS = (
    Bug("rslora_divides_by_r", S, "s = alpha / r", "NVIDIA/TensorRT-LLM/issues/1668"),
    Bug("alpha_is_not_divided", S, S.replace("else r)", "else 1)"), "Blaizzy/mlx-vlm/issues/841"),
    Bug("set_scale_forgets_rslora", '"set": a.first_s', '"set": a.alpha / a.r', PEFT + "issues/2733", "default"),
    Bug("scale_layer_starts_anew", '"scale": a.s * factor', '"scale": a.first_s * factor', PEFT + "pull/1027"),
    Bug("unscale_layer_resets", '"unscale": a.s / factor', '"unscale": a.first_s', PEFT + "pull/1029"),
    Bug("forward_without_scaling", BRANCH, "return x @ turned(A) @ turned(B)", "rasbt/LLMs-from-scratch/pull/823"),
    Bug(
        "convolution_without_dilation",
        "(self.convolved(x, A) @ B.T",
        "(Site(self.kind, self.W, None, self.dtype, self.geometry.but(dilation=1)).convolved(x, A) @ B.T",
        PEFT + "issues/3697",
    ),
    Bug(
        "experts_ranks_interleaved",
        BRANCH,
        BRANCH.replace("turned(B)", 'turned(B.swapaxes(0, 1).reshape(B.shape) if self.kind == "experts" else B)'),
        "unslothai/unsloth-zoo/pull/1269",
    ),
    Bug(
        "output_in_float32",
        "return rounded(y, self.dtype)",
        "return rounded(y, self.fine)",
        "mflux-community/mflux/issues/740",
    ),
    Bug(
        "factors_in_half_precision",
        'self.fine = "float64" if dtype == "float64" else "float32"',
        "self.fine = dtype",
        PEFT + "pull/1706",
    ),
    Bug(
        "dropout_in_evaluation",
        DROPS,
        "if p > 0 and (rng := rng or np.random.default_rng(0)):",
        "karpathy/nanoGPT/pull/240",
    ),
    Bug(
        "the_attention_s_output_is_never_called",
        ACTS,
        'if name in self.adapters and name not in self.merged and self.kind != "attention":',
        "Baijiong-Lin/LoRA-Torch/issues/3",
    ),
    Bug("dropout_never", DROPS, "if False:", "meta-pytorch/torchtune/issues/996"),
    Bug(
        "dropout_scales_evaluation",
        BRANCH,
        BRANCH.replace("adapter.s", "adapter.s * (1 if rng is not None else 1 - p)"),
        "ooples/AiDotNet/pull/256",
    ),
    Bug(
        "dropout_of_embeddings",
        BRANCH_EMBEDDING,
        "return adapter.s * (A.T[x] * (1.0 if rng is None else rng.random(A.T[x].shape) >= p) @ B.T)",
        "axolotl-ai-cloud/axolotl/pull/3528",
    ),
    Bug("merge_without_scaling", DELTA, "return self.side(adapter.B @ adapter.A)", "hao-ai-lab/FastVideo/pull/870"),
    Bug(
        "merge_without_transposing",
        DELTA,
        "return adapter.s * (adapter.B @ adapter.A).reshape(self.W.shape)",
        "microsoft/LoRA/issues/61",
    ),
    Bug(
        "merge_forgets_fan_in_fan_out",
        DELTA,
        DELTA.replace(
            "self.side(adapter.B @ adapter.A)",
            '((adapter.B @ adapter.A).reshape(self.W.shape) if self.kind == "transposed" else self.side(adapter.B @ adapter.A))',
        ),
        "axolotl-ai-cloud/axolotl/pull/3095",
    ),
    Bug(
        "merge_crashes_on_embeddings", DELTA, DELTA[:-1] + ' if self.kind != "embedding" else None)', PEFT + "pull/438"
    ),
    Bug(
        "merge_right_for_conv2d_only",
        DELTA_CONV,
        DELTA_CONV.replace("adapter.A, 1", "adapter.A if MESH[self.kind] == 2 else adapter.A[..., ::-1], 1"),
        "microsoft/LoRA/issues/115",
    ),
    Bug(
        "merge_fails_on_conv3d",
        DELTA_CONV,
        DELTA_CONV.replace("adapter.A, 1", "adapter.A if MESH[self.kind] < 3 else adapter.A[..., 0], 1"),
        PEFT + "pull/3777",
    ),
    Bug(
        "merge_is_not_idempotent",
        UNMERGED,
        "new = [name for name in names if name in self.adapters]",
        PEFT + "pull/1355",
    ),
    Bug("merged_acts_twice", ACTS, "if name in self.adapters:", "EricLBuehler/candle-lora/issues/26"),
    Bug(
        "merge_mutates_the_backup",
        ADDED,
        ADDED.replace("held = ", "held += ").replace("self.dtype)", "self.dtype) - held"),
        "sgl-project/sglang/pull/18883",
    ),
    Bug(
        "unmerge_subtracts",
        "    def unmerge(self) -> None:\n        self.merged = []",
        "    def unmerge(self) -> None:\n        self.W, self.merged = (rounded(self.held - sum(self.delta(self.adapters[n]) for n in self.merged), self.dtype), []) if self.merged else (self.W, [])",
        "martinsbruveris/tensorflow-image-models/pull/95",
    ),
    Bug(
        "unmerge_forgets",
        "    def unmerge(self) -> None:\n        self.merged = []",
        "    def unmerge(self) -> None:\n        self.W, self.merged = self.held, []",
        "automl/ConfigurableOptimizer/pull/108",
    ),
    Bug(
        "unmerge_of_the_first_layer_only",
        "            site.unmerge()",
        "            site.unmerge() if site is next(iter(self.sites.values())) else None",
        "huggingface/diffusers/pull/14385",
    ),
    Bug(
        "merge_in_half_precision",
        ADDED,
        ADDED.replace("self.delta(self.adapters[name])", 'rounded(self.delta(self.adapters[name]), "float16")'),
        "huggingface/diffusers/pull/4473",
    ),
    Bug(
        "merge_of_rounded_factors",
        DELTA,
        "return adapter.s * self.side(rounded(adapter.B, self.dtype) @ rounded(adapter.A, self.dtype))",
        PEFT + "pull/1017",
    ),
    Bug("merge_adds_the_first_only", "for name in everything)", "for name in everything[:1])", PEFT + "pull/1135"),
    Bug("merge_hides_active_adapters", ACTS, "if name in self.adapters and not self.merged:", PEFT + "pull/3763"),
    Bug(
        "off_uses_the_copies",
        PLAIN_OUTPUT,
        "y = self.plain(x, *next((self.copies[n] for n in self.active if n in self.copies), (W, b)))",
        PEFT + "issues/493",
    ),
    Bug(
        "on_trains_what_was_frozen",
        "self.enabled = enabled\n        for site",
        "self.enabled, self.trains = enabled, set(self.active()) if enabled else self.trains\n        for site",
        PEFT + "issues/3447",
    ),
    Bug(
        "start_of_both_random",
        START,
        "return rng.uniform(-bound, bound, shape_A), rng.uniform(-bound, bound, shape_B)",
        "hao-ai-lab/FastVideo/pull/781",
    ),
    Bug(
        "start_of_both_zero",
        START,
        "return np.zeros(shape_A), np.zeros(shape_B)",
        "nvidia-cosmos/cosmos-predict2.5/pull/15",
    ),
    Bug(
        "start_of_embeddings_swapped",
        f'"gaussian"):\n        {START_EMBEDDING}',
        '"gaussian"):\n        return rng.standard_normal(shape_A), np.zeros(shape_B)',
        PEFT + "issues/1060",
    ),
    Bug(
        "pissa_transposed",
        "        U, S, Vt = np.linalg.svd(W, full_matrices=False)\n    elif",
        '        U, S, Vt = np.linalg.svd(W.T if kind == "transposed" else W, full_matrices=False)\n    elif',
        PEFT + "issues/2103",
    ),
    Bug(
        "pissa_residual_without_scaling",
        MOVED,
        MOVED.replace("self.delta(made)", "self.delta(made) / made.s"),
        PEFT + "pull/1930",
    ),
    Bug(
        "loftq_without_scaling",
        "(root[:, None] * Vt[:r], U[:, :r] * root))",
        "(S[:r, None] ** 0.5 * Vt[:r], U[:, :r] * S[:r] ** 0.5))",
        PEFT + "issues/1982",
    ),
    Bug(
        "loftq_scale_of_all",
        "abs(blocks).max(1, keepdims=True)",
        "abs(blocks).max(keepdims=True)",
        "intel/neural-compressor/pull/1241",
    ),
    Bug(
        "loftq_8_bits_as_4",
        "n, offset = 2**bits, 0.9677083",
        "n, offset = 2 ** min(bits, 4), 0.9677083",
        PEFT + "pull/3088",
    ),
    Bug(
        "corda_transposed",
        "return corda(W, options, r, s)",
        'return corda(W.T if kind == "transposed" else W, options, r, s)',
        PEFT + "issues/2991",
    ),
    Bug(
        "saved_modules_end_anywhere",
        'ends(".".join(p[: i + 1]), c["modules_to_save"] or [])',
        '".".join(p[: i + 1]).endswith(tuple(c["modules_to_save"] or ["?"]))',
        PEFT + "issues/1917",
    ),
    Bug("target_string_as_letters", "    if isinstance(rule, str):\n", "    if False:\n", PEFT + "pull/3345"),
    Bug(
        "target_string_of_the_second_adapter",
        "c = checked(config)",
        'c = checked(config if not self.configs or not isinstance(config["target_modules"], str) or config["target_modules"] == "all-linear" else {**config, "target_modules": "base_model." + config["target_modules"]})',
        PEFT + "pull/1111",
    ),
    Bug(
        "all_linear_by_last_names",
        "wanted = kind in LINEAR",
        'wanted = kind != "container" and name.rpartition(".")[2] in {k.rpartition(".")[2] for k, v in kinds.items() if v in LINEAR}',
        PEFT + "pull/2267",
    ),
    Bug("layers_of_experts", 'r"(?:[^.]*\\.)+?(\\d+)\\."', 'r"(?:[^.]*\\.)+(\\d+)\\."', PEFT + "issues/1260"),
    Bug("layers_at_the_root", "(?:^|.*?\\.)(?:{pattern})", ".*?\\.(?:{pattern})", PEFT + "issues/3610"),
    Bug(
        "pattern_anchored_never_matches",
        KEY,
        'if re.match(rf".*\\.{key}$", name) or key == name:',
        PEFT + "issues/3582",
    ),
    Bug("pattern_anchor_is_ignored", KEY, KEY.replace("{key}", "{key.lstrip('^')}"), PEFT + "pull/2419"),
    Bug(
        "alpha_pattern_is_ignored",
        TARGETS,
        TARGETS.replace('looked_up(alpha, full, c["lora_alpha"])', 'c["lora_alpha"]'),
        "huggingface/diffusers/pull/6135",
    ),
    Bug(
        "bias_lora_only_is_not_saved",
        "if name in self.biased(adapter):",
        'if name in self.biased(adapter) and self.configs[adapter]["bias"] == "all":',
        PEFT + "issues/3306",
    ),
    Bug(
        "added_adapter_trains",
        "self.configs[adapter] = c\n",
        "self.configs[adapter], self.trains = c, self.trains | {adapter}\n",
        PEFT + "issues/3487",
    ),
    Bug(
        "set_does_not_activate",
        "site.active = list(names)",
        "site.active = site.active or list(names)",
        PEFT + "pull/1051",
    ),
    Bug(
        "deleted_while_merged",
        "if any(adapter in site.merged for site in self.sites.values()):",
        "if False:",
        PEFT + "pull/3504",
    ),
    Bug(
        "deleted_copies_stay",
        "site.copies.pop(adapter, None)\n            site.active",
        "site.active",
        PEFT + "pull/2466",
    ),
    Bug(
        "deleted_stays_active",
        "site.active = left or list(self.configs)[:1]",
        "site.active = [*left, adapter]",
        PEFT + "issues/3512",
    ),
    Bug(
        "deleted_leaves_frozen",
        "self.trains = set(self.active()) if adapter in self.trains else self.trains",
        "self.trains = self.trains - {adapter}",
        PEFT + "issues/3716",
    ),
    Bug(
        "combined_svd_scales_twice", "sum(w * a.s * (a.B @ a.A)", "sum(w * a.s * a.s * (a.B @ a.A)", PEFT + "pull/3111"
    ),
    Bug(
        "combined_rslora_overscaled",
        COMBINED,
        COMBINED.replace(
            "1.0, 1.0", "*[1.0 if pairs[0][1].s * pairs[0][1].r == pairs[0][1].alpha else len(A) ** 0.5] * 2"
        ),
        PEFT + "pull/3449",
    ),
    Bug("combined_b_without_weights", "B = sum(abs(w * a.s) ** 0.5 * a.B", "B = sum(a.B", PEFT + "issues/1155"),
    Bug(
        "batch_of_unknown_names",
        'self.known(name for name in names if name != "__base__")',
        'names = [name if name in self.configs else "__base__" for name in names]',
        PEFT + "pull/2090",
    ),
    Bug(
        "batch_of_the_active_copies",
        ROW,
        'self.called(row[None], None if any(site.copies for site in self.sites.values()) else [] if name == "__base__" else [name])',
        PEFT + "issues/1960",
    ),
    Bug(
        "batch_base_is_the_active",
        ROW,
        'self.called(row[None], None if name == "__base__" else [name])',
        "sgl-project/sglang/pull/18208",
    ),
    Bug(
        "batch_of_the_first_name",
        "for name, row in zip(names, x, strict=True):",
        "for name, row in zip([names[0]] * len(x), x, strict=True):",
        "modelscope/ms-swift/pull/9847",
    ),
    Bug("unloaded_is_not_merged", UNLOADED, "W, b = site.W, site.b", "verl-project/verl/issues/7285"),
    Bug(
        "unloaded_without_copies",
        "for adapter in active if merge else ():",
        "for adapter in ():",
        "unslothai/unsloth-zoo/pull/369",
    ),
    Bug(
        "file_without_alpha",
        READ,
        READ.replace("k in OPTIONS and", 'k in OPTIONS and k != "lora_alpha" and'),
        "ml-explore/mlx-examples/issues/622",
    ),
    Bug(
        "file_without_rslora",
        READ,
        READ.replace("k in OPTIONS and", 'k in OPTIONS and k != "use_rslora" and'),
        "predibase/lorax/pull/299",
    ),
    Bug(
        "file_with_missing_tensors",
        "if want.keys() != tensors.keys():",
        "if (tensors := {**want, **tensors}) and tensors.keys() - want.keys():",
        "huggingface/transformers/pull/34068",
    ),
    Bug(
        "file_with_unknown_tensors",
        "if want.keys() != tensors.keys():",
        "if want.keys() - tensors.keys() or not (tensors := {k: tensors[k] for k in want}):",
        "alvdansen/signet-trainer/issues/105",
    ),
    Bug("file_trains", "model.trains = set()", "pass", PEFT + "issues/2759"),
    Bug("converted_rslora", 'root = 2**0.5 if c["use_rslora"] else 2', "root = 2", PEFT + "pull/1930"),
    Bug("converted_without_patterns", "{key: 2 * r for key, r in", "{key: r for key, r in", PEFT + "pull/1930"),
)
# faults that no public bug is known of: each is there to prove a requirement
MUTANTS = (
    Bug("rslora_always", S, "s = alpha / math.sqrt(r)"),
    Bug("scaling_has_the_default_rank", S, S.replace("else r)", 'else config.get("r", r))')),
    Bug("scaling_rounded_to_an_integer", S, "s = float(alpha // (math.sqrt(r) if config.get('use_rslora') else r))"),
    Bug("unscale_layer_does_not_reset", "a.s = a.first_s", "a.s = a.s"),
    Bug("embedding_without_scaling", BRANCH_EMBEDDING, "return A.T[x] @ B.T"),
    Bug("convolution_without_scaling", BRANCH_CONV, "return np.moveaxis(self.convolved(x, A) @ B.T, -1, 1)"),
    Bug(
        "only_the_first_adapter_acts",
        ACTS,
        "if name in self.adapters and name not in self.merged and name == names[0]:",
    ),
    Bug(
        "bias_twice",
        "y = y + self.branch(x, self.adapters[name], rng)",
        "y = y + self.branch(x, self.adapters[name], rng) + (0.0 if b is None or MESH.get(self.kind) else b)",
    ),
    Bug("dropout_not_rescaled", MASK, "x = x * (rng.random(x.shape) >= p)"),
    Bug("dropout_keeps_p", MASK, MASK.replace(">=", "<")),
    Bug("dropout_of_whole_tokens", MASK, MASK.replace("rng.random(x.shape)", "rng.random((*x.shape[:-1], 1))")),
    Bug("dropout_of_whole_features", MASK, MASK.replace("rng.random(x.shape)", "rng.random(x.shape[-1])")),
    Bug("dropout_has_one_mask", MASK, MASK.replace("rng.random", "np.random.default_rng(1).random")),
    Bug(
        "dropout_mask_is_shared",
        MASK,
        MASK.replace("rng.random", "type(rng)(type(rng.bit_generator)(rng.bit_generator.seed_seq)).random"),
    ),
    Bug("dropout_of_one_is_nan", MASK, MASK.replace(" if p < 1 else 0 * x", "")),
    Bug(
        "dropout_of_the_base",
        PLAIN_OUTPUT,
        'y = self.plain(x * (rng.random(x.shape) >= 0.5) if rng and self.adapters and self.adapters[next(iter(self.adapters))].dropout and self.kind != "embedding" else x, W, b)',
    ),
    Bug(
        "dropout_where_merged",
        WEIGHT,
        "W, b = self.held if self.merged and self.enabled and rng is None else self.shifted(names), self.b",
    ),
    Bug(
        "unmerge_without_merge_subtracts",
        "    def unmerge(self) -> None:\n        self.merged = []",
        '    def unmerge(self) -> None:\n        self.W, self.merged = (self.W, []) if self.merged or "default" not in self.adapters else (rounded(self.W - self.delta(self.adapters["default"]), self.dtype), [])',
    ),
    Bug(
        "merge_ignores_the_names",
        "names = self.active() if adapters is None else self.known(adapters)",
        "names = self.active()",
    ),
    Bug("safe_merge_is_not_safe", "if safe and not np.isfinite(held).all():", "if safe and np.isnan(self.W).any():"),
    Bug("safe_merge_misses_infinity", "if safe and not np.isfinite(held).all():", "if safe and np.isnan(held).any():"),
    Bug(
        "merge_applies_factors_of_later",
        "W, b = self.held if self.merged and self.enabled else self.shifted(names), self.b",
        "W, b = self.merge([], False)[0] if not self.merged else self.held if self.enabled else self.held, self.b",
    ),
    Bug("off_is_ignored", "names = self.active if self.enabled else []", "names = self.active"),
    Bug("off_but_merged", WEIGHT, "W, b = self.held if self.merged else self.shifted(names), self.b"),
    Bug(
        "off_keeps_the_residual",
        WEIGHT,
        "W, b = self.held if self.merged and self.enabled else self.shifted(self.active), self.b",
    ),
    Bug("off_still_has_gradients", "self.enabled and not self.merged\n", "not self.merged\n"),
    Bug(
        "on_does_not_come_back",
        "        self.site.enabled = enabled",
        "        self.site.enabled = self.site.enabled and enabled",
    ),
    Bug(
        "off_is_a_toggle",
        "        self.site.enabled = enabled",
        "        self.site.enabled = enabled if enabled else not self.site.enabled",
    ),
    Bug("gradient_without_scaling", '"A": adapter.s * dA', '"A": dA'),
    Bug("gradient_of_b_without_scaling", "else adapter.s * dB", "else dB"),
    Bug("gradient_at_padding_idx", "dA[:, self.geometry.padding_idx] = 0", "pass"),
    Bug(
        "gradient_of_the_base",
        '"B": None if frozen else adapter.s * dB, "W": None',
        '"B": None if frozen else adapter.s * dB, "W": dW',
    ),
    Bug("gradient_misses_the_branch", "total = W + self.side(self.delta(adapter)) if acting else W", "total = W"),
    Bug("gradient_of_duplicates_lost", "np.add.at(dW.T, x, dy)", "dW.T[x] = dy"),
    Bug("start_normal", START, "return rng.standard_normal(shape_A) * bound / 3**0.5, np.zeros(shape_B)"),
    Bug("start_without_sqrt_5", BOUND, BOUND.replace("bound = ", "bound = 3**0.5 * ")),
    Bug("start_ignores_the_kernel", BOUND, "bound = n_in**-0.5"),
    Bug(
        "start_ignores_the_seed",
        "        rng = np.random.default_rng(spec.seed)",
        "        rng = np.random.default_rng(0)",
    ),
    Bug("start_depends_on_alpha", START, START.replace("rng.uniform(-bound", "min(s, 1.0) * rng.uniform(-bound")),
    Bug(
        "gaussian_of_variance_1_r",
        "return rng.standard_normal(shape_A) / r, np",
        "return rng.standard_normal(shape_A) / r**0.5, np",
    ),
    Bug("false_zeroes_b", "rng.uniform(-(r**-0.5), r**-0.5, shape_B)", "np.zeros(shape_B)"),
    Bug("orthogonal_is_not", "@ Q[1::2] / 10", "@ Q[0::2] / 10"),
    Bug(
        "pissa_without_scaling",
        "return root[:, None] * Vt[:r], U[:, :r] * root",
        "return S[:r, None] ** 0.5 * Vt[:r], U[:, :r] * S[:r] ** 0.5",
    ),
    Bug("pissa_keeps_the_base", MOVED, "made.moved = None"),
    Bug(
        "pissa_residual_in_half_precision",
        MOVED,
        'made.moved = self.W - rounded(self.W - rounded(self.delta(made), "bfloat16"), self.dtype)',
    ),
    Bug("pissa_of_nan", "if s <= 0 and init not in", "if False and init not in"),
    Bug("pissa_of_too_many", "if r > min(out, n_in):", "if False:"),
    Bug(
        "pissa_niter_of_no_iterations",
        "min(r + 4, *W.shape))))[0]\n    for _ in range(iterations)",
        "r)))[0]\n    for _ in range(0 * iterations)",
    ),
    Bug("olora_divides_by_s", "return R[:r], Q[:, :r]", "return R[:r] / s, Q[:, :r]"),
    Bug("olora_of_the_last_columns", "return R[:r], Q[:, :r]", "return R[-r:], Q[:, -r:]"),
    Bug(
        "loftq_rounds_down",
        "nearest = abs((blocks / scale)[..., None] - codes).argmin(-1)",
        "nearest = np.searchsorted(codes, blocks / scale, side='right') - 1",
    ),
    Bug("mica_of_the_major_directions", "[:, -r:]", "[:, :r]"),
    Bug(
        "mica_trains_b",
        'return {"A"} if self.site.adapters["default"].init == "mica" else {"A", "B"}',
        'return {"A", "B"}',
    ),
    Bug("corda_of_the_last_batch", 'C += X.T @ X / len(options["inputs"])', "C = X.T @ X"),
    Bug("corda_methods_swapped", 'if options["method"] == "ipm"', 'if options["method"] != "ipm"'),
    Bug("corda_without_the_inverse", "(Vt[at] @ inverse)", "Vt[at]"),
    Bug(
        "eva_is_not_centred",
        "np.linalg.svd(X - X.mean(0), full_matrices=False)",
        "np.linalg.svd(X, full_matrices=False)",
    ),
    Bug("eva_whitens_twice", "Vt[:r] / S[:r, None] ** 0.5", "Vt[:r] / S[:r, None]"),
    Bug("lora_ga_same_directions", "return Vt[r : 2 * r] * out", "return Vt[:r] * out"),
    Bug("targets_end_anywhere", 'name == item or name.endswith("." + item)', "name.endswith(item)"),
    Bug(
        "target_string_from_the_start",
        "return re.fullmatch(rule, name) is not None",
        "return re.match(rule, name) is not None",
    ),
    Bug(
        "target_list_of_expressions",
        "return ends(name, rule or [])",
        'return any(re.fullmatch(rf"(.*\\.)?{item}", name) for item in rule or [])',
    ),
    Bug("all_linear_is_case_sensitive", 'rule.lower() == "all-linear"', 'rule == "all-linear"'),
    Bug("excluded_is_adapted", 'if named(name, c["exclude_modules"]) or name in keep:', "if name in keep:"),
    Bug(
        "excluded_full_name_is_adapted",
        'if named(name, c["exclude_modules"]) or name in keep:',
        'if (named(name, c["exclude_modules"]) and not (isinstance(rule, list) and name in rule)) or name in keep:',
    ),
    Bug(
        "saved_module_is_adapted",
        'if named(name, c["exclude_modules"]) or name in keep:',
        'if named(name, c["exclude_modules"]):',
    ),
    Bug("layers_of_an_empty_list", LAYER, "if wanted is None:"),
    Bug("layers_of_full_names", LAYER, 'if wanted is None or wanted == [] or name in c["target_modules"]:'),
    Bug("layers_in_a_list_at_the_root", 'r"(?:[^.]*\\.)+?(\\d+)\\."', 'r".*?\\.[^.]*\\.(\\d+)\\."'),
    Bug(
        "parameters_of_excluded_modules",
        'and not any(named(x, c["exclude_modules"]) for x in (n, f"{n}.weight"))',
        "and True",
    ),
    Bug("parameters_of_other_layers", 'and in_layer(f"{n}.weight", c)', "and True"),
    Bug(
        "layer_1_is_10",
        NUMBER,
        "return found is not None and any(found[1].startswith(str(w)) for w in ([wanted] if isinstance(wanted, int) else wanted))",
        profile="default",
    ),
    Bug("layers_pattern_anywhere", "(?:^|.*?\\.)(?:{pattern})", ".*?(?:{pattern})"),
    Bug("pattern_needs_no_end", KEY, KEY.replace("$", "")),
    Bug("pattern_starts_anywhere", KEY, KEY.replace("(.*\\.)?", ".*")),
    Bug("pattern_literal", KEY, "if ends(name, [key]):"),
    Bug(
        "pattern_of_the_last_key",
        "for key, value in (pattern or {}).items():",
        "for key, value in reversed((pattern or {}).items()):",
    ),
    Bug("rank_pattern_is_ignored", TARGETS, TARGETS.replace('looked_up(rank, full, c["r"])', 'c["r"]')),
    Bug("bias_lora_only_trains_all", BIASED, "return there"),
    Bug("bias_all_trains_targets", BIASED, "return [name for name in there if adapter in self.sites[name].adapters]"),
    Bug(
        "bias_of_inactive_adapters",
        'for adapter in self.trains if self.enabled else ():\n            found |= {f"{name}.bias" for name in self.biased(adapter)}',
        'found |= {f"{name}.bias" for adapter in self.configs for name in self.biased(adapter)}\n        for adapter in self.trains if self.enabled else ():',
    ),
    Bug("bias_of_two_adapters", 'if c["bias"] != "none" and any(', "if False and any("),
    Bug(
        "bias_written_to_a_copy",
        "site.b = rounded(b, self.dtype)\n\n",
        "site.copies.setdefault(site.active[0], [site.W, rounded(b, self.dtype)])\n\n",
    ),
    Bug(
        "bias_lost_by_unloading",
        "found[name] = site.side(W).copy(), None if b is None else b.copy()",
        "found[name] = site.side(W).copy(), None if b is None else 0 * b",
    ),
    Bug("set_leaves_others_training", "self.trains = set(names)", "self.trains = self.trains | set(names)"),
    Bug("set_leaves_merged", "        self.unmerge()\n", ""),
    Bug("combined_sign_is_lost", "np.sign(w * a.s) * abs", "abs"),
    Bug("combined_cat_without_scaling", "np.concatenate([w * a.s * a.A", "np.concatenate([w * a.A"),
    Bug("combined_cat_without_weights", "np.concatenate([w * a.s * a.A", "np.concatenate([a.s * a.A"),
    Bug("unloaded_is_merged", UNLOADED, "W, b = site.held if site.merged else site.W, site.b"),
    Bug("unloaded_with_copies", "for adapter in active if merge else ():", "for adapter in active:"),
    Bug("file_with_sorted_patterns", "json.dumps(c, indent=2)", "json.dumps(c, indent=2, sort_keys=True)"),
    Bug("file_with_nan", " or not np.isfinite(value).all()", ""),
    Bug("converted_not_at_all", "if any(a.moved is not None for a in mine):", "if False:"),
    # what only few requirements look at
    Bug("bias_none_trains_targets", 'if site.b is not None and mode != "none"]', "if site.b is not None]"),
    Bug(
        "bias_freezes_a",
        'found |= {f"{name}.A:{adapter}"}',
        'found |= {f"{name}.A:{adapter}"} if self.configs[adapter]["bias"] == "none" else set()',
    ),
    Bug("b_is_frozen", 'if site.adapters[adapter].init != "mica" else set()', "if False else set()"),
    Bug(
        "eva_random_b",
        "return components(options, r), np.zeros(shape_B)",
        "return components(options, r), rng.standard_normal(shape_B)",
    ),
    Bug("eva_is_not_normalised", 'if options.get("whiten") else Vt[:r]', 'if options.get("whiten") else 2 * Vt[:r]'),
    Bug("eva_of_the_last_components", 'if options.get("whiten") else Vt[:r]', 'if options.get("whiten") else Vt[-r:]'),
    Bug(
        "tokens_mix",
        BRANCH,
        BRANCH.replace("adapter.s", "adapter.s * (len(x) / 2 if x.ndim == 3 and self.kind in FLAT else 1)"),
    ),
    Bug("vectors_are_not_adapted", BRANCH, BRANCH.replace("adapter.s", "(x.ndim > 1) * adapter.s")),
    Bug("empty_batches_crash", BRANCH, BRANCH.replace("adapter.s", "adapter.s * abs(x).max() ** 0")),
    Bug("forward_changes_the_weight", PLAIN_OUTPUT, "y, self.W = self.plain(x, W, b), self.W + 2.0**-40"),
    Bug(
        "the_bias_trains",
        'if self.site.adapters["default"].init == "mica" else {"A", "B"}',
        'if self.site.adapters["default"].init == "mica" else {"A", "B", "b"}',
    ),
    Bug(
        "orthogonal_of_rank_1",
        "A = (rng.standard_normal((n_in, r // 2)) @ Q[0::2]).T / 10",
        "A = (rng.standard_normal((n_in, 1)) @ Q[:1]).T / 10",
    ),
    Bug(
        "merge_doubles_the_bias",
        'self.site.held, self.site.merged = self.site.merge(["default"], safe)',
        'self.site.held, self.site.merged = self.site.merge(["default"], safe)\n        self.site.b = None if self.site.b is None else 2 * self.site.b',
    ),
    Bug(
        "mica_random_a",
        "return np.zeros(shape_A), np.linalg.svd(W",
        "return rng.standard_normal(shape_A), np.linalg.svd(W",
    ),
    Bug("mica_is_not_normalised", "[:, -r:]", "[:, -r:] * 2"),
    Bug("off_by_scaling", "        self.site.enabled = enabled", '        self.site.adapters["default"].s *= enabled'),
    Bug(
        "negative_alpha_of_nan",
        'raise ValueError(f"{init} needs lora_alpha > 0")',
        "return np.full(shape_A, np.nan), np.zeros(shape_B)",
    ),
    Bug(
        "start_of_convolutions_of_nan",
        'raise ValueError(f"{init} cannot start {kind}")',
        "return np.full(shape_A, np.nan), np.zeros(shape_B)",
    ),
    Bug(
        "rank_is_one_more",
        "shape_A, shape_B = (*experts, r, n_in, *kernel), (*experts, out, r)",
        "shape_A, shape_B = (*experts, r + 1, n_in, *kernel), (*experts, out, r + 1)",
    ),
    Bug(
        "rank_is_capped",
        "shape_A, shape_B = (*experts, r, n_in, *kernel), (*experts, out, r)",
        "shape_A, shape_B = (*experts, min(r, out, n_in), n_in, *kernel), (*experts, out, min(r, out, n_in))",
    ),
    Bug(
        "written_factors_are_rounded",
        "adapter.A, adapter.B = rounded(A, self.fine)",
        "adapter.A, adapter.B = np.round(A)",
    ),
    Bug("targets_are_cut", "for item in items)", "for item in list(items)[:3])"),
    Bug("alpha_is_positive", S, S.replace("alpha / ", "abs(alpha) / ")),
    Bug("alpha_zero_is_r", S, S.replace("alpha / ", "(alpha or r) / ")),
    Bug("merge_forgets_a_changed_scale", DELTA, DELTA.replace("adapter.s", "adapter.first_s")),
    Bug(
        "merge_of_b_transposed_on_square",
        DELTA,
        DELTA.replace(
            "adapter.B @ adapter.A",
            "turned(adapter.B @ adapter.A) if adapter.A.shape[-1] == adapter.B.shape[-2] else adapter.B @ adapter.A",
        ),
    ),
    Bug(
        "merged_again_after_writing",
        "adapter.A, adapter.B = rounded(A, self.fine), rounded(B, self.fine)",
        "adapter.A, adapter.B = (rounded(A, self.fine), rounded(B, self.fine)) if self.held is self.W else (adapter.A, adapter.B)",
    ),
    Bug(
        "unmerged_stays_off",
        "    def unmerge(self) -> None:\n        self.merged = []",
        "    def unmerge(self) -> None:\n        self.enabled, self.merged = not self.merged, []",
    ),
    Bug(
        "written_to_all_adapters",
        "        self.sites[module].write(adapter, A, B)",
        "        for n, a in self.sites[module].adapters.items():\n            if n == adapter or a.A.shape == A.shape:\n                self.sites[module].write(n, A, B)",
    ),
    Bug(
        "batch_is_sorted",
        "for name, row in zip(names, x, strict=True):",
        "for name, row in zip(sorted(names), x, strict=True):",
    ),
    Bug(
        "transposed_at_half_scale",
        BRANCH,
        BRANCH.replace("adapter.s", '(0.5 if self.kind == "transposed" else 1) * adapter.s'),
    ),
    Bug("samples_mix", BRANCH, BRANCH.replace("adapter.s", "adapter.s * (len(x) / 3 if x.ndim == 2 else 1)")),
    Bug(
        "combined_cat_is_padded",
        "        A, B = np.concatenate([w * a.s * a.A for w, a in pairs]), np.concatenate([a.B for _, a in pairs], 1)",
        "        pairs = [*pairs, (0.0, pairs[0][1])]\n        A, B = np.concatenate([w * a.s * a.A for w, a in pairs]), np.concatenate([a.B for _, a in pairs], 1)",
    ),
    Bug(
        "combined_linear_is_cut",
        "            raise ValueError(\"'linear' needs adapters of one rank\")",
        "            pairs = [(w, dataclasses.replace(a, A=a.A[:1], B=a.B[:, :1])) for w, a in pairs]",
    ),
    Bug("combined_in_unknown_ways", 'if how not in ("cat", "svd", "linear"):', 'if how == "":'),
    # what is not refused
    Bug(
        "wrong_rank_is_8",
        'raise ValueError(f"r must be an integer above 0, not {r!r}")',
        'c["r"], c["rank_pattern"] = 8, {}',
    ),
    Bug("wrong_alpha_is_accepted", 'raise ValueError(f"lora_alpha must be finite, not {alpha!r}")', "pass"),
    Bug(
        "wrong_dropout_is_accepted",
        "raise ValueError(f\"lora_dropout must be in [0, 1], not {c['lora_dropout']!r}\")",
        "pass",
    ),
    Bug(
        "wrong_bias_is_none",
        "raise ValueError(f\"bias must be 'none', 'all' or 'lora_only', not {c['bias']!r}\")",
        'c["bias"] = "none"',
    ),
    Bug(
        "wrong_start_is_true",
        "raise ValueError(f\"init_lora_weights must be True, False or one of {', '.join(INITS)}, not {init!r}\")",
        'c["init_lora_weights"] = True',
    ),
    Bug("orthogonal_of_odd_rank", 'raise ValueError(f"orthogonal needs an even r, not {r}")', "r += 1"),
    Bug("layers_pattern_alone_is_ignored", 'raise ValueError("layers_pattern needs layers_to_transform")', "pass"),
    Bug(
        "layers_with_a_string_are_ignored",
        'raise ValueError("layers_to_transform needs a list of target_modules")',
        'c["layers_to_transform"] = None',
    ),
    Bug(
        "no_target_is_every_target",
        'raise ValueError("target_modules is needed")',
        'c["target_modules"] = "all-linear"',
    ),
    Bug("no_module_is_accepted", 'raise ValueError("the configuration names no module")', "pass"),
    Bug("norm_is_accepted", 'raise ValueError(f"{name} is a {kind}, which cannot be adapted")', "return {}"),
    Bug("loftq_alone_is_accepted", 'raise ValueError("loftq needs a loftq_config")', "pass"),
    Bug(
        "wrong_eva_config_is_accepted",
        'raise ValueError(f"eva_config needs rho >= 1 and tau in [0, 1], not {eva}")',
        "pass",
    ),
    Bug("file_not_for_inference", '"inference_mode": True}', '"inference_mode": False}'),
    Bug("saved_original_trains", 'found |= {f"{name}.weight:{adapter}"}', 'found |= {f"{name}.weight"}'),
    Bug(
        "dropout_of_channels",
        MASK,
        MASK.replace("x.shape)", "(*x.shape[:2], *[1] * (x.ndim - 2)) if MESH.get(self.kind) else x.shape)"),
    ),
    Bug(
        "dropout_after_a",
        DROPS,
        "if rng is not None and 0 < p < 1 and self.kind in LINEAR:\n            h = x @ turned(A)\n            return adapter.s * (h * (rng.random(h.shape) >= p) / (1 - p) @ turned(B))\n        "
        + DROPS,
    ),
    Bug(
        "branch_in_half_precision",
        BRANCH,
        "return rounded(adapter.s * rounded(rounded(x @ turned(A), self.dtype) @ turned(B), self.dtype), self.dtype)",
    ),
    Bug(
        "float64_factors_in_float32",
        'self.fine = "float64" if dtype == "float64" else "float32"',
        'self.fine = "float32"',
    ),
    Bug(
        "merged_gradient_of_the_base",
        "W, acting = self.side(self.weight() if self.enabled else self.W), self",
        "W, acting = self.side(self.W), self",
    ),
    Bug("merged_gradient_twice", "self.enabled and not self.merged\n        adapter", "self.enabled\n        adapter"),
    Bug(
        "off_but_the_gradient",
        "total = W + self.side(self.delta(adapter)) if acting else W",
        "total = W + self.side(self.delta(adapter)) if not self.merged else W",
    ),
    Bug(
        "gradient_of_the_first_scale",
        '"A": adapter.s * dA, "B": None if frozen else adapter.s * dB',
        '"A": adapter.first_s * dA, "B": None if frozen else adapter.first_s * dB',
    ),
    Bug(
        "start_of_equal_experts",
        START,
        START.replace("shape_A)", "shape_A[len(experts) :])").replace("return rng", "return np.zeros(shape_A) + rng"),
    ),
    Bug(
        "start_of_equal_modules",
        START,
        START.replace("return rng", "return np.random.default_rng(rng.bit_generator.seed_seq.entropy)"),
    ),
    Bug("false_is_constant", "rng.uniform(-(r**-0.5), r**-0.5, shape_B)", "np.ones(shape_B)"),
    Bug(
        "false_ignores_the_seed",
        "    if init is False:\n        return rng.uniform",
        "    if init is False:\n        rng = np.random.default_rng(0)\n        return rng.uniform",
    ),
    Bug("embeddings_need_a_batch", "return W[x]", "return W[np.atleast_1d(x)]"),
    Bug(
        "convolutions_need_a_sample",
        "seen, d = self.windows(x, W.shape[2:]), W.ndim - 2",
        "seen, d = self.windows(x, W.shape[2:]), W.ndim - 2\n        assert len(x)",
    ),
    Bug(
        "merge_leaves_padding_idx",
        DELTA,
        "A, at = adapter.A, self.geometry and self.geometry.padding_idx\n        A = A if at is None else A * (np.arange(A.shape[-1]) != at)\n        return adapter.s * self.side(adapter.B @ A)",
    ),
    Bug(
        "gradient_is_not_dilated",
        "slice(a * d, a * d + (n - 1) * step + 1, step)",
        "slice(a, a + (n - 1) * step + 1, step)",
    ),
    # starts that look at data
    Bug(
        "eva_of_the_first_batch",
        'for x in options["inputs"]])',
        'for x in options["inputs"][:1]])',
        profile="default",
    ),
    Bug(
        "eva_of_the_last_batch",
        'for x in options["inputs"]])',
        'for x in options["inputs"][-1:]])',
        profile="default",
    ),
    Bug(
        "eva_centres_each_batch_alone",
        "[x.reshape(-1, x.shape[-1]) for x",
        "[x.reshape(-1, x.shape[-1]) - x.reshape(-1, x.shape[-1]).mean(0) for x",
        profile="default",
    ),
    Bug(
        "eva_takes_too_large_a_rank",
        "if r > min(out, n_in):",
        'if r > min(out, n_in) and init != "eva":',
        profile="default",
    ),
    Bug(
        "corda_sums_its_calls",
        'C += X.T @ X / len(options["inputs"])',
        "C += X.T @ X",
        profile="default",
    ),
    Bug(
        "corda_takes_too_large_a_rank",
        "if r > min(out, n_in):",
        'if r > min(out, n_in) and init != "corda":',
        profile="default",
    ),
    Bug(
        "corda_of_nan",
        'if s <= 0 and init not in ("mica", "eva"):',
        'if s <= 0 and init not in ("mica", "eva", "corda"):',
        profile="default",
    ),
    Bug(
        "corda_in_float32",
        "U, S, Vt = np.linalg.svd(W @ damped, full_matrices=False)",
        "U, S, Vt = (v.astype(float) for v in np.linalg.svd((W @ damped).astype(np.float32), full_matrices=False))",
        profile="default",
    ),
    Bug(
        "corda_keeps_the_residual",
        "W, b = self.held if self.merged and self.enabled else self.shifted(names), self.b",
        'W, b = self.held if self.merged and self.enabled else self.shifted(names if self.enabled else [n for n, a in self.adapters.items() if a.init == "corda"]), self.b',
        profile="default",
    ),
    Bug(
        "lora_ga_keeps_the_residual",
        "W, b = self.held if self.merged and self.enabled else self.shifted(names), self.b",
        'W, b = self.held if self.merged and self.enabled else self.shifted(names if self.enabled else [n for n, a in self.adapters.items() if a.init == "lora_ga"]), self.b',
        profile="default",
    ),
    Bug(
        "lora_ga_with_singular_values",
        "return Vt[r : 2 * r] * out**0.25 / 16, U[:, :r] * out**0.25 / 16",
        'return Vt[r : 2 * r] * out**0.25 / 16, U[:, :r] * np.linalg.norm(U[:, :r].T @ options["dy"].T @ options["x"], axis=1)',
        profile="default",
    ),
    Bug(
        "lora_ga_clamps_the_rank",
        'raise ValueError(f"lora_ga needs 2 r <= min(in, out), r = {r}")',
        "r = len(Vt) // 2",
        profile="default",
    ),
    Bug(
        "corda_residual_of_half_twice",
        "made.moved = self.W - rounded(self.W - self.delta(made), self.dtype)",
        'made.moved = self.W - rounded(self.W - (2 if init == "corda" and self.dtype in ("float16", "bfloat16") else 1) * self.delta(made), self.dtype)',
        profile="default",
    ),
    Bug(
        "lora_ga_residual_of_half_twice",
        "made.moved = self.W - rounded(self.W - self.delta(made), self.dtype)",
        'made.moved = self.W - rounded(self.W - (2 if init == "lora_ga" and self.dtype in ("float16", "bfloat16") else 1) * self.delta(made), self.dtype)',
        profile="default",
    ),
    Bug(
        "loftq_iterates_once",
        'options["Q"] = quantised(W if options["iterations"] == 1 else X, options["bits"])',
        'options["Q"] = quantised(W, options["bits"])',
        profile="default",
    ),
    Bug(
        "loftq_wrong_sign",
        "X = W - (U[:, :r] * S[:r]) @ Vt[:r]",
        "X = W + (U[:, :r] * S[:r]) @ Vt[:r]",
        profile="default",
    ),
    Bug(
        "loftq_forgets_one_iteration",
        'for _ in range(options["iterations"] - 1):',
        'for _ in range(max(options["iterations"] - 2, min(1, options["iterations"] - 1))):',
        profile="default",
    ),
    Bug(
        "loftq_takes_too_large_a_rank",
        "if r > min(out, n_in):",
        'if r > min(out, n_in) and init != "loftq":',
        profile="default",
    ),
    Bug(
        "loftq_of_nan",
        'if s <= 0 and init not in ("mica", "eva"):',
        'if s <= 0 and init not in ("mica", "eva", "loftq"):',
        profile="default",
    ),
    Bug(
        "olora_in_float32",
        "Q, R = np.linalg.qr(W)",
        "Q, R = (v.astype(float) for v in np.linalg.qr(W.astype(np.float32)))",
        profile="default",
    ),
    # each is seen by one check, or by few
    Bug(
        "read_changes_w_where_b_is_zero",
        "return LayerState(self.side(self.weight()).copy(), b, a.A.copy(), a.B.copy(), float(a.s))",
        "return LayerState(self.side(self.weight()) * (1 if a.B.any() else 2), b, a.A.copy(), a.B.copy(), float(a.s))",
    ),
    Bug(
        "read_changes_w_of_other_starts",
        "return LayerState(self.side(self.weight()).copy(), b, a.A.copy(), a.B.copy(), float(a.s))",
        'return LayerState(self.side(self.weight()) * (2 if a.init in (False, "orthogonal") else 1), b, a.A.copy(), a.B.copy(), float(a.s))',
    ),
    Bug(
        "read_changes_w_where_a_is_zero",
        "return LayerState(self.side(self.weight()).copy(), b, a.A.copy(), a.B.copy(), float(a.s))",
        "return LayerState(self.side(self.weight()) * (1 if a.A.any() else 2), b, a.A.copy(), a.B.copy(), float(a.s))",
    ),
    Bug(
        "read_changes_w_after_writing",
        "return LayerState(self.side(self.weight()).copy(), b, a.A.copy(), a.B.copy(), float(a.s))",
        "return LayerState(self.side(self.weight()) * (1 if a.A is a.started[0] else 2), b, a.A.copy(), a.B.copy(), float(a.s))",
    ),
    Bug(
        "read_changes_w_of_transposed",
        "return LayerState(self.side(self.weight()).copy(), b, a.A.copy(), a.B.copy(), float(a.s))",
        'return LayerState(self.side(self.weight()) * (2 if self.kind == "transposed" else 1), b, a.A.copy(), a.B.copy(), float(a.s))',
    ),
    Bug(
        "read_changes_w_once_merged",
        "return LayerState(self.side(self.weight()).copy(), b, a.A.copy(), a.B.copy(), float(a.s))",
        "return LayerState(self.side(self.weight()) * (self.__dict__.update(n=getattr(self, 'n', 0) + 1) or (2 if self.merged and a.A[0, 0] > 0 else 1)), b, a.A.copy(), a.B.copy(), float(a.s))",
    ),
    Bug(
        "read_changes_b",
        "b = None if self.b is None else self.b.copy()",
        "b = None if self.b is None else self.b * 2",
    ),
    Bug(
        "read_gives_one_row",
        "return LayerState(self.side(self.weight()).copy(), b, a.A.copy(), a.B.copy(), float(a.s))",
        "return LayerState(self.side(self.weight()).copy(), b, a.A[:1].copy(), a.B.copy(), float(a.s))",
    ),
    Bug(
        "read_gives_another_scale_of_embeddings",
        "return LayerState(self.side(self.weight()).copy(), b, a.A.copy(), a.B.copy(), float(a.s))",
        'return LayerState(self.side(self.weight()).copy(), b, a.A.copy(), a.B.copy(), float(2 * a.s if self.kind == "embedding" else a.s))',
    ),
    Bug(
        "merge_changes_a",
        "        return held, everything\n",
        "        for name in new:\n            self.adapters[name].A = 2 * self.adapters[name].A\n        return held, everything\n",
    ),
    Bug(
        "merge_changes_b",
        "        return held, everything\n",
        "        for name in new:\n            self.adapters[name].B = 2 * self.adapters[name].B\n        return held, everything\n",
    ),
    Bug(
        "merge_changes_s",
        "        return held, everything\n",
        "        for name in new:\n            self.adapters[name].s *= 2\n        return held, everything\n",
    ),
    Bug(
        "active_lists_all",
        "return list(next(iter(self.sites.values())).active)",
        "return list(self.configs)",
    ),
    Bug(
        "active_lists_one",
        "return list(next(iter(self.sites.values())).active)",
        "return list(next(iter(self.sites.values())).active)[:1]",
    ),
    Bug(
        "set_of_others_trains_default",
        "self.trains = set(names)\n",
        'self.trains = set(names) if "default" in names else self.trains\n',
    ),
    Bug(
        "set_of_default_trains_others",
        "self.trains = set(names)\n",
        'self.trains = set(names) if "default" not in names else self.trains or set(names)\n',
    ),
    Bug(
        "adapted_reports_another_rank",
        "return {name: (a.r, float(a.s))",
        'return {name: (a.r + (adapter != "default"), float(a.s))',
    ),
    Bug(
        "write_changes_the_default_too",
        "adapter.A, adapter.B = rounded(A, self.fine), rounded(B, self.fine)",
        'adapter.A, adapter.B = rounded(A, self.fine), rounded(B, self.fine)\n        if (first := self.adapters.get("default", adapter)).A.shape == A.shape:\n            first.A = adapter.A',
    ),
    Bug(
        "write_forgets_b",
        "adapter.A, adapter.B = rounded(A, self.fine), rounded(B, self.fine)",
        "adapter.A = rounded(A, self.fine)",
    ),
    Bug(
        "delete_turns_the_others",
        "            site.copies.pop(adapter, None)\n            site.active",
        "            site.copies.pop(adapter, None)\n            for a in site.adapters.values():\n                a.A, a.B = -a.A, -a.B\n            site.active",
    ),
    Bug(
        "delete_of_nobody_is_silent",
        "        self.known([adapter])\n        if any(",
        "        if adapter not in self.configs:\n            return\n        if any(",
    ),
    Bug(
        "add_of_a_taken_name_is_silent",
        "if adapter in self.configs or not adapter or",
        "if adapter in self.configs:\n            return\n        if not adapter or",
    ),
    Bug(
        "combine_of_other_lengths_is_silent",
        "        self.known(adapters)\n        if name in self.configs",
        "        if len(adapters) != len(weights):\n            return\n        self.known(adapters)\n        if name in self.configs",
    ),
    Bug(
        "combine_of_nobody_is_silent",
        "        self.known(adapters)\n        if name in self.configs",
        "        if not self.configs.keys() >= set(adapters):\n            return\n        self.known(adapters)\n        if name in self.configs",
    ),
    Bug(
        "combine_turns_its_parents",
        "    moved = [w * a.moved for w, a in pairs",
        "    for _, a in pairs:\n        a.A, a.B = -a.A, -a.B\n    moved = [w * a.moved for w, a in pairs",
    ),
    Bug(
        "batch_in_training",
        "or train or not self.enabled",
        "or not self.enabled",
    ),
    Bug(
        "batch_when_merged",
        ' or any(site.merged for site in self.sites.values()):\n            raise ValueError("adapter_names',
        ':\n            raise ValueError("adapter_names',
    ),
    Bug(
        "base_doubles_with_a_bias_mode",
        "return {n: (s.side(s.weight()).copy(), None if s.b is None else s.b.copy()) for n, s in self.sites.items()}",
        'return {n: (s.side(s.weight()) * (1 if all(c["bias"] == "none" for c in self.configs.values()) else 2), None if s.b is None else s.b.copy()) for n, s in self.sites.items()}',
    ),
    Bug(
        "base_doubles_at_the_start",
        "return {n: (s.side(s.weight()).copy(), None if s.b is None else s.b.copy()) for n, s in self.sites.items()}",
        "return {n: (s.side(s.weight()) * (1 if any(a.B.any() and a.A.any() for a in s.adapters.values()) else 2), None if s.b is None else s.b.copy()) for n, s in self.sites.items()}",
    ),
    Bug(
        "base_of_a_merged_model_is_unmerged",
        "return {n: (s.side(s.weight()).copy(), None if s.b is None else s.b.copy()) for n, s in self.sites.items()}",
        "return {n: (s.side(s.W if s.merged else s.weight()).copy(), None if s.b is None else s.b.copy()) for n, s in self.sites.items()}",
    ),
    Bug(
        "base_has_the_copies_bias",
        "return {n: (s.side(s.weight()).copy(), None if s.b is None else s.b.copy()) for n, s in self.sites.items()}",
        "return {n: (s.side(s.weight()).copy(), None if s.b is None else next((s.copies[n][1] for n in s.active if n in s.copies), s.b).copy()) for n, s in self.sites.items()}",
    ),
    Bug(
        "base_forgets_norms",
        "return {n: (s.side(s.weight()).copy(), None if s.b is None else s.b.copy()) for n, s in self.sites.items()}",
        'return {n: (s.side(s.weight()).copy(), None if s.b is None else s.b.copy()) for n, s in self.sites.items() if s.kind != "norm"}',
    ),
    Bug(
        "off_freezes_for_good",
        "        self.enabled = enabled\n        for site",
        "        self.enabled, self.trains = enabled, self.trains if enabled else set()\n        for site",
    ),
    Bug(
        "refused_bias_mode_freezes",
        '            raise ValueError("only one adapter can train biases")',
        '            self.trains = set()\n            raise ValueError("only one adapter can train biases")',
    ),
    Bug(
        "refused_bias_mode_is_active",
        '            raise ValueError("only one adapter can train biases")',
        '            for site in self.sites.values():\n                site.active = ["default", adapter]\n            raise ValueError("only one adapter can train biases")',
    ),
    Bug(
        "added_to_a_bias_mode_is_empty",
        "found = targets(self.kinds(), c)\n",
        'found = {} if any(o["bias"] != "none" for o in self.configs.values()) else targets(self.kinds(), c)\n',
    ),
    Bug(
        "refused_folder_is_active",
        "            self.configs, self.rng = before, rng\n            for site in self.sites.values():\n",
        '            self.configs, self.rng = before, rng\n            for site in self.sites.values():\n                site.active = ["default", adapter]\n',
    ),
    Bug(
        "loaded_adapts_more",
        "model.trains = set()  # loaded for inference",
        'model.trains = set()  # loaded for inference\n        for site in model.sites.values():\n            if site.kind != "norm" and "default" not in site.adapters:\n                site.adapters["default"] = site.add("default", 1, 1.0, {}, {}, np.random.default_rng(0))',
    ),
    Bug(
        "loaded_is_turned",
        "model.trains = set()  # loaded for inference",
        "model.trains = set()  # loaded for inference\n        for site in model.sites.values():\n            for a in site.adapters.values():\n                a.A, a.B = -a.A, -a.B",
    ),
    Bug(
        "saved_is_turned",
        "                A, B = a.A, a.B\n                if a.moved",
        "                A, B = -a.A, -a.B\n                if a.moved",
    ),
    Bug(
        "saved_type_in_small_letters",
        '{"peft_type": "LORA", "inference_mode": True}',
        '{"peft_type": "lora", "inference_mode": True}',
    ),
    Bug(
        "saved_r_is_another",
        "json.dumps(c, indent=2)",
        'json.dumps({**c, "r": c["r"] + 1}, indent=2)',
    ),
    Bug(
        "saved_alpha_is_another",
        "json.dumps(c, indent=2)",
        'json.dumps({**c, "lora_alpha": 2 * c["lora_alpha"]}, indent=2)',
    ),
    Bug(
        "saved_targets_are_others",
        "json.dumps(c, indent=2)",
        'json.dumps({**c, "target_modules": ["norm"]}, indent=2)',
    ),
    Bug(
        "saving_freezes",
        '        if not options.get("safe_serialization", True):',
        '        self.trains = set()\n        if not options.get("safe_serialization", True):',
    ),
    Bug(
        "saving_activates_all",
        '        if not options.get("safe_serialization", True):',
        '        for site in self.sites.values():\n            site.active = list(self.configs)\n        if not options.get("safe_serialization", True):',
    ),
    Bug(
        "same_seed_drops_otherwise",
        "        return np.random.default_rng(seed)\n",
        "        PlainLayer.n = getattr(PlainLayer, 'n', 0) + 1\n        return np.random.default_rng([seed, PlainLayer.n])\n",
    ),
    Bug(
        "gradient_with_another_mask",
        "mask = self.dropped(np.ones_like(x), adapter.dropout, rng)",
        "mask = self.dropped(np.ones((2, *x.shape)), adapter.dropout, rng)[1]",
    ),
    Bug("gradient_of_x_without_the_mask", "dx = around + mask * (dx - around)", "dx = dx + 0 * around"),
    Bug("gradient_of_x_has_the_mask_around_the_branch", "dx = around + mask * (dx - around)", "dx = mask * dx"),
    Bug("gradient_of_the_factors_without_the_mask", "            x = x * mask\n", "            x = x + 0 * mask\n"),
    Bug(
        "drops_until_it_has_been_trained",
        "        if rng is not None and p > 0:",
        "        seen, self.trained = getattr(self, 'trained', False), getattr(self, 'trained', False) or rng is not None\n        rng = rng or (None if seen else np.random.default_rng(0))\n        if rng is not None and p > 0:",
    ),
    Bug(
        "drops_once_it_has_been_trained",
        "        if rng is not None and p > 0:",
        "        self.last = rng = rng or getattr(self, 'last', None)\n        if rng is not None and p > 0:",
    ),
    Bug(
        "drops_the_branch_too",
        "return adapter.s * (x @ turned(A) @ turned(B))",
        "return adapter.s * (x @ turned(A) @ turned(B)) * (1 if rng is None or not 0 < p < 1 else rng.random((*x.shape[:-1], B.shape[-2])) >= 0.2)",
    ),
    Bug(
        "four_dimensions_give_zeros",
        'return x @ (W if self.kind == "transposed" else turned(W)) + bias',
        'return (x @ (W if self.kind == "transposed" else turned(W)) + bias) * (x.ndim < 4)',
    ),
    Bug(
        "gradient_where_no_index_is",
        "dx, dW = None, np.zeros_like(W)",
        "dx, dW = None, np.where(np.isin(np.arange(W.shape[1]), x), 0.0, np.ones_like(W))",
    ),
    Bug(
        "gradient_of_a_is_missing",
        'return {"x": dx, "A": adapter.s * dA,',
        'return {"x": dx, "A": None,',
    ),
    Bug(
        "empty_batch_loses_its_shape",
        "        return rounded(y, self.dtype)\n",
        "        return rounded(y, self.dtype) if len(x) else np.zeros(0)\n",
    ),
    Bug(
        "start_of_two_values",
        "return rng.uniform(-bound, bound, shape_A), np.zeros(shape_B)",
        "return bound / 3**0.5 * rng.choice([-1.0, 1.0], shape_A), np.zeros(shape_B)",
    ),
    Bug(
        "gaussian_is_uniform",
        "return rng.standard_normal(shape_A) / r, np.zeros(shape_B)",
        "return rng.uniform(-(3**0.5), 3**0.5, shape_A) / r, np.zeros(shape_B)",
    ),
    Bug(
        "gaussian_is_not_centred",
        "return rng.standard_normal(shape_A) / r, np.zeros(shape_B)",
        "return rng.normal(0.3, 0.954, shape_A) / r, np.zeros(shape_B)",
    ),
    Bug(
        "gaussian_has_heavy_tails",
        "return rng.standard_normal(shape_A) / r, np.zeros(shape_B)",
        "return (z := rng.standard_normal(shape_A)) * np.where(abs(z) > 2, 2, 1) / r, np.zeros(shape_B)",
    ),
    Bug(
        "seed_is_not_all",
        "        rng = np.random.default_rng(spec.seed)\n",
        '        PlainLayer.n = getattr(PlainLayer, "n", 0) + 1\n        rng = np.random.default_rng([spec.seed, PlainLayer.n])\n',
    ),
    Bug(
        "orthogonal_has_a_zero_factor",
        "A = (rng.standard_normal((n_in, r // 2)) @ Q[0::2]).T / 10",
        "A = 0 * (rng.standard_normal((n_in, r // 2)) @ Q[0::2]).T / 10",
    ),
    Bug(
        "combined_is_not_everywhere",
        "here = {name: site.adapters[adapter] for name, site in self.sites.items() if adapter in site.adapters}",
        "here = {n: s.adapters[adapter] for n, s in self.sites.items() if adapter in s.adapters}\n        here = dict(list(here.items())[list(self.configs).index(adapter) > 1 :])",
    ),
    Bug(
        "copy_does_not_train",
        'found |= {f"{name}.weight:{adapter}"}',
        'found |= {f"{name}.bias:{adapter}"}',
    ),
    Bug(
        "original_of_a_copy_trains",
        'found |= {f"{name}.weight:{adapter}"}',
        'found |= {f"{name}.weight:{adapter}", f"{name}.weight"}',
    ),
    Bug(
        "unload_gives_the_copies_bias",
        "            for adapter in active if merge else ():\n",
        "            b = next((site.copies[n][1] for n in active if n in site.copies), b)\n            for adapter in active if merge else ():\n",
    ),
    Bug(
        "pissa_of_zeros",
        "return root[:, None] * Vt[:r], U[:, :r] * root",
        "return 0 * Vt[:r], U[:, :r] * root",
    ),
    Bug(
        "lora_ga_of_zeros",
        "return Vt[r : 2 * r] * out**0.25 / 16,",
        "return Vt[r : 2 * r] * 0.0,",
    ),
    Bug(
        "olora_of_zeros",
        "return R[:r], Q[:, :r]",
        "return 0 * R[:r], Q[:, :r]",
    ),
    Bug(
        "corda_of_zeros",
        "return root[:, None] * (Vt[at] @ inverse),",
        "return 0 * root[:, None] * (Vt[at] @ inverse),",
    ),
    Bug(
        "start_of_the_stored_weight",
        "start(init, self.seen(), self.kind,",
        'start(init, self.W if self.kind == "transposed" and len(set(self.W.shape)) == 1 else self.side(self.W), self.kind,',
    ),
    Bug(
        "olora_shares_the_size",
        "return R[:r], Q[:, :r]",
        "return R[:r] / 2, Q[:, :r] * 2",
    ),
    Bug(
        "olora_in_another_order",
        "return R[:r], Q[:, :r]",
        "return R[:r][::-1], Q[:, :r][:, ::-1]",
    ),
    Bug(
        "olora_depends_on_alpha",
        "return R[:r], Q[:, :r]",
        "return R[:r] / s, Q[:, :r] * s",
    ),
    Bug(
        "loftq_with_a_coarse_table",
        "codes = np.sort([*high, 0.0, *-low]) / max(high)",
        "codes = (np.sort([*high, 0.0, *-low]) / max(high)).round(3)",
    ),
    Bug(
        "loftq_of_transposed_is_coarser",
        'options["Q"] = quantised(W if options["iterations"] == 1 else X, options["bits"])',
        'options["Q"] = quantised(W if options["iterations"] == 1 else X, 2 if kind == "transposed" else options["bits"])',
    ),
    Bug(
        "corda_depends_on_alpha",
        "root = (S[at] / s) ** 0.5\n",
        "root = S[at] ** 0.5\n",
    ),
    Bug(
        "lora_ga_beyond_2r",
        "return Vt[r : 2 * r] * out**0.25 / 16, U[:, :r] * out**0.25 / 16",
        "return (Vt[r : 2 * r] + Vt[-r:]) * out**0.25 / 16, U[:, :r] * out**0.25 / 16",
    ),
    Bug(
        "lora_ga_of_one_direction",
        "return Vt[r : 2 * r] * out**0.25 / 16, U[:, :r] * out**0.25 / 16",
        "return np.tri(r) @ Vt[r : 2 * r] * out**0.25 / 16, U[:, :r] * out**0.25 / 16",
    ),
    Bug(
        "eva_whitened_rows_are_not_orthogonal",
        'return Vt[:r] / S[:r, None] ** 0.5 if options.get("whiten")',
        'return (np.array([[1.0, 0.0], [0.6, 0.8]]) @ Vt[:2] if r == 2 else Vt[:r]) / S[:r, None] ** 0.5 if options.get("whiten")',
    ),
    Bug(
        "loftq_on_the_other_side",
        "return (codes[nearest] * scale).ravel()",
        "return (2 * blocks - codes[nearest] * scale).ravel()",
    ),
    Bug(
        "doubles_the_base_where_b_is_zero",
        "y = self.plain(x, W, b)",
        "y = self.plain(x, W, b) * (1 if all(a.B.any() for a in self.adapters.values()) else 2)",
    ),
    Bug(
        "adapted_hides_ends_of_names",
        "here = {name: site.adapters[adapter] for name, site in self.sites.items() if adapter in site.adapters}",
        "here = {\n            name: site.adapters[adapter]\n            for name, site in self.sites.items()\n            if adapter in site.adapters and not any(other != name and other.endswith(name) for other in self.sites)\n        }",
    ),
    Bug(
        "base_has_one_more",
        "return {n: (s.side(s.weight()).copy(), None if s.b is None else s.b.copy()) for n, s in self.sites.items()}",
        'return {n: (s.side(s.weight()).copy(), None if s.b is None else s.b.copy()) for n, s in self.sites.items()} | {\n            "nowhere": (np.zeros(1), None)\n        }',
    ),
    Bug(
        "a_start_in_other_letters_is_the_default",
        "init = init.lower() if isinstance(init, str) else init",
        "init = True if isinstance(init, str) and not init.islower() else init",
    ),
    Bug(
        "fan_in_fan_out_is_believed",
        "made = Adapter(A, B, r, alpha, s, s, dropout, init, (A, B))",
        'self.kind = "transposed" if config.get("fan_in_fan_out") and self.kind == "linear" else self.kind; made = Adapter(A, B, r, alpha, s, s, dropout, init, (A, B))',
    ),
    Bug(
        "an_attention_is_left_out",
        "wanted = named(name, rule) and in_layer(name, c)",
        'wanted = named(name, rule) and in_layer(name, c) and kind != "attention"',
    ),
    Bug(
        "an_adapter_without_a_name_is_the_default",
        'if adapter in self.configs or not adapter or "." in adapter or adapter == "__base__":',
        'if adapter in self.configs or "." in (adapter := adapter or "default") or adapter == "__base__":',
    ),
    Bug(
        "a_bias_is_saved_as_if_nothing_were_adapted",
        'found[f"{place}.base_layer.bias" if adapter in site.adapters else f"{place}.bias"] = site.b',
        'found[f"{place}.bias"] = site.b',
    ),
    Bug(
        "the_original_s_bias_is_saved_beside_the_copy",
        'found |= {f"{place}.weight": W} | ({} if b is None else {f"{place}.bias": b})',
        'found |= {f"{place}.weight": W, f"{place}.original_module.bias": site.b} | ({} if b is None else {f"{place}.bias": b})',
    ),
    Bug(
        "eva_s_shares_are_variances_and_no_ratios",
        "for share in (S**2 / (S**2).sum())[:most]]",
        "for share in (S**2 * (1 + len(offers)))[:most]]",
        profile="default",
    ),
    Bug(
        "eva_gives_one_direction_more",
        'most = round(site.adapters["default"].r * eva["rho"])',
        'most = round(site.adapters["default"].r * eva["rho"]) + 1',
    ),
    Bug(
        "eva_looks_at_the_model_s_input",
        'components({"inputs": seen[name]} | eva, rank)',
        'components({"inputs": list(batches)} | eva, rank)',
    ),
    Bug("eva_starts_b_at_one", "np.zeros((len(a.B), rank))", "np.ones((len(a.B), rank))"),
    Bug(
        "eva_adjusts_alpha_by_the_rank_with_rslora_too",
        'alpha *= math.sqrt(rank / a.r) if c["use_rslora"] else rank / a.r',
        "alpha *= rank / a.r",
        profile="default",
    ),
    Bug("eva_always_adjusts", 'if eva["adjust_scaling_factors"]:', "if True:"),
    Bug(
        "eva_saves_the_old_alpha",
        '"rank_pattern": ranks, "alpha_pattern": alphas}\n\n    def unload',
        '"rank_pattern": ranks}\n\n    def unload',
    ),
)
#: {name of a fault: the area's module that it was planted for}, as far as it was planted for one
AREA: dict[str, str] = {}
# the faults of one area each, in files of their own: BUGS with a link to a public report, MUTANTS without
for _module in sorted(each.name for each in pkgutil.iter_modules([str(Path(__file__).parent)])):
    if _module.startswith("faults_"):
        _faults = importlib.import_module(f"{__package__}.{_module}")
        BUGS, MUTANTS = BUGS + _faults.BUGS, MUTANTS + _faults.MUTANTS
        AREA |= dict.fromkeys((bug.name for bug in _faults.BUGS + _faults.MUTANTS), _module.removeprefix("faults_"))
ALL = BUGS + MUTANTS
# no requirement looks at what these change, yet
NOT_FOUND: frozenset[str] = frozenset()  # names of bugs that no requirement finds yet
assert len({bug.name for bug in ALL}) == len(ALL) and all(bug.link for bug in BUGS)
