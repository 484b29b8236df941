"""The data-driven inits before `get_peft_model`: `preprocess_corda` and `preprocess_loraga`.

Each targeted module gets the attribute `prepared_init`, {method: a callable (weight, r, scaling) -> Factors}.
`get_peft_model` with the same configuration uses it. After an exception the model is unchanged.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..api.explain import explain
from ..core.adapter_modules import AdapterModule
from ..core.config import LoraConfig
from ..core.layer_types import is_conv1d_of_transformers
from ..core.update import Factors
from ..init import corda, lora_ga
from ..init.options import CordaConfig, LoraGAConfig
from ..safe.atomic import transaction
from ..safe.progress import steps
from ..safe.refusals import refuse
from ..safe.strict import prefix_errors
from . import hooks


@dataclass(frozen=True)
class Prepared:
    """An init with its data: a function of the weight, r and the scaling."""

    method: str
    shape: tuple[int, ...]  # (out, in)
    r: int
    start: Callable[..., Factors]  # (weight, scaling=s) -> Factors

    def __call__(self, weight: Float[Tensor, "out in"], r: int, scaling: float = 1.0, rng: Any = None) -> Factors:
        if (tuple(weight.shape), r) != (self.shape, self.r):
            made = f"init_lora_weights={self.method!r} was prepared for a weight {self.shape} and r={self.r}"
            both = "use the same model and configuration for both steps"
            raise ValueError(f"{made}, not for {tuple(weight.shape)} and r={r}: {both}")
        return self.start(weight, scaling=scaling)


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], object] | None = None,
    hooked_model: nn.Module | None = None,
    *,
    progress: bool = True,
) -> None:
    """Run the model on data and store r directions for `init_lora_weights="corda"` on each targeted layer.

        s * B A = U_r U_r^T W,  residual = W - s * B A      (the paper's frozen weight): `lora_ref.init.corda`

    `run_model()` calls the model on the data, in batches of any shape, in evaluation mode without gradients. Give
    `hooked_model` if it calls another copy of `model` (quantised, on another device). Memory, until it returns: in * in
    numbers for each distinct input, in at least float32. Layers that always get the same tensor share them.
    Raises: ValueError: no run_model; a configuration for another init; a targeted layer that is not Linear or Conv1D,
    is adapted already, has min(in, out) < r or a scaling <= 0; a layer without inputs, or whose inputs are all zero or
    not finite. The model is unchanged after any exception.
    Source: CorDA, arXiv 2406.05223; PEFT's preprocess_corda.
    Differs from PEFT: batches of more than one sample work. Training modes are restored after an exception, too.

    >>> from lora_ref.init.options import CordaConfig
    >>> _ = torch.manual_seed(0)
    >>> net, data = nn.Sequential(nn.Linear(4, 3)), torch.randn(8, 4)
    >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="corda", corda_config=CordaConfig("ipm"))
    >>> preprocess_corda(net, config, run_model=lambda: net(data), progress=False)
    >>> A, B, residual, _ = net[0].prepared_init["corda"](net[0].weight.detach(), r=2)
    >>> A.shape, B.shape, round(torch.dist(residual + B @ A, net[0].weight).item(), 3)
    (torch.Size([2, 4]), torch.Size([3, 2]), 0.0)
    """
    method = (lora_config.corda_config or CordaConfig()).corda_method
    targets = _resolve_targets(model, lora_config, "corda")
    if run_model is None:
        raise ValueError("run_model is None: give a function without arguments that runs the model on the data")
    hooked = model if hooked_model is None else hooked_model
    modules = dict(hooked.named_modules(remove_duplicate=False))
    if missing := [name for name in targets if name not in modules]:
        raise ValueError(f"{missing[0]}: hooked_model has no module of this name")
    layers = {name: modules[name] for name in targets}
    covariances = dict.fromkeys(layers, hooks.CovarianceSum())

    def record(name: str, x: Tensor) -> None:
        covariances[name] = covariances[name].add(x)

    with hooks.evaluation_mode(hooked), hooks.record_inputs(layers, record):
        run_model()
    latest: list[Any] = [None, None]  # a sum and its damped mean: layers with the same inputs follow each other

    def prepare(name: str, module: Any, r: int) -> Callable[..., Factors]:
        if (covariance := covariances.pop(name)) is not latest[0]:
            latest[:] = covariance, corda.damp(covariance.mean())
        U, S = corda.output_directions(_as_out_in(module, module.weight), latest[1], r, method)
        return functools.partial(corda.project_weight, U=U.clone(), S=S)  # a view would keep all of U alive

    _prepare(model, "corda", targets, prepare, "CorDA: decomposing", progress)


def preprocess_loraga(
    model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], object], *, progress: bool = True
) -> None:
    """Run the model forward and backward and store 2r directions of the gradient on each targeted layer.

        A = c V_a^T,  B = c U_b,  residual = W - s * B A      (the paper's frozen weight): `lora_ref.init.lora_ga`

    `train_step()` calls the model, and `backward()` on the loss, once for each batch. It must not step an optimiser.
    The gradient is the mean over all backward passes, in at least float32. The training modes stay: dropout makes it
    random. Memory, until it returns: in * out numbers for each targeted weight.
    Raises: ValueError: a configuration for another init; a targeted layer that is not Linear or Conv1D, is adapted
    already, has min(in, out) < 2r or a scaling <= 0; a layer whose gradient is missing, zero or not finite.
    `requires_grad` and `grad` of the parameters are restored in any case.
    Source: LoRA-GA, arXiv 2407.05000, algorithm 1; PEFT's preprocess_loraga.
    Differs from PEFT: there `grad` is lost, and if `train_step` sets it to zero, only the last batch counts.

    >>> _ = torch.manual_seed(0)
    >>> net, data = nn.Sequential(nn.Linear(4, 3)), torch.randn(8, 4)
    >>> config = LoraConfig(r=1, target_modules=["0"], init_lora_weights="lora_ga")
    >>> preprocess_loraga(net, config, train_step=lambda: net(data).square().sum().backward(), progress=False)
    >>> A, B, *_ = net[0].prepared_init["lora_ga"](net[0].weight.detach(), r=1)
    >>> A.shape, B.shape, net[0].weight.grad
    (torch.Size([1, 4]), torch.Size([3, 1]), None)
    """
    options = lora_config.lora_ga_config or LoraGAConfig()
    targets = _resolve_targets(model, lora_config, "lora_ga")
    weights = [module.weight for module, _ in targets.values()]
    with hooks.mean_gradients(model, weights) as gradients:
        train_step()

    def prepare(name: str, module: Any, r: int) -> Callable[..., Factors]:
        if id(module.weight) not in gradients:
            raise ValueError("got no gradient while train_step ran; does the loss depend on it?")
        A, B = lora_ga.gradient_directions(_as_out_in(module, gradients[id(module.weight)]), r, options.direction)
        scale, gamma = options.scale, options.stable_gamma
        return functools.partial(lora_ga.scale_directions, A=A, B=B, scale=scale, stable_gamma=gamma)

    _prepare(model, "lora_ga", targets, prepare, "LoRA-GA: decomposing", progress)


def _resolve_targets(model: nn.Module, config: LoraConfig, method: str) -> dict[str, tuple[Any, int]]:
    """{name: (module, r)} of the targeted modules; ValueError unless the method can adapt all of them."""
    if config.init_lora_weights != method:
        raise ValueError(f"init_lora_weights={config.init_lora_weights!r}: this prepares for {method!r}; set it so")
    if any(isinstance(module, AdapterModule) for module in model.modules()):
        raise ValueError("the model is adapted already: prepare the base model, before get_peft_model")
    plan = explain(model, config)
    refuse(model, config, plan, needs_data=False)
    return {m.name: (model.get_submodule(m.name), m.r) for m in plan.matches if m.action == "adapt" and m.r}


def _as_out_in(module: nn.Module, stored: Tensor) -> Float[Tensor, "out in"]:
    """A weight, or its gradient, as (out, in)."""
    return stored.detach().T if is_conv1d_of_transformers(module) else stored.detach()


def _prepare(
    model: nn.Module,
    method: str,
    targets: dict[str, tuple[Any, int]],
    prepare: Callable[[str, Any, int], Callable[..., Factors]],
    title: str,
    progress: bool,
) -> None:
    """Leave prepare(name, module, r) on each target, as an init; or, after an error, on none."""
    prepared = {}
    with steps(list(targets), title, progress) as names:
        for name in names:
            module, r = targets[name]
            with prefix_errors(name), torch.autocast(module.weight.device.type, enabled=False):
                shape = tuple(_as_out_in(module, module.weight).shape)
                prepared[name] = Prepared(method, shape, r, prepare(name, module, r))
    with transaction(model):
        for name, init in prepared.items():
            module, _ = targets[name]
            module.prepared_init = getattr(module, "prepared_init", {}) | {method: init}
