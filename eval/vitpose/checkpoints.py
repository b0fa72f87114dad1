"""ViTPose networks from weights of three kinds, recognised by what is in them.

- ``transformers``: a folder with ``config.json`` and ``model.safetensors``, ViTPose or ViTPose+ (with experts).
- ``mmpose``: a checkpoint of mmpose 1.x (``backbone.layers.N.attn.qkv``, ``head.deconv_layers``).
- ``vitpose``: a checkpoint of the ViTPose repository, which is mmpose 0.x (``backbone.blocks.N``, ``keypoint_head``):
  ViTPose, a file of ViTPose+ that is split by dataset, or the whole file with its experts.

All three become transformers' ``VitPoseForPoseEstimation`` without experts: in ViTPose+ an expert makes the last rows
of each MLP's output, so the chosen one's weights are put below the shared ones (as the ViTPose repository's
``model_split.py`` does). That computes the same and spares the pass through the others.

Checkpoints are read by ``torch.load(weights_only=True)``: they cannot run code.

Legend: D width of the network, K keypoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spctrl.data.records import NUM_KEYPOINTS
from spctrl.errors import ExpectedError
from spctrl.image_models.loading import WeightsFolder, load_strictly
from spctrl.io.network_size import MAX_NUMBER, parameters_within
from spctrl.io.reading_faults import faults_of
from spctrl.weights import TorchFileError, read_torch_file

if TYPE_CHECKING:
    import torch

    State = Mapping[str, torch.Tensor]

Format = Literal["transformers", "mmpose", "vitpose"]

EXPERTS: Mapping[str, int] = {"coco": 0, "aic": 1, "mpii": 2, "ap10k": 3, "apt36k": 4, "wholebody": 5}
"""ViTPose+'s experts; transformers calls the number ``dataset_index``. HumanArt's keypoints are COCO's."""

HEADS_OF_WIDTH: Mapping[int, int] = {384: 12, 768: 12, 1024: 16, 1280: 16}
"""Attention heads of ViTPose-S, -B, -L and -H: a checkpoint's shapes do not tell."""

HEAD_WIDTH = 64
"""Channels of a head in networks of other widths."""

PATCH, IMAGE_HW, LAYER_NORM_EPS = 16, (256, 192), 1e-6
"""Of every published ViTPose; checkpoints do not hold them."""

_POSITIONS = "backbone.embeddings.position_embeddings"
_PATCHES = "backbone.embeddings.patch_embeddings.projection"
_LAST_NORM = "backbone.layernorm"

FOLDER = WeightsFolder(
    what="ViTPose in transformers' format",
    source="usyd-community on the Hugging Face hub, for example usyd-community/vitpose-plus-huge",
    files="config.json and model.safetensors",
    setting="pose weights",
    kind=("model_type", "vitpose"),
)


class PoseWeightsError(ExpectedError):
    """Weights that are not a ViTPose of one of the three kinds; says which file and what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a checkpoint format calls the network's parts; transformers' own names are ``TRANSFORMERS``."""

    patches: str
    positions: str
    layer: str
    norm_before: str
    qkv: str
    projection: str
    norm_after: str
    fc1: str
    fc2: str
    last_norm: str
    head: str


MMPOSE = Names(
    patches="backbone.patch_embed.projection",
    positions="backbone.pos_embed",
    layer="backbone.layers",
    norm_before="ln1",
    qkv="attn.qkv",
    projection="attn.proj",
    norm_after="ln2",
    fc1="ffn.layers.0.0",
    fc2="ffn.layers.1",
    last_norm="backbone.ln1",
    head="head",
)
VITPOSE = Names(
    patches="backbone.patch_embed.proj",
    positions="backbone.pos_embed",
    layer="backbone.blocks",
    norm_before="norm1",
    qkv="attn.qkv",
    projection="attn.proj",
    norm_after="norm2",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
    last_norm="backbone.last_norm",
    head="keypoint_head",
)

HEAD_PARTS: Mapping[str, str] = {
    "deconv_layers.0": "deconv1",
    "deconv_layers.1": "batchnorm1",
    "deconv_layers.3": "deconv2",
    "deconv_layers.4": "batchnorm2",
    "final_layer": "conv",
}
"""Parts of the head in both checkpoint formats -> transformers. The simple head has only the last."""


def load_vitpose(path: Path, *, expert: int = 0) -> tuple[Any, Format]:
    """A ``VitPoseForPoseEstimation`` without experts, in evaluation mode, and which kind of weights it came from.

    Args:
        path: a folder in transformers' format, or a checkpoint file.
        expert: which dataset's expert and head to take where there are several (``EXPERTS``). A transformers folder
            has one head only, whatever the expert: mind which dataset's it is.

    Raises:
        ExpectedError: there is nothing there, or it is not a ViTPose, or keys are missing or left over.
    """
    if path.is_file():
        model, found = _from_checkpoint(path, expert)
    else:
        model, found = _from_folder(path, expert), "transformers"
    return model.eval(), found


def _from_folder(folder: Path, expert: int) -> Any:
    from transformers import VitPoseForPoseEstimation

    def load(folder: Path) -> tuple[Any, Mapping[str, Any]]:
        model, info = VitPoseForPoseEstimation.from_pretrained(
            folder, output_loading_info=True, local_files_only=True
        )
        return model, info

    model = load_strictly(FOLDER, folder, load)
    config = model.config
    experts = config.backbone_config.num_experts
    if experts == 1:
        return model
    if not 0 <= expert < experts:
        raise PoseWeightsError(f"{folder}: expected an expert among 0..{experts - 1}, asked for {expert}")
    config.backbone_config.num_experts = 1
    return _build(config, _with_expert(model.state_dict(), expert), folder)


def _from_checkpoint(path: Path, expert: int) -> tuple[Any, Format]:
    from transformers import VitPoseBackboneConfig, VitPoseConfig

    state: State = _read_checkpoint(path)
    found = recognise(state, path)
    names = VITPOSE if found == "vitpose" else MMPOSE
    if found == "vitpose":
        state = _one_dataset(state, expert, path)
    try:
        positions, fc1 = state[names.positions], state[f"{names.layer}.0.{names.fc1}.weight"]
        keypoints = len(state[f"{names.head}.final_layer.weight"])
    except KeyError as error:
        raise PoseWeightsError(
            f"{path}: expected the key {error} of a ViTPose checkpoint, found none"
        ) from None
    width, layers = positions.shape[-1], _count_layers(state, names)
    if layers > len(state) or not 0 < width <= MAX_NUMBER or keypoints > MAX_NUMBER:
        raise PoseWeightsError(
            f"{path}: expected as many layers as it has tensors of, found {layers:,} of width {width:,} for "
            f"{keypoints:,} keypoints with {len(state):,} tensors"
        )
    config = VitPoseConfig(
        backbone_config=VitPoseBackboneConfig(
            image_size=IMAGE_HW,
            patch_size=(PATCH, PATCH),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=attention_heads(width),
            mlp_ratio=fc1.shape[0] // width,
            layer_norm_eps=LAYER_NORM_EPS,
            out_indices=[layers],
        ),
        use_simple_decoder=f"{names.head}.deconv_layers.0.weight" not in state,
        num_labels=keypoints,
    )
    try:
        renamed = _to_transformers(state, names)
    except (ValueError, IndexError, RuntimeError) as error:  # tensors of fewer rows or dimensions
        raise PoseWeightsError(f"{path}: expected the weights of a ViTPose: {error}") from None
    return _build(config, renamed, path), found


def recognise(state: State, path: Path) -> Format:
    """Which checkpoint format a state has, by its keys.

    Raises:
        PoseWeightsError: neither; names some of the keys.
    """
    if any(key.startswith("backbone.blocks.") for key in state):
        return "vitpose"
    if any(key.startswith("backbone.layers.") and ".attn.qkv." in key for key in state):
        return "mmpose"
    some = ", ".join(sorted(state)[:5]) or "nothing"
    raise PoseWeightsError(
        f"{path}: expected a ViTPose checkpoint of mmpose 1.x (backbone.layers.0.attn.qkv.weight) or of the ViTPose "
        f"repository (backbone.blocks.0.attn.qkv.weight), found {some}. Weights of another architecture cannot be used."
    )


def attention_heads(width: int) -> int:
    """Of a ViT of that width: the published ones, else one for every ``HEAD_WIDTH`` channels."""
    return HEADS_OF_WIDTH.get(width, max(1, width // HEAD_WIDTH))


def _read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint: under ``state_dict``, or at the top."""
    import torch

    remedy = (
        "A download may be cut short: compare the file with its publisher's. Of a checkpoint from one's own training "
        "keep only the state_dict"
    )
    try:
        # mmpose keeps its training log beside the tensors, with numpy numbers in it.
        with torch.serialization.safe_globals(_numpy_scalars()):
            content = read_torch_file(path)
    except TorchFileError as error:
        raise PoseWeightsError(f"{path}: the checkpoint cannot be read: {error}. {remedy}.") from None
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise PoseWeightsError(f"{path}: expected a dictionary of tensors, found {type(content).__name__}")
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def _numpy_scalars() -> list[Any]:
    """What a pickled numpy number is made with."""
    import numpy as np

    make_scalar: Any = np.float64(0).__reduce__()[0]
    return [np.dtype, make_scalar, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8"))]


def _one_dataset(state: State, expert: int, path: Path) -> State:
    """The state of one dataset's ViTPose out of a ViTPose+ file; a file without experts, or split, as it is."""
    fc1, fc2 = (f"{VITPOSE.layer}.0.{part}.weight" for part in (VITPOSE.fc1, VITPOSE.fc2))
    plain = {key: value for key, value in state.items() if ".experts." not in key}
    if fc1 in state and fc2 in state and state[fc2].shape[0] < state[fc1].shape[1]:
        if f"{VITPOSE.layer}.0.mlp.experts.{expert}.weight" not in state:
            count = sum(key.startswith(f"{VITPOSE.layer}.0.mlp.experts.") for key in state) // 2
            raise PoseWeightsError(f"{path}: expected an expert among 0..{count - 1}, asked for {expert}")
        plain = _with_expert(state, expert)
        # The first dataset's head has the usual name, the others' follow in order.
        if expert:
            head = f"associate_keypoint_heads.{expert - 1}."
            own = {
                key.replace(head, f"{VITPOSE.head}."): value[:NUM_KEYPOINTS]
                if ".final_layer." in key
                else value
                for key, value in plain.items()
                if key.startswith(head)
            }
            if not own:
                raise PoseWeightsError(
                    f"{path}: expected {head}* for expert {expert}, found no such keys. "
                    "Use the whole ViTPose+ file, or the one that is split for this dataset."
                )
            plain = {k: v for k, v in plain.items() if not k.startswith(f"{VITPOSE.head}.")} | own
    return {key: value for key, value in plain.items() if not key.startswith("associate_keypoint_heads.")}


def _with_expert(state: State, expert: int) -> dict[str, torch.Tensor]:
    """A state whose MLPs end in the shared rows followed by the expert's; the experts themselves are left out."""
    import torch

    merged = {}
    for key, value in state.items():
        if ".experts." in key:
            continue
        own = re.sub(r"\.fc2\.(weight|bias)$", rf".experts.{expert}.\1", key)
        merged[key] = torch.cat([value, state[own]]) if own in state and own != key else value
    return merged


def _to_transformers(state: State, names: Names) -> dict[str, torch.Tensor]:
    """A checkpoint's state under transformers' names; keys without a counterpart keep theirs, to be complained of."""
    import torch

    renamed: dict[str, torch.Tensor] = {}
    parts = _layer_parts(names)
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        layer = re.fullmatch(rf"{re.escape(names.layer)}\.(\d+)\.(.+)", module)
        if key == names.positions:
            renamed[_POSITIONS] = _positions(value, names)
        elif module == names.patches:
            renamed[f"{_PATCHES}.{kind}"] = value
        elif module == names.last_norm:
            renamed[f"{_LAST_NORM}.{kind}"] = value
        elif module.removeprefix(f"{names.head}.") in HEAD_PARTS:
            renamed[f"head.{HEAD_PARTS[module.removeprefix(f'{names.head}.')]}.{kind}"] = value
        elif layer and layer[2] == names.qkv:
            prefix = f"backbone.encoder.layer.{layer[1]}.attention.attention"
            renamed |= {
                f"{prefix}.{name}.{kind}": part
                for name, part in zip(("query", "key", "value"), torch.chunk(value, 3), strict=True)
            }
        elif layer and layer[2] in parts:
            renamed[f"backbone.encoder.layer.{layer[1]}.{parts[layer[2]]}.{kind}"] = value
        else:
            renamed[key] = value
    return renamed


def from_transformers(state: State, names: Names) -> dict[str, torch.Tensor]:
    """The state of a network without experts under a checkpoint format's names: the inverse of what loading does."""
    import torch

    positions = state[_POSITIONS]
    renamed = {names.positions: positions[:, 1:] + positions[:, :1] if names is MMPOSE else positions}
    parts = {ours: theirs for theirs, ours in _layer_parts(names).items()}
    head = {ours: theirs for theirs, ours in HEAD_PARTS.items()}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        layer = re.fullmatch(r"backbone\.encoder\.layer\.(\d+)\.(.+)", module)
        if module == _PATCHES:
            renamed[f"{names.patches}.{kind}"] = value
        elif module == _LAST_NORM:
            renamed[f"{names.last_norm}.{kind}"] = value
        elif module.removeprefix("head.") in head:
            renamed[f"{names.head}.{head[module.removeprefix('head.')]}.{kind}"] = value
        elif layer and layer[2] == "attention.attention.query":
            qkv = [state[key.replace("query", part)] for part in ("query", "key", "value")]
            renamed[f"{names.layer}.{layer[1]}.{names.qkv}.{kind}"] = torch.cat(qkv)
        elif layer and layer[2] in parts:
            renamed[f"{names.layer}.{layer[1]}.{parts[layer[2]]}.{kind}"] = value
    return renamed


def _layer_parts(names: Names) -> dict[str, str]:
    """Parts of a layer but for queries, keys and values -> transformers."""
    return {
        names.norm_before: "layernorm_before",
        names.projection: "attention.output.dense",
        names.norm_after: "layernorm_after",
        names.fc1: "mlp.fc1",
        names.fc2: "mlp.fc2",
    }


def _positions(positions: torch.Tensor, names: Names) -> torch.Tensor:
    """(1, 1 + cells, D), of which transformers, like the ViTPose repository, adds the first to all the others.

    mmpose 1.x has no first one, or drops it when loading (mmpretrain's ``VisionTransformer``).
    """
    import torch

    cells = (IMAGE_HW[0] // PATCH) * (IMAGE_HW[1] // PATCH)
    if names is MMPOSE:
        own = positions[:, -cells:]
        return torch.cat([torch.zeros_like(own[:, :1]), own], dim=1)
    return positions


def _count_layers(state: State, names: Names) -> int:
    found = (re.match(rf"{re.escape(names.layer)}\.(\d{{1,9}})\.", key) for key in state)
    return 1 + max(int(match[1]) for match in found if match)


def _build(config: Any, state: State, path: Path) -> Any:
    """A network with exactly these weights."""
    import torch
    from transformers import VitPoseForPoseEstimation

    shapes = {key: tuple(value.shape) for key, value in state.items()}
    with (
        faults_of(f"{path}: expected the weights of a ViTPose", error_type=PoseWeightsError),
        torch.device("meta"),
        parameters_within(shapes, "its keys"),
    ):
        model = VitPoseForPoseEstimation(config)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    counters = {
        key: torch.zeros((), dtype=torch.int64) for key in expected if key.endswith("batches_tracked")
    }
    state = counters | dict(state)
    found = {key: tuple(value.shape) for key, value in state.items()}
    problems = [
        *(f"{key} is missing" for key in expected.keys() - found.keys()),
        *(f"{key} is left over" for key in found.keys() - expected.keys()),
        *(
            f"{key} has the shape {found[key]} instead of {expected[key]}"
            for key in expected.keys() & found.keys()
            if expected[key] != found[key]
        ),
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5]) + ("; ..." if len(problems) > 5 else "")
        raise PoseWeightsError(f"{path}: expected the weights of a ViTPose, but {shown}")
    floats = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    model.load_state_dict(floats, assign=True)
    return model
