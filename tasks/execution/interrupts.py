"""Ctrl-C while other processes are at work: the first lets them finish what they are at, the second does not."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any, NoReturn


def interrupt_once(signum: int, frame: FrameType | None) -> NoReturn:
    """Handler in a process whose parent is interrupted too, and sends SIGTERM at a second Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signum, signal.SIG_IGN)
    raise KeyboardInterrupt


def leave_second_interrupt_to_parent() -> None:
    """Unwind once, be it for SIGINT or SIGTERM, so that workers and temporary files go as well."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupt_once)


@contextmanager
def first_interrupt(stop: Callable[[], bool]) -> Iterator[None]:
    """Let the first Ctrl-C call ``stop``. It raises KeyboardInterrupt only where that returns false.

    A second one raises it in any case, but for ``interrupt_once``, where it does nothing. Only in the main thread, and
    only where Ctrl-C would raise KeyboardInterrupt.
    """
    previous = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or previous not in (signal.default_int_handler, interrupt_once):
        yield
        return
    assert callable(previous)
    following = signal.SIG_IGN if previous is interrupt_once else previous

    def handle(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, following)
        if not stop():
            previous(signum, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is handle:
            signal.signal(signal.SIGINT, previous)


@contextmanager
def signals_held(signals: Collection[signal.Signals]) -> Iterator[None]:
    """Hold signals back until the end. Processes that are started meanwhile never see them: they inherit the mask.

    The mask does not hold them back from this process where another thread takes them, as one of Luigi's does: Python
    runs their handlers in the main thread all the same, which would leave a process half started.
    """
    held: list[int] = []
    handlers: dict[signal.Signals, Callable[[int, FrameType | None], Any]] = {}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        if threading.current_thread() is threading.main_thread():
            for each in signals:
                if callable(handler := signal.getsignal(each)):
                    handlers[each] = handler
                    signal.signal(each, lambda signum, frame: held.append(signum))
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for each, handler in handlers.items():
            signal.signal(each, handler)
        for signum in held:
            signal.raise_signal(signum)


def interrupts_held() -> AbstractContextManager[None]:
    """Hold Ctrl-C back, likewise."""
    return signals_held({signal.SIGINT})
