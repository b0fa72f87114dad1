"""The tools of the ``spctrl`` command that look at one pose: its prompt, its images, where the model looks, edits."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from spctrl import options
from spctrl.errors import ExpectedError
from spctrl.output.console import PlainConsole
from spctrl.store.provenance import RECORDS
from tasks import settings
from tasks.dataset.index import Index
from tasks.stage.weights import weights_at

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from spctrl.data.datasets import Dataset
    from spctrl.inference.generator import ImageGenerator, Request
    from spctrl.inference.methods import Kind
    from spctrl.inference.poses import Pose

console = PlainConsole()

SHEET_COLUMNS = 4

DatasetName = Annotated[str, typer.Option("--dataset", help="ap10k or humanart: decides the keypoints")]
Split = Annotated[str, typer.Option(help="of an image id: train, val or test")]
Checkpoint = Annotated[
    str,
    typer.Option(
        parser=options.name_or_path,
        help="entry of weights.yaml or folder; default: the released one of the dataset",
    ),
]
BaseModel = Annotated[
    str,
    typer.Option(parser=options.name_or_path, help="Stable Diffusion 1.5: entry of weights.yaml or folder"),
]
KindName = Annotated[str, typer.Option("--kind", help="of the checkpoint: spctrl, controlnet or t2i_adapter")]
PoseFile = Annotated[
    Path | None,
    typer.Option(
        "--pose",
        parser=options.path,
        help="JSON with width, height, anns; or a line of an exported .jsonl",
    ),
]
ImageId = Annotated[int | None, typer.Option("--image-id", help="an annotated image of the dataset")]
PromptText = Annotated[
    str | None, typer.Option("--prompt", help="default: what an evaluation would give the pose")
]
Words = Annotated[str, typer.Option(help="keypoints in the prompt: tokens, names or none")]
Output = Annotated[Path, typer.Option("--output", "-o", parser=options.path, help="folder to write to")]
Count = Annotated[int, typer.Option(min=1, help="images, from different noise")]
Seed = Annotated[int, typer.Option(help="of the noise")]
Steps = Annotated[int, typer.Option(min=1, help="of the sampler")]
Guidance = Annotated[float, typer.Option(help="guidance scale; 1 or less: none")]
Scale = Annotated[float, typer.Option("--conditioning-scale", help="weight of the condition")]
Resolution = Annotated[int, typer.Option(help="side of the images in pixels")]
PresetName = Annotated[
    str | None, typer.Option("--preset", help="released: the two settings below as in the released inference")
]
FinalSigmasType = Annotated[
    str | None, typer.Option(help="where sampling ends: zero or sigma_min; default: zero, or the preset's")
]
MapResizeName = Annotated[
    str | None,
    typer.Option("--map-resize", help="of index maps: centre or floor; default: centre, or the preset's"),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda:N")]


def add_to(app: typer.Typer) -> None:
    """Add the tools to the command."""
    for name, command in (
        ("prompt", prompt),
        ("infer", infer),
        ("attention", attention),
        ("keypoint-embeddings", keypoint_embeddings),
        ("edit", edit),
    ):
        app.command(name)(_explaining_disk_errors(command))


def _explaining_disk_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors of the disk name the file, as one that is read or written."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        from spctrl.io.disk_errors import working

        # The pose of `prompt` is written, that of the others read.
        with working(options.get("output", options.get("pose"))):
            command(**options)

    return run


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What the drawing tools share: a generator, and what comes of a pose.

    Attributes:
        generator: of the checkpoint.
        dataset: whose keypoints the poses have.
        words: how prompts name keypoints.
    """

    generator: ImageGenerator
    dataset: Dataset
    words: str

    def prompt(self, pose: Pose | None, given: str | None) -> str:
        """The prompt that was given, or the pose's own."""
        if given is not None:
            return given
        if pose is None:
            raise ExpectedError("expected --prompt: a condition alone does not say what is in the picture")
        return _prompt_of(pose, self.dataset, self.words)

    def requests(
        self, condition: bytes, prompt: str, *, seed: int, count: int, path: Path | None = None
    ) -> list[Request]:
        """Requests for some images of one condition, which may be from a file, from different noise."""
        from spctrl.data.records import RecordError
        from spctrl.inference.generator import Request, read_condition
        from spctrl.inference.methods import image_seed

        try:
            sampler = self.generator.sampler
            tensor = read_condition(condition, self.generator.kind, sampler.resolution, sampler.map_resize)
        except RecordError as error:
            raise ExpectedError(f"{path or 'condition'}: {error.message}") from error
        return [Request(tensor, prompt, image_seed(seed, 0, index)) for index in range(count)]

    def draw(self, requests: Sequence[Request], folder: Path, prefix: str = "") -> list[Image.Image]:
        """Images, which are written to ``<prefix><i>.jpg`` too."""
        from PIL import Image

        from spctrl.inference.generator import jpeg_bytes

        images: list[Image.Image] = []
        for index, pixels in enumerate(self.generator.infer(requests)):
            data = jpeg_bytes(pixels)
            (folder / f"{prefix}{index}.jpg").write_bytes(data)
            images.append(Image.open(io.BytesIO(data)))
        return images


def prompt(
    image_id: Annotated[int, typer.Argument(help="an annotated image")],
    dataset: DatasetName = "ap10k",
    split: Split = "val",
    words: Words = "tokens",
    pose: Annotated[
        Path | None,
        typer.Option(parser=options.path, help="write the pose there too, as JSON for `spctrl edit`"),
    ] = None,
) -> None:
    """Print the prompt of an annotated image, with its labelled keypoints as tokens.

    Needs the dataset's index, which any build makes.
    """
    from spctrl.inference.poses import write_pose

    found = _annotated(image_id, dataset, split)
    console.say(_prompt_of(found, _dataset(dataset), words))
    if pose is not None:
        write_pose(found, pose)


def infer(
    output: Output,
    condition: Annotated[
        Path | None,
        typer.Option(
            "--map",
            parser=options.file,
            help="an index map, or the image that another kind takes",
        ),
    ] = None,
    pose: PoseFile = None,
    image_id: ImageId = None,
    prompt: PromptText = None,
    dataset: DatasetName = "ap10k",
    split: Split = "val",
    kind: KindName = "spctrl",
    checkpoint: Checkpoint = "",
    stable_diffusion: BaseModel = "stable_diffusion",
    words: Words = "tokens",
    images: Count = 4,
    seed: Seed = 0,
    steps: Steps = 50,
    guidance_scale: Guidance = 7.5,
    conditioning_scale: Scale = 1.0,
    resolution: Resolution = 512,
    preset: PresetName = None,
    final_sigmas_type: FinalSigmasType = None,
    map_resize: MapResizeName = None,
    device: Device = "auto",
) -> None:
    """Draw images of one pose: an index map, a pose as JSON, or an annotated image.

    Writes the condition, the images and sheet.png, which shows them side by side.
    """
    given = [each for each in (condition, pose, image_id) if each is not None]
    if len(given) != 1:
        raise typer.BadParameter(f"expected one of --map, --pose and --image-id, found {len(given)}")
    if kind != "spctrl" and condition is None:
        raise typer.BadParameter(f"a checkpoint of kind {kind} takes its condition with --map")
    source = None if condition is not None else _pose(pose, image_id, dataset, split)
    drawing = _drawing(
        kind, checkpoint, stable_diffusion, dataset, words, device,
        steps=steps, guidance_scale=guidance_scale, conditioning_scale=conditioning_scale, resolution=resolution,
        preset=preset, final_sigmas_type=final_sigmas_type, map_resize=map_resize,
    )  # fmt: skip
    text = drawing.prompt(source, prompt)
    output.mkdir(parents=True, exist_ok=True)
    data = condition.read_bytes() if condition is not None else b""
    if source is not None:
        data = _png(_index_map(source, drawing.dataset))
    requests = drawing.requests(data, text, seed=seed, count=images, path=condition)
    (output / "condition.png").write_bytes(_upright(data))
    drawn = drawing.draw(requests, output)
    shown = _shown(requests[0].condition, drawing.dataset)
    _write_sheet(output, [("condition", shown), *((f"image {i}", each) for i, each in enumerate(drawn))])
    _say(text, output)


def attention(
    output: Output,
    pose: PoseFile = None,
    image_id: ImageId = None,
    prompt: PromptText = None,
    dataset: DatasetName = "ap10k",
    split: Split = "val",
    checkpoint: Checkpoint = "",
    stable_diffusion: BaseModel = "stable_diffusion",
    network: Annotated[str, typer.Option(help="whose cross-attention: controlnet or unet")] = "controlnet",
    layers: Annotated[
        str | None, typer.Option(help="only layers whose name contains this, such as down_blocks.2")
    ] = None,
    seed: Seed = 0,
    steps: Steps = 50,
    guidance_scale: Guidance = 7.5,
    conditioning_scale: Scale = 1.0,
    resolution: Resolution = 512,
    preset: PresetName = None,
    final_sigmas_type: FinalSigmasType = None,
    map_resize: MapResizeName = None,
    device: Device = "auto",
) -> None:
    """Show where each keypoint token looks while an image is drawn, at each timestep and on average.

    Writes image.jpg, attention.npz (maps, mean, timesteps, names), <token>/mean.png and <token>/t<timestep>.png, and
    sheet.png with the means.
    """
    import numpy as np
    from PIL import Image

    from spctrl.inference.attention_maps import keypoint_attention
    from spctrl.inference.generator import jpeg_bytes
    from spctrl.inference.sheets import heat_over

    if network not in ("controlnet", "unet"):
        raise typer.BadParameter(f"--network: expected controlnet or unet, found {network}")
    source = _pose(pose, image_id, dataset, split)
    drawing = _drawing(
        "spctrl", checkpoint, stable_diffusion, dataset, "tokens", device,
        steps=steps, guidance_scale=guidance_scale, conditioning_scale=conditioning_scale, resolution=resolution,
        preset=preset, final_sigmas_type=final_sigmas_type, map_resize=map_resize,
    )  # fmt: skip
    text = drawing.prompt(source, prompt)
    index_map = _index_map(source, drawing.dataset)
    (request,) = drawing.requests(_png(index_map), text, seed=seed, count=1)
    found = keypoint_attention(
        drawing.generator,
        request,
        drawing.dataset.skeleton.placeholders,
        network=network,  # type: ignore[arg-type]
        layers=layers,
    )
    output.mkdir(parents=True, exist_ok=True)
    data = jpeg_bytes(found.image)
    (output / "image.jpg").write_bytes(data)
    image = Image.open(io.BytesIO(data))
    mean = found.maps.mean(axis=0)
    np.savez_compressed(
        output / "attention.npz",
        maps=found.maps,
        mean=mean,
        timesteps=found.timesteps,
        names=np.array(found.names),
    )
    pictures = [("condition", _shown(request.condition, drawing.dataset)), ("image", image)]
    for k, name in enumerate(found.names):
        folder = output / name.strip("<>")
        folder.mkdir(exist_ok=True)
        pictures.append((name, heat_over(image, mean[k])))
        pictures[-1][1].save(folder / "mean.png")
        for timestep, heat in zip(found.timesteps.tolist(), found.maps[:, k], strict=True):
            heat_over(image, heat).save(folder / f"t{timestep:04}.png")
    _write_sheet(output, pictures)
    _say(text, output)


def keypoint_embeddings(
    output: Annotated[Path, typer.Option("--output", "-o", parser=options.path, help="file to write")],
    dataset: DatasetName = "ap10k",
    stable_diffusion: BaseModel = "stable_diffusion",
) -> None:
    """Write CLIP's pooled embeddings of the keypoints' names, for `spatext_init_emb` of a training."""
    from spctrl.inference.keypoint_embeddings import keypoint_embeddings as embed
    from spctrl.weights import save_torch_file

    embeddings = embed(weights_at(stable_diffusion), _dataset(dataset).name)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_torch_file(embeddings, output)
    console.say(f"{tuple(embeddings.shape)} embeddings: {output}")


def edit(
    pose: Annotated[
        Path,
        typer.Argument(
            parser=options.path, help="JSON with width, height, anns (`spctrl prompt ID --pose FILE`)"
        ),
    ],
    output: Output,
    move: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHAT:DX,DY",
            help="move an instance (0:40,-10) or one of its keypoints (0.left_elbow:40,-10), in pixels to the right "
            "and down; may be given again",
        ),
    ] = None,
    mirror: Annotated[bool, typer.Option("--mirror", help="left becomes right")] = False,
    species: Annotated[str | None, typer.Option(help="the same pose of another animal")] = None,
    prompt: PromptText = None,
    dataset: DatasetName = "ap10k",
    checkpoint: Checkpoint = "",
    stable_diffusion: BaseModel = "stable_diffusion",
    words: Words = "tokens",
    images: Count = 1,
    seed: Seed = 0,
    steps: Steps = 50,
    guidance_scale: Guidance = 7.5,
    conditioning_scale: Scale = 1.0,
    resolution: Resolution = 512,
    preset: PresetName = None,
    final_sigmas_type: FinalSigmasType = None,
    map_resize: MapResizeName = None,
    device: Device = "auto",
) -> None:
    """Change a pose and draw it before and after, from the same noise.

    Moves come first, then the mirror. Writes pose.json and condition.png of the edited pose, before-<i>.jpg,
    after-<i>.jpg and sheet.png.
    """
    from spctrl.inference.poses import mirror as mirrored
    from spctrl.inference.poses import read_pose, with_species, write_pose

    if not (move or mirror or species or prompt):
        raise typer.BadParameter("expected something to change: --move, --mirror, --species or --prompt")
    spec = _dataset(dataset)
    before = after = read_pose(pose, spec)
    for each in move or []:
        after = _moved(after, each, spec)
    if mirror:
        after = mirrored(after, spec)
    if species:
        after = with_species(after, species)
        # Where only the new species is known, both pictures show it.
        before = before if before.categories else with_species(before, species)
    drawing = _drawing(
        "spctrl", checkpoint, stable_diffusion, dataset, words, device,
        steps=steps, guidance_scale=guidance_scale, conditioning_scale=conditioning_scale, resolution=resolution,
        preset=preset, final_sigmas_type=final_sigmas_type, map_resize=map_resize,
    )  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    write_pose(after, output / "pose.json")
    pictures: list[tuple[str, Image.Image]] = []
    for name, shown in (("before", before), ("after", after)):
        index_map = _index_map(shown, drawing.dataset)
        text = drawing.prompt(shown, prompt)
        if name == "after":
            (output / "condition.png").write_bytes(_png(index_map))
        requests = drawing.requests(_png(index_map), text, seed=seed, count=images)
        drawn = drawing.draw(requests, output, prefix=f"{name}-")
        pictures.append((name, _shown(requests[0].condition, spec)))
        pictures += [(f"{name}, image {i}", image) for i, image in enumerate(drawn)]
    _write_sheet(output, pictures, columns=images + 1)
    _say(text, output)


def _moved(pose: Pose, text: str, dataset: Dataset) -> Pose:
    """A pose after one ``--move``."""
    from spctrl.inference.poses import move

    what, _, by = text.partition(":")
    instance, _, keypoint = what.partition(".")
    try:
        dx, dy = (float(each) for each in by.split(","))
        number = int(instance)
    except ValueError:
        raise typer.BadParameter(
            f"--move: expected INSTANCE:DX,DY or INSTANCE.KEYPOINT:DX,DY, found {text!r}"
        ) from None
    names = dataset.skeleton.keypoint_names
    if keypoint and keypoint not in names:
        raise typer.BadParameter(f"--move: expected a keypoint among {', '.join(names)}, found {keypoint!r}")
    return move(pose, dx, dy, instance=number, keypoint=names.index(keypoint) if keypoint else None)


def _drawing(
    kind: str, checkpoint: str, stable_diffusion: str, dataset: str, words: str, device: str, **sampler: Any
) -> Drawing:
    """A generator on the device, with those settings of the sampler that the command line gives, not None."""
    import msgspec

    from spctrl.image_models.base import choose_device
    from spctrl.inference.generator import load_generator
    from spctrl.inference.methods import CONDITIONS_OF, FinalSigmas, MapResize, Preset, Sampler

    spec = _dataset(dataset)
    _keypoint_words(words)  # before minutes of loading
    kinds = [each for each, conditions in CONDITIONS_OF.items() if conditions]
    if kind not in kinds:
        raise typer.BadParameter(f"--kind: expected {', '.join(kinds)}, found {kind}")
    given = {name: value for name, value in sampler.items() if value is not None}
    choices = {"preset": Preset, "final_sigmas_type": FinalSigmas, "map_resize": MapResize}
    for name in choices.keys() & given:
        if given[name] not in (known := get_args(choices[name])):
            option = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"{option}: expected {', '.join(known)}, found {given[name]}")
    default = f"spctrl_{spec.name}" if kind == "spctrl" else kind
    try:
        settings_of_sampler = msgspec.convert(given, Sampler)
        choose_device(device)
    except ValueError as error:  # msgspec's ValidationError is one
        raise typer.BadParameter(str(error)) from error
    chosen: Kind = kind
    generator = load_generator(
        kind=chosen,
        stable_diffusion=weights_at(stable_diffusion),
        checkpoint=weights_at(checkpoint or default),
        sampler=settings_of_sampler,
        device=device,
    )
    return Drawing(generator=generator, dataset=spec, words=words)


def _prompt_of(pose: Pose, dataset: Dataset, words: str) -> str:
    from spctrl.inference.poses import prompt_of

    return prompt_of(pose, dataset, keypoints=_keypoint_words(words))


def _dataset(name: str) -> Dataset:
    try:
        return settings.dataset_of(name)
    except ValueError as error:
        raise typer.BadParameter(f"--dataset: {error}") from error


def _keypoint_words(words: str) -> Literal["tokens", "names"] | None:
    known: dict[str, Literal["tokens", "names"] | None] = {"tokens": "tokens", "names": "names", "none": None}
    if words not in known:
        raise typer.BadParameter(f"--words: expected {', '.join(known)}, found {words}")
    return known[words]


def _pose(path: Path | None, image_id: int | None, dataset: str, split: str) -> Pose:
    """The pose of a file or of an annotated image."""
    from spctrl.inference.poses import read_pose

    if path is not None:
        return read_pose(path, _dataset(dataset))
    if image_id is None:
        raise typer.BadParameter("expected --pose or --image-id, found neither")
    return _annotated(image_id, dataset, split)


def _annotated(image_id: int, dataset: str, split: str) -> Pose:
    """The pose of an annotated image, from the dataset's index."""
    import pyarrow.compute as pc

    from spctrl.inference.poses import pose_of_row
    from spctrl.io.parquet import read_table

    splits = _dataset(dataset).split_words
    if split not in splits:
        raise typer.BadParameter(f"--split: expected {', '.join(splits)}, found {split}")
    index = Index(dataset=dataset, split=split)
    run = index.current_run()
    if run is None or not run.is_whole():
        raise ExpectedError(
            f"expected an index of {dataset}, {split}, found none. Any build makes it, such as `luigi --module "
            f"pipelines BuildDataset --dataset {dataset} --split {split}`"
        )
    table = read_table(index.finished_run().path(RECORDS))
    row = table.filter(pc.equal(table.column("image_id"), image_id))
    if len(row) != 1:
        raise ExpectedError(
            f"expected an image {image_id} in {dataset}, {split}, found none among {len(table):,}"
        )
    return pose_of_row(row)


def _index_map(pose: Pose, dataset: Dataset) -> NDArray[np.uint8]:
    from spctrl.inference.poses import index_map_of

    section = settings.spatext()
    return index_map_of(
        pose,
        dataset,
        keypoint_radius_px=section.keypoint_radius_px,
        link_half_width_px=section.link_half_width_px,
    )


def _png(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _upright(condition: bytes) -> bytes:
    """The same for readers that apply orientation tags."""
    from spctrl.data.orientation import without_orientation
    from spctrl.data.records import RecordError

    try:
        return without_orientation(condition)
    except RecordError as error:
        raise ExpectedError(error.message) from error


def _shown(condition: NDArray[np.float32], dataset: Dataset) -> Image.Image:
    """A (C, R, R) condition as people look at it, with the pixels that the network is given."""
    import numpy as np
    from PIL import Image

    from spctrl.inference.sheets import coloured_index_map

    if len(condition) == 1:
        return coloured_index_map(condition[0].astype(np.uint8), dataset.skeleton)
    return Image.fromarray(np.rint(condition.transpose(1, 2, 0) * 255).astype(np.uint8))


def _write_sheet(
    folder: Path, pictures: Sequence[tuple[str, Image.Image]], columns: int = SHEET_COLUMNS
) -> None:
    from spctrl.inference.sheets import sheet

    sheet(pictures, columns=columns).save(folder / "sheet.png")


def _say(prompt: str, folder: Path) -> None:
    console.say(f"prompt: {prompt}")
    console.say(f"sheet:  {folder / 'sheet.png'}")
