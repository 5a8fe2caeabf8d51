"""Mosaics against a slow drawing of each, pixel by pixel and truth by truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dfine_plugin import make_mosaics

GIVEN = torch.Generator().manual_seed(0)


def batch(count: int, height: int = 6, width: int = 8) -> tuple[Tensor, list[dict[str, Any]]]:
    """Images of noise, with up to three truths each; the second has none."""
    pixels = torch.rand(count, 3, height, width, generator=GIVEN)
    labels = []
    for image in range(count):
        n = 0 if image == 1 else 1 + image % 3
        sides = 0.1 + 0.4 * torch.rand(n, 2, generator=GIVEN)
        centres = sides / 2 + (1 - sides) * torch.rand(n, 2, generator=GIVEN)
        labels.append(
            {
                "boxes": torch.cat([centres, sides], dim=-1),
                "class_labels": torch.arange(n) + 10 * image,
                "area": sides.prod(-1) * height * width,
                "image_id": torch.tensor([image]),
            }
        )
    return pixels, labels


def halved(image: Tensor) -> Tensor:
    """An image of even sides at half its size: the mean of each two by two pixels."""
    small = torch.zeros(3, image.shape[1] // 2, image.shape[2] // 2)
    for y in range(small.shape[1]):
        for x in range(small.shape[2]):
            small[:, y, x] = sum(image[:, 2 * y + i, 2 * x + j] for i in (0, 1) for j in (0, 1)) / 4
    return small


def test_a_mosaic_is_four_images_with_their_truths() -> None:
    pixels, labels = batch(6)
    before = pixels.clone(), [{key: value.clone() for key, value in target.items()} for target in labels]
    drawn, targets = make_mosaics(pixels, labels, 1.0, torch.Generator().manual_seed(3))
    small = [halved(image) for image in pixels]
    arrangements = set()
    for image in range(6):
        four = []
        for place, (y, x) in enumerate([(0, 0), (0, 4), (3, 0), (3, 4)]):
            quarter = drawn[image, :, y : y + 3, x : x + 4]
            (source,) = (i for i in range(6) if torch.allclose(small[i], quarter, atol=1e-6))
            four.append((place, source))
        sources = [source for _, source in four]
        assert image in sources
        assert len({*sources}) == 4
        arrangements.add((sources.index(image), *sorted(sources)))

        boxes, classes, areas = [], [], []
        for place, source in four:
            for (cx, cy, w, h), name, area in zip(
                labels[source]["boxes"].tolist(),
                labels[source]["class_labels"].tolist(),
                labels[source]["area"].tolist(),
                strict=True,
            ):
                boxes.append([cx / 2 + 0.5 * (place % 2), cy / 2 + 0.5 * (place // 2), w / 2, h / 2])
                classes.append(name)
                areas.append(area / 4)
        torch.testing.assert_close(targets[image]["boxes"], torch.tensor(boxes))
        assert targets[image]["class_labels"].tolist() == classes
        torch.testing.assert_close(targets[image]["area"], torch.tensor(areas))
        assert targets[image]["image_id"].tolist() == [image]
    assert len(arrangements) > 3  # other images, and other places, for each

    assert torch.equal(pixels, before[0])
    for now, then in zip(labels, before[1], strict=True):
        assert all(torch.equal(now[key], then[key]) for key in then)


def test_truths_are_where_their_pixels_are_whatever_the_size() -> None:
    """A bright rectangle on black, in images of odd sides, whose halves are not alike."""
    height, width = 41, 53
    pixels, labels = torch.zeros(4, 1, height, width), []
    for image in range(4):
        y, x, h, w = 8 + image, 10 + 2 * image, 20, 24
        pixels[image, :, y : y + h, x : x + w] = 1
        boxes = torch.tensor([[(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]])
        labels.append({"boxes": boxes, "class_labels": torch.tensor([image])})
    drawn, targets = make_mosaics(pixels, labels, 1.0, torch.Generator().manual_seed(0))
    for image in range(4):
        for (cx, cy, w, h), top, left in zip(
            (targets[image]["boxes"] * torch.tensor([width, height, width, height])).tolist(),
            (0, 0, 20, 20),
            (0, 26, 0, 26),
            strict=True,
        ):
            rows = slice(top, 20 if top == 0 else height)
            columns = slice(left, 26 if left == 0 else width)
            part = drawn[image, 0, rows, columns]
            assert part.sum() == pytest.approx(w * h, rel=0.05)
            assert float((part.sum(0) * torch.arange(part.shape[1])).sum() / part.sum()) == pytest.approx(
                cx - left - 0.5, abs=0.5
            )
            assert float((part.sum(1) * torch.arange(part.shape[0])).sum() / part.sum()) == pytest.approx(
                cy - top - 0.5, abs=0.5
            )


def test_a_share_of_the_images_gives_way_and_the_others_stay() -> None:
    pixels, labels = batch(200)
    drawn, targets = make_mosaics(pixels, labels, 0.3, torch.Generator().manual_seed(1))
    kept = [torch.equal(drawn[i], pixels[i]) for i in range(200)]
    assert 120 <= sum(kept) <= 160  # 140 are to be expected, give or take 6.5
    for image in range(200):
        same = len(targets[image]["boxes"]) == len(labels[image]["boxes"]) and torch.equal(
            targets[image]["boxes"], labels[image]["boxes"]
        )
        assert same == kept[image]
    same, unchanged = make_mosaics(pixels, labels, 0.0)
    assert torch.equal(same, pixels)
    assert [*map(dict, unchanged)] == [*map(dict, labels)]
    again, _ = make_mosaics(pixels, labels, 0.3, torch.Generator().manual_seed(1))
    assert torch.equal(again, drawn)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_small_batches_repeat_their_images(count: int) -> None:
    pixels, labels = batch(count)
    drawn, targets = make_mosaics(pixels, labels, 1.0)
    assert drawn.shape == pixels.shape
    for image in range(count):
        sources = {name // 10 for name in targets[image]["class_labels"].tolist()}
        assert sources == {i for i in range(count) if len(labels[i]["boxes"])}


def test_images_keep_their_type_and_their_order_in_memory() -> None:
    pixels, labels = batch(4)
    for dtype in (torch.float32, torch.bfloat16):
        given = pixels.to(dtype, memory_format=torch.channels_last)
        drawn, _ = make_mosaics(given, labels, 1.0)
        assert drawn.dtype == dtype
        assert drawn.is_contiguous(memory_format=torch.channels_last)


def test_images_without_truths_make_mosaics_without() -> None:
    pixels = torch.rand(4, 3, 8, 8)
    labels = [{"boxes": torch.zeros(0), "class_labels": torch.zeros(0, dtype=torch.int64)} for _ in range(4)]
    _, targets = make_mosaics(pixels, labels, 1.0)
    assert all(target["boxes"].shape == (0, 4) for target in targets)
    assert all(target["class_labels"].dtype == torch.int64 for target in targets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 1.5}, "share must be a probability, in .0, 1., got 1.5"),
        ({"share": float("nan")}, "share must be a probability"),
        ({"labels": []}, "0 labels for 4 images"),
        ({"pixel_values": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}, "images of torch.uint8: make mosaics of them"),
        ({"labels": [{"class_labels": torch.zeros(0)}] * 4}, "labels of image 0 hold no boxes, but class_labels"),
        ({"pixel_values": torch.rand(4, 3, 1, 8)}, "images of .1, 8. pixels have no halves"),
    ],
)
def test_what_it_refuses(change: dict[str, Any], message: str) -> None:
    pixels, labels = batch(4)
    with pytest.raises(ValueError, match=message):
        make_mosaics(**{"pixel_values": pixels, "labels": labels, **change})


def test_labels_that_no_mosaic_can_have_are_named() -> None:
    pixels, labels = batch(4)
    labels[2]["masks"] = torch.zeros(3, 6, 8)
    with pytest.raises(ValueError, match="labels of image 2 hold masks, which no mosaic can be made of"):
        make_mosaics(pixels, labels)
    del labels[2]["masks"], labels[3]["area"]
    with pytest.raises(ValueError, match=r"labels of image 3 hold .*those of image 0"):
        make_mosaics(pixels, labels)
