"""rank_pattern and alpha_pattern: another r and lora_alpha for some modules."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from .. import matching, oracle
from ..check import Check
from ..contract import Array, Implementation, Model, ModelSpec
from ..generate import reals
from ..registry import requirement
from .biases import SMALL, bounded, given_factors, small, x_of
from .targeting import BLOCK, cases, compare, ends, holds, kinds_of, listed

CONFIG = "PEFT's documentation of LoraConfig, rank_pattern and alpha_pattern (N8, S2)"
BOTH = {n: ("linear", 2, 2) for n in ("q_proj", "layers.1.q_proj", "layers.10.q_proj", "layers.11.xq_proj", "h.1.fc")}


@st.composite
def keys(draw: Any, names: Any, values: Any, most: int = 3) -> dict[str, Any]:
    """Keys that reach the end of some names, and keys that nearly do."""
    found = {}
    for _ in range(draw(st.integers(1, most))):
        name = draw(st.sampled_from(sorted(names)))
        end = draw(st.sampled_from(ends(name)))
        safe = re.escape(end)
        key = draw(
            st.sampled_from(
                [
                    end,
                    end,
                    safe,
                    f"^{safe}",
                    f"^{re.escape(name)}",
                    f"^{re.escape(name.split('.')[0])}",
                    rf"^{re.escape(name.split('.')[0])}\..*",
                    re.escape(name[: len(name) // 2]),
                    re.escape(end[1:]) or "q",
                    rf"{re.escape(end.split('.')[0])}.*",
                    r"layers\.1\..*",
                    r"layers.1.*",
                    rf"(h|layers)\.\d+\..*{re.escape(name[-1])}",
                    ".*",
                    "fc|q_proj",
                ]
            )
        )
        found[key] = draw(values)
    return found


RANKS = st.sampled_from((1, 3, 4))
ALPHAS = st.sampled_from((1.0, 2.0, 12.0, 32.0))


def _rule(id: str, sentence: str, needs: str = "", source: str = CONFIG, shapes: Any = None, **config: Any) -> None:
    config = {"target_modules": lambda n: listed(n, 6)} | config
    requirement(id, sentence, source, f"model linear patterns {needs}", lambda i: cases(i, shapes, **config))(holds)


_rule(
    "PATTERN-001",
    "rank_pattern gives r of the modules that it matches, and s follows that r.",
    rank_pattern=lambda n: keys(n, RANKS),
)
_rule(
    "PATTERN-002",
    "alpha_pattern gives lora_alpha of the modules that it matches, r stays.",
    alpha_pattern=lambda n: keys(n, ALPHAS),
)
_rule(
    "PATTERN-003",
    "Each of the two patterns is looked up for itself, and use_rslora divides by the root of the pattern's r.",
    "rslora",
    rank_pattern=lambda n: keys(n, RANKS),
    alpha_pattern=lambda n: keys(n, ALPHAS),
    use_rslora=st.booleans(),
)
_rule(
    "PATTERN-004",
    "Where several keys match, the first in the dictionary's order decides.",
    "decision:pattern_order decision:whole_segments",
    source="lora_ref's decision (N8): PEFT's documentation of rank_pattern names no order",
    shapes=BOTH,
    target_modules=["q_proj", "xq_proj"],
    rank_pattern=st.permutations(["q_proj", "layers.1.q_proj", ".*q_proj", r"^layers\.10.*", r"1\.q_proj"]).map(
        lambda order: {key: at + 3 for at, key in enumerate(order)}
    ),
)
_rule(
    "PATTERN-005",
    "A key must reach the end of the name: '^layers.1' alone matches nothing.",
    source="N8",
    shapes=BLOCK,
    rank_pattern=st.sampled_from(("^layers.1", "layers", "^layers", "layers.1.attn", "up.0", "q_pro", "hea")).map(
        lambda key: {key: 5}
    ),
)
_rule(
    "PATTERN-006",
    "'^' ties a key to the start of the name; without it a key starts at any dot, and only there.",
    source="N8",
    shapes=BOTH,
    target_modules="all-linear",
    needs="all-linear",
    alpha_pattern=st.sampled_from(("^q_proj", "q_proj", "^1.q_proj", "1.q_proj", "proj", "^fc", "fc", "0.q_proj")).map(
        lambda key: {key: 32.0}
    ),
)
_rule(
    "PATTERN-007",
    "A key is a regular expression: an unescaped dot is any character, so 'layers.1.*' reaches layer 10 and "
    r"'layers\.1\..*' does not.",
    source="N8",
    shapes=BOTH | {"layersx1.q_proj": ("linear", 2, 2)},
    target_modules=["q_proj", "xq_proj"],
    rank_pattern=st.sampled_from(
        ("layers.1.*", r"layers\.1\..*", "layers.1.q_proj", r"^layers\.1.*", r"layers\.1.q_proj", r"\w+\.\d+\.x?q_proj")
    ).map(lambda key: {key: 5}),
)
_rule(
    "PATTERN-008",
    "An empty pattern is no pattern.",
    source="N8",
    shapes=BLOCK,
    rank_pattern=st.just({}),
    alpha_pattern=st.just({}),
)
_rule(
    "PATTERN-009",
    "A pattern may give lora_alpha = 0 and negative or fractional ones.",
    "alpha",
    "S3, N8",
    alpha_pattern=lambda n: keys(n, st.sampled_from((0.0, -4.0, 0.5))),
)
_rule(
    "PATTERN-010",
    "Patterns act with 'all-linear' as with a list.",
    "all-linear",
    target_modules="all-linear",
    rank_pattern=lambda n: keys(n, RANKS),
)


def patterned(implementation: Implementation) -> st.SearchStrategy[ModelSpec]:
    """A small model to run, with both patterns."""
    return small(
        implementation,
        rank_pattern=keys(SMALL, st.sampled_from((1, 2))),
        alpha_pattern=keys(SMALL, ALPHAS),
        **({"use_rslora": st.booleans()} if "rslora" in implementation.claims else {}),
    )


def expected(spec: ModelSpec, model: Model, adapter: str = "default") -> dict[str, tuple[Array, Array]]:
    """{module: (D, its bound)} with the s that the configuration gives, not the one that the model says."""
    found = {}
    for name, (_, _, s) in matching.targets(kinds_of(spec), spec.config).items():
        state = model.read(name, adapter)
        found[name] = oracle.delta(state.A, state.B, s), oracle.delta_bound(state.A, state.B, s)
    return found


@requirement("PATTERN-020", "A and B have the pattern's r.", "S2, D2", "model linear patterns", patterned, slow=2)
def pattern_020(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    for name, (r, _, _) in matching.targets(kinds_of(spec), spec.config).items():
        state, (out, n_in) = model.read(name), spec.modules[name].W.shape
        check.equal((state.A.shape, state.B.shape), ((r, n_in), (out, r)), f"the shapes of A and B in {name}")


@requirement(
    "PATTERN-021", "The output has every module's own s.", "S2, D1", "model linear patterns write", patterned, slow=2
)
def pattern_021(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = given_factors(implementation.model(spec), spec)
    bounded(check, spec, model.forward(x_of(spec)), expected(spec, model), "the output")


@requirement(
    "PATTERN-022",
    "Merging adds every module's own s.",
    "S2, U1",
    "model linear patterns merge write",
    patterned,
    slow=2,
)
def pattern_022(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = given_factors(implementation.model(spec), spec)
    D = expected(spec, model)
    model.merge()
    for name, (W, _) in model.base().items():
        delta, size = D.get(name, (0.0, 0.0))
        want = spec.modules[name].W
        check.close(W, want + delta, abs(want) + size, spec.dtype, f"the merged weight of {name}")
    bounded(check, spec, model.forward(x_of(spec)), D, "the output after merging")


@requirement(
    "PATTERN-023",
    "merge_and_unload adds every module's own s.",
    "S2, U5",
    "model linear patterns unload merge write",
    patterned,
    slow=2,
)
def pattern_023(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = given_factors(implementation.model(spec), spec)
    D = expected(spec, model)
    for name, (W, _) in model.unload(merge=True).items():
        delta, size = D.get(name, (0.0, 0.0))
        want = spec.modules[name].W
        check.close(W, want + delta, abs(want) + size, spec.dtype, f"the merged weight of {name}")


@requirement(
    "PATTERN-024",
    "A concatenation of adapters is the weighted sum of their updates, with every module's own s of each.",
    "S2, U9",
    "model linear patterns adapters weighted write",
    lambda i: st.tuples(patterned(i), keys(SMALL, st.sampled_from((1, 2)))),
    slow=2,
)
def pattern_024(implementation: Implementation, case: tuple[ModelSpec, dict[str, int]], check: Check) -> None:
    spec, ranks = case
    if spec.config.get("use_rslora"):  # WEIGHT-018 is about that
        spec = spec.but(use_rslora=False)
    second = spec.but(rank_pattern=ranks)
    model = given_factors(implementation.model(spec), spec)
    model.add("second", second.config)
    given_factors(model, second, "second")
    model.combine(["default", "second"], [2.0, -0.5], "both", "cat")
    first, other = expected(spec, model), expected(second, model, "second")
    check.that(model.adapted("both").keys() == first.keys(), f"{sorted(model.adapted('both'))} are adapted")
    for name in first:
        state = model.read(name, "both")
        D = oracle.delta(state.A, state.B, state.scaling)
        want, size = 2 * first[name][0] - 0.5 * other[name][0], 2 * first[name][1] + 0.5 * other[name][1]
        check.close(D, want, size, spec.dtype, f"the update of {name}")


@requirement(
    "PATTERN-025",
    "Adapters of one model have patterns of their own.",
    "S2, U7",
    "model linear patterns adapters write",
    lambda i: st.tuples(patterned(i), keys(SMALL, st.sampled_from((1, 2)))),
    slow=2,
)
def pattern_025(implementation: Implementation, case: tuple[ModelSpec, dict[str, int]], check: Check) -> None:
    spec, ranks = case
    second = spec.but(rank_pattern=ranks)
    model = given_factors(implementation.model(spec), spec)
    model.add("second", second.config)
    given_factors(model, second, "second")
    compare(check, model.adapted("second"), matching.targets(kinds_of(spec), second.config))
    compare(check, model.adapted(), matching.targets(kinds_of(spec), spec.config))
    model.set(["second"])
    bounded(check, spec, model.forward(x_of(spec)), expected(second, model, "second"), "the second adapter's output")
    model.set(["default"])
    bounded(check, spec, model.forward(x_of(spec)), expected(spec, model), "the first adapter's output")


@requirement(
    "PATTERN-026",
    "A saved adapter has every module's own r and s when it is loaded again.",
    "S2, X3",
    "model linear patterns files write",
    patterned,
    slow=2,
)
def pattern_026(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = given_factors(implementation.model(spec), spec)
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder))
        loaded = implementation.load(spec, Path(folder))
        compare(check, loaded.adapted(), matching.targets(kinds_of(spec), spec.config))
        bounded(check, spec, loaded.forward(x_of(spec)), expected(spec, model), "the output of the loaded model")


@requirement(
    "PATTERN-027",
    "An embedding follows the patterns as a linear layer does.",
    "S2, D4",
    "model linear embedding patterns write",
    lambda i: cases(
        i,
        {"emb": ("embedding", 4, 6), "h.emb": ("embedding", 4, 6), "h.up": ("linear", 4, 4)},
        target_modules=["emb", "up"],
        rank_pattern=st.sampled_from(("emb", "^emb", r"h\..*", "mb")).map(lambda key: {key: 3}),
        alpha_pattern=st.sampled_from(("emb", "^emb", r"h\..*")).map(lambda key: {key: 9.0}),
    ),
    slow=2,
)
def pattern_027(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    holds(implementation, spec, check)
    model = implementation.model(spec)
    for name, (r, _, s) in matching.targets(kinds_of(spec), spec.config).items():
        state, (out, n_in) = model.read(name), spec.modules[name].W.shape
        check.that(state.A.shape == (r, n_in) and state.B.shape == (out, r), f"{name}: A {state.A.shape}")
        rng = np.random.default_rng(spec.seed)
        model.write(name, reals(rng, state.A.shape), reals(rng, state.B.shape))
        check.close(model.read(name).scaling, s, abs(s), "float64", f"s of {name}")
