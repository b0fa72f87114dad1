"""The memory that a piece of work takes."""

from __future__ import annotations

import os
import resource
import traceback
from collections.abc import Callable

MIB = 2**20


def memory_of(work: Callable[[], object]) -> int:
    """Bytes that a piece of work adds to the memory of a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            work()
            grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
            os.write(writer, str(grown).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as found:
        return int(found.read())
