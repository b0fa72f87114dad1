"""Generated images before they are measured: missing, broken and wrongly sized ones are named."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from eval.checks import check_images


def test_each_fault_has_its_reason(tmp_path: Path) -> None:
    rows = [
        {
            "image_id": image_id,
            "index": index,
            "path": f"{image_id}/{index}.jpg",
            "prompt": "a cat",
            "seed": 5,
        }
        for image_id in (1, 2, 3)
        for index in (0, 1)
    ]
    for row in rows:
        path = tmp_path / str(row["path"])
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 32)).save(path)
    (tmp_path / "1" / "0.jpg").write_bytes(b"no image")
    Image.new("RGB", (32, 64)).save(tmp_path / "2" / "1.jpg")
    (tmp_path / "3" / "0.jpg").unlink()

    checked = check_images(rows, [1, 2, 3, 4], tmp_path, count=2, size_wh=(64, 32))
    assert [(row["image_id"], row["index"]) for row in checked.rows] == [(1, 1), (2, 0), (3, 1)]
    assert set(checked.rows[0]) == {"image_id", "index", "path", "prompt"}
    reasons = sorted((each["code"], each["image_id"]) for each in checked.rejects)
    assert reasons == [
        ("broken_image", 1), ("broken_image", 3), ("missing_image", 4), ("missing_image", 4), ("wrong_size", 2)
    ]  # fmt: skip
    (sized,) = (str(each["message"]) for each in checked.rejects if each["code"] == "wrong_size")
    assert sized.endswith("2/1.jpg: expected 64 x 32 pixels, found 32 x 64")

    free = check_images(rows, [2], tmp_path, count=2, size_wh=None)
    assert len(free.rows) == 2 and not free.rejects, "images of any size, and only of the poses asked for"
