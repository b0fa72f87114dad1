"""Progress of a stage: a bar on a terminal, lines elsewhere, and a percentage for Luigi's visualiser."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_EVERY_S = 5.0

Advance = Callable[[int], None]


@contextmanager
def progress(title: str, total: int, set_percentage: Callable[[int], object] | None) -> Iterator[Advance]:
    """Show how far a stage is; the function that is handed out takes how many records were finished since."""
    done = 0
    with _shown(title, total) as show:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            show(done)
            if set_percentage is not None:
                set_percentage(100 * done // max(total, 1))

        yield advance


@contextmanager
def _shown(title: str, total: int) -> Iterator[Advance]:
    if not sys.stderr.isatty():
        yield _line_printer(title, total)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        shown = bar.add_task(title, total=total)
        yield lambda done: bar.update(shown, completed=done)


def _line_printer(title: str, total: int) -> Advance:
    started = last = time.monotonic()

    def show(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_EVERY_S:
            return
        last = now
        left_s = (now - started) / max(done, 1) * (total - done)
        print(f"{title}: {done:,} of {total:,}, about {left_s:,.0f} s left", file=sys.stderr, flush=True)

    return show
