# ruff: noqa: E501 (tables of damage read better in long lines)
"""Adapter folders come from strangers: whatever is in them, loading either works exactly or changes nothing.

Every case damages a valid folder in one way. Loading it must raise ValueError or OSError with a sentence,
soon and in little memory, and leave the model bit for bit as it was.
"""

import json
import resource
import shutil
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from models import Snapshot
from torch import nn

from lora_ref import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from lora_ref.files import config_file
from lora_ref.safe import regexes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LONG = "a" * 40 + "_x"  # a module's name on which `(a|aa)+$` would run for years
Damage = Callable[[Path], None]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.norm = nn.Linear(6, 6), nn.Linear(6, 4, bias=False), nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.q(x) + self.v(x).repeat(1, 1, 2)[..., :6])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.layers, self.head = nn.Embedding(11, 6), nn.ModuleList([Block(), Block()]), nn.Linear(6, 3)
        self.bn = nn.BatchNorm1d(3)
        self.add_module(LONG, nn.Linear(2, 2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.emb(ids)
        for layer in self.layers:
            x = layer(x)
        return self.bn(self.head(x).flatten(0, 1))


def net() -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    model.layers[0].q.weight.requires_grad_(False)  # not all alike: what was frozen must stay frozen
    return model


CHOICE: dict[str, Any] = {"r": 2, "target_modules": ["q", "emb"], "modules_to_save": ["head"], "bias": "lora_only"}


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that loads: linear layers, an embedding, biases and a module saved whole."""
    folder = tmp_path_factory.mktemp("valid")
    model = get_peft_model(net(), LoraConfig(**CHOICE, init_lora_weights=False))
    model.save_pretrained(folder)
    return folder


def with_adapter() -> PeftModel:
    return get_peft_model(net(), LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False), "a")


# -- the cases -----------------------------------------------------------------------------------

CASES: dict[str, Damage] = {}


def case(name: str, damage: Damage) -> None:
    assert name not in CASES, name
    CASES[name] = damage


def parts(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of the tensor file."""
    content = (folder / WEIGHTS).read_bytes()
    (n,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + n]), content[8 + n :]


def put(folder: Path, header: Any, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def on_header(change: Callable[[dict[str, Any], list[str]], Any]) -> Damage:
    """Change the header in place; the names of the tensors are given too."""

    def damage(folder: Path) -> None:
        header, data = parts(folder)
        replaced = change(header, sorted(k for k in header if k != "__metadata__"))
        put(folder, header if replaced is None else replaced, data)

    return damage


def on_config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        data = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps(data))  # json writes Infinity and NaN as such

    return damage


def raw_config(text: str | bytes, old: str | None = None) -> Damage:
    """The whole text, or what stands in place of `old`."""

    def damage(folder: Path) -> None:
        new = text.encode() if isinstance(text, str) else text
        if old is not None:
            before = (folder / CONFIG).read_bytes()
            assert old.encode() in before
            new = before.replace(old.encode(), new)
        (folder / CONFIG).write_bytes(new)

    return damage


def on_tensor(which: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def damage(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / WEIGHTS)
        key = next(k for k in tensors if which in k)
        changed = change(tensors[key].clone()).contiguous()
        try:
            save_file(tensors | {key: changed}, folder / WEIGHTS)
        except KeyError:  # complex64, before safetensors 0.7
            pytest.skip(f"this safetensors does not write {changed.dtype}")

    return damage


def on_keys(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    def damage(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)

    return damage


def cut(file: str, size: Callable[[bytes], int]) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: size(content)])

    return damage


def header_end(content: bytes) -> int:
    return int(8 + struct.unpack("<Q", content[:8])[0])


# files: missing, empty, something else, cut short
for file in (CONFIG, WEIGHTS):
    short = file.partition("_")[2].partition(".")[0]
    case(f"{short}-missing", lambda f, file=file: (f / file).unlink())
    case(f"{short}-is-a-directory", lambda f, file=file: ((f / file).unlink(), (f / file).mkdir()))
    case(f"{short}-dangling-link", lambda f, file=file: ((f / file).unlink(), (f / file).symlink_to("nowhere")))
    case(f"{short}-link-to-itself", lambda f, file=file: ((f / file).unlink(), (f / file).symlink_to(file)))
    case(f"{short}-zeros", lambda f, file=file: (f / file).write_bytes(bytes(4096)))
    case(f"{short}-ff", lambda f, file=file: (f / file).write_bytes(b"\xff" * 4096))
    case(f"{short}-is-a-pickle", lambda f, file=file: torch.save({"a": torch.ones(2)}, f / file))
    for n in (0, 1, 2, 7, 8, 9, 16, 64):
        case(f"{short}-cut-to-{n}-bytes", cut(file, lambda content, n=n: n))
    for percent in (10, 25, 50, 75, 90):
        case(f"{short}-cut-to-{percent}-percent", cut(file, lambda content, p=percent: len(content) * p // 100))
case("model-cut-at-header-end", cut(WEIGHTS, header_end))
case("model-cut-before-header-end", cut(WEIGHTS, lambda c: header_end(c) - 1))
case("model-cut-after-header-end", cut(WEIGHTS, lambda c: header_end(c) + 1))
case("model-cut-last-byte", cut(WEIGHTS, lambda c: len(c) - 1))
case("config-cut-last-brace", cut(CONFIG, lambda c: c.rindex(b"}")))
case("folder-empty", lambda f: [(f / x).unlink() for x in (CONFIG, WEIGHTS)])
case("folder-missing", lambda f: shutil.rmtree(f))
case("folder-is-a-file", lambda f: (shutil.rmtree(f), f.write_text("hello")))
case("bin-only", lambda f: ((f / WEIGHTS).unlink(), torch.save({"a": torch.ones(2)}, f / "adapter_model.bin")))
case("trailing-bytes", lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"more"))
case("files-swapped", lambda f: ((f / CONFIG).rename(f / "x"), (f / WEIGHTS).rename(f / CONFIG)))

# the header's length and text
for name, length in {
    "2**63": 2**63, "2**64-1": 2**64 - 1, "2**32": 2**32, "100000001": 100_000_001, "0": 0, "1": 1, "2": 2,
}.items():  # fmt: skip
    case(f"header-length-{name}", lambda f, n=length: put(f, *parts(f), length=n))
for byte in range(8):
    case(f"header-length-flip-byte-{byte}", lambda f, b=byte: flip(f, b, 0x40))
for name, text in {
    "not-json": b"{base_model}", "list": b"[]", "number": b"7", "null": b"null", "empty-object": b"{}",
    "utf16": '{"a":1}'.encode("utf-16"), "bad-utf8": b'{"\xff\xfe":{}}', "nested-100000": b"[" * 100_000,
    "only-metadata": b'{"__metadata__":{"format":"pt"}}', "tensor-is-null": b'{"a":null}', "tensor-is-list": b'{"a":[]}',
    "tensor-without-shape": b'{"a":{"dtype":"F32","data_offsets":[0,4]}}',
    "tensor-without-dtype": b'{"a":{"shape":[1],"data_offsets":[0,4]}}',
    "tensor-without-offsets": b'{"a":{"dtype":"F32","shape":[1]}}',
}.items():  # fmt: skip
    case(f"header-{name}", lambda f, t=text: put(f, t, parts(f)[1]))


def flip(folder: Path, position: int, mask: int = 1) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[position] ^= mask
    (folder / WEIGHTS).write_bytes(content)


def entry(**changes: Any) -> Damage:
    """Change the header's entry of the first tensor."""
    return on_header(lambda h, names: h[names[0]].update(changes))


for name, shape in {
    "negative": [-1, 6], "float": [2.5, 6], "string": "26", "none": None, "empty": [], "transposed": [6, 2],
    "flat": [12], "extra-dimension": [1, 2, 6], "zero": [0, 6], "2**62": [2**62, 6], "2**64": [2**64, 1],
    "10**30": [10**30], "product-overflows": [2**33, 2**33], "zero-times-2**63": [0, 2**63 - 1], "70-dimensions": [1] * 70,
}.items():  # fmt: skip
    case(f"shape-{name}", entry(shape=shape))
for name, offsets in {
    "reversed": [48, 0], "negative": [-8, 40], "too-far": [0, 10**9], "2**63": [2**63, 2**63 + 48], "one": [0],
    "three": [0, 24, 48], "empty": [0, 0], "strings": ["0", "48"], "floats": [0.0, 48.0], "none": None, "odd": [1, 49],
}.items():  # fmt: skip
    case(f"offsets-{name}", entry(data_offsets=offsets))
case("offsets-overlap", on_header(lambda h, n: h[n[1]].update(data_offsets=h[n[0]]["data_offsets"])))
case("offsets-all-the-same", on_header(lambda h, n: [h[k].update(data_offsets=[0, 48], shape=[2, 6]) for k in n]))
case("offsets-gap", lambda f: (lambda h, d: put(f, shifted(h), bytes(8) + d))(*parts(f)))


def shifted(header: dict[str, Any]) -> dict[str, Any]:
    for key in header:
        if key != "__metadata__":
            header[key]["data_offsets"] = [x + 8 for x in header[key]["data_offsets"]]
    return header


for dtype in ("F31", "", None, 32, "f32", "I32", "U32", "F16", "F64", "BOOL", "C64", "F4", "F8_E4M3"):
    case(f"dtype-said-to-be-{dtype}", entry(dtype=dtype))  # the size does not fit, or the type
case("dtype-int32-of-equal-size", entry(dtype="I32"))
case("dtype-uint32-of-equal-size", entry(dtype="U32"))
for target in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64):
    case(f"dtype-is-{str(target)[6:]}", on_tensor("q.lora_A", lambda t, d=target: t.to(d)))
    case(f"dtype-of-saved-module-is-{str(target)[6:]}", on_tensor("head.weight", lambda t, d=target: t.to(d)))
case("dtype-float4", on_header(lambda h, n: only_f4(h, n)))


def only_f4(header: dict[str, Any], names: list[str]) -> None:
    start, end = header[names[0]]["data_offsets"]
    header[names[0]].update(dtype="F4", shape=[2 * (end - start)])


# the numbers and the names
BAD = {"nan": float("nan"), "inf": float("inf"), "minus-inf": float("-inf")}
for where in ("q.lora_A", "q.lora_B", "emb.lora_embedding_A", "base_layer.bias", "head.weight"):
    for name, number in BAD.items():
        case(f"{name}-in-{where}", on_tensor(where, lambda t, x=number: t.index_fill(0, torch.tensor([0]), x)))
    case(f"missing-{where}", on_keys(lambda t, w=where: {k: v for k, v in t.items() if w not in k}))
    case(f"transposed-{where}", on_tensor(where, lambda t: t.T if t.ndim == 2 and len(set(t.shape)) > 1 else t[:-1]))
    case(f"longer-{where}", on_tensor(where, lambda t: torch.cat([t, t])))
    case(f"scalar-{where}", on_tensor(where, lambda t: t.sum()))
    case(f"no-rows-{where}", on_tensor(where, lambda t: t[:0]))
for dtype in (torch.float16, torch.bfloat16, torch.float64):
    for name, number in BAD.items():
        case(f"{name}-in-{str(dtype)[6:]}", on_tensor("q.lora_A", lambda t, d=dtype, x=number: (t * 0 + x).to(d)))
case("nan-in-float8", on_tensor("q.lora_A", lambda t: (t * float("nan")).to(torch.float8_e4m3fn)))
case("float64-beyond-float32", on_tensor("q.lora_A", lambda t: t.double() * 1e300))
EXTRA = "base_model.model."
for name, key in {
    "layer": "layers.7.q.lora_A.weight", "untargeted": "layers.0.v.lora_A.weight", "base-weight": "layers.0.q.weight",
    "base-layer": "layers.0.q.base_layer.weight", "dora": "layers.0.q.lora_magnitude_vector", "lora-bias": "layers.0.q.lora_B.bias",
    "adapter-name": "layers.0.q.lora_A.default.weight", "dots": "../../etc/passwd", "empty": "", "surrogate": "\u00e9\u0000",
    "class": "__class__.x", "norm": "layers.0.norm.weight", "long": "x" * 5000,
}.items():  # fmt: skip
    case(f"extra-{name}", on_keys(lambda t, k=key: t | {EXTRA + k: torch.ones(2, 6)}))
for name, prefix in {"none": "", "one": "model.", "twice": EXTRA * 2, "case": "Base_model.model."}.items():
    case(f"prefix-{name}", on_keys(lambda t, p=prefix: {p + k.removeprefix(EXTRA): v for k, v in t.items()}))
case("prefix-missing-in-one", on_keys(lambda t: {k.removeprefix(EXTRA) if "emb" in k else k: v for k, v in t.items()}))
case("A-and-B-swapped", on_keys(lambda t: {k.replace("lora_A", "lora_X").replace("lora_B", "lora_A").replace("lora_X", "lora_B"): v for k, v in t.items()}))  # fmt: skip

# the configuration as text
DEEP = 100_000
for name, text in {
    "list": "[]", "null": "null", "number": "7", "string": '"LORA"', "empty-object": "{}", "comment": "{} // no",
    "single-quotes": "{'peft_type': 'LORA'}", "trailing-comma": '{"peft_type": "LORA",}', "bom-utf16": "{}".encode("utf-16"),
    "bad-utf8": b'{"peft_type": "\xff"}', "nested-lists": "[" * DEEP + "]" * DEEP, "nested-objects": '{"a":' * DEEP + "1" + "}" * DEEP,
    "not-closed": '{"a":' * 500, "two-documents": '{"peft_type": "LORA"}{"peft_type": "LORA"}', "html": "<html>not found</html>",
    "lfs-pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}.items():  # fmt: skip
    case(f"json-{name}", raw_config(text))
case("json-12-MB", raw_config('{"peft_type": "LORA", "x": "' + "x" * 12_000_000 + '"}'))
case("json-10-MB-of-targets", on_config(target_modules=[f"q_{i}" for i in range(700_000)]))
case("json-10-MB-key", on_config(**{"k" * 9_000_000: True}))
case("json-10-MB-of-rank-patterns", on_config(rank_pattern={f"q{i}": 1 for i in range(600_000)}))
case("json-4000-slow-classes", on_config(alpha_pattern={f"(?i)[\x00-\U0010ffff]{i}": 1 for i in range(4000)}))
case("json-r-twice", raw_config('"r": 2, "r": 2', '"r": 2'))
case("json-nested-key-twice", raw_config('"rank_pattern": {"a": 1, "a": 2}', '"rank_pattern": {}'))
for constant in ("NaN", "Infinity", "-Infinity"):
    for option in ("lora_alpha", "lora_dropout"):
        old = {"lora_alpha": '"lora_alpha": 8', "lora_dropout": '"lora_dropout": 0.0'}[option]
        case(f"json-{option}-{constant}", raw_config(f'"{option}": {constant}', old))
    case(f"json-unknown-key-{constant}", raw_config(f'"peft_version": {constant}, "r": 2', '"r": 2'))
for digits in (19, 400, 4301, 100_000):
    case(f"r-of-{digits}-digits", raw_config(f'"r": {"9" * digits}', '"r": 2'))
    case(f"alpha-of-{digits + 400}-digits", raw_config(f'"lora_alpha": {"9" * (digits + 400)}', '"lora_alpha": 8'))
case("alpha-1e999", raw_config('"lora_alpha": 1e999', '"lora_alpha": 8'))
case("alpha-minus-1e999", raw_config('"lora_alpha": -1e999', '"lora_alpha": 8'))
case("r-and-float-alpha", on_config(r=10**400, lora_alpha=8.0))
case("r-and-rslora", on_config(r=10**18, use_rslora=True))
case("r-10**6", on_config(r=10**6))
case("r-10**6-in-rank-pattern", on_config(rank_pattern={"layers.*": 10**6}))
case("r-10**18-in-rank-pattern", on_config(rank_pattern={"q": 10**18}))
case("r-3", on_config(r=3))

# every field, of wrong types and values
NOT_A_LIST = [5, 1.5, True, {}, {"a": 1}, [1], [None], [[]], [""], [["q"]], [True]]
NOT_A_PATTERN = [5, 1.5, True, {}, {"a": 1}, [1], [None], [""], "", "(", "*", "a{2,1}", "(?P<n>", "[", "\\", "(?<=a*)b"]
NOT_A_BOOL = [None, 0, 1, 1.5, "true", "", [], {}]
WRONG: dict[str, list[Any]] = {
    "peft_type": [None, 5, True, [], {}, "", "lora", "IA3", "LOHA"],
    "r": [0, -1, 2.0, 1.5, "2", None, True, [2], {}, 2**53],
    "lora_alpha": ["8", None, True, [], {}, 10**309],
    "target_modules": [*NOT_A_PATTERN, None, [], ["Q"], "q", ["nothing"], "../../q", ["../q"], ["norm"], ["q", "norm"]],
    "exclude_modules": [*NOT_A_PATTERN, ".*", ["q", "emb"], "layers.*"],
    "layers_to_transform": ["0", 1.5, True, {}, ["0"], [1.5], [True], [None], [[0]], [0, "1"], [0.0], {"0": 0}],
    "layers_pattern": [*(x for x in NOT_A_PATTERN if x != {}), "layers", ["layers"]],
    "rank_pattern": [5, "q", True, [], ["q"], *({"q": x} for x in (0, -1, 1.5, "2", None, True, [2], {})), {"(": 2}, {"q": 3}],
    "alpha_pattern": [5, "q", True, [], ["q"], *({"q": x} for x in ("2", None, True, [2], {}, 10**309)), {"(": 2}],
    "target_parameters": [*NOT_A_LIST, "head.weight", ["q.weight"], ["head.weight"], ["emb.weight", "q.bias"]],
    "modules_to_save": [*NOT_A_LIST, "head", ["emb"], ["q"], ["bn"], ["layers"]],
    "lora_dropout": [-0.1, 1.1, "0", None, True, [], {}, 10**400],
    "bias": [None, True, 1, [], {}, "", "al", "NONE", "all"],
    "use_rslora": NOT_A_BOOL, "fan_in_fan_out": NOT_A_BOOL, "inference_mode": NOT_A_BOOL,
    "init_lora_weights": [None, 0, 1, [], {}, "", "gausian", "pissa", "PiSSA", "pissa_niter_4", "pissa_niter_", "pissa_niter_-1",
                          "olora", "corda", "loftq", "lora_ga", "dora"],
    "task_type": [1, True, [], {}, "", "causal_lm", "LM"],
    "eva_config": [5, "x", True, [1], [], *({"rho": x} for x in (0.5, "2", None, True)), {"tau": 2}, {"whiten": 1}, {"label_mask_value": 1.5}],
    "loftq_config": [5, "x", True, [1], [], *({"loftq_bits": x} for x in (3, "4", 4.0, None, True)), {"loftq_iter": 0}],
    "corda_config": [5, "x", True, [1], [], *({"corda_method": x} for x in ("x", None, 1, []))],
    "base_model_name_or_path": [5, True, [], {}, ["x"]], "revision": [5, 1.5, True, [], {}],
}  # fmt: skip
for field, values in WRONG.items():
    for value in values:
        shown = json.dumps(value) if len(repr(value)) < 40 else f"{type(value).__name__}-{str(value)[:6]}"
        case(f"{field}={shown}", on_config(**{field: value}))
for key in config_file.OFF_IN_PEFT:
    case(f"on-{key}", on_config(**{key: {"x": 1} if key.endswith("config") else [1]}))
for key in ("use_dora", "lora_bias", "use_qalora", "unheard_of", "lora_alhpa", "__class__", "peft_typ"):
    case(f"on-{key}-true", on_config(**{key: True}))
case("surrogate-target", raw_config('"target_modules": ["\\ud800"]', '"target_modules": [\n    "q",\n    "emb"\n  ]'))
case("surrogate-key", raw_config('"\\udfff": 1, "r": 2', '"r": 2'))
case("surrogate-pattern", on_config(target_modules="(\ud800"))
case("second-bias-of-all", on_config(bias="all"))

# regular expressions
SLOW = [
    "(a|aa)+",
    "(a+)+",
    "(a*)*b",
    "(.*.*)*Z",
    "(?:a|a|a)*b",
    "((a{1,9}){1,9}){1,9}b",
    "(?i)(A|AA)+",
    "(.*)*(.*)*(.*)*Z",
]
BOMBS = ["a{1000000000}", "(a{1000}){1000}", "((a{100}){100}){100}", "(?x)(a{ 1 0 }){99999}", "a{4294967296}", "(" * 5000 + ")" * 5000,
         "a?" * 60_000, "(?:" + "a?" * 40_000 + "){999}", "(?i)" + "[\x00-\U0010ffff]" * 5000, "a|" * 60_000, "(?=" * 3000 + ")" * 3000,
         "(a)" * 200 + "\\200" * 9 + "(?P<n>", "(?P>n)", "(?R)", "\\p{L}+q"]  # fmt: skip
for number, pattern in enumerate([*SLOW, *BOMBS]):
    kind = "slow" if number < len(SLOW) else "bomb"
    shown = f"{kind}-{number}"
    case(f"{shown}-in-target_modules", on_config(target_modules=pattern))
    if number not in (1, 2, 3, 4, 7):  # `regex` sees through these, and they match nothing
        case(f"{shown}-in-exclude_modules", on_config(exclude_modules=pattern))
    if kind == "bomb":
        case(f"{shown}-in-rank_pattern", on_config(rank_pattern={pattern: 4}))
        case(f"{shown}-in-layers_pattern", on_config(layers_pattern=[pattern], layers_to_transform=[0]))
    case(
        f"{shown}-in-alpha_pattern",
        on_config(alpha_pattern={pattern + "Z" * (kind == "slow"): 4}, target_modules=[LONG]),
    )
case("many-slow-keys", on_config(rank_pattern={f"(a|aa)+Z{i}": 2 for i in range(300)}, target_modules=[LONG]))


def test_there_are_more_than_a_hundred_cases() -> None:
    assert len(CASES) > 500


@pytest.mark.parametrize("name", CASES, ids=lambda name: name.encode("ascii", "backslashreplace").decode()[:60])
def test_a_damaged_folder_is_refused_and_nothing_changes(
    name: str, valid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.startswith("slow"):
        monkeypatch.setattr(regexes, "TIME_LIMIT", 0.1)  # `test_slow_patterns_...` has the real one
    folder = tmp_path / "adapter"
    shutil.copytree(valid, folder)
    CASES[name](folder)
    for load, model in (
        (lambda m: PeftModel.from_pretrained(m, folder), net()),
        (lambda m: m.load_adapter(folder, "b"), with_adapter()),
    ):
        before, drawn = Snapshot(model), torch.get_rng_state()
        memory, started = peak_memory(), time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises((ValueError, OSError)) as caught:
                load(model)
        assert time.process_time() - started < 5
        assert peak_memory() - memory < 600e6
        message = str(caught.value)
        assert 20 < len(message) < 20_000 and " " in message and caught.type is not UnicodeDecodeError
        assert Snapshot(model) == before and torch.equal(torch.get_rng_state(), drawn)


def peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def test_the_undamaged_folder_loads_on_both(valid: Path) -> None:
    model = PeftModel.from_pretrained(net(), valid)
    other = with_adapter()
    other.load_adapter(valid, "b")
    for name, adapted in (("default", model), ("b", other)):
        loaded = get_peft_model_state_dict(adapted, adapter_name=name)
        assert loaded.keys() == read(valid).keys()
        assert all(np.array_equal(loaded[key].numpy(), array) for key, array in read(valid).items())


@pytest.mark.parametrize("adapter", ["../b", "a/b", "a.b", "", ".", "..", "/tmp/x", "a\\b", "a\x00b", "__base__", "training", "keys", "a\nb", 5])  # fmt: skip
def test_an_adapter_name_that_is_a_path_or_a_method_is_refused(adapter: Any, valid: Path) -> None:
    model = with_adapter()
    before = Snapshot(model)
    with pytest.raises(ValueError, match="adapter name"):
        model.load_adapter(valid, adapter)
    assert Snapshot(model) == before


@pytest.mark.parametrize("pattern", ["(a|aa)+Z", "(?:a{1,9}){1,99}(a|aa)+Z"])
def test_slow_patterns_end_within_seconds_at_the_real_limit(pattern: str, valid: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(valid, folder)
    on_config(target_modules=pattern)(folder)
    started = time.process_time()
    with pytest.raises(ValueError, match="too slow"):
        PeftModel.from_pretrained(net(), folder)
    assert time.process_time() - started < 5


# -- random damage: exactly what the bytes say, or nothing ---------------------------------------

NUMPY = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "BF16": "<u2"}


def read(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a file by an independent reader: json and NumPy."""
    header, data = parts(folder)
    arrays = {}
    for key, about in header.items():
        if key != "__metadata__":
            start, end = about["data_offsets"]
            array = np.frombuffer(data[start:end], NUMPY[about["dtype"]]).reshape(about["shape"])
            if about["dtype"] == "BF16":
                array = (array.astype("<u4") << 16).view("<f4")
            arrays[key] = array
    return arrays


mutation = st.tuples(st.integers(0, 10**6), st.sampled_from(["flip", "set", "insert", "delete"]), st.integers(0, 255))


def mutate(content: bytes, changes: list[tuple[int, str, int]]) -> bytes:
    changed = bytearray(content)
    for place, how, value in changes:
        i = place % max(1, len(changed))
        if how == "flip" and changed:
            changed[i] ^= 1 << value % 8
        elif how == "set" and changed:
            changed[i] = value
        elif how == "insert":
            changed.insert(i, value)
        elif how == "delete":
            del changed[i : i + 1 + value % 4]
    return bytes(changed)


@given(file=st.sampled_from([CONFIG, WEIGHTS]), changes=st.lists(mutation, min_size=1, max_size=3))
@example(file=WEIGHTS, changes=[(0, "flip", 7)])
def test_random_damage_loads_exactly_or_not_at_all(
    valid: Path, tmp_path_factory: pytest.TempPathFactory, file: str, changes: list[tuple[int, str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("mutated")
    shutil.copytree(valid, folder, dirs_exist_ok=True)
    (folder / file).write_bytes(mutate((valid / file).read_bytes(), changes))
    model = net()
    before = Snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = PeftModel.from_pretrained(model, folder)
        except (ValueError, OSError):
            assert Snapshot(model) == before
        else:
            tensors = get_peft_model_state_dict(loaded)
            want = read(folder)
            assert tensors.keys() == want.keys()
            for key, array in want.items():
                assert np.array_equal(tensors[key].numpy(), array), key
            said = config_file.from_dict(json.loads((folder / CONFIG).read_bytes()))
            config = loaded.peft_config["default"]
            assert (config.r, config.lora_alpha, config.bias) == (said.r, said.lora_alpha, said.bias)
    shutil.rmtree(folder)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([10**400, "q", "gaussian", "all"]),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3),
    max_leaves=6,
)  # fmt: skip


@pytest.mark.parametrize("field", [*WRONG, *config_file.OFF_IN_PEFT, "unheard_of"])
@given(value=anything)
def test_any_json_value_in_any_field_is_a_valid_config_or_a_value_error(field: str, value: Any) -> None:
    data = {"peft_type": "LORA", "target_modules": ["q"], field: value}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = config_file.from_dict(data)
        except ValueError as error:
            assert len(str(error)) > 10
            return
        again = config_file.from_dict(json.loads(config_file.dumps(config)))
    assert again == config and isinstance(config, LoraConfig)
    if field in ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora"):
        assert getattr(config, field) == value
