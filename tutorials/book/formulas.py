"""LaTeX to MathML, which browsers draw by themselves: no script, no fonts, no network."""

import re
from xml.etree import ElementTree

from latex2mathml.converter import convert

CHILDREN = {"mfrac": 2, "mroot": 2, "msub": 2, "msup": 2, "munder": 2, "mover": 2, "msubsup": 3, "munderover": 3}
# latex2mathml knows them as plain signs: no space of a bracket, no size, and nothing after \Bigl
FENCES = {r"\\lVert": r"\\left\\Vert", r"\\rVert": r"\\right\\Vert", r"\\lvert": r"\\left|", r"\\rvert": r"\\right|"}


def mathml(latex: str, display: bool) -> str:
    r"""One formula.

    A command that is not known raises a ValueError, and so does one that lacks an argument: the converter itself would
    print `\foo` as it stands, or a fraction without a denominator.

    >>> mathml(r"x^\top", display=False).partition("<mrow>")[2]
    '<msup><mi>x</mi><mo>&#x022A4;</mo></msup></mrow></math>'
    """
    plain = latex
    for command, fence in FENCES.items():
        plain = re.sub(rf"(?:\\[Bb]igg?[lr]\s*)?{command}(?![A-Za-z])", fence, plain)
    try:
        made = convert(plain, display="block" if display else "inline")
        root = ElementTree.fromstring(made)
    except Exception as error:  # the converter's errors have no common class; some are IndexError
        raise ValueError(f"no formula: ${latex}$: {type(error).__name__} {error}".rstrip()) from error
    for element in root.iter():
        name = element.tag.rpartition("}")[2]
        if "\\" in (element.text or ""):
            raise ValueError(f"latex2mathml does not know {element.text}, in ${latex}$")
        if name in CHILDREN and len(element) != CHILDREN[name]:
            raise ValueError(f"a {name} has {len(element)} parts and needs {CHILDREN[name]}, in ${latex}$")
    return made
