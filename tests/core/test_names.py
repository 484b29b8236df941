"""Which modules, which rank: the statements N1 to N11 on names alone, and the laws behind them."""

import contextlib
import re
import time
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_ref import LoraConfig, explain, get_peft_model
from lora_ref.api.default_targets import ARCHITECTURES
from lora_ref.core import names as patterns
from lora_ref.core.names import (
    ModelNames,
    PatternDict,
    Rule,
    Targeting,
    check,
    ends_at_dot,
    layer_index,
    layer_lists,
    resolve,
)
from lora_ref.safe.regexes import Clock, Pattern
from spec_tests import agree

NAMES = ModelNames(
    {
        "model": "",
        "model.embed": "embedding",
        "model.layers.0": "",
        "model.layers.0.attn": "",
        "model.layers.0.attn.q_proj": "linear",
        "model.layers.0.attn.xq_proj": "linear",
        "model.layers.0.mlp.experts.5.up": "linear",
        "model.layers.1.attn.q_proj": "linear",
        "model.layers.1.mlp.up": "linear",
        "model.layers.10.attn.q_proj": "linear",
        "model.conv": "conv",
        "lm_head": "linear",
    },
    parameters=("model.layers.0.experts.gate_up", "model.layers.0.attn.q_proj.weight", "lm_head.weight"),
    heads=("lm_head",),
)


def adapted(action: str = "adapt", **options: object) -> list[str]:
    return resolve(NAMES, LoraConfig(**options)).names(action)


def ranks(**options: object) -> dict[str, int | None]:
    plan = resolve(NAMES, LoraConfig(target_modules=["q_proj", "up"], **options))
    return {m.name: m.r for m in plan.matches if m.action == "adapt"}


# -- N1 to N11 -------------------------------------------------------------------------------------


def test_n1_exclude_then_modules_to_save_then_target() -> None:
    every = {"target_modules": ["lm_head", "q_proj"]}
    plan = resolve(NAMES, LoraConfig(**every, modules_to_save=["lm_head"], exclude_modules=["lm_head"]))
    assert plan.names("adapt") == [name for name in NAMES.kinds if ends_at_dot("q_proj", name)]
    plan = resolve(NAMES, LoraConfig(**every, exclude_modules=["lm_head"]))
    assert plan.to_dict()["modules"]["lm_head"]["rule"] == "exclude_modules 'lm_head'"
    plan = resolve(NAMES, LoraConfig(**every, modules_to_save=["lm_head"]))
    assert plan.names("save") == ["lm_head"] and "lm_head" not in plan.names("adapt")
    assert "lm_head" in resolve(NAMES, LoraConfig(**every)).names("adapt")


def test_n2_a_list_item_is_a_name_or_a_dotted_end_taken_literally() -> None:
    assert adapted(target_modules=["attn.q_proj"]) == [n for n in NAMES.kinds if n.endswith(".attn.q_proj")]
    assert "model.layers.0.attn.xq_proj" not in adapted(target_modules=["q_proj"])
    assert adapted(target_modules=["q.proj"]) == adapted(target_modules=[".*q_proj"]) == []
    assert adapted(target_modules=["lm_head"]) == ["lm_head"]


def test_n3_a_string_is_a_regular_expression_for_the_whole_name() -> None:
    assert adapted(target_modules="q_proj") == []
    assert adapted(target_modules="lm_head") == ["lm_head"]
    assert adapted(target_modules=r".*\.1\..*(q_proj|up)") == ["model.layers.1.attn.q_proj", "model.layers.1.mlp.up"]


@pytest.mark.parametrize("spelling", ["all-linear", "ALL-LINEAR", "All-Linear"])
def test_n4_all_linear_is_every_linear_layer_but_the_head(spelling: str) -> None:
    assert adapted(target_modules=spelling) == [n for n, k in NAMES.kinds.items() if k == "linear" and n != "lm_head"]
    assert adapted(target_modules=["all-linear"]) == []  # in a list it is literal


def test_n4_without_an_output_embedding_nothing_is_left_out() -> None:
    plan = resolve(ModelNames({"a": "linear", "lm_head": "linear"}), LoraConfig(target_modules="all-linear"))
    assert plan.names("adapt") == plan.target_modules == ["a", "lm_head"]


def test_n5_empty_list_empty_string_and_none() -> None:
    config = LoraConfig(target_modules=[])
    with pytest.raises(ValueError, match="nothing to adapt"):
        check(resolve(NAMES, config), config)
    config = LoraConfig(target_modules=[], target_parameters=["experts.gate_up"])
    assert check(resolve(NAMES, config), config) == []
    with pytest.raises(ValueError, match="target_modules"):
        LoraConfig(target_modules="")
    with pytest.raises(ValueError, match="Please specify target_modules"):
        resolve(NAMES, LoraConfig())


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_n5_none_takes_the_targets_of_the_architecture(model_type: str) -> None:
    plan = resolve(ModelNames(NAMES.kinds, model_type=model_type), LoraConfig())
    assert plan.target_modules == ARCHITECTURES[model_type]


def test_n5_the_table_has_the_forty_architectures() -> None:
    assert len(ARCHITECTURES) == 40
    assert ARCHITECTURES["gpt2"] == ["c_attn"] and ARCHITECTURES["phi"] == ["q_proj", "v_proj", "fc1", "fc2"]
    assert ARCHITECTURES["mt5"] == ["q", "v"] and ARCHITECTURES["electra"] == ["query", "value"]


def test_n6_exclude_beats_an_exact_target_and_a_parent_does_not_exclude_its_children() -> None:
    full = "model.layers.0.attn.q_proj"
    assert adapted(target_modules=[full, "lm_head"], exclude_modules=["q_proj"]) == ["lm_head"]
    assert full in adapted(target_modules=["q_proj"], exclude_modules=["attn", "model.layers.0"])
    assert full not in adapted(target_modules=["q_proj"], exclude_modules=r".*layers\.0\..*")


def test_n7_layers_to_transform() -> None:
    q0, q1, q10 = (f"model.layers.{i}.attn.q_proj" for i in (0, 1, 10))
    assert adapted(target_modules=["q_proj"], layers_to_transform=1) == [q1]
    assert adapted(target_modules=["q_proj"], layers_to_transform=[0, 10]) == [q0, q10]
    assert adapted(target_modules=["q_proj"], layers_to_transform=[]) == [q0, q1, q10]
    assert adapted(target_modules=["q_proj"], layers_to_transform=[-1]) == []
    # an exact name is not asked for its index
    assert adapted(target_modules=["q_proj", q0, "lm_head"], layers_to_transform=[1]) == [q0, q1, "lm_head"]
    with pytest.raises(ValueError, match="layers_to_transform needs target_modules to be a list"):
        LoraConfig(target_modules=".*q_proj", layers_to_transform=0)
    with pytest.raises(ValueError, match="without layers_to_transform"):
        LoraConfig(target_modules=["q_proj"], layers_pattern="layers")


def test_n7_the_first_number_counts_and_experts_are_ignored() -> None:
    up = "model.layers.0.mlp.experts.5.up"
    assert up in adapted(target_modules=["up"], layers_to_transform=[0])
    assert up not in adapted(target_modules=["up"], layers_to_transform=[5])
    assert up in adapted(target_modules=["up"], layers_to_transform=[5], layers_pattern="experts")


@pytest.mark.parametrize(
    ("name", "pattern", "index"),
    [
        ("model.layers.3.q", None, 3),
        ("layers.3.q", None, None),  # at the root only with layers_pattern
        ("layers.3.q", "layers", 3),
        ("a.b.c.7.q", None, 7),
        ("model.h.2.q", ["layers", "h"], 2),
        ("model.layers.3", None, None),  # the list's entry itself
        ("model.layers.12.experts.4.up", "layers|h", 12),
        ("model.xlayers.3.q", "layers", None),
    ],
)
def test_n7_the_index_of_a_layer(name: str, pattern: str | list[str] | None, index: int | None) -> None:
    assert layer_index(name, layer_lists(pattern)) == index


def test_n8_a_key_must_reach_the_end_and_the_first_match_wins() -> None:
    q0, q1 = "model.layers.0.attn.q_proj", "model.layers.1.attn.q_proj"
    assert ranks(rank_pattern={"q_proj": 2})[q0] == 2
    assert ranks(rank_pattern={"^model.layers.0": 32})[q0] == 8  # does not reach the end
    assert ranks(rank_pattern={"^model.layers.1.*": 32})["model.layers.10.attn.q_proj"] == 32  # "." is any character
    assert ranks(rank_pattern={r"layers\.1\..*": 2, "q_proj": 4}) == ranks(rank_pattern={"q_proj": 4}) | {
        q1: 2,
        "model.layers.1.mlp.up": 2,
    }
    assert ranks(rank_pattern={"q_proj": 4, r"layers\.1\..*": 2})[q1] == 4
    assert ranks(rank_pattern=None) == ranks(rank_pattern={}) == dict.fromkeys(ranks(), 8)


def test_n8_rank_and_alpha_patterns_are_independent() -> None:
    plan = resolve(NAMES, LoraConfig(r=8, lora_alpha=8, target_modules=["up"], rank_pattern={r".*1\.mlp\.up": 2}))
    scales = {m.name: m.scaling for m in plan.matches if m.action}
    assert scales == {"model.layers.0.mlp.experts.5.up": 1.0, "model.layers.1.mlp.up": 4.0}
    plan = resolve(NAMES, LoraConfig(target_modules=["up"], alpha_pattern={r".*1\.mlp\.up": 2.0}))
    assert {m.scaling for m in plan.matches if m.action} == {1.0, 0.25}


def test_n9_nothing_matched_says_what_removed_what_and_names_near_ones() -> None:
    config = LoraConfig(target_modules=["qproj"])
    with pytest.raises(ValueError, match=r"nothing to adapt.*near names: q_proj, xq_proj"):
        check(resolve(NAMES, config), config)
    config = LoraConfig(target_modules=["conv"], exclude_modules=["conv"])
    with pytest.raises(ValueError, match=r"model\.conv: exclude_modules 'conv'"):
        check(resolve(NAMES, config), config)
    config = LoraConfig(target_modules=["conv"], layers_to_transform=[3])
    with pytest.raises(ValueError, match=r"model\.conv: target_modules 'conv', but not in a numbered layer"):
        check(resolve(NAMES, config), config)
    config = LoraConfig(target_modules="q_proj")
    with pytest.raises(ValueError, match="regular expression for the WHOLE name"):
        check(resolve(NAMES, config), config)


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"target_modules": ["q_proj", "k_proj"]}, "target_modules: 'k_proj' matched nothing"),
        ({"exclude_modules": ["nowhere"]}, "exclude_modules: 'nowhere' matched nothing"),
        ({"exclude_modules": "nowhere"}, "exclude_modules: 'nowhere' matched nothing"),
        ({"modules_to_save": ["score"]}, "modules_to_save: 'score' matched nothing"),
        ({"rank_pattern": {"^model.layers.0": 2}}, "rank_pattern: '^model.layers.0' matched nothing among the adapted"),
        ({"alpha_pattern": {"x": 2}}, "alpha_pattern: 'x' matched nothing among the adapted"),
        ({"target_parameters": ["experts.down"]}, "target_parameters: 'experts.down' matched nothing"),
    ],
)
def test_n9_a_rule_that_matched_nothing_is_named(options: dict, note: str) -> None:
    config = LoraConfig(**{"target_modules": ["q_proj"]} | options)
    (said,) = check(resolve(NAMES, config), config)
    assert said.startswith(note)


def test_n9_the_notes_are_warnings_when_a_model_is_adapted_and_silence_means_none() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="target_modules: '7' matched nothing"):
        get_peft_model(net, LoraConfig(target_modules=["0", "7"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))


def test_n9_a_module_of_another_type_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="1: ReLU cannot be adapted"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), LoraConfig(target_modules=["0", "1"]))


def test_n10_modules_to_save_is_a_name_or_a_dotted_end_never_a_plain_end() -> None:
    assert adapted("save", target_modules=["up"], modules_to_save=["q_proj"]) == [
        f"model.layers.{i}.attn.q_proj" for i in (0, 1, 10)
    ]
    assert adapted("save", target_modules=["up"], modules_to_save=["head"]) == []
    # what lies inside of a saved module is not adapted
    assert adapted(target_modules=["q_proj"], modules_to_save=["layers.0"]) == [
        f"model.layers.{i}.attn.q_proj" for i in (1, 10)
    ]


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM", None])
@pytest.mark.parametrize("head", ["score", "classifier"])
def test_n10_classification_saves_its_head_without_being_asked(task: str | None, head: str) -> None:
    names = ModelNames({"q": "linear", head: "linear"})
    config = LoraConfig(target_modules=["q"], task_type=task)
    plan = resolve(names, config)
    assert plan.names("save") == ([head] if task in ("SEQ_CLS", "TOKEN_CLS") else [])
    assert check(plan, config) == []  # and the head that is not there is not missed


def test_n11_target_parameters_are_names_or_dotted_ends_in_a_list() -> None:
    both = {"target_modules": []}
    assert adapted("adapt parameter", **both, target_parameters=["gate_up"]) == ["model.layers.0.experts.gate_up"]
    assert adapted("adapt parameter", **both, target_parameters=["perts.gate_up"]) == []
    assert adapted("adapt parameter", target_parameters=["lm_head.weight"]) == ["lm_head.weight"]
    with pytest.raises(TypeError, match="must be a list of names; write \\['gate_up'\\]"):
        LoraConfig(target_parameters="gate_up")


def test_n11_a_parameter_of_the_model_itself_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(nn.Linear(2, 2).weight.detach())

    with pytest.raises(ValueError, match="w: belongs to the model itself"):
        get_peft_model(Net(), LoraConfig(target_parameters=["w"]))


@pytest.mark.parametrize("options", [{"target_modules": ["0"]}, {"modules_to_save": ["0"]}])
def test_n11_a_module_and_its_parameter_are_not_adapted_both(options: dict) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"0\.weight: it (would be adapted as a module|belongs to a module)"):
        get_peft_model(net, LoraConfig(**{"target_modules": ["1"]} | options, target_parameters=["0.weight"]))
    assert type(net[0]) is nn.Linear


# -- laws ------------------------------------------------------------------------------------------

segment = st.text("ab.", min_size=1, max_size=4)
name_of = st.lists(st.sampled_from(["a", "b", "ab", "ba", "q", "aq", "0", "1"]), min_size=1, max_size=4).map(".".join)


@given(item=segment, name=st.text("ab.", max_size=8))
def test_ends_at_dot_is_equality_of_dotted_ends(item: str, name: str) -> None:
    cuts = [0, *(i + 1 for i, c in enumerate(name) if c == ".")]
    assert ends_at_dot(item, name) is (item in [name[i:] for i in cuts])


@given(items=st.lists(name_of, max_size=5), names=st.lists(name_of, max_size=6))
def test_a_rule_matches_as_a_scan_of_its_items_does(items: list[str], names: list[str]) -> None:
    rule = Rule("target_modules", items)
    used = set()
    for name in names:
        fitting = [item for item in items if ends_at_dot(item, name)]
        hit = rule.match(name)
        assert (hit is not None) is bool(fitting)
        if fitting:
            assert hit == max(fitting, key=len)  # the full name comes first
        used |= set(fitting)
    assert rule.unused == [item for item in items if item not in used]


keys = st.sampled_from(
    ["q", "a.q", "^a", "^a.*", r"a\.q", "a|b", ".*", "", "[ab]", "a$", "(a)q", "^q|b", "0", r"\d", ".", "a+",
     "b?q", "a{2}", "a{"]
)  # fmt: skip


@given(pattern=st.dictionaries(keys, st.integers(1, 9), max_size=4), names=st.lists(name_of, max_size=6))
def test_pattern_dict_is_the_first_key_that_peft_would_match(pattern: dict[str, int], names: list[str]) -> None:
    ours = PatternDict("rank_pattern", pattern)
    hits = [next((k for k in pattern if re.match(rf"(.*\.)?({k})$", name)), None) for name in names]
    assert [ours.key(name) for name in names] == hits


@given(pattern=keys, name=name_of)
def test_a_string_is_refullmatch(pattern: str, name: str) -> None:
    assert Pattern(pattern).fullmatch(name) is (re.fullmatch(pattern, name) is not None)


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("(?:foo){e<=2}", "fop", False),  # `regex` alone would match "almost foo"
        ("(?:foo){e<=2}", "foo{e<=2}", True),
        ("(?x)a{ 2 }", "aa", False),
        ("a{2}", "aa", True),
        ("[{]a", "{a", True),
        (r"\{a", "{a", True),
        (r"\N{LATIN SMALL LETTER A}", "a", True),
    ],
)
def test_a_brace_means_what_it_means_to_re(pattern: str, name: str, matches: bool) -> None:
    assert Pattern(pattern).fullmatch(name) is matches is (re.fullmatch(pattern, name) is not None)


# -- patterns that would hang ----------------------------------------------------------------------


@pytest.mark.parametrize("text", ["(a|aa)+", "(?:a|a?b|aa)+", "((a{1,9}){1,9}){1,9}b", "(?i)(A|AA)+"])
def test_a_slow_pattern_ends_at_its_limit_and_says_so(text: str) -> None:
    started = time.perf_counter()
    with pytest.raises(ValueError, match=r"target_modules: the regular expression .* is too slow"):
        Pattern(text, "target_modules", clock=Clock(0.1)).fullmatch("a" * 60 + "!")
    assert time.perf_counter() - started < 2


def test_the_keys_of_one_option_share_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of many keys that just keep within the limit would otherwise cost a second."""
    monkeypatch.setattr(patterns, "TIME_LIMIT", 0.05)
    rule = PatternDict("rank_pattern", {f"(a|aa)+{i}": 1 for i in range(100)})
    clock = next(iter(rule.patterns.values())).clock
    agree(clock.left, 0.15)
    assert all(p.clock is clock for p in rule.patterns.values())
    clock.left = 0.0
    with pytest.raises(ValueError, match="rank_pattern: its regular expressions are too slow"):
        rule.key("a")
    lists = layer_lists(["(a|aa)+", "(b|bb)+"])
    agree(lists[0].clock.left, 0.15)
    assert lists[1].clock is lists[0].clock


def test_what_a_match_takes_is_taken_off_the_clock() -> None:
    pattern = Pattern("(a|aa)+", clock=Clock(100.0))
    pattern.fullmatch("aa")
    assert pattern.clock.left == pytest.approx(100, abs=0.01)
    pattern.fullmatch("a" * 22 + "!")  # tens of thousands of ways
    assert (100 - pattern.clock.left) * 1e6 > 10  # microseconds


def test_a_long_pattern_with_a_small_count_is_usable() -> None:
    assert Pattern(r"model\.layers\.[0-9]{1,8}\.self_attn\.q_proj").fullmatch("model.layers.12345678.self_attn.q_proj")


@pytest.mark.parametrize(
    "text",
    ["(", "a{1000000000}", "(a{1000}){1000}", "(" * 9000 + ")" * 9000, "a" * 200_000, "a{2,1}", "*",
     "(?:" + "a?" * 9000 + "){999}", "[ab]" * 400],
)  # fmt: skip
def test_what_does_not_compile_or_would_not_fit_is_a_value_error_that_names_the_option(text: str) -> None:
    with pytest.raises(ValueError, match=r"^target_modules: .* is not a usable regular expression: "):
        Pattern(text, "target_modules")


def test_many_keys_are_refused_together() -> None:
    with pytest.raises(ValueError, match="rank_pattern: 5001 regular expressions"):
        LoraConfig(rank_pattern={f"q{i}": 1 for i in range(5001)})
    with pytest.raises(ValueError, match="alpha_pattern: 301 regular expressions with 301 classes"):
        LoraConfig(alpha_pattern={f"[q]{i}": 1 for i in range(301)})
    assert len(LoraConfig(rank_pattern={rf"^model\.layers\.{i}\.q_proj": 1 for i in range(1000)}).rank_pattern) == 1000


# -- explain ---------------------------------------------------------------------------------------


def plan_of_a_small_net() -> Targeting:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    return explain(net, LoraConfig(r=4, target_modules=["0", "9"], exclude_modules=["2"], rank_pattern={"0": 2}))


def test_explain_as_a_dict() -> None:
    assert plan_of_a_small_net().to_dict() == {
        "modules": {
            "0": {
                "action": "adapt",
                "rule": "target_modules '0', rank_pattern '0'",
                "r": 2,
                "lora_alpha": 8,
                "scaling": 4.0,
            },
            "1": {"action": "", "rule": "no target matches", "r": None, "lora_alpha": None, "scaling": None},
            "2": {"action": "", "rule": "exclude_modules '2'", "r": None, "lora_alpha": None, "scaling": None},
        },
        "unused": {"target_modules": ["9"]},
    }


def test_explain_as_a_table() -> None:
    text = str(plan_of_a_small_net())
    assert re.search(r"0 +│ adapt +│ target_modules '0', rank_pattern '0' +│ +2 │ +8 │ +4", text)
    assert "no target matches" in text and "exclude_modules '2'" in text
    assert "target_modules '9' matched nothing" in text


def test_explain_changes_nothing_and_agrees_with_what_is_then_adapted() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    config = LoraConfig(target_modules=["0"], layers_to_transform=None)
    plan = explain(net, config)
    assert type(net[0]) is nn.Linear and plan.names("adapt") == ["0", "1.0"]
    model = get_peft_model(net, config)
    assert model.targeted_module_names == plan.names("adapt") == explain(model, config).names("adapt")


def test_explain_is_about_the_active_adapter_or_else_the_first() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), LoraConfig(r=1, target_modules=["0"]))
    model.add_adapter("other", LoraConfig(r=1, target_modules=["1"]))
    assert model.explain().names("adapt") == ["0"]
    model.set_adapter("other")
    assert model.explain().names("adapt") == ["1"]
    model.base_model.active_adapters = []
    assert model.explain().names("adapt") == ["0"] and model.explain("other").names("adapt") == ["1"]


@given(st.sampled_from(["", ".*", r"\.", "q", "[a-z]+", "x{2}", "l?"]), st.sampled_from(["q", r"\d+", "proj$", ".*"]))
def test_a_quick_pattern_matches_what_the_timed_one_does(head: str, tail: str) -> None:
    """One repetition, no group: no clock. Everything else keeps its time limit."""
    pattern = Pattern(head + tail)
    assert pattern.is_quick is (sum((head + tail).count(c) for c in "*+?{") <= 1)
    for name in ("q", "layers.3.q", "layers.12.xx.proj", "layers.q.proj"):
        quick = pattern.fullmatch(name)
        pattern.is_quick = False
        assert pattern.fullmatch(name) is quick
        pattern.is_quick = True


@pytest.mark.parametrize("text", ["(a|aa)+", "(?:a)", ".*.*", "a{2}b{2}", "(?R)"])
def test_what_could_take_long_has_a_clock(text: str) -> None:
    with contextlib.suppress(ValueError):  # not every one compiles
        assert not Pattern(text).is_quick
