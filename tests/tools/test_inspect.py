"""lora-ref inspect, on folders that peft wrote, against NumPy's SVD of the explicit product."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from models import Experts
from safetensors.torch import load_file, save_file
from torch import nn

from lora_ref.tools import cli
from lora_ref.tools.inspect import print_contents, read_contents
from spec_tests import agree


class Net(nn.Module):
    """A layer of each kind that a folder can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(30, 12)
        self.conv = nn.Conv2d(4, 8, 3)
        self.grouped = nn.Conv1d(4, 8, 3, groups=2)
        self.q_proj = nn.Linear(12, 20)
        self.k_proj = nn.Linear(12, 3)
        self.head = nn.Linear(20, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.q_proj(self.emb(tokens)))


def write(folder: Path, model: nn.Module | None = None, **options: object) -> Path:
    """A folder with random factors, written by peft."""
    torch.manual_seed(0)
    options = {"init_lora_weights": False, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, on grouped convolutions
        peft.get_peft_model(model or Net(), peft.LoraConfig(**options)).save_pretrained(str(folder))
    return folder


def explicit(A: torch.Tensor, B: torch.Tensor, s: float) -> np.ndarray:
    """The singular values of s*B@A, formed in full in float64."""
    a, b = A.double().numpy(), B.double().numpy()
    product = s * b.reshape(len(b), -1) @ a.reshape(len(a), -1)
    return np.linalg.svd(product, compute_uv=False)


def same_spectrum(got: list[float], want: np.ndarray) -> None:
    """What `got` leaves out is zero beside the largest value."""
    agree(np.pad(got, (0, len(want) - len(got))), np.sort(want)[::-1])


@pytest.mark.parametrize(
    ("options", "scalings"),
    [
        ({"r": 4, "lora_alpha": 6}, {"q_proj": 1.5, "k_proj": 1.5}),
        ({"r": 4, "lora_alpha": 6, "use_rslora": True}, {"q_proj": 3.0, "k_proj": 3.0}),
        ({"r": 4, "lora_alpha": 6, "rank_pattern": {"q_proj": 2}}, {"q_proj": 3.0, "k_proj": 1.5}),
        ({"r": 4, "lora_alpha": 6, "alpha_pattern": {"^k_.*": -8}}, {"q_proj": 1.5, "k_proj": -2.0}),
        ({"r": 4, "lora_alpha": 0}, {"q_proj": 0.0, "k_proj": 0.0}),
    ],
)
def test_linear_layers(tmp_path, options, scalings):
    found = read_contents(write(tmp_path, target_modules=["q_proj", "k_proj"], **options))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {update.module: update.scaling for update in found.modules} == scalings
    for update in found.modules:
        A, B = (stored[f"base_model.model.{update.module}.lora_{factor}.weight"] for factor in "AB")
        assert (update.kind, update.r, update.A, update.B) == ("linear", len(A), list(A.shape), list(B.shape))
        same_spectrum(update.singular_values, explicit(A, B, update.scaling))
        want = np.linalg.norm(update.scaling * (B.double() @ A.double()).numpy())
        agree(update.frobenius_norm, want)
    # k_proj is (3, 12): its update cannot have more than three singular values, whatever r
    assert len({u.module: u for u in found.modules}["k_proj"].singular_values) == 3


def test_embeddings_and_convolutions(tmp_path):
    found = read_contents(write(tmp_path, r=4, lora_alpha=8, target_modules=["emb", "conv", "grouped"]))
    stored = {
        key.removeprefix("base_model.model."): value
        for key, value in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    conv, emb, grouped = found.modules
    assert [update.kind for update in found.modules] == ["conv2d", "embedding", "conv1d"]
    same_spectrum(emb.singular_values, explicit(stored["emb.lora_embedding_A"], stored["emb.lora_embedding_B"], 2.0))
    same_spectrum(conv.singular_values, explicit(stored["conv.lora_A.weight"], stored["conv.lora_B.weight"], 2.0))

    # The update that a grouped B makes is found by sending the unit vectors of the rank space through it.
    A, B = stored["grouped.lora_A.weight"], stored["grouped.lora_B.weight"]
    assert B.shape == (8, 2, 1)
    full = nn.functional.conv1d(torch.eye(4)[:, :, None], B, groups=2)[:, :, 0].T  # (out, r)
    same_spectrum(grouped.singular_values, explicit(A, full, 2.0))


def test_experts_are_told_by_target_parameters(tmp_path):
    net = nn.ModuleDict({"experts": Experts(3, 7, 5)})
    write(tmp_path, net, r=2, lora_alpha=6, target_modules=[], target_parameters=["experts.stack"])
    stored = load_file(tmp_path / "adapter_model.safetensors")
    (update,) = read_contents(tmp_path).modules
    A, B = (stored[f"base_model.model.experts.lora_{factor}.weight"] for factor in "AB")
    assert (update.module, update.kind, update.r, update.scaling) == ("experts", "3 experts", 2, 3.0)
    A, B = A.reshape(3, 2, -1), B.reshape(B.shape[0], 2, 3)
    want = np.concatenate([explicit(A[e], B[:, :, e], 3.0)[:2] for e in range(3)])
    assert len(update.singular_values) == 6
    same_spectrum(update.singular_values, want)


def test_what_is_no_factor_is_listed(tmp_path):
    write(tmp_path, r=2, target_modules=["q_proj"], modules_to_save=["head"], bias="lora_only")
    found = read_contents(tmp_path)
    shapes = {tensor["name"]: tensor["shape"] for tensor in found.extra}
    assert shapes["head.weight"] == [5, 20] and shapes["q_proj.base_layer.bias"] == [20]
    stored = load_file(tmp_path / "adapter_model.safetensors").values()
    assert found.parameters == sum(tensor.numel() for tensor in stored)
    assert found.bytes == 4 * found.parameters


def test_half_precision_factors_are_read_exactly(tmp_path):
    write(tmp_path, r=4, target_modules=["q_proj"])
    path = tmp_path / "adapter_model.safetensors"
    halves = {key: value.bfloat16() for key, value in load_file(path).items()}
    save_file(halves, path, metadata={"format": "pt"})
    (update,) = read_contents(tmp_path).modules
    A, B = (halves[f"base_model.model.q_proj.lora_{factor}.weight"] for factor in "AB")
    assert update.dtype == "bfloat16"
    same_spectrum(update.singular_values, explicit(A, B, 2.0))


def test_json_is_one_document(tmp_path, capsys):
    write(tmp_path, r=4, target_modules=["q_proj", "emb"], rank_pattern={"emb": 2})
    assert cli.main(["inspect", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["config"]["r"] == 4 and document["config"]["rank_pattern"] == {"emb": 2}
    assert [(m["module"], m["r"]) for m in document["modules"]] == [("emb", 2), ("q_proj", 4)]


def test_the_table_names_every_module_and_the_figure_is_written(tmp_path, capsys):
    write(tmp_path / "adapter", r=4, target_modules=["q_proj", "emb", "conv"], modules_to_save=["head"])
    figure = tmp_path / "spectrum.png"
    assert cli.main(["inspect", str(tmp_path / "adapter"), "--figure", str(figure)]) == 0
    printed = capsys.readouterr().out
    for word in ("q_proj", "emb", "conv", "head.weight", "█", "3 adapted modules"):
        assert word in printed
    assert figure.read_bytes().startswith(b"\x89PNG")


def no_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def broken_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def cut_weights(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def wrong_rank(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 3}))


def lone_factor(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.q_proj.lora_B.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("damage", [no_config, no_weights, broken_config, cut_weights, wrong_rank, lone_factor])
def test_a_damaged_folder_is_one_sentence(tmp_path, damage, capsys):
    write(tmp_path, r=4, target_modules=["q_proj"])
    damage(tmp_path)
    assert cli.main(["inspect", str(tmp_path), "--json"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("lora-ref: error: ") and printed.err.count("\n") == 1
    if damage is lone_factor:
        assert printed.err.endswith("q_proj: lora_B is missing\n")


def test_only_of_a_convolution_groups_may_share_the_rank(tmp_path: Path) -> None:
    path = write(tmp_path, r=4, target_modules=["q_proj"]) / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.q_proj.lora_B.weight"
    save_file(tensors | {key: tensors[key][:, :2].contiguous()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="do not fit the configured rank 4"):
        read_contents(tmp_path)


def test_names_cannot_steer_the_terminal(tmp_path, capsys):
    write(tmp_path, r=4, target_modules=["q_proj"])
    path = tmp_path / "adapter_model.safetensors"
    tensors = {key.replace("q_proj", "[bold]q\x1b[2J$x$"): value for key, value in load_file(path).items()}
    tensors["base_model.model.[bold]extra\x1b[2J"] = torch.zeros(1)
    save_file(tensors, path, metadata={"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's, on characters without a glyph
        assert cli.main(["inspect", str(tmp_path), "--figure", str(tmp_path / "figure.png")]) == 0
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert "[bold]q" in printed.out and "[bold]extra" in printed.out


def test_inspect_prints_a_table_unless_asked_for_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_contents(write(tmp_path, r=2, target_modules=["q_proj"]))
    with pytest.raises(json.JSONDecodeError):
        json.loads(capsys.readouterr().out)
    print_contents(tmp_path, as_json=True)
    assert json.loads(capsys.readouterr().out)["config"]["r"] == 2
