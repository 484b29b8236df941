"""Is one class of transformers adapted, trained, merged, saved and loaded rightly? `examine` tells it step by step."""

from __future__ import annotations

import copy
import tempfile
import warnings
from typing import Any

import tiny

RIGHT = "right"
CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def tensors(output: Any) -> list[Any]:
    """The floating-point tensors of an output that do not hold a cache."""
    import torch

    values = output.to_tuple() if hasattr(output, "to_tuple") else output if isinstance(output, tuple) else (output,)
    return [x for x in values if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel()]


def run(model: Any, given: dict[str, Any]) -> list[Any]:
    import torch

    torch.manual_seed(2)
    with torch.no_grad():
        return [x.clone() for x in tensors(model(**given))]


def near(got: list[Any], want: list[Any]) -> bool:
    """Equal but for rounding: a network of two blocks in float32, whatever the size of its outputs."""
    import torch

    unit = torch.finfo(torch.float32).eps
    pairs = list(zip(got, want, strict=True))
    return bool(pairs) and all((a - b).abs().max() <= 2**12 * unit * b.abs().max() for a, b in pairs)


def equal(got: list[Any], want: list[Any]) -> bool:
    import torch

    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def runs(name: str) -> bool:
    """Does the class build and run, with finite outputs that are the same twice?"""
    model = tiny.build(name)
    given = tiny.inputs(model)
    out = run(model, given)
    small = sum(p.numel() for p in model.parameters()) < 5_000_000
    return small and bool(out) and all(x.isfinite().all() for x in out) and equal(run(model, given), out)


def backward(model: Any, given: dict[str, Any]) -> None:
    """The gradients of a random linear function of all outputs: no symmetry of the outputs makes them zero."""
    import torch

    torch.manual_seed(2)
    outputs = tensors(model(**given))
    torch.manual_seed(3)
    sum((x * torch.randn(x.shape)).mean() for x in outputs).backward()


def with_gradient(parameters: dict[str, Any]) -> set[str]:
    """Those whose gradient is more than a part of the rounding of the largest: those of early layers are small."""
    import torch

    found = {name: p for name, p in parameters.items() if p.grad is not None and p.numel()}
    sizes = {name: float(p.grad.abs().max()) for name, p in found.items()}
    largest = max(sizes.values(), default=0.0)
    return {name for name, size in sizes.items() if size > torch.finfo(found[name].dtype).eps / 128 * largest}


def reached(plain: Any, given: dict[str, Any], layers: list[str]) -> set[str]:
    """The layers whose weight counts for this input: in the base model it has a gradient."""
    model = copy.deepcopy(plain)
    weights = {name: model.get_submodule(name).weight.requires_grad_(True) for name in layers}
    backward(model, given)
    return with_gradient(weights)


def examine(name: str) -> dict[str, Any]:
    """{step: "right", or what is wrong} for one class, the number of its layers, and the warnings."""
    import lora_ref

    plain = tiny.build(name)
    given = tiny.inputs(plain)
    base = run(plain, given)
    assert base and all(x.isfinite().all() for x in base), "the base model gives no finite numbers"
    if not equal(run(plain, given), base):
        return {"family": tiny.family(name), "base": "its outputs are random"}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            model = lora_ref.get_peft_model(copy.deepcopy(plain), lora_ref.LoraConfig(**CONFIG))
        except ValueError as refusal:
            return {"family": tiny.family(name), "refused": " ".join(str(refusal).split())[:120]}
    found: dict[str, Any] = {"family": tiny.family(name), "layers": len(model.lora_layers())}
    found["warnings"] = sorted({str(w.message) for w in said if issubclass(w.category, UserWarning)})
    found |= trained(model, plain, given, base)
    adapted = run(model, given)
    found |= in_files(model, plain, given, adapted)
    return found | taken_away(model, plain, given, base, adapted)


def trained(model: Any, plain: Any, given: dict[str, Any], base: list[Any]) -> dict[str, Any]:
    """Before a step of training, and after it; leaves B random."""
    import torch

    found: dict[str, Any] = {}
    model.eval()
    start = RIGHT if equal(run(model, given), base) else "the output of a new adapter is not the base's"
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    backward(model, given)
    factors = {n: layer.factors("default")[1] for n, layer in model.lora_layers().items()}
    want, got = reached(plain, given, list(factors)), with_gradient(factors)
    found |= {"reached": len(want), "start": start}
    apart = sorted(want ^ got)
    found["gradients"] = RIGHT if not apart else f"{len(apart)} layers are not trained as their weights: {apart[0]}"
    optimizer.step()
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.manual_seed(len(key))
            parameter.data += 0.1 * torch.randn(parameter.shape)
    found["acts"] = RIGHT if not near(run(model, given), base) else "the adapter changes nothing"
    with model.disable_adapter():
        found["off"] = RIGHT if equal(run(model, given), base) else "the output differs from the base's"
    return found


def in_files(model: Any, plain: Any, given: dict[str, Any], adapted: list[Any]) -> dict[str, Any]:
    """The saved folder, read here and by PEFT."""
    import peft

    import lora_ref

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = lora_ref.PeftModel.from_pretrained(copy.deepcopy(plain), folder)
        found["file"] = RIGHT if equal(run(again, given), adapted) else "the loaded model gives other numbers"
        try:
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder)
            found["PEFT"] = RIGHT if near(run(theirs, given), adapted) else "PEFT reads another model"
        except Exception as error:  # any of PEFT's
            found["PEFT"] = f"{type(error).__name__}: {str(error)[:120]}"
    return found


def taken_away(model: Any, plain: Any, given: dict[str, Any], base: list[Any], adapted: list[Any]) -> dict[str, Any]:
    """Merged, unmerged, unloaded."""
    import torch

    found: dict[str, Any] = {}
    state = plain.state_dict()
    model.merge_adapter()
    found["merged"] = RIGHT if near(run(model, given), adapted) else "the merged output differs"
    model.unmerge_adapter()
    found["unmerged"] = RIGHT if equal(run(model, given), adapted) else "the output differs after unmerging"
    back = copy.deepcopy(model).unload()
    same = all(torch.equal(value, state[key]) for key, value in back.state_dict().items())
    found["unloaded"] = RIGHT if same and equal(run(back, given), base) else "the base model is not restored"
    whole = run(model.merge_and_unload(), given)
    found["merged and unloaded"] = RIGHT if near(whole, adapted) else "the merged output differs"
    return found
