"""One settings model per service: command line over environment over TOML file over default."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


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
        return env_settings, init_settings


S = TypeVar("S", bound=ServiceSettings)


def load_settings(kind: type[S], prog: str, argv: list[str]) -> S:
    """Settings from `argv`, the environment and the TOML file that --config names.

    Prints what is wrong, option by option, and exits with status 2 when they cannot be used.
    """
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config", type=Path, default=None)
    known, _ = before.parse_known_args(argv)
    environment = os.environ.get(f"{kind.model_config['env_prefix']}CONFIG")
    path = known.config or (Path(environment) if environment else None)
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text()) if path else {}
    except (OSError, tomllib.TOMLDecodeError) as error:
        _fail(prog, f"--config {path}: {error}")
    try:
        return kind(_cli_parse_args=argv, _cli_prog_name=prog, **values)
    except ValidationError as error:
        _fail(prog, "\n".join(_line(detail) for detail in error.errors()))
    except SettingsError as error:
        _fail(prog, str(error))


def _line(detail: Any) -> str:
    option = ".".join(str(part) for part in detail["loc"]).replace("_", "-")
    given = "" if detail["type"] == "missing" else f", got {detail['input']!r}"
    message = detail["msg"].removeprefix("Value error, ")
    return f"--{option}: {message}{given}" if option else message


def _fail(prog: str, message: str) -> NoReturn:
    for line in message.splitlines():
        print(f"{prog}: {line}", file=sys.stderr)
    print(f"{prog}: {prog} --help lists every option", file=sys.stderr)
    raise SystemExit(2)
