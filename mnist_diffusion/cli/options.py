"""Options that several commands share, and how a run's configuration is parsed."""

from __future__ import annotations

import argparse
import difflib
import errno
import itertools
import json
import os
import re
import select
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from mnist_diffusion.config import Config, DistillConfig, ImagesConfig, RunConfig
from mnist_diffusion.errors import ConfigError, UserError
from mnist_diffusion.files import read_text, read_yaml

set_parsing_settings(docstring_parse_attribute_docstrings=True)

RECIPES = Path(__file__).parents[1] / "configs"

AnyConfig = TypeVar("AnyConfig", bound=RunConfig)
Schema = TypeVar("Schema")


TYPE_ERROR = re.compile(
    r'Parser key "(?P<name>.+?)"(?: element \d+)?:? (?P<why>.*Expected.*?)(?:Got|Given) value: (?P<value>.*)'
)
"""How the parser says that a value is of another type."""


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of an epilog as they are."""


class Parser(ArgumentParser):
    """Takes options by their whole names, and says what is wrong in two lines, with the nearest option."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with status 2."""
        text = " ".join(str(message).split())
        if wrong := TYPE_ERROR.fullmatch(text):
            kinds = dict.fromkeys(re.findall(r"Expected an? (.+?)(?:\. |\.?$| - | Given)", wrong["why"]))
            names = [re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"of type \1", kind) for kind in kinds]
            wanted = " or ".join(names).replace("of type NoneType", "null").replace("typing.Literal", "one of ")
            text = f"--{wrong['name']} must be {wanted}, got {wrong['value']}"
        if unknown := re.search(r"unrecognized arguments: (--[\w.]+)", text):
            near = difflib.get_close_matches(unknown[1], list(self._option_string_actions), 1)
            text += "".join(f"; did you mean {name}?" for name in near)
        print(f"usage: {self.prog} [options]; --help lists them\nerror: {text}", file=sys.stderr)
        raise SystemExit(2)


@dataclass(frozen=True)
class RunArguments(Generic[AnyConfig]):
    """A run that was asked for on the command line: its configuration, and the name of its recipe."""

    config: AnyConfig
    recipe: str
    dry_run: bool


def parse_train_arguments(argv: Sequence[str] | None = None, *, prog: str = "train_cfg.py") -> RunArguments[Config]:
    """Read a training run's configuration from the command line.

    Exits with status 2 and a message that names option and value if something is wrong.
    """
    parser = Parser(
        prog=prog,
        usage=f"{prog} [--config FILE_OR_RECIPE] [--section.field VALUE ...] [--dry_run]",
        description="Train a class-conditional diffusion model and leave a pipeline folder that diffusers loads.",
        epilog=f"recipes for --config, and what they cost:\n{_costs(RECIPES)}\n\n"
        "example: %(prog)s --config tiny --data.source digits --train.max_steps 100",
        formatter_class=HelpFormatter,
    )
    return _parse_run(parser, Config, list(sys.argv[1:] if argv is None else argv), recipes=RECIPES)


def parse_distill_arguments(argv: Sequence[str], *, prog: str) -> RunArguments[DistillConfig]:
    """Read a distillation's configuration from the command line.

    Exits with status 2 and a message that names option and value if something is wrong.
    """
    parser = Parser(
        prog=prog,
        usage=f"{prog} PIPELINE [--out FOLDER] [--config FILE_OR_RECIPE] [--section.field VALUE ...] [--dry_run]",
        description="Distil a trained pipeline (a folder, or a Hub id) into a student that draws in one pass or a few.",
        epilog="PIPELINE, which comes first, is short for --distillation.teacher, and --out for --output_dir.\n\n"
        f"recipes for --config, and what they cost:\n{_costs(RECIPES / 'distillation')}",
        formatter_class=HelpFormatter,
    )
    short = argparse.ArgumentParser(prog=prog, usage=parser.usage, add_help=False, allow_abbrev=False)
    short.add_argument("--out")
    found, flags = short.parse_known_args(list(argv))
    if flags and not flags[0].startswith("-"):
        flags = ["--distillation.teacher", *flags]
    if found.out is not None:
        flags += ["--output_dir", found.out]
    return _parse_run(parser, DistillConfig, flags, recipes=RECIPES / "distillation")


def _parse_run(
    parser: ArgumentParser, schema: type[AnyConfig], argv: list[str], *, recipes: Path
) -> RunArguments[AnyConfig]:
    """Read a configuration of `schema`: defaults, then recipes, then flags, which win wherever `--config` stands."""
    refuse_tokens(parser, argv)
    parser.add_argument("--config", action="config", help="a YAML file, or the name of a recipe such as 'tiny'")
    add_switch(parser, "--dry_run", "show what would be done, and stop")
    parser.add_class_arguments(schema, as_group=False)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append", default=[])
    found, flags = first.parse_known_args(argv)
    flags = spelled_out(flags, _hints(schema))
    try:
        files = [find_recipe(name, recipes) for name in found.config]
        for file in files:
            read_yaml(file)  # so that no parser is given what is not plain
        values = parser.parse_args([*(item for file in files for item in ("--config", str(file))), *flags])
        _require_no_nulls(schema, values)
        built = parser.instantiate(values)
        config = schema(**{field.name: built[field.name] for field in fields(schema)})
    except UserError as error:
        parser.error(str(error))
    # A run's own `config.yaml` is named by its folder.
    recipe = "default" if not files else files[-1].stem
    return RunArguments(config, files[-1].resolve().parent.name if recipe == "config" else recipe, values.dry_run)


def _hints(schema: Any, prefix: str = "") -> dict[str, Any]:
    """The types of all fields of a dataclass, by their dotted names."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(schema).items():
        found |= _hints(hint, f"{prefix}{name}.") if is_dataclass(hint) else {f"{prefix}{name}": hint}
    return found


def spelled_out(flags: Sequence[str], hints: Mapping[str, Any]) -> list[str]:
    """Flags as the parser takes them: a switch alone is true, and several values become a list."""
    found: list[str] = []
    for index, flag in enumerate(flags):
        hint = hints.get(flag.removeprefix("--"))
        rest = list(itertools.takewhile(lambda value: not value.startswith("--"), flags[index + 1 :]))
        found.append(flag)
        if hint is bool and flag.startswith("--") and not rest:
            found.append("true")
    place = 0
    while place < len(found):
        items = _items(hints.get(found[place].removeprefix("--")))
        values = list(itertools.takewhile(lambda value: not value.startswith("--"), found[place + 1 :]))
        place += 1
        if items is not None and values and not values[0].startswith("[") and values != ["null"]:
            written = json.dumps(values, ensure_ascii=False) if items is str else f"[{', '.join(values)}]"
            found[place : place + len(values)] = [written]
    return found


OF_IMAGES = _hints(ImagesConfig, "data.")
"""The types of the options that say what images there are."""


def _items(hint: Any) -> Any:
    """The type of a tuple's items; None if `hint` is no tuple, nor one or null."""
    kinds = [kind for kind in (hint, *get_args(hint)) if get_origin(kind) is tuple]
    return get_args(kinds[0])[0] if kinds else None


def add_switch(parser: ArgumentParser, name: str, text: str) -> None:
    """Add an option that stands alone for true, and also takes true or false."""
    parser.add_argument(name, type=bool, default=False, nargs="?", const=True, help=text)


def add_options(parser: ArgumentParser, schema: type, *, skip: Collection[str] = ()) -> None:
    """Add an option for each field of a dataclass, with the field's docstring as help; a tuple takes several values."""
    documented = [docstring_parser.parse_from_object(base).params for base in reversed(schema.__mro__[:-1])]
    texts = {each.arg_name: each.description for params in documented for each in params}
    hints = get_type_hints(schema)
    for each in fields(schema):
        name, hint = each.name, hints[each.name]
        if name in skip:
            continue
        if is_dataclass(hint):
            parser.add_class_arguments(hint, name)
        elif hint is bool:
            add_switch(parser, f"--{name}", texts[name] or "")
        elif get_origin(hint) is tuple:
            parser.add_argument(f"--{name}", type=get_args(hint)[0], nargs="+", default=[], help=texts[name])
        else:
            parser.add_argument(f"--{name}", type=hint, default=each.default, help=texts[name])


def from_options(schema: type[Schema], values: Namespace) -> Schema:
    """The dataclass that the parsed options of [`add_options`] stand for.

    Raises:
        ConfigError: a value cannot work.
    """
    named = {each.name: values[each.name] for each in fields(schema) if each.name in values}  # type: ignore[arg-type]
    return schema(**{name: _plain(value) for name, value in named.items()})


def _plain(value: Any) -> Any:
    """A value without the types of the parser, which YAML would write as code."""
    if isinstance(value, list):
        return tuple(map(_plain, value))
    kinds = () if isinstance(value, bool) else (int, float, str)
    return next((kind(value) for kind in kinds if isinstance(value, kind)), value)


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """The values of a command line, those of a dataclass such as `--data.source` as the dataclass itself.

    Raises:
        ConfigError: a value cannot work.
    """
    return parser.instantiate(parser.parse_args(spelled_out(argv, OF_IMAGES)))


def refuse_tokens(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Exit before an error message could repeat a token."""
    if any(argument.startswith("-") and argument.partition("=")[0].endswith("token") for argument in argv):
        parser.error("a token is never an argument, which others can see; log in with `hf auth login`, or set HF_TOKEN")


USERS_TO_MEND = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)
"""Errors of files that are about places which the user has named."""


def reporting_errors(command: Callable[[], int]) -> int:
    """Run a command; an error that the user can put right is a message and exit code 2, not a traceback."""
    try:
        return command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        out = select.poll()
        out.register(sys.stdout, select.POLLOUT)
        if not any(event & select.POLLERR for _, event in out.poll(0)):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody listens any more, as after `| head`
        return 141
    except OSError as error:
        if error.errno not in USERS_TO_MEND:
            raise
        print(f"error: {error}", file=sys.stderr)
    return 2


def _require_no_nulls(schema: Any, values: Any, prefix: str = "") -> None:
    """Make sure that only fields that may be null are null, which the parser does not check.

    Raises:
        ConfigError: another one is.
    """
    hints = get_type_hints(schema)
    for each in fields(schema):
        hint, value = hints[each.name], values[each.name]
        if value is None and type(None) not in get_args(hint):
            raise ConfigError(f"{prefix}{each.name} must not be null")
        if is_dataclass(hint):
            _require_no_nulls(hint, value, f"{prefix}{each.name}.")


def _costs(recipes: Path) -> str:
    """One line for each recipe of a folder: its name, and what its file says of its cost."""
    texts = {file.stem: read_text(file) for file in sorted(recipes.glob("*.yaml"))}
    found = {name: re.search(r"^# Cost: (.+?(?:\.(?= |$)|$))", text, re.MULTILINE) for name, text in texts.items()}
    lines = (f"  {name:24} {cost[1].removesuffix('.') if cost else ''}" for name, cost in found.items())
    return "\n".join(lines).replace("%", "%%")


def find_recipe(name_or_path: str, recipes: Path = RECIPES) -> Path:
    """The YAML file of a recipe: a path, or the name of a recipe in the folder `recipes`.

    Raises:
        ConfigError: there is no such file or recipe; the message lists the recipes.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = recipes / f"{name_or_path}.yaml"
    if shipped.is_file() and shipped.parent == recipes:
        return shipped
    known = ", ".join(sorted(recipe.stem for recipe in recipes.glob("*.yaml")))
    raise ConfigError(f"--config must be a YAML file or one of the recipes {known}, got {name_or_path!r}")
