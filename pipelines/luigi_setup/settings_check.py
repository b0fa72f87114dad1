"""What settings files may say: sections and names that there are, and values that Luigi can read."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from configparser import (
    DEFAULTSECT,
    ConfigParser,
    InterpolationDepthError,
    InterpolationError,
    InterpolationMissingOptionError,
    InterpolationSyntaxError,
)

from luigi.configuration.cfg_parser import InterpolationMissingEnvvarError

from pipelines.luigi_setup.settings_files import location_of
from spctrl.errors import ExpectedError

SETTINGS_FILE_HINT = "luigi.cfg (or the file that LUIGI_CONFIG_PATH names)"
OF_LUIGI = (DEFAULTSECT, "resources", "retcode", "logging")
"""Sections that Luigi reads without a task of their name."""
REASONS = {
    InterpolationSyntaxError: "expected %% for a percent sign",
    InterpolationMissingOptionError: "expected %% for a percent sign, or %(name)s for another setting of the section",
    InterpolationDepthError: "expected settings that do not refer to each other in a circle",
    InterpolationMissingEnvvarError: "expected environment variables that are set",
}


def refuse_unknown_settings(
    config: ConfigParser, known: Mapping[str, Collection[str]], others: Collection[str]
) -> None:
    """Luigi ignores unknown settings, so a typo would silently mean the default.

    Args:
        config: the settings.
        known: names of each of this project's sections.
        others: Luigi's own sections.

    Raises:
        ExpectedError: a section is called nearly as a known one, or as one of Luigi's in another case, or a known one
            has a setting that there is not.
    """
    by_folded = {_folded(each): each for each in (*others, *OF_LUIGI, *known)}
    folded_known = [_folded(each) for each in known]
    for section in sorted({*config.sections()} - {*known, *OF_LUIGI}):
        folded = _folded(section)
        is_task = section in others
        typed = folded if section.isupper() else section  # MyTask is not alike mask
        close = [] if is_task else difflib.get_close_matches(typed, folded_known, 1, 0.8)
        meant = next((by_folded[each] for each in (folded, *close) if each in by_folded), section)
        names = config[section].keys() - config.defaults().keys()
        # A stage, such as Export, may have settings of its own, but not those of [export].
        if meant != section and (not is_task or names & _spellings(known[meant])):
            raise ExpectedError(f"expected [{meant}] in {SETTINGS_FILE_HINT}, found [{section}]")
    for section in sorted({*config.sections()} & {*known}):
        for name in config[section]:
            if name not in _spellings(known[section]) | config.defaults().keys():
                expected = ", ".join(known[section])
                raise ExpectedError(
                    f"expected settings among {expected} in [{section}] of {SETTINGS_FILE_HINT}, found {name}"
                )


def _folded(section: str) -> str:
    """A section's name without what is easily overlooked: case, spaces and characters that are not shown."""
    return "".join(each for each in section if each.isprintable() and not each.isspace()).casefold()


def _spellings(names: Iterable[str]) -> set[str]:
    """Names of settings in the two spellings that Luigi reads."""
    return {spelling for name in names for spelling in (name, name.replace("_", "-"))}


def refuse_unreadable_values(config: ConfigParser, sections: Collection[str]) -> None:
    """Luigi resolves ``%(name)s`` and ``${NAME}`` when a value is read, and shows a traceback where it cannot.

    Args:
        config: the settings.
        sections: those whose values are read; others may be another program's.

    Raises:
        ExpectedError: a value that Luigi cannot read; names file and line.
    """
    for section in sorted({DEFAULTSECT, *config.sections()} & {DEFAULTSECT, *sections}):
        for name in sorted(config[section]):
            try:
                config.get(section, name)
            except InterpolationError as error:
                where, found = location_of(section, error.option), config.get(section, name, raw=True)
                raise ExpectedError(
                    f"{where}: {REASONS[type(error)]} in [{section}] {error.option}, found {found}"
                ) from error
