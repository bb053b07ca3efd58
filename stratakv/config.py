"""Reads `Settings`: defaults ← TOML file ← `STRATAKV_SECTION_KEY` ← flags, last wins.

Called once at the start of every process. All mistakes are reported together; keys that no section has are mistakes.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stratakv.errors import SetupError
from stratakv.settings import IMPLIED, Bytes, Secret, Settings, WorkerAddress
from stratakv.worker_address import check_worker, split_workers

ENV_PREFIX = "STRATAKV_"
CONFIG_FILE_ENV = "STRATAKV_CONFIG"
NATIVE_ENV = "STRATAKV_NATIVE"
_NO_SETTINGS = {CONFIG_FILE_ENV, NATIVE_ENV}
"""Variables of this program that are no settings."""
MASK = "***"
PORT_MAX = 65_535
_UNITS = {"": 1, "B": 1, "KIB": 1024, "MIB": 1024**2, "GIB": 1024**3, "TIB": 1024**4}


class Option(NamedTuple):
    """One setting: its place, type and help."""

    section: str
    key: str
    type: Any
    default: Any
    doc: str

    @property
    def env(self) -> str:
        return f"{ENV_PREFIX}{self.section}_{self.key}".upper()

    @property
    def flag(self) -> str:
        return "--" + self.key.replace("_", "-")


def options(sections: Sequence[str] | None = None) -> Iterator[Option]:
    """All settings, or those of some sections, in the order they are declared."""
    for section in dataclasses.fields(Settings):
        if sections is not None and section.name not in sections:
            continue
        cls = typing.get_type_hints(Settings)[section.name]
        hints = typing.get_type_hints(cls)
        for item in dataclasses.fields(cls):
            yield Option(section.name, item.name, hints[item.name], item.default, item.metadata["doc"])


def load_settings(
    overrides: Mapping[tuple[str, str], str] | None = None,
    *,
    env: Mapping[str, str] | None = None,
    config_file: Path | None = None,
) -> Settings:
    """Read all sources. Raises SetupError that lists every mistake with its source.

    `overrides` are flags: (section, key) → text.
    """
    env = os.environ if env is None else env
    known = {(o.section, o.key): o for o in options()}
    raw: dict[tuple[str, str], tuple[str, Any]] = {}
    mistakes: list[str] = []
    if config_file is None and env.get(CONFIG_FILE_ENV):
        config_file = Path(env[CONFIG_FILE_ENV])
    if config_file is not None:
        for place, value in _read_toml(config_file, mistakes):
            raw[place] = (str(config_file), value)
    by_env = {o.env: place for place, o in known.items()}
    for name, text in env.items():
        if name.startswith(ENV_PREFIX) and name not in _NO_SETTINGS:
            raw[by_env.get(name, ("", name))] = (f"environment {name}", text)
    for place, text in (overrides or {}).items():
        option = known.get(place)
        raw[place] = (option.flag if option else str(place), text)

    values: dict[str, dict[str, Any]] = {}
    for place, (source, value) in raw.items():
        option = known.get(place)
        if option is None:
            mistakes.append(f"{source}: there is no setting {'.'.join(p for p in place if p)}")
            continue
        try:
            values.setdefault(place[0], {})[place[1]] = _checked_port(option, parse_value(option.type, value))
        except (ValueError, TypeError) as error:
            mistakes.append(f"{source}: {option.section}.{option.key}: {error}")
    if mistakes:
        raise SetupError("\n".join(["the configuration has mistakes:", *(f"  {m}" for m in sorted(mistakes))]))
    for (section, key), signs in IMPLIED.items():
        if any(sign in values.get(section, {}) for sign in signs):
            values[section].setdefault(key, True)
    hints = typing.get_type_hints(Settings)
    return Settings(**{name: hints[name](**given) for name, given in values.items()})


def _read_toml(path: Path, mistakes: list[str]) -> Iterator[tuple[tuple[str, str], Any]]:
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        mistakes.append(f"{path}: {error.strerror}")
        return
    except tomllib.TOMLDecodeError as error:
        mistakes.append(f"{path}: {error}")
        return
    for section, table in document.items():
        if not isinstance(table, dict):
            mistakes.append(f"{path}: {section} stands outside a [section]")
            continue
        for key, value in table.items():
            yield (section, key), value


def parse_value(kind: Any, value: Any) -> Any:
    """Text or TOML value → a setting's type. Raises ValueError that says what is expected."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        inner = next(t for t in typing.get_args(kind) if t is not type(None))
        return None if value is None or value == "" else parse_value(inner, value)
    if typing.get_origin(kind) is tuple:
        item_kind = typing.get_args(kind)[0]
        return tuple(parse_value(item_kind, v) for v in (_split(item_kind, value) if isinstance(value, str) else value))
    if kind is WorkerAddress:
        return WorkerAddress(check_worker(str(value)))
    if kind is Bytes:
        return Bytes(_parse_bytes(value))
    if kind is Secret:
        return Secret(str(value))
    if kind is bool:
        return _parse_bool(value)
    if kind is Path:
        return Path(str(value)).expanduser()
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        choices = [str(member.value) for member in kind]
        if str(value) not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}, got {value!r}")
        return kind(value)
    try:
        parsed = kind(value)
    except (ValueError, TypeError):
        raise ValueError(f"expected {kind.__name__}, got {value!r}") from None
    if kind in (int, float) and not parsed >= 0:
        raise ValueError(f"expected 0 or more, got {value!r}")
    return parsed


def _checked_port(option: Option, value: Any) -> Any:
    """Raises ValueError: some listeners would take another port than the one that was meant, without a word."""
    if option.type is int and option.key.rpartition("_")[2] == "port" and value > PORT_MAX:
        raise ValueError(f"expected a port, 0 to {PORT_MAX}, got {value}")
    return value


def _split(kind: Any, text: str) -> list[str]:
    return split_workers(text) if kind is WorkerAddress else [v.strip() for v in text.split(",") if v.strip()]


def _parse_bytes(value: Any) -> int:
    match = re.fullmatch(r"\s*(\d+)\s*([a-zA-Z]*)\s*", str(value))
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"expected a size such as 512MiB, got {value!r}")
    return int(match[1]) * _UNITS[match[2].upper()]


def _parse_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    lowered = str(value).lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"expected true or false, got {value!r}")


def show_value(option: Option, value: Any) -> str:
    """A value as it may be shown: secrets are masked."""
    if value is not None and Secret in (option.type, *typing.get_args(option.type)):
        return MASK
    return value_text(value)


def value_text(value: Any) -> str:
    """A value as it stands in a flag or in the environment, secrets as they are."""
    if value is None:
        return ""
    return ",".join(value) if isinstance(value, tuple) else str(value)


def parse_flags(prog: str, description: str, sections: Sequence[str], argv: Sequence[str]) -> Settings:
    """Settings of a process started by hand: flags of its own sections, `--set section.key=value` for any other.

    The first section that has a key owns its flag; `--config FILE` names the TOML file.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="any setting")
    seen: dict[str, Option] = {}
    for option in (option for section in sections for option in options([section])):
        flag = option.flag if option.flag not in seen else f"--{option.section}-{option.key}".replace("_", "-")
        seen[flag] = option
        shown = show_value(option, option.default)
        dest, text = f"{option.section}.{option.key}", f"{option.doc} [{shown}]"
        if typing.get_origin(option.type) is tuple:
            singular = flag.removesuffix("es" if flag.endswith("sses") else "s")
            parser.add_argument(flag, singular, dest=dest, metavar="VALUE", action="append", help=f"{text}; repeatable")
        elif option.type is bool:
            parser.add_argument(flag, dest=dest, metavar="VALUE", nargs="?", const="true", help=text)
        else:
            parser.add_argument(flag, dest=dest, metavar="VALUE", help=text)
    given = vars(parser.parse_args(argv))
    overrides: dict[tuple[str, str], str] = {}
    for item in given.pop("set"):
        place, separator, value = item.partition("=")
        section, dot, key = place.partition(".")
        if not separator or not dot:
            parser.error(f"--set {item}: expected SECTION.KEY=VALUE")
        overrides[section, key] = value
    config_file = given.pop("config")
    for place, value in given.items():
        if value is not None:
            section, _, key = place.partition(".")
            overrides[section, key] = ",".join(value) if isinstance(value, list) else value
    return load_settings(overrides, config_file=config_file)
