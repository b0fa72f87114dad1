"""The parameter for paths."""

from __future__ import annotations

import luigi

from spctrl.paths import expand_path
from spctrl.secrets import remember


class PathParameter(luigi.Parameter):
    """A path or URL, in which ``~`` and environment variables are expanded when it is read."""

    def parse(self, x: str) -> str:
        """The path that a settings file or the command line gives."""
        path = expand_path(x)
        remember(path)  # a variable may hold the password of a URL
        return path
