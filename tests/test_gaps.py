"""What mutation testing found no other test to notice: small things, each of which a user would see."""

from __future__ import annotations

import argparse
import copy
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_ref import EvaConfig, LoraConfig, PeftModel, get_peft_model
from lora_ref.api.combination import linear
from lora_ref.calibration.eva import initialize_lora_eva_weights
from lora_ref.calibration.hooks import record_inputs
from lora_ref.core.inits import unzeroed
from lora_ref.init.loftq import loftq
from lora_ref.init.pissa import pissa
from lora_ref.safe.progress import progress_bar
from lora_ref.safe.sharded import is_main_process
from lora_ref.tools.cli import main, parser, seed
from lora_ref.tools.spectrum import BARS, bar
from spec_tests import agree


def test_a_long_spectrum_is_shown_from_its_first_to_its_last_value() -> None:
    values = [8.0] + [4.0] * 48 + [0.0]
    assert bar(values, width=4) == BARS[7] + BARS[4] * 2 + BARS[0]
    assert len(bar(values)) == 16


def test_unzeroed_draws_b_up_to_one_over_the_root_of_r() -> None:
    A, B, *_ = unzeroed(np.zeros((4000, 25)), r=4, rng=np.random.default_rng(0))
    assert 0.49 < abs(B).max() <= 0.5
    assert 0.19 < abs(A).max() <= 0.2


def test_every_seed_below_two_to_the_32_is_taken() -> None:
    assert seed("4294967295") == 2**32 - 1
    for text in ("4294967296", "-1"):
        with pytest.raises(argparse.ArgumentTypeError, match="below 2\\*\\*32"):
            seed(text)


def test_only_a_quantised_start_says_that_it_is_not_exact() -> None:
    W = np.random.default_rng(0).standard_normal((4, 4))
    assert Factors(W, W).exact
    assert not loftq(W, 1, 1.0, bits=4).exact


def saved(folder: Path, **options: object) -> Path:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    get_peft_model(net, LoraConfig(r=2, target_modules=["0"], **options)).save_pretrained(folder)
    return folder


def test_a_tensor_that_is_not_expected_is_refused_where_biases_are_saved_too(tmp_path: Path) -> None:
    path = saved(tmp_path, bias="all") / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.9.bias": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"9\.bias: is not expected"):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), tmp_path)


def test_a_configuration_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    monkeypatch.setattr("lora_ref.files.config_file.MAX_BYTES", 100)
    with pytest.raises(ValueError, match="larger than 100 bytes"):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), tmp_path)


def test_inspect_prints_a_table_unless_asked_for_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lora_ref.tools.inspect import print_contents

    print_contents(saved(tmp_path))
    with pytest.raises(json.JSONDecodeError):
        json.loads(capsys.readouterr().out)
    print_contents(tmp_path, as_json=True)
    assert json.loads(capsys.readouterr().out)["config"]["r"] == 2


def test_pissa_has_a_scaling_of_one_by_default() -> None:
    W = np.diag([4.0, 1.0])
    A, B, residual, _ = pissa(W, 1)
    agree(B @ A, np.diag([4.0, 0.0]))
    agree(residual, np.diag([0.0, 1.0]))


def test_a_linear_combination_of_stacks_needs_equal_ranks() -> None:
    A, B = np.ones((3, 1, 2)), np.ones((3, 2, 1))
    with pytest.raises(ValueError, match=r"equal ranks, got \[1, 2\]"):
        linear([A, np.ones((3, 2, 2))], [B, np.ones((3, 2, 2))], [1.0, 1.0])


def test_the_demo_has_peft_s_alpha_by_default() -> None:
    assert parser().parse_args(["demo"]).lora_alpha == LoraConfig(target_modules=["a"]).lora_alpha


def test_a_converted_adapter_is_saved_for_inference_as_others_are(tmp_path: Path) -> None:
    saved(tmp_path, init_lora_weights="pissa")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_mode"] is True


def test_eva_adjusts_the_scaling_by_default_as_peft_does() -> None:
    assert EvaConfig().adjust_scaling_factors is True


def test_copies_of_an_adapted_model_do_not_ask_for_what_is_not_there_yet() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    x = torch.ones(1, 4)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    bare = type(model.base_model).__new__(type(model.base_model))
    nn.Module.__init__(bare)
    with pytest.raises(AttributeError, match="model"):
        bare.model  # noqa: B018


def test_a_notebook_without_ipywidgets_gets_no_bar_and_no_warning(monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert not progress_bar().disable and progress_bar(show=False).disable
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert progress_bar().disable


def test_a_terminal_without_a_character_shows_a_question_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["inspect", str(saved(tmp_path))]) == 0
    assert b"?" in written.getvalue()


def test_whitening_what_does_not_vary_is_refused_by_the_layer_s_name() -> None:
    eva = EvaConfig(rho=1.0, whiten=True)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="eva", eva_config=eva)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    batches = [torch.tensor([[1.0, 0, 0, 0], [2.0, 0, 0, 0], [4.0, 0, 0, 0]])] * 2  # along one direction alone
    with pytest.raises(ValueError, match=r"^0: EvaConfig\(whiten=True\): the inputs vary in fewer than r=2"):
        initialize_lora_eva_weights(model, batches, forward_fn=lambda m, x: m(x), show_progress_bar=False)


@pytest.mark.parametrize("device, drawn_on", [("meta", "meta"), ("cpu", "cpu"), ("cuda", "cpu"), ("mps", "cpu")])
def test_random_numbers_are_drawn_on_the_cpu_whatever_the_device(device: str, drawn_on: str) -> None:
    assert _drawing_device(SimpleNamespace(device=SimpleNamespace(type=device))) == drawn_on


def test_a_layer_is_watched_by_its_first_argument() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor, factor: float) -> torch.Tensor:
            return super().forward(x) * factor

    seen = []
    layer = Scaled(2, 2)
    with record_inputs({"a": layer}, lambda name, x: seen.append(x)):
        layer(x := torch.ones(1, 2), 3.0)
    assert seen[0] is x


def test_what_was_given_back_is_not_given_back_again() -> None:
    net = nn.Sequential(nn.Linear(4, 4)).double()
    before = net[0].weight.detach().clone()
    layer = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")).layers()["0"]
    for _ in range(2):
        layer.give_back(["default"])
        agree(layer.base_weight, before)


@pytest.mark.parametrize("rank, writes", [(0, True), (1, False), (2, False)])
def test_of_several_processes_that_of_rank_0_writes(monkeypatch: pytest.MonkeyPatch, rank: int, writes: bool) -> None:
    assert is_main_process()  # alone
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
    assert is_main_process() is writes
