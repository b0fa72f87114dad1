"""All that a stage's packs hold, for stores as small as a test's."""

from __future__ import annotations

import pyarrow as pa

from tasks.store import Location, Store


def locations(store: Store, stage: str) -> dict[str, Location]:
    """Where each artifact lies, or why there is none, by key; as a build that asks for all keys finds them."""
    keys = [key for pack in store.packs(stage) for key in store.pack_locations(stage, pack)]
    found: dict[str, Location] = {}
    for row in store.results(stage, pa.chunked_array([keys], pa.string())).to_pylist():
        found.setdefault(row.pop("key"), Location(**row))
    return found
