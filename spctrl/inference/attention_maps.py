"""Where the keypoint tokens look while an image is drawn.

Legend: S steps, K named keypoints, G side of the maps in cells, R resolution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from spctrl.errors import ExpectedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from spctrl.inference.generator import ImageGenerator, Request

MAP_CELLS = 64
"""Side of the maps, as in the keypoint-concept loss."""

Network = Literal["controlnet", "unet"]


class Attention(NamedTuple):
    """Cross-attention while one image was drawn.

    Attributes:
        image: (R, R, 3) float32 in [0, 1].
        names: K placeholders of the prompt, in its order.
        timesteps: (S,) int64, from noise to image.
        maps: (S, K, G, G) float32: probabilities, mean over heads and layers.
    """

    image: NDArray[np.float32]
    names: list[str]
    timesteps: NDArray[np.int64]
    maps: NDArray[np.float32]


def keypoint_attention(
    generator: ImageGenerator,
    request: Request,
    placeholders: tuple[str, ...],
    *,
    network: Network,
    layers: str | None,
) -> Attention:
    """Draw an image and keep the attention of its keypoint tokens at each step.

    Args:
        generator: of kind ``spctrl`` or ``controlnet``.
        request: what to draw.
        placeholders: tokens to look for in the prompt.
        network: whose cross-attention.
        layers: only layers whose name contains this; None for all.

    Raises:
        ExpectedError: the prompt names no placeholder that the tokenizer knows, or no layer has such a name.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F

    from spctrl.models.attention import capture_attention

    positions = token_positions(generator.pipeline.tokenizer, request.prompt, placeholders)
    found: list[torch.Tensor] = []
    timesteps: list[int] = []

    def keep(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        # The last of the batch: with guidance, the pass with the prompt comes after the one without.
        of_layers = [
            F.interpolate(each[-1].float(), (MAP_CELLS, MAP_CELLS), mode="bilinear", align_corners=True)
            for each in captured.maps().values()
        ]
        mean = torch.stack(of_layers).mean(0)[0]
        found.append(mean[list(positions.values())].cpu())
        timesteps.append(int(timestep))
        return {}

    with capture_attention(getattr(generator.pipeline, network), layers) as captured:
        (image,) = generator.infer([request], on_step=keep)
    return Attention(image, list(positions), np.array(timesteps, np.int64), torch.stack(found).numpy())


def token_positions(tokenizer: Any, prompt: str, placeholders: tuple[str, ...]) -> dict[str, int]:
    """Position of each placeholder that a prompt names, in the prompt's order; those cut off are left out.

    Raises:
        ExpectedError: there is none.
    """
    known = tokenizer.get_vocab()
    by_id = {known[name]: name for name in placeholders if name in known}
    ids = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids
    positions: dict[str, int] = {}
    for position, token in enumerate(ids):
        if token in by_id:
            positions.setdefault(by_id[token], position)
    if not positions:
        raise ExpectedError(
            f"expected keypoint tokens such as {placeholders[0]} in the prompt {prompt!r}, found none that the "
            "checkpoint has. Does it come with learned_embeds.bin?"
        )
    return positions
