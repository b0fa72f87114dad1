"""The options of the ``luigi`` command, which are written in full."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn

from luigi.cmdline_parser import CmdlineParser
from luigi.task_register import Register


class _Parser(argparse.ArgumentParser):
    """Luigi's parser, without abbreviations: ``--condition`` must not pass for ``--conditions``."""

    root_task: str | None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = super().parse_known_args(args, namespace)
        option = next((each.partition("=")[0] for each in unknown if each.startswith("-")), None)
        # Luigi first looks for the target only, whose options it does not know yet.
        if option and (self.root_task or known.root_task not in Register.task_names()):
            owner = self.root_task or "all targets"
            hint = "" if self.root_task else "; the target goes before its own options"
            nearest = difflib.get_close_matches(option, self._option_string_actions, 1)
            self.error(
                f"expected an option of {owner}, found {option}{hint}. "
                + (f"Did you mean {nearest[0]}? " if nearest else "")
                + f"`luigi --module pipelines {self.root_task or 'TARGET'} --help` lists them"
            )
        return known, unknown

    def error(self, message: str) -> NoReturn:
        """The message alone; argparse puts pages of usage before it."""
        self.exit(2, f"ERROR: {message}\n")


_build_parser = CmdlineParser._build_parser


def _build_strict_parser(root_task: str | None = None, help_all: bool = False) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _build_parser(root_task, help_all)
    parser.allow_abbrev = False
    parser.__class__ = _Parser
    assert isinstance(parser, _Parser)
    parser.root_task = root_task
    return parser


def install() -> None:
    """Make Luigi build such parsers; it makes its own in one place, with nothing to choose."""
    CmdlineParser._build_parser = staticmethod(_build_strict_parser)  # type: ignore[method-assign]
