"""Progress of a stage: a bar on a terminal, lines elsewhere, and a percentage for Luigi's visualiser."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from spctrl.output.printable import one_line
from spctrl.output.terminal import say
from tasks.execution import logs

LINE_EVERY_S = 5.0
LAST_WORD_S = 1.0
"""What a stage waits at its end until the scheduler has heard of it."""

_Show = Callable[[int, str], None]


class Advance(Protocol):
    """Takes how many records were finished since, and what else there is to say, in a few words."""

    def __call__(self, count: int, note: str = "") -> None: ...


@contextmanager
def progress(title: str, total: int, set_percentage: Callable[[int], object] | None) -> Iterator[Advance]:
    """Show how far a stage is; the function that is handed out is told of what is done."""
    done = 0
    with _shown(title, total) as show, _told(set_percentage) as tell:

        def advance(count: int, note: str = "") -> None:
            nonlocal done
            done += count
            show(done, note)
            tell(100 * done // max(total, 1))

        yield advance


@contextmanager
def _told(set_percentage: Callable[[int], object] | None) -> Iterator[Callable[[int], None]]:
    """Tell the scheduler of each new percentage, in a thread.

    A scheduler on another machine may be away. Luigi then tries again for a while, and raises: the work must neither
    wait for that nor fail of it.
    """
    if set_percentage is None:
        yield lambda percentage: None
        return
    news: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    told = -1

    def tell(percentage: int) -> None:
        nonlocal told
        if percentage != told:
            told = percentage
            news.put(percentage)

    def pass_on() -> None:
        while (percentage := news.get()) is not None:
            with suppress(Exception):
                set_percentage(percentage)

    messenger = threading.Thread(target=pass_on, daemon=True)
    messenger.start()
    try:
        yield tell
    finally:
        news.put(None)
        messenger.join(LAST_WORD_S)


@contextmanager
def _shown(title: str, total: int) -> Iterator[_Show]:
    if logs.are_json():
        yield _event_logger(title, total)
        return
    if not sys.stderr.isatty():
        yield _line_printer(title, total)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from spctrl.output.console import PlainConsole

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=PlainConsole(stderr=True)) as bar:
        shown = bar.add_task(one_line(title), total=total, note="")
        yield lambda done, note: bar.update(shown, completed=done, note=one_line(note))


def _line_printer(title: str, total: int) -> _Show:
    def show_line(done: int, left_s: float | None, note: str) -> None:
        facts = [f"{title}: {done:,} of {total:,}"]
        if left_s is not None:
            facts.append(f"about {left_s:,.0f} s left")
        say(", ".join([*facts, note] if note else facts), err=True)

    return _now_and_then(show_line, total)


def _event_logger(title: str, total: int) -> _Show:
    def say(done: int, left_s: float | None, note: str) -> None:
        left = None if left_s is None else round(left_s, 1)
        logs.event("progress", what=title, done=done, total=total, left_s=left, note=note)

    return _now_and_then(say, total)


def _now_and_then(say: Callable[[int, float | None, str], None], total: int) -> _Show:
    """Pass on what is shown every few seconds, with the seconds that are left as far as that can be told."""
    last = time.monotonic()
    first: tuple[float, int] | None = None

    def show(done: int, note: str) -> None:
        nonlocal last, first
        now = time.monotonic()
        if first is None:
            # What an earlier build did counts at once, and says nothing of how fast this one is.
            first = now, done
        if now - last < LINE_EVERY_S:
            return
        last = now
        left_s = (now - first[0]) / (done - first[1]) * (total - done) if done > first[1] else None
        say(done, left_s, note)

    return show
