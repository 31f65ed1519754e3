"""Option types with their ranges, and readable errors for values out of range."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError

from mnist_diffusion.errors import ConfigError, UserError
from mnist_diffusion.files import read_yaml

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
FLOW = "flow_prediction"
"""diffusers' name for the prediction target of flow matching."""
SAMPLER_NAMES = ("ddpm", "ddim", "dpmpp", "dpmpp-sde", "unipc", "euler", "heun", "lcm")
GUIDERS = (
    *("AdaptiveProjectedGuidance", "AdaptiveProjectedMixGuidance"),
    *("ClassifierFreeZeroStarGuidance", "TangentialClassifierFreeGuidance"),
)
"""The guiders of diffusers that work on images and have a single scale."""
CFG, AUTOGUIDANCE = "cfg", "autoguidance:"
expanduser: Callable[[str], str] = os.path.expanduser  # that of Path raises for users that are unknown


def _sampler(name: str) -> str:
    if name not in SAMPLER_NAMES and not re.fullmatch(r"[A-Z]\w*Scheduler", name):
        raise ValueError(f"must be one of {', '.join(SAMPLER_NAMES)}, or a diffusers scheduler class")
    return name


def _rule(name: str) -> str:
    if name not in (CFG, *GUIDERS) and not (name.startswith(AUTOGUIDANCE) and name != AUTOGUIDANCE):
        raise ValueError(f"must be {CFG}, {AUTOGUIDANCE}PIPELINE or one of {', '.join(GUIDERS)}")
    kind, colon, pipeline = name.partition(":")
    return f"{kind}{colon}{expanduser(pipeline)}"


Pair = TypeVar("Pair", tuple[float, float], list[float])


def rising_pair(pair: Pair) -> Pair:
    """Check that the second number is not below the first; ValueError if it is."""
    if pair[0] > pair[1]:
        raise ValueError("must not be reversed")
    return pair


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Check that no value is repeated; ValueError if one is."""
    if len(set(values)) < len(values):
        raise ValueError("must not repeat a value")
    return values


def parse_interval(text: str) -> tuple[float, str]:
    """Split an interval such as `500 steps` or `0.5 epochs` into its count and its unit, `steps` or `epochs`.

    Raises:
        ValueError: it is not an interval.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?) *(step|epoch)s?", text)
    count = float(match[1]) if match else 0.0
    if match is None or count == 0 or (match[2] == "step" and not count.is_integer()):
        raise ValueError("must be a number of steps or epochs, such as '500 steps' or '0.5 epochs'")
    return count, f"{match[2]}s"


def _interval(text: Any) -> Any:
    parse_interval(str(text))
    return text


Positive = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
Place = Annotated[Text, AfterValidator(expanduser)]
"""A folder or file, or an id of the Hub."""
FilePath = Annotated[Path, AfterValidator(lambda path: Path(expanduser(str(path))))]
Interval = Annotated[str, BeforeValidator(_interval)]
Sampler = Annotated[str, AfterValidator(_sampler)]
GuidanceRule = Annotated[str, AfterValidator(_rule)]
GuidanceScale = Annotated[float, Field(ge=0)]
NoiseLevels = Annotated[tuple[Probability, Probability], AfterValidator(rising_pair)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Ground = Literal["black", "white"]
Background = Literal["auto", "black", "white"]
Fit = Literal["contain", "pad", "resize"]
MixedPrecision = Literal["no", "fp16", "bf16"]


def checked(schema: type[Any], values: dict[str, Any]) -> Any:
    """Build a dataclass of options from plain values.

    Raises:
        ConfigError: a value is out of range or unknown; the message names it.
    """
    try:
        return schema(**values)
    except ValidationError as error:
        raise ConfigError(explain(error)) from error
    except TypeError as error:  # a key that is no name
        raise ConfigError(str(error)) from error


def explain(error: ValidationError) -> str:
    """The first problem of a failed validation in one line, with the dotted name of the option and its value."""
    problem = error.errors(include_url=False)[0]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, UserError):  # of several options together, which it names
        return str(cause)
    if problem["type"] == "missing":
        return f"{'.'.join(map(str, problem['loc']))} is missing"
    rule = str(cause or problem["msg"]).replace("Input should be", "must be")
    if problem["type"] == "string_type" and isinstance(problem["input"], int | float):
        rule = "must be a word, in quotes if it looks like a number"
    rule = rule.replace("Unexpected keyword argument", "is not a known name")
    rule = rule.partition(", unable to parse")[0]
    name = ".".join(str(part) for part in problem["loc"] if part not in ("[key]", "bool"))
    return f"{name} {rule[0].lower()}{rule[1:]}, got {problem['input']!r:.200}"


def read_mapping(path: Path) -> dict[str, Any]:
    """The content of a configuration file, a mapping of sections.

    Raises:
        ConfigError: it is not one.
    """
    values = read_yaml(path)
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path} must be a mapping of sections, got a {type(values).__name__}")
    if not values:
        raise ConfigError(f"{path} has no options")
    for name, section in values.items():
        if section is None and name != "output_dir":
            raise ConfigError(f"{path}: the section {name} is empty; remove it, or indent its options below it")
    return values


def find_recipe(name_or_path: str, recipes: Path) -> Path:
    """The YAML file of a recipe, given by its name or as a path.

    Raises:
        ConfigError: there is no such file or recipe; the message lists the recipes.
    """
    path = Path(expanduser(name_or_path))
    if path.is_file():
        return path
    shipped = recipes / f"{name_or_path}.yaml"
    if shipped.is_file() and shipped.parent == recipes:
        return shipped
    known = ", ".join(sorted(recipe.stem for recipe in recipes.glob("*.yaml")))
    raise ConfigError(f"config must be a YAML file or one of the recipes {known}, got {name_or_path!r}")
