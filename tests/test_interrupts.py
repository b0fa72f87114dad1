"""Ctrl-C that is held back while a process starts."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from tasks.execution.interrupts import first_interrupt, interrupts_held

SOON_S = 0.2
"""How long an interrupt may take to arrive; a slow one is held back all the same."""


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[None]:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def other_thread() -> Iterator[None]:
    """A thread that takes signals, as Luigi's has one: Python's main thread runs their handlers all the same."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    yield
    done.set()
    thread.join()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(SOON_S)


@pytest.mark.usefixtures("other_thread")
def test_an_interrupt_waits_for_the_end_whichever_thread_takes_it() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt):
        with interrupts_held(), interrupts_held():
            interrupt()
            reached.append("end of the block")
        reached.append("what follows")
    assert reached == ["end of the block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("other_thread")
def test_an_interrupt_that_is_held_back_reaches_the_handler_of_running_work() -> None:
    stops = []

    def stop() -> bool:
        stops.append("stop")
        return True

    with first_interrupt(stop), interrupts_held():
        interrupt()
        assert stops == []
    assert stops == ["stop"]


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_without_an_interrupt_the_handler_stays(handler: signal.Handlers) -> None:
    signal.signal(signal.SIGINT, handler)
    with interrupts_held():
        pass
    assert signal.getsignal(signal.SIGINT) is handler


def test_in_another_thread_the_handler_is_left_alone() -> None:
    found: list[object] = []

    def hold() -> None:
        with interrupts_held():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
