"""EVA on a model: ranks go to the layers whose inputs vary in more directions, and everything else follows."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..check import Check
from ..contract import Array, Implementation, Model, ModelSpec, ModuleSpec
from ..generate import reals, seeds
from ..registry import requirement
from .inits_data import EVA, basis, single
from .operations import fill, gives

ROWS, WIDTH = 24, 6
# standard deviations of inputs along their directions: nearly two of them, one, and three
PROFILES = ((1, 0.92, 0.1, 0.08, 0.06, 0.05), (1, 0.2, 0.1, 0.08, 0.06, 0.05), (1, 0.85, 0.72, 0.4, 0.3, 0.2))
GAP = 1.1  # between the last share that gets a rank and the first that does not: no approximation crosses it


def shares(spec: ModelSpec, x: Array) -> dict[str, tuple[Array, Array]]:
    """{module: (the explained variance ratios of its inputs, their principal components)}."""
    found = {}
    for name, module in spec.modules.items():
        _, S, Vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
        found[name] = S**2 / (S**2).sum(), Vt
        x = x @ module.W.T + module.b
    return found


def ranked(spec: ModelSpec, x: Array) -> tuple[dict[str, int], float]:
    """How the ranks have to be shared out, and how clearly."""
    r, most = spec.config["r"], round(spec.config["r"] * spec.config["eva_config"]["rho"])
    offers = sorted(((v, n) for n, (ratios, _) in shares(spec, x).items() for v in ratios[:most]), reverse=True)
    budget = r * len(spec.modules)
    ranks = {name: sum(n == name for _, n in offers[:budget]) for name in spec.modules}
    return ranks, float(offers[budget - 1][0] / offers[budget][0]) if len(offers) > budget else np.inf


@st.composite
def watched(draw: Any, implementation: Implementation, rho: float = 2.0, **options: Any) -> tuple[ModelSpec, Array]:
    """Three linear layers, whose inputs vary in fewer and fewer directions, and data that leave no doubt."""
    seed = draw(seeds)
    r = draw(st.sampled_from((1, 2)))
    config = {
        "r": r,
        "lora_alpha": draw(st.sampled_from((2, 8))),
        "target_modules": ["first", "second", "third"],
        "init_lora_weights": "eva",
        "eva_config": {"rho": rho, **options},
    }
    if "rslora" in implementation.claims:
        config["use_rslora"] = draw(st.booleans())
    for attempt in range(100):
        rng = np.random.default_rng([seed, attempt])
        order = [np.array(PROFILES[i]) for i in rng.permutation(3)]
        Q = [basis(rng, WIDTH) for _ in range(4)]
        x = single(basis(rng, ROWS, WIDTH) * 4 * order[0] @ Q[0].T)
        modules = {}
        for at, name in enumerate(("first", "second", "third")):
            after = order[at + 1] if at < 2 else order[at]
            W = Q[at + 1] * (after / order[at]) @ Q[at].T  # turns the directions, and gives them the next spread
            modules[name] = ModuleSpec("linear", single(W), reals(rng, (WIDTH,)))
        spec = ModelSpec(modules, config, seed=seed)
        ranks, gap = ranked(spec, x)
        if gap > GAP and (rho == 1 or len(set(ranks.values())) > 1):
            break
    return spec, x


def looked(implementation: Implementation, spec: ModelSpec, x: Array) -> Model:
    model = implementation.model(spec)
    model.look([x, x])  # the same twice: whoever waits until the components stand still has waited enough
    return model


def stated(id: str, sentence: str, source: str, cases: Any = watched, needs: str = "") -> Any:
    return requirement(id, sentence, source, f"model linear init:eva eva_ranks {needs}", cases, slow=2)


@stated(
    "EVA-011",
    "eva: the ranks go to the directions that explain most of their layer's inputs, up to r rho in a layer.",
    "EVA, arXiv 2410.07170, section 3.2 (E1, E5)",
)
def _ranks(implementation: Implementation, case: Any, check: Check) -> None:
    spec, x = case
    adapted = looked(implementation, spec, x).adapted()
    found = {name: adapted[name][0] if name in adapted else 0 for name in spec.modules}
    want = ranked(spec, x)[0]
    check.that(found == want, f"the ranks are {found}, must be {want}")


@stated(
    "EVA-012",
    "eva: with ranks shared out A of each layer spans its inputs' first components, and the output is the base's.",
    EVA,
)
def _factors(implementation: Implementation, case: Any, check: Check) -> None:
    spec, x = case
    model, known = looked(implementation, spec, x), shares(spec, x)
    for name, (rank, _) in model.adapted().items():
        A = model.read(name).A
        outside = A @ (np.eye(WIDTH) - known[name][1][:rank].T @ known[name][1][:rank])
        check.that(
            abs(outside).max() < 0.02, f"A of {name} leaves the first {rank} components by {abs(outside).max():.3g}"
        )
    gives(check, model, spec, [], "the output")


@stated(
    "EVA-013",
    "eva: with adjust_scaling_factors s stays what it was, whatever rank a layer has got.",
    "PEFT's documentation of adjust_scaling_factors (E7)",
)
def _scalings(implementation: Implementation, case: Any, check: Check) -> None:
    spec, x = case
    s = spec.config["lora_alpha"] / spec.config["r"] ** (0.5 if spec.config.get("use_rslora") else 1)
    for name, (_, found) in looked(implementation, spec, x).adapted().items():
        check.close(found, s, abs(s), "float32", f"s of {name}")


@stated(
    "EVA-014",
    "eva: without adjust_scaling_factors s is lora_alpha / rank, or lora_alpha / sqrt(rank), of the new rank.",
    "PEFT's documentation of adjust_scaling_factors (E7)",
    lambda i: watched(i, adjust_scaling_factors=False),
)
def _unadjusted(implementation: Implementation, case: Any, check: Check) -> None:
    spec, x = case
    for name, (rank, found) in looked(implementation, spec, x).adapted().items():
        s = spec.config["lora_alpha"] / rank ** (0.5 if spec.config.get("use_rslora") else 1)
        check.close(found, s, abs(s), "float32", f"s of {name}")


@stated(
    "EVA-015",
    "eva: an adapter whose ranks were shared out is the same after saving and loading: ranks, s and output.",
    "PEFT's documentation of initialize_lora_eva_weights: rank_pattern and alpha_pattern are updated (E8)",
    needs="files write",
)
def _saved(implementation: Implementation, case: Any, check: Check) -> None:
    spec, x = case
    model = looked(implementation, spec, x)
    states = fill(model, spec)
    with tempfile.TemporaryDirectory() as place:
        model.save(Path(place))
        again = implementation.load(spec, Path(place))
    gives(check, again, spec, [states], "the output")


@stated(
    "EVA-016",
    "eva: with rho = 1 every layer keeps its rank.",
    "PEFT's documentation of EvaConfig.rho (E5)",
    lambda i: watched(i, rho=1.0),
)
def _kept(implementation: Implementation, case: Any, check: Check) -> None:
    spec, x = case
    ranks = {name: rank for name, (rank, _) in looked(implementation, spec, x).adapted().items()}
    check.that(ranks == dict.fromkeys(spec.modules, spec.config["r"]), f"the ranks are {ranks}")
