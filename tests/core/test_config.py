"""LoraConfig: every bad value is refused with its option's name, every good one survives repr and JSON."""

import copy
import dataclasses
import json
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_ref import CordaConfig, EvaConfig, LoftQConfig, LoraConfig, LoraGAConfig, TaskType, get_peft_model
from lora_ref.files import config_file

NOT_BOOL = [None, 0, 1, "true", np.True_, [], 0.0]
NOT_NAMES = [5, True, {"a": 1}, [1], [None], [""], [["q"]]]
# option -> (bad values, what the message says is allowed)
BAD: dict[str, tuple[list[Any], str]] = {
    "r": ([0, -1, 1.5, 2.0, "8", None, True, [8], float("nan"), 10**400, np.float64(4)], "must be an int > 0"),
    "lora_alpha": (
        ["8", None, True, [], float("nan"), float("inf"), -float("inf"), 10**400],
        "must be a finite number",
    ),
    "target_modules": ([*NOT_NAMES, ""], "non-empty string"),
    "exclude_modules": ([*NOT_NAMES, ""], "non-empty string"),
    "layers_pattern": ([*NOT_NAMES, ""], "non-empty string"),
    "target_parameters": (NOT_NAMES, "a list of non-empty strings"),
    "modules_to_save": (NOT_NAMES, "a list of non-empty strings"),
    "layers_to_transform": (["0", 1.5, True, ["0"], [True], {0: 1}, [None]], "an int, a list of ints or None"),
    "rank_pattern": ([5, "q", [], [("q", 2)], {1: 2}], "a dict"),
    "alpha_pattern": ([5, "q", [], [("q", 2)], {1: 2}], "a dict"),
    "lora_dropout": ([-0.1, 1.1, "0", None, True, float("nan"), float("inf"), 10**400], r"a number in \[0, 1\]"),
    "bias": (["al", "All", "", None, True, []], "'none', 'all' or 'lora_only'"),
    "use_rslora": (NOT_BOOL, "True or False"),
    "fan_in_fan_out": (NOT_BOOL, "True or False"),
    "inference_mode": (NOT_BOOL, "True or False"),
    "init_lora_weights": (
        [None, 0, 1, "gausian", "", "pissa_niter_", "pissa_niter_-1", "pissa_niter_1.5", "pissa_niter_²", [], np.True_],
        "True, False, 'pissa_niter_<n>', 'gaussian', 'orthogonal', 'pissa'",
    ),
    "task_type": (["LM", "causal_lm", "", 1, True, []], "one of SEQ_CLS, SEQ_2_SEQ_LM, CAUSAL_LM"),
    "eva_config": ([5, "x", True, [], LoftQConfig()], "a EvaConfig, a dict or None"),
    "loftq_config": ([5, "x", True, [], EvaConfig()], "a LoftQConfig, a dict or None"),
    "corda_config": ([5, "x", True, [], EvaConfig()], "a CordaConfig, a dict or None"),
    "lora_ga_config": ([5, "x", True, [], EvaConfig()], "a LoraGAConfig, a dict or None"),
    "base_model_name_or_path": ([5, True, [], b"x"], "a string or None"),
    "revision": ([5, True, [], b"x"], "a string or None"),
    "peft_type": (["IA3", "lora", None, 5, []], "'LORA'"),
}
SUB_BAD: list[tuple[type, str, Any, str]] = [
    *((EvaConfig, "rho", x, "a number >= 1") for x in (0.9, "2", None, True, float("nan"), float("inf"))),
    *((EvaConfig, "tau", x, r"a number in \[0, 1\]") for x in (-0.1, 1.1, "1", None, True, float("nan"))),
    *((EvaConfig, "label_mask_value", x, "an int") for x in (1.5, "1", None, True)),
    *((EvaConfig, x, 1, "True or False") for x in ("use_label_mask", "whiten", "adjust_scaling_factors")),
    *((LoftQConfig, "loftq_bits", x, "2, 4 or 8") for x in (3, 0, "4", 4.0, None, True)),
    *((LoftQConfig, "loftq_iter", x, "an int > 0") for x in (0, -1, 1.0, "1", None, True)),
    *((CordaConfig, "corda_method", x, "'ipm' or 'kpm'") for x in ("x", None, 1)),
    *((LoraGAConfig, "direction", x, "one of ArBr, A2rBr, ArB2r, random") for x in ("arbr", None, 1)),
    *((LoraGAConfig, "scale", x, "one of stable, weight_svd, gd_scale, unit") for x in ("x", None, 1)),
    *((LoraGAConfig, "stable_gamma", x, "a number > 0") for x in (0, -1, "1", None, True, float("nan"))),
]


def test_every_option_is_in_the_table() -> None:
    assert BAD.keys() == {field.name for field in dataclasses.fields(LoraConfig)}


@pytest.mark.parametrize(
    ("option", "value"), [(o, v) for o, (values, _) in BAD.items() for v in values], ids=lambda x: repr(x)[:30]
)
def test_a_bad_value_is_refused_with_the_option_the_value_and_what_is_allowed(option: str, value: Any) -> None:
    shown = "<an int of more" if isinstance(value, int) and value > 10**80 and option != "lora_dropout" else repr(value)
    with pytest.raises(ValueError, match=BAD[option][1]) as caught:
        LoraConfig(**{option: value})
    assert str(caught.value).startswith(option)
    assert shown[:80] in str(caught.value) or option.endswith("_pattern")


@pytest.mark.parametrize("bad", SUB_BAD, ids=lambda bad: f"{bad[0].__name__}-{bad[1]}-{bad[2]!r}")
def test_a_bad_value_of_a_sub_config_likewise(bad: tuple[type, str, Any, str]) -> None:
    cls, option, value, allowed = bad
    with pytest.raises(ValueError, match=f"^{option}=.*: must be {allowed}"):
        cls(**{option: value})


@pytest.mark.parametrize(
    ("pattern", "bad"),
    [("rank_pattern", x) for x in (0, -1, 1.5, "2", None, True, 10**20)]
    + [("alpha_pattern", x) for x in ("2", None, True, float("nan"), float("inf"))],
)
def test_a_bad_value_in_a_pattern_names_its_key(pattern: str, bad: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{pattern}\['q_proj'\]="):
        LoraConfig(**{pattern: {"k": 2, "q_proj": bad}})


@pytest.mark.parametrize("option", ["target_parameters", "modules_to_save"])
def test_a_string_for_a_list_says_what_to_write(option: str) -> None:
    with pytest.raises(TypeError, match=rf"{option}='head': must be a list of names; write \['head'\]"):
        LoraConfig(**{option: "head"})


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "layers_pattern"])
def test_a_pattern_that_does_not_compile_is_refused_when_the_config_is_made(option: str) -> None:
    with pytest.raises(ValueError, match=rf"^{option}: '\(' is not a usable regular expression"):
        LoraConfig(**{option: "("})


@pytest.mark.parametrize(
    ("cls", "wrong", "right"),
    [
        (LoraConfig, "lora_alhpa", "lora_alpha"),
        (LoraConfig, "target_module", "target_modules"),
        (EvaConfig, "roh", "rho"),
        (LoftQConfig, "loftq_bit", "loftq_bits"),
        (CordaConfig, "corda_methode", "corda_method"),
    ],
)
def test_an_unknown_option_names_the_nearest(cls: type, wrong: str, right: str) -> None:
    with pytest.raises(TypeError, match=f"{cls.__name__} has no option '{wrong}'.*did you mean .*'{right}'"):
        cls(**{wrong: 1})


def test_options_that_do_not_go_together() -> None:
    for options in ({"lora_dropout": 0.1}, {"fan_in_fan_out": True}):
        with pytest.raises(ValueError, match="target_parameters works with"):
            LoraConfig(target_parameters=["w"], **options)
    with pytest.raises(ValueError, match="needs a loftq_config"):
        LoraConfig(init_lora_weights="loftq")
    with pytest.warns(UserWarning, match="loftq_config is given but"):
        LoraConfig(loftq_config=LoftQConfig())


def test_strings_of_inits_are_case_insensitive_and_numbers_may_be_numpys_floats() -> None:
    assert LoraConfig(init_lora_weights="PiSSA_niter_16").init_lora_weights == "pissa_niter_16"
    assert LoraConfig(lora_alpha=np.float64(16)).lora_alpha == 16
    assert LoraConfig(lora_dropout=0).lora_dropout == 0 and LoraConfig(lora_dropout=1).lora_dropout == 1
    assert LoraConfig(lora_alpha=-3).lora_alpha == -3 and LoraConfig(lora_alpha=0).lora_alpha == 0
    assert LoraConfig(task_type=TaskType.CAUSAL_LM) == LoraConfig(task_type="CAUSAL_LM")
    assert LoraConfig(eva_config={}).eva_config is None and LoraConfig(rank_pattern=None).rank_pattern == {}
    assert LoraConfig(target_modules={"b", "a"}).target_modules == LoraConfig(target_modules=("a", "b")).target_modules


names = st.text("ab_.é0", min_size=1, max_size=6)
lists = st.lists(names, max_size=3)
ranks = st.integers(1, 2**31)
alphas = st.floats(-1e6, 1e6) | st.integers(-1000, 1000)
keys = st.sampled_from(["q", r"layers\.0\..*", "^a", "a|b", "é"])
configs = st.fixed_dictionaries(
    {},
    optional={
        "r": ranks,
        "lora_alpha": alphas,
        "target_modules": st.none() | lists | st.sampled_from(["all-linear", r".*\.(q|v)", "'\"\\\\"]),
        "exclude_modules": st.none() | lists,
        "rank_pattern": st.none() | st.dictionaries(keys, ranks, max_size=3),
        "alpha_pattern": st.none() | st.dictionaries(keys, alphas, max_size=3),
        "modules_to_save": st.none() | lists,
        "lora_dropout": st.floats(0, 1),
        "bias": st.sampled_from(["none", "all", "lora_only"]),
        "use_rslora": st.booleans(),
        "fan_in_fan_out": st.booleans(),
        "inference_mode": st.booleans(),
        "init_lora_weights": st.sampled_from([True, False, "gaussian", "Orthogonal", "pissa_niter_4", "eva", "mica"]),
        "task_type": st.none() | st.sampled_from(list(TaskType)),
        "eva_config": st.none() | st.builds(EvaConfig, rho=st.floats(1, 4), whiten=st.booleans()),
        "corda_config": st.none() | st.builds(CordaConfig, corda_method=st.sampled_from(["ipm", "kpm"])),
        "base_model_name_or_path": st.none() | st.text(max_size=5),
        "revision": st.none() | names,
    },
).map(lambda options: LoraConfig(**options))


@given(config=configs)
def test_repr_evaluates_to_an_equal_config(config: LoraConfig) -> None:
    scope = {cls.__name__: cls for cls in (LoraConfig, EvaConfig, LoftQConfig, CordaConfig)}
    assert (
        eval(repr(dataclasses.replace(config, task_type=config.task_type and str(config.task_type))), scope) == config
    )


@given(config=configs)
def test_json_gives_an_equal_config_back(config: LoraConfig) -> None:
    text = config_file.dumps(config)
    assert config_file.from_dict(json.loads(text)) == config
    assert text == config_file.dumps(config_file.from_dict(json.loads(text)))
    assert json.loads(text)["peft_type"] == "LORA" and list(json.loads(text)) == sorted(json.loads(text))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear", "modules_to_save": ["2"]},
        {"target_modules": ["0"], "bias": "all", "fan_in_fan_out": True},
        {"target_modules": {"0", "2"}, "rank_pattern": {"0": 2}, "task_type": "SEQ_CLS"},
    ],
)
def test_the_users_config_is_never_changed(options: dict[str, Any]) -> None:
    config = LoraConfig(**options)
    before = copy.deepcopy(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), config)
    held = model.peft_config["default"]
    held.rank_pattern["x"] = 3
    held.r = 64
    assert config == before and config is not held and repr(config) == repr(before)


def test_a_config_broken_after_it_was_made_is_caught_when_it_is_used() -> None:
    config = LoraConfig(target_modules=["0"])
    config.lora_dropout = 7
    net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="lora_dropout=7"):
        get_peft_model(net, config)
    assert type(net[0]) is nn.Linear and net[0].weight.requires_grad
