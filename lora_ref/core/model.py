"""An adapted model: all of `switch`, and merging, unloading, weighted combination.

Every method is all-or-nothing: it checks first, then changes, and what fails changes nothing.
"""

from collections.abc import Sequence

from torch import nn

from ..api import weighted
from ..fast import merging as merge
from ..safe.atomic import transaction, uninterrupted
from ..safe.sharded import check_whole
from . import inject
from .adapter_modules import ModulesToSave
from .layer import Init
from .switch import SwitchModel
from .update import Factors


class LoraModel(SwitchModel):
    """A base model with named adapters in it. `PeftModel` is the same with saving and loading."""

    def merge_adapter(self, adapter_names: str | Sequence[str] | None = None, safe_merge: bool = True) -> None:
        """Add the updates of the active (or the named) adapters to the base weights, reversibly.

        The output afterwards is base + every adapter that is active or merged. Merged weights are
        always checked to be finite before the first one is written: `safe_merge` is for PEFT's
        scripts and changes nothing. A state dict loaded meanwhile is undone by unmerging.

        Raises:
            ValueError: an unknown adapter; adapters are disabled; a layer that cannot be merged (a grouped
                convolution); a merged weight that would not be finite.

        Differs from PEFT: several layers merge or none; active adapters that are not merged still
            contribute; unmerging is exact.
        """
        names = self._named(adapter_names)
        check_whole(self, "merging")
        merge.merge(self.layers(), names)

    def unmerge_adapter(self) -> None:
        """Give the base weights back, bit for bit. Adapters that were active still are."""
        merge.unmerge(self.wrappers())

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = True, adapter_names: str | Sequence[str] | None = None
    ) -> nn.Module:
        """The plain base model with the active (or named) adapters merged into it.

        It is the original object, and the sums are written into its weights' own memory: nothing of
        their size is allocated, and no adapter can be taken out again. Weights that are not finite
        afterwards are refused before the first is written. From there on there is no exact way back,
        so Ctrl-C takes effect when all are written: the model is then merged and plain.
        `progressbar` and `safe_merge` are for PEFT's scripts: merging is quick, and always checked.

        Raises:
            ValueError: as `merge_adapter`; the model is then still adapted, and unchanged.

        Differs from PEFT: a weight that is tied to another module's is replaced, and the other keeps its values.
        """
        names = self._named(adapter_names)
        check_whole(self, "merging")
        with uninterrupted(), self._switching(flags=adapter_names is not None):
            if self._is_off():
                self.enable_adapter_layers()
            if adapter_names is not None:
                self.set_adapter(names)
            layers = self.layers()
            sums = merge.prepare(self.model, layers, names)
            for layer in layers.values():
                layer.give_back([name for name in layer.lora_taken if name not in layer.merged_adapters])
            inject.take_out(self.model)
            merge.write(sums)
        return self.model

    def unload(self) -> nn.Module:
        """The plain base model, without adapters, its modules_to_save the originals; the original object.

        Biases that were trained (bias != "none") stay trained. A weight that an initialisation had
        changed (PiSSA and the like) is the original again, but for rounding.
        """
        check_whole(self, "unloading")
        with self._switching():
            merge.unmerge(self.wrappers())
            self.disable_adapter_layers()
            for layer in self.layers().values():
                layer.give_back(list(layer.lora_taken))
            inject.take_out(self.model)
        return self.model

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
    ) -> None:
        """A new adapter, inactive, that does what the weighted sum of others does: see `lora_ref.api.combination`.

        Its scaling is 1 whatever the parents' is, its init a plain one; the base weights are not touched.

        Args:
            combination_type: "cat" (exact, rank = the sum of ranks), "svd" (the best at svd_rank, by default
                the largest rank of the parents) or "linear" (the factors are added; equal ranks needed).

        Raises:
            ValueError: unknown adapters, as many weights as adapters are not given, ranks differ ("linear"),
                or two parents save the same module whole.
        """
        self._new(adapter_name)
        self._known(*adapters)
        parents = {name: self.peft_config[name] for name in adapters}
        layers = self.layers()
        combined = weighted.combine(layers, adapters, weights, combination_type, svd_rank)
        modules = inject.describe(self.model).kinds
        config = weighted.configure(layers, combined, list(parents.values()), modules)

        def init(name: str) -> Init:
            A, B = layers[name].packed(*combined[name][:2])
            return lambda weight, r, scaling: Factors(A, B)

        with transaction(self):
            self.add_adapter(adapter_name, config, init=init)
            for wrapper in self.wrappers():
                if isinstance(wrapper, ModulesToSave) and adapter_name in wrapper.adapters():
                    parent = next(name for name in parents if name in wrapper.adapters())
                    wrapper.modules_to_save[adapter_name].load_state_dict(wrapper.modules_to_save[parent].state_dict())
