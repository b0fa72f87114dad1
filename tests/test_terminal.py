"""Text of unknown origin is shown literally: it cannot colour, clear or rename a terminal, nor add a line to it."""

from __future__ import annotations

import io
import json
import logging
import re
from typing import Any

import pytest
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from spctrl.output.console import FoldedTable, PlainConsole, lines
from spctrl.output.printable import indented, one_line, printable
from spctrl.output.terminal import PrintableLines, say, say_message, say_text
from spctrl.report.text import visible
from tasks.execution import logs

HOSTILE = "a[/x][red]b[link=http://c]\x1b[2J\x1b]0;t\x07\x9b31m\u202e\u2066\u2028\x7f\r\b\nERROR: fake\t\udcff:smile:"
SHOWN = r"a[/x][red]b[link=http://c]\x1b[2J\x1b]0;t\x07\x9b31m\u202e\u2066\u2028\x7f\r\x08\nERROR: fake\t\udcff:smile:"
ACTING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def assert_shown(output: str, *, times: int = 1) -> None:
    assert not ACTING.search(output)
    assert output.count(SHOWN) == times
    assert not re.search("^ERROR: fake", output, re.MULTILINE)
    output.encode()


def test_all_that_acts_on_a_terminal_is_escaped() -> None:
    assert one_line(HOSTILE) == SHOWN
    assert printable(HOSTILE) == SHOWN.replace(r"\n", "\n").replace(r"\t", "\t")
    assert printable("first\n\tsecond é 鹿 🦌") == "first\n\tsecond é 鹿 🦌"
    everything = "".join(map(chr, range(0x11000)))
    assert not ACTING.search(one_line(everything))
    assert indented("wrong:\n  x\nEnd") == "wrong:\n    x\n  End"


def test_lines_stay_lines(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"one {HOSTILE}", HOSTILE)
    say(HOSTILE, err=True)
    found = capsys.readouterr()
    assert_shown(found.out, times=2)
    assert found.out.count("\n") == 2
    assert_shown(found.err)
    say_message(f"wrong: {HOSTILE}\nAll of them: x")
    _, second, third = capsys.readouterr().err.splitlines()
    assert second.startswith("  ERROR: fake") and third == "  All of them: x"
    say_text("| a |\n| \x1b |")
    assert capsys.readouterr().out == "| a |\n| \\x1b |\n"


@pytest.mark.parametrize("width", [60, 2000])
def test_a_console_shows_text_as_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    console = PlainConsole()
    console.say(HOSTILE)
    console.print(HOSTILE, Text("red", style="red"), soft_wrap=True)
    assert_shown(capsys.readouterr().out, times=2)
    console.print(HOSTILE)  # broken where the terminal ends, nothing left out
    table = Table("name", HOSTILE, title=HOSTILE)
    table.add_row("[bold]x", Text(HOSTILE), end_section=True)
    table.add_row("y", lines(HOSTILE, "second"))
    console.print(table)
    output = capsys.readouterr().out
    assert not ACTING.search(output)
    assert "[bold]x" in output
    if width == 2000:
        assert output.count(SHOWN) == 4


@pytest.mark.parametrize("is_terminal", [False, True])
def test_no_text_of_a_table_is_cut(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    stream, path = io.StringIO(), "/a/path" * 40
    table = FoldedTable("stage", "reason")
    table.add_column(path, justify="right")
    table.add_row("export", lines(f"{path}.png is missing", path), path)
    console = PlainConsole(file=stream, force_terminal=is_terminal, **({"width": 60} if is_terminal else {}))
    console.print(table)
    console.print(path, "word " * 40)
    output = stream.getvalue()
    assert "\N{HORIZONTAL ELLIPSIS}" not in output
    assert output.count("/") == 5 * path.count("/")
    assert is_terminal or output.count(path) == 5
    assert max(map(len, output.splitlines())) < 2000


def test_styles_of_a_terminal_remain(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "2000"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    PlainConsole().print(Text(HOSTILE, style="red"), soft_wrap=True)
    output = capsys.readouterr().out
    assert output.startswith("\x1b[31m") and r"\x1b[2J" in output
    assert "\x1b[2J" not in output
    with Progress(TextColumn("{task.description}", markup=False), console=PlainConsole()) as bar:
        bar.add_task(one_line(HOSTILE))
    assert SHOWN in capsys.readouterr().out


def log_output(formatter: logging.Formatter, **values: Any) -> str:
    record = logging.LogRecord("x", logging.ERROR, "", 0, "%s", (HOSTILE,), values.get("exc_info"))
    return formatter.format(record)


def test_log_lines_are_printable() -> None:
    text = log_output(PrintableLines(logging.Formatter("%(levelname)s: %(message)s")))
    assert text == f"ERROR: {indented(HOSTILE)}"
    assert not ACTING.search(text.replace("\t", ""))
    assert json.loads(log_output(logs.JsonLines()))["message"] == HOSTILE
    assert not ACTING.search(log_output(logs.JsonLines()))
    try:
        raise RuntimeError(HOSTILE)
    except RuntimeError as error:
        exc_info = (type(error), error, error.__traceback__)
        text = log_output(PrintableLines(None), exc_info=exc_info)
        assert "Traceback" in text and not ACTING.search(text.replace("\t", ""))
        assert not re.search("^ERROR: fake", text, re.MULTILINE)


def test_luigis_handler_prints_nothing_that_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import luigi_setup

    luigi_setup.configure()

    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    monkeypatch.setattr(logs.LOGGER, "handlers", [handler])
    monkeypatch.setattr(logs.LOGGER, "propagate", False)
    for _ in range(2):
        logs.LOGGER.error("cannot read %s", HOSTILE)
    first, *_ = stream.getvalue().splitlines()
    assert first.startswith(r"ERROR: cannot read a[/x][red]b[link=http://c]\x1b[2J")
    assert not ACTING.search(stream.getvalue().replace("\t", ""))


def test_reports_show_text_as_text() -> None:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(autoescape=True, finalize=visible)
    page = environment.from_string("<p>{{ name }}</p>{{ safe }}{{ names | join }}{{ count }}")
    found = page.render(name=HOSTILE, safe=Markup("<b>\n\x1b</b>"), names=[HOSTILE, "<i>"], count=3)
    assert not ACTING.search(found.replace("\t", ""))
    assert "<b>\n\\x1b</b>" in found and "&lt;i&gt;3" in found
