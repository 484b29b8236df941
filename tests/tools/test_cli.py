"""The lora-ref command: exit codes, help, and errors of one sentence."""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from lora_ref import LoraConfig, get_peft_model
from lora_ref.tools import cli


def command(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    code = "import sys; from lora_ref.tools.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, **options)


def one_sentence(text: str) -> bool:
    return text.startswith("lora-ref: error: ") and text.count("\n") == 1 and text.endswith("\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["demo", "inspect", "--version"]),
        (["demo", "--help"], ["--out", "--seed", "--quick", "--r ", "--lora-alpha", "lora_ref_demo"]),
        (["inspect", "--help"], ["DIR", "--json", "--figure"]),
        (["--version"], ["lora-ref "]),
    ],
)
def test_help_names_every_option(arguments, words, capsys):
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert [word for word in words if word not in printed] == []


@pytest.mark.parametrize(
    "arguments",
    [[], ["train"], ["inspect"], ["demo", "--seed", "-1"], ["demo", "--r"], ["demo", "--r", "two"], ["--colour"]],
)
def test_wrong_usage_is_2(arguments, capsys):
    assert cli.main(arguments) == 2
    assert "lora-ref" in capsys.readouterr().err.splitlines()[-1]


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from lora_ref.tools.cli import main; main(['--help']);"
        "print([name for name in ('matplotlib', 'sklearn', 'rich') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("error", [ValueError("a\n  b"), OSError("a b"), ImportError("a\x1b b")])
def test_expected_errors_are_one_sentence(error, monkeypatch, capsys):
    def fail(options: object) -> None:
        raise error

    monkeypatch.setattr(cli, "run_inspect", fail)
    assert cli.main(["inspect", "anywhere"]) == 1
    assert capsys.readouterr().err == "lora-ref: error: a b\n"


def test_an_unexpected_error_is_not_hidden(monkeypatch):
    def fail(options: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(cli, "run_inspect", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["inspect", "anywhere"])


def test_interrupt_is_130(monkeypatch, capsys):
    def interrupt(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_demo", interrupt)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "lora-ref: interrupted\n"


def test_a_closed_pipe_is_quiet():
    code = (
        "import sys; from lora_ref.tools import cli\n"
        "cli.run_inspect = lambda options: print('line\\n' * 100_000)\n"
        "sys.exit(cli.main(['inspect', 'anywhere']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == ""
    process.stderr.close()


def test_a_missing_folder_is_named(tmp_path):
    ran = command("inspect", str(tmp_path / "nowhere"))
    assert (ran.returncode, ran.stdout) == (1, "")
    assert one_sentence(ran.stderr) and "nowhere" in ran.stderr


@pytest.mark.parametrize(("module", "arguments"), [("sklearn", ["demo"]), ("matplotlib", ["demo"])])
def test_a_missing_extra_says_how_to_install_it(module, arguments, monkeypatch, capsys, tmp_path):
    if module == "sklearn":
        pytest.importorskip("matplotlib")  # which would be named first
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert one_sentence(error) and "pip install 'lora_ref[demo]'" in error and module in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--lora-alpha", "nan"], ["--lora-alpha", "inf"]])
def test_impossible_numbers_fail_before_training(arguments, capsys, tmp_path):
    assert cli.main(["demo", "--out", str(tmp_path / "out"), *arguments]) == 1
    assert one_sentence(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", ["0", "-2", "257", "100000000000", "two"])
def test_a_rank_that_the_network_has_no_room_for_is_wrong_usage(rank, capsys, tmp_path):
    assert cli.main(["demo", "--out", str(tmp_path / "out"), "--r", rank]) == 2
    assert "--r" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_way_is_an_error(capsys, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 1
    assert one_sentence(capsys.readouterr().err)
    assert (tmp_path / "out").read_text() == "mine"


def test_every_seed_below_two_to_the_32_is_taken() -> None:
    assert cli.seed("4294967295") == 2**32 - 1
    for text in ("4294967296", "-1"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a whole number from 0 to 4294967295"):
            cli.seed(text)


def test_the_demo_has_peft_s_alpha_by_default() -> None:
    assert cli.parser().parse_args(["demo"]).lora_alpha == LoraConfig(target_modules=["a"]).lora_alpha


def test_a_terminal_without_a_character_shows_a_question_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii"))
    net = nn.Sequential(nn.Linear(4, 4))
    get_peft_model(net, LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert b"?" in written.getvalue()
