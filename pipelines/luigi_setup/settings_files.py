"""The settings files, checked before Luigi reads them: it passes over some faults and shows a traceback for others.

Nothing here may import Luigi, which reads the files while it is imported.
"""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Sequence
from pathlib import Path

from spctrl.errors import ExpectedError

FILES = ("/etc/luigi/client.cfg", "/etc/luigi/luigi.cfg", "client.cfg", "luigi.cfg")
"""Those that Luigi looks for, the last one counts most but for the one that ``NAMED_BY`` names."""
NAMED_BY, FORMAT = "LUIGI_CONFIG_PATH", "LUIGI_CONFIG_PARSER"
"""Environment variables of Luigi."""
SECTION = re.compile(r"\[(?P<name>.+)\]")


def settings_files() -> list[Path]:
    """The settings files that there are, and the named one; later ones override earlier ones."""
    named = os.environ.get(NAMED_BY)
    return [*(path for path in map(Path, FILES) if path.exists()), *([Path(named)] if named else [])]


def check_settings_files() -> None:
    """Refuse files that cannot be read as settings.

    Raises:
        ExpectedError: names the file, and the line where there is one.
    """
    if os.environ.get(FORMAT) == "toml":
        raise ExpectedError(
            f"expected settings in the format of luigi.cfg, found {FORMAT} = toml: unset it, and write the settings as "
            "`name = value` below [section]"
        )
    parsers = {}
    for path in settings_files():
        parsers[path] = configparser.ConfigParser(interpolation=None)
        if (fault := _fault(path, parsers[path])) is not None:
            raise ExpectedError(fault)
    if (fault := _passed_over(list(parsers.items()))) is not None:
        raise ExpectedError(fault)


def location_of(section: str, name: str) -> str:
    """File and line of a setting, of the file that counts most; ``the settings`` where no file has it."""
    for wanted in (section, configparser.DEFAULTSECT):
        for path in reversed(settings_files()):
            if (line := _line_of(path.read_text(), wanted, name)) is not None:
                return f"{path}, line {line}"
    return "the settings"


def _line_of(text: str, section: str, name: str | None = None) -> int | None:
    """The line, from 1, that begins a setting of a settings file, or its section."""
    setting = None if name is None else re.compile(rf"{re.escape(name)}\s*[=:]")
    current = None
    for number, line in enumerate(text.splitlines(), start=1):
        if (header := SECTION.match(line)) is not None:
            current = header["name"]
            if setting is None and current == section:
                return number
        elif current == section and setting is not None and setting.match(line.strip()):
            return number
    return None


def _fault(path: Path, parser: configparser.ConfigParser) -> str | None:
    """Why a file cannot be read as settings by a new parser."""
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # names keep their case, as for Luigi
    if not path.is_file():
        found = "something else" if path.exists() else "none"
        return f"expected a settings file at {path}, found {found}{_named(path)}"
    try:
        with path.open() as file:
            parser.read_file(file, str(path))
    except OSError as error:
        return f"expected a settings file at {path}, found one that cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        return (
            f"{path}, line {line}: expected {error.encoding} text, found the byte 0x{error.object[error.start]:02x}. "
            f"Save the file as {error.encoding}"
        )
    except configparser.DuplicateOptionError as error:
        first = _line_of(path.read_text(), error.section, error.option)
        return f"{path}: {_twice('setting', f'[{error.section}] {error.option}', first, error.lineno)}"
    except configparser.DuplicateSectionError as error:
        first = _line_of(path.read_text(), error.section)
        return f"{path}: {_twice('section', f'[{error.section}]', first, error.lineno)}"
    except configparser.MissingSectionHeaderError as error:
        if error.line.startswith("\ufeff"):
            return f"{path}, line 1: expected plain text, found a byte order mark. Save the file without it"
        return (
            f"{path}, line {error.lineno}: expected a [section] before settings, found {error.line.strip()!r}"
        )
    except configparser.ParsingError as error:
        line = error.errors[0][0]
        found = path.read_text().splitlines()[line - 1].strip()
        return f"{path}, line {line}: expected `name = value` or [section], found {found!r}"
    return None


def _passed_over(files: Sequence[tuple[Path, configparser.ConfigParser]]) -> str | None:
    """What is said of a setting with dashes that should count, and that Luigi passes over for one with underscores.

    Luigi looks for the former only where no file has the latter, in the same section or for all sections.

    Args:
        files: parsed settings files; later ones override earlier ones.
    """
    texts = {path: path.read_text() for path, _ in files}
    for i, (path, parser) in enumerate(files):
        for section in (configparser.DEFAULTSECT, *parser.sections()):
            for name in parser[section]:
                underscored = name.replace("-", "_")
                line = None if name == underscored else _line_of(texts[path], section, name)
                if line is None or any(
                    _line_of(texts[each], section, underscored) for each, _ in files[i + 1 :]
                ):
                    continue
                places = [(each, section) for each, _ in reversed(files[: i + 1])]
                places += [(each, configparser.DEFAULTSECT) for each, _ in reversed(files)]
                for other, its_section in places:
                    if (its_line := _line_of(texts[other], its_section, underscored)) is None:
                        continue
                    if (other, its_section) == (path, section):
                        return (
                            f"{path}: expected each setting once, found [{section}] {name} in line {line} and "
                            f"{underscored}, which Luigi takes for the same, in line {its_line}"
                        )
                    return (
                        f"{path}, line {line}: expected [{section}] {underscored}, found {name}, which Luigi passes "
                        f"over for [{its_section}] {underscored} in {other}, line {its_line}. Write it with underscores"
                    )
    return None


def _twice(kind: str, found: str, first: int | None, second: int | None) -> str:
    return f"expected each {kind} once, found {found} in lines {first} and {second}"


def _named(path: Path) -> str:
    return f" ({NAMED_BY})" if str(path) == os.environ.get(NAMED_BY) else ""
