"""EVA's statistics: the moments of the layers' inputs, updated until the principal components have converged."""

import functools
import itertools
import operator
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import LoraConfig
from ..core.layer import LoraLayer
from ..init.eva import redistribute
from ..init.options import EvaConfig
from ..numerics import pca
from ..safe.progress import progress_bar
from ..safe.strict import levels_to_the_caller, prefix_errors
from . import hooks

ForwardFn = Callable[[nn.Module, Any], Any]  # (model, batch)
InputsFn = Callable[[Any, LoraConfig], Any]  # (the batch, the configuration) -> what RowsFn gets for the batch
RowsFn = Callable[[Tensor, Any, str], Tensor]  # (a layer's input, the batch, the layer's name) -> (rows, in)


class InputStatistics:
    """The moments and principal components of the layers' inputs. ValueError: no layers, or round(r * rho) > in.

    `shared_with` is {layer: the first layer with the same input}. Only these first layers have statistics: `wanted`,
    the largest number of components that a layer with the input can use, `moments`, `components`, and their `rows`.
    """

    def __init__(self, layers: Mapping[str, LoraLayer], adapter_name: str, options: EvaConfig) -> None:
        if not layers:
            raise ValueError("init_lora_weights='eva' is for linear layers, and the adapter has none")
        self.layers, self.options, self.rho = layers, options, float(options.rho)
        self.r = {name: layer.r[adapter_name] for name, layer in layers.items()}
        for name, layer in layers.items():
            n, n_in = round(self.r[name] * self.rho), layer.factors(adapter_name)[0].shape[1]
            if n > n_in:
                product = f"round(r * rho) = round({self.r[name]} * {options.rho:g}) = {n} components"
                raise ValueError(f"{name}: {product} are more than its {n_in} inputs: choose a smaller r or rho")
        self.shared_with = {name: name for name in layers}
        self.wanted: dict[str, int] = {}
        self.moments: dict[str, pca.Moments] = {}
        self.components: dict[str, pca.Components] = {}
        self.rows: dict[str, int] = {}

    def collect(
        self, model: nn.Module, data: Iterable[Any], forward: ForwardFn | None, rows_fn: RowsFn | None, show: bool
    ) -> None:
        """Run the model on the batches until all components have converged, or the data end."""
        forward, device = forward or call_model, next(model.parameters()).device
        batches = (to_device(batch, device) for batch in data)
        first_batch = next(batches, None)
        if first_batch is None:
            raise ValueError("the dataloader is empty")
        with hooks.evaluation_mode(model), progress_bar(show) as bar:
            task = bar.add_task("EVA", total=operator.length_hint(data) or None)
            if rows_fn is None:  # rows_fn may return different rows for layers with the same input
                self.find_shared_inputs(lambda: forward(model, first_batch))
            for name, shared in self.shared_with.items():
                self.wanted[shared] = max(self.wanted.get(shared, 0), round(self.r[name] * self.rho))
            recorded = {name: self.layers[name] for name in self.wanted}
            for count, batch in enumerate(itertools.chain([first_batch], batches), 1):
                with hooks.record_inputs(recorded, functools.partial(self.record, batch=batch, rows_fn=rows_fn)):
                    forward(model, batch)
                bar.advance(task)
                if updated := count & (count - 1) == 0:  # 1, 2, 4, 8, ...
                    converged = self.update_components()
                    bar.update(task, description=f"EVA: {converged} of {len(recorded)} inputs converged")
                    if converged == len(recorded):
                        break
        if missing := [name for name in recorded if name not in self.moments]:
            few = f"{', '.join(missing)}: not called, or with fewer rows in every batch than components are wanted"
            n = self.wanted[missing[0]]
            raise ValueError(f"{few}, round(r * rho) = {n}: use larger batches, or a smaller r or rho")
        converged = converged if updated else self.update_components()
        if converged < len(recorded):
            which = f"EVA: {len(recorded) - converged} of {len(recorded)} inputs have components that"
            end = f"when the data ended, after {count} batches: they are those of all the data"
            warnings.warn(
                f"{which} had not converged to tau={self.options.tau:g} {end}", stacklevel=levels_to_the_caller()
            )

    def find_shared_inputs(self, forward: Callable[[], Any]) -> None:
        """Find the layers that get the same tensor objects in one forward."""
        tensors: list[tuple[weakref.ref[Tensor], int]] = []  # (tensor, version): a change in place counts as another
        calls: dict[str, list[int]] = defaultdict(list)

        def record(name: str, x: Tensor) -> None:
            version = 0 if x.is_inference() else x._version
            known = (i for i, (ref, old) in enumerate(tensors) if ref() is x and old == version)
            number = next(known, len(tensors))
            if number == len(tensors):
                tensors.append((weakref.ref(x), version))
            calls[name].append(number)

        with hooks.record_inputs(self.layers, record):
            forward()
        first_layer: dict[tuple[int, ...], str] = {}
        self.shared_with = {name: first_layer.setdefault(tuple(calls[name]), name) for name in self.layers}

    def record(self, name: str, x: Tensor, batch: Any, rows_fn: RowsFn | None) -> None:
        """Add a layer's input to its moments, unless it has too few rows."""
        with prefix_errors(name):
            rows = rows_fn(x, batch, name) if rows_fn else kept_rows(x, batch, self.options)
            if rows.shape[0] >= self.wanted[name]:
                self.moments[name] = pca.update(self.moments.get(name), rows)

    def update_components(self) -> int:
        """Compute the components of the recorded inputs. Return the number of inputs whose components converged."""
        before, rows_before = self.components, self.rows
        self.rows = {name: x.seen for name, x in self.moments.items()}
        now = self.components = {name: pca.components(x, self.wanted[name]) for name, x in self.moments.items()}
        if before.keys() != self.wanted.keys():
            return 0
        ranks, converged = self.ranks(), 0
        for name in self.wanted:
            needed = max(rank for layer, rank in ranks.items() if self.shared_with[layer] == name)
            cosine = (now[name].vectors[:needed] * before[name].vectors[:needed]).sum(1).abs()
            converged += self.rows[name] > rows_before[name] and bool((cosine >= self.options.tau).all())
        return converged

    def ranks(self) -> dict[str, int]:
        """The new rank of every layer."""
        ratios = {name: self.components[shared].ratios.tolist() for name, shared in self.shared_with.items()}
        return redistribute(ratios, self.r, self.rho)


def kept_rows(x: Tensor, batch: Any, options: EvaConfig) -> Tensor:
    """The rows (rows, in) of an input (..., in) that the statistics use.

    They have attention_mask 1 and, if each token has a label, not label_mask_value. A missing key excludes no row.
    Raises: ValueError: the input has other positions than the mask.

    >>> batch = {"attention_mask": torch.tensor([[1, 1, 0]]), "labels": torch.tensor([[-100, 5, 5]])}
    >>> kept_rows(torch.tensor([[[1.0], [2.0], [3.0]]]), batch, EvaConfig())
    tensor([[2.]])
    """
    known = batch if isinstance(batch, Mapping) else {}
    mask, ids, labels = (known.get(key) for key in ("attention_mask", "input_ids", "labels"))
    keep = None if mask is None else mask == 1
    of_tokens = next((t.shape for t in (mask, ids) if t is not None), None)
    if options.use_label_mask and labels is not None and labels.ndim > 1 and of_tokens in (None, labels.shape):
        labelled = labels != options.label_mask_value
        keep = labelled if keep is None else keep & labelled
    rows = x.reshape(-1, x.shape[-1])
    if keep is None:
        return rows
    if x.shape[:-1] not in (keep.shape, (keep.numel(),)):
        positions = f"its input has the positions {tuple(x.shape[:-1])}, the batch's mask {tuple(keep.shape)}"
        raise ValueError(f"{positions}: say which rows count with prepare_layer_inputs_fn")
    return rows[keep.reshape(-1).to(x.device)]


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call the model: a mapping holds its keyword arguments, any other batch is its argument."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch, or the tensors of a mapping, on a device."""
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    return batch.to(device) if isinstance(batch, Tensor) else batch
