"""Parse command lines: one flag per dataclass field, on top of recipes, with one-line errors."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import inspect
import io
import os
import select
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Generic, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from mnist_diffusion.config import RunConfig
from mnist_diffusion.errors import ConfigError, UserError
from mnist_diffusion.files import parse_yaml, read_text
from mnist_diffusion.option_types import checked, find_recipe, read_mapping

Run = TypeVar("Run", bound=RunConfig)
USER_FIXABLE_ERRNOS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)


class Parser(argparse.ArgumentParser):
    """Parses `--section.field VALUE ...` for the fields of a dataclass.

    A switch may stand alone for true, a list takes several values, and `null` stands for None.

    Args:
        schema: the dataclass whose fields become flags; its docstring and theirs are the help.
        positional: fields that come first on the command line, without a flag.
        options: as for `ArgumentParser`.
    """

    def __init__(self, schema: type, *positional: str, **options: Any):
        self.schema, self.kinds = schema, dict(_leaves(schema))
        places = [(name.rpartition(".")[2].upper(), self.kinds[name].is_required()) for name in positional]
        words = [word if required else f"[{word}]" for word, required in places]
        options.setdefault("usage", " ".join([options["prog"], *words, "[--option VALUE ...]"]))
        look: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(description=inspect.getdoc(schema), **look, **options)
        for name, info in self.kinds.items():
            text = " ".join((info.description or "").split()).replace("%", "%%")
            required = info.is_required() and "." not in name  # a section's may come from a file
            if name in positional:
                one, several = (None, "+") if required else ("?", "*")
                count = several if _is_list(info.annotation) else one
                self.add_argument(name, nargs=count, default=argparse.SUPPRESS, help=text)
                if required:
                    continue
            default = info.get_default(call_default_factory=False)
            default_text = "" if info.is_required() or default in (None, ()) else f" (default: {default})"
            nargs = "+" if _is_list(info.annotation) else "?" if bool in _kinds(info.annotation) else None
            look = {"nargs": nargs, "const": "true" if nargs == "?" else None, "metavar": _placeholder(info.annotation)}
            self.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text + default_text, **look)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and two lines."""
        print(f"usage: {self.prog} [options]; --help lists them\nerror: {message}", file=sys.stderr)
        raise SystemExit(2)

    def words(self, argv: Sequence[str]) -> argparse.Namespace:
        """The words behind each flag; exits with status 2 if a flag is unknown."""
        if any(word.startswith("-") and word.partition("=")[0].endswith("token") for word in argv):
            self.error("a token is never an argument, as others can see it; use `hf auth login` or HF_TOKEN")
        namespace, unknown = self.parse_known_intermixed_args(list(argv))
        if unknown:
            near = difflib.get_close_matches(unknown[0].partition("=")[0], list(self._option_string_actions), 1)
            self.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {near[0]}?" if near else ""))
        return namespace

    def build(self, namespace: argparse.Namespace, base: dict[str, Any] | None = None) -> Any:
        """The dataclass that parsed words stand for, over the values of `base`; exits with status 2 if one is wrong."""
        values = base or {}
        try:
            for name, value in vars(namespace).items():
                if name in self.kinds:
                    *sections, field = name.split(".")
                    option = {field: _plain(value)}
                    for section in reversed(sections):
                        option = {section: option}
                    values = _merged(values, option)
            return checked(self.schema, values)
        except UserError as error:
            self.error(str(error))

    def read(self, argv: Sequence[str]) -> Any:
        """The dataclass that a command line stands for."""
        return self.build(self.words(argv))


@dataclasses.dataclass(frozen=True)
class RunArguments(Generic[Run]):
    """A run that was asked for on the command line: its configuration, the name of its recipe, `--dry_run`."""

    config: Run
    recipe: str
    dry_run: bool


def parse_run(schema: type[Run], argv: Sequence[str] | None, *positional: str, prog: str) -> RunArguments[Run]:
    """Read a run's configuration: the defaults, then each `--config`, then flags; exits with status 2 on an error."""
    recipes = schema.RECIPE_FOLDER
    costs = "\n".join(f"  {file.stem:24} {_cost(file)}" for file in sorted(recipes.glob("*.yaml")))
    epilog = f"recipes for --config, and what they cost:\n{costs}"
    parser = Parser(schema, *positional, prog=prog, epilog=epilog)
    config_help = "YAML file or recipe name; may be repeated, later ones override; `default` if omitted"
    parser.add_argument("--config", action="append", default=[], help=config_help)
    parser.add_argument("--out", dest="output_dir", default=argparse.SUPPRESS, metavar="VALUE", help="as --output_dir")
    parser.add_argument("--dry_run", action="store_true", help="print what would be done, and stop")
    namespace = parser.words(sys.argv[1:] if argv is None else argv)
    base: dict[str, Any] = {}
    try:
        files = [find_recipe(name, recipes) for name in namespace.config or ["default"]]
        for file in files:
            base = _merged(base, read_mapping(file))
    except UserError as error:
        parser.error(str(error))
    name = files[-1].stem  # a run's own config.yaml is named after its folder
    recipe = files[-1].resolve().parent.name if name == "config" else name
    return RunArguments(parser.build(namespace, base), recipe, namespace.dry_run)


def _merged(base: Any, over: Any, section: str = "") -> Any:
    """Values over those of `base`, section by section."""
    if not isinstance(over, dict):
        return over
    if not isinstance(base := base or {}, dict):
        raise ConfigError(f"{section} must be a section of options, got {base!r:.100}")
    return {**base, **{name: _merged(base.get(name), value, name) for name, value in over.items()}}


def _cost(recipe: Path) -> str:
    """The first sentence behind `# Cost:` in a recipe."""
    return read_text(recipe).partition("# Cost: ")[2].partition("\n")[0].partition(". ")[0].removesuffix(".")


def _leaves(schema: Any, prefix: str = "") -> Iterable[tuple[str, FieldInfo]]:
    """The fields of a dataclass and of those within it, by their dotted names."""
    fields = [info for base in reversed(schema.__mro__[:-1]) for info in base.__pydantic_fields__.items()]
    described = {name: info.description for name, info in fields if info.description}
    for name, info in schema.__pydantic_fields__.items():
        if dataclasses.is_dataclass(info.annotation):
            yield from _leaves(info.annotation, f"{prefix}{name}.")
        else:
            info.description = described.get(name)  # inherited fields lose their docstrings
            yield f"{prefix}{name}", info


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, without the marks of `Annotated`."""
    if hasattr(annotation, "__metadata__"):
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(kind for part in get_args(annotation) for kind in _kinds(part))
    return (annotation,)


def _is_list(annotation: Any) -> bool:
    return any(get_origin(kind) is tuple for kind in _kinds(annotation))


def _placeholder(annotation: Any) -> str:
    kinds = [kind for kind in _kinds(annotation) if kind is not type(None)]
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    return f"{{{','.join(choices)}}}" if choices else "N" if {int, float} & {*kinds} else "VALUE"


def _plain(words: Any) -> Any:
    """The value that the words behind a flag stand for; a list may also be written `[8, 16]`."""
    if words in ("null", ["null"]):
        return None
    if isinstance(words, list) and len(words) == 1 and words[0].startswith("["):
        try:
            return parse_yaml(words[0])
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"{words[0]!r:.100} is not a list such as [8, 16]") from error
    return words


def reporting_errors(command: Callable[[], int]) -> int:
    """Run a command; an error that the user can fix becomes one line and exit code 2, without a traceback."""
    warnings.filterwarnings("ignore", "__array_", DeprecationWarning)  # diffusers gives tensors to NumPy 2
    if isinstance(sys.stdout, io.TextIOWrapper):  # a letter that it cannot encode is no reason to fail
        sys.stdout.reconfigure(errors="replace")
    try:
        return command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout.fileno(), select.POLLERR)
        if not output.poll(0):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone, as after `| head`
        return 141
    except OSError as error:
        if error.errno not in USER_FIXABLE_ERRNOS:
            raise
        print(f"error: {error}", file=sys.stderr)
    return 2
