"""Keeping the store sound and small: re-reading artifacts, and removing what no kept run refers to."""

from __future__ import annotations

import hashlib
import io
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from spctrl.storage import FileTooLargeError, StoreError, files_at
from spctrl.store.artifacts import artifact_schema
from spctrl.store.pack_index import Location, index_name, pack_name
from spctrl.store.packs import suffix_in
from spctrl.store.provenance import ARTIFACTS, REJECTS, ProvenanceError, is_readable
from spctrl.store.runs import PROVENANCE, Run
from spctrl.store.store import Store
from tasks.dataset.export_state import Ledger, damaged_files, fingerprint_at
from tasks.dataset.index import IMAGE_PATHS, read_image_paths
from tasks.settings import LEDGERS
from tasks.stage.tables import table_faults

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from spctrl.storage import Info

NEVER_COLLECTED = frozenset({"train"})
"""Stages whose results took days: who wants them gone deletes their folders."""
MOSTLY_DEAD = 0.5
"""Packs with a smaller share of live bytes are rewritten."""
RECORDS_PER_REPACK, BYTES_PER_REPACK = 4096, 2**28
"""Of artifacts that wait for a new pack."""
PIECE_BYTES = 2**20
"""Read at a time."""


@dataclass(frozen=True)
class Damage:
    """Something that is not what it was when it was written.

    Attributes:
        place: the file, with the key of the artifact in it.
        fault: what is wrong, in words.
    """

    place: str
    fault: str


def verify(
    store: Store, exports: str | Path, *, repair: bool, advance: Callable[[int], None] = lambda count: None
) -> list[Damage]:
    """Read every artifact, run and exported file again and compare it with its digest.

    Args:
        store: to check.
        exports: ``[paths] export``; the exports below it are checked too.
        repair: strike what is damaged from the indices and take back the runs and exports that name it, so
            that the next build makes it again.
        advance: told the number of packs, runs and exports that were checked since.
    """
    found: list[Damage] = []
    bad_keys: dict[str, set[str]] = defaultdict(set)
    for stage in store.stages():
        for pack in store.packs(stage):
            for key, fault in _damaged_members(store, stage, pack, repair=repair):
                bad_keys[stage].add(key)
                found.append(Damage(f"{store.files.place(pack_name(stage, pack))}: {key}", fault))
            if store.has_damaged_index(stage, pack):
                index = index_name(stage, pack)
                found.append(Damage(store.files.place(index), "the pack's index is damaged"))
                if repair:
                    store.files.remove([index])
            advance(1)
    for run in store.runs(damaged=True):
        faults = _run_faults(store, run, bad_keys[run.stage])
        found += [Damage(run.place(), fault) for fault in faults]
        if repair and (faults or _names(run, bad_keys[run.stage])):
            run.uncommit()
        advance(1)
    for ledger in ledgers(exports):
        damaged = damaged_files(ledger) if ledger.fingerprint else []
        if is_unread := not ledger.fingerprint and bool(fingerprint_at(ledger.place, ledger.name)):
            found.append(Damage(ledger.place.place(ledger.name), "the list of exported files is damaged"))
        found += [
            Damage(ledger.place.place(name), "the exported file is missing or changed") for name in damaged
        ]
        if repair and (damaged or is_unread):
            ledger.fingerprint = ""
            ledger.files = {name: entry for name, entry in ledger.files.items() if name not in set(damaged)}
            ledger.write()
        advance(1)
    return found


def ledgers(exports: str | Path) -> Iterator[Ledger]:
    """The ledgers of all exports below ``[paths] export``."""
    for folder in files_at(exports).folders():
        files = files_at(f"{exports}/{folder}", temporaries=LEDGERS)
        for name in sorted(files.listing(LEDGERS)):
            if name.endswith(".json"):
                yield Ledger.read(files, name)


def _damaged_members(store: Store, stage: str, pack: str, *, repair: bool) -> Iterator[tuple[str, str]]:
    locations = store.pack_locations(stage, pack)
    try:
        with store.files.open(pack_name(stage, pack)) as file:
            faults = _faults(file, locations)
    except FileNotFoundError:
        faults = _faults(io.BytesIO(), locations)
    yield from faults.items()
    if repair and faults:
        store.write_pack_index(
            stage, pack, {key: each for key, each in locations.items() if key not in faults}
        )


def _faults(file: BinaryIO, locations: Mapping[str, Location]) -> dict[str, str]:
    """What is wrong with artifacts in a pack, by key."""
    return {key: fault for key, location in locations.items() if (fault := _fault(file, location))}


def _fault(file: BinaryIO, location: Location) -> str | None:
    if location.code is not None:
        return None
    digest, left = hashlib.sha256(), location.size
    file.seek(location.offset)
    while left and (piece := file.read(min(left, PIECE_BYTES))):
        digest.update(piece)
        left -= len(piece)
    if left:
        return f"expected {location.size} bytes, found {location.size - left}"
    return (
        None
        if digest.hexdigest() == location.digest
        else "its bytes do not have the digest they were written with"
    )


def _run_faults(store: Store, run: Run, bad_keys: set[str]) -> list[str]:
    """What is wrong with a run besides damaged artifacts, which are reported once, at their pack."""
    files = store.files
    try:
        provenance = run.read_provenance()
    except FileNotFoundError:
        return []  # taken back since it was listed
    except (FileTooLargeError, ProvenanceError) as error:
        return [f"{PROVENANCE} is damaged: {error}"]
    if not is_readable(run.stage, provenance):
        return []  # no stage reads its tables, and gc needs only the names of its packs
    sizes = files.sizes(run.name(name) for name in provenance["files"])
    faults = [
        f"{name} is missing or changed"
        for name, entry in provenance["files"].items()
        if sizes.get(run.name(name)) != entry["size"] or not _has_digest(run, name, entry["digest"])
    ]
    packs = {pack_name(run.stage, pack): size for pack, size in provenance["packs"].items()}
    there = files.sizes(packs)
    faults += [
        f"pack {files.place(name)} is missing"
        if name not in there
        else f"pack {files.place(name)} has another size"
        for name, size in packs.items()
        if there.get(name) != size
    ]
    return faults or list(_content_faults(run, provenance["files"], provenance["counts"]))


def _has_digest(run: Run, name: str, digest: str) -> bool:
    try:
        return run.store.files.digest(run.name(name)) == digest
    except (OSError, StoreError):
        return False


def _content_faults(run: Run, names: Iterable[str], counts: Mapping[str, int]) -> Iterator[str]:
    """Files that have their digests, but that no stage could read: this project did not write them."""
    for name in names:
        try:
            yield from table_faults(run, [name], counts)
            if name == IMAGE_PATHS:
                read_image_paths(run)
        except (OSError, FileTooLargeError, ValueError) as error:
            yield f"{name} cannot be read: {error}"


def _names(run: Run, keys: set[str]) -> bool:
    """Whether a run that stages can read refers to one of some keys."""
    provenance = run.provenance() if keys else {}
    return bool(provenance) and not keys.isdisjoint(_keys(run, provenance))


def _keys(run: Run, provenance: Mapping[str, Any]) -> set[str]:
    """Keys of the artifacts and rejects that a run refers to.

    Args:
        run: the run.
        provenance: its provenance in any format, or nothing where it has no sound one. Of a run that no stage reads,
            all keys count that its packs hold.

    Raises:
        StoreError: they cannot be read, so nobody knows what the run needs.
    """
    import pyarrow as pa

    from spctrl.io.parquet import TableError, open_table

    if provenance and not is_readable(run.stage, provenance):
        packs = provenance["packs"]
        return {key for pack in packs for key in run.store.pack_locations(run.stage, pack)}
    found: set[str] = set()
    for name in {ARTIFACTS, REJECTS} & run.files().keys():
        path = run.path(name)
        try:
            table = open_table(path, ["key"])
            if "key" in table.schema_arrow.names:
                keys = table.read(["key"]).column(0).cast(pa.string())
                found |= set(keys.to_pylist())
        except TableError as error:
            raise StoreError(str(error)) from error
        except (OSError, ValueError, pa.ArrowException) as error:
            raise StoreError(
                f"{run.place(name)} cannot be read: {error}. `spctrl verify` drops what is damaged"
            ) from error
    return found - {None}


@dataclass
class Waste:
    """What gc removes, or would.

    Attributes:
        runs: no longer kept.
        packs: (stage, pack) without a live artifact.
        repacked: (stage, pack) of which little is live; that is written into new packs.
        leftovers: names in the store of what killed writers left behind.
        freed_bytes: by all of it together.
    """

    runs: list[Run] = field(default_factory=list)
    packs: list[tuple[str, str]] = field(default_factory=list)
    repacked: list[tuple[str, str]] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    freed_bytes: int = 0


def collect(store: Store, current: Iterable[Run], *, keep: int, grace_s: float, dry_run: bool) -> Waste:
    """Remove runs beyond the kept ones, and what only they referred to.

    Kept are the runs of the present settings, the latest few of every stage and part (at least one where all are of an
    earlier format of the store), trained networks, and every run that a kept one was made from. Whatever is younger
    than the grace time stays: a build under way may have just made it.
    """
    histories = {run: run.history() for run in store.runs(damaged=True)}
    kept = _kept_runs(histories, {run.fingerprint for run in current}, keep, grace_s)
    waste = Waste(runs=[run for run in histories if run not in kept])
    live: dict[str, set[str]] = defaultdict(set)
    for run in kept:
        live[run.stage] |= _keys(run, histories[run])
    now = time.time()
    for stage in store.stages():
        for pack, info in store.packs(stage).items():
            if now - info.modified_at_s < grace_s:
                continue
            share = _live_share(store, stage, pack, live[stage])
            if share >= MOSTLY_DEAD:
                continue
            (waste.repacked if share > 0 else waste.packs).append((stage, pack))
            waste.freed_bytes += int(info.size * (1 - share))
    leftovers = store.files.leftovers(grace_s) | _lone_indices(store, grace_s)
    waste.leftovers = list(leftovers)
    waste.freed_bytes += sum(info.size for info in leftovers.values())
    waste.freed_bytes += sum(info.size for run in waste.runs for info in run.files().values())
    if not dry_run:
        _remove(store, waste, kept, live)
    return waste


def _kept_runs(
    histories: Mapping[Run, Mapping[str, Any]], current: set[str], keep: int, grace_s: float
) -> list[Run]:
    """The runs to keep, and all that those were made from; ``histories`` are provenances by run, latest first."""
    seen: dict[tuple[str, str], int] = defaultdict(int)
    waiting = []
    in_use = {(run.stage, run.part) for run, found in histories.items() if is_readable(run.stage, found)}
    for run in histories:
        seen[run.stage, run.part] += 1
        committed = run.files().get(PROVENANCE)  # none: another process takes it back at this moment
        is_young = committed is None or time.time() - committed.modified_at_s < grace_s
        is_dear = run.stage in NEVER_COLLECTED
        # A store that was not built since an upgrade: the runs that will be made from its artifacts are not known.
        least = 0 if (run.stage, run.part) in in_use else 1
        is_among_latest = seen[run.stage, run.part] <= max(keep, least)
        if is_among_latest or run.fingerprint in current or is_young or is_dear:
            waiting.append(run)
    by_fingerprint = {run.fingerprint: run for run in histories}
    kept: dict[str, Run] = {}
    while waiting:
        run = waiting.pop()
        if run.fingerprint not in kept:
            kept[run.fingerprint] = run
            waiting += [
                by_fingerprint[each]
                for each in (histories[run].get("inputs") or {}).values()
                if each in by_fingerprint
            ]
    return [run for run in histories if run.fingerprint in kept]


def _lone_indices(store: Store, grace_s: float) -> dict[str, Info]:
    """Indices whose pack is gone."""
    listing = store.files.listing("packs")
    indices = {name: info for name, info in listing.items() if name.endswith(".parquet")}
    packs = {PurePosixPath(name).with_suffix("") for name in listing.keys() - indices.keys()}
    return {
        name: info
        for name, info in indices.items()
        if PurePosixPath(name).with_suffix("") not in packs and time.time() - info.modified_at_s > grace_s
    }


def _live_share(store: Store, stage: str, pack: str, live: set[str]) -> float:
    """Share of a pack's artifact bytes that kept runs refer to."""
    locations = store.pack_locations(stage, pack)
    if any(location.code is not None and key in live for key, location in locations.items()):
        return 1.0  # it holds the reason of a record that a kept run rejected
    total = sum(location.size for location in locations.values())
    kept = sum(location.size for key, location in locations.items() if key in live)
    return kept / total if total else 0.0


def _remove(store: Store, waste: Waste, kept: Sequence[Run], live: dict[str, set[str]]) -> None:
    """New packs, then the runs that name old ones, then the old: killed anywhere, nothing kept is lost."""
    moved = _repack(store, waste.repacked, live)
    for run in kept:
        if run.stage in moved:
            _follow(run, moved[run.stage])
    for run in waste.runs:
        run.remove()
    old = (*waste.packs, *waste.repacked)
    store.files.remove(index_name(stage, pack) for stage, pack in old)
    store.files.remove(pack_name(stage, pack) for stage, pack in old)
    store.files.remove(waste.leftovers)


def _repack(
    store: Store, packs: Sequence[tuple[str, str]], live: dict[str, set[str]]
) -> dict[str, dict[tuple[str, str], Location]]:
    """Write live artifacts of old packs into new ones; gives (old pack, key) -> new place, by stage."""
    moved: dict[str, dict[tuple[str, str], Location]] = defaultdict(dict)
    waiting: dict[tuple[str, str], list[tuple[str, str, bytes]]] = defaultdict(list)

    waiting_bytes: Counter[tuple[str, str]] = Counter()

    def flush(stage: str, suffix: str) -> None:
        batch = waiting.pop((stage, suffix), [])
        waiting_bytes[stage, suffix] = 0
        unique = {key: data for _, key, data in batch}
        places = store.write_pack(stage, suffix, list(unique.items())) if unique else {}
        moved[stage] |= {(pack, key): places[key] for pack, key, _ in batch}

    for stage, pack in packs:
        suffix = suffix_in(store.pack_path(stage, pack))
        for key, location in store.pack_locations(stage, pack).items():
            if key in live[stage] and location.code is None:
                data = store.read(stage, location)
                waiting[stage, suffix].append((pack, key, data))
                waiting_bytes[stage, suffix] += len(data)
                if waiting_bytes[stage, suffix] >= BYTES_PER_REPACK:
                    flush(stage, suffix)
        if len(waiting[stage, suffix]) >= RECORDS_PER_REPACK:
            flush(stage, suffix)
    for stage, suffix in list(waiting):
        flush(stage, suffix)
    return moved


def _follow(run: Run, moved: dict[tuple[str, str], Location]) -> None:
    """Let a run name the new places of its artifacts."""
    import pyarrow as pa

    from spctrl.io.parquet import read_table

    if not (provenance := run.provenance()):
        return  # it counts as none, and so it stays
    rows = read_table(run.path(ARTIFACTS)).to_pylist()
    if not any((row.get("pack"), row.get("key")) in moved for row in rows):
        return
    for row in rows:
        if (place := moved.get((row["pack"], row["key"]))) is not None:
            row |= {"pack": place.pack, "offset": place.offset}
    run.uncommit()  # killed in between, the run is made again from its artifacts, and never damaged
    run.write_table(ARTIFACTS, pa.Table.from_pylist(rows, schema=artifact_schema()))
    run.commit({row["pack"] for row in rows}, provenance)
