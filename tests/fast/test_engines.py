"""Engines that attach themselves to modules: offloading, sharding, casting, quantising, compiling.

Each works where lora_A, lora_B, lora_dropout and the base layer are called. The expected numbers are those of the
model before the engine, or of `written_out.formula`; everything runs in one process.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from written_out import (
    BATCH,
    CALLED,
    EVENTS,
    MODES,
    N_IN,
    RAW,
    WORDS,
    Mode,
    adapted,
    assert_formula,
    assert_within,
    call_of,
    factor,
    flipped,
    formula,
    fresh_base,
    input_of,
    layer_of,
    module_at,
    parameters,
    results,
    right_or_refused,
)

from lora_ref import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from spec_tests import agree, close, distance

accelerate = pytest.importorskip("accelerate")

EVALUATED = ("two in evaluation", "a mixed batch")

# -- offloading ------------------------------------------------------------------------------------


def to_the_cpu(model: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def to_the_cpu_with_buffers(model: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)


def to_the_cpu_by_layers(model: nn.Module, folder: Path) -> None:
    """All weights of an adapted layer are loaded when it is called."""
    names = ["Linear", "Conv", "Conv2d", "Embedding", "Parameter"]
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), preload_module_classes=names)


def to_disk(model: nn.Module, folder: Path) -> None:
    accelerate.disk_offload(model, folder / "weights", execution_device=torch.device("cpu"))


OFFLOADED: dict[str, Callable[[nn.Module, Path], None]] = {
    "cpu": to_the_cpu,
    "cpu, with buffers": to_the_cpu_with_buffers,
    "cpu, by layers": to_the_cpu_by_layers,
    "disk": to_disk,
}


def assert_offloaded(model: nn.Module) -> None:
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("mode", EVALUATED)
@pytest.mark.parametrize("how", OFFLOADED)
@pytest.mark.parametrize("kind", CALLED)
def test_an_offloaded_model_computes_the_same(kind: str, how: str, mode: str, tmp_path: Path) -> None:
    """Each call loads the weights again. PEFT's output is the same."""
    chosen, x = MODES[mode], input_of(kind)
    ours = adapted(kind, chosen, p=0.25)
    want = results(lambda x: formula(kind, layer_of(ours), x, chosen), x, {})
    theirs = adapted(kind, chosen, p=0.25, library=pytest.importorskip("peft"))
    theirs.load_state_dict(ours.state_dict())
    for model, folder in ((ours, tmp_path / "ours"), (theirs, tmp_path / "theirs")):
        OFFLOADED[how](model, folder)
        for _ in range(2):
            assert_offloaded(model)
            agree(call_of(model, chosen)(x), want["y"])
            agree(results(call_of(model, chosen), x, {}), want)


@pytest.mark.parametrize("how", OFFLOADED)
@pytest.mark.parametrize("kind", ["embedding", *RAW])
def test_offloaded_factors_that_no_module_computes_with(kind: str, how: str, tmp_path: Path) -> None:
    """An embedding's factors are parameters, and a raw parameter's are multiplied with each other."""
    mode, x = MODES["two in evaluation"], input_of(kind)
    model = adapted(kind, mode)
    want = formula(kind, layer_of(model), x, mode).detach()
    OFFLOADED[how](model, tmp_path)
    assert_offloaded(model)
    for _ in range(2):
        right_or_refused(lambda: model(x), lambda y: agree(y, want), lambda: None, WORDS[kind])


@pytest.mark.parametrize("mode", EVALUATED)
@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B", "lora_A and lora_B"])
@pytest.mark.parametrize("kind", CALLED)
def test_one_module_that_is_offloaded(kind: str, part: str, mode: str) -> None:
    """The rest of the layer stays where it is: that is no mixture of devices."""
    chosen, x = MODES[mode], input_of(kind)
    model = adapted(kind, chosen)
    layer = layer_of(model)
    want = results(lambda x: formula(kind, layer, x, chosen), x, {})
    places = ["base_layer"] if part == "base_layer" else [f"{each}.{chosen.last}" for each in part.split(" and ")]
    for place in places:
        hook = accelerate.hooks.AlignDevicesHook(execution_device=torch.device("cpu"), offload=True)
        accelerate.hooks.add_hook_to_module(module_at(layer, place), hook)
        assert all(parameter.is_meta for parameter in module_at(layer, place).parameters())
    for _ in range(2):
        agree(call_of(model, chosen)(x), want["y"])
        agree(results(call_of(model, chosen), x, {}), want)
    for place in places:
        accelerate.hooks.remove_hook_from_module(module_at(layer, place))
    assert_formula(kind, model, chosen)


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B", "lora_dropout", "layer"])
@pytest.mark.parametrize("kind", CALLED)
def test_a_hook_of_accelerate_acts(kind: str, part: str) -> None:
    """accelerate's hooks are another `forward` of the object."""

    class Flipped(accelerate.hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return flipped(output)

    mode = MODES["two in evaluation"]
    model = adapted(kind, mode, p=0.25)
    place = part if part in ("base_layer", "layer") else f"{part}.{mode.last}"
    accelerate.hooks.add_hook_to_module(module_at(layer_of(model), place), Flipped())
    assert_formula(kind, model, mode, {f"{place} out": flipped})


def merge(model: Any) -> Any:
    model.merge_adapter()
    return model


def merge_and_unmerge(model: Any) -> Any:
    model.merge_adapter()
    model.unmerge_adapter()
    return model


def combine(model: Any) -> Any:
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    return model


#: Methods that read or write weights, and after which the output is the same.
SAME_OUTPUT: dict[str, Callable[[Any], Any]] = {
    "merge_adapter": merge,
    "unmerge_adapter": merge_and_unmerge,
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "add_weighted_adapter": combine,
}


@pytest.mark.parametrize("what", SAME_OUTPUT)
@pytest.mark.parametrize("how", ["cpu", "disk"])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
def test_what_reads_offloaded_weights_is_right_or_refused(kind: str, how: str, what: str, tmp_path: Path) -> None:
    mode, x = MODES["two in evaluation"], input_of(kind)
    model = adapted(kind, mode)
    want = model(x).detach()
    OFFLOADED[how](model, tmp_path)

    def unchanged() -> None:
        right_or_refused(lambda: model(x), lambda y: agree(y, want), lambda: None, WORDS[kind])

    right_or_refused(lambda: SAME_OUTPUT[what](model), lambda done: agree(done(x), want), unchanged)


def unmerged(model: Any, x: Tensor) -> Tensor:
    model.unmerge_adapter()
    return model(x)


def disabled(model: Any, x: Tensor) -> Tensor:
    with model.disable_adapter():
        return model(x)


def unloaded(model: Any, x: Tensor) -> Tensor:
    return model.unload()(x)


@pytest.mark.parametrize("how", ["cpu", "disk"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "embedding"])
def test_a_merged_model_that_is_offloaded(kind: str, how: str, tmp_path: Path) -> None:
    """The engine knows the merged weight alone: the other one must not be put into a place that it fills again."""
    mode, x = MODES["two in evaluation"], input_of(kind)
    plain = adapted(kind, mode)
    want = plain(x).detach()
    with plain.disable_adapter():
        base = plain(x).detach()
    for method, right in ((unmerged, want), (disabled, base), (unloaded, base)):
        model = adapted(kind, mode)
        model.merge_adapter()
        OFFLOADED[how](model, tmp_path / method.__name__)
        agree(model(x), want)
        right_or_refused(
            functools.partial(method, model, x),
            lambda y, right=right: agree(y, right),
            lambda model=model: agree(model(x), want),
        )


@pytest.mark.parametrize("how", ["cpu", "disk"])
@pytest.mark.parametrize("kind", CALLED)
def test_switching_adapters_of_an_offloaded_model(kind: str, how: str, tmp_path: Path) -> None:
    mode, x = MODES["two in evaluation"], input_of(kind)
    model = adapted(kind, mode)
    layer = layer_of(model)
    alone = {name: formula(kind, layer, x, Mode((name,), training=False)).detach() for name in mode.names}
    base = formula(kind, layer, x, Mode((), training=False)).detach()
    OFFLOADED[how](model, tmp_path)
    for name, want in alone.items():
        model.set_adapter(name)
        agree(model(x), want)
        agree(disabled(model, x), base)
    model.delete_adapter("default")
    agree(model(x), alone["other"])
    agree(model.unload()(x), base)


@pytest.mark.parametrize("how", ["cpu", "disk"])
@pytest.mark.parametrize("init", [True, "pissa"])
def test_adding_an_adapter_to_an_offloaded_model_is_right_or_refused(how: str, init: Any, tmp_path: Path) -> None:
    """Both starts change no output, if they know the weight."""
    mode, x = MODES["two in evaluation"], input_of("linear")
    model = adapted("linear", mode)
    want, base = model(x).detach(), disabled(model, x).detach()
    OFFLOADED[how](model, tmp_path)

    def add() -> None:
        model.add_adapter("late", LoraConfig(r=2, target_modules=["proj"], init_lora_weights=init))

    def right(_: None) -> None:
        agree(model(x), want)
        model.set_adapter("late")
        agree(model(x), base)

    right_or_refused(add, right, lambda: agree(model(x), want))


@pytest.mark.parametrize("how", OFFLOADED)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_offloaded_model_whose_start_changed_its_weight(how: str, init: str, tmp_path: Path) -> None:
    mode, x = MODES["one in evaluation"], input_of("linear")
    model = adapted("linear", mode, init_lora_weights=init)
    with torch.no_grad():
        factor("linear", layer_of(model), "B", "default").mul_(2)
    want, base = model(x).detach(), disabled(model, x).detach()
    agree(base, fresh_base("linear")(x))
    assert distance(want, base) > 0.1
    OFFLOADED[how](model, tmp_path)
    agree(model(x), want)
    agree(disabled(model, x), base)
    agree(model(x), want)


@pytest.mark.parametrize("how", ["cpu", "disk"])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding", *RAW])
def test_saving_an_offloaded_adapter_is_right_or_refused(kind: str, how: str, tmp_path: Path) -> None:
    mode = MODES["one in evaluation"]
    model = adapted(kind, mode)
    want = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    OFFLOADED[how](model, tmp_path)
    saved = tmp_path / "adapter"

    def right(_: None) -> None:
        agree(load_file(saved / "adapter_model.safetensors"), want)

    def nothing() -> None:
        assert not list(saved.rglob("*.safetensors"))

    right_or_refused(lambda: model.save_pretrained(saved), right, nothing)
    right_or_refused(lambda: get_peft_model_state_dict(model), lambda got: agree(got, want), lambda: None)


@pytest.mark.parametrize("how", ["cpu", "disk"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_setting_an_offloaded_adapter_is_right_or_refused(kind: str, how: str, tmp_path: Path) -> None:
    mode, x = MODES["one in evaluation"], input_of(kind)
    model, other = adapted(kind, mode), adapted(kind, mode)
    with torch.no_grad():
        factor(kind, layer_of(other), "B", "default").mul_(-1)
    state = {name: value.clone() for name, value in get_peft_model_state_dict(other).items()}
    before, want = model(x).detach(), other(x).detach()
    assert distance(before, want) > 0.1
    OFFLOADED[how](model, tmp_path)
    right_or_refused(
        lambda: set_peft_model_state_dict(model, state),
        lambda _: agree(model(x), want),
        lambda: agree(model(x), before),
    )


# -- sharding --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def group() -> Iterator[Any]:
    """A group of this process alone."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def by_fsdp1(model: Any, mesh: Any, use_orig_params: bool, **options: Any) -> nn.Module:
    """Each layer of the factors is a unit, as in PEFT's policy: a module without children whose weight trains."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

    def is_factor(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return not list(module.children()) and isinstance(weight, nn.Parameter) and weight.requires_grad

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a group of one process shards nothing, and says so
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=functools.partial(lambda_auto_wrap_policy, lambda_fn=is_factor),
            use_orig_params=use_orig_params,
            device_id=torch.device("cpu"),
            **options,
        )


def by_fsdp2(model: Any, mesh: Any, with_root: bool, with_base: bool = True) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    layer = layer_of(model)
    for part in (layer.lora_A, layer.lora_B):
        for module in part.values():
            fully_shard(module, mesh=mesh)
    if with_base:
        fully_shard(layer.get_base_layer(), mesh=mesh)
    return fully_shard(model, mesh=mesh) if with_root else model


SHARDED: dict[str, Callable[[Any, Any], nn.Module]] = {
    "FSDP1": functools.partial(by_fsdp1, use_orig_params=False),
    "FSDP1 with the original parameters": functools.partial(by_fsdp1, use_orig_params=True),
    "FSDP2, factors": functools.partial(by_fsdp2, with_root=False, with_base=False),
    "FSDP2, factors and base": functools.partial(by_fsdp2, with_root=False),
    "FSDP2, all": functools.partial(by_fsdp2, with_root=True),
}


def trained(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The outputs of three steps of training, the gradients of the last one, and the output after it."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    found: dict[str, Tensor] = {}
    for step in range(3):
        optimizer.zero_grad()
        y = model(x)
        found[f"y of step {step}"] = y.detach().clone()
        y.square().sum().backward()
        if step == 2:
            found["gradients"] = flat([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
    return found | {"y": model(x).detach()}


def flat(tensors: list[Any]) -> Tensor:
    """The numbers of these tensors, sharded or not, in one vector."""
    full = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]
    return torch.cat([t.detach().flatten() for t in full])


@pytest.mark.parametrize("mode", ["one in training", "two in training"])
@pytest.mark.parametrize("how", SHARDED)
@pytest.mark.parametrize("kind", CALLED)
def test_factors_that_are_units_of_fsdp_train(kind: str, how: str, mode: str, group: Any) -> None:
    chosen, x = MODES[mode], input_of(kind)
    want = trained(adapted(kind, chosen), x)
    agree(trained(SHARDED[how](adapted(kind, chosen), group), x), want)


@pytest.mark.parametrize("how", ["FSDP1", "FSDP1 with the original parameters", "FSDP2"])
def test_factors_that_are_units_of_fsdp_are_cast_when_they_are_called(how: str, group: Any) -> None:
    """Mixed precision: A x is 3 / 512 of a sum that cancels, and 0 for an A in bfloat16."""
    mode = MODES["one in training"]
    model = adapted("linear", mode, torch.float32)
    layer = layer_of(model)
    A, B = (factor("linear", layer, side, "default") for side in "AB")
    x = torch.tensor([1.0, -1.0]).repeat(BATCH, 3, N_IN // 2)
    with torch.no_grad():
        A.copy_(torch.tensor([1 + 2**-9, 1.0]).repeat(len(A), N_IN // 2))
        B.fill_(512)
        for parameter in layer.get_base_layer().parameters():
            parameter.zero_()
    assert formula("linear", layer, x, mode).abs().min() > 1
    narrow = A.detach().bfloat16()
    want = formula("linear", layer, x, mode, weights={"lora_A.default": lambda: narrow})
    assert not want.any()
    if how == "FSDP2":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        for module in (layer.lora_A["default"], layer.lora_B["default"]):
            fully_shard(module, mesh=group, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        y = model(x)
    else:
        from torch.distributed.fsdp import MixedPrecision

        policy = MixedPrecision(param_dtype=torch.bfloat16, cast_forward_inputs=True)
        y = by_fsdp1(model, group, "original" in how, mixed_precision=policy)(x)
    assert torch.equal(y.double(), want)


@pytest.mark.parametrize("what", ["merge_adapter", "merge_and_unload", "save_pretrained"])
@pytest.mark.parametrize("how", ["FSDP2, factors", "FSDP2, factors and base", "FSDP2, all"])
def test_what_reads_sharded_factors_is_right_or_refused(how: str, what: str, group: Any, tmp_path: Path) -> None:
    mode, x = MODES["one in evaluation"], input_of("linear")
    plain = adapted("linear", mode)
    want, state = plain(x).detach(), get_peft_model_state_dict(plain)
    model: Any = SHARDED[how](adapted("linear", mode), group)
    if what == "save_pretrained":
        model.save_pretrained(tmp_path)
        agree(load_file(tmp_path / "adapter_model.safetensors"), state)
    else:
        right_or_refused(
            getattr(model, what),
            lambda done: agree((done or model)(x), want),
            lambda: agree(model(x).detach(), want),
            "sharded",
        )


@pytest.mark.parametrize("how", ["FSDP1", "FSDP1 with the original parameters", "FSDP2, factors"])
@pytest.mark.parametrize("kind", RAW)
def test_sharded_factors_of_a_raw_parameter(kind: str, how: str, group: Any) -> None:
    mode, x = MODES["one in training"], input_of(kind)
    want = trained(adapted(kind, mode), x)
    called, model = (SHARDED[how](adapted(kind, mode), group) for _ in range(2))

    def right(y: Tensor) -> None:
        agree(y, want["y of step 0"])
        agree(trained(model, x), want)

    right_or_refused(lambda: called(x).detach(), right, lambda: None, "parameter")


# -- weights in a narrower dtype -------------------------------------------------------------------


def cast_by_layers(model: nn.Module, stored: torch.dtype, computed: torch.dtype) -> None:
    """A module without children holds its parameters in `stored`, and has them in `computed` while it is called."""
    for module in model.modules():
        if not list(module.children()) and next(module.parameters(recurse=False), None) is not None:
            module.to(stored)
            if not isinstance(module, nn.ParameterDict):
                module.register_forward_pre_hook(lambda module, args: module.to(computed) and None)
                module.register_forward_hook(lambda module, args, y: module.to(stored) and None)


def cast_by_copies(model: nn.Module, stored: torch.dtype, computed: torch.dtype) -> None:
    """The same with copies, through which the parameters get their gradients."""

    def up(module: Any, args: Any, held: dict[str, Any]) -> None:
        held.update({name: p for name, p in module._parameters.items() if p is not None})
        for name, parameter in held.items():
            del module._parameters[name]
            setattr(module, name, parameter.to(computed))

    def down(module: Any, args: Any, y: Tensor, held: dict[str, Any]) -> None:
        for name in held:
            delattr(module, name)
        module._parameters.update(held)

    for module in model.modules():
        if not list(module.children()) and next(module.parameters(recurse=False), None) is not None:
            module.to(stored)
            if not isinstance(module, nn.ParameterDict):
                held: dict[str, Any] = {}
                module.register_forward_pre_hook(functools.partial(up, held=held))
                module.register_forward_hook(functools.partial(down, held=held))


@pytest.mark.parametrize("mode", ["one in training", *EVALUATED])
@pytest.mark.parametrize("kind", CALLED)
def test_weights_that_are_cast_by_copies_train(kind: str, mode: str) -> None:
    """x is not rounded to the dtype in which A is stored. (PEFT rounds it, and torch refuses the product.)"""
    chosen = MODES[mode]
    model = adapted(kind, chosen, torch.float32)
    cast_by_copies(model, torch.bfloat16, torch.float32)
    for parameter in model.parameters():
        assert parameter.dtype == torch.bfloat16
    assert_within(kind, model, chosen, torch.float32)


@pytest.mark.parametrize("mode", EVALUATED)
@pytest.mark.parametrize(
    "stored, computed",
    [
        (torch.bfloat16, torch.float32),
        (torch.float8_e4m3fn, torch.float32),
        (torch.float8_e5m2, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("kind", CALLED)
def test_weights_that_are_cast_by_layers(kind: str, stored: torch.dtype, computed: torch.dtype, mode: str) -> None:
    chosen = MODES[mode]
    model = adapted(kind, chosen, torch.float32)
    cast_by_layers(model, stored, computed)
    for _ in range(2):
        with torch.no_grad():
            assert_within(kind, model, chosen, computed)
        assert {parameter.dtype for parameter in model.parameters()} == {stored}


@pytest.mark.parametrize("what", ["merge_adapter", "merge_and_unload"])
def test_merging_weights_that_are_cast_by_layers(what: str) -> None:
    """The sum is stored in the narrow dtype: it is the nearest number there, or the merge is refused."""
    mode = MODES["one in evaluation"]
    model = adapted("linear", mode, torch.float32)
    cast_by_layers(model, torch.bfloat16, torch.float32)
    layer, x = layer_of(model), input_of("linear", torch.float32)
    stored = [layer.get_base_layer().weight, *(factor("linear", layer, side, "default") for side in "AB")]
    (W, A, B), before = (p.detach().double() for p in stored), model(x)

    def right(done: Any) -> None:
        merged = done.proj if done is not None else layer.get_base_layer()
        want, size = (w + layer.scaling["default"] * b @ a for w, a, b in ((W, A, B), (W.abs(), A.abs(), B.abs())))
        close(merged.weight, want, 2, size)

    right_or_refused(getattr(model, what), right, lambda: agree(model(x).double(), before.double()))


# -- dynamic quantisation --------------------------------------------------------------------------


def quantized(model: nn.Module) -> Any:
    """Each nn.Linear, of the base and of the factors, is a module without parameters."""
    if torch.backends.quantized.engine == "none":
        pytest.skip("this torch has no quantised engine")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def quantized_sum(layer: Any, x: Tensor, mode: Mode) -> Tensor:
    """base(x) + the sum of s B(A(x)), of the quantised modules. Each call finds the range of its own input."""
    y = layer.get_base_layer()(x)
    for name in mode.names:
        rows = mode.rows_of(name)
        y = y.index_add(0, rows, layer.scaling[name] * layer.lora_B[name](layer.lora_A[name](x[rows])))
    return y


def assert_quantized(model: Any, mode: Mode) -> None:
    layer, x = layer_of(model), input_of("linear", torch.float32)
    assert all(not isinstance(module, nn.Linear) for module in model.modules())
    want = quantized_sum(layer, x, mode)
    size = layer.get_base_layer()(x).abs() + sum(
        layer.scaling[name] * layer.lora_B[name](layer.lora_A[name](x)).abs() for name in mode.names
    )
    close(call_of(model, mode)(x), want, 2 * len(mode.names) + 2, size)


@pytest.mark.parametrize("mode", ["one in evaluation", *EVALUATED])
def test_a_quantised_model_adds_up_its_quantised_modules(mode: str) -> None:
    chosen = MODES[mode]
    model = quantized(adapted("linear", chosen, torch.float32, p=0.25))
    assert_quantized(model, chosen)
    x = input_of("linear", torch.float32)
    exact = formula("linear", layer_of(adapted("linear", chosen, torch.float32)), x, chosen)
    assert distance(call_of(model, chosen)(x), exact) < 0.1


def test_switching_adapters_of_a_quantised_model() -> None:
    mode, x = MODES["two in evaluation"], input_of("linear", torch.float32)
    model = quantized(adapted("linear", mode, torch.float32))
    layer = layer_of(model)
    base = layer.get_base_layer()(x)
    for name in mode.names:
        model.set_adapter(name)
        assert_quantized(model, Mode((name,), training=False))
        assert torch.equal(disabled(model, x), base)
    assert "proj" in repr(model.get_base_model())
    model.delete_adapter("default")
    assert_quantized(model, Mode(("other",), training=False))
    assert torch.equal(model.unload()(x), base)


@pytest.mark.parametrize("what", ["merge_adapter", "merge_and_unload", "add_weighted_adapter", "save_pretrained"])
def test_what_needs_the_weights_of_a_quantised_model_is_refused(what: str, tmp_path: Path) -> None:
    mode = MODES["two in evaluation"]
    model = quantized(adapted("linear", mode, torch.float32))
    act = {
        **SAME_OUTPUT,
        "save_pretrained": lambda model: model.save_pretrained(tmp_path / "adapter"),
    }[what]
    with pytest.raises(ValueError, match="proj"):
        act(model)
    assert_quantized(model, mode)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_merged_model_that_is_quantised() -> None:
    """The quantised weight is the merged one: unmerging cannot restore another."""
    mode, x = MODES["two in evaluation"], input_of("linear", torch.float32)
    plain = adapted("linear", mode, torch.float32)
    plain.merge_adapter()
    model = quantized(plain)
    merged = layer_of(model).get_base_layer()(x)
    assert torch.equal(model(x), merged)
    for method in (unmerged, disabled, unloaded):
        with pytest.raises(ValueError, match="proj"):
            method(model, x)
        assert torch.equal(model(x), merged)


def test_quantised_factors_of_a_raw_parameter() -> None:
    mode, x = MODES["one in evaluation"], input_of("parameter", torch.float32)
    model = quantized(adapted("parameter", mode, torch.float32))
    layer = layer_of(model)
    A, B = (getattr(layer, f"lora_{side}")["default"].weight().dequantize() for side in "AB")
    base = layer.get_base_layer()(x)
    want = x @ (layer.get_base_layer().weight + layer.scaling["default"] * B @ A).T
    assert distance(base, want) > 0.1
    right_or_refused(lambda: model(x), lambda y: bounded(distance(y, want), 0.05), lambda: None, "parameter")


def bounded(value: float, largest: float) -> None:
    assert value < largest


# -- compilers and transforms ----------------------------------------------------------------------

HOOKED = ("lora_dropout", "lora_A", "lora_B", "base_layer")


def hooked(kind: str, part: str, event: str, mode: str, p: float = 0.0) -> tuple[Any, Mode, dict[str, Any]]:
    """A model with a hook, and `at` of the formula."""
    chosen, hook = MODES[mode], EVENTS[event]
    model = adapted(kind, chosen, p=p)
    place = part if part == "base_layer" else f"{part}.{chosen.last}"
    hook.attach(module_at(layer_of(model), place))
    return model, chosen, {f"{place} {hook.side}": hook.function}


@pytest.mark.parametrize("part, event", [("lora_A", "forward hook"), ("lora_B", "forward pre-hook")])
def test_compiled_with_a_hook(part: str, event: str) -> None:
    torch._dynamo.reset()
    model, mode, at = hooked("linear", part, event, "two in training")
    assert_formula("linear", Compiled(model, torch.compile(model, backend="eager")), mode, at)


class Compiled:
    """A compiled model that has the parts of the model itself."""

    def __init__(self, model: Any, call: Any) -> None:
        self.get_base_model, self.call = model.get_base_model, call

    def __call__(self, x: Tensor) -> Tensor:
        return self.call(x)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("event", ["forward hook", "forward pre-hook", "backward pre-hook"])
@pytest.mark.parametrize("part", HOOKED)
@pytest.mark.parametrize("kind", CALLED)
def test_checkpointed_with_a_hook(kind: str, part: str, event: str, reentrant: bool) -> None:
    """Backward computes the layer again, with the same masks and hooks."""
    model, mode, at = hooked(kind, part, event, "two in training", p=0.25)
    call = functools.partial(checkpoint, model, use_reentrant=reentrant)
    assert_formula(kind, Compiled(model, call), mode, at, p=0.25)


@pytest.mark.parametrize("part", HOOKED)
@pytest.mark.parametrize("kind", CALLED)
def test_traced_with_a_hook(kind: str, part: str) -> None:
    model, mode, at = hooked(kind, part, "forward hook", "two in evaluation", p=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, input_of(kind), check_trace=False)
    assert_formula(kind, Compiled(model, traced), mode, at)


@pytest.mark.parametrize("part", [None, *HOOKED])
@pytest.mark.parametrize("kind", CALLED)
def test_other_values_for_one_call(kind: str, part: str | None) -> None:
    """`functional_call` with other factors: they act, and they have the gradients."""
    model, mode, at = hooked(kind, part or "lora_A", "forward hook", "two in evaluation", p=0.25)
    if part is None:
        model, at = adapted(kind, mode), {}
    layer, x = layer_of(model), input_of(kind)
    own = parameters(kind, layer, mode)
    values = {name: nn.Parameter(p.detach().flip(0) + 1) for name, p in own.items()}
    weights = {f"lora_{name[0]}.{name[5:]}": lambda p=p: p for name, p in values.items()}
    paths = {id(p): path for path, p in model.named_parameters()}
    replaced = {paths[id(own[name])]: value for name, value in values.items()}
    want = results(lambda x: formula(kind, layer, x, mode, at, weights), x, values)
    got = results(lambda x: torch.func.functional_call(model, replaced, (x,)), x, values)
    agree(got, want)
    assert_formula(kind, model, mode, at)


@pytest.mark.parametrize("part", HOOKED)
@pytest.mark.parametrize("kind", CALLED)
def test_a_gradient_for_each_sample_with_a_hook(kind: str, part: str) -> None:
    model, mode, at = hooked(kind, part, "forward hook", "two in evaluation", p=0.25)
    layer, x = layer_of(model), input_of(kind)
    own = parameters(kind, layer, mode)
    paths = {id(p): path for path, p in model.named_parameters()}
    values = {paths[id(p)]: p.detach() for p in own.values()}

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (x[None],)).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)
    formula(kind, layer, x, mode, at).square().sum().backward()
    agree({name: g.sum(0) for name, g in got.items()}, {paths[id(p)]: p.grad for p in own.values()})
