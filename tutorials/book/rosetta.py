"""The tables of the Rosetta page: `python tutorials/book/rosetta.py` asks each library again, in its own environment.

What the libraries say is kept in tutorials/rosetta.json, and cog puts the tables on the page from there. Libraries that
cannot share an environment have one in .peers/, made where it is missing (gigabytes; `make peers` uses the same).
"""

import json
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
FILE = HERE.parent / "rosetta.json"
NAMES = {  # probe: (title, environment)
    "lora_ref": ("lora_ref", None),
    "peft": ("PEFT", None),
    "loralib": ("loralib", None),
    "torchtune": ("torchtune", "torchtune"),
    "litgpt": ("litgpt", "litgpt"),
    "mlx": ("mlx-lm", "mlx"),
    "keras": ("Keras", "keras"),
}


def ask(name: str, python: str = sys.executable) -> dict:
    """What one library says of itself."""
    line = [python, "-W", "ignore", str(HERE / "rosetta_probe.py"), name]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    sys.path.insert(0, str(HERE.parents[1]))
    from spec_tests import peers

    found = {}
    for name, (title, environment) in NAMES.items():
        found[name] = ask(name, str(peers.python_of(environment)) if environment else sys.executable)
        print(f"{title:10} {found[name]['version']}", flush=True)
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(said)}" for name, said in found.items())
    FILE.write_text("{\n" + text + "\n}\n", encoding="utf-8")


# -- tables ------------------------------------------------------------------------------------


def table(*columns: str) -> None:
    """Print a table with a row for each library; a column is one of COLUMNS."""
    said = json.loads(FILE.read_text(encoding="utf-8"))
    print(f"| library | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
    for name, (title, _) in NAMES.items():
        print(f"| {title} | {' | '.join(COLUMNS[column](said[name]) for column in columns)} |")


def factor(which: str):
    def cell(said: dict) -> str:
        name, shape = said[which]
        return f"`{name}` ({', '.join(map(str, shape))})"

    return cell


def orientation(which: str, logical: tuple[int, int], words: tuple[str, str]):
    """Which way round: (out, in), say, or (in, out)."""

    def cell(said: dict) -> str:
        shape = tuple(said[which][1])
        assert shape in (logical, logical[::-1]), (which, shape)
        return f"({', '.join(words if shape == logical else words[::-1])})"

    return cell


def code(*values: str) -> str:
    return ", ".join(f"`{value}`" for value in values)


def defaults(said: dict) -> str:
    return ", ".join(f"`{name}` {'none' if value is None else value}" for name, value in said["defaults"].items())


COLUMNS = {
    "version": lambda said: said["version"],
    "layer": lambda said: code(said["layer"]),
    "A, of 5 inputs at r = 2": factor("A"),
    "B, of 3 outputs at r = 2": factor("B"),
    "W, of 5 inputs and 3 outputs": factor("W"),
    "A is": orientation("A", (2, 5), ("r", "in")),
    "B is": orientation("B", (3, 2), ("out", "r")),
    "W is": orientation("W", (3, 5), ("out", "in")),
    "s": lambda said: code(said["scale"][0]),
    "defaults": defaults,
    "starts at zero": lambda said: said["zero"],
    "std of A times √in": lambda said: f"{said['spread']}",
    "merges on `eval()`": lambda said: "**yes**" if said["eval merges"] else "no",
    "how to merge": lambda said: code(*said["merge"]),
    "keys of a layer called proj": lambda said: "<br>".join(f"`{key}`" for key in said["keys"]),
}


if __name__ == "__main__":
    main()
