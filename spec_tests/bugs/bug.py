"""What a seeded fault is: a replacement in the source of `plain`."""

from __future__ import annotations

from typing import NamedTuple

GITHUB = "https://github.com/"
PEFT = "huggingface/peft/"


class Bug(NamedTuple):
    """`old`, which stands in plain.py exactly once, becomes `new`."""

    name: str
    old: str
    new: str
    link: str = ""
    profile: str = "quick"  # of the matrix: "default" where few examples do not find it

    @property
    def url(self) -> str:
        return GITHUB + self.link if self.link else ""
