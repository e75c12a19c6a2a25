"""One settings model per service: command line over environment over TOML file over default."""

import argparse
import ast
import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

from pydantic import BaseModel, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_METAVARS = {
    "str": "TEXT",
    "int": "N",
    "float": "X",
    "Path": "PATH",
    "tuple[str,...]": "A,B,...",
    "tuple[Path,...]": "PATH,PATH,...",
    "tuple[int,...]": "N,M,...",
}
_DEFAULTS_THAT_SAY_NOTHING = (
    *(
        " (ifdef: required)",
        " (default: None)",
        " (default: False)",
        " (default: )",
        " (default: ())",
    ),
)
_VARIABLES = "Every option is also an environment variable, such as {variable}"
_AND_FILE = """,
and a key of the TOML file that --config names, such as {key}.
The command line goes before the environment, and that before the file"""


class ServiceSettings(BaseSettings):
    """Base of every service's settings; a subclass sets `env_prefix`."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_nested_delimiter="__",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_use_class_docs_for_groups=True,
        nested_model_default_partial_update=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment goes before the values of the TOML file, which arrive as arguments."""
        return _Environment(settings_cls), init_settings

    @field_validator("*")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        """`~` is the home folder also where no shell sees to it: --state=~/run, variables, TOML."""
        if isinstance(value, Path):
            return Path(os.path.expanduser(value))
        if isinstance(value, str) and value.startswith("~/"):
            return os.path.expanduser(value)
        return value


class _Environment(EnvSettingsSource):
    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """A list may be written a,b as on the command line; JSON works too."""
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            return value.split(",")


S = TypeVar("S", bound=ServiceSettings)


def load_settings(kind: type[S], prog: str, argv: list[str], more_help: str = "") -> S:
    """Settings from `argv`, the environment and the TOML file that --config names.

    `more_help` ends the help.

    Prints what is wrong, option by option, and exits with status 2 when they cannot be used.
    """
    command_line = _command_line(kind, prog, argv, more_help)
    given = _Given(kind, command_line.env_vars)
    try:
        given.read_file()
        return kind(_cli_settings_source=command_line, **given.in_file)
    except ValidationError as error:
        _fail(prog, *map(given.complaint, error.errors()))
    except OSError as error:
        _fail(prog, f"--config: {given.file} cannot be read: {error.strerror}")
    except ValueError as error:
        _fail(prog, f"--config: {given.file} is not TOML: {error}")
    except RecursionError:
        _fail(prog, f"--config: {given.file} is not TOML: nested too deeply")


def _fail(prog: str, *messages: str) -> NoReturn:
    for message in messages:
        print(f"{prog}: {message}", file=sys.stderr)
    print(f"{prog}: {prog} --help lists every option", file=sys.stderr)
    raise SystemExit(2)


# ---------------------------------------------------------------------- command line and help


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _fail(self.prog, message.removeprefix("argument "))


def _command_line(
    kind: type[S], prog: str, argv: list[str], more_help: str
) -> CliSettingsSource[Any]:
    """What the command line gives; exits after --help and for options that do not exist."""
    positional = [name for name, field in kind.model_fields.items() if _is_positional(field)]
    required = [
        _option(name)
        for name, field in kind.model_fields.items()
        if field.is_required() and name not in positional
    ]
    example = max(_names(kind), key=lambda name: ("." in name, "_" in name))
    epilog = f"{_VARIABLES}{_AND_FILE * ('config' in kind.model_fields)}."
    parser = _Parser(
        prog=prog,
        usage=" ".join(
            [
                prog,
                *(name.upper() for name in positional),
                *(f"{option} ..." for option in required),
                "[OPTIONS]",
            ]
        ),
        description=kind.__doc__,
        epilog=epilog.format(variable=_variable(kind, example), key=example) + more_help,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def parse(parser: _Parser, arguments: list[str]) -> argparse.Namespace:
        known, unknown = parser.parse_known_args(arguments)
        if unknown:
            name = unknown[0].partition("=")[0]
            parser.error(f"{name}: no such option{_did_you_mean(name, kind, _option)}")
        return known

    source: CliSettingsSource[Any] = CliSettingsSource(
        kind,
        root_parser=parser,
        parse_args_method=parse,
        add_argument_method=_add_argument,
        add_argument_group_method=_add_group,
    )
    source(args=argv)
    return source


def _add_argument(parser: Any, *names: str, **options: Any) -> None:
    if "metavar" in options:
        options["metavar"] = _METAVARS.get(options["metavar"], options["metavar"])
    for default in _DEFAULTS_THAT_SAY_NOTHING:
        options["help"] = options["help"].removesuffix(default)
    options["help"] = re.sub(r"(?<=default: )\(.*\)(?=\)$)", _as_given, options["help"])
    parser.add_argument(*names, **options)


def _as_given(default: re.Match[str]) -> str:
    """A tuple as it is written on the command line."""
    return ",".join(map(str, ast.literal_eval(default[0])))


def _add_group(parser: Any, title: str, description: str) -> Any:
    return parser.add_argument_group(title, description.removeprefix("default: None (undefined)\n"))


# ---------------------------------------------------------------------- names and complaints


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _variable(kind: type[ServiceSettings], name: str) -> str:
    return f"{kind.model_config['env_prefix']}{name.replace('.', '__')}".upper()


def _names(model: type[BaseModel]) -> Iterator[str]:
    """All settings, nested ones as `lora.rank`."""
    for name, field in model.model_fields.items():
        nested = [
            kind
            for kind in (field.annotation, *get_args(field.annotation))
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        yield from (f"{name}.{inner}" for kind in nested for inner in _names(kind))
        if not nested:
            yield name


def _is_positional(field: FieldInfo) -> bool:
    """Whether a setting is given on the command line without its name."""
    return get_args(CliPositionalArg[str])[1] in field.metadata


def _did_you_mean(name: str, kind: type[ServiceSettings], spell: Callable[[str], str]) -> str:
    close = difflib.get_close_matches(name, map(spell, _names(kind)), n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""


class _Given:
    """What was given where, so that a message names a setting as its user wrote it."""

    def __init__(self, kind: type[ServiceSettings], on_command_line: Mapping[str, Any]) -> None:
        self._kind = kind
        self._on_command_line = on_command_line
        self._environment = {name.upper() for name in os.environ}
        self.file: Path | None = None
        self.in_file: dict[str, Any] = {}

    def read_file(self) -> None:
        """Read the TOML file, if there is one. Raises OSError or ValueError."""
        variable = os.environ.get(_variable(self._kind, "config"))
        path = self._on_command_line.get("config") or variable
        if path and "config" in self._kind.model_fields:
            self.file = Path(path).expanduser()
            self.in_file = tomllib.loads(self.file.read_text("utf-8"))

    def complaint(self, detail: Any) -> str:
        """One line for one error of the validation."""
        message = detail["msg"].removeprefix("Value error, ")
        if not detail["loc"]:
            return str(message)
        name = ".".join(str(part) for part in detail["loc"])
        written, spell = self._as_written(name)
        if detail["type"] == "extra_forbidden":
            return f"{written}: no such setting{_did_you_mean(spell(name), self._kind, spell)}"
        # A group's own rule has named what it got of the group.
        named = detail["type"] == "missing" or isinstance(detail["input"], dict)
        given = "" if named else f", got {detail['input']!r}"
        return f"{written}: {message}{given}"

    def _as_written(self, name: str) -> tuple[str, Callable[[str], str]]:
        """How a setting was spelled where it was given, and how others are spelled there."""
        if name not in self._on_command_line:
            variable = functools.partial(_variable, self._kind)
            if variable(name) in self._environment:
                return variable(name), variable
            if name.partition(".")[0] in self.in_file:
                return f"{name} in {self.file}", str
        return _option(name), _option
