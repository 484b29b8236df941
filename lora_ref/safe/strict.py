"""Options that refuse a misspelt name, and say which one is meant."""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Collection
from typing import Any, TypeVar

T = TypeVar("T")


def did_you_mean(word: str, known: Collection[str]) -> str:
    """The hint for a misspelt name: '; did you mean ...?', or nothing.

    >>> did_you_mean("lora_alhpa", ["lora_alpha", "r"])
    "; did you mean 'lora_alpha'?"
    """
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def strict(cls: type[T]) -> type[T]:
    """A dataclass that refuses an unknown option, when it is made and when it is set, and names the nearest one."""
    original: Any = cls.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in kwargs:
            if name not in known:
                raise TypeError(f"{cls.__name__} has no option {name!r}{did_you_mean(name, known)}")
        original(self, *args, **kwargs)

    __init__.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]

    def __setattr__(self: Any, name: str, value: object) -> None:
        if name not in self.__dataclass_fields__:
            known = list(self.__dataclass_fields__)
            raise AttributeError(f"{type(self).__name__} has no option {name!r}{did_you_mean(name, known)}")
        object.__setattr__(self, name, value)

    cls.__init__ = __init__  # type: ignore[method-assign]
    cls.__setattr__ = __setattr__  # type: ignore[method-assign]
    return cls
