"""The procedural data: boxes against masks, occlusion, determinism."""

import numpy as np
import pytest
import torch

from dfine_plugin.benchmarks.data.shapes import MIN_VISIBLE, SUPERSAMPLING, draw_scene, make_shapes


@pytest.mark.parametrize("seed", range(8))
def test_boxes_are_tight_around_the_visible_masks(seed: int) -> None:
    scene = draw_scene(np.random.default_rng(seed), 64)
    assert len(scene.boxes) == len(scene.areas) > 0
    for number, (x, y, w, h) in enumerate(scene.boxes * SUPERSAMPLING, start=1):
        mask = scene.owner == number
        inside = mask[int(y) : int(y + h), int(x) : int(x + w)]
        assert mask.sum() == inside.sum() == scene.areas[number - 1] * SUPERSAMPLING**2
        for border in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
            assert border.any()


def test_every_shape_in_sight_has_a_box_and_no_sliver_has() -> None:
    for seed in range(30):
        scene = draw_scene(np.random.default_rng(seed), 64)
        assert set(np.unique(scene.owner)) - {0} == set(range(1, len(scene.boxes) + 1))
        # A shape's own mask fills at least a fifth of its box; what is left in sight is at least MIN_VISIBLE of it.
        assert (scene.areas / scene.boxes[:, 2:].prod(axis=1)).min() > MIN_VISIBLE / 5


def test_training_boxes_and_coco_boxes_agree() -> None:
    data = make_shapes(6, 48, seed=3)
    coco = torch.tensor([a["bbox"] for a in data.coco["annotations"]])
    boxes = torch.cat(data.boxes) * 48
    assert torch.allclose(torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]], dim=1), coco, atol=1e-4)
    assert data.images.shape == (6, 3, 48, 48)
    assert data.images.dtype == torch.uint8


def test_the_seed_decides_everything() -> None:
    first, again, other = make_shapes(4, 48, seed=5), make_shapes(4, 48, seed=5), make_shapes(4, 48, seed=6)
    assert torch.equal(first.images, again.images)
    assert first.coco == again.coco
    assert not torch.equal(first.images, other.images)
