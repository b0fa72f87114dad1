"""Paths as people write them in settings: ``~``, ``~user``, ``$VARIABLE`` and ``${VARIABLE}``."""

from __future__ import annotations

import os
import re

_VARIABLE = re.compile(r"\$(?:(?P<name>[A-Za-z_][A-Za-z0-9_]*)|\{(?P<braced>[^}]*)\})")


def expand_path(path: str) -> str:
    """A path or URL with its variables and a leading home folder put in; a shell does that only for some options.

    Variables come first, so that one may hold a path that begins with ``~``. A ``$`` that begins no name stays.

    Raises:
        ValueError: a variable that is not set or empty, or a user that this machine does not know.
    """
    expanded = _VARIABLE.sub(_value, path)
    if not expanded.startswith("~"):
        return expanded
    absolute = os.path.expanduser(expanded)  # noqa: PTH111 - Path would change URLs and trailing slashes
    if absolute == expanded:
        user = expanded.partition("/")[0]
        raise ValueError(
            f"expected the home folder of a user of this machine, found {user}; ./{user} is a folder"
        )
    return absolute


def _value(variable: re.Match[str]) -> str:
    name = variable["name"] or variable["braced"] or ""
    if not os.environ.get(name):  # an empty one would make another path, such as /store of $SCRATCH/store
        raise ValueError(
            f"expected environment variables that are set and not empty, found {variable[0]}, which is not"
        )
    return os.environ[name]
