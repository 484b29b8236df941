"""What mistakes made by hand in lora_ref showed that no requirement looked at: deletions, two names, directions."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from .. import oracle
from ..check import Check
from ..contract import Implementation, LayerSpec, ModelSpec, ModuleSpec
from ..generate import claimed, reals, seeds
from ..registry import requirement
from .adapters_named import both, pairs
from .inits_data import FACTOR, lora_ga, start
from .merged_models import near, restored
from .operations import fill, gives, small
from .structures import SAME, squares
from .structures import gives as acts

TAKES_OVER = "PEFT, LoraLayer.delete_adapter: it also sets a new active adapter if the deleted one was active"
DELETE = "PEFT, PeftModel.delete_adapter: it deletes an existing adapter"
UP: dict[str, Any] = {"r": 2, "lora_alpha": 2, "target_modules": ["up"]}
HEAD: dict[str, Any] = {"modules_to_save": ["head"]}
EYE = ModuleSpec("linear", np.eye(3), np.ones(3))
LAST = st.sampled_from(([], ["other"]))
SHARES = {"ArB2r": (0, 1), "A2rBr": (1, 0)}  # which r of the first 2 r directions A and B get


@requirement(
    "OVERLOOK-001",
    "After the active adapter is deleted, the one that is left is active, and acts alone.",
    f"{TAKES_OVER} (U7)",
    "model write adapters delete",
    pairs,
)
def overlook_001(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, _, second = both(implementation, case)
    model.delete("default")
    check.equal(model.active(), [name], "the active adapters")
    gives(check, model, spec, [second], "the output after the deletion")


@requirement(
    "OVERLOOK-002",
    "Deleting one of two merged adapters is refused, or takes its update out of the weights.",
    f"{DELETE}; {SAME} (U7)",
    "model write adapters summed delete merge unmerge",
    pairs,
)
def overlook_002(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, second = both(implementation, case)
    model.set(["default", name])
    model.merge()
    deleted = check.accepted(lambda: model.delete(name))
    left = [first] if deleted else [first, second]
    near(check, model, spec, left, [first, second], "the output after the deletion")
    model.unmerge()
    restored(check, model, spec, [first, second], "W after unmerging")


def held(implementation: Implementation) -> Any:
    """A module with two names, of which both are targeted."""
    specs = squares(("a.shared", "a.other", "b.again"), {"b.again": "a.shared"})
    return st.builds(lambda spec, last: spec.but(target_modules=["shared", "again", *last]), specs, LAST)


@requirement(
    "OVERLOOK-003",
    "A module whose two names are both targeted is refused, or adapted once: its update acts once, merged and not.",
    f"torch.nn.Module.named_modules: a module that is there twice is one module; {SAME}",
    "model linear write model:held_twice merge unmerge disable",
    held,
)
def overlook_003(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = check.tried(lambda: implementation.model(spec))
    if model is None:
        return
    states = fill(model, spec)
    acts(check, model, spec, [states], "the output")
    model.merge()
    acts(check, model, spec, [states], "the merged output")
    model.unmerge()
    restored(check, model, spec, [states], "W after unmerging")
    model.enable(False)
    acts(check, model, spec, [], "the output, off")


def shared_out(implementation: Implementation) -> Any:
    def build(spec: LayerSpec, direction: str) -> LayerSpec:
        return spec.but(init_options={**spec.init_options, "direction": direction})

    return st.builds(build, lora_ga(implementation), st.sampled_from(sorted(SHARES)))


@requirement(
    "OVERLOOK-004",
    "lora_ga: A and B get the r directions of the gradient each that the option `direction` says.",
    'PEFT, LoraGAConfig.direction: "A2rBr": A takes indices [r:2r], B takes indices [:r]; "ArB2r": the reverse (R2)',
    "init:lora_ga lora_ga:direction",
    shared_out,
    slow=2,
)
def overlook_004(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    state, r = start(implementation, spec), spec.r
    U, S, Vt = np.linalg.svd(spec.init_options["dy"].T, full_matrices=False)
    gap = S[r - 1] - S[r] if 2 * r == len(S) else min(S[r - 1] - S[r], S[2 * r - 1] - S[2 * r])
    which = SHARES[spec.init_options["direction"]]
    for name, rows, directions, at in zip("AB", (state.A, state.B.T), (Vt, U.T), which, strict=True):
        unit = rows / np.linalg.norm(rows, axis=1)[:, None]
        mine = directions[at * r : (at + 1) * r]
        what = f"the part of {name} outside of its singular vectors"
        check.close(unit - unit @ mine.T @ mine, np.zeros_like(unit), S[0] / gap, spec.dtype, what, FACTOR)


@st.composite
def scaled(draw: Any, implementation: Implementation, init: Any) -> tuple[ModelSpec, float, float]:
    """A model of one layer, a factor of the scaling and a weight."""
    W = reals(np.random.default_rng(draw(seeds)), (4, 5)) + np.eye(4, 5) * 8
    config = {"r": 2, "lora_alpha": draw(st.sampled_from((2, 6))), "target_modules": ["up"], "init_lora_weights": init}
    factors = st.sampled_from((0.5, 2.0, 4.0))
    return ModelSpec({"up": ModuleSpec("linear", W)}, config, seed=draw(seeds)), draw(factors), draw(factors)


def _combined(id: str, init: Any, what: str, needs: str) -> None:
    @requirement(
        id,
        f"In a context that scales an adapter, its combination is made of what acts there ({what}).",
        "lora_ref's decision: s_i in sum w_i s_i B_i A_i is the scaling of now (U6)",
        f"model linear write adapters merge weighted scale_context decision:scaling_of_now {needs}",
        lambda i: scaled(i, init),
        slow=2,
    )
    def body(implementation: Implementation, case: tuple[ModelSpec, float, float], check: Check) -> None:
        spec, factor, weight = case
        model = implementation.model(spec)
        state = fill(model, spec)["up"]
        with model.scaled(factor):
            model.combine(["default"], [weight], "combined", "cat")
        model.set(["combined"])
        model.merge()
        W, acting = spec.modules["up"].W, factor * state.scaling
        want = W + weight * (oracle.delta(state.A, state.B, acting) + state.W - W)
        bound = abs(W) + weight * (oracle.delta_bound(state.A, state.B, acting) + abs(state.W) + abs(W))
        check.close(model.base()["up"][0], want, bound, spec.dtype, "the weight with the combination merged", FACTOR)


_combined("OVERLOOK-005", True, "a start that leaves W alone", "init:True")
_combined("OVERLOOK-006", "pissa", "PiSSA, whose start acts unscaled", "init:pissa decision:own_residual")


@requirement(
    "OVERLOOK-007",
    "The factors of a float64 model are saved and loaded with all their digits.",
    "PEFT, PeftModel.save_pretrained and from_pretrained: the adapter can be loaded again (X1)",
    "model linear write files float64",
    lambda i: st.builds(lambda seed: ModelSpec({"up": ModuleSpec("linear", np.eye(3))}, UP, "float64", seed), seeds),
    slow=2,
)
def overlook_007(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model, rng = implementation.model(spec), np.random.default_rng(spec.seed)
    A, B = rng.standard_normal((2, 3)), rng.standard_normal((3, 2))
    model.write("up", A, B)
    with tempfile.TemporaryDirectory() as place:
        model.save(Path(place))
        state = implementation.load(spec, Path(place)).read("up")
    check.equal(state.A, A, "A, loaded")
    check.equal(state.B, B, "B, loaded")


@requirement(
    "OVERLOOK-008",
    "The output of a bfloat16 layer and the updates of two active adapters are summed first, and rounded once.",
    "lora_ref's decision: the branches of a half precision layer are float32 (T2)",
    "model linear write adapters summed bfloat16 float32_branch",
    lambda i: st.tuples(st.sampled_from((1.0, 4.0, 0.25)), st.sampled_from(claimed(i, ("linear", "embedding")))),
)
def overlook_008(implementation: Implementation, case: tuple[float, str], check: Check) -> None:
    size, kind = case
    config = {"r": 1, "lora_alpha": 1, "target_modules": ["up"]}
    model = implementation.model(ModelSpec({"up": ModuleSpec(kind, np.array([[256 * size]]))}, config, "bfloat16"))
    model.add("other", config)
    for adapter in ("default", "other"):  # 256 + 1 is no bfloat16, and 256 + 2 is
        model.write("up", np.array([[size]]), np.ones((1, 1)), adapter)
    model.set(["default", "other"])
    x = np.ones((1, 1)) if kind == "linear" else np.zeros(1, dtype=np.int64)
    check.equal(model.forward(x), np.array([[258 * size]]), "the output")


@requirement(
    "OVERLOOK-009",
    "Dropout acts on the inputs of the factors, and not on what PiSSA's start subtracts from W.",
    "PiSSA, arXiv 2404.02948, eq. (4): W_res is a frozen weight; PEFT's documentation of lora_dropout (P1)",
    "linear write dropout init:pissa",
    lambda i: st.builds(lambda seed, p: (seed, p), seeds, st.sampled_from((0.25, 0.5))),
    slow=2,
)
def overlook_009(implementation: Implementation, case: tuple[int, float], check: Check) -> None:
    seed, p = case
    rng = np.random.default_rng(seed)
    spec = LayerSpec("linear", reals(rng, (4, 4)) + 8 * np.eye(4), r=2, lora_alpha=2.0, lora_dropout=p)
    layer = implementation.layer(spec.but(init_lora_weights="pissa", seed=seed))
    state = layer.read()
    layer.write(state.A, -state.B)
    x = np.tile(np.eye(4), (8, 1))  # of each input one number, which is dropped or not
    D = -oracle.delta(state.A, state.B, state.scaling)
    y, dropped = layer.forward(x, train=True, seed=seed), x @ state.W.T
    kept = dropped + x @ D.T / (1 - p)
    here = abs(y - kept).sum(1) < abs(y - dropped).sum(1)
    bound = x @ (abs(state.W) + abs(spec.W) + 2 * oracle.delta_bound(state.A, state.B, state.scaling)).T / (1 - p)
    check.close(y, np.where(here[:, None], kept, dropped), bound, spec.dtype, "the output in training", FACTOR)


@requirement(
    "OVERLOOK-010",
    "While the adapters of a model are switched off, no factor trains.",
    "PEFT, BaseTunerLayer.enable_adapters: it takes care of requires_grad for the adapter weights (U2)",
    "model adapters disable trainable",
    small,
)
def overlook_010(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    model.enable(False)
    factors = {f"{name}.{letter}:default" for name in model.adapted() for letter in "AB"}
    check.equal(model.trainable() & factors, set(), "the factors that train")


@st.composite
def apart(draw: Any, implementation: Implementation) -> ModelSpec:
    """Two layers, of which the first adapter has one."""
    rng = np.random.default_rng(draw(seeds))
    modules = {name: ModuleSpec("linear", reals(rng, (3, 3)), reals(rng, (3,))) for name in ("up", "down")}
    return ModelSpec(modules, UP, seed=draw(seeds))


@requirement(
    "OVERLOOK-011",
    "An adapter that is added to other modules, and set, while the adapters are switched off, does not act.",
    "lora_ref's decision: adapters that are switched off stay so until they are switched on (U2)",
    "model linear write adapters disable decision:stays_off",
    apart,
)
def overlook_011(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    fill(model, spec)
    model.enable(False)
    model.add("other", {**UP, "target_modules": ["down"]})
    other = fill(model, spec, "other", salt=1)
    model.set(["other"])
    gives(check, model, spec, [], "the output, off")
    model.enable(True)
    gives(check, model, spec, [other], "the output, on again")


def widths(implementation: Implementation) -> Any:
    """A layer, and one of twice as many outputs, whose gradients have the same singular values."""
    return st.builds(lambda spec: spec.but(r=1, W=np.eye(4, 6), b=None, dtype="float32"), lora_ga(implementation))


@requirement(
    "OVERLOOK-012",
    "lora_ga: s B A at the start grows with the root of the number of outputs, whatever the gradient's size.",
    "LoRA-GA, arXiv 2407.05000, algorithm 1: A and B are singular vectors times d_out^(1/4) / gamma each (R2)",
    "linear init:lora_ga",
    widths,
    slow=2,
)
def overlook_012(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    sizes = []
    for out in (4, 8):
        dy = np.diag([8.0, 4.0, 2.0, 1.0, 0.0, 0.0])[:, :4] @ np.eye(4, out)
        made = spec.but(kind="linear", W=np.eye(out, 6), init_options={"x": np.eye(6), "dy": dy})
        state = start(implementation, made)
        sizes.append(np.linalg.norm(oracle.delta(state.A, state.B, state.scaling)))
    check.close(sizes[1] / sizes[0], 2**0.5, 2.0, "float32", "s B A of 8 outputs, of that of 4", FACTOR)


@requirement(
    "OVERLOOK-013",
    "Loading an adapter draws no random numbers: what is added next starts as it would without it.",
    "lora_ref's decision: loading draws no numbers",
    "model linear adapters files decision:loading_draws_nothing",
    lambda i: st.builds(lambda seed: ModelSpec({"up": ModuleSpec("linear", np.eye(3))}, UP, seed=seed), seeds),
    slow=2,
)
def overlook_013(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    with tempfile.TemporaryDirectory() as place:
        implementation.model(spec).save(Path(place))
        starts = []
        for loads in (False, True):
            model = implementation.model(spec)
            if loads:
                model.load(Path(place), "loaded")
            model.add("next", spec.config)
            starts.append(model.read("up", "next").A)
    check.equal(starts[1], starts[0], "A of the next adapter")


@requirement(
    "OVERLOOK-014",
    "A trained copy of a module of a float64 model is saved and loaded with all its digits.",
    "PEFT, LoraConfig.modules_to_save: modules that are set as trainable and saved in the final checkpoint (X5)",
    "model linear modules_to_save files float64",
    lambda i: st.builds(lambda s: ModelSpec({"up": EYE, "head": EYE}, {**UP, **HEAD}, "float64", s), seeds),
    slow=2,
)
def overlook_014(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model, rng = implementation.model(spec), np.random.default_rng(spec.seed)
    model.write_base("head", rng.standard_normal((3, 3)), rng.standard_normal(3))
    x = np.concatenate([np.eye(3), np.zeros((1, 3))])
    want = model.forward(x)
    with tempfile.TemporaryDirectory() as place:
        model.save(Path(place))
        check.equal(implementation.load(spec, Path(place)).forward(x), want, "the output of the loaded adapter")
