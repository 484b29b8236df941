"""How much code lora_ref is, beside PEFT's for the same job: `python tests/size.py`.

Code: lines that hold a part of a statement. Docstrings, comments and blank lines are left out. Of lora_ref the tools of
the command line are left out, for PEFT has none: the demo, the inspector, the plan. Of PEFT the classes and functions
are counted that do what lora_ref does: no DoRA, no merging of quantised layers, no other methods.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("tools",)
#: Modules of PEFT, with the classes and functions that count; () for all of them.
SAME_JOB: dict[str, tuple[str, ...]] = {
    "auto": (),
    "config": ("PeftConfigMixin", "PeftConfig"),
    "helpers": ("check_if_peft_model", "rescale_adapter_scale", "disable_input_dtype_casting"),
    "mapping": ("inject_adapter_in_model",),
    "mapping_func": ("get_peft_model",),
    "optimizers/loraplus": (),
    "peft_model": (
        *("PeftModel", "PeftModelForSequenceClassification", "PeftModelForCausalLM", "PeftModelForSeq2SeqLM"),
        *("PeftModelForTokenClassification", "PeftModelForQuestionAnswering", "PeftModelForFeatureExtraction"),
        *("TunerLayerStatus", "get_layer_status", "TunerModelStatus", "get_model_status"),
    ),
    "tuners/_buffer_dict": (),
    "tuners/lora/config": (
        "LoraRuntimeConfig",
        "LoftQConfig",
        "EvaConfig",
        "CordaConfig",
        "LoraGAConfig",
        "LoraConfig",
    ),
    "tuners/lora/corda": (),
    "tuners/lora/eva": (),
    "tuners/lora/layer": ("LoraLayer", "Linear", "Embedding", "_ConvNd", "Conv1d", "Conv2d", "Conv3d", "ParamWrapper"),
    "tuners/lora/loraga": (),
    "tuners/lora/model": ("LoraModel",),
    "tuners/tuners_utils": (
        *("BaseTuner", "BaseTunerLayer", "_find_minimal_target_modules", "_ExcludedModule", "inspect_matched_modules"),
        *("check_target_module_exists", "_maybe_include_all_linear_layers", "check_adapters_to_merge", "set_adapter"),
        *("find_parameter_name_by_module", "_delete_auxiliary_adapter", "_check_adapters_not_merged", "delete_adapter"),
        *("cast_adapter_dtype", "set_requires_grad"),
    ),
    "utils/error": (),
    "utils/hotswap": ("hotswap_adapter", "hotswap_adapter_from_state_dict", "check_hotswap_configs_compatible"),
    "utils/incremental_pca": (),
    "utils/loftq_utils": (),
    "utils/merge_utils": (),
    "utils/other": (
        "AuxiliaryTrainingWrapper",
        "ModulesToSaveWrapper",
        "_set_trainable",
        "_set_adapter",
        "cast_mixed_precision_params",
        "prepare_model_for_kbit_training",
    ),
    "utils/peft_types": ("PeftType", "TaskType"),
    "utils/save_and_load": (),
}
IGNORED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str, names: tuple[str, ...] = ()) -> set[int]:
    """The numbers of the lines of code; with names, of these classes and functions of the module alone.

    >>> code_lines('"Text."\\n\\nx = 1  # one\\n\\n\\ndef f():\\n    "Text."\\n    return (\\n        x\\n    )\\n')
    {3, 6, 8, 9, 10}
    >>> code_lines("x = 1\\n\\n\\ndef f():\\n    return x\\n", ("f",))
    {4, 5}
    """
    tree = ast.parse(source)
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in IGNORED:
            found |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        has_text = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if has_text and ast.get_docstring(node, clean=False) is not None:
            found -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    if not names:
        return found
    parts = [node for node in tree.body if getattr(node, "name", None) in names]
    assert len({node.name for node in parts}) == len(names), f"not all of {names} are there"
    kept = [range(min([n.lineno, *(d.lineno for d in n.decorator_list)]), n.end_lineno + 1) for n in parts]
    return found & {line for part in kept for line in part}


def of_lora_ref(room: str = "") -> int:
    """Lines of code of lora_ref without its tools, or of one of its rooms."""
    package = ROOT / "lora_ref"
    paths = [path for path in (package / room).rglob("*.py") if path.relative_to(package).parts[0] not in TOOLS]
    return sum(len(code_lines(path.read_text(encoding="utf-8"))) for path in paths)


def of_peft() -> int:
    """Lines of code of the installed PEFT for the same job."""
    spec = importlib.util.find_spec("peft")
    assert spec is not None and spec.origin is not None, "needs pip install 'lora_ref[peers]'"
    package = Path(spec.origin).parent
    return sum(
        len(code_lines((package / f"{module}.py").read_text(encoding="utf-8"), names))
        for module, names in SAME_JOB.items()
    )


if __name__ == "__main__":
    ours, theirs = of_lora_ref(), of_peft()
    print(f"lora_ref, without its tools: {ours:,} lines of code")
    print(f"of these in its core:        {of_lora_ref('core'):,} lines of code")
    print(f"PEFT, for the same job:      {theirs:,} lines of code")
    print(f"lora_ref / PEFT:             {ours / theirs:.2f}")
