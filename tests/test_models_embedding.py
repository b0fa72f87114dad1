"""The spatial-text embedding: equal to masks added up in a loop, in all variants; what is trained and what is not."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from spctrl.data.skeletons import AP10K, HUMANART
from spctrl.errors import ExpectedError

torch = pytest.importorskip("torch")

from spctrl.models import SpatextEmbedding  # noqa: E402
from spctrl.models.embedding import load_keypoint_init  # noqa: E402

TYPES = ("one", "zero", "rand", "interp_kpt")
LINKS = {"ap10k": AP10K.links, "humanart": HUMANART.links}
VALUES = [*range(80), 255]


@pytest.fixture
def index_map() -> Any:
    """(2, 1, 27, 30): every value there is, many times."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(VALUES), (2, 1, 27, 30), generator=generator)
    return torch.tensor(VALUES)[chosen].float()


def made(seed: int = 0, **options: Any) -> SpatextEmbedding:
    torch.manual_seed(seed)
    return SpatextEmbedding(4, **options)


def masks_added_up(module: SpatextEmbedding, index_map: Any, links: Any, detach: bool = False) -> Any:
    """The embedding as the facts put it: for each value, where the map has it, its row."""
    keypoints = module.keypoint_rows()
    out = torch.zeros(len(index_map), keypoints.shape[1], *index_map.shape[2:])
    for k in range(17):
        out = out + (index_map == 1 + k) * keypoints[k].view(1, -1, 1, 1)
    ends = keypoints.detach() if detach else keypoints
    for s, (a, b) in enumerate(links):
        row = (ends[a] + ends[b]) / 2 if module.interpolate else module.skeleton_emb[s]
        out = out + (index_map == 51 + s) * row.view(1, -1, 1, 1)
    return out


@pytest.mark.parametrize(
    ("skeleton_type", "layer_version", "link_table"),
    [*itertools.product(TYPES, (None, "sigmoid_version"), LINKS)],
)
def test_equals_masks_added_up(
    skeleton_type: str, layer_version: str | None, link_table: str, index_map: Any
) -> None:
    module = made(skeleton_type=skeleton_type, layer_version=layer_version, link_table=link_table).eval()
    found = module(index_map)
    assert found.shape == (2, 4, 27, 30)
    assert found.is_contiguous()
    torch.testing.assert_close(found, masks_added_up(module, index_map, LINKS[link_table]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("detach_links", [False, True])
def test_gradients_equal_those_of_masks_added_up(detach_links: bool, index_map: Any) -> None:
    def gradients(forward: Any) -> dict[str, Any]:
        module = made(skeleton_type="interp_kpt", detach_links=detach_links, learn_keypoints=True).eval()
        forward(module).square().mean().backward()
        return {name: each.grad for name, each in module.named_parameters() if each.requires_grad}

    found = gradients(lambda module: module(index_map))
    expected = gradients(lambda module: masks_added_up(module, index_map, AP10K.links, detach_links))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-8, msg=name)


def test_number_types_do_not_matter(index_map: Any) -> None:
    module = made().eval()
    expected = module(index_map)
    for dtype in (torch.uint8, torch.int32, torch.int64, torch.float16, torch.float64):
        assert torch.equal(module(index_map.to(dtype)), expected)


def test_values_that_stand_for_nothing_become_zeros() -> None:
    nothing = torch.tensor([0, 18, 50, 68, 69, 70, 255, 1000, -1, 1.5, 51.25, torch.nan, torch.inf])
    module = made()
    assert not module(nothing.view(1, 1, 1, -1)).any()


def test_all_links_of_humanart_have_rows_when_asked_for() -> None:
    last = torch.tensor([68.0, 69.0]).view(1, 1, 1, 2)
    assert not made(skeleton_type="one")(last).any()
    assert made(skeleton_type="one", link_table="humanart")(last).eq(1).all()
    assert made(link_table="humanart").skeleton_emb.shape == (19, 4)


def test_sigmoid_version_squashes_keypoints_only(index_map: Any) -> None:
    module = made(skeleton_type="one", layer_version="sigmoid_version").eval()
    keypoints = module(index_map.clamp(max=17))
    assert keypoints.min() >= 0
    assert keypoints.max() < 1
    assert module(torch.full((1, 1, 1, 1), 51.0)).eq(1).all()


@pytest.mark.parametrize(
    ("skeleton_type", "learn_keypoints", "learn_skeleton"),
    [*itertools.product(TYPES, (False, True), (False, True))],
)
def test_what_is_trained_gets_a_gradient_and_nothing_else_changes(
    skeleton_type: str, learn_keypoints: bool, learn_skeleton: bool, index_map: Any
) -> None:
    module = made(skeleton_type=skeleton_type, learn_keypoints=learn_keypoints, learn_skeleton=learn_skeleton)
    frozen = {name: each.clone() for name, each in module.named_parameters() if not each.requires_grad}
    assert ("keypoint_emb" in frozen) is not learn_keypoints
    # Interpolated links have no rows of their own to learn.
    assert ("skeleton_emb" in frozen) is not (learn_skeleton and skeleton_type != "interp_kpt")
    (module(index_map) - 0.5).square().mean().backward()
    for name, each in module.named_parameters():
        assert (each.grad is not None and bool(each.grad.any())) is (name not in frozen), name
    torch.optim.AdamW(module.parameters(), lr=1e-3).step()
    assert all(torch.equal(module.get_parameter(name), each) for name, each in frozen.items())


def test_one_draw_of_dropout_is_shared_by_all_pixels() -> None:
    module = made().train()
    found = module(torch.full((3, 1, 5, 5), 7.0))
    assert found.flatten(2).transpose(1, 2).reshape(-1, 4).unique(dim=0).shape[0] == 1
    assert not torch.equal(found, module(torch.full((3, 1, 5, 5), 7.0)))


def test_initial_embeddings_from_a_file(tmp_path: Path) -> None:
    initial = torch.randn(17, 768)
    torch.save(initial, tmp_path / "keypoints.pt")
    module = SpatextEmbedding(3, keypoint_init=load_keypoint_init(tmp_path / "keypoints.pt"))
    assert torch.equal(module.keypoint_emb, initial)


@pytest.mark.parametrize(
    ("content", "found"),
    [(None, "cannot be read"), (b"not a tensor", "cannot be read"), (torch.zeros(16, 768), r"\(16, 768\)")],
)
def test_initial_embeddings_that_cannot_be_used(content: Any, found: str, tmp_path: Path) -> None:
    path = tmp_path / "keypoints.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ExpectedError, match=found):
        load_keypoint_init(path)


@pytest.mark.parametrize(
    "options",
    [{"skeleton_type": "two"}, {"layer_version": "tanh"}, {"link_table": "coco"}],
    ids=lambda options: next(iter(options)),
)
def test_unknown_options_are_refused_with_the_valid_ones(options: dict[str, Any]) -> None:
    with pytest.raises(ExpectedError, match="expected one of"):
        SpatextEmbedding(3, **options)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected index maps of shape \(B, 1, H, W\)"):
        made()(torch.zeros(1, 3, 8, 8))
