"""The format of a store: what an earlier or later version of spctrl wrote, and what becomes of it.

A store says its format in ``format.json``, a run in its provenance. Neither says so in format 1, the first.

    1   tables of records and of artifacts are called manifest.parquet
    2   they are called records.parquet and artifacts.parquet

This is the policy for stores of earlier formats. Packs are read as they are: artifacts cost the most. They are found
by their keys, in which the code version counts, so `spctrl accept` keeps them over a change of code. A run is read
where the tables of its stage have not changed since its format; another one is no damage, but the stage writes it
again, from the artifacts in its packs. gc keeps what the latest runs refer to, whatever their format. A store of a
later format is refused, so that an earlier version can remove nothing from it; versions that know format 1 alone do not
look, and have to be kept away from a store that was built since.
"""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING

from spctrl.storage import FileTooLargeError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from spctrl.store.store import Store

FORMAT, FIRST_FORMAT = 2, 1
FORMAT_FILE = "format.json"


def read_format(store: Store) -> int | None:
    """The format that a store says it has; None where it says none.

    Raises:
        StoreError: what it says is no format.
    """
    try:
        found = store.files.read_json(FORMAT_FILE)
    except FileNotFoundError:
        return None
    except FileTooLargeError as error:
        raise _format_error(store, "a large file") from error
    except ValueError as error:
        raise _format_error(store, "no JSON") from error
    number = found.get("format") if isinstance(found, dict) else None
    if type(number) is not int or number < FIRST_FORMAT:
        raise _format_error(store, "something else")
    return number


def _format_error(store: Store, found: str) -> StoreError:
    return StoreError(
        f'{store.files.place(FORMAT_FILE)}: expected {{"format": N}} with N from {FIRST_FORMAT} to {FORMAT}, found '
        f"{found}. Restore the file, or remove it if no later version of spctrl wrote to the store"
    )


@functools.cache  # once a process
def refuse_later_format(store: Store) -> None:
    """Refuse a store that a later version wrote: this one could misread it.

    Raises:
        StoreError: its format is later than ``FORMAT``, or cannot be read.
    """
    _refuse_later(store, read_format(store))


def _refuse_later(store: Store, found: int | None) -> None:
    if found is not None and found > FORMAT:
        raise StoreError(
            f"expected a store of format {FORMAT} or earlier at {store.files.root}, found format {found}, which a "
            "later version of spctrl wrote. Install that version, or set [paths] store to another folder"
        )


def upgrade_format(store: Store, notify: Callable[[str], object]) -> None:
    """Write the present format into a store that is about to be written to.

    Args:
        store: the store.
        notify: called with a message where an earlier version wrote to the store.

    Raises:
        StoreError: a later version wrote to it meanwhile, or its format cannot be read.
    """
    found = read_format(store)
    _refuse_later(store, found)
    if found == FORMAT:
        return
    if store.stages():
        notify(
            f"{store.files.root}: an earlier version of spctrl wrote this store (format {found or FIRST_FORMAT}, now "
            f"{FORMAT}). Results of earlier code are made again unless they are accepted: stop this build to run "
            "`spctrl accept --all` first. Do not use the earlier version on this store any more"
        )
    store.files.write(FORMAT_FILE, json.dumps({"format": FORMAT}).encode())
