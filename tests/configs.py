"""Configurations, regular expressions and names of modules at random."""

from hypothesis import strategies as st

from lora_ref import CordaConfig, EvaConfig, LoraConfig, TaskType

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

patterns = st.sampled_from(
    [
        *("q", "a.q", "^a", "^a.*", r"a\.q", "a|b", ".*", "", "[ab]", "a$", "(a)q", "^q|b"),
        *("0", r"\d", ".", "a+", "b?q", "a{2}", "a{"),
    ]
)
segments = st.sampled_from(["a", "b", "ab", "ba", "q", "aq", "0", "1"])
module_names = st.lists(segments, min_size=1, max_size=4).map(".".join)
