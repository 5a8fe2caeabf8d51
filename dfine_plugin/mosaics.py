"""Dense one-to-one matching (DEIM, arXiv 2412.04234) by mosaics: more truths an image, so that more queries learn."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PER_TRUTH = ("boxes", "class_labels", "labels", "area", "iscrowd")
"""What labels hold for each truth of an image, and a mosaic for those of all four."""

PER_IMAGE = ("image_id", "size", "orig_size", "idx")
"""What labels hold for an image, and a mosaic has from the one whose place it takes."""


def make_mosaics(
    pixel_values: Tensor,
    labels: Sequence[Mapping[str, Any]],
    share: float = 0.5,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """A batch of which some images gave way to mosaics: four images of it at half their size, in two rows.

    One-to-one matching trains as many queries as there are truths. A mosaic has those of four images, and the detector
    learns as much from it as with several queries a truth, which one-to-one matching does without. It goes with any
    detector of images alone, wrapped or not. DEIM makes mosaics of half of the images, in the first half of the
    schedule.

    Args:
        pixel_values: ``(B, C, H, W)`` of floating point, images without padding, for boxes are in sides of the whole.
        labels: for each image its ``boxes`` ``(n, 4)`` cxcywh in image sides, and ``class_labels`` (or ``labels``)
            ``(n,)``; with ``area``, ``iscrowd``, ``image_id``, ``size`` and ``orig_size``, if they are there.
        share: the probability of an image to be replaced, by itself and three others, each in a place of its own. In
            batches of less than four an image comes more than once.
        generator: of random numbers, on the CPU; by default torch's own.

    Returns:
        Images and labels, new ones on the same device; what was given is not changed, and nothing waits for the device.

    Raises:
        ValueError: the share is no probability, there are not as many labels as images, images are integers or of less
            than two pixels a side, or labels hold no boxes, or something else, such as masks, which a mosaic would have
            to cut and does not.

    Example:
        >>> pixel_values, labels = make_mosaics(batch["pixel_values"], batch["labels"])
        >>> loss = model(pixel_values=pixel_values, labels=labels).loss
    """
    _check(pixel_values, labels, share)
    count, _, height, width = pixel_values.shape
    replaced = (torch.rand(count, generator=generator) < share).nonzero().flatten()
    if not len(replaced):
        return pixel_values, [dict(target) for target in labels]
    sources = torch.stack([_four_images(int(image), count, generator) for image in replaced])

    top, left = height // 2, width // 2
    halves = [(rows, columns) for rows in ((0, top), (top, height)) for columns in ((0, left), (left, width))]
    mosaics = torch.empty_like(pixel_values[: len(replaced)])
    quarters = sources.to(pixel_values.device, non_blocking=True).unbind(1)
    for ((y, bottom), (x, right)), of_quarter in zip(halves, quarters, strict=True):
        drawn = F.adaptive_avg_pool2d(pixel_values.index_select(0, of_quarter), (bottom - y, right - x))
        mosaics[..., y:bottom, x:right] = drawn
    images = pixel_values.clone().index_copy_(0, replaced.to(pixel_values.device, non_blocking=True), mosaics)

    # left, top, width and height of each place, in mosaic sides
    places = torch.tensor([[x / width, y / height, (r - x) / width, (b - y) / height] for (y, b), (x, r) in halves])
    places = places.to(labels[0]["boxes"].device, non_blocking=True)
    targets = [dict(target) for target in labels]
    for image, four in zip(replaced.tolist(), sources.tolist(), strict=True):
        parts = [_placed(labels[source], place) for source, place in zip(four, places, strict=True)]
        targets[image] |= {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return images, targets


def _check(pixel_values: Tensor, labels: Sequence[Mapping[str, Any]], share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"share must be a probability, in [0, 1], got {share!r}")
    if len(labels) != len(pixel_values):
        raise ValueError(f"{len(labels)} labels for {len(pixel_values)} images")
    if min(pixel_values.shape[-2:]) < 2:
        raise ValueError(f"images of {tuple(pixel_values.shape[-2:])} pixels have no halves")
    if not pixel_values.is_floating_point():
        raise ValueError(f"images of {pixel_values.dtype}: make mosaics of them when they are scaled and normalised")
    for image, target in enumerate(labels):
        if "boxes" not in target:
            raise ValueError(f"labels of image {image} hold no boxes, but {', '.join(target)}")
        if unknown := sorted(target.keys() - {*PER_TRUTH, *PER_IMAGE}):
            raise ValueError(f"labels of image {image} hold {', '.join(unknown)}, which no mosaic can be made of")
        if target.keys() != labels[0].keys():
            raise ValueError(f"labels of image {image} hold {[*target]}, those of image 0 {[*labels[0]]}")


def _four_images(image: int, count: int, generator: torch.Generator | None) -> Tensor:
    """``(4,)``: the image and three others of the batch, in random places."""
    others = (torch.randperm(count - 1, generator=generator) + image + 1) % count
    # in small batches they come again, and the image itself where there is no other
    four = torch.cat([torch.tensor([image]), others])[torch.arange(4) % count]
    return four[torch.randperm(4, generator=generator)]


def _placed(target: Mapping[str, Any], place: Tensor) -> dict[str, Tensor]:
    """An image's truths where it is drawn into a place of a mosaic, ``(4,)``: left, top, width, height."""
    placed = {key: value for key, value in target.items() if key in PER_TRUTH}
    boxes = placed["boxes"].reshape(-1, 4)
    corner, sides = place.to(boxes.dtype).split(2)
    placed["boxes"] = torch.cat([corner + boxes[:, :2] * sides, boxes[:, 2:] * sides], dim=-1)
    if "area" in placed:
        placed["area"] = placed["area"] * sides.prod()
    return placed
