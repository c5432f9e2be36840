"""Settings of a script: dataclass defaults < YAML file (`--config`) < command line, strict at every step.

A script declares a flat dataclass whose fields are made with `setting`; the field's annotation is its type, and the same
name is the YAML key and the flag. A key or flag that does not exist, a value of the wrong type, out of range or not among
the choices is a `UserError` that names it and the nearest valid one, before any model is loaded. Checks that involve
several settings belong into the dataclass's `__post_init__`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import yaml

from alignment.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
_NONE_WORDS = ("none", "null", "")
_HELP_WIDTH = 100
_KINDS = {str: "TEXT", int: "INTEGER", float: "NUMBER"}


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    aliases: Iterable[str] = (),
) -> Any:
    """A dataclass field with what its flag's help and its checks need. Bounds are inclusive; a list default is copied."""
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum, "aliases": tuple(aliases)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def load_config(cls: type[Config], argv: list[str] | None = None, *, prog: str, description: str) -> Config:
    """Parses `argv` (default: the process's own) into an instance of the dataclass `cls`.

    Flags are `--snake_case`, `--kebab-case` is taken as well; booleans are `--flag`, `--flag true|false` or `--no_flag`.
    `description` is the script's docstring; `--help` shows its first paragraph, and as examples its indented commands.
    Raises UserError for anything that does not fit.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    kinds = typing.get_type_hints(cls)
    parser = script_parser(
        description,
        prog=prog,
        usage=f"{prog} [--config FILE] [--SETTING VALUE ...]",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings; flags win over it")
    for name, field in fields.items():
        _add_flag(parser, field, kinds[name])
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.refuse(unknown[0])
    given = vars(namespace)

    values: dict[str, Any] = {}
    if "config" in given:
        path = given.pop("config")
        for key, value in read_yaml_mapping(path).items():
            if key not in fields:
                raise UserError(f"{path}: unknown key '{key}'{nearest(str(key), fields)}")
            values[key] = _convert(value, kinds[key], f"{path}: key '{key}'")
    for name, value in given.items():
        values[name] = _convert(value, kinds[name], f"--{name}")
    for name, value in values.items():
        _check_bounds(name, value, fields[name].metadata)
    return cls(**values)


def read_yaml_mapping(path: str | Path) -> dict:
    """The mapping that a YAML file holds. Raises UserError when it cannot be read, parsed, or is something else."""
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, Loader=_StrictLoader)
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the config file {path}: not UTF-8 text ({error}); save it as UTF-8") from error
    except Exception as error:  # PyYAML raises ValueError, KeyError and others for a value that its tag does not fit
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected 'key: value' lines, found a {type(content).__name__}")
    return content


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of the known names, or a list of all when none is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known are {', '.join(known)}" if len(known) <= 12 else "; --help lists the known ones"


def as_yaml(config: Any) -> str:
    """The resolved settings as YAML that `--config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def script_parser(docstring: str, **options: Any) -> _Parser:
    """A parser whose `--help` shows the script's docstring: its first paragraph, and its indented commands as examples."""
    paragraphs = [text.strip("\n") for text in docstring.split("\n\n")]
    commands = [text for text in paragraphs if text.startswith("    ")]
    return _Parser(
        description=textwrap.fill(paragraphs[0], _HELP_WIDTH),
        epilog=f"example:\n{commands[0]}" if commands else "",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        **options,
    )


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wide enough for a setting's name, its values and its text on one line or two; tells defaults."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, max_help_position=32, width=_HELP_WIDTH)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.help and action.default not in (None, False, argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if told else action.help


class _StrictLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key written twice, which PyYAML would resolve silently to the last one."""


def _mapping_without_repeats(loader: _StrictLoader, node: yaml.MappingNode, deep: bool = False) -> dict:
    keys = [loader.construct_object(key, deep=deep) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
    for index, key in enumerate(keys):
        if key in keys[:index]:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is written twice", node.start_mark)
    loader.flatten_mapping(node)  # the defaults that `<<: *anchor` brings in
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping_without_repeats)


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are UserErrors with the nearest flag."""

    def refuse(self, word: str) -> NoReturn:
        flags = sorted({flag for action in self._actions for flag in action.option_strings if "-" not in flag[2:]})
        if word.startswith("-"):
            word = word.split("=")[0]  # a value may be a secret
            raise UserError(f"unknown option {word}{nearest(word.replace('-', '_').replace('__', '--', 1), flags)}")
        raise UserError(f"unexpected argument '{word}': settings are given as --name value")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists all options)")


def _add_flag(parser: _Parser, field: dataclasses.Field, kind: Any) -> None:
    names = [f"--{field.name}", *field.metadata.get("aliases", ())]
    kebabs = [kebab for name in names if (kebab := "--" + name[2:].replace("_", "-")) not in names]
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    text = field.metadata.get("help", "").replace("%", "%%")
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    shown = str(default).lower() if isinstance(default, bool) else shown  # as a flag and the file want it
    text += f" (default: {shown})" if default not in (None, "", []) else ""
    inner = _without_none(kind)
    if inner is bool:
        form: dict[str, Any] = {"nargs": "?", "const": True, "metavar": "true|false"}
        negative = dict.fromkeys((f"--no_{field.name}", f"--no-{field.name.replace('_', '-')}"))
        parser.add_argument(*negative, dest=field.name, action="store_false", help=argparse.SUPPRESS)
    elif typing.get_origin(inner) is list:
        form = {"nargs": "*", "metavar": "VALUE"}
    else:
        choices = field.metadata.get("choices") or (
            typing.get_args(inner) if typing.get_origin(inner) is typing.Literal else None
        )
        form = {"metavar": "|".join(map(str, choices)) if choices else _KINDS.get(inner, "VALUE")}
    parser.add_argument(*names, dest=field.name, help=text, **form)
    if kebabs:
        parser.add_argument(*kebabs, dest=field.name, help=argparse.SUPPRESS, **form)


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        rest = [part for part in typing.get_args(kind) if part is not type(None)]
        return rest[0] if len(rest) == 1 else kind
    return kind


def _convert(value: Any, kind: Any, where: str) -> Any:
    """`value`, from YAML or from a flag's text, as `kind`; UserError names `where` it stood."""
    inner = _without_none(kind)
    if inner is not kind and (value is None or (isinstance(value, str) and value.lower() in _NONE_WORDS)):
        return None
    if typing.get_origin(inner) is list:
        if not isinstance(value, list):
            raise UserError(f"{where}: expected a list, got {value!r}")
        return [_convert(item, typing.get_args(inner)[0], where) for item in value]
    if typing.get_origin(inner) is typing.Literal:
        options = typing.get_args(inner)
        if value not in options:
            raise UserError(
                f"{where}: {value!r} is not one of {', '.join(map(repr, options))}{_suggest(value, options)}"
            )
        return value
    converter = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str}[inner]
    result = converter(value)
    if result is None:
        wanted = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}[inner]
        raise UserError(f"{where}: expected {wanted}, got {value!r}")
    return result


def _suggest(value: Any, options: tuple) -> str:
    close = difflib.get_close_matches(str(value), list(map(str, options)), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _to_bool(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    return {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else None


def _to_int(value: Any) -> int | None:
    if isinstance(value, (bool, float)):
        return None
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _to_float(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)  # YAML 1.1 reads 5e-6 as text, so text is taken here as well
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _to_str(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _check_bounds(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    if value is None:
        return
    low, high, choices = metadata.get("minimum"), metadata.get("maximum"), metadata.get("choices")
    if choices is not None and value not in choices:
        raise UserError(f"{name}: {value!r} is not one of {', '.join(map(repr, choices))}{_suggest(value, choices)}")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"at most {high}" if low is None else f"from {low} to {high}"
        raise UserError(f"{name}: {value} is out of range, expected {bounds}")
