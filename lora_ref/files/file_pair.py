"""An adapter folder's two files belong together: they are replaced as one, whatever happens in between.

One file is replaced in a single step, by a rename; two are not. So the new configuration lies ready first, under a
name that says which tensors it belongs to, and then both are renamed. Where a writer was killed between the two
renames, that name tells the next reader which configuration is right, and the next writer finishes the work.
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
except ModuleNotFoundError:  # Windows: writers that work at the same time are not kept apart there
    fcntl = None  # type: ignore[assignment]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def replace(directory: Path, write_weights: Callable[[Path], None], config: str) -> None:
    """Put a pair of files into the folder, which is made if it is not there, in place of an earlier pair.

    `write_weights(path)` writes the tensors to a path. However this ends, by an error, an interrupt or a kill, what
    `config_path` and the tensors' file give is the old pair or the new one, and no other file is touched.

    Raises:
        OSError: the disk.
    """
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file: an adapter needs a folder")
    directory.mkdir(parents=True, exist_ok=True)
    staging = directory / f"{WEIGHTS}.{uuid.uuid4().hex}.tmp"  # a folder: writers have temporary files of their own
    new_weights = staging / WEIGHTS
    with _locked(directory, exclusive=True):
        _finish(directory)
        ready = directory / CONFIG
        try:
            staging.mkdir()
            write_weights(new_weights)
            new_weights.chmod(staging.stat().st_mode & 0o666)  # as for any new file; safetensors keeps it to its owner
            _flush(new_weights)
            if not ready.is_file() or ready.read_bytes() != config.encode():
                ready = directory / f"{CONFIG}.{_digest(new_weights)}.tmp"
                ready.write_text(config, encoding="utf-8")
                _flush(ready)
                _flush(directory)  # its name, too, before the tensors change
            os.replace(new_weights, directory / WEIGHTS)
            os.replace(ready, directory / CONFIG)
            _flush(directory)
        finally:
            if new_weights.exists() and ready.suffix == ".tmp":  # the old pair is there, and stays
                ready.unlink(missing_ok=True)
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def reading(directory: Path) -> Iterator[Path]:
    """A `with` block in which no writer changes the folder; gives the path of the configuration."""
    with _locked(directory, exclusive=False):
        yield config_path(directory)


def config_path(directory: Path) -> Path:
    """The configuration that belongs to the tensors: where a writer was stopped between two renames, the new one."""
    waiting = set(directory.glob(f"{CONFIG}.*.tmp"))
    if waiting and (directory / WEIGHTS).is_file():
        ready = directory / f"{CONFIG}.{_digest(directory / WEIGHTS)}.tmp"
        if ready in waiting:
            return ready
    return directory / CONFIG


def _finish(directory: Path) -> None:
    """Do what a writer that was killed has left undone, and clear away what it left."""
    if (ready := config_path(directory)).suffix == ".tmp":
        os.replace(ready, directory / CONFIG)
    if fcntl:  # else they may be another writer's
        for path in directory.glob(f"{CONFIG}.*.tmp"):
            path.unlink()
        for path in directory.glob(f"{WEIGHTS}.*.tmp"):
            shutil.rmtree(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def _flush(path: Path) -> None:
    """Wait until the disk has it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _locked(directory: Path, exclusive: bool) -> Iterator[None]:
    """A `with` block that waits for writers (exclusive: and readers) of the folder, and makes them wait."""
    if fcntl is None:
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # a network file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)  # gives the lock back, as the end of a process does
