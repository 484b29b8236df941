"""Switching adapters for a while: off, and each to its own rows of a batch."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..fast import merging as merge
from ..safe.atomic import surely
from .adapters import AdaptedModel
from .bias import biases
from .layer import LoraLayer


class SwitchModel(AdaptedModel):
    """A model whose adapters can be switched off, or chosen sample by sample, and come back as they were."""

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A `with` block in which the model is the base model, merged or not; afterwards all is as before."""
        trained = [name for name in self.active_adapters if self.peft_config[name].bias != "none"]
        if trained:
            warnings.warn(
                f"adapter {trained[0]!r} trains biases of the base model in place (bias != 'none'): "
                "with the adapters disabled, trained biases stay, and the output is not the original's",
                stacklevel=3,
            )
        active, configs, off = self.active_adapters, dict(self.peft_config), self._is_off()
        states = [(wrapper, wrapper.state()) for wrapper in self.wrappers()]
        trains = [(parameter, parameter.requires_grad) for parameter in self.parameters()]
        owned = {name: biases(self.model, c.bias, name).values() for name, c in configs.items()}

        def back() -> None:
            # adapters may have been renamed, deleted and added meanwhile: a config is one adapter's for good
            names = {then: now for then, c in configs.items() for now, d in self.peft_config.items() if c is d}
            for wrapper in self.wrappers():
                wrapper.enable_adapters(True)
                wrapper.set_adapter([])
            for wrapper, state in states:
                wrapper.restore(state, names)
                if isinstance(wrapper, LoraLayer):  # where the merged weight is not right any more: merge again
                    merge.merge({"": wrapper}, [names[name] for name in state["merged"] if name in names])
            for wrapper in self.wrappers():
                wrapper.enable_adapters(not off)
            for parameter, requires_grad in trains:
                parameter.requires_grad_(requires_grad)
            for bias in [bias for name in configs.keys() - names.keys() for bias in owned[name]]:
                bias.requires_grad_(False)
            self.active_adapters = [names[name] for name in active if name in names]

        try:
            for wrapper, _ in states:
                wrapper.enable_adapters(False)
            yield
        finally:
            surely(back)

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off until `enable_adapter_layers`."""
        self._switch(False)

    def enable_adapter_layers(self) -> None:
        """Undo `disable_adapter_layers`."""
        self._switch(True)

    @contextmanager
    def sampled(self, adapter_names: Sequence[str] | None) -> Iterator[None]:
        """A `with` block in which row i of a batch uses adapter_names[i]; "__base__" means none.

        Raises:
            ValueError: an unknown adapter, a merged one, a model in training mode; within the block: as many
                names as rows are not given.
        """
        if adapter_names is None:
            yield
            return
        self._known(*(name for name in dict.fromkeys(adapter_names) if name != "__base__"))
        self._check_not_merged(list(self.peft_config), "mixing adapters in a batch")
        if self.training:
            raise ValueError("adapter_names mixes adapters for inference: call model.eval() first")
        wrappers = self.wrappers()

        def put(names: tuple[str, ...] | None) -> None:
            for wrapper in wrappers:
                wrapper.sample_adapters = names

        try:
            put(tuple(adapter_names))
            yield
        finally:
            surely(lambda: put(None))
