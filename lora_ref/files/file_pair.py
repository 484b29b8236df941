"""The two files of an adapter folder are replaced together, even if the writer is killed.

A rename replaces one file, not two. So the new configuration is first written under a name with the digest of its
tensors. Then both files are renamed. If a writer is killed in between, the digest shows the next reader the right
configuration, and the next writer does the second rename.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows: there is no lock against simultaneous writers
    fcntl = None  # type: ignore[assignment]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def replace(directory: Path, write_weights: Callable[[Path], None], config: str) -> None:
    """Write a pair of files into the folder, in place of an earlier pair. A missing folder is created.

    `write_weights(path)` writes the tensors to a path. After an error, an interrupt or a kill, `config_path` and the
    tensors' file are the old pair or the new pair. No other file changes.
    Raises: OSError: the disk failed.
    """
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file: an adapter needs a folder")
    directory.mkdir(parents=True, exist_ok=True)
    staging = directory / f"{WEIGHTS}.{uuid.uuid4().hex}.tmp"  # a folder for the temporary files of this writer
    new_weights = staging / WEIGHTS
    with _locked(directory, exclusive=True):
        _finish(directory)
        ready = directory / CONFIG
        try:
            staging.mkdir()
            write_weights(new_weights)
            new_weights.chmod(staging.stat().st_mode & 0o666)  # as for any new file; that of safetensors is private
            _flush(new_weights)
            if not ready.is_file() or ready.read_bytes() != config.encode():
                ready = directory / f"{CONFIG}.{_digest(new_weights)}.tmp"
                ready.write_text(config, encoding="utf-8")
                _flush(ready)
                _flush(directory)  # its name too, before the tensors change
            os.replace(new_weights, directory / WEIGHTS)
            os.replace(ready, directory / CONFIG)
            _flush(directory)
        finally:
            if new_weights.exists() and ready.suffix == ".tmp":  # the old pair stays
                ready.unlink(missing_ok=True)
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def reading(directory: Path) -> Iterator[Path]:
    """A `with` block in which no writer changes the folder. Its value is the path of the configuration."""
    with _locked(directory, exclusive=False):
        yield config_path(directory)


def config_path(directory: Path) -> Path:
    """The configuration of the tensors. After a kill between the two renames: the new file under its first name."""
    waiting = set(directory.glob(f"{CONFIG}.*.tmp"))
    if waiting and (directory / WEIGHTS).is_file():
        ready = directory / f"{CONFIG}.{_digest(directory / WEIGHTS)}.tmp"
        if ready in waiting:
            return ready
    return directory / CONFIG


def _finish(directory: Path) -> None:
    """Do the second rename of a killed writer, and remove its temporary files."""
    if (ready := config_path(directory)).suffix == ".tmp":
        os.replace(ready, directory / CONFIG)
    if fcntl:  # without locks they may be those of another writer
        for path in directory.glob(f"{CONFIG}.*.tmp"):
            path.unlink()
        for path in directory.glob(f"{WEIGHTS}.*.tmp"):
            shutil.rmtree(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def _flush(path: Path) -> None:
    """Wait until the file is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _locked(directory: Path, exclusive: bool) -> Iterator[None]:
    """A `with` block with a lock of the folder against writers (exclusive: readers too)."""
    if fcntl is None:
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # a network file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)  # releases the lock, as the end of a process does
