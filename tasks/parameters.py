"""Luigi parameters for lists of names (``train,val``) and for paths."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import luigi

from spctrl.errors import ExpectedError
from spctrl.output.secrets import remember
from spctrl.paths import expand_path


class NamesParameter(luigi.Parameter[tuple[str, ...]]):
    """Names out of a fixed set, separated by commas, or a JSON list."""

    def __init__(self, *args: Any, choices: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._choices = choices
        self.description = f"{self.description or ''} (comma-separated: {', '.join(choices)})".strip()

    def parse(self, x: str) -> tuple[str, ...]:
        if x.lstrip().startswith("["):
            try:
                names = json.loads(x)
            except ValueError as error:
                raise ExpectedError(f"expected a JSON list, or names with commas, found {x!r}") from error
        else:
            names = [name.strip() for name in x.split(",") if name.strip()]
        unknown = [str(name) for name in names if name not in self._choices]
        if unknown or not names:
            raise ExpectedError(
                f"expected names among {', '.join(self._choices)}, found {', '.join(unknown) or 'none'}"
            )
        return tuple(dict.fromkeys(names))

    def serialize(self, x: Sequence[str]) -> str:
        return ",".join(x)

    def normalize(self, x: Sequence[str]) -> tuple[str, ...]:
        return tuple(x)


class PathParameter(luigi.Parameter):
    """A path or URL, in which ``~`` and environment variables are expanded when it is read."""

    def parse(self, x: str) -> str:
        """The path that a settings file or the command line gives."""
        path = expand_path(x)
        remember(path)  # a variable may hold the password of a URL
        return path
