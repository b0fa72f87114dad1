"""Settings: where and how. Sections of luigi.cfg; each can be given on the command line as ``--<section>-<name>``."""

# ruff: noqa: N801 - Luigi names a section after its class

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import luigi

from spctrl.errors import ExpectedError
from spctrl.output.secrets import without_secrets
from spctrl.storage import Files, files_at, is_url
from spctrl.store.digests import digest
from spctrl.store.format import refuse_later_format
from spctrl.store.store import CACHE, Store
from tasks.parameters import NamesParameter, PathParameter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spctrl.data.datasets import Dataset


class SaysWhatIsWrong(luigi.Task):
    """Names a setting that cannot be read, and why; Luigi keeps the reason for a traceback."""

    @classmethod
    def get_param_values(cls, params: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().get_param_values(params, args, kwargs)
        except ValueError:
            for name, parameter in params:
                if name in kwargs:
                    continue
                try:
                    parameter.has_task_value(cls.get_task_family(), name)
                except (ExpectedError, ValueError) as error:
                    section, setting = place_of(cls, name, parameter)
                    raise ExpectedError(f"[{section}] {setting}: {error}") from error
            raise


class OfSettings(SaysWhatIsWrong):
    """A task that is another one under other settings, also to a scheduler that serves several builds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.task_id = f"{self.task_id}_{settings_digest()}"
        warn_of_settings_without_effect()


class Section(SaysWhatIsWrong, luigi.Config):
    """A section of luigi.cfg."""


class paths(Section):
    """Folders; relative ones are below the folder that the command runs in."""

    data = PathParameter(default="data", description="folder of the raw datasets")
    weights = PathParameter(default="weights", description="folder of the models' weights")
    store = PathParameter(
        default="store", description="folder of everything computed, or a URL such as s3://bucket/store"
    )
    export = PathParameter(
        default="exports", description="folder or URL of the exported datasets, manifests and the report"
    )
    cache = PathParameter(
        default="",
        description="folder on this machine for digests of files and copies of a store that is elsewhere; default: the "
        f"store itself, or {CACHE} where that is a URL",
    )


class ap10k(Section):
    root = PathParameter(default="{data}/AP-10K", description="folder with annotations/ and data/")
    split_id = luigi.ChoiceParameter(
        default="1", choices=["1", "2", "3"], description="which of AP-10K's three splits"
    )


class humanart(Section):
    root = PathParameter(default="{data}/HumanArt", description="folder with annotations/ and images/")
    subset = luigi.Parameter(
        default="humanart",
        description="annotation files {training,validation}_<subset>.json, such as humanart_coco",
    )


class executor(Section):
    kind = luigi.ChoiceParameter(
        default="local",
        choices=["local", "ray"],
        description="where record batches are worked on: by processes on this machine, or on a Ray cluster",
    )
    address = luigi.Parameter(
        default="auto",
        description="ray: host:port of the cluster's head; auto: the cluster that this machine is a node of",
    )
    workers = luigi.IntParameter(
        default=0, description="worker processes; 0: one for each core, of this machine or of the cluster"
    )
    device = luigi.Parameter(
        default="auto",
        description="of image models: auto (all GPUs, or the CPU), cpu, cuda:N or several, as in cuda:0,1; with ray, "
        "cuda:N is any GPU",
    )


class log(Section):
    format = luigi.ChoiceParameter(
        default="text", choices=["text", "json"], description="json: one object a line, on standard error"
    )


class index(Section):
    max_pixels = luigi.IntParameter(
        default=100_000_000, description="largest image that is accepted, in pixels"
    )


class spatext(Section):
    keypoint_radius_px = luigi.IntParameter(default=4, description="radius of a keypoint's disc")
    link_half_width_px = luigi.IntParameter(default=4, description="half the width of a link's ellipse")


class openpose(Section):
    style = luigi.ChoiceParameter(
        default="openpose",
        choices=["openpose", "keypoints", "coco", "mmpose"],
        description="colours of the render",
    )
    keypoint_radius_px = luigi.IntParameter(default=4, description="radius of a keypoint's disc")
    link_half_width_px = luigi.IntParameter(default=4, description="half the width of a link's ellipse")


class mask(Section):
    backend = luigi.ChoiceParameter(
        default="precomputed", choices=["precomputed", "sam_hq", "sam"], description="where masks come from"
    )
    folder = PathParameter(
        default="{root}/mask", description="precomputed: 8-bit PNG masks, 0 or 255, in the images' layout"
    )
    model_type = luigi.ChoiceParameter(
        default="vit_h", choices=["vit_h", "vit_l", "vit_b", "vit_tiny"], description="vit_tiny: sam_hq only"
    )
    weights = PathParameter(default="", description="file; default: the one of weights.yaml")
    prompt = luigi.ChoiceParameter(
        default="box", choices=["box", "points"], description="what points at an instance"
    )
    empty = luigi.ChoiceParameter(
        default="reject", choices=["reject", "keep"], description="what becomes of images with an empty mask"
    )
    batch_size = luigi.IntParameter(default=0, description="images in one pass; 0: 8 on a GPU, 4 on a CPU")


class depth(Section):
    backend = luigi.ChoiceParameter(
        default="precomputed", choices=["precomputed", "zoedepth"], description="where depth maps come from"
    )
    folder = PathParameter(
        default="{root}/depth", description="precomputed: 8-bit PNG depth maps, near is bright"
    )
    weights = PathParameter(default="", description="folder; default: the one of weights.yaml")
    batch_size = luigi.IntParameter(default=0, description="images in one pass; 0: 8 on a GPU, 4 on a CPU")


class latents(Section):
    resolution = luigi.IntParameter(default=512, description="side of the training crop in pixels")
    weights = PathParameter(default="", description="folder; default: the one of weights.yaml")
    batch_size = luigi.IntParameter(default=0, description="images in one pass; 0: 8 on a GPU, 4 on a CPU")


class generate(Section):
    batch_size = luigi.IntParameter(default=0, description="images in one pass; 0: 8 on a GPU, 4 on a CPU")


class train(Section):
    num_processes = luigi.IntParameter(
        default=1, description="processes that train together, one for each GPU; a step has the images of all"
    )


class export(Section):
    format = NamesParameter(
        default=("folders",),
        choices=("folders", "webdataset", "parquet"),
        description="triplet folders, WebDataset tars, Parquet files with image columns",
    )
    shard_images = luigi.NumericalParameter(
        default=1000,
        var_type=int,
        min_value=1,
        max_value=1_000_000,
        description="images in a WebDataset tar or Parquet file",
    )
    names = luigi.ChoiceParameter(
        default="readme",
        choices=["readme", "released"],
        description="file names of SP-Ctrl's README or of its loaders",
    )
    link = luigi.ChoiceParameter(
        default="auto",
        choices=["auto", "hard", "symbolic", "copy"],
        description="how source images get into an export; auto: hard link, else symbolic link, else copy",
    )
    heatmaps = luigi.ChoiceParameter(
        default="auto",
        choices=["auto", "yes", "no"],
        description="keypoint heatmaps as .npy, 0.56 MB an image; auto: with the released names",
    )


LEDGERS = ".spctrl"
"""Folder in an export for what the pipeline keeps there, half written files among it: loaders list the others."""


def store() -> Store:
    """Where everything computed goes.

    Raises:
        StoreError: a later version of spctrl wrote it.
    """
    found = Store(str(paths().store), str(paths().cache))
    refuse_later_format(found)
    return found


def export_files(folder: str = "") -> Files:
    """Where users look for datasets, manifests and the report, or a folder there."""
    return files_at(f"{paths().export}/{folder}".rstrip("/"), temporaries=LEDGERS)


def export_folder(what: str) -> Path:
    """The same as a folder.

    Args:
        what: needs one, for the error.

    Raises:
        ExpectedError: exports go to an object store.
    """
    if is_url(paths().export):
        raise ExpectedError(
            f"{what} needs a folder on this machine, found [paths] export = {paths().export}: give a folder there; "
            "[paths] store may be a URL all the same"
        )
    return Path(paths().export)


SECTIONS = (
    paths,
    ap10k,
    humanart,
    executor,
    log,
    index,
    spatext,
    openpose,
    mask,
    depth,
    latents,
    generate,
    train,
    export,
)


def settings_without_effect() -> Iterator[str]:
    """Settings that differ from their defaults but decide nothing under the others, each with the reason."""
    for section, names, reason in _unused_settings():
        parameters = dict(section.get_params())
        for name in names:
            if (value := getattr(section(), name)) != parameters[name]._default:
                yield f"[{section.__name__}] {name} = {value} has no effect with {reason}"


def _unused_settings() -> Iterator[tuple[type[Section], tuple[str, ...], str]]:
    """Sections with those of their settings that nothing reads, and the setting that makes it so."""
    if mask().backend == "precomputed":
        yield mask, ("model_type", "weights", "prompt", "batch_size"), "[mask] backend = precomputed"
    if depth().backend == "precomputed":
        yield depth, ("weights", "batch_size"), "[depth] backend = precomputed"
    else:
        yield depth, ("folder",), f"[depth] backend = {depth().backend}"
    if (style := openpose().style) in ("keypoints", "mmpose"):
        widths = (
            ("link_half_width_px",) if style == "keypoints" else ("keypoint_radius_px", "link_half_width_px")
        )
        yield openpose, widths, f"[openpose] style = {style}"
    if executor().kind == "local":
        yield executor, ("address",), "[executor] kind = local"
    formats = export().format
    if "folders" not in formats:
        yield export, ("link", "heatmaps"), f"[export] format = {','.join(formats)}"
    if set(formats) == {"folders"}:
        yield export, ("shard_images",), "[export] format = folders"


@functools.cache  # once a process, however many tasks there are
def warn_of_settings_without_effect() -> None:
    """Log each of ``settings_without_effect``: a file may keep them for another backend, so they are no error."""
    for each in settings_without_effect():
        luigi.task.logger.warning(each)


def place_of(task: type[luigi.Task], name: str, parameter: luigi.Parameter[Any]) -> tuple[str, str]:
    """Section and name under which luigi.cfg has a task's parameter, or a section's."""
    place = parameter._config_path or {"section": task.get_task_family(), "name": name}
    return place["section"], place["name"]


def dataset_of(name: str) -> Dataset:
    """The dataset of a name.

    Raises:
        ValueError: there is none; names those there are.
    """
    from spctrl.data.datasets import DATASETS

    if name not in DATASETS:
        raise ValueError(f"expected a dataset among {', '.join(DATASETS)}, found {name!r} ([build] datasets)")
    return DATASETS[name]


def dataset_root(name: str) -> Path:
    """Folder of a raw dataset."""
    section = ap10k if name == "ap10k" else humanart
    return Path(_filled(section, "root", data=paths().data))


def condition_folder(section: type[mask | depth], dataset: str) -> Path:
    """Folder of a dataset's precomputed masks or depth maps."""
    return Path(_filled(section, "folder", root=str(dataset_root(dataset)), dataset=dataset))


def _filled(section: type[Section], name: str, **values: str) -> str:
    """A setting with its ``{placeholders}`` filled in.

    Raises:
        ExpectedError: it has others.
    """
    template = str(getattr(section(), name))
    try:
        return template.format(**values)
    except (LookupError, ValueError, AttributeError) as error:
        placeholders = ", ".join(f"{{{each}}}" for each in values)
        raise ExpectedError(
            f"[{section.__name__}] {name}: expected no braces but those of {placeholders}, found {template}. Write "
            "{{ and }} for braces in a path"
        ) from error


def dataset_variant(name: str) -> str:
    """What tells a dataset's annotation files apart: AP-10K's split id or HumanArt's subset."""
    return str(ap10k().split_id if name == "ap10k" else humanart().subset)


def split_id(name: str) -> str:
    """The number in ``<split>_split<n>``; HumanArt has one split."""
    return str(ap10k().split_id) if name == "ap10k" else "1"


@functools.cache  # every task asks
def settings_digest() -> str:
    """Ten hex digits that tell builds apart which make different things, or put them in different places."""
    values = {
        section.__name__: {
            name: value for name, value in section().to_str_params().items() if name != "batch_size"
        }
        for section in SECTIONS
    }
    del values["executor"], values["log"]
    places = values["paths"]
    for each in ("cache", "weights"):  # each machine's own; weights count by content
        del places[each]
    for each, place in places.items():
        places[each] = without_secrets(place) if is_url(place) else str(Path(place).absolute())
    return digest(json.dumps(values, sort_keys=True))[:10]
