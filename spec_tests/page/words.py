"""Text that comes from reports, as text of HTML."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from ..report import printable


def text(value: Any) -> str:
    """Anything as text of HTML, in an attribute too."""
    return escape(printable(str(value)), quote=True)


def link(address: str) -> str:
    """A link, or "" for what is no address of the web: no javascript: from a foreign report."""
    if not re.fullmatch(r"https?://[^\s]+", address):
        return ""
    return f'<a href="{text(address)}" rel="noopener noreferrer">{text(address)}</a>'
