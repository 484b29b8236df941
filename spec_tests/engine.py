"""Runs requirements on an implementation: one of five outcomes for each, with an example and a script where it fails.

PASS, FAIL, UNSUPPORTED (not claimed), KNOWN (fails, and is listed with a reason), ERROR (the implementation or its
adapter class crashed, or the list of known deviations is wrong).
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import tomllib
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings

from . import repros, smoke
from .check import Broken, Check
from .contract import DECISIONS, Implementation, Layer, LayerSpec, check_claims, has_layers
from .registry import Requirement, Unsupported, load

NO_LAYER = "it has no layer of its own: it adapts whole models alone"
OUTCOMES = ("PASS", "FAIL", "UNSUPPORTED", "KNOWN", "ERROR")
PROFILES = {"quick": 10, "default": 40, "deep": 400}  # examples of each requirement
HERE = Path(__file__).parent
BUNDLED = {
    "lora_ref": "spec_tests.adapters.lora_ref_torch:LoraRefTorch",
    "lora_ref_core": "spec_tests.adapters.lora_ref_core:LoraRefCore",
    "lora_ref_numpy": "spec_tests.adapters.lora_ref_numpy:LoraRefNumpy",
    "plain": "spec_tests.reference.plain:Plain",
    "peft": "spec_tests.adapters.peft_:Peft",
    "loralib": "spec_tests.adapters.loralib_:Loralib",
    "parametrized": "spec_tests.adapters.parametrized:Parametrized",
    "litgpt": "spec_tests.adapters.litgpt_:Litgpt",
    "torchtune": "spec_tests.adapters.torchtune_:Torchtune",
    "lycoris": "spec_tests.adapters.lycoris_:Lycoris",
    "mlx": "spec_tests.adapters.mlx_:Mlx",
    "keras": "spec_tests.adapters.keras_:Keras",
    "keras_torch": "spec_tests.adapters.keras_torch_:KerasTorch",
    "transformers": "spec_tests.adapters.transformers_:Transformers",
    "lora_pytorch": "spec_tests.adapters.lora_pytorch_:LoraPytorch",
    "adapters": "spec_tests.adapters.adapters_:Adapters",
    "diffusers": "spec_tests.adapters.diffusers_:Diffusers",
    "javascript": "spec_tests.adapters.javascript_:Javascript",
}


Known = dict[str, list[dict[str, Any]]]  # {id of a requirement: the causes for which it is known to fail}


@dataclasses.dataclass
class Result:
    """What became of one requirement."""

    id: str
    outcome: str
    sentence: str
    source: str
    examples: int = 0
    max_error_u: float = 0.0
    message: str = ""
    repro: str = ""
    reason: str = ""  # of a known deviation
    link: str = ""


class ModelsAlone(Implementation):
    """An implementation without a method `layer`, that notes whether a layer was asked for."""

    def __init__(self, implementation: Implementation) -> None:
        self.implementation, self.asked = implementation, False

    def __getattribute__(self, name: str) -> Any:
        if name in ("implementation", "asked", "layer", "__class__"):
            return super().__getattribute__(name)
        return getattr(self.implementation, name)

    def layer(self, spec: LayerSpec) -> Layer:
        self.asked = True
        raise NotImplementedError(NO_LAYER)


def find(name: str) -> tuple[str, Implementation]:
    """The implementation of a short name of `BUNDLED`, or of "package.module:Class", with that name.

    Raises:
        ValueError: neither of the two, or there is no such class.
    """
    path = BUNDLED.get(name, name)
    module, colon, attribute = path.partition(":")
    if not colon:
        raise ValueError(f"{name!r}: give package.module:Class, or one of {', '.join(BUNDLED)}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    made = getattr(importlib.import_module(module), attribute, None)
    if made is None:
        raise ValueError(f"{module} has no class {attribute}")
    return name, made()


def known_deviations(name: str, requirements: Iterable[str], version: str = "") -> Known:
    """{id: its causes} of `known/<name>.toml`, or of the TOML file of that path; {} if there is none, or if it is about
    another `version` of the implementation.

    A `[[cause]]` has a reason, the `ids` of the requirements that fail by it, and `says`: how the messages of these
    failures begin. Without `says` it is the cause of every failure. A `[[deviation]]` has one `id` in place of `ids`.

    Raises:
        ValueError: an id that does not exist, or an entry without a reason.
    """
    path = HERE / "known" / f"{name}.toml"
    if not path.exists():
        return {}
    listed = tomllib.loads(path.read_text(encoding="utf-8"))
    about = listed.get("version", "")
    if version and about and about not in version.split(", "):
        return {}
    ids, found = set(requirements), Known()
    for entry in [*listed.get("cause", []), *listed.get("deviation", [])]:
        for id in entry.get("ids", [entry.get("id")]):
            if id not in ids:
                raise ValueError(f"{path.name}: there is no requirement {id!r}")
            if not entry.get("reason"):
                raise ValueError(f"{path.name}: {id} has no reason")
            found.setdefault(id, []).append(entry)
    return found


def run(
    name: str,
    implementation: Implementation | None = None,
    only: Callable[[Requirement], bool] = lambda requirement: True,
    profile: str = "default",
    seed: int | None = None,
) -> Iterator[Result]:
    """The result of every requirement, as they come. `name`: see `find`.

    Raises:
        ValueError, TypeError: the implementation cannot be found, claims what does not exist, or its adapter class
            does not keep the contract (see `smoke`).
    """
    if implementation is None:
        name, implementation = find(name)
    check_claims(implementation)
    requirements = load()
    known = known_deviations(name, requirements, implementation.version())
    smoke.check(implementation)
    for requirement in requirements.values():
        if only(requirement):
            result = examine(name, implementation, requirement, profile, seed)
            yield with_known(result, known.get(requirement.id), profile)


def with_known(result: Result, causes: Sequence[Mapping[str, Any]] | None, profile: str = "default") -> Result:
    """A failure with a listed cause is KNOWN, one with another cause stays what it is; a listed requirement that passes
    is an error of the list, unless the profile is "quick", whose few examples may miss the failure."""
    if not causes or result.outcome == "UNSUPPORTED" or (result.outcome == "PASS" and profile == "quick"):
        return result
    if result.outcome == "PASS":
        message = f"it passes, but is listed as a known deviation ({causes[0]['reason']}): take it off the list"
        return dataclasses.replace(result, outcome="ERROR", message=message)
    for cause in causes:
        if any(result.message.startswith(beginning) for beginning in cause.get("says", [""])):
            return dataclasses.replace(result, outcome="KNOWN", reason=cause["reason"], link=cause.get("link", ""))
    listed = "; ".join(cause["reason"] for cause in causes)
    return dataclasses.replace(result, message=f"{result.message} (another failure than what is listed: {listed})")


def examine(
    name: str,
    implementation: Implementation,
    requirement: Requirement,
    profile: str = "default",
    seed: int | None = None,
    shrink: bool = True,
) -> Result:
    """Try a requirement on generated cases, and shrink the first that breaks it."""
    result = Result(requirement.id, "PASS", requirement.sentence, requirement.source)
    if not requirement.needs <= implementation.claims:
        missing = requirement.needs - implementation.claims
        message = f"does not claim {', '.join(sorted(missing))}"
        if missing <= DECISIONS:
            message += " (lora_ref's decision: its documentation does not promise it)"
        return dataclasses.replace(result, outcome="UNSUPPORTED", message=message)
    check, latest = Check(), list[Any]()
    tried = implementation if has_layers(implementation) else ModelsAlone(implementation)

    def body(case: Any) -> None:
        check.examples += 1
        latest[:] = [case]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            requirement.body(tried, case, check)

    try:
        test = hypothesis.given(requirement.given(implementation))(body)
        test = settings(
            max_examples=max(PROFILES[profile] // requirement.slow, 5),
            derandomize=seed is None,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if shrink else [])],
            print_blob=False,
        )(test)
        (test if seed is None else hypothesis.seed(seed)(test))()
    except Unsupported as why:
        return dataclasses.replace(result, outcome="UNSUPPORTED", message=str(why))
    except Broken as error:
        result.outcome, result.message = "FAIL", str(error)
    except NotImplementedError as error:
        result.outcome = "FAIL"
        claimed = ", ".join(sorted(requirement.needs))
        result.message = f"claimed ({claimed}), but it raises NotImplementedError: {error}".removesuffix(": ")
    except hypothesis.errors.Flaky as error:
        result.outcome, result.message = "FAIL", f"the same case gives different results: {error}"
    except Exception as error:
        result.outcome = "ERROR"
        where = traceback.extract_tb(error.__traceback__)[-1]
        result.message = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    if isinstance(tried, ModelsAlone) and tried.asked:
        return dataclasses.replace(result, outcome="UNSUPPORTED", message=NO_LAYER)
    result.examples, result.max_error_u = check.examples, check.max_error_u
    if result.outcome != "PASS":
        result.repro = repros.script(name, requirement.id, requirement.sentence, latest[0] if latest else None)
    return result


def reproduce(name: str, id: str, case: Any) -> None:
    """Try one requirement on one case, without catching anything."""
    _, implementation = find(name)
    load()[id].body(implementation, case, Check())
    print(f"{id} holds here")
