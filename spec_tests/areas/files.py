"""Adapter folders: what is written, what is read, and what must be refused."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from .. import folder as folders
from ..check import Check
from ..contract import Array, Implementation, LayerState, ModelSpec
from ..generate import model_inputs, reals
from ..registry import requirement
from .adapters_named import both, pairs
from .inits_weight import separated
from .operations import fill, gives, holds, output, small

FORMAT = "PEFT's documentation of its checkpoint format (X1, X2)"
ROUND = "PEFT's documentation of save_pretrained and from_pretrained (X2, X3)"


def targeted(spec: ModelSpec) -> list[str]:
    """The modules that the list of target_modules names."""
    wanted = spec.config["target_modules"]
    return [name for name in spec.modules if any(name == w or name.endswith("." + w) for w in wanted)]


def states_for(spec: ModelSpec, r: Callable[[str], int], s: Callable[[str], float]) -> dict[str, LayerState]:
    """Random factors for the targeted modules."""
    rng = np.random.default_rng([spec.seed, 11])
    found = {}
    for name in targeted(spec):
        W = spec.modules[name].W
        A, B = reals(rng, (r(name), W.shape[1])), reals(rng, (len(W), r(name)))
        found[name] = LayerState(W, None, A, B, s(name))
    return found


def tensors_of(spec: ModelSpec, states: dict[str, LayerState]) -> dict[str, Array]:
    found = {}
    for name, state in states.items():
        found |= dict(zip(folders.keys(name, spec.modules[name].kind), (state.A, state.B), strict=True))
    return found


def plain(spec: ModelSpec) -> dict[str, LayerState]:
    r = spec.config["r"]
    root = 0.5 if spec.config.get("use_rslora") else 1.0
    return states_for(spec, lambda name: r, lambda name: spec.config["lora_alpha"] / r**root)


@requirement(
    "FILE-001",
    "An adapter that is saved and loaded again gives the same output.",
    ROUND,
    "model files write",
    small,
    slow=2,
)
def file_001(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    with tempfile.TemporaryDirectory() as place:
        model.save(Path(place))
        again = implementation.load(spec, Path(place))
    check.equal(sorted(again.adapted()), sorted(states), "the adapted modules")
    for name, state in states.items():
        loaded = again.read(name)
        for letter in ("A", "B", "scaling"):
            check.equal(getattr(loaded, letter), getattr(state, letter), f"{letter} of {name}")
    gives(check, again, spec, [states], "the output")


@requirement(
    "FILE-002",
    "The file holds A and B of every adapted module under PEFT's keys, and nothing else.",
    FORMAT,
    "model files write",
    small,
    slow=2,
)
def file_002(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    with tempfile.TemporaryDirectory() as place:
        model.save(Path(place))
        _, tensors = folders.read(Path(place))
    want = {folders.PREFIX + key: value for key, value in tensors_of(spec, states).items()}
    check.equal(sorted(tensors), sorted(want), "the keys of the file")
    for key, value in want.items():
        check.equal(tensors[key], value, key)


@requirement(
    "FILE-003",
    "The configuration in the folder names the type, the rank, the alpha and the target modules.",
    FORMAT,
    "model files",
    small,
    slow=2,
)
def file_003(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    with tempfile.TemporaryDirectory() as place:
        model.save(Path(place))
        config, _ = folders.read(Path(place))
    check.equal(config.get("peft_type"), "LORA", "peft_type")
    check.equal(config.get("r"), spec.config["r"], "r")
    check.equal(config.get("lora_alpha"), spec.config["lora_alpha"], "lora_alpha")
    check.equal(config.get("inference_mode"), True, "inference_mode")
    named = config.get("target_modules") or []
    check.equal(targeted(spec.but(target_modules=named)), targeted(spec), "the modules that target_modules names")


def _reads(id: str, sentence: str, needs: str, given: Any, dtype: str = "F32", minimal: bool = False) -> None:
    @requirement(id, sentence, FORMAT, f"model files {needs}", given, slow=2)
    def body(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
        states = plain(spec)
        with tempfile.TemporaryDirectory() as place:
            folders.write(Path(place), spec.config, tensors_of(spec, states), dtype, minimal)
            model = implementation.load(spec, Path(place))
        gives(check, model, spec, [states], "the output")
        holds(check, model.base(), spec, [], "the base model", exact=True)


_reads("FILE-004", "A folder that another program wrote is read as the format says.", "", small)
_reads(
    "FILE-005",
    "A configuration with the type, rank, alpha and target modules alone is enough.",
    "",
    small,
    minimal=True,
)
_reads("FILE-006", "Tensors in float16 are read.", "", small, dtype="F16")
_reads("FILE-007", "Tensors in bfloat16 are read.", "", small, dtype="BF16")
_reads(
    "FILE-008",
    "use_rslora in the configuration sets s.",
    "rslora",
    lambda i: small(i, use_rslora=True, r=st.sampled_from((2, 3))),
)


@requirement(
    "FILE-009",
    "Where a configuration has no r and no lora_alpha they are 8.",
    "LoraConfig's defaults (X8, S1)",
    "model files",
    small,
    slow=2,
)
def file_009(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    spec = spec.but(r=8, lora_alpha=8)
    states = plain(spec)
    with tempfile.TemporaryDirectory() as place:
        only = {"target_modules": spec.config["target_modules"]}
        folders.write(Path(place), only, tensors_of(spec, states), minimal=True)
        model = implementation.load(spec, Path(place))
    gives(check, model, spec, [states], "the output")


@requirement(
    "FILE-010",
    "rank_pattern and alpha_pattern in the configuration set r and s of the modules they match.",
    FORMAT + ", N8",
    "model files patterns",
    lambda i: small(i, rank_pattern={"up": 4}, alpha_pattern={"a.proj": 3, "head": 5}),
    slow=2,
)
def file_010(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    def r(name: str) -> int:
        return 4 if name == "a.up" else spec.config["r"]

    alphas = {"a.proj": 3, "head": 5}
    states = states_for(spec, r, lambda name: alphas.get(name, spec.config["lora_alpha"]) / r(name))
    with tempfile.TemporaryDirectory() as place:
        folders.write(Path(place), spec.config, tensors_of(spec, states))
        model = implementation.load(spec, Path(place))
        gives(check, model, spec, [states], "the output")
        model.save(Path(place) / "again")
        again = implementation.load(spec, Path(place) / "again")
    gives(check, again, spec, [states], "the output after saving and loading again")


@requirement(
    "FILE-029",
    "Where two keys of a pattern match a module, it has the same r and s after loading as before saving.",
    "PEFT's documentation of save_pretrained: what is saved can be reloaded (X2)",
    "model files patterns",
    lambda i: small(
        i, target_modules=["proj", "up"], rank_pattern={"up": 3, ".*": 4}, alpha_pattern={"up": 5, ".*": 6}
    ),
    slow=2,
)
def file_029(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    want = model.adapted()
    with tempfile.TemporaryDirectory() as place:
        model.save(Path(place))
        check.equal(implementation.load(spec, Path(place)).adapted(), want, "r and s of the loaded adapter")


@requirement(
    "FILE-011",
    "A loaded adapter is frozen unless training is asked for.",
    "PEFT's documentation of is_trainable (X9)",
    "model files trainable",
    small,
    slow=2,
)
def file_011(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    with tempfile.TemporaryDirectory() as place:
        folders.write(Path(place), spec.config, tensors_of(spec, plain(spec)))
        check.equal(sorted(implementation.load(spec, Path(place)).trainable()), [], "what trains")


@requirement(
    "FILE-012", "A merged model saves its factors, and not the merge.", "X9", "model files merge write", small, slow=2
)
def file_012(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    model.merge()
    with tempfile.TemporaryDirectory() as place:
        model.save(Path(place))
        again = implementation.load(spec, Path(place))
    gives(check, again, spec, [states], "the output of the loaded adapter")


@requirement(
    "FILE-013",
    "Saving changes nothing: output, factors, what is active and what trains.",
    ROUND,
    "model files adapters trainable write",
    pairs,
    slow=2,
)
def file_013(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, _, first, _ = both(implementation, case)
    trained = sorted(model.trainable())
    with tempfile.TemporaryDirectory() as place:
        model.save(Path(place))
    check.equal(model.active(), ["default"], "the active adapters")
    check.equal(sorted(model.trainable()), trained, "what trains")
    gives(check, model, spec, [first], "the output")


@requirement(
    "FILE-014",
    "The adapter default lies in the folder, another one in a folder of its name in it.",
    "X1",
    "model files adapters write",
    pairs,
    slow=2,
)
def file_014(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, second = both(implementation, case)
    with tempfile.TemporaryDirectory() as place:
        model.save(Path(place))
        for where, states in ((Path(place), first), (Path(place) / name, second)):
            gives(check, implementation.load(spec, where), spec, [states], "the output of the loaded adapter")


@requirement(
    "FILE-015",
    "An adapter can be loaded into an adapted model, under another name, and waits until it is set.",
    "PEFT's documentation of load_adapter",
    "model files adapters write",
    pairs,
    slow=2,
)
def file_015(implementation: Implementation, case: Any, check: Check) -> None:
    spec, name, _ = case
    model = implementation.model(spec)
    first = fill(model, spec)
    states = plain(spec)
    with tempfile.TemporaryDirectory() as place:
        folders.write(Path(place), spec.config, tensors_of(spec, states))
        model.load(Path(place), name)
    gives(check, model, spec, [first], "the output after loading")
    model.set([name])
    gives(check, model, spec, [states], "the output with the loaded adapter")


def _starts(id: str, init: str, what: str = "", needs: str = "", **config: Any) -> None:
    @requirement(
        id,
        f"{init}{what}: a trained adapter that is saved and loaded on the original base gives the same output.",
        "PEFT's documentation: a saved adapter is loaded on the base model it was made from (V2, V3, V5)",
        f"model write files init:{init} {needs}",
        lambda i: small(
            i, **{"init_lora_weights": init, "r": st.sampled_from((1, 2)), "target_modules": ["proj", "up"]} | config
        ),
        slow=2,
    )
    def body(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
        rng = np.random.default_rng(spec.seed)
        for name in ("a.proj", "a.up"):
            spec.modules[name].W[...] = separated(rng, *spec.modules[name].W.shape)
        model = implementation.model(spec)
        for name in model.adapted():
            state = model.read(name)
            model.write(name, state.A + reals(rng, state.A.shape) / 4, state.B + reals(rng, state.B.shape) / 4)
        x = model_inputs(spec)
        y = model.forward(x)
        states = {name: model.read(name) for name in model.adapted()}
        size = output(spec, [states], x)[1]  # W instead of W_res: larger
        with tempfile.TemporaryDirectory() as place:
            model.save(Path(place))
            got = implementation.load(spec, Path(place)).forward(x)
        # the start is computed again, or taken out with twice the rank
        check.close(got, y, size, spec.dtype, "the output of the loaded adapter", 32.0 * len(spec.modules))


_starts("FILE-016", "pissa")
_starts("FILE-017", "olora")
_starts("FILE-018", "pissa", " with use_rslora", "rslora", use_rslora=True)
_starts("FILE-019", "pissa", " with patterns", "patterns", rank_pattern={"up": 3}, alpha_pattern={"proj": 3.0})


# -- what must be refused ------------------------------------------------------------------------


DECIDED = "lora_ref's decision (X8)"


def _refused(id: str, what: str, spoil: Callable[[Path, dict[str, Any], dict[str, Array]], None], strict: bool) -> None:
    @requirement(
        id,
        f"{what}: refused, and the model is as before.",
        f"{DECIDED if strict else FORMAT}: nothing wrong is loaded silently",
        "model write files adapters errors" + (" strict_files" if strict else ""),
        small,
        slow=2,
    )
    def body(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
        model = implementation.model(spec)
        first = fill(model, spec)
        with tempfile.TemporaryDirectory() as place:
            spoil(Path(place), dict(spec.config), tensors_of(spec, plain(spec)))
            check.refused(lambda: model.load(Path(place), "new"), what)
        gives(check, model, spec, [first], "the output after the refusal")
        holds(check, model.base(), spec, [], "the base model after the refusal", exact=True)
        if strict:
            check.equal(model.active(), ["default"], "the active adapters after the refusal")


def _missing(place: Path, config: dict[str, Any], tensors: dict[str, Array]) -> None:
    tensors.pop(sorted(tensors)[-1])
    folders.write(place, config, tensors)


def _extra(place: Path, config: dict[str, Any], tensors: dict[str, Array]) -> None:
    folders.write(place, config, tensors | {"nowhere.lora_A.weight": np.ones((1, 4))})


def _shape(place: Path, config: dict[str, Any], tensors: dict[str, Array]) -> None:
    key = sorted(tensors)[0]
    folders.write(place, config, tensors | {key: np.ones((tensors[key].shape[0], tensors[key].shape[1] + 1))})


def _rank(place: Path, config: dict[str, Any], tensors: dict[str, Array]) -> None:
    folders.write(place, config | {"r": config["r"] + 1}, tensors)


def _nan(place: Path, config: dict[str, Any], tensors: dict[str, Array]) -> None:
    key = sorted(tensors)[0]
    folders.write(place, config, tensors | {key: np.full(tensors[key].shape, np.nan)})


def _cut(place: Path, config: dict[str, Any], tensors: dict[str, Array]) -> None:
    folders.write(place, config, tensors)
    path = place / folders.TENSORS
    path.write_bytes(path.read_bytes()[:-3])


def _dora(place: Path, config: dict[str, Any], tensors: dict[str, Array]) -> None:
    folders.write(place, config | {"use_an_option_of_tomorrow": True, "use_dora": True}, tensors)


def _json(place: Path, config: dict[str, Any], tensors: dict[str, Array]) -> None:
    folders.write(place, config, tensors)
    (place / folders.CONFIG).write_text("{")


def _nothing(place: Path, config: dict[str, Any], tensors: dict[str, Array]) -> None:
    (place / folders.CONFIG).write_text("{}")


_refused("FILE-020", "A file that lacks a tensor", _missing, True)
_refused("FILE-021", "A file with a tensor for a module that is not adapted", _extra, True)
_refused("FILE-022", "A tensor of another shape", _shape, False)
_refused("FILE-023", "Tensors of another rank than the configuration's", _rank, False)
_refused("FILE-024", "A tensor with NaN", _nan, True)
_refused("FILE-025", "A file that ends too early", _cut, False)
_refused(
    "FILE-026", "A configuration with an option that changes the formula (use_dora) without its tensors", _dora, True
)
_refused("FILE-027", "A configuration that is no JSON", _json, False)
_refused("FILE-028", "A folder without tensors", _nothing, False)
