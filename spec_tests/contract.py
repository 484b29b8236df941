"""The contract: what an implementation of LoRA must offer to be tested, in NumPy float64 arrays both ways.

Write a class with a few methods, name what it can do in `claims`, and every requirement that needs no more than
that is checked on it. Nothing is assumed to happen in place, and no framework is assumed at all: the class
casts and orients inside.

Everything is in LOGICAL orientation, whatever the storage: y = W x + b, W (out, in), A (r, in), B (out, r),
update D = s * B @ A. An embedding of V rows of d numbers has in = V and out = d: W is the transposed table (d, V).
A convolution has W (out, in, *kernel), A (r, in, *kernel), B (out, r).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray

CLAIMS = {
    # layers
    "linear": "adapts a linear layer",
    "transposed": "adapts a linear layer whose weight is stored as (in, out), such as transformers' Conv1D",
    "embedding": "adapts an embedding",
    "conv1d": "adapts a 1-dimensional convolution",
    "conv2d": "adapts a 2-dimensional convolution",
    "conv3d": "adapts a 3-dimensional convolution",
    "parameter": "adapts a raw parameter (out, in)",
    "experts": "adapts a stack of raw parameters (experts, out, in)",
    "attention": "has models with an attention that reads its out_proj without calling it (torch's MultiheadAttention)",
    # options of a layer
    "rslora": "use_rslora: s = lora_alpha / sqrt(r)",
    "alpha": "any finite lora_alpha, fractions and negative ones too",
    "dropout": "lora_dropout, in training only",
    "padding_idx": "an embedding's padding_idx: its row is looked up, and gets no gradient",
    "unbatched": "takes a single token without a batch dimension",
    "large_r": "r may exceed min(in, out)",
    "float64": "computes in float64",
    "float32": "computes in float32",
    "float16": "has float16 weights",
    "bfloat16": "has bfloat16 weights",
    "float32_factors": "keeps the factors of a half precision weight in float32",
    # constructor options of the base layer (LayerSpec.base)
    "base_options": "takes base layers with options: each is followed, or refused with an error (LayerSpec.base)",
    # operations of a layer
    "write": "A and B can be set from outside",
    "merge": "merges the update into the weight",
    "unmerge": "takes a merged update out of the weight again",
    "merged_copy": "gives a merged copy of a layer, and leaves the layer as it is",
    "safe_merge": "can merge so that NaN and infinite weights are refused",
    "grad": "gives gradients",
    "trainable": "says what trains",
    "disable": "switches the adapter off and on again",
    "rescale": "set_scale, scale_layer, unscale_layer",
    "model:rescale": "sets s of one active adapter in all layers of a model, by a factor of its configured s",
    # initialisations: init_lora_weights
    "init:True": "the default: A uniform up to 1 / sqrt(in), B zero (an embedding: A zero, B standard normal)",
    "init:False": "both factors random",
    "init:gaussian": "A normal with standard deviation 1 / r",
    "init:orthogonal": "B @ A = 0 with both factors nonzero",
    "init:pissa": "the principal singular triples",
    "init:pissa_niter": "those, by a randomised method",
    "init:olora": "QR",
    "init:loftq": "the best start for a quantised weight",
    "init:mica": "the minor left singular vectors, frozen",
    "init:corda": "directions that matter for the inputs (needs data)",
    "init:eva": "principal components of the inputs (needs data)",
    "init:lora_ga": "directions of the gradient (needs data)",
    "lora_ga:direction": "has LoRA-GA's option `direction` (init:lora_ga)",
    "eva_ranks": "shares out the ranks of a model's layers by its inputs (init:eva)",
    # starts beside everything else
    "converts": "saves an adapter whose start changes W as plain LoRA that fits the original base",
    # a model
    "model": "adapts the layers of a model that target_modules names, in full or by the ends of their names",
    "targets:list": "target_modules as a list: whole names, and ends of names that begin after a dot, taken literally",
    "targets:regex": "target_modules as a string: a regular expression that matches the whole name",
    "patterns": "rank_pattern and alpha_pattern",
    "exclude": "exclude_modules",
    "layers_to_transform": "layers_to_transform and layers_pattern",
    "all-linear": "target_modules='all-linear'",
    "bias": "bias='all' and 'lora_only'",
    "bias:every": "bias='all' trains every bias, also one that is called otherwise than bias",
    "modules_to_save": "modules_to_save",
    "target_parameters": "target_parameters",
    "adapters": "several named adapters, of which one is active at a time",
    "summed": "several adapters are active at a time: their updates are summed",
    "delete": "deletes an adapter",
    "partial_merge": "with some of the active adapters merged, the others still act",
    "weighted": "add_weighted_adapter: cat, svd, linear",
    "batch": "another adapter for each sample of a batch",
    "unload": "gives the plain model back, merged or not",
    "files": "adapter folders in PEFT's format",
    "errors": "refuses what the documentation says is wrong",
    # contexts, and a model that is merged
    "disable_context": "a context in which the adapters are off, and after which everything is as before",
    "scale_context": "a context in which the scaling of the active adapters is multiplied by a number",
    "modes": "the model stays in training or in evaluation mode until it is told otherwise",
    # models that are more than chains
    "model:convolutions": "adapts the convolutions of a model (conv1d, conv2d, conv3d)",
    "model:used_twice": "adapts a module that the model calls more than once",
    "model:held_twice": "adapts a module that the model holds under two names, or refuses it",
    "model:tied": "adapts one of two modules that share a weight without the other, or refuses it",
    "model:encoder": "adapts the linear layers of torch's TransformerEncoderLayer",
    "any_name": "modules may have any names: also those with lora_, weight, base_layer or an adapter's name in them",
    # whole models: half precision, gradients, folders of one's own, fused layers
    "update": "gives its update D itself, in the shape of W, whatever the factors are",
    "update:conv1d": "adapts a 1-dimensional convolution, with factors of any kind",
    "update:conv2d": "adapts a 2-dimensional convolution, with factors of any kind",
    "update:conv3d": "adapts a 3-dimensional convolution, with factors of any kind",
    "fused": "adapts some of the equal parts of a layer's outputs, each with an A and B of its own (LayerSpec.parts)",
    "own_files": "saves an adapter in a format of its own, and loads it again where the configuration is given",
    "reads_peft": "reads adapter folders in PEFT's format that another program wrote",
    "model_grad": "gives the gradient of every parameter of a model that trains",
    # what lora_ref decides, and no document says
    "decision:own_residual": "what a start subtracts from W acts with its own adapter only: other adapters keep W",
    "decision:rounded_once": "the updates of one merge into a half precision weight are summed and rounded once",
    "decision:whole_segments": "an item of a list of names matches from a dot on: 'head' is not 'xhead'",
    "decision:full_match": "a string of target_modules or exclude_modules must match the whole name, not its start",
    "decision:letter_case": "'all-linear' may be written in other letters",
    "decision:layer_indices": "layers_to_transform: [] restricts nothing, -1 is no layer, several layers_pattern count "
    "in order, parameters are restricted too",
    "decision:pattern_order": "of several keys of a pattern that match, the first one counts",
    "decision:no_effect": "refuses a configuration that adapts nothing, and an option that has no effect",
    "decision:linear_combination": "'linear' combines A and B with the roots of the weights times s",
    "decision:scaling_of_now": "a combination has the scaling that its adapters have now, a changed one too",
    "decision:stays_off": "adapters that are switched off stay so, also where one is added and set",
    "decision:loading_draws_nothing": "loading an adapter draws no random numbers",
    "decision:half_merge": "the update of a half precision weight is computed in float32 and rounded once",
    "float32_branch": "computes the branch of a half precision layer in float32",
    "exact_unmerge": "unmerging gives the base weight back bit for bit",
    "exact_residual": "where a start changes W, what it subtracts is the update of the factors as they are stored",
    "bias_follows": "which biases train follows the active adapter",
    "strict_files": "refuses files with tensors that are missing, not expected or not finite, or options it ignores",
    "strict_errors": "refuses values of a wrong type, NaN and infinity, when a configuration is made or used",
    "all_or_nothing": "an operation on a model that is refused has changed no module",
}

#: The claims to what no document but lora_ref's own asks for. A library claims one where its documentation says so.
DECISIONS = frozenset(claim for claim in CLAIMS if claim.startswith("decision:")) | {
    "float32_branch",
    "exact_unmerge",
    "exact_residual",
    "bias_follows",
    "strict_files",
    "strict_errors",
    "all_or_nothing",
}

#: {claim: the methods that it gives}. `Layer.read`, `Layer.forward`, and of a model `adapted`, `read`, `forward`,
#: `base` and `active` are needed in any case.
METHODS: dict[str, tuple[str, ...]] = {
    "write": ("Layer.write", "Model.write"),
    "merge": ("Layer.merge", "Model.merge"),
    "unmerge": ("Layer.unmerge", "Model.unmerge"),
    "disable": ("Layer.enable", "Model.enable"),
    "rescale": ("Layer.rescale",),
    "model:rescale": ("Model.rescale",),
    "grad": ("Layer.grad",),
    "trainable": ("Layer.trainable", "Model.trainable"),
    "bias": ("Model.write_base",),
    "modules_to_save": ("Model.write_base",),
    "adapters": ("Model.add", "Model.set"),
    "summed": ("Model.add", "Model.set"),
    "delete": ("Model.delete",),
    "weighted": ("Model.combine",),
    "eva_ranks": ("Model.look",),
    "unload": ("Model.unload",),
    "files": ("Model.save", "Model.load", "Implementation.load"),
    "modes": ("Model.train", "Model.training"),
    "disable_context": ("Model.disabled",),
    "scale_context": ("Model.scaled",),
    "model": ("Implementation.model",),
    "merged_copy": ("Layer.merged_copy",),
    "update": ("Layer.update",),
    "model_grad": ("Model.grad",),
    "converts": ("Model.save_converted",),
    "own_files": ("Model.save_own", "Implementation.load_own"),
    "reads_peft": ("Implementation.load",),
}


def _missing(method: str) -> NotImplementedError:
    """The error of a method that an adapter class has not written."""
    claims = [f"`{claim}`" for claim, methods in METHODS.items() if method in methods]
    if not claims:
        return NotImplementedError(f"{method} is not there: write it, every requirement of its kind needs it")
    return NotImplementedError(f"{method} is not there: leave {' and '.join(claims)} out of claims, or write it")


CONVENTIONS = {
    "zero_factor": "which factor of a linear layer is zero at the start: 'B' (default) or 'A'",
    "zero_factor_of_embedding": "likewise of an embedding: 'A' (default) or 'B'",
    "scaling": "how s follows from lora_alpha and r: 'alpha' (default); 'none': there is no s, the update is B A",
    "embedding_dropout": "lora_dropout acts on embeddings too: False by default",
}

MESH = {"linear": 0, "transposed": 0, "embedding": 0, "conv1d": 1, "conv2d": 2, "conv3d": 3}  # dimensions of the kernel


def _shown(value: Any) -> str:
    if isinstance(value, np.ndarray):
        kind = "" if value.dtype == np.float64 else f", {value.dtype.name!r}"
        return f"array({value.tolist()!r}{kind})"
    return repr(value)


@dataclasses.dataclass(frozen=True, eq=False)
class LayerSpec:
    """A base layer and the adapter that it is to get; the options have LoraConfig's names.

    Attributes:
        kind: "linear", "transposed", "embedding", "conv1d", "conv2d", "conv3d", "parameter" or "experts".
        W: (out, in), of an embedding (d, V), of a convolution (out, in, *kernel), of experts (E, out, in).
        b: (out,) or None.
        dtype: of the base weight: "float64", "float32", "float16" or "bfloat16". W and b are exact in it.
        init_options: loftq: {"bits", "iterations"}; corda: {"inputs": [X (tokens, in), ...], "method": "ipm" or
            "kpm"}; eva: {"inputs", "rho", "whiten"}; lora_ga: {"x" (tokens, in), "dy" (tokens, out)}, where the loss is
            sum(dy * y), and "direction": "ArB2r" or "A2rBr" (claim "lora_ga:direction").
        seed: the seed of everything random.
        base: options of the base layer, by name (claim "base_options"). A convolution: "groups" (W is then
            (out, in / groups, *kernel), and B is zero where an output does not belong to the group of a row of A) and
            "padding_mode" ("reflect", "circular" or "replicate"), and "stride", "padding" and "dilation" as one number
            for each axis, which replace those of this class. An embedding: "max_norm", "scale_grad_by_freq",
            "sparse", as torch has them, and "embed_scale", by which the layer multiplies what it looks up. Any layer:
            "parametrized" (W is computed from other parameters) and "hook" (a number by which a forward hook of the
            base layer multiplies the base layer's output).
        parts: of a fused layer, such as one for q, k and v (claim "fused"): which of the equal parts of its outputs are
            adapted. A is (n r, in) for n adapted parts, r rows for each in their order; B is (out, n r), and zero where
            an output does not belong to the part of a row of A. (): the layer has no parts.
    """

    kind: str
    W: Array
    b: Array | None = None
    r: int = 1
    lora_alpha: float = 1.0
    use_rslora: bool = False
    lora_dropout: float = 0.0
    init_lora_weights: bool | str = True
    init_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    seed: int = 0
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    padding_idx: int | None = None
    base: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parts: tuple[bool, ...] = ()

    @property
    def n_in(self) -> int:
        """How many inputs the layer takes: (out, in / groups, *kernel) is the weight of a convolution in groups."""
        return self.W.shape[2 if self.kind == "experts" else 1] * self.base.get("groups", 1)

    def along(self, name: str) -> tuple[int, ...]:
        """The stride, padding or dilation of a convolution: one number for each axis."""
        return tuple(self.base.get(name, (getattr(self, name),) * MESH[self.kind]))

    @property
    def scaling(self) -> float:
        """s as the definition has it."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    def __repr__(self) -> str:
        changed = [f for f in dataclasses.fields(self) if not is_default(f, getattr(self, f.name))]
        return f"LayerSpec({', '.join(f'{f.name}={_shown(getattr(self, f.name))}' for f in changed)})"

    def but(self, **changes: Any) -> LayerSpec:
        """The same with some changes."""
        return dataclasses.replace(self, **changes)


class LayerState(NamedTuple):
    """What a layer holds now: the weight that its base uses, the factors, and s."""

    W: Array
    b: Array | None
    A: Array
    B: Array
    scaling: float


class Layer:
    """An adapted layer. `read`, `forward` are needed by all requirements, the others by those that need the claim.

    x: (*tokens, in), of an embedding integers (*tokens,), of a convolution (batch, in, *size).
    Arrays that are given belong to the suite: copy what is to be changed in place.
    """

    def read(self) -> LayerState:
        raise _missing("Layer.read")

    def forward(self, x: Array, train: bool = False, seed: int = 0) -> Array:
        """y, (*tokens, out), of a convolution (batch, out, *size). In training mode dropout draws from `seed`."""
        raise _missing("Layer.forward")

    def write(self, A: Array, B: Array) -> None:
        raise _missing("Layer.write")

    def update(self) -> Array:
        """D in the shape of W (claim "update"): what the layer adds to W, as the library itself computes it."""
        raise _missing("Layer.update")

    def base_weight(self) -> Array:
        """W as the base uses it now: all that claim "update" needs of `read`."""
        return self.read().W

    def scatter(self, seed: int) -> None:
        """Set all factors, of whatever shape, to random numbers of about 1 (claim "update")."""
        state, rng = self.read(), np.random.default_rng(seed)
        self.write(rng.standard_normal(state.A.shape), rng.standard_normal(state.B.shape))

    def merge(self, safe: bool = False) -> None:
        """safe (claim "safe_merge"): refuse to write NaN or infinite weights."""
        raise _missing("Layer.merge")

    def unmerge(self) -> None:
        raise _missing("Layer.unmerge")

    def merged_copy(self) -> tuple[Array, Array | None]:
        """W and b of a plain layer that gives what this one gives; this one stays as it is (claim "merged_copy")."""
        raise _missing("Layer.merged_copy")

    def enable(self, enabled: bool) -> None:
        raise _missing("Layer.enable")

    def rescale(self, how: str, factor: float | None) -> None:
        """how: "set", "scale" or "unscale"."""
        raise _missing("Layer.rescale")

    def grad(self, x: Array, dy: Array, train: bool = False, seed: int = 0) -> dict[str, Array | None]:
        """The gradients of sum(dy * forward(x, train, seed)): "x" (None for an embedding), "A", "B", "W", "b"; None: no
        gradient."""
        raise _missing("Layer.grad")

    def trainable(self) -> set[str]:
        """Which of "A", "B", "W", "b" train."""
        raise _missing("Layer.trainable")


@dataclasses.dataclass(frozen=True, eq=False)
class ModuleSpec:
    """A module of a model: "linear", "transposed", "embedding" or "norm" (elementwise y = W * x + b, W (n,)).

    "conv1d", "conv2d" and "conv3d" (claim "model:convolutions") have stride 1 and no padding.

    "attention" (claim "attention"): the out_proj of an attention over one token with identical values, so y = W x + b;
    the attention's forward reads W and b, and never calls the module that holds them. Its parent has a bias of its own,
    of zeros, which `Model.trainable` calls "<parent>.in_proj_bias".
    """

    kind: str
    W: Array
    b: Array | None = None

    def __repr__(self) -> str:
        return f"ModuleSpec({self.kind!r}, {_shown(self.W)}{'' if self.b is None else ', ' + _shown(self.b)})"


@dataclasses.dataclass(frozen=True, eq=False)
class ModelSpec:
    """A base model and the configuration of its adapter "default".

    Attributes:
        modules: {dotted name: module}; the model's output is the last module's of that of the one before ... of x.
        config: LoraConfig's options by name.
        order: the names of the modules in the order in which they are called, where it is another: a name may be
            there twice (claim "model:used_twice"), or be one of `same` or of `encoders`. Empty: each module once.
        same: {further name: module}: the same module under another name (claim "model:held_twice").
        tied: {module: module}: a linear layer and the embedding whose parameter is its weight, too; the embedding's W
            is the transpose of the layer's (claim "model:tied").
        encoders: names of layers like torch's TransformerEncoderLayer (claim "model:encoder"), over one token, with
            y = N(h + W2 relu(W1 h + b1) + b2), h = N(2 x). N subtracts the mean, and divides by the root of the
            variance plus 1e-5. W1 and W2 are the modules <name>.linear1 and <name>.linear2.
    """

    modules: Mapping[str, ModuleSpec]
    config: Mapping[str, Any]
    dtype: str = "float32"
    seed: int = 0
    order: Sequence[str] = ()
    same: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    encoders: Sequence[str] = ()

    def __repr__(self) -> str:
        changed = "".join(
            f", {f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if not is_default(f, getattr(self, f.name))
        ).removeprefix(f", modules={self.modules!r}")
        return f"ModelSpec({dict(self.modules)!r}{changed})"

    def but(self, **config: Any) -> ModelSpec:
        """The same with some options changed."""
        return dataclasses.replace(self, config={**self.config, **config})


class Model:
    """An adapted model. `x`: (batch, in), or integers (batch,) where the first module is an embedding, or (batch, in,
    *size) where it is a convolution."""

    def adapted(self, adapter: str = "default") -> dict[str, tuple[int, float]]:
        """{module: (r, s)}."""
        raise _missing("Model.adapted")

    def read(self, module: str, adapter: str = "default") -> LayerState:
        raise _missing("Model.read")

    def write(self, module: str, A: Array, B: Array, adapter: str = "default") -> None:
        raise _missing("Model.write")

    def forward(
        self, x: Array, train: bool | None = False, seed: int = 0, adapter_names: Sequence[str] | None = None
    ) -> Array:
        """adapter_names (claim "batch"): one for each sample, "__base__" for none.

        train None (claim "modes"): in the mode that `train` has set.
        """
        raise _missing("Model.forward")

    def train(self, mode: bool) -> None:
        """Set the model to training mode, or to evaluation mode: torch's `Module.train(mode)`."""
        raise _missing("Model.train")

    def training(self) -> bool:
        """Is the model in training mode?"""
        raise _missing("Model.training")

    def disabled(self) -> AbstractContextManager[None]:
        """A context in which the adapters are off: PEFT's `with model.disable_adapter()`."""
        raise _missing("Model.disabled")

    def scaled(self, factor: float) -> AbstractContextManager[None]:
        """A context in which s of the active adapters is `factor` times as large: PEFT's `rescale_adapter_scale`.

        Whether s of adapters that are not active changes, too, is left open.
        """
        raise _missing("Model.scaled")

    def rescale(self, adapter: str, factor: float) -> None:
        """s of this active adapter becomes `factor` times what its configuration gives, in every layer."""
        raise _missing("Model.rescale")

    def trainable(self) -> set[str]:
        """What trains: "module.weight", "module.bias" of the base, "module.A:adapter", "module.B:adapter",
        and "module.weight:adapter", "module.bias:adapter" of a copy that modules_to_save made."""
        raise _missing("Model.trainable")

    def grad(self, x: Array, dy: Array) -> dict[str, Array]:
        """The gradients of sum(dy * forward(x)), in evaluation mode, of all parameters that have one.

        The keys are those of `trainable`; a weight's gradient is (out, in), as the weight."""
        raise _missing("Model.grad")

    def write_base(self, module: str, W: Array | None = None, b: Array | None = None) -> None:
        """Set base weights as training would (claim "bias": only b; "modules_to_save": of the active copy)."""
        raise _missing("Model.write_base")

    def base(self) -> dict[str, tuple[Array, Array | None]]:
        """{module: (W, b)} as the base model has them now."""
        raise _missing("Model.base")

    def merge(self, adapters: Sequence[str] | None = None, safe: bool = False) -> None:
        """safe (claim "safe_merge"): refuse to write NaN or infinite weights."""
        raise _missing("Model.merge")

    def unmerge(self) -> None:
        raise _missing("Model.unmerge")

    def enable(self, enabled: bool) -> None:
        raise _missing("Model.enable")

    def add(self, adapter: str, config: Mapping[str, Any]) -> None:
        raise _missing("Model.add")

    def set(self, adapters: Sequence[str]) -> None:
        """Make these adapters active, and no others."""
        raise _missing("Model.set")

    def active(self) -> list[str]:
        raise _missing("Model.active")

    def delete(self, adapter: str) -> None:
        raise _missing("Model.delete")

    def combine(self, adapters: Sequence[str], weights: Sequence[float], name: str, how: str) -> None:
        """add_weighted_adapter; how: "cat", "svd" or "linear"."""
        raise _missing("Model.combine")

    def look(self, batches: Sequence[Array]) -> None:
        """Start the adapter "default" from inputs of the model (claim "eva_ranks"; init_lora_weights="eva")."""
        raise _missing("Model.look")

    def unload(self, merge: bool) -> dict[str, tuple[Array, Array | None]]:
        """The plain model's {module: (W, b)}; this object is not used afterwards."""
        raise _missing("Model.unload")

    def save(self, folder: Path, **options: Any) -> None:
        raise _missing("Model.save")

    def save_start(self, folder: Path) -> None:
        """Save what `save_converted` needs to know of the adapter "default" before its factors change (claim
        "converts"). Nothing to do where the model remembers its start."""

    def save_converted(self, folder: Path, start: Path) -> None:
        """Save the adapter "default" as plain LoRA for the original base. `start`: the folder of `save_start`."""
        raise _missing("Model.save_converted")

    def save_own(self, folder: Path) -> None:
        """Write the adapter into an empty folder, in the library's own format (claim "own_files")."""
        raise _missing("Model.save_own")

    def load(self, folder: Path, adapter: str) -> None:
        """Load an adapter folder as a further adapter, not active."""
        raise _missing("Model.load")


class Implementation:
    """An implementation of LoRA. Subclass it, or write a class that has the same names.

    `layer` may be left out where whole models alone are adapted (claim "model", and the kinds of layers that they
    have): what needs a single layer is then reported as unsupported.

    Attributes:
        name: as reports show it.
        claims: which of `CLAIMS` it makes; the others are reported as unsupported.
        conventions: where it differs from the usual by choice: see `CONVENTIONS`.
    """

    name = "unnamed"
    claims: frozenset[str] = frozenset()
    conventions: Mapping[str, Any] = {}

    def version(self) -> str:
        """What was tested, as reports show it: "peft 0.21.2, torch 2.13.0"."""
        return ""

    def layer(self, spec: LayerSpec) -> Layer:
        raise _missing("Implementation.layer")

    def model(self, spec: ModelSpec) -> Model:
        raise _missing("Implementation.model")

    def load(self, spec: ModelSpec, folder: Path) -> Model:
        """The base model of `spec` (its config is not used) with the adapter of a folder, active.

        Claims "files" and "reads_peft"."""
        raise _missing("Implementation.load")

    def load_own(self, spec: ModelSpec, folder: Path) -> Model:
        """The model of `spec`, with its config, and what `Model.save_own` has written into the folder, active."""
        raise _missing("Implementation.load_own")


def has_layers(implementation: Implementation) -> bool:
    """Has it a method `layer` of its own? One that adapts models alone has none."""
    noted = vars(implementation).get("has_layers")  # of a class that passes calls on
    if noted is not None:
        return bool(noted)
    method = getattr(implementation, "layer", None)
    return method is not None and getattr(method, "__func__", None) is not Implementation.layer


def check_claims(implementation: Implementation) -> None:
    """Raise TypeError for claims and conventions that do not exist: an over-claim must not pass unseen."""
    unknown: Iterable[str] = set(implementation.claims) - CLAIMS.keys()
    if unknown := sorted(unknown):
        raise TypeError(f"{implementation.name} claims {', '.join(unknown)}: there are {', '.join(CLAIMS)}")
    if unknown := sorted(set(implementation.conventions) - CONVENTIONS.keys()):
        raise TypeError(f"{implementation.name}: conventions {', '.join(unknown)}: there are {', '.join(CONVENTIONS)}")


def is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    """Has the field its default?"""
    if field.default is not dataclasses.MISSING:
        return value is field.default or (not isinstance(value, np.ndarray) and value == field.default)
    return field.default_factory is not dataclasses.MISSING and value == field.default_factory()
