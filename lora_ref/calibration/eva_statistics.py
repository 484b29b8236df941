"""EVA's pass over the data: the moments of the layers' inputs, until their components have converged."""

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

from ..core.layer import LoraLayer
from ..init.eva import most, redistribute
from ..init.options import EvaConfig
from ..numerics import pca
from ..safe.progress import progress_bar
from . import hooks as watch

Forward = Callable[[nn.Module, Any], Any]  # (model, batch)
Prepare = Callable[[Tensor, Any, str], Tensor]  # (a layer's input, the batch, the layer's name) -> (rows, in)


class Pass:
    """What is known of the layers' inputs.

    Attributes:
        leader: {layer: the first layer that is given the same input}; all else is kept for leaders only.
        wanted: {leader: how many components its layers may want at most}.
        components: {leader: the components of all that was seen}, when `run` is over.

    Raises:
        ValueError: there are no layers, or one wants more components than it has inputs.
    """

    def __init__(self, layers: Mapping[str, LoraLayer], adapter_name: str, options: EvaConfig) -> None:
        if not layers:
            raise ValueError("init_lora_weights='eva' is for linear layers, and the adapter has none")
        self.layers, self.options, self.rho = layers, options, float(options.rho)
        self.r = {name: layer.r[adapter_name] for name, layer in layers.items()}
        for name, layer in layers.items():
            n, n_in = most(self.r[name], self.rho), layer.factors(adapter_name)[0].shape[1]
            if n > n_in:
                raise ValueError(
                    f"{name}: round(r * rho) = round({self.r[name]} * {options.rho:g}) = {n} components are more than "
                    f"its {n_in} inputs: choose a smaller r or rho"
                )
        self.leader = {name: name for name in layers}
        self.wanted: dict[str, int] = {}
        self.moments: dict[str, pca.Moments] = {}
        self.components: dict[str, pca.Components] = {}
        self.rows: dict[str, int] = {}  # how many they were computed from

    def run(
        self, model: nn.Module, data: Iterable[Any], forward: Forward | None, prepare: Prepare | None, show: bool
    ) -> None:
        """Run the model over the data until the components have converged, or the data end."""
        forward, device = forward or unpack, next(model.parameters()).device
        batches = (moved(batch, device) for batch in data)
        first = next(batches, None)
        if first is None:
            raise ValueError("the dataloader is empty")
        with watch.evaluating(model), progress_bar(show) as bar:
            task = bar.add_task("EVA", total=operator.length_hint(data) or None)
            if prepare is None:  # else its rows may differ where the input is the same
                self.share(lambda: forward(model, first))
            for name, leader in self.leader.items():
                self.wanted[leader] = max(self.wanted.get(leader, 0), most(self.r[name], self.rho))
            watched = {leader: self.layers[leader] for leader in self.wanted}
            for count, batch in enumerate(itertools.chain([first], batches), 1):
                with watch.inputs(watched, functools.partial(self.see, batch=batch, prepare=prepare)):
                    forward(model, batch)
                bar.advance(task)
                if checked := count & (count - 1) == 0:  # 1, 2, 4, 8, ...
                    converged = self.check()
                    bar.update(task, description=f"EVA: {converged} of {len(watched)} inputs converged")
                    if converged == len(watched):
                        break
        if missing := [name for name in watched if name not in self.moments]:
            raise ValueError(
                f"{', '.join(missing)}: not called, or with fewer rows in every batch than components are wanted, "
                f"round(r * rho) = {self.wanted[missing[0]]}: use larger batches, or a smaller r or rho"
            )
        converged = converged if checked else self.check()
        if converged < len(watched):
            warnings.warn(
                f"EVA: {len(watched) - converged} of {len(watched)} inputs have components that had not converged to "
                f"tau={self.options.tau:g} when the data ended, after {count} batches: they are those of all the data",
                stacklevel=4,
            )

    def share(self, forward: Callable[[], Any]) -> None:
        """Find the layers that are given the very same tensors, by identity, in one forward."""
        tensors: list[tuple[weakref.ref[Tensor], int]] = []  # a changed tensor (in place) is another one
        calls: dict[str, list[int]] = defaultdict(list)

        def see(name: str, x: Tensor) -> None:
            version = 0 if x.is_inference() else x._version
            known = (i for i, (ref, then) in enumerate(tensors) if ref() is x and then == version)
            number = next(known, len(tensors))
            if number == len(tensors):
                tensors.append((weakref.ref(x), version))
            calls[name].append(number)

        with watch.inputs(self.layers, see):
            forward()
        first: dict[tuple[int, ...], str] = {}
        self.leader = {name: first.setdefault(tuple(calls[name]), name) for name in self.layers}

    def see(self, name: str, x: Tensor, batch: Any, prepare: Prepare | None) -> None:
        """Add a layer's input to its moments, unless it has too few rows."""
        try:
            rows = prepare(x, batch, name) if prepare else kept_rows(x, batch, self.options)
            if rows.shape[0] >= self.wanted[name]:
                self.moments[name] = pca.update(self.moments.get(name), rows)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def check(self) -> int:
        """Find the components of what was seen; of how many inputs have all that are needed converged?"""
        before, rows_before = self.components, self.rows
        self.rows = {name: x.seen for name, x in self.moments.items()}
        now = {name: pca.components(x, self.wanted[name]) for name, x in self.moments.items()}
        self.components = now
        if before.keys() != self.wanted.keys():
            return 0
        ranks = self.ranks()
        converged = 0
        for leader in self.wanted:
            needed = max(rank for name, rank in ranks.items() if self.leader[name] == leader)
            cosine = (now[leader].vectors[:needed] * before[leader].vectors[:needed]).sum(1).abs()
            converged += self.rows[leader] > rows_before[leader] and bool((cosine >= self.options.tau).all())
        return converged

    def ranks(self) -> dict[str, int]:
        """The rank of every layer, by the components found."""
        ratios = {name: self.components[leader].ratios.tolist() for name, leader in self.leader.items()}
        return redistribute(ratios, self.r, self.rho)


def kept_rows(x: Tensor, batch: Any, options: EvaConfig) -> Tensor:
    """The rows of an input (..., in) that count, (rows, in).

    They are the positions where the batch's attention_mask is 1 and its labels, if there is one for each token,
    are not label_mask_value; all of them if it is no mapping or has neither.

    Raises:
        ValueError: the input has other positions than the mask.

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
        raise ValueError(
            f"its input has the positions {tuple(x.shape[:-1])}, the batch's mask {tuple(keep.shape)}: say which rows "
            "count with prepare_layer_inputs_fn"
        )
    return rows[keep.reshape(-1).to(x.device)]


def unpack(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: a mapping holds the arguments, anything else is the argument."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def moved(batch: Any, device: torch.device) -> Any:
    """A batch, or the tensors in a mapping, on a device."""
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    return batch.to(device) if isinstance(batch, Tensor) else batch
