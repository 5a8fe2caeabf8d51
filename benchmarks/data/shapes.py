"""Procedural detection data: textured shapes on textured backgrounds, made in memory from a seed.

One class, ellipses, rotated polygons and stars, down to a contrast of a few grey levels. Later shapes cover earlier
ones. A box is that of the *visible* part, as in COCO, and is tight around the shape's own mask, which is drawn at
`SUPERSAMPLING` times the resolution: boxes are exact to a quarter of a pixel, which AP95 needs at this size.
A shape that would leave less than `MIN_VISIBLE` of an earlier one in sight is not drawn, so that nothing visible
goes without a box and no box holds a mere sliver.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw

from dfine_plugin.benchmarks.data.detection_data import DetectionData

SUPERSAMPLING = 4
MIN_VISIBLE = 0.4
MAX_SHAPES = 5

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Scene:
    """One image: pixels (S, S, 3) uint8; owner (4S, 4S) uint8, the number of the shape seen there plus 1; its boxes."""

    pixels: npt.NDArray[np.uint8]
    owner: npt.NDArray[np.uint8]
    boxes: npt.NDArray[np.float32]  # (M, 4) x, y, w, h in pixels
    areas: npt.NDArray[np.float32]  # (M,) visible pixels


def _noise(random: np.random.Generator, side: int, cells: int, channels: int = 3) -> Floats:
    """Smooth noise in -1 .. 1, (side, side, channels): random values on `cells` x `cells` knots, interpolated."""
    knots = random.uniform(0, 255, (cells, cells, channels)).astype(np.uint8)
    smooth = Image.fromarray(knots).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float32) / 127.5 - 1


def _outline(random: np.random.Generator, smallest: float, largest: float) -> Floats:
    """Corner points (P, 2) of a random shape around the origin, in pixels."""
    side = np.exp(random.uniform(np.log(smallest), np.log(largest)))
    aspect = np.exp(random.uniform(-0.7, 0.7))
    kind = random.integers(3)
    if kind == 0:  # ellipse
        angles, radii = np.linspace(0, 2 * np.pi, 48, endpoint=False), np.ones(48)
    elif kind == 1:  # polygon
        corners = int(random.integers(3, 8))
        angles = (np.arange(corners) + random.uniform(-0.25, 0.25, corners)) * 2 * np.pi / corners
        radii = np.ones(corners)
    else:  # star
        corners = 2 * int(random.integers(4, 8))
        angles = np.arange(corners) * 2 * np.pi / corners
        radii = np.where(np.arange(corners) % 2 == 0, 1.0, random.uniform(0.4, 0.75))
    points = np.stack([np.cos(angles) * aspect**0.5, np.sin(angles) * aspect**-0.5], axis=1) * radii[:, None]
    turn = random.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return (points @ rotation.T * side / 2).astype(np.float32)


def _background(random: np.random.Generator, side: int) -> Floats:
    """Pixels (side, side, 3) in 0 .. 255: a colour with coarse and fine texture."""
    coarse = _noise(random, side, 4) * random.uniform(10, 50)
    fine = _noise(random, side, int(random.integers(8, 25)))[..., :1] * random.uniform(3, 25)
    return random.uniform(60, 195, 3).astype(np.float32) + coarse + fine


def _place(random: np.random.Generator, side: int) -> tuple[npt.NDArray[np.bool_], int, int]:
    """A shape's mask at `SUPERSAMPLING` times the resolution, cropped to whole pixels, and the crop's corner (x, y).

    The shape lies within the image: its box is then never cut by the image's edge.
    """
    points = _outline(random, side / 5, side / 1.8)
    low, high = points.min(axis=0), points.max(axis=0)
    points += random.uniform(-low, np.maximum(side - high, -low))
    x, y = np.maximum(np.floor(points.min(axis=0)).astype(int), 0)
    right, bottom = np.minimum(np.ceil(points.max(axis=0)).astype(int) + 1, side)
    # Four times the size on a side is the anti-aliasing, too: the mean over a pixel's 16 samples is its opacity.
    mask = Image.new("1", ((right - x) * SUPERSAMPLING, (bottom - y) * SUPERSAMPLING))
    ImageDraw.Draw(mask).polygon([tuple(p) for p in ((points - (x, y)) * SUPERSAMPLING).tolist()], fill=1)
    return np.asarray(mask), int(x), int(y)


def _paint(random: np.random.Generator, pixels: Floats, mask: npt.NDArray[np.bool_], x: int, y: int) -> None:
    """Blend a shape into `pixels` in place; its mean differs from what it covers by a random, often low, contrast."""
    height, width = mask.shape[0] // SUPERSAMPLING, mask.shape[1] // SUPERSAMPLING
    opacity = mask.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING).mean(axis=(1, 3), dtype=np.float32)[..., None]
    patch = pixels[y : y + height, x : x + width]
    covered = (patch * opacity).sum(axis=(0, 1)) / max(float(opacity.sum()), 1.0)
    direction = random.normal(size=3)
    contrast = np.exp(random.uniform(np.log(40), np.log(130)))
    colour = covered + direction / np.abs(direction).max() * contrast
    texture = _noise(random, max(height, width), int(random.integers(2, 6)))[:height, :width] * random.uniform(2, 25)
    patch += opacity * (colour + texture - patch)


def draw_scene(random: np.random.Generator, side: int) -> Scene:
    """One image of `side` x `side` pixels with 1 to `MAX_SHAPES` shapes."""
    pixels = _background(random, side)
    owner = np.zeros((side * SUPERSAMPLING,) * 2, dtype=np.uint8)
    shapes, whole, visible = 0, np.zeros(MAX_SHAPES), np.zeros(MAX_SHAPES)  # samples of each shape: all, and in sight
    for _ in range(int(random.integers(1, MAX_SHAPES + 1))):
        mask, x, y = _place(random, side)
        rows = slice(y * SUPERSAMPLING, y * SUPERSAMPLING + mask.shape[0])
        columns = slice(x * SUPERSAMPLING, x * SUPERSAMPLING + mask.shape[1])
        crop = owner[rows, columns]
        left = visible - np.bincount(crop[mask], minlength=MAX_SHAPES + 1)[1:]
        if not mask.any() or (left < MIN_VISIBLE * whole).any():
            continue
        visible = left
        visible[shapes] = whole[shapes] = mask.sum()
        shapes += 1
        crop[mask] = shapes
        _paint(random, pixels, mask, x, y)
    pixels += random.normal(0, random.uniform(1, 6), pixels.shape)
    boxes, areas = _visible_boxes(owner, shapes)
    return Scene(pixels.clip(0, 255).astype(np.uint8), owner, boxes, areas)


def _visible_boxes(owner: npt.NDArray[np.uint8], shapes: int) -> tuple[Floats, Floats]:
    """Boxes (M, 4) x, y, w, h and areas (M,) in pixels of the shapes 1 .. M in `owner`."""
    boxes: Floats = np.zeros((shapes, 4), np.float32)
    areas: Floats = np.zeros(shapes, np.float32)
    rows, columns = np.nonzero(owner)
    owners = owner[rows, columns] - 1
    for shape in range(shapes):
        seen = owners == shape
        y, x = rows[seen], columns[seen]
        boxes[shape] = x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()
        areas[shape] = len(x)
    return boxes / np.float32(SUPERSAMPLING), areas / np.float32(SUPERSAMPLING**2)


def make_shapes(images: int, side: int, seed: int) -> DetectionData:
    """`images` scenes of `side` x `side` pixels. The same arguments give the same data, to the last bit.

    Every object here would be small by COCO's rule (sides of 32 and 96 pixels, in images of about 640). The sides that
    part APs, APm and APl are therefore 1/6 and 1/3 of the image's: each then holds a fair part of the objects.
    """
    scenes = [draw_scene(np.random.default_rng((seed, index)), side) for index in range(images)]
    annotations = [
        {"image_id": index, "category_id": 1, "bbox": box, "area": area, "iscrowd": 0}
        for index, scene in enumerate(scenes)
        for box, area in zip(scene.boxes.tolist(), scene.areas.tolist(), strict=True)
    ]
    coco = {
        "images": [{"id": index, "width": side, "height": side} for index in range(images)],
        "annotations": [{"id": number + 1, **annotation} for number, annotation in enumerate(annotations)],
        "categories": [{"id": 1, "name": "shape"}],
    }
    corner_and_size = [torch.from_numpy(scene.boxes) / side for scene in scenes]
    return DetectionData(
        images=torch.from_numpy(np.stack([scene.pixels for scene in scenes])).permute(0, 3, 1, 2).contiguous(),
        boxes=[torch.cat([box[:, :2] + box[:, 2:] / 2, box[:, 2:]], dim=1) for box in corner_and_size],
        labels=[torch.zeros(len(scene.boxes), dtype=torch.int64) for scene in scenes],
        coco=coco,
        image_ids=list(range(images)),
        category_ids=[1],
        class_names=["shape"],
        sides=(side / 6, side / 3),
    )
