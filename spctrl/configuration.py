"""Typed YAML configurations: what a training run, a method or a benchmark is."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import msgspec
import yaml

from spctrl.duplicate_keys import DuplicateKeyError, YamlLoader
from spctrl.errors import ExpectedError
from spctrl.io.utf8 import utf8_fault
from spctrl.paths import expand_path

Config = TypeVar("Config", bound=msgspec.Struct)
PathText = Annotated[str, msgspec.Meta(description="a path; ~ and environment variables are expanded")]
"""Type of the settings that hold a path, or the name of an entry of weights.yaml in its place."""

MAX_DEPTH, MAX_VALUES = 50, 100_000


class ConfigurationError(ExpectedError):
    """A configuration file that cannot be used: names the file, the place, and what is valid there."""


def read_yaml(path: Path) -> Any:
    """What a YAML file of settings holds: of one document, of bounded size, and each key of a mapping once.

    Raises:
        ConfigurationError: there is no such file, or it is not such YAML.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"expected a configuration at {path}, found none ({error.strerror})"
        ) from error
    try:
        fault = utf8_fault(text) or _fault(text)
        values = None if fault else yaml.load(text, Loader=YamlLoader)
    except DuplicateKeyError as error:
        raise ConfigurationError(f"{path}: {error}") from error
    except Exception as error:  # PyYAML also lets through what int(), float() and date() raise
        raise ConfigurationError(f"{path} is not YAML: {error}") from error
    if fault:
        raise ConfigurationError(f"{path}: {fault}")
    return values


def read_config(path: Path, kind: type[Config]) -> Config:
    """A YAML file as a ``msgspec.Struct``, strictly: no unknown names, no values of another type. Paths are expanded.

    Raises:
        ConfigurationError: there is no such file, or it is not one of this kind.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: expected settings by name, found {type(values).__name__}")
    valid = [field.encode_name for field in msgspec.structs.fields(kind)]
    for name in values:
        if name not in valid:
            near = difflib.get_close_matches(str(name), valid, n=1)
            meant = f"; did you mean {near[0]}?" if near else "."
            raise ConfigurationError(
                f"{path}: there is no setting {name!r}{meant} Valid are: {', '.join(sorted(valid))}"
            )
    try:
        config = msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{path}: {error}") from error
    return with_expanded_paths(config, f"{path}: ")


def with_expanded_paths(config: Config, where: str) -> Config:
    """A configuration with ``expand_path`` of every ``PathText``, at any depth.

    Args:
        config: of any kind.
        where: what comes before the name of a setting in errors.

    Raises:
        ConfigurationError: a variable or user that there is not; names the setting.
    """
    changes = {}
    for field in msgspec.structs.fields(config):
        value, name = getattr(config, field.name), f"{where}{field.encode_name}"
        if isinstance(value, str) and PathText in (field.type, *get_args(field.type)):
            try:
                changes[field.name] = expand_path(value)
            except ValueError as error:
                raise ConfigurationError(f"{name}: {error}") from error
        else:
            changes[field.name] = _with_expanded_paths_in(value, name)
    return msgspec.structs.replace(config, **changes)


def without_paths(config: Config) -> Config:
    """A configuration with the default of every ``PathText`` that is not within another configuration."""
    defaults = {
        field.name: field.default
        for field in msgspec.structs.fields(config)
        if PathText in (field.type, *get_args(field.type))
    }
    return msgspec.structs.replace(config, **defaults)


def _with_expanded_paths_in(value: Any, name: str) -> Any:
    """The same for a configuration, or those of a list, that are a setting's value."""
    if isinstance(value, msgspec.Struct):
        return with_expanded_paths(value, f"{name}.")
    if isinstance(value, list):
        return [_with_expanded_paths_in(each, f"{name}[{i}]") for i, each in enumerate(value)]
    return value


def _fault(text: bytes) -> str | None:
    """Why YAML is not read, found without building it: nested as deep as it likes it would overflow the stack of the
    C library, which ends the process, and a small file of aliases of aliases is large once it is converted.
    """
    sizes: dict[str, int] = {}
    containers: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        size = 0
        if isinstance(event, yaml.CollectionStartEvent):
            containers.append((event.anchor, 1))
            if len(containers) > MAX_DEPTH:
                return f"expected values nested at most {MAX_DEPTH} deep, found more at {_place(event)}"
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = containers.pop()
            if anchor is not None:
                sizes[anchor] = size
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                return f"expected an alias of a value before it, found *{event.anchor} at {_place(event)}"
            size = sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            if event.anchor is not None:
                sizes[event.anchor] = size
        if size and containers:
            anchor, so_far = containers[-1]
            containers[-1] = anchor, so_far + size
            if so_far + size > MAX_VALUES:
                return f"expected at most {MAX_VALUES:,} values, found more at {_place(event)}"
    return None


def _place(event: yaml.Event) -> str:
    return f"line {event.start_mark.line + 1}, column {event.start_mark.column + 1}"
