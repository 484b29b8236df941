"""EVA on a model: watch the inputs of its layers over some data, then share out ranks and set A.

    get_peft_model(net, LoraConfig(init_lora_weights="eva", ...)), then initialize_lora_eva_weights(model, data)

All is computed before anything in the model is changed.
"""

import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..api.peft_model import PeftModel
from ..core.config import LoraConfig
from ..core.layer import LoraLayer, adapter_dtype
from ..core.model import LoraModel, biases, describe, holders
from ..core.names import exactly
from ..core.update import Factors
from ..init.eva import eva
from ..init.options import EvaConfig
from ..safe.atomic import transaction
from .eva_statistics import Forward, Pass, Prepare


@torch.no_grad()
def initialize_lora_eva_weights(
    model: PeftModel,
    dataloader: Iterable[Any],
    adapter_name: str = "default",
    *,
    forward_fn: Forward | None = None,
    prepare_layer_inputs_fn: Prepare | None = None,
    show_progress_bar: bool = True,
) -> None:
    """Give an adapter with init_lora_weights="eva" its ranks and factors, from the inputs of its layers.

        A_l = the r_l leading principal components of layer l's inputs, B_l = 0,    sum r_l as before

    The base model runs in evaluation mode over the batches, at most once over all of them (and twice over
    the first). Layers that are given the same tensor share its components. After 1, 2, 4, 8, ... batches the
    components are compared with those before: when all that a layer needs have |cosine| >= tau, in all
    layers, the rest of the data is not read. The adapter's configuration then names every layer in full,
    with its rank and alpha; layers of rank 0 lose the adapter. Layers that EVA does not know (embeddings,
    convolutions, raw parameters) keep what they have.

    Memory: 8 * in * min(in, rows seen) bytes for every distinct input, see `lora_ref.numerics.pca`. Where that is too
    much, give fewer batches or adapt fewer layers at a time. Every process sees its own data only.

    Args:
        dataloader: batches; a mapping is unpacked into the model's arguments, anything else is the argument.
        adapter_name: which adapter; it need not be active.
        forward_fn: (model, batch) -> anything: runs the model otherwise.
        prepare_layer_inputs_fn: (input, batch, layer name) -> (rows, in): which rows of a layer's input count.
            By default the positions with attention_mask 1 and (with use_label_mask) with labels other than
            label_mask_value, if the batch has these; all positions else. A batch with fewer rows than
            round(r * rho) is skipped.
        show_progress_bar: on stderr.

    Raises:
        ValueError: another init_lora_weights, a merged adapter, round(r * rho) > in, no data, no batch that is
            large enough, inputs that are not finite or do not fit the mask. The model is unchanged.

    Warns: the data ended before all components converged; layers that EVA does not know; no eva_config.

    Source: EVA, arXiv 2410.07170; PEFT's initialize_lora_eva_weights.

    Differs from PEFT: the components are exact, where a truncated incremental and randomised SVD is taken; it
        reads the data once, not until it converges; convergence is measured from n batches to 2n, for between
        successive batches the cosine rises merely because there are more of them; alpha is adjusted by
        sqrt(rank / r) with rsLoRA.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> config = LoraConfig(r=1, target_modules=["0", "2"], init_lora_weights="eva", eva_config=EvaConfig(rho=2))
    >>> model = PeftModel(net, config)
    >>> data = [torch.randn(64, 4) * torch.tensor([3.0, 1.0, 1.0, 1.0]) for _ in range(8)]
    >>> initialize_lora_eva_weights(model, data, show_progress_bar=False)
    >>> model.layers()["0"].r, model.layers()["0"].factors("default")[0].abs().round().detach()
    ({'default': 1}, tensor([[1., 0., 0., 0.]]))
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"model is a {type(model).__name__}: a PeftModel is needed, see get_peft_model")
    base = model.base_model
    base._check_known(adapter_name)
    config = base.peft_config[adapter_name]
    if config.init_lora_weights != "eva":
        raise ValueError(f"init_lora_weights={config.init_lora_weights!r}: must be 'eva' to be initialised with data")
    base._check_not_merged([adapter_name], "initialising")
    if config.eva_config is None:
        warnings.warn("eva_config is None: EvaConfig() is used, with rho=2", stacklevel=3)
    options = config.eva_config or EvaConfig()
    config = dataclasses.replace(config, eva_config=options)
    layers = {name: layer for name, layer in base.layers().items() if adapter_name in layer.adapters()}
    linear = {name: layer for name, layer in layers.items() if layer.kind == "linear"}
    seen = Pass(linear, adapter_name, options)
    with base.disable_adapter():
        seen.run(model, dataloader, forward_fn, prepare_layer_inputs_fn, show_progress_bar)
    ranks = seen.ranks()
    factors = {}
    for name, layer in linear.items():
        components = seen.components[seen.leader[name]]
        try:
            factors[name] = eva(layer.logical_weight(), ranks[name], components=components, whiten=options.whiten)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if others := [name for name in layers if name not in linear]:
        warnings.warn(f"EVA knows linear layers only: {', '.join(others)} keep the factors they have", stacklevel=3)
    with transaction(model):
        rewrite(base, adapter_name, config, factors)


def rewrite(model: LoraModel, adapter_name: str, config: LoraConfig, factors: Mapping[str, Factors]) -> None:
    """Put new factors, of other ranks, into the layers of an adapter, and the layers' names, ranks and alphas into
    its configuration. A layer whose factors have rank 0 loses the adapter. Run it in a transaction.
    """
    layers = {name: layer for name, layer in model.layers().items() if adapter_name in layer.adapters()}
    modules = describe(model.model).kinds
    trained = biases(model.model, config.bias, adapter_name)
    for name, new in factors.items():
        layer, rank = layers[name], new.A.shape[0]
        if rank == 0:
            del layers[name]
            remove(model.model, layer, adapter_name)
            continue
        old = layer.factors(adapter_name)
        layer.add_adapter(  # in place of the old one
            adapter_name,
            rank,
            adjusted_alpha(layer.lora_alpha[adapter_name], layer.r[adapter_name], rank, config),
            config,
            functools.partial(_given, new),
            autocast=old[0].dtype == adapter_dtype(layer.base_weight.dtype),
        )
        for factor, was in zip(layer.factors(adapter_name), old, strict=True):
            factor.requires_grad_(was.requires_grad)
    still = {id(bias) for bias in biases(model.model, config.bias, adapter_name).values()}
    for bias in trained.values():
        bias.requires_grad_(bias.requires_grad and id(bias) in still)
    keys = {name: f"^{re.escape(name)}" for name in layers}
    ranks = {name: layer.r[adapter_name] for name, layer in layers.items()}
    alphas = {name: layer.lora_alpha[adapter_name] for name, layer in layers.items()}
    model.peft_config[adapter_name] = dataclasses.replace(
        config,
        target_modules=exactly([name for name in layers if layers[name].kind != "parameter"], modules),
        rank_pattern={keys[name]: r for name, r in ranks.items() if r != config.r},
        alpha_pattern={keys[name]: alpha for name, alpha in alphas.items() if alpha != config.lora_alpha},
        exclude_modules=None,  # these are said by the names now
        layers_to_transform=None,
        layers_pattern=None,
    )


def adjusted_alpha(alpha: float, r: int, rank: int, config: LoraConfig) -> float:
    """The lora_alpha with which the scaling at the new rank is that at the old one: alpha * rank / r, with rsLoRA
    alpha * sqrt(rank / r); or alpha itself without adjust_scaling_factors.

    >>> adjusted_alpha(16, 8, 4, LoraConfig()), adjusted_alpha(16, 8, 2, LoraConfig(use_rslora=True))
    (8.0, 8.0)
    """
    adjust = config.eva_config is None or config.eva_config.adjust_scaling_factors
    if rank == r or not adjust:
        return alpha
    return alpha * (math.sqrt(rank / r) if config.use_rslora else rank / r)


def remove(model: nn.Module, layer: LoraLayer, adapter_name: str) -> None:
    """Take an adapter out of a layer, and the wrapper away if it was the last."""
    layer.delete_adapter(adapter_name)
    if not layer.adapters():
        for parent, attribute in holders(model)[id(layer.get_base_layer())]:
            setattr(parent, attribute, layer.base_layer)


def _given(factors: Factors, weight: Tensor, r: int, scaling: float) -> Factors:
    """The initialisation of a layer whose factors are known."""
    return factors
