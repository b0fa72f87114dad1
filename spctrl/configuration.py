"""Typed YAML configurations: what a training run, a method or a benchmark is."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TypeVar

import msgspec

from spctrl.errors import ExpectedError

Config = TypeVar("Config", bound=msgspec.Struct)


class ConfigurationError(ExpectedError):
    """A configuration file that cannot be used: names the file, the place, and what is valid there."""


def read_config(path: Path, kind: type[Config]) -> Config:
    """A YAML file as a ``msgspec.Struct``, strictly: no unknown names, no values of another type.

    Raises:
        ConfigurationError: there is no such file, or it is not one of this kind.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"expected a configuration at {path}, found none ({error.strerror})"
        ) from error
    try:
        values = msgspec.yaml.decode(text)
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: expected settings by name, found {type(values).__name__}")
    valid = [field.encode_name for field in msgspec.structs.fields(kind)]
    for name in values:
        if name not in valid:
            near = difflib.get_close_matches(str(name), valid, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ConfigurationError(
                f"{path}: there is no setting {name!r}{meant} Valid are: {', '.join(sorted(valid))}"
            )
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{path}: {error}") from error
