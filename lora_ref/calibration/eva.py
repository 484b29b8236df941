"""EVA on a model, after `get_peft_model`: record the inputs of its layers on data, then set the ranks and A."""

import dataclasses
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import numerics
from ..api.peft_model import PeftModel
from ..core.adapter_modules import holders
from ..core.config import LoraConfig
from ..core.layer import LoraLayer, adapter_dtype
from ..core.model import LoraModel, biases, describe
from ..core.names import exactly
from ..core.update import Factors
from ..init.eva import eva
from ..init.options import EvaConfig
from ..safe.atomic import transaction
from ..safe.strict import levels_to_the_caller, prefix_errors
from .eva_statistics import ForwardFn, InputsFn, InputStatistics, RowsFn, kept_rows


@torch.no_grad()
def initialize_lora_eva_weights(
    model: PeftModel,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: ForwardFn | None = None,
    prepare_model_inputs_fn: InputsFn | None = None,
    prepare_layer_inputs_fn: RowsFn | None = None,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = False,
    show_progress_bar: bool = True,
) -> None:
    """Set the ranks and factors of an adapter with init_lora_weights="eva" from the inputs of its layers.

        A_l = the r_l leading principal components of layer l's inputs, B_l = 0,    sum r_l as before

    The components are `eva_state_dict`, or those of `get_eva_state_dict` on the data. The configuration then names
    every layer in full, with its rank and alpha. A layer of rank 0 loses the adapter. Embeddings, convolutions, raw
    parameters and layers that `eva_state_dict` does not name keep their factors, with a warning.

    Args:
        dataloader, forward_fn, ...: as for `get_eva_state_dict`.
        eva_state_dict: {layer: A (r_l, in)}, in place of data.
        adapter_name: it need not be active.

    Raises: ValueError: another init_lora_weights, a merged adapter, neither data nor components, components of another
    width; as `get_eva_state_dict`. The model is unchanged.
    Source: EVA, arXiv 2410.07170; PEFT's initialize_lora_eva_weights.
    Differs from PEFT: with rsLoRA alpha is adjusted by sqrt(rank / r).

    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> config = LoraConfig(r=1, target_modules=["0", "2"], init_lora_weights="eva", eva_config=EvaConfig(rho=2))
    >>> model = PeftModel(net, config)
    >>> data = [torch.randn(64, 4) * torch.tensor([3.0, 1.0, 1.0, 1.0]) for _ in range(8)]
    >>> initialize_lora_eva_weights(model, data, show_progress_bar=False)
    >>> model.lora_layers()["0"].r, model.lora_layers()["0"].factors("default")[0].abs().round().detach()
    ({'default': 1}, tensor([[1., 0., 0., 0.]]))
    """
    linear, options = layers_of(model, adapter_name)
    base, config = model.base_model, dataclasses.replace(model.peft_config[adapter_name], eva_config=options)
    if eva_state_dict is None:
        fns = (forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn)
        found = components_of(
            model, linear, options, dataloader, fns, adapter_name, gather_distributed_inputs, show_progress_bar
        )
    else:
        given = {name.removeprefix("base_model.model."): A for name, A in eva_state_dict.items()}
        if unknown := [name for name in given if name not in linear]:
            raise ValueError(
                f"eva_state_dict: {unknown[0]!r} is no adapted linear layer; there are {', '.join(linear)}"
            )
        found = {name: given[name] for name in linear if name in given}
    factors = {}
    for name, A in found.items():
        weight = linear[name].logical_weight()
        with prefix_errors(name):
            if A.ndim != 2 or A.shape[1] != weight.shape[1]:
                raise ValueError(f"components are {tuple(A.shape)}: must be (r, {weight.shape[1]})")
            B = numerics.zeros((weight.shape[0], A.shape[0]), weight)
            factors[name] = Factors(numerics.cast_finite(A, weight), B)
    layers = [name for name, layer in base.lora_layers().items() if adapter_name in layer.adapters()]
    if others := [name for name in layers if name not in factors]:
        why = "EVA knows linear layers only" if eva_state_dict is None else "eva_state_dict does not name all layers"
        warnings.warn(f"{why}: {', '.join(others)} keep the factors they have", stacklevel=levels_to_the_caller())
    with transaction(model):
        install_factors(base, adapter_name, config, factors)


@torch.no_grad()
def get_eva_state_dict(
    model: PeftModel,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: ForwardFn | None = None,
    prepare_model_inputs_fn: InputsFn | None = None,
    prepare_layer_inputs_fn: RowsFn | None = None,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = False,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """{layer: A (r_l, in)}: what `initialize_lora_eva_weights` gives the layers. The model stays as it is.

    The base model runs in evaluation mode, on the first batch twice, on others once. Layers that get the same tensor
    share its components. After 1, 2, 4, 8, ... batches the components are compared with those before. No more data are
    read when |cosine| >= tau for all that the layers need. Every process uses its own data.
    Memory: 8 * in * min(in, rows) bytes for every distinct input.

    Args:
        dataloader: batches. A mapping holds the model's keyword arguments, any other batch is its argument.
        peft_config: its eva_config takes the place of the adapter's, and the rest of it changes nothing.
        forward_fn: (model, batch) -> anything: runs the model in another way.
        prepare_model_inputs_fn: (batch, LoraConfig) -> what `prepare_layer_inputs_fn` gets in place of the batch.
        prepare_layer_inputs_fn: (input, batch, layer name) -> (rows, in): the rows of a layer's input to use. Default:
            `eva_statistics.kept_rows`. Inputs with fewer than round(r * rho) rows are skipped.
        gather_distributed_inputs: must be False where there are several processes.
        show_progress_bar: on stderr.

    Raises: ValueError: another init_lora_weights, a merged adapter, round(r * rho) > in, no data, no batch that is
    large enough, inputs that are not finite or do not fit the mask. TypeError: not a PeftModel.
    Warns: the data ended before all components converged; no eva_config.
    Source: EVA, arXiv 2410.07170; PEFT's get_eva_state_dict.
    Differs from PEFT: the components are exact, not of a truncated randomised SVD. The data are read once. Convergence
    is measured from n batches to 2n. The model must have the adapter.
    """
    linear, options = layers_of(model, adapter_name, None if peft_config is None else peft_config.eva_config)
    fns = (forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn)
    return components_of(
        model, linear, options, dataloader, fns, adapter_name, gather_distributed_inputs, show_progress_bar
    )


def layers_of(
    model: PeftModel, adapter_name: str, options: EvaConfig | None = None
) -> tuple[dict[str, LoraLayer], EvaConfig]:
    """The linear layers of an adapter with init_lora_weights="eva", and the `options`, by default its own."""
    if not isinstance(model, PeftModel):
        raise TypeError(f"model is a {type(model).__name__}: a PeftModel is needed, see get_peft_model")
    base = model.base_model
    base._check_known(adapter_name)
    config = base.peft_config[adapter_name]
    if config.init_lora_weights != "eva":
        raise ValueError(f"init_lora_weights={config.init_lora_weights!r}: must be 'eva' to be initialised with data")
    base._check_not_merged([adapter_name], "initialising")
    options = options or config.eva_config
    if options is None:
        warnings.warn("eva_config is None: EvaConfig() is used, with rho=2", stacklevel=levels_to_the_caller())
    layers = {name: layer for name, layer in base.lora_layers().items() if adapter_name in layer.adapters()}
    return {name: layer for name, layer in layers.items() if layer.kind == "linear"}, options or EvaConfig()


def components_of(
    model: PeftModel,
    layers: Mapping[str, LoraLayer],
    options: EvaConfig,
    dataloader: Iterable[Any] | None,
    fns: tuple[ForwardFn | None, InputsFn | None, RowsFn | None],
    adapter_name: str,
    gather_distributed_inputs: bool,
    show_progress_bar: bool,
) -> dict[str, Tensor]:
    """As `get_eva_state_dict`, for these layers."""
    if dataloader is None:
        raise ValueError("dataloader=None: give batches, or components as eva_state_dict")
    distributed = torch.distributed
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if gather_distributed_inputs and several:
        raise ValueError("gather_distributed_inputs=True: must be False with several processes; each uses its own data")
    forward_fn, inputs_fn, rows_fn = fns
    if inputs_fn is not None:
        chosen, config, last = rows_fn, model.peft_config[adapter_name], [None, None]  # a batch, what was made of it

        def rows_fn(x: Tensor, batch: Any, name: str) -> Tensor:
            if last[0] is not batch:
                last[:] = batch, inputs_fn(batch, config)
            return chosen(x, last[1], name) if chosen else kept_rows(x, last[1], options)

    statistics = InputStatistics(dict(layers), adapter_name, options)
    with model.base_model.disable_adapter():
        statistics.collect(model, dataloader, forward_fn, rows_fn, show_progress_bar)
    ranks, found = statistics.ranks(), {}
    for name, layer in layers.items():
        components = statistics.components[statistics.shared_with[name]]
        with prefix_errors(name):
            weight = layer.logical_weight()
            found[name] = eva(weight, ranks[name], components=components, whiten=options.whiten).A
    return found


def install_factors(model: LoraModel, adapter_name: str, config: LoraConfig, factors: Mapping[str, Factors]) -> None:
    """Replace an adapter's factors by factors of other ranks, 0 included, and its configuration. In a transaction."""
    layers = {name: layer for name, layer in model.lora_layers().items() if adapter_name in layer.adapters()}
    modules = describe(model.model).kinds
    trained = biases(model.model, config.bias, adapter_name)
    for name, new in factors.items():
        layer, rank = layers[name], new.A.shape[0]
        if rank == 0:
            del layers[name]
            layer.delete_adapter(adapter_name)
            if not layer.adapters():  # it was the last: the base layer replaces the layer
                for parent, attribute in holders(model.model)[id(layer.get_base_layer())]:
                    setattr(parent, attribute, layer.base_layer)
            continue
        old = layer.factors(adapter_name)
        layer.add_adapter(  # replaces the old one
            adapter_name,
            rank,
            adjusted_alpha(layer.lora_alpha[adapter_name], layer.r[adapter_name], rank, config),
            config,
            lambda *shape_and_scaling, new=new: new,
            autocast=old[0].dtype == adapter_dtype(layer.base_weight.dtype),
        )
        for factor, old_factor in zip(layer.factors(adapter_name), old, strict=True):
            factor.requires_grad_(old_factor.requires_grad)
    remaining = {id(bias) for bias in biases(model.model, config.bias, adapter_name).values()}
    for bias in trained.values():
        bias.requires_grad_(bias.requires_grad and id(bias) in remaining)
    ranks = {f"^{re.escape(name)}": layer.r[adapter_name] for name, layer in layers.items()}
    alphas = {f"^{re.escape(name)}": layer.lora_alpha[adapter_name] for name, layer in layers.items()}
    model.peft_config[adapter_name] = dataclasses.replace(
        config,
        target_modules=exactly([name for name in layers if layers[name].kind != "parameter"], modules),
        rank_pattern={key: r for key, r in ranks.items() if r != config.r},
        alpha_pattern={key: alpha for key, alpha in alphas.items() if alpha != config.lora_alpha},
        exclude_modules=None,  # the names in full replace these
        layers_to_transform=None,
        layers_pattern=None,
    )


def adjusted_alpha(alpha: float, r: int, rank: int, config: LoraConfig) -> float:
    """alpha * rank / r, with rsLoRA alpha * sqrt(rank / r): the scaling stays. Without adjust_scaling_factors alpha.

    >>> adjusted_alpha(16, 8, 4, LoraConfig()), adjusted_alpha(16, 8, 2, LoraConfig(use_rslora=True))
    (8.0, 8.0)
    """
    adjust = config.eva_config is None or config.eva_config.adjust_scaling_factors
    if rank == r or not adjust:
        return alpha
    return alpha * (math.sqrt(rank / r) if config.use_rslora else rank / r)
