"""What must be known of data before an adapter can be put in: `preprocess_corda` and `preprocess_loraga`.

Both run the model on data, decompose, and leave on each targeted module what its initialisation needs, as
`module.prepared_init`: {method: a callable (weight, r, scaling) -> Factors}. `get_peft_model` with the same
configuration takes it from there. They finish or change nothing.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
from ..safe import refusals as checks
from ..safe.atomic import transaction
from ..safe.progress import steps
from . import hooks as watch
from .covariance import Covariances
from .gradients import mean_gradients


@dataclass(frozen=True)
class Prepared:
    """An initialisation that has seen the data: it waits for the weight and the scaling."""

    method: str
    shape: tuple[int, ...]  # (out, in)
    r: int
    start: Callable[..., Factors]  # (weight, scaling=s) -> Factors

    def __call__(self, weight: Float[Tensor, "out in"], r: int, scaling: float = 1.0, rng: Any = None) -> Factors:
        if (tuple(weight.shape), r) != (self.shape, self.r):
            raise ValueError(
                f"init_lora_weights={self.method!r} was prepared for a weight {self.shape} and r={self.r}, not for "
                f"{tuple(weight.shape)} and r={r}: use the same model and configuration for both steps"
            )
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
    """Run the model on data and keep what `init_lora_weights="corda"` needs: r directions for each targeted layer.

    `run_model()` calls the model on the data, in batches of any shape; it runs in eval mode, without gradients.
    `hooked_model` is looked at in place of `model` where another copy of it runs (quantised, on another device).

    Memory, until it returns: in * in numbers for each distinct input, in float32 (float64 for a float64 model).
    Layers that always get the same tensor, as the projections of an attention do, share them.

    Raises:
        ValueError: no run_model; a configuration for another init; a targeted layer that is not Linear or Conv1D, is
            adapted already, has min(in, out) < r or a scaling <= 0; a layer that got no input, or nothing but zeros,
            or numbers that are not finite. The model is as it was, after any exception.

    Source: CorDA, arXiv 2406.05223; PEFT's preprocess_corda.

    Differs from PEFT: batches of more than one sample work; the modes of the modules are restored, and the hooks are
        removed after an exception too; no files are written: what is kept is small, and pickles with the model.

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
    targets = _targets(model, lora_config, "corda")
    if run_model is None:
        raise ValueError("run_model is None: give a function without arguments that runs the model on the data")
    hooked = model if hooked_model is None else hooked_model
    layers = {name: _same_layer(hooked, name) for name in targets}
    covariances = Covariances(layers)
    with watch.evaluating(hooked), watch.inputs(layers, covariances.see):
        run_model()

    prepared, shared, damped = {}, None, None
    with steps(list(targets), "CorDA: decomposing", progress) as names:
        for name in names:
            module, r = targets[name]
            W = _logical(module, module.weight)
            with _naming(name), torch.autocast(W.device.type, enabled=False):
                seen = covariances.pop(name)
                if seen is not shared:  # layers with the same inputs mostly follow each other
                    shared, damped = seen, corda.damped(seen.mean())
                U, S = corda.directions(W, damped, r, method)
            start = functools.partial(corda.from_directions, U=U.clone(), S=S)  # a view would keep all of U alive
            prepared[name] = Prepared("corda", tuple(W.shape), r, start)
    _leave(model, prepared, targets)


def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], object],
    *,
    progress: bool = True,
) -> None:
    """Run forward and backward passes and keep what `init_lora_weights="lora_ga"` needs: directions of the gradient.

    `train_step()` calls the model and `backward()` on the loss, once for each batch. It must not step an optimiser.
    G is the mean of the gradients of all its backward passes, in at least float32. It runs in the mode that the
    model is in: in training mode dropout makes G random.

    Memory, until it returns: in * out numbers for each targeted weight. Other parameters get no gradients.

    Raises:
        ValueError: a configuration for another init; a targeted layer that is not Linear or Conv1D, is adapted
            already, has min(in, out) < 2r or a scaling <= 0; a layer that got no gradient, or a zero or non-finite one.
            The parameters' `requires_grad` and `grad` are as they were, whether or not there is an exception.

    Source: LoRA-GA, arXiv 2407.05000, algorithm 1; PEFT's preprocess_loraga.

    Differs from PEFT: there the model is put into training mode, gradients that the model already had are lost, and
        so is all but the last batch where `train_step` sets the gradients to zero in between.

    >>> _ = torch.manual_seed(0)
    >>> net, data = nn.Sequential(nn.Linear(4, 3)), torch.randn(8, 4)
    >>> config = LoraConfig(r=1, target_modules=["0"], init_lora_weights="lora_ga")
    >>> preprocess_loraga(net, config, train_step=lambda: net(data).square().sum().backward(), progress=False)
    >>> A, B, *_ = net[0].prepared_init["lora_ga"](net[0].weight.detach(), r=1)
    >>> A.shape, B.shape, net[0].weight.grad
    (torch.Size([1, 4]), torch.Size([3, 1]), None)
    """
    options = lora_config.lora_ga_config or LoraGAConfig()
    targets = _targets(model, lora_config, "lora_ga")
    weights = [module.weight for module, _ in targets.values()]
    with mean_gradients(model, weights) as gradients:
        train_step()

    prepared = {}
    with steps(list(targets), "LoRA-GA: decomposing", progress) as names:
        for name in names:
            module, r = targets[name]
            if id(module.weight) not in gradients:
                raise ValueError(f"{name}: got no gradient while train_step ran; does the loss depend on it?")
            G = _logical(module, gradients[id(module.weight)])
            with _naming(name), torch.autocast(G.device.type, enabled=False):
                A, B = lora_ga.directions(G, r, options.direction)
            start = functools.partial(
                lora_ga.from_directions, A=A, B=B, scale=options.scale, stable_gamma=options.stable_gamma
            )
            prepared[name] = Prepared("lora_ga", tuple(G.shape), r, start)
    _leave(model, prepared, targets)


def _targets(model: nn.Module, config: LoraConfig, method: str) -> dict[str, tuple[Any, int]]:
    """{name: (module, r)} of what the configuration targets; ValueError unless this method can adapt all of it."""
    if config.init_lora_weights != method:
        raise ValueError(f"init_lora_weights={config.init_lora_weights!r}: this prepares for {method!r}; set it so")
    if any(isinstance(module, AdapterModule) for module in model.modules()):
        raise ValueError("the model is adapted already: prepare the base model, before get_peft_model")
    plan = explain(model, config)
    checks.check(model, config, plan, needs_data=False)
    return {m.name: (model.get_submodule(m.name), m.r) for m in plan.matches if m.action == "adapt" and m.r}


def _logical(module: nn.Module, stored: Tensor) -> Float[Tensor, "out in"]:
    """A weight, or its gradient, as (out, in)."""
    return stored.detach().T if is_conv1d_of_transformers(module) else stored.detach()


def _same_layer(hooked: nn.Module, name: str) -> nn.Module:
    """The layer of this name in the model that runs."""
    try:
        return hooked.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{name}: hooked_model has no module of this name") from None


@contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Put the layer's name before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{layer}: {error}") from None


def _leave(model: nn.Module, prepared: Mapping[str, Prepared], targets: Mapping[str, tuple[Any, int]]) -> None:
    with transaction(model):
        for name, init in prepared.items():
            module, _ = targets[name]
            module.prepared_init = getattr(module, "prepared_init", {}) | {init.method: init}
