"""bias="all" and "lora_only": biases of the base model that train along."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from .. import matching, oracle
from ..check import Check
from ..contract import Array, Implementation, Model, ModelSpec, ModuleSpec
from ..generate import reals, seeds
from ..registry import requirement
from .targeting import kinds_of, refused

LOCAL = "microsoft/LoRA, mark_only_lora_as_trainable; PEFT's documentation of LoraConfig, bias"
SMALL = {
    "layers.0.up": ("linear", 5, 4),
    "layers.0.norm": ("norm", 5, 5),
    "layers.0.down": ("linear", 4, 5),
    "layers.1.up": ("linear", 3, 4),
    "head": ("linear", 2, 3),
}
TARGETS = st.sampled_from((["up"], ["up", "down"], ["head", "layers.1.up"], ["down"]))
Deltas = Mapping[str, tuple[Array, Array]]


@st.composite
def small(draw: Any, implementation: Implementation, **config: Any) -> ModelSpec:
    """A model of five modules, some of them without a bias; `config`: options, or strategies of them."""
    rng = np.random.default_rng(draw(seeds))
    modules = {}
    for name, (kind, out, n_in) in SMALL.items():
        shape = (out,) if kind == "norm" else (out, n_in)
        b = reals(rng, (out,)) if name != "layers.1.up" or draw(st.booleans()) else None
        modules[name] = ModuleSpec(kind, reals(rng, shape), b)
    options = {"r": st.sampled_from((1, 2)), "lora_alpha": st.sampled_from((1.0, 4.0, 6.0)), "target_modules": TARGETS}
    chosen = {k: draw(v) if isinstance(v, st.SearchStrategy) else v for k, v in (options | config).items()}
    return ModelSpec(modules, chosen, seed=draw(seeds))


def x_of(spec: ModelSpec) -> Array:
    return reals(np.random.default_rng([spec.seed, 7]), (3, 4))


def given_factors(model: Any, spec: ModelSpec, adapter: str = "default") -> Any:
    """The model with random A and B in all its layers."""
    rng = np.random.default_rng([spec.seed, len(adapter)])
    for name in sorted(model.adapted(adapter)):
        state = model.read(name, adapter)
        model.write(name, reals(rng, state.A.shape), reals(rng, state.B.shape), adapter)
    return model


def deltas(model: Model, adapter: str = "default") -> dict[str, tuple[Array, Array]]:
    """{module: (D, its bound)} of an adapter as it is now."""
    found = {}
    for name in model.adapted(adapter):
        _, _, A, B, s = model.read(name, adapter)
        found[name] = oracle.delta(A, B, s), oracle.delta_bound(A, B, s)
    return found


def output(
    spec: ModelSpec,
    D: Deltas,
    changed: Mapping[str, Array] | None = None,
    weights: Mapping[str, Array] | None = None,
    absolute: bool = False,
) -> Array:
    """The chain's output with W + D, with other biases and other weights of some modules; or the same on |values|."""
    size = abs if absolute else lambda a: a
    x = size(x_of(spec))
    for name, module in spec.modules.items():
        W = size((weights or {}).get(name, module.W)) + (D[name][1 if absolute else 0] if name in D else 0.0)
        b = (changed or {}).get(name, module.b)
        x = (W * x if module.kind == "norm" else x @ W.T) + (0.0 if b is None else size(b))
    return x


def bounded(
    check: Check,
    spec: ModelSpec,
    got: Array,
    D: Deltas,
    what: str,
    changed: Mapping[str, Array] | None = None,
    weights: Mapping[str, Array] | None = None,
) -> None:
    """The output is the chain's: 8 roundings in each module, of the formula on absolute values."""
    want, bound = (output(spec, D, changed, weights, absolute) for absolute in (False, True))
    check.close(got, want, bound, spec.dtype, what, factor=8.0 * len(spec.modules))


def biases(spec: ModelSpec, mode: str | None = None) -> set[str]:
    """The modules whose bias trains in this mode."""
    mode = mode or spec.config["bias"]
    there = {name for name, module in spec.modules.items() if module.b is not None}
    return there if mode == "all" else there & matching.targets(kinds_of(spec), spec.config).keys()


def trained(model: Model, spec: ModelSpec) -> dict[str, Array]:
    """Give the biases that train other values, as training would, and the factors too."""
    rng = np.random.default_rng([spec.seed, 3])
    given_factors(model, spec)
    new = {name: reals(rng, spec.modules[name].W.shape[:1]) for name in sorted(biases(spec))}
    for name, b in new.items():
        model.write_base(name, b=b)
    return new


def base_is(check: Check, spec: ModelSpec, base: Any, new: Mapping[str, Array], D: Deltas | None = None) -> None:
    """The base has these biases, and its own weights (plus D)."""
    for name, (W, b) in base.items():
        want, (delta, size) = spec.modules[name].W, (D or {}).get(name, (0.0, 0.0))
        check.close(W, want + delta, abs(want) + size, spec.dtype, f"the weight of {name}")
        b_want = new.get(name, spec.modules[name].b)
        if b_want is not None:
            check.equal(b, b_want, f"the bias of {name}")


MODES = st.sampled_from(("all", "lora_only"))


def with_bias(implementation: Implementation) -> st.SearchStrategy[ModelSpec]:
    return small(implementation, bias=MODES)


def _trains(id: str, sentence: str, mode: str, source: str) -> None:
    @requirement(
        id,
        sentence,
        source,
        "model linear trainable" if mode == "none" else "model linear trainable bias",
        lambda i: small(i, bias=mode),
        slow=2,
    )
    def body(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
        found = {name for name in implementation.model(spec).trainable() if ":" not in name}
        want = set() if mode == "none" else {f"{name}.bias" for name in biases(spec)}
        check.that(found == want, f"{sorted(found)} of the base trains, must be {sorted(want)}")


_trains("BIAS-001", "bias='none': nothing of the base model trains.", "none", f"{LOCAL} (B1)")
_trains("BIAS-002", "bias='all': every bias of the model trains, of norms and untargeted layers too.", "all", LOCAL)
_trains(
    "BIAS-003",
    "bias='lora_only': the biases of the targeted layers train, and no others.",
    "lora_only",
    f"{LOCAL} (B3)",
)


@requirement(
    "BIAS-004", "A and B train whatever the bias mode is.", "B2, B3", "model linear bias trainable", with_bias, slow=2
)
def bias_004(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    found = {name for name in model.trainable() if ":" in name}
    want = {f"{name}.{letter}:default" for name in matching.targets(kinds_of(spec), spec.config) for letter in "AB"}
    check.that(found == want, f"{sorted(found)} trains, must be {sorted(want)}")


@requirement(
    "BIAS-005",
    "Before training, a bias mode changes neither the base model nor, switched off, its output.",
    "B4",
    "model linear bias disable write",
    with_bias,
    slow=2,
)
def bias_005(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = given_factors(implementation.model(spec), spec)
    for name, (W, b) in model.base().items():
        for got, want, what in ((W, spec.modules[name].W, "weight"), (b, spec.modules[name].b, "bias")):
            if want is not None:
                check.equal(got, want, f"the {what} of {name}")
    bounded(check, spec, model.forward(x_of(spec)), deltas(model), "the output")
    model.enable(False)
    bounded(check, spec, model.forward(x_of(spec)), {}, "the output when switched off")


@requirement(
    "BIAS-006", "Biases are trained in place and act in the output.", "B4", "model linear bias write", with_bias, slow=2
)
def bias_006(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    new = trained(model, spec)
    base_is(check, spec, model.base(), new)
    bounded(check, spec, model.forward(x_of(spec)), deltas(model), "the output", new)


@requirement(
    "BIAS-007",
    "Switching the adapter off leaves trained biases as they are, and on again gives what it gave.",
    "B4",
    "model linear bias disable trainable write",
    with_bias,
    slow=2,
)
def bias_007(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    new = trained(model, spec)
    before, trains = model.forward(x_of(spec)), model.trainable()
    model.enable(False)
    bounded(check, spec, model.forward(x_of(spec)), {}, "the output when switched off", new)
    model.enable(True)
    check.equal(model.forward(x_of(spec)), before, "the output when switched on again")
    check.that(model.trainable() == trains, f"{sorted(model.trainable())} trains afterwards, was {sorted(trains)}")


@requirement(
    "BIAS-008",
    "Merging does not touch trained biases; they act once, merged or not.",
    "B5",
    "model linear bias merge write",
    with_bias,
    slow=2,
)
def bias_008(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    new = trained(model, spec)
    D = deltas(model)
    model.merge()
    base_is(check, spec, model.base(), new, D)
    bounded(check, spec, model.forward(x_of(spec)), D, "the output after merging", new)


@requirement(
    "BIAS-009",
    "Unmerging takes the update out and leaves trained biases in.",
    "B5",
    "model linear bias merge unmerge write",
    with_bias,
    slow=2,
)
def bias_009(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    new = trained(model, spec)
    D = deltas(model)
    model.merge()
    model.unmerge()
    for name, (W, b) in model.base().items():
        want = spec.modules[name].W
        bound = abs(want) + D.get(name, (0.0, 0.0))[1]  # unmerging may subtract what was added
        check.close(W, want, bound, spec.dtype, f"the weight of {name}")
        if name in new:
            check.equal(b, new[name], f"the bias of {name}")


@requirement(
    "BIAS-010",
    "Unloading gives the base weights with the trained biases.",
    "B4, U6",
    "model linear bias unload write",
    with_bias,
    slow=2,
)
def bias_010(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    new = trained(model, spec)
    base_is(check, spec, model.unload(merge=False), new)


@requirement(
    "BIAS-011",
    "merge_and_unload gives the merged weights with the trained biases.",
    "B5, U5",
    "model linear bias unload merge write",
    with_bias,
    slow=2,
)
def bias_011(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    new = trained(model, spec)
    D = deltas(model)
    base_is(check, spec, model.unload(merge=True), new, D)


def second(spec: ModelSpec, **more: Any) -> dict[str, Any]:
    return {"r": 1, "lora_alpha": 3.0, "target_modules": ["down", "head"], **more}


@requirement(
    "BIAS-012",
    "Trained biases stay when another adapter is chosen, and when theirs is deleted.",
    "B4",
    "model linear bias adapters delete write",
    with_bias,
    slow=2,
)
def bias_012(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    new = trained(model, spec)
    model.add("second", second(spec))
    given_factors(model, spec, "second")
    model.set(["second"])
    D = deltas(model, "second")
    bounded(check, spec, model.forward(x_of(spec)), D, "the second adapter's output", new)
    model.delete("default")
    base_is(check, spec, model.base(), new)
    bounded(check, spec, model.forward(x_of(spec)), D, "the output after deleting the first", new)


@requirement(
    "BIAS-013",
    "Which biases train follows the active adapter: none with another one, the same again when it is back.",
    "lora_ref's decision (B6): PEFT's documentation of set_adapter is about the adapter's own parameters",
    "model linear bias adapters bias_follows trainable",
    with_bias,
    slow=2,
)
def bias_013(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    model.add("second", second(spec))
    for active, want in (
        ("second", set()),
        ("default", {f"{name}.bias" for name in biases(spec)}),
    ):
        model.set([active])
        found = {name for name in model.trainable() if ":" not in name}
        check.that(found == want, f"{sorted(found)} of the base trains with {active!r}, must be {sorted(want)}")


@requirement(
    "BIAS-014",
    "A second adapter with a bias mode is refused, and nothing is changed; one without is added.",
    "PEFT's documentation of LoRA: one adapter with bias (B6)",
    "model linear bias adapters errors trainable write",
    lambda i: st.tuples(with_bias(i), MODES),
    slow=2,
)
def bias_014(implementation: Implementation, case: tuple[ModelSpec, str], check: Check) -> None:
    spec, mode = case
    model = implementation.model(spec)
    new = trained(model, spec)
    before, trains = model.forward(x_of(spec)), model.trainable()
    refused(check, lambda: model.add("second", second(spec, bias=mode)), "a second adapter with a bias mode")
    check.equal(model.forward(x_of(spec)), before, "the output after the refusal")
    check.that(model.trainable() == trains, "what trains has changed by the refusal")
    check.that(list(model.active()) == ["default"], f"active after the refusal: {model.active()}")
    base_is(check, spec, model.base(), new)
    model.add("third", second(spec))
    check.that(bool(model.adapted("third")), "an adapter without a bias mode is not added")


@requirement(
    "BIAS-015",
    "A bias adapter may be the second one; its biases train when it is chosen.",
    "lora_ref's decision (B6): PEFT's documentation of set_adapter is about the adapter's own parameters",
    "model linear bias adapters bias_follows trainable",
    lambda i: st.tuples(small(i, bias="none"), MODES),
    slow=2,
)
def bias_015(implementation: Implementation, case: tuple[ModelSpec, str], check: Check) -> None:
    spec, mode = case
    model = implementation.model(spec)
    config = second(spec, bias=mode)
    model.add("second", config)
    model.set(["second"])
    other = ModelSpec(spec.modules, config)
    found = {name for name in model.trainable() if ":" not in name}
    want = {f"{name}.bias" for name in biases(other)}
    check.that(found == want, f"{sorted(found)} of the base trains, must be {sorted(want)}")


@requirement(
    "BIAS-016",
    "The biases that a mode trains are saved with the adapter, and loaded with it.",
    "PEFT's documentation of its checkpoint format (B4, X2)",
    "model linear bias files write",
    lambda i: small(i, bias=MODES),
    slow=2,
)
def bias_016(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = given_factors(implementation.model(spec), spec)
    rng = np.random.default_rng([spec.seed, 31])
    for name in biases(spec):
        b = check.present(spec.modules[name].b, f"the bias of {name}")
        model.write_base(name, b=reals(rng, b.shape))
    want = model.forward(x_of(spec))
    with tempfile.TemporaryDirectory() as place:
        model.save(Path(place))
        loaded = implementation.load(spec, Path(place))
    check.equal(loaded.forward(x_of(spec)), want, "the output")


@st.composite
def attentions(draw: Any, implementation: Implementation) -> ModelSpec:
    """A linear layer that is adapted, and an attention, which has a second bias under another name."""
    rng = np.random.default_rng(draw(seeds))
    name = draw(st.sampled_from(("attn.out_proj", "block.attn.out_proj", "layers.0.self_attn.out_proj")))
    first, second = (ModuleSpec(kind, reals(rng, (4, 4)), reals(rng, (4,))) for kind in ("linear", "attention"))
    config = {"r": 1, "target_modules": ["first"], "bias": draw(st.sampled_from(("none", "all", "lora_only")))}
    return ModelSpec({"first": first, name: second}, config, seed=draw(seeds))


@requirement(
    "BIAS-017",
    "'all' trains every bias of the model, also one that has a longer name; the other modes do not.",
    "microsoft/LoRA, mark_only_lora_as_trainable: 'all' takes each parameter with bias in its name (B2)",
    "model linear attention bias bias:every trainable",
    attentions,
)
def bias_017(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    found = {name for name in implementation.model(spec).trainable() if ":" not in name}
    first, attention = spec.modules
    every = {f"{first}.bias", f"{attention}.bias", f"{attention.rpartition('.')[0]}.in_proj_bias"}
    want = {"none": set(), "lora_only": {f"{first}.bias"}, "all": every}[spec.config["bias"]]
    check.that(found == want, f"what trains of the base: {sorted(found)}, must be {sorted(want)}")
