"""Which modules are adapted, with which r, alpha and s: lora_ref and the installed PEFT agree on random models.

Where lora_ref decides differently on purpose, a test of its own says so in its name.
"""

import copy
import warnings
from typing import Any

import peft
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer as PeftLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import lora_ref
from lora_ref.api.default_targets import ARCHITECTURES
from lora_ref.core.adapter_modules import ModulesToSave

MANY = settings(max_examples=12 * settings().max_examples)  # an example takes milliseconds, and many are refused

# ends of each other (q_proj, xq_proj), lists of layers and of experts, heads, numbers
NAMES = [
    "model",
    "layers",
    "blocks",
    "self_attn",
    "mlp",
    "experts",
    "q_proj",
    "xq_proj",
    "v_proj",
    "up",
    "down",
    "score",
    "classifier",
    "lm_head",
    "proj",
    "0",
    "1",
    "2",
    "3",
    "10",
]
LEAVES = {
    "linear": lambda: nn.Linear(2, 2),
    "conv1d": lambda: Conv1D(2, 2),
    "embedding": lambda: nn.Embedding(2, 2),
    "conv": lambda: nn.Conv2d(2, 2, 1),
    "relu": nn.ReLU,
}
LEAF_KINDS = st.sampled_from(["linear"] * 6 + list(LEAVES))


def build(tree: dict[str, Any]) -> nn.Module:
    """A model from nested dicts; the leaves name a kind of layer."""
    model = nn.Module()
    for name, child in tree.items():
        model.add_module(name, build(child) if isinstance(child, dict) else LEAVES[child]())
    return model


def blocks(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(names), LEAF_KINDS, min_size=1, max_size=3)


def numbered(child: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(["0", "1", "2", "10"]), child, min_size=1, max_size=3)


ATTENTION, EXPERTS = blocks("q_proj", "xq_proj", "v_proj"), numbered(blocks("up", "down", "proj"))
LAYER = st.fixed_dictionaries({"self_attn": ATTENTION}, optional={"experts": EXPERTS, "mlp": blocks("up", "down")})
TRANSFORMER = st.fixed_dictionaries({"layers": numbered(LAYER)}, optional={"blocks": numbered(ATTENTION)})
ANYTHING = st.dictionaries(
    st.sampled_from(NAMES),
    st.recursive(LEAF_KINDS, lambda child: st.dictionaries(st.sampled_from(NAMES), child, min_size=1, max_size=3)),
    min_size=1,
    max_size=4,
)
HEADS = {name: st.just("linear") for name in ("lm_head", "score", "classifier")}
TREES = ANYTHING | TRANSFORMER | st.fixed_dictionaries({"model": TRANSFORMER}, optional=HEADS)


@st.composite
def ends(draw: st.DrawFn, modules: list[str]) -> str:
    """A module's name or a dotted end of it, or, rarely, any word."""
    parts = draw(st.sampled_from(modules)).split(".")
    noise = st.sampled_from(NAMES) if draw(st.integers(0, 7)) == 0 else st.nothing()
    return draw(st.sampled_from([".".join(parts[i:]) for i in range(len(parts))]) | noise)


@st.composite
def expressions(draw: st.DrawFn, modules: list[str]) -> str:
    end = draw(ends(modules))
    dotless = end.replace(".", r"\.")
    template = st.sampled_from(
        [".*{}", r".*\.{}", "{}", r"({}|.*\.(q|v)_proj)", r".*\.[02]\..*", ".*(proj|up)", "^.*{}$"]
    )
    return draw(template).format(dotless)


@st.composite
def cases(draw: st.DrawFn) -> tuple[nn.Module, dict[str, Any]]:
    """A model, and options that hit some of it."""
    model = build(draw(TREES))
    model.add_module("norm", nn.LayerNorm(2))  # PEFT fails on a model without any parameter
    modules = [name for name, _ in model.named_modules() if name]
    leaves = [name for name, m in model.named_modules() if name and not isinstance(m, nn.ReLU) and not m._modules]
    leaves = leaves or modules
    some = st.lists(ends(leaves), max_size=4, unique=True)
    of_any = st.lists(ends(modules), max_size=2, unique=True)
    targets = draw(
        st.one_of(
            some,
            st.lists(ends(leaves), min_size=1, max_size=4, unique=True),
            st.lists(st.sampled_from(leaves), min_size=1, max_size=3),
            expressions(leaves),
            st.sampled_from(["all-linear", "ALL-Linear"]),
        )
    )
    options: dict[str, Any] = {"target_modules": targets, "r": draw(st.integers(1, 9))}
    options["lora_alpha"] = draw(st.sampled_from([0, 1, 8, 16, -4, 2.5]))
    options["use_rslora"] = draw(st.booleans())
    if draw(st.integers(0, 2)) == 0:
        options["exclude_modules"] = draw(of_any | expressions(modules))
    if draw(st.integers(0, 2)) == 0:
        options["modules_to_save"] = draw(of_any)
    if draw(st.integers(0, 9)) == 0 or (isinstance(targets, list) and draw(st.booleans())):
        indices = st.sampled_from([0, 1, 2, 3, 10, -1])
        options["layers_to_transform"] = draw(indices | st.lists(indices, min_size=1, max_size=3))
        lists = st.sampled_from(["layers", "blocks", "experts", "self_attn", r"lay\w+"])
        options["layers_pattern"] = draw(st.none() | lists | st.lists(lists, min_size=1, max_size=2))
    keys = st.one_of(ends(leaves), expressions(leaves), ends(leaves).map("^{}".format), st.just("^layers.0.*"))
    options["rank_pattern"] = draw(st.dictionaries(keys, st.integers(1, 9), max_size=2))
    options["alpha_pattern"] = draw(st.dictionaries(keys, st.sampled_from([1, 32, 0.5]), max_size=2))
    options["task_type"] = draw(st.sampled_from([None, None, "FEATURE_EXTRACTION", "SEQ_CLS"]))
    if "layers_to_transform" in options:
        model = inside(model)
    return model, {key: value for key, value in options.items() if value is not None}


def inside(model: nn.Module) -> nn.Module:
    """The model as a part of another. Then no list of layers is at the root, and no target is a full name.

    There PEFT does not restrict what layers_to_transform restricts (`spec_tests/known/peft/layers_given_in_full.py`).
    """
    return nn.ModuleDict({"net": model})


def outcome(library: Any, model: nn.Module, options: dict[str, Any]) -> dict[str, Any] | None:
    """What get_peft_model does to a copy of the model: adapted modules and modules saved whole; None: ValueError."""
    model = copy.deepcopy(model)
    layer, whole = (PeftLayer, ModulesToSaveWrapper) if library is peft else (lora_ref.LoraLayer, ModulesToSave)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            library.get_peft_model(model, library.LoraConfig(**copy.deepcopy(options)))  # PEFT extends the lists
        except ValueError:
            return None
    named = list(model.named_modules())
    return {
        "adapted": {
            name: (m.r["default"], m.lora_alpha["default"], m.scaling["default"])
            for name, m in named
            if isinstance(m, layer)
        },
        "saved": sorted(name for name, m in named if isinstance(m, whole)),
    }


def is_clean_suffix(model: nn.Module, item: str) -> bool:
    """Does item mean the same by PEFT's plain `endswith` as by dotted ends, with no hit inside another?"""
    plain = [name for name, _ in model.named_modules() if name.endswith(item)]
    return all(name == item or name.endswith("." + item) for name in plain)


def reaches_more_than_linear_layers(model: nn.Module) -> bool:
    """Is the full name of a linear layer the end of another module's name?"""
    linear = {name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    return any(name.endswith("." + one) for name, _ in model.named_modules() if name not in linear for one in linear)


@MANY
@given(cases())
def test_the_same_modules_are_adapted_with_the_same_rank_alpha_and_scaling(
    case: tuple[nn.Module, dict[str, Any]],
) -> None:
    model, options = case
    save = [*options.get("modules_to_save", [])]
    save += ["classifier", "score"] if options.get("task_type") == "SEQ_CLS" else []
    assume(all(is_clean_suffix(model, item) for item in save))
    saved = [name for name, _ in model.named_modules() if any(name == s or name.endswith("." + s) for s in save)]
    assume(not any(inner.startswith(outer + ".") for inner in saved for outer in saved))

    if str(options["target_modules"]).lower() == "all-linear":
        assume(not reaches_more_than_linear_layers(model))
    theirs, ours = outcome(peft, model, options), outcome(lora_ref, model, options)
    event("refused" if theirs is None else f"{min(len(theirs['adapted']), 3)} adapted, {len(theirs['saved'])} saved")
    assert ours == theirs
    if ours is not None:
        rows = lora_ref.explain(model, lora_ref.LoraConfig(**options)).to_dict()["modules"]
        told = {name: (m["r"], m["lora_alpha"], m["scaling"]) for name, m in rows.items() if m["action"] == "adapt"}
        assert told == ours["adapted"]
        assert sorted(name for name, m in rows.items() if m["action"] == "save") == ours["saved"]


@pytest.mark.parametrize("lists", [None, "layers", "experts", ["experts", "layers"], [r"lay\w+"], "xlayers", "model"])
@pytest.mark.parametrize("indices", [0, 2, [1, 2], [3], -1])
@pytest.mark.parametrize("targets", [["up", "q_proj"], ["0.up"], ["layers.1.q_proj", "up"], ["proj"]], ids=str)
def test_layers_are_counted_alike_in_a_mixture_of_experts(targets: Any, indices: Any, lists: Any) -> None:
    """The first number counts, not an expert's."""
    experts = {str(i): {"up": "linear"} for i in range(4)}
    layers = {str(i): {"experts": experts, "q_proj": "linear", "xq_proj": "linear"} for i in range(3)}
    model = inside(build({"model": {"layers": layers, "xlayers": layers}, "layers": layers}))
    options = {"target_modules": targets, "layers_to_transform": indices, "layers_pattern": lists}
    assert outcome(lora_ref, model, options) == outcome(peft, model, options)


def test_the_architecture_table_is_pefts() -> None:
    def comparable(table: dict[str, Any]) -> dict[str, Any]:
        return {key: value if isinstance(value, str) else set(value) for key, value in table.items()}

    assert comparable(ARCHITECTURES) == comparable(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [None, "all-linear", ["all-linear"], ["q_proj", "lm_head"]])
def test_a_transformers_model_is_targeted_alike(targets: Any, tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    config.tie_word_embeddings = tied
    model = LlamaForCausalLM(config)
    options = {"target_modules": targets, "task_type": "CAUSAL_LM"}
    assert outcome(lora_ref, model, options) == outcome(peft, model, options)


# -- differences, each on purpose ----------------------------------------------------------------


def small(**modules: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, module in modules.items():
        model.add_module(name, module)
    return model


def test_modules_to_save_end_at_a_dot_where_peft_takes_any_ending() -> None:
    """PEFT's documents promise names; its plain `endswith` also saves `xhead` for `head`."""
    model = small(q=nn.Linear(2, 2), head=nn.Linear(2, 2), xhead=nn.Linear(2, 2))
    options = {"target_modules": ["q"], "modules_to_save": ["head"]}
    assert outcome(lora_ref, model, options)["saved"] == ["head"]
    assert outcome(peft, model, options)["saved"] == ["head", "xhead"]


def test_all_linear_means_linear_where_peft_also_adapts_what_ends_like_a_linear_layer() -> None:
    """PEFT turns "all-linear" into a list of names, and matches these as ends of names."""
    model = small(proj=nn.Linear(2, 2), inner=small(proj=nn.Embedding(2, 2)))
    options = {"target_modules": "all-linear"}
    assert list(outcome(lora_ref, model, options)["adapted"]) == ["proj"]
    assert list(outcome(peft, model, options)["adapted"]) == ["proj", "inner.proj"]


def test_a_module_inside_a_saved_one_is_saved_once_where_peft_saves_it_twice() -> None:
    """PEFT wraps the copies inside the copy as well, and the file then holds tensors that nothing uses."""
    model = small(q=nn.Linear(2, 2), head=small(up=nn.Linear(2, 2)))
    options = {"target_modules": ["q"], "modules_to_save": ["head", "up"]}
    assert outcome(lora_ref, model, options)["saved"] == ["head"]
    assert len(outcome(peft, model, options)["saved"]) > 1


def test_the_head_of_a_token_classifier_is_saved_and_never_adapted_where_peft_crashes() -> None:
    """PEFT enters the head of TOKEN_CLS into modules_to_save after it has adapted it, and fails with a TypeError."""
    model = small(q=nn.Linear(2, 2), classifier=nn.Linear(2, 2))
    options = {"target_modules": "all-linear", "task_type": "TOKEN_CLS"}
    ours = outcome(lora_ref, model, options)
    assert list(ours["adapted"]) == ["q"] and ours["saved"] == ["classifier"]
    with pytest.raises(TypeError, match="cannot be applied to modules of type"):
        outcome(peft, model, options)
    spelt_out = {"target_modules": "all-linear", "modules_to_save": ["classifier", "score"]}
    assert outcome(peft, model, spelt_out) == ours


def test_the_out_projection_of_nn_multihead_attention_is_refused_where_peft_adapts_it_in_silence() -> None:
    """Statement D6: its forward reads out_proj.weight, so that PEFT's adapter there never runs."""
    model = small(attention=nn.MultiheadAttention(4, 2))
    options = {"target_modules": ["out_proj"]}
    assert outcome(lora_ref, model, options) is None
    assert list(outcome(peft, model, options)["adapted"]) == ["attention.out_proj"]


@pytest.mark.parametrize(
    "options",
    [
        {"exclude_modules": ""},
        {"layers_pattern": "layers", "layers_to_transform": []},
        {"rank_pattern": {"unused": 0}},
        {"alpha_pattern": {"unused": float("nan")}},
        {"lora_dropout": -1.0},
        {"lora_alpha": float("inf")},
        {"bias": "al"},
        {"init_lora_weights": "gausian"},
    ],
    ids=str,
)
def test_bad_values_are_refused_when_the_config_is_made_where_peft_makes_it(options: dict[str, Any]) -> None:
    peft.LoraConfig(target_modules=["q"], **options)
    with pytest.raises(ValueError, match=next(iter(options))):
        lora_ref.LoraConfig(target_modules=["q"], **options)
