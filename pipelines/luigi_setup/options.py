"""The options of the ``luigi`` command, which are written in full."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn

import luigi
from luigi.cmdline_parser import CmdlineParser
from luigi.task_register import Register

from spctrl.output.printable import one_line


class _Parser(argparse.ArgumentParser):
    """Luigi's parser, without abbreviations: ``--condition`` must not pass for ``--conditions``."""

    root_task: str | None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = super().parse_known_args(args, namespace)
        option = next((each.partition("=")[0] for each in unknown if each.startswith("-")), None)
        # Luigi first looks for the target only, whose options it does not know yet.
        if option is None or (self.root_task is None and _is_target(known.root_task)):
            return known, unknown
        owner = self.root_task if _is_target(self.root_task) else None
        nearest = difflib.get_close_matches(option, self._suggestions(), 1, 0.6 if owner else 0.8)
        if owner is None and not nearest:
            found = known.root_task or option
            targets = difflib.get_close_matches(found, filter(_is_target, Register.task_names()), 1)
            hint = (
                f"Did you mean {targets[0]}?"
                if targets
                else "For example: `luigi --module pipelines BuildDataset`"
            )
            self.error(f"expected a target before its options, found {found}. {hint}")
        self.error(
            f"expected an option of {owner or 'all targets'}, found {option}. "
            + (f"Did you mean {nearest[0]}? " if nearest else "")
            + f"`luigi --module pipelines {owner or 'TARGET'} --help` lists them"
        )

    def _suggestions(self) -> list[str]:
        """The options that concern the target: its own, Luigi's and those of the settings, not of other targets."""
        others = tuple(f"--{name}-" for name in Register.task_names() if _is_target(name))
        return [option for option in self._option_string_actions if not option.startswith(others)]

    def error(self, message: str) -> NoReturn:
        """The message alone; argparse puts pages of usage before it."""
        self.exit(2, f"ERROR: {one_line(message)}\n")


def _is_target(name: str | None) -> bool:
    """Whether a name is that of a task that can be run: Luigi also lists sections of settings."""
    return name in Register.task_names() and not issubclass(Register.get_task_cls(name), luigi.Config)


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
