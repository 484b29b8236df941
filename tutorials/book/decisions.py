"""The tables of the page "From peft to lora_ref": its data is tutorials/from_peft.toml."""

import tomllib
from pathlib import Path

FILE = Path(__file__).parents[1] / "from_peft.toml"
PAGE = tomllib.loads(FILE.read_text(encoding="utf-8"))
DECISIONS = PAGE["decision"]


def table() -> None:
    """Print a row for each decision."""
    print("| what | PEFT 0.21 | lora_ref | why |\n| --- | --- | --- | --- |")
    for decision in DECISIONS:
        cells = (decision[key].replace("|", "\\|") for key in ("title", "peft", "here", "why"))
        print("| " + " | ".join(cells) + " |")


def missing() -> None:
    """Print a line for each reason why names of PEFT are missing."""
    for row in PAGE["missing"]:
        print(f"- {', '.join(f'`{name}`' for name in row['names'])}: {row['reason']}.")
