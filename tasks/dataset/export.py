"""The export stage: triplet folders, shards, and the manifest where users look for it, in step with the store.

An export is a view: it can be deleted at any time. Its ledger says which files it holds and what each was
made from, so that only changed files are written and nothing stale stays.
"""

from __future__ import annotations

import errno
import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from spctrl.io.documents import MAX_DOCUMENT_BYTES
from spctrl.paths import UnsafePathError
from spctrl.storage import Files, Folder, StoreError
from spctrl.storage.files import cannot_write, file_digest
from spctrl.store.artifacts import Artifacts
from spctrl.store.digests import InputChangedError, content_digest, digest, digest_cache
from spctrl.store.provenance import MANIFEST, RECORDS
from spctrl.store.runs import Run, struck_out
from tasks import settings
from tasks.dataset.export_state import TEXT, UNFINISHED, Entry, Ledger, fingerprint_at, may_be_exported
from tasks.dataset.index import AnnotationFile
from tasks.dataset.manifest import Manifest
from tasks.execution import logs
from tasks.execution.progress import progress
from tasks.settings import LEDGERS
from tasks.stage.fingerprints import code_of

if TYPE_CHECKING:
    import pyarrow as pa

    from spctrl.export.shards import ReadFiles
    from tasks.execution.progress import Advance
    from tasks.execution.worker import Source
    from tasks.stage.base import StageTask

LOCK = f"{LEDGERS}/lock"


CATEGORIES = ".categories"
"""Suffix of a split's own categories, which lie beside its ledger."""
IMAGE, HEATMAPS = "image", "heatmaps"
REWRITTEN = "rewritten"
"""An image of which there is a copy with another orientation tag, not a link."""
FOLDERS = "folders"
DISPLAY_EVERY = 256
LINKS_REFUSED = frozenset(
    {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS, errno.EIO}
)
"""What systems answer that have no such links, or not there; EIO is sshfs's answer with follow_symlinks."""


class Wanted(NamedTuple):
    """A file that the export should hold for an image."""

    path: str
    made_from: str
    kind: str
    image_id: int
    file_name: str


class WantedShard(NamedTuple):
    """A file of many samples that the export should hold; ``rows`` are the manifest's."""

    path: str
    made_from: str
    kind: str
    rows: pa.Table


class Export(Manifest):
    """The split in the formats that are asked for: triplet folders, WebDataset tars, Parquet files with images."""

    stage = "export"
    function = "spctrl.export.text_files:record_lines"
    also_reaches: ClassVar[Sequence[str]] = (
        "spctrl.export.text_files:categories_json",
        "spctrl.export.text_files:merged_categories",
        "spctrl.export.text_files:heatmaps_npy",
        "spctrl.export.links:Linker",
        "spctrl.data.orientation:without_orientation",
        "spctrl.export.shards:SHARD_WRITERS",
        "spctrl.export.shards:shard_columns",
        "spctrl.export.shards:shard_rows",
        "spctrl.export.layout:Layout",
        "spctrl.data.datasets:DATASETS",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Splits of one dataset share its export folder, so Luigi's workers take turns at it.
        self.resources = {f"export {self.dataset}": 1}

    def requires(self) -> list[StageTask]:
        return [self.clone(Manifest)]

    def parameters(self) -> dict[str, Any]:
        return {
            **super().parameters(),
            "link": settings.export().link,
            "heatmaps": self.has_heatmaps,
            "format": self.formats,
            **({"shard_images": settings.export().shard_images} if self.shard_kinds else {}),
        }

    @functools.cached_property
    def formats(self) -> tuple[str, ...]:
        return tuple(sorted(settings.export().format))

    @property
    def shard_kinds(self) -> list[str]:
        return [name for name in self.formats if name != FOLDERS]

    @functools.cached_property
    def place(self) -> Files:
        """Where all splits of the dataset are exported to."""
        return settings.export_files(self.layout.folder)

    @functools.cached_property
    def folder(self) -> Folder:
        """The same as a folder, for triplet folders."""
        return Folder(settings.export_folder("export.format = folders") / self.layout.folder, LEDGERS)

    @functools.cached_property
    def has_heatmaps(self) -> bool:
        section = settings.export()
        return section.heatmaps == "yes" or (section.heatmaps == "auto" and section.names == "released")

    @property
    def ledger_name(self) -> str:
        return f"{LEDGERS}/{self.layout.split_name}.json"

    @property
    def view_address(self) -> str:
        return self.place.root

    def is_up_to_date(self) -> bool:
        run = self.current_run()
        if run is None or not super().is_up_to_date():
            return False
        landmarks = set(self._landmarks())
        is_there = self.place.sizes(landmarks).keys() == landmarks
        return is_there and fingerprint_at(self.place, self.ledger_name) == self._view_fingerprint(run)

    def _view_fingerprint(self, run: Run) -> str:
        """What an export is of: of a run, and as long as it links images, of the dataset at one address."""
        has_links = FOLDERS in self.formats and settings.export().link != "copy"
        return digest(run.fingerprint, self._images_at) if has_links else run.fingerprint

    @functools.cached_property
    def _images_at(self) -> str:
        """Where links lead: a moved dataset leaves links behind that lead nowhere, or to other images."""
        return str(self.root.resolve())

    def _landmarks(self) -> Iterator[str]:
        """One file, or a few, of each format: a look at all files would take long."""
        yield self.layout.manifest
        if FOLDERS in self.formats:
            yield from (self.layout.records, self.layout.categories)
        yield from (self.layout.shard(kind, 0) for kind in self.shard_kinds)

    def run(self) -> None:
        # Another build may be writing the same folder; when it is done, there may be nothing left to do.
        with self.place.exclusive(LOCK, f"exporting to {self.place.root}", logs.notify):
            super().run()

    def make(self, run: Run) -> dict[str, int]:
        source = self.clone(Manifest).finished_run()
        wanted = {each.path: each for each in self._wanted(source)} if FOLDERS in self.formats else {}
        shards = {each.path: each for each in self._wanted_shards(source)}
        texts = dict(self._texts(source))
        _check_paths([*wanted, *shards, *texts], source)
        old = Ledger.read(self.place, self.ledger_name)
        there = self.place.sizes([*shards, *texts])
        changed = [
            each
            for each in wanted.values()
            if old.files.get(each.path, UNFINISHED).made_from != each.made_from
        ]
        changed_shards = [
            each
            for each in shards.values()
            if old.files.get(each.path, UNFINISHED).made_from != each.made_from or each.path not in there
        ]
        changed_texts = {
            path: data
            for path, data in texts.items()
            if old.files.get(path, UNFINISHED).digest != content_digest(data) or path not in there
        }
        # From here on the folder is neither the old export nor the new one; a killed build must not pass for
        # either, and whatever it wrote must be known.
        ledger = Ledger(self.place, self.ledger_name, "", dict(old.files))
        written = [each.path for each in changed]
        written += [*(each.path for each in changed_shards), *changed_texts]
        ledger.files |= dict.fromkeys(written, UNFINISHED)
        ledger.write()
        self.place.remove(self.place.leftovers(older_than_s=0))
        with progress(f"{self.stage} {self.part}", len(changed), self.set_progress_percentage) as advance:
            self._write_changed(source, changed, ledger, advance)
        self._write_shards(source, changed_shards, ledger)
        put = self._put if FOLDERS in self.formats else self.place.write
        for path, data in changed_texts.items():
            put(path, data)
            ledger.files[path] = Entry(TEXT, content_digest(data))
        stale = ledger.files.keys() - wanted.keys() - shards.keys() - texts.keys()
        for path in stale:
            del ledger.files[path]
        self._settle_with_other_splits(stale, ledger)
        self._must_be_there([*written, self.ledger_name])
        ledger.fingerprint = self._view_fingerprint(run)
        ledger.write()
        total, made = len(wanted) + len(shards) + len(texts), len(written)
        return {"records": total, "made": made, "found": total - made, "removed": len(stale)}

    def _must_be_there(self, names: Sequence[str]) -> None:
        """Files that were written may have been deleted since; the ledger must not speak for them."""
        if gone := set(names) - self.place.sizes(names).keys():
            raise StoreError(
                f"{len(gone):,} files of {self.place.root} were deleted while it was written, {min(gone)} among them. "
                "Run again"
            )

    def _settle_with_other_splits(self, stale: set[str], ledger: Ledger) -> None:
        """Remove stale files that no other split holds, and have splits look again whose files this one changed.

        The categories are those of all splits, whichever wrote them.
        """
        others = [
            Ledger.read(self.place, name)
            for name in self.place.listing(LEDGERS)
            if name.endswith(".json") and name != self.ledger_name
        ]
        self.place.remove(stale - {path for other in others for path in other.files})
        for other in others:
            if theirs := {
                path for path, entry in other.files.items() if ledger.files.get(path, entry) != entry
            }:
                shared = theirs & {self.layout.categories}
                other.files |= {path: ledger.files[path] for path in shared}
                if theirs - shared:
                    other.fingerprint = ""
                    other.files |= dict.fromkeys(theirs - shared, UNFINISHED)
                other.write()

    def _wanted(self, source: Run) -> Iterator[Wanted]:
        """Every file that belongs to one image."""
        from spctrl.io.parquet import open_table

        link = settings.export().link
        leads_to = "" if link == "copy" else f" {digest(self._images_at)}"
        code = digest(json.dumps(self.code_and_parameters()["code"]))
        drawings = self._drawing_digests() if self.has_heatmaps else {}
        rewriting = self._rewriting_code()
        columns = ["image_id", "file_name", "image_path", "image_digest", "image_orientation"]
        columns += [f"{name}_{what}" for name in self.conditions for what in ("path", "digest")]
        for batch in open_table(source.path(MANIFEST), columns).iter_batches(columns=columns):
            for row in batch.to_pylist():
                image_id, name = row["image_id"], row["file_name"]
                if row["image_path"] is not None:
                    kind, how, at = (
                        (IMAGE, link, leads_to) if _is_upright(row) else (REWRITTEN, rewriting, "")
                    )
                    yield Wanted(row["image_path"], f"{how} {row['image_digest']}{at}", kind, image_id, name)
                for condition in self.conditions:
                    if (path := row[f"{condition}_path"]) is not None:
                        yield Wanted(path, row[f"{condition}_digest"], condition, image_id, name)
                if self.has_heatmaps:
                    if image_id not in drawings:
                        index = self.index_task().finished_run()
                        raise struck_out([source, index], f"expected images of the index, found {image_id}")
                    made_from = digest(code, drawings[image_id])
                    yield Wanted(self.layout.heatmaps(name), made_from, HEATMAPS, image_id, name)

    def _wanted_shards(self, source: Run) -> Iterator[WantedShard]:
        """Rows of the manifest, each group of which becomes a file."""
        if not self.shard_kinds:
            return
        from spctrl.export.shards import shard_columns, shard_rows
        from spctrl.io.parquet import open_table, parquet_bytes, read_table

        path, size = source.path(MANIFEST), settings.export().shard_images
        table = read_table(path, columns=shard_columns(open_table(path, []).schema_arrow))
        for kind in self.shard_kinds:
            code = digest(json.dumps(code_of((f"spctrl.export.shards:write_{kind}",), self.store)))
            for number, rows in enumerate(shard_rows(table, kind, size)):
                content = content_digest(parquet_bytes(rows))  # the rows name the files by digest
                if not all(map(_is_upright, rows.select(["image_orientation"]).to_pylist())):
                    content = digest(content, self._rewriting_code())
                yield WantedShard(self.layout.shard(kind, number), digest(code, content), kind, rows)

    def _rewriting_code(self) -> str:
        """A digest of what sets orientation tags."""
        return digest(json.dumps(code_of(("spctrl.data.orientation:without_orientation",), self.store)))

    def _drawing_digests(self) -> dict[int, str]:
        from spctrl.io.parquet import read_table

        columns = ["image_id", "drawing_digest"]
        table = read_table(self.index_task().finished_run().path(RECORDS), columns=columns)
        return dict(zip(*(table.column(name).to_pylist() for name in columns), strict=True))

    def _write_changed(self, source: Run, changed: list[Wanted], ledger: Ledger, advance: Advance) -> None:
        from spctrl.export.links import Linker

        locations = {name: Artifacts(task.finished_run()) for name, task in self.condition_tasks().items()}
        heatmaps = {each.image_id: each for each in changed if each.kind == HEATMAPS}
        images, link = self._unchanged_images(changed), settings.export().link
        linker = Linker(link, logs.notify)
        for count, each in enumerate(changed, 1):
            if each.kind == IMAGE:
                image, target = images[each.file_name], self.folder.local(each.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    linker.link(image, target, temporary=self.folder.temporary(each.path))
                except OSError as error:
                    if link not in ("hard", "symbolic") or error.errno not in LINKS_REFUSED:
                        raise cannot_write(target, error) from error
                    raise StoreError(
                        f"cannot make a {link} link to {image} at {target}: {error.strerror}; set [export] link = copy"
                    ) from error
                ledger.files[each.path] = Entry(each.made_from, each.made_from.split(" ")[1])
            elif each.kind == REWRITTEN:
                (path,) = self.image_files([each.file_name])
                data = self._upright_image(path, each.made_from.split(" ")[1])
                self._put(each.path, data)
                ledger.files[each.path] = Entry(each.made_from, content_digest(data))
            elif each.kind != HEATMAPS:
                found = locations[each.kind].listed(each.image_id, source)
                self._put(each.path, self.store.read(each.kind, found))
                ledger.files[each.path] = Entry(each.made_from, found.digest)
            if count % DISPLAY_EVERY == 0:
                advance(DISPLAY_EVERY)
        self._write_heatmaps(heatmaps, ledger)

    def _unchanged_images(self, wanted: Iterable[Wanted]) -> dict[str, Path]:
        """The source images to be linked, by name, which are what the manifest says: a link is not read."""
        digests = {each.file_name: each.made_from.split(" ")[1] for each in wanted if each.kind == IMAGE}
        images = self.image_files(list(digests))
        found = digest_cache(self.store).file_digests([str(path) for path in images])
        for path, present, expected in zip(images, found, digests.values(), strict=True):
            if present != expected:
                raise InputChangedError(f"{path} changed during the build; run again once it is stable")
        return dict(zip(digests, images, strict=True))

    def _upright_image(self, path: Path, image_digest: str) -> bytes:
        """A source image with its orientation tag set to 1."""
        from spctrl.data.orientation import without_orientation
        from tasks.execution.worker import FileSource

        return without_orientation(self._read(FileSource(str(path), image_digest)))

    def _read(self, source: Source) -> bytes:
        from tasks.execution.worker import read_source

        try:
            return read_source(self.store, source)
        except OSError as error:
            raise InputChangedError(
                f"cannot read {error.filename}: {error.strerror}. It was there when the build looked; run again"
            ) from error

    def _write_heatmaps(self, wanted: dict[int, Wanted], ledger: Ledger) -> None:
        if not wanted:
            return
        from spctrl.data.records import records_from_table
        from spctrl.export.text_files import heatmaps_npy
        from spctrl.io.parquet import open_table

        index = open_table(self.index_task().finished_run().path(RECORDS))
        with progress(f"{HEATMAPS} {self.part}", len(wanted), self.set_progress_percentage) as advance:
            for batch in index.iter_batches(DISPLAY_EVERY):
                records = [record for record in records_from_table(batch) if record.image_id in wanted]
                for record in records:
                    each, data = wanted[record.image_id], heatmaps_npy(record)
                    self._put(each.path, data)
                    ledger.files[each.path] = Entry(each.made_from, content_digest(data))
                advance(len(records))

    def _write_shards(self, source: Run, changed: list[WantedShard], ledger: Ledger) -> None:
        if not changed:
            return
        from spctrl.export.shards import SHARD_WRITERS

        names = [IMAGE, *(name for name in self.conditions if name != "latents")]
        locations = {name: Artifacts(self.condition_tasks()[name].finished_run()) for name in names[1:]}
        total = sum(len(each.rows) for each in changed)
        with progress(f"shards {self.part}", total, self.set_progress_percentage) as advance:
            for each in changed:
                with self.place.create(each.path) as temporary:
                    read_files = self._file_reader(source, each.rows, locations)
                    SHARD_WRITERS[each.kind](temporary, each.rows, names, read_files)
                    found = file_digest(temporary)
                ledger.files[each.path] = Entry(each.made_from, found)
                advance(len(each.rows))

    def _file_reader(self, source: Run, rows: pa.Table, locations: dict[str, Artifacts]) -> ReadFiles:
        """What reads the image, with its orientation tag set to 1, and the conditions of one of the rows."""
        from tasks.execution.worker import ArtifactSource, FileSource

        columns = ["image_id", "file_name", "image_digest", "image_orientation"]
        listed = {row["image_id"]: row for row in rows.select(columns).to_pylist()}
        names = rows.column("file_name").to_pylist()
        images = dict(zip(names, self.image_files(names), strict=True))

        def read_files(image_id: int) -> dict[str, bytes]:
            row, files = listed[image_id], {}
            path, image_digest = images[row["file_name"]], row["image_digest"]
            if not _is_upright(row):
                files[IMAGE] = self._upright_image(path, image_digest)
            elif image_digest is not None:
                files[IMAGE] = self._read(FileSource(str(path), image_digest))
            for name, places in locations.items():
                files[name] = self._read(ArtifactSource(name, places.listed(image_id, source)))
            return files

        return read_files

    def _texts(self, source: Run) -> Iterator[tuple[str, bytes]]:
        """The manifest and, in folders, JSON lines and categories; for HumanArt also one JSON file an image and
        the annotation file itself.
        """
        yield self.layout.manifest, source.path(MANIFEST).read_bytes()
        if FOLDERS not in self.formats:
            return
        from spctrl.export.text_files import categories_json, merged_categories, record_lines
        from spctrl.io.parquet import read_table

        layout = self.layout
        annotation_path = AnnotationFile(dataset=self.dataset, split=self.split).path
        ids = read_table(source.path(MANIFEST), columns=["image_id"]).column(0).to_pylist()
        lines = []
        for file_name, line in record_lines(annotation_path, layout, set(ids)):
            lines.append(line)
            if self.dataset == "humanart":
                yield layout.pose(file_name), line
        yield layout.records, b"".join(line + b"\n" for line in lines)
        self.place.write(
            f"{LEDGERS}/{layout.split_name}{CATEGORIES}", categories_json(annotation_path, self.spec)
        )
        parts = [name for name in self.place.listing(LEDGERS) if name.endswith(CATEGORIES)]
        yield (
            layout.categories,
            merged_categories(
                {
                    Path(name).name.removesuffix(CATEGORIES): self.place.read(
                        name, max_bytes=MAX_DOCUMENT_BYTES
                    )
                    for name in parts
                }
            ),
        )
        if self.dataset == "humanart":
            yield f"annotations/{annotation_path.name}", annotation_path.read_bytes()

    def _put(self, path: str, data: bytes) -> None:
        """Write a small file of the triplet folders. The ledger says if it was cut off, so a new one is written as it
        is; what is there is replaced, never written into: it may link to a source.
        """
        target = self.folder.local(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                file.write(data)
        except FileExistsError:
            self.place.write(path, data)
        except OSError as error:
            raise cannot_write(target, error) from error


def _is_upright(row: dict[str, Any]) -> bool:
    """Whether a manifest's image, if there is one, looks the same to readers that apply orientation tags."""
    return row["image_orientation"] in (None, 1)


def _check_paths(paths: Iterable[str], source: Run) -> None:
    """Refuse paths of exported files that lead out of the export, or to where its ledgers are.

    Raises:
        UnsafePathError: names one.
    """
    for path in paths:
        if not may_be_exported(path):
            raise UnsafePathError(
                f"expected paths of files below the export folder in {source.place(MANIFEST)}, found {path!r}. No "
                f"build writes such a manifest: remove {source.place()} and build again"
            )
