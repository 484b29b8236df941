"""What a crash, a full disk or another writer does to an adapter folder: the old pair of files is there, or the new."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_ref import LoraConfig, config_file, folder, storage

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
