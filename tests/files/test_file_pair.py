"""What a crash, a full disk or another writer does to an adapter folder: the old pair of files is there, or the new."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_ref import LoraConfig, PeftModel, get_peft_model
from lora_ref.files import adapter_folder as storage
from lora_ref.files import config_file
from lora_ref.files import file_pair as folder
from spec_tests import close
from spec_tests.rounding import unit

KILLS = 200


def pair(value: int) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """A configuration and tensors that tell whether they belong together: lora_alpha is what every tensor holds."""
    tensors = {f"base_model.model.m{i}.lora_A.weight": torch.full((4, 64), float(value)) for i in range(8)}
    return LoraConfig(r=4, lora_alpha=value, target_modules=["m"]), tensors


def belongs_together(place: Path) -> int:
    """Which pair is there; fails for a mixture, and for a file that is not whole."""
    config, tensors = storage.read_adapter(place)
    assert {int(tensor.unique().item()) for tensor in tensors.values()} == {config.lora_alpha}
    return int(config.lora_alpha)


def in_a_fork(work) -> int:
    """Start work() in a process of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    return pid


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_at_any_moment_leaves_the_old_pair_or_the_new_one(tmp_path: Path) -> None:
    def write() -> None:
        for value in range(2, 10**9):
            storage.write_folder(tmp_path, *pair(value))

    storage.write_folder(tmp_path, *pair(1))
    rng, seen, waiting = random.Random(0), set(), 0
    for number in range(10 * KILLS):
        if number >= KILLS and len(seen) > 3:
            break
        child = in_a_fork(write)
        time.sleep(rng.uniform(0.0, 0.02 * (1 + number // KILLS)))  # on a busy machine more writers, and longer ones
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        waiting += folder.config_path(tmp_path).suffix == ".tmp"
        seen.add(belongs_together(tmp_path))
    storage.write_folder(tmp_path, *pair(1))
    assert belongs_together(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.CONFIG, folder.WEIGHTS]
    assert len(seen) > 3, "the writers were killed before they wrote anything"


def stopped_between(place: Path, monkeypatch: pytest.MonkeyPatch, value: int) -> None:
    """A folder as a writer leaves it that is killed after the first of its two renames."""

    def once(source: os.PathLike, target: os.PathLike) -> None:
        monkeypatch.undo()
        os.replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(folder.os, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        storage.write_folder(place, *pair(value))


def test_between_the_two_renames_the_new_pair_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_folder(tmp_path, *pair(1))
    stopped_between(tmp_path, monkeypatch, 2)
    assert (tmp_path / folder.CONFIG).read_text() == config_file.dumps(pair(1)[0])  # the name has the old one still
    assert belongs_together(tmp_path) == 2
    save_file(pair(3)[1], tmp_path / folder.WEIGHTS)  # another program's tensors: what lay ready is not theirs
    assert folder.config_path(tmp_path) == tmp_path / folder.CONFIG


@pytest.mark.parametrize("value", [2, 3])
def test_the_next_writer_finishes_or_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: int) -> None:
    storage.write_folder(tmp_path, *pair(1))
    stopped_between(tmp_path, monkeypatch, 2)
    storage.write_folder(tmp_path, *pair(value))
    assert belongs_together(tmp_path) == value
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.CONFIG, folder.WEIGHTS]


def test_a_next_writer_that_fails_leaves_what_the_first_had_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_folder(tmp_path, *pair(1))
    stopped_between(tmp_path, monkeypatch, 2)
    monkeypatch.setattr("safetensors.torch.save_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        storage.write_folder(tmp_path, *pair(3))
    assert belongs_together(tmp_path) == 2


@pytest.mark.skipif(folder.fcntl is None, reason="this system has no locks for folders")
def test_two_writers_and_a_reader_at_once_see_whole_pairs(tmp_path: Path) -> None:
    def writer(values: range) -> None:
        for value in values:
            storage.write_folder(tmp_path, *pair(value))
        os._exit(0)

    storage.write_folder(tmp_path, *pair(1))
    children = [in_a_fork(lambda first=first: writer(range(first, 200, 2))) for first in (2, 3)]
    running, seen = set(children), set()
    while running:
        seen.add(belongs_together(tmp_path))
        for child in list(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                assert status == 0
                running.remove(child)
    assert belongs_together(tmp_path) in (198, 199)
    assert len(seen) > 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_disk_that_fills_up_is_an_error_and_the_old_pair_stays(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the disk: no file of this process may grow beyond some bytes."""
    storage.write_folder(tmp_path, *pair(1))
    size = (tmp_path / folder.WEIGHTS).stat().st_size
    for limit in (0, 100, size // 2, size - 1):

        def fails(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails with EFBIG
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                storage.write_folder(tmp_path, *pair(2))
            except OSError:
                os._exit(7)

        _, status = os.waitpid(in_a_fork(fails), 0)
        assert os.waitstatus_to_exitcode(status) == 7
        assert belongs_together(tmp_path) == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == [folder.CONFIG, folder.WEIGHTS]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_read_only_folder_is_read_and_is_an_error_to_write_to() -> None:
    """By a user who may not write there; root may everywhere, so root becomes another one in the fork."""
    with tempfile.TemporaryDirectory() as name:  # tmp_path is root's alone
        place = Path(name, "adapter")
        storage.write_folder(place, *pair(1))
        kept = Path(name, "kept")
        storage.write_folder(kept, *pair(1))
        (kept / folder.WEIGHTS).chmod(0)
        os.chmod(name, 0o755)
        os.chmod(place, 0o555)

        def tries() -> None:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            assert belongs_together(place) == 1
            for where in (place, place / "new"):
                with pytest.raises(PermissionError, match=name):
                    storage.write_folder(where, *pair(2))
            with pytest.raises(PermissionError, match=name):
                storage.read_adapter(kept)
            os._exit(7)

        _, status = os.waitpid(in_a_fork(tries), 0)
        assert os.waitstatus_to_exitcode(status) == 7
        assert belongs_together(place) == 1 and len(list(place.iterdir())) == 2
        os.chmod(place, 0o755)


def test_a_file_system_without_locks_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder.fcntl, "flock", refuse)
    storage.write_folder(tmp_path, *pair(1))
    monkeypatch.setattr(folder, "fcntl", None)
    storage.write_folder(tmp_path, *pair(2))
    assert belongs_together(tmp_path) == 2


def test_a_folder_that_lost_its_tensors_is_said_so_whatever_else_lies_there(tmp_path: Path) -> None:
    storage.write_folder(tmp_path, *pair(1))
    (tmp_path / folder.WEIGHTS).unlink()
    (tmp_path / f"{folder.CONFIG}.0123.tmp").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"there is no adapter_model\.safetensors in"):
        storage.read_adapter(tmp_path)


def test_readers_share_the_lock_and_a_writer_has_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(folder.fcntl, "flock", lambda handle, kind: asked.append(kind))
    storage.write_folder(tmp_path, *pair(1))
    storage.read_adapter(tmp_path)
    assert asked == [folder.fcntl.LOCK_EX, folder.fcntl.LOCK_SH]


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_both_files_have_the_mode_of_new_files(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        storage.write_folder(tmp_path, *pair(1))
        storage.write_folder(tmp_path, *pair(2))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~mask}


# -- memory ----------------------------------------------------------------------------------------


class Scarce(TorchDispatchMode):
    """There is no memory for the n-th operation of torch."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("injected")
        return function(*args, **(kwargs or {}))


def whole_numbers(dtype: torch.dtype, init: bool | str) -> PeftModel:
    """Three layers in which sums are exact, so that what is subtracted again leaves no trace."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(4, 4, dtype=dtype) for _ in range(3)))
    model = get_peft_model(net, LoraConfig(r=2, lora_alpha=2, target_modules=["0", "1", "2"], init_lora_weights=init))
    if init is True:
        for parameter in model.parameters():
            parameter.data = torch.randint(-3, 4, parameter.shape).to(parameter.dtype)
    return model


def assert_same_to_rounding(now: dict[str, Tensor], before: dict[str, Tensor], model: PeftModel) -> None:
    """Weights were rounded twice: W + s B A, and that minus s B A, each a sum of r products in at least float32."""
    for name, layer in model.lora_layers().items():
        weight = f"base_model.model.{name}.base_layer.weight"
        W, s, r = before.pop(weight), layer.scaling["default"], layer.r["default"]
        A, B = (factor.detach().double().abs() for factor in layer.factors("default"))
        sums = 2 * (r + 2) * unit(torch.promote_types(W.dtype, torch.float32)) / unit(W)
        close(now[weight], W, terms=2 + sums, size=W.double().abs() + abs(s) * B @ A)
    assert all(torch.equal(now[name], before[name]) for name in before)


MERGES: dict[str, Callable[[PeftModel], Any]] = {
    "merge_adapter": lambda model: model.merge_adapter(),
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "unload": lambda model: model.unload(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", [True, "pissa"])
@pytest.mark.parametrize("merging", MERGES)
def test_a_merge_without_memory_leaves_the_model_as_it_was(merging: str, init: bool | str, dtype: torch.dtype) -> None:
    """Whichever operation it is that there is no memory for."""
    x = torch.ones(2, 4, dtype=dtype)
    for n in range(1, 1000):
        model = whole_numbers(dtype, init)
        modules, want = list(model.modules()), model(x)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        try:
            with Scarce(n):
                MERGES[merging](model)
        except torch.OutOfMemoryError:
            now = model.state_dict()
            assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
            assert now.keys() == before.keys()
            if init is True or merging != "merge_and_unload":
                assert all(torch.equal(now[name], before[name]) for name in before)
                assert torch.equal(model(x), want)
            else:  # what is subtracted again is so to rounding
                assert_same_to_rounding(now, before, model)
                twin = whole_numbers(dtype, init)
                twin.load_state_dict(now)
                assert torch.equal(model(x), twin(x))
        else:
            assert n > 10 or merging == "unload"
            return
    raise AssertionError("it never ends")
