"""Any sequence of operations on an adapted model, with faults, against a model of it in NumPy.

The NumPy model knows W, b, and for each adapter A, B, s and its initial update. After every step it predicts the
output, the active, merged and trainable adapters, and base weights that never change. An operation that fails must
leave everything as it was, bit for bit.
"""

import copy
import dataclasses
import json
import math
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from models import Conv1D, Experts, Snapshot, stored
from torch import Tensor, nn

from lora_ref import LoraConfig, get_peft_model
from lora_ref.core import model as inject
from lora_ref.core.adapter_modules import AdapterModule
from lora_ref.core.layer import InitialUpdate, LoraLayer
from spec_tests import agree, close

# -- the network and the same in NumPy -----------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin, self.c1d = nn.Embedding(5, 4), nn.Linear(4, 6), Conv1D(4, 6)
        self.experts, self.norm = Experts(2, 4, 4), nn.LayerNorm(4)
        self.conv, self.head = nn.Conv1d(4, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.c1d(torch.tanh(self.lin(self.emb(tokens))))  # (N, T, 4)
        h = self.norm(self.experts(h) + h)
        return self.head(self.conv(h.mT).mT)  # (N, T, 2)


BIASES = ("lin.bias", "c1d.bias", "norm.bias", "conv.bias", "head.bias")
TOKENS = torch.tensor([[0, 1, 2], [3, 4, 4], [2, 0, 1]])


def run_net(P: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Net.forward in NumPy."""
    h = P["emb.weight"][tokens]
    h = np.tanh(h @ P["lin.weight"].T + P["lin.bias"]) @ P["c1d.weight"] + P["c1d.bias"]
    h = h + np.tanh(np.einsum("nti,eoi->nteo", h, P["experts.stack"])).sum(2)
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5) * P["norm.weight"] + P["norm.bias"]
    padded = np.pad(h, ((0, 0), (1, 1), (0, 0)))
    h = sum(padded[:, k : k + 3] @ P["conv.weight"][:, :, k].T for k in range(3)) + P["conv.bias"]
    return h @ P["head.weight"].T + P["head.bias"]


def product(layer: str, A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """B A in the storage of the layer's weight, from the tensors of the adapter file."""
    if layer == "conv.weight":
        return np.einsum("oq,qik->oik", B[:, :, 0], A)
    if layer == "experts.stack":
        r = A.shape[0] // 2
        return np.stack([B.reshape(4, r, 2)[:, :, e] @ A.reshape(2, r, 4)[e] for e in range(2)])
    return B @ A if layer == "lin.weight" else (B @ A).T


@dataclasses.dataclass
class Part:
    """One adapter's part in one layer."""

    A: np.ndarray
    B: np.ndarray
    r: int
    s: float
    initial: float
    start: tuple[np.ndarray, np.ndarray] | None = None  # A and B of the initial update, which is subtracted

    def converted(self, s: float) -> tuple[np.ndarray, np.ndarray]:
        """A and B that do on the original weight, with the scaling s, what this adapter does with it."""
        if self.start is None:
            return self.A, self.B
        A0, B0 = self.start
        return np.concatenate([self.A, A0]), np.concatenate([self.B, -self.initial / s * B0], 1)


def started(method: str, W: np.ndarray, r: int, s: float) -> tuple[np.ndarray, float]:
    """s * B @ A at the start, of W (out, in), and by how many times its rounding a rounding of W may turn it."""
    U, S, Vh = np.linalg.svd(W)
    if method == "pissa":
        return (U[:, :r] * S[:r]) @ Vh[:r], S[0] / (S[r - 1] - np.append(S, 0.0)[r])
    Q, R = np.linalg.qr(W)  # the leading columns of Q are those of W, as well as these are conditioned
    return s * Q[:, :r] @ R[:r], S[0] / np.linalg.svd(W[:, :r])[1][-1]


@dataclasses.dataclass
class Adapter:
    parts: dict[str, Part]
    head: dict[str, np.ndarray] | None  # its copy of the module that it saves whole
    biases: tuple[str, ...]  # of the base, which train with it


class Model:
    """What an adapted model is."""

    def __init__(self, base: dict[str, np.ndarray]) -> None:
        self.base, self.adapters = base, dict[str, Adapter]()
        self.active: list[str] = []
        self.merged: list[str] = []
        self.trainable, self.disabled = True, False

    def parameters(self, names: list[str]) -> dict[str, np.ndarray]:
        """The base weights with the updates of these adapters."""
        P = dict(self.base)
        for name in names:
            for layer, part in self.adapters[name].parts.items():
                D0 = part.initial * product(layer, *part.start) if part.start else 0
                P[layer] = P[layer] + part.s * product(layer, part.A, part.B) - D0
        return P

    def output(self) -> np.ndarray:
        P = self.parameters([] if self.disabled else list(dict.fromkeys(self.active + self.merged)))
        heads = [] if self.disabled else [h for n in self.active if (h := self.adapters[n].head)]
        return run_net(P | (heads[0] if heads else {}), TOKENS.numpy())

    def set_active(self, names: list[str], trainable: bool = True) -> None:
        self.active, self.merged, self.trainable = list(names), [], trainable

    def delete(self, name: str) -> None:
        was_last = self.active == [name]
        del self.adapters[name]
        self.active = [n for n in self.active if n != name]
        if was_last and self.adapters:
            self.set_active([next(iter(self.adapters))])

    def rename(self, old: str, new: str) -> None:
        self.adapters = {new if n == old else n: a for n, a in self.adapters.items()}
        self.active = [new if n == old else n for n in self.active]
        self.merged = [new if n == old else n for n in self.merged]


# -- faults --------------------------------------------------------------------------------------

PLACES: dict[str, tuple[Any, str]] = {
    "add": (LoraLayer, "add_adapter"),
    "build": (LoraLayer, "build"),
    "delta": (LoraLayer, "delta"),
    "update": (LoraLayer, "update"),
    "install": (LoraLayer, "install_weight"),
    "initial": (InitialUpdate, "__init__"),
    "matrix": (InitialUpdate, "matrix"),
    "set": (AdapterModule, "set_adapter"),
    "delete": (AdapterModule, "delete_adapter"),
    "enable": (AdapterModule, "enable_adapters"),
    "isfinite": (torch, "isfinite"),
    "cat": (torch, "concatenate"),
    "walk": (inject, "walk"),
}


class Crash(RuntimeError):
    """A fault of ours."""


@dataclasses.dataclass
class Fault:
    place: str
    call: int
    after: bool
    error: type[BaseException]
    fired: bool = False

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Raise once, at the call-th call, before or after it has done its work."""
        owner, name = PLACES[self.place]
        original, calls = getattr(owner, name), 0

        def faulty(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            now = calls == self.call
            self.fired |= now
            if now and not self.after:
                raise self.error("injected")
            result = original(*args, **kwargs)
            if now:
                raise self.error("injected")
            return result

        setattr(owner, name, faulty)
        try:
            yield
        finally:
            setattr(owner, name, original)


FAULTS = st.none() | st.builds(
    Fault, st.sampled_from(list(PLACES)), st.integers(1, 6), st.booleans(), st.sampled_from([Crash, KeyboardInterrupt])
)


# -- the machine ---------------------------------------------------------------------------------

NAMES = st.sampled_from(["default", "a", "ab", "lin", "lora_A", "head", "weight", "w 1"])
BAD_NAMES = st.sampled_from(["", "a.b", "__base__", "forward", "../x", "_modules", "training", "a\n"])
PLAIN: dict[str, Any] = {
    "r": st.sampled_from([1, 2, 4]),
    "lora_alpha": st.sampled_from([1, 2.5, -1, 0]),
    "use_rslora": st.booleans(),
    "bias": st.sampled_from(["none", "none", "none", "all", "lora_only"]),
    "target_modules": st.lists(st.sampled_from(["emb", "lin", "c1d", "conv"]), min_size=1, unique=True),
    "target_parameters": st.sampled_from([None, None, None, ["experts.stack"]]),
    "modules_to_save": st.sampled_from([None, None, ["head"]]),
    "rank_pattern": st.sampled_from([{}, {"lin": 3}, {"c.*": 2}]),
    "alpha_pattern": st.sampled_from([{}, {"emb": 2.0}, {"conv": -3}]),
    "init_lora_weights": st.sampled_from([False, False, True, "gaussian"]),
}
# what changes the base weight: on matrices, with r <= min(in, out) and s > 0
CHANGING = {
    "lora_alpha": st.sampled_from([1, 2.5]),
    "target_modules": st.lists(st.sampled_from(["lin", "c1d"]), min_size=1, unique=True),
    "target_parameters": st.none(),
    "init_lora_weights": st.sampled_from(["pissa", "olora"]),
}
CONFIGS = st.fixed_dictionaries(PLAIN) | st.fixed_dictionaries(PLAIN | CHANGING)
RANKS, ALPHAS = {"lin": ["lin"], "c.*": ["c1d", "conv"]}, {"emb": ["emb"], "conv": ["conv"]}


class AdaptedModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.saved: dict[str, tuple[Adapter, dict[str, np.ndarray]]] = {}
        self.warnings = warnings.catch_warnings()
        self.warnings.__enter__()
        warnings.simplefilter("ignore")  # patterns that match nothing, biases that stay

    def teardown(self) -> None:
        self.warnings.__exit__(None, None, None)
        self.folder.cleanup()

    # -- helpers

    def adapt(self, net: Net, name: str, options: dict[str, Any]) -> None:
        self.net = net
        base = {n: p.detach().numpy().copy() for n, p in net.named_parameters()}
        self.base_modules = {n: m for n, m in net.named_modules() if n}
        self.model: Any = get_peft_model(net, LoraConfig(**options), name).eval()
        self.ref = Model(base)
        self.added(name, options)
        self.ref.set_active([name])

    def places(self, name: str) -> dict[str, LoraLayer]:
        """The layers in which an adapter has a part, by the name of the weight."""
        found = {n if "." in n else f"{n}.weight": layer for n, layer in self.model.lora_layers().items()}
        return {n: layer for n, layer in found.items() if name in layer.adapters()}

    def added(self, name: str, options: dict[str, Any]) -> None:
        """Tell the reference of a new adapter: r and s from the options, the numbers from the layers."""
        parts = {}
        for where, (A, B) in self.read(name).items():
            module = where.partition(".")[0]
            r = next((v for k, v in options["rank_pattern"].items() if module in RANKS[k]), options["r"])
            alpha = next((v for k, v in options["alpha_pattern"].items() if module in ALPHAS[k]), options["lora_alpha"])
            s = alpha / (math.sqrt(r) if options["use_rslora"] else r)
            assert A.size // math.prod({"conv.weight": (4, 3), "experts.stack": (2, 4)}.get(where, A.shape[1:])) == r
            parts[where] = Part(A, B, r, s, s)
            if (init := options["init_lora_weights"]) in ("pissa", "olora"):
                W = self.ref.base[where]
                took, turned = started(init, W if where == "lin.weight" else W.T, r, s)
                # 8 m n roundings of a decomposition (Higham, Accuracy and Stability, 19.4, with 8 for his constant c)
                terms = 8 * W.size * (1 + 2 * turned)
                close(s * product("lin.weight", A, B), took, terms, size=max(1.0, s) * np.linalg.norm(W), what=where)
                parts[where].start = A, B
            elif init is not False:
                assert not product(where, A, B).any()
        targets = [f"{t}.weight" for t in options["target_modules"]] + (options["target_parameters"] or [])
        assert set(parts) == set(targets)
        head = (
            {n: self.ref.base[n].copy() for n in ("head.weight", "head.bias")} if options["modules_to_save"] else None
        )
        biases = {
            "none": (),
            "all": BIASES if head is None else BIASES[:-1],
            "lora_only": tuple(b for b in BIASES if b.replace("bias", "weight") in parts),
        }[options["bias"]]
        self.ref.adapters[name] = Adapter(parts, head, biases)

    def read(self, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """{layer: A and B of an adapter}."""
        return {
            n: tuple(p.detach().numpy().copy() for p in stored(layer, name))  # type: ignore[misc]
            for n, layer in self.places(name).items()
        }

    def attempt(
        self, operation: Callable[[], Any], refused: bool = False, fault: Fault | None = None, error: Any = ValueError
    ) -> bool:
        """Run it. Refused, or hit by a fault: everything must be as before. Else true."""
        before = Snapshot(self.model)
        try:
            if fault is None:
                operation()
            else:
                with fault.armed():
                    operation()
        except (Crash, KeyboardInterrupt):
            assert fault is not None and fault.fired
        except error as problem:
            # the reader of files takes a RuntimeError of safetensors or torch for a broken file
            assert refused or (fault and fault.fired and isinstance(problem.__cause__, Crash))
        else:
            assert not refused and not (fault and fault.fired)
            return True
        assert Snapshot(self.model) == before
        return False

    def some(self, data: st.DataObject, unique: bool = True) -> list[str]:
        return data.draw(st.lists(st.sampled_from(list(self.ref.adapters)), max_size=3, unique=unique))

    def one(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(list(self.ref.adapters)))

    has_adapters = precondition(lambda self: bool(self.ref.adapters))

    # -- the rules

    @initialize(
        seed=st.integers(0, 99), name=NAMES, options=CONFIGS, more=st.lists(st.tuples(NAMES, CONFIGS), max_size=2)
    )
    def start(self, seed: int, name: str, options: dict[str, Any], more: list[tuple[str, dict[str, Any]]]) -> None:
        torch.manual_seed(seed)
        self.adapt(Net().double(), name, options)
        for other in more:
            self.add(*other, fault=None)

    @rule(name=NAMES, options=CONFIGS, fault=FAULTS)
    def add(self, name: str, options: dict[str, Any], fault: Fault | None) -> None:
        second = options["bias"] != "none" and any(c.bias != "none" for c in self.model.peft_config.values())
        refused = name in self.ref.adapters or second
        if self.attempt(lambda: self.model.add_adapter(name, LoraConfig(**options)), refused, fault):
            self.added(name, options)

    @rule(name=BAD_NAMES, options=CONFIGS)
    def add_under_a_bad_name(self, name: str, options: dict[str, Any]) -> None:
        self.attempt(lambda: self.model.add_adapter(name, LoraConfig(**options)), refused=True)

    @rule(name=NAMES, options=CONFIGS, bad=st.sampled_from(["norm", "experts", "nowhere"]))
    def add_what_cannot_be_adapted(self, name: str, options: dict[str, Any], bad: str) -> None:
        config = LoraConfig(**options | {"target_parameters": None, "modules_to_save": None, "target_modules": [bad]})
        self.attempt(lambda: self.model.add_adapter(name, config), refused=True)

    @rule(
        name=NAMES,
        options=st.fixed_dictionaries(PLAIN | CHANGING),
        bad=st.sampled_from([{"r": 5}, {"lora_alpha": 0}, {"target_modules": ["lin", "emb"]}]),
    )
    def add_what_cannot_start(self, name: str, options: dict[str, Any], bad: dict[str, Any]) -> None:
        config = LoraConfig(**options | {"rank_pattern": {}} | bad)
        self.attempt(lambda: self.model.add_adapter(name, config), refused=True)

    @has_adapters
    @rule(data=st.data(), trainable=st.booleans(), fault=FAULTS)
    def switch(self, data: st.DataObject, trainable: bool, fault: Fault | None) -> None:
        names = self.some(data, unique=False)
        heads = [n for n in names if self.ref.adapters[n].head]
        refused = len(set(names)) != len(names) or len(heads) > 1
        if self.attempt(lambda: self.model.set_adapter(names, inference_mode=not trainable), refused, fault):
            self.ref.set_active(names, trainable)

    @rule(operation=st.sampled_from(["set_adapter", "delete_adapter", "merge_adapter", "save_pretrained", "set_scale"]))
    def unknown_names(self, operation: str) -> None:
        call = {
            "merge_adapter": lambda: self.model.merge_adapter(["nobody"]),
            "save_pretrained": lambda: self.model.save_pretrained(self.folder.name, selected_adapters=["nobody"]),
            "set_scale": lambda: self.model.set_scale("nobody", 2),
        }.get(operation, lambda: getattr(self.model, operation)("nobody"))
        self.attempt(call, refused=True)

    @has_adapters
    @rule(data=st.data(), named=st.booleans(), fault=FAULTS)
    def merge(self, data: st.DataObject, named: bool, fault: Fault | None) -> None:
        names = self.some(data) if named else list(self.ref.active)
        todo = [n for n in names if n not in self.ref.merged]
        refused = (self.ref.disabled and bool(todo)) or not (names or not named)
        if self.attempt(lambda: self.model.merge_adapter(names if named else None), refused, fault):
            self.ref.merged += todo

    @has_adapters
    @rule(data=st.data(), value=st.sampled_from([math.nan, math.inf]))
    def merge_what_is_not_finite(self, data: st.DataObject, value: float) -> None:
        name = self.one(data)
        if name in self.ref.merged or self.ref.disabled:
            return
        layer = data.draw(st.sampled_from(list(self.places(name).values())))
        factors = list(stored(layer, name))
        kept = [f.detach().clone() for f in factors]
        with torch.no_grad():
            for f in factors:
                f.view(-1)[0] = value
        self.attempt(lambda: self.model.merge_adapter([name]), refused=True)  # with s = 0 too: 0 * inf is NaN
        with torch.no_grad():
            for f, k in zip(factors, kept, strict=True):
                f.copy_(k)

    @rule(fault=FAULTS)
    def unmerge(self, fault: Fault | None) -> None:
        if self.attempt(self.model.unmerge_adapter, fault=fault):
            self.ref.merged = []

    @rule(enabled=st.booleans(), fault=FAULTS)
    def switch_layers(self, enabled: bool, fault: Fault | None) -> None:
        call = self.model.enable_adapter_layers if enabled else self.model.disable_adapter_layers
        if self.attempt(call, fault=fault):
            self.ref.disabled = not enabled

    @rule(
        data=st.data(),
        inside=st.sampled_from(["nothing", "nest", "switch", "unmerge", "enable", "rename", "delete", "add", "merge"]),
        unmerge=st.booleans(),
        leave_by=st.sampled_from([None, Crash, KeyboardInterrupt]),
        name=NAMES,
        options=CONFIGS,
    )
    def disable_block(
        self, data: st.DataObject, inside: str, unmerge: bool, leave_by: Any, name: str, options: dict[str, Any]
    ) -> None:
        before, ref = Snapshot(self.model), self.ref
        known = list(ref.adapters)
        some = data.draw(st.sampled_from(known)) if known else None
        changed = False
        merged = [] if unmerge else ref.merged
        try:
            with self.model.disable_adapter():
                if unmerge:
                    self.model.unmerge_adapter()
                off = run_net(ref.base, TOKENS.numpy())
                agree(self.output(), off)
                if inside == "nest":
                    with self.model.disable_adapter():
                        agree(self.output(), off)
                elif inside == "switch" and some:
                    self.model.set_adapter(some)
                elif inside == "unmerge":
                    self.model.unmerge_adapter()
                elif inside == "enable":
                    self.model.enable_adapter_layers()
                    agree(self.output(), but_with(ref, disabled=False, merged=merged).output())
                elif inside == "rename" and some and name not in known:
                    self.model.rename_adapter(some, name)
                    ref.rename(some, name)
                    changed = True
                elif inside == "delete" and some and some not in merged:
                    self.model.delete_adapter(some)
                    del ref.adapters[some]
                    ref.active, ref.merged = ([n for n in ns if n != some] for ns in (ref.active, ref.merged))
                    changed = True
                elif inside == "add" and name not in known and options["bias"] == "none":
                    self.model.add_adapter(name, LoraConfig(**options))
                    self.model.set_adapter(name)  # for the block only
                    self.added(name, options)
                    changed = True
                elif inside == "merge" and some and some not in merged:
                    self.model.enable_adapter_layers()
                    self.model.merge_adapter([some])
                if inside != "enable" and inside != "merge":
                    agree(self.output(), off)
                if leave_by:
                    raise leave_by("on the way out")
        except (Crash, KeyboardInterrupt):
            assert leave_by
        assert changed or Snapshot(self.model) == before

    @rule(fault=st.builds(Fault, st.just("enable"), st.integers(1, 4), st.booleans(), st.just(KeyboardInterrupt)))
    def disable_block_that_cannot_start(self, fault: Fault) -> None:
        def enter() -> None:
            with self.model.disable_adapter():
                pass

        if fault.call > len(self.model.adapter_wrappers()):
            return  # that call would be on the way out
        before = Snapshot(self.model)
        self.attempt(enter, fault=fault)
        assert Snapshot(self.model) == before

    @rule()
    def train(self) -> None:
        """A step of SGD; nothing moves but what is said to be trainable."""
        y = self.model(TOKENS)
        if not y.requires_grad:
            assert all(p.grad is None for p in self.model.parameters())
            return
        before = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        y.tanh().sum().backward()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        torch.optim.SGD(trained, lr=0.05).step()
        for n, p in self.model.named_parameters():
            assert p.requires_grad or torch.equal(p, before[n]), n
            p.grad = None
        for name, adapter in self.ref.adapters.items():
            for where, (A, B) in self.read(name).items():
                adapter.parts[where].A, adapter.parts[where].B = A, B
            if adapter.head:
                copied = self.model.get_submodule("base_model.model.head").modules_to_save[name]
                adapter.head = {f"head.{n}": p.detach().numpy().copy() for n, p in copied.named_parameters()}
        for n, p in self.base_parameters().items():
            if n in BIASES:
                self.ref.base[n] = p.detach().numpy().copy()

    @has_adapters
    @rule(data=st.data(), convert=st.booleans())
    def save(self, data: st.DataObject, convert: bool) -> None:
        name = self.one(data)
        before = Snapshot(self.model)
        self.model.save_pretrained(self.folder.name, selected_adapters=[name], convert=convert)
        assert Snapshot(self.model) == before
        adapter = copy.deepcopy(self.ref.adapters[name])
        for part in adapter.parts.values():
            if part.start and convert:
                (part.A, part.B), part.r, part.start = part.converted(part.initial), 2 * part.r, None
        self.saved[name] = adapter, {b: self.ref.base[b].copy() for b in adapter.biases}

    @precondition(lambda self: bool(self.saved))
    @rule(data=st.data(), name=NAMES, fault=FAULTS)
    def load(self, data: st.DataObject, name: str, fault: Fault | None) -> None:
        source = data.draw(st.sampled_from(list(self.saved)))
        folder = Path(self.folder.name) / ("" if source == "default" else source)
        adapter, biases = copy.deepcopy(self.saved[source])
        config = json.loads((folder / "adapter_config.json").read_text())
        second = config["bias"] != "none" and any(c.bias != "none" for c in self.model.peft_config.values())
        refused = second or name in self.ref.adapters
        if self.attempt(lambda: self.model.load_adapter(folder, name), refused, fault):
            for part in adapter.parts.values():
                part.s = part.initial  # the file does not say what the scale had been set to
            self.ref.adapters[name] = adapter
            self.ref.base |= biases

    @has_adapters
    @rule(data=st.data(), fault=FAULTS)
    def delete(self, data: st.DataObject, fault: Fault | None) -> None:
        name = self.one(data)
        if self.attempt(lambda: self.model.delete_adapter(name), name in self.ref.merged, fault):
            self.ref.delete(name)

    @has_adapters
    @rule(data=st.data(), new=NAMES | BAD_NAMES, fault=FAULTS)
    def rename(self, data: st.DataObject, new: str, fault: Fault | None) -> None:
        old = self.one(data)
        refused = new in self.ref.adapters or not new.replace(" ", "").replace("_A", "").isalnum() or new in (
            "forward", "training", "a\n",
        )  # fmt: skip
        if self.attempt(lambda: self.model.rename_adapter(old, new), refused, fault):
            self.ref.rename(old, new)

    @has_adapters
    @rule(
        data=st.data(),
        new=NAMES,
        kind=st.sampled_from(["cat", "svd", "linear"]),
        weights=st.lists(st.sampled_from([1.0, -0.5, 2, 0]), min_size=1, max_size=3),
        fault=FAULTS,
    )
    def combine(self, data: st.DataObject, new: str, kind: str, weights: list[float], fault: Fault | None) -> None:
        ref, names = self.ref, self.some(data)
        parents = [ref.adapters[n] for n in names]
        ranks: dict[str, list[int]] = {}
        for parent in parents:
            for where, part in parent.parts.items():
                ranks.setdefault(where, []).append(2 * part.r if part.start else part.r)
        unequal = kind == "linear" and any(len(set(r)) > 1 for r in ranks.values())
        heads = [p.head for p in parents if p.head]
        unscaled = any(part.start and part.s == 0 for parent in parents for part in parent.parts.values())
        refused = (
            new in ref.adapters or len(names) != len(weights) or not names or unequal or len(heads) > 1 or unscaled
        )
        enough = max((sum(r) for r in ranks.values()), default=1)

        def operation() -> None:
            self.model.add_weighted_adapter(names, weights, new, kind, svd_rank=enough if kind == "svd" else None)

        if not self.attempt(operation, refused, fault):
            return
        got = self.read(new)
        assert set(got) == set(ranks)
        for where, (A, B) in got.items():
            D = product(where, A, B)
            mine = [(w, p.parts[where]) for w, p in zip(weights, parents, strict=True) if where in p.parts]
            if kind == "linear":
                As = sum(math.copysign(math.sqrt(abs(w * p.s)), w * p.s) * p.converted(p.s)[0] for w, p in mine)
                Bs = sum(math.sqrt(abs(w * p.s)) * p.converted(p.s)[1] for w, p in mine)
                want, power = product(where, As, Bs), 0.5
            else:
                want, power = sum(w * p.s * product(where, *p.converted(p.s)) for w, p in mine), 1
            # the updates, or [B | -B0] [A; A0] in one of them, may cancel
            norms = [(abs(w * p.s), *map(np.linalg.norm, p.converted(p.s))) for w, p in mine]
            left, right = sum(x[0] ** power * x[1] for x in norms), sum(x[0] ** (1 - power) * x[2] for x in norms)
            agree(D, want, size=left * right, what=where)
        r = {"cat": sum, "linear": max, "svd": lambda _: enough}[kind]
        parts = {where: Part(A, B, r(ranks[where]), 1.0, 1.0) for where, (A, B) in got.items()}
        ref.adapters[new] = Adapter(parts, copy.deepcopy(heads[0]) if heads else None, ())

    @has_adapters
    @rule(data=st.data(), factor=st.sampled_from([0.5, 2, -1, 0, math.nan]), fault=FAULTS)
    def set_scale(self, data: st.DataObject, factor: float, fault: Fault | None) -> None:
        name = self.one(data)
        refused = name in self.ref.merged or math.isnan(factor)
        if self.attempt(lambda: self.model.set_scale(name, factor), refused, fault):
            for part in self.ref.adapters[name].parts.values():
                part.s = factor * part.initial

    @rule(data=st.data())
    def mixed_batch(self, data: st.DataObject) -> None:
        ref = self.ref
        names = data.draw(st.lists(st.sampled_from([*ref.adapters, "__base__"]), min_size=2, max_size=4))
        experts = any(n != "__base__" and "experts.stack" in ref.adapters[n].parts for n in names)
        refused = bool(ref.merged) or (not ref.disabled and (len(names) != len(TOKENS) or experts))
        got = []
        if self.attempt(lambda: got.append(self.model(TOKENS, adapter_names=names)), refused) and len(names) == 3:
            for i, name in enumerate(names):
                alone = [] if name == "__base__" or ref.disabled else [name]
                P = ref.parameters(alone) | ((ref.adapters[name].head or {}) if alone else {})
                want = run_net(P, TOKENS.numpy())[i]
                agree(got[0].detach().numpy()[i], want)

    @rule(how=st.sampled_from([copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]))
    def go_on_with_a_copy(self, how: Callable[[Any], Any]) -> None:
        before = Snapshot(self.model)
        copied = how(self.model)
        assert Snapshot(self.model) == before
        mine = {id(p) for p in self.model.parameters()}
        assert not any(id(p) in mine for p in copied.parameters())
        self.model, self.net = copied, copied.get_base_model()
        self.base_modules = self.unwrapped_modules()

    @rule(named=st.booleans(), merge_before=st.booleans(), data=st.data())
    def merge_and_unload_a_copy(self, named: bool, merge_before: bool, data: st.DataObject) -> None:
        copied, ref = copy.deepcopy(self.model), copy.deepcopy(self.ref)
        if merge_before and ref.adapters and not ref.disabled:
            first = self.one(data)
            copied.merge_adapter(first)
            ref.merged = list(dict.fromkeys([*ref.merged, first]))
        names = (self.some(data)[:1] or None) if named and ref.adapters else None
        net = copied.get_base_model()
        assert copied.merge_and_unload(adapter_names=names) is net
        if names is not None:
            ref.set_active(names)
        ref.disabled = False
        assert not any(isinstance(m, AdapterModule) for m in net.modules())
        assert [n for n, _ in net.named_parameters()] == [n for n, _ in Net().named_parameters()]
        agree(net(TOKENS), ref.output())

    @rule(name=NAMES, options=CONFIGS, fault=FAULTS)
    def unload_and_adapt_again(self, name: str, options: dict[str, Any], fault: Fault | None) -> None:
        if not self.attempt(lambda: self.model.unload(), fault=fault):
            return
        assert dict(self.net.named_modules()) == {"": self.net} | self.base_modules
        assert self.model.get_base_model() is self.net
        for n, p in self.net.named_parameters():
            W = p.detach().numpy()
            assert same_bits(W, self.ref.base[n]), n
        self.saved = {}
        self.adapt(self.net, name, options)

    # -- what holds after every step

    def output(self) -> np.ndarray:
        return self.model(TOKENS).detach().numpy()

    def unwrapped_modules(self) -> dict[str, nn.Module]:
        return {name: inject.unwrapped(getattr(parent, a)) for name, parent, a in inject.walk(self.net)}

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """The base model's own parameters, as they were before any merge."""
        found = {f"{n}.{k}": p for n, m in self.unwrapped_modules().items() for k, p in m._parameters.items()}
        for n, layer in self.model.lora_layers().items():
            found[n if "." in n else f"{n}.weight"] = layer.unmerged_weight
        return found

    @invariant()
    def the_output_is_predicted(self) -> None:
        agree(self.output(), self.ref.output())

    @invariant()
    def the_state_is_predicted(self) -> None:
        ref, model = self.ref, self.model
        assert list(model.peft_config) == list(ref.adapters) and model.active_adapters == ref.active
        for name, layer in model.lora_layers().items():
            where = name if "." in name else f"{name}.weight"
            here = [n for n, a in ref.adapters.items() if where in a.parts]
            assert set(layer.adapters()) == set(here)
            assert layer.active_adapters == [n for n in ref.active if n in here]
            assert layer.merged_adapters == [n for n in ref.merged if n in here]
            assert layer.disable_adapters is ref.disabled and layer.adapter_names is None
            assert layer.scaling.keys() == set(here)
            for n in here:
                s = ref.adapters[n].parts[where].s
                # not ==: converted with rsLoRA, s is sqrt(2) alpha / sqrt(2 r): two roots, a product and a quotient
                close(layer.scaling[n], s, terms=4, size=s, what=name)
            assert layer.r == {n: ref.adapters[n].parts[where].r for n in here}
        assert self.unwrapped_modules() == self.base_modules

    @invariant()
    def base_weights_never_change(self) -> None:
        for n, p in self.base_parameters().items():
            assert same_bits(p.detach().numpy(), self.ref.base[n]), n

    @invariant()
    def what_trains_is_predicted(self) -> None:
        ref, trains = self.ref, set()
        if ref.trainable:
            for name in ref.active:
                wrappers = [] if ref.disabled else self.model.adapter_wrappers()
                trains |= {id(p) for w in wrappers for p in stored(w, name)}
                trains |= {id(self.base_parameters()[b]) for b in ref.adapters[name].biases}
        for n, p in self.model.named_parameters():
            assert p.requires_grad is (id(p) in trains), n


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


def but_with(ref: Model, **changes: Any) -> Model:
    """A shallow copy of the reference with other attributes."""
    other = copy.copy(ref)
    vars(other).update(changes)
    return other


TestAdaptedModel = AdaptedModel.TestCase
TestAdaptedModel.settings = settings(
    # a profile that asks for more than the default one gets it
    max_examples=int(os.environ.get("LORA_REF_SEQUENCES", max(40, settings().max_examples))),
    stateful_step_count=30,
    deadline=None,
)
