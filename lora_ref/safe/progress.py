"""A progress bar on stderr, if that is a terminal or a notebook. It disappears at the end."""

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


def progress_bar(show: bool = True) -> Any:
    """A `rich` progress bar for a `with` statement. It disappears after an exception too."""
    from rich.console import Console  # its import is as slow as that of lora_ref
    from rich.progress import Progress

    console = Console(stderr=True)
    in_notebook = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None  # rich warns without it
    return Progress(console=console, transient=True, disable=not (show and (console.is_terminal or in_notebook)))


@contextmanager
def steps(items: Sequence[T], what: str, show: bool = True) -> Iterator[Iterable[T]]:
    """The items, with a progress bar for the iteration.

    >>> with steps([1, 2, 3], "adding") as numbers:
    ...     sum(numbers)
    6
    """
    if not show:
        yield items
        return
    with progress_bar() as bar:
        yield bar.track(items, description=what)
