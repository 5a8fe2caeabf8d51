"""The comparison of detections: by hand, and on a model with a fault put in."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dfine_plugin.export import export_onnx, find_culprit, measure_parity
from dfine_plugin.export.coco import CocoSplit
from dfine_plugin.export.parity import Detections, onnx_detections, torch_detections

from ..adapters.hosts import IMAGE_SIZE, images, wrapped
from ..adapters.transformers_hosts import HOSTS

ROWS = {host.name: host for host in HOSTS}


def detections(scores: list[float], labels: list[int], boxes: list[list[float]]) -> Detections:
    return Detections(np.array(scores), np.array(labels), np.array(boxes, dtype=float).reshape(-1, 4))


TWO = detections([0.9, 0.8, 0.1], [0, 1, 1], [[10, 10, 50, 60], [12, 10, 50, 60], [0, 0, 9, 9]])


def test_order_does_not_matter() -> None:
    other = Detections(*(values[[2, 1, 0]] for values in TWO))
    parity = measure_parity([TWO], [other])
    assert (parity.num_detections, parity.num_lost, parity.max_move, parity.max_score_change) == (2, 0, 0, 0)
    assert parity.passed


def test_moves_are_of_the_edges_in_pixels() -> None:
    moved = TWO.boxes + np.array([[0, 0, 0, 0.25], [1.0, 0, 0, 0], [7, 7, 7, 7]])
    parity = measure_parity([TWO, TWO], [TWO, TWO._replace(boxes=moved, scores=TWO.scores - 0.01)])
    assert parity.max_move == 1
    assert parity.mean_move == pytest.approx(1.25 / 16)
    assert parity.p99_move == pytest.approx(np.percentile([0] * 14 + [0.25, 1], 99))
    assert parity.max_score_change == pytest.approx(0.01)
    assert not parity.passed  # 0.89 px at the 99th percentile


def test_a_label_is_not_traded_for_a_nearer_box() -> None:
    other = TWO._replace(boxes=TWO.boxes[[1, 0, 2]])
    parity = measure_parity([TWO], [other])
    assert (parity.num_lost, parity.max_move) == (0, 2)


def test_what_falls_under_the_threshold_still_counts_and_what_is_gone_is_lost() -> None:
    fallen = TWO._replace(scores=np.array([0.9, 0.29, 0.1]))
    assert measure_parity([TWO], [fallen]).num_lost == 0
    gone = TWO._replace(scores=np.array([0.9, 0.1, 0.1]))
    parity = measure_parity([TWO], [gone])
    assert parity.num_lost == 1
    assert not parity.passed
    renamed = TWO._replace(labels=np.array([2, 2, 2]))
    assert measure_parity([TWO], [renamed]).num_lost == 2
    assert not measure_parity([TWO], [renamed]).passed


def test_nothing_to_compare() -> None:
    with pytest.raises(ValueError, match=r"no detection has a score of 0\.95"):
        measure_parity([TWO], [TWO], threshold=0.95)


def test_ap_of_a_perfect_and_of_a_shifted_detector() -> None:
    coco = {
        "images": [{"id": 7, "file_name": "a.png", "width": 200, "height": 100}],
        "categories": [{"id": 5, "name": "b"}, {"id": 3, "name": "a"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "bbox": [20, 10, 80, 50], "area": 4000, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 5, "bbox": [24, 10, 76, 50], "area": 3800, "iscrowd": 0},
        ],
    }
    split = CocoSplit(Path("data"), coco)
    assert split.image_paths() == [Path("data/images/a.png")]
    # in a model's input of 100 x 100, where the image is half as wide
    found = detections([0.9, 0.8], [0, 1], [[10, 10, 50, 60], [12, 10, 50, 60]])
    assert split.average_precision([found], (100, 100)) == pytest.approx(100)
    # IoU 0.78 and 0.77: right up to a threshold of 0.75
    shifted = found._replace(boxes=found.boxes + np.array([5.0, 0, 5, 0]))
    assert split.average_precision([shifted], (100, 100)) == pytest.approx(60)

    # a model with other classes beside these, in another order
    names = {0: "N/A", 1: "b", 2: "c", 3: "a"}
    other = found._replace(labels=np.array([3, 1]))
    assert split.average_precision([other], (100, 100), names) == pytest.approx(100)
    beside = detections([0.95, 0.9, 0.8], [2, 3, 1], [[0, 0, 9, 9], [10, 10, 50, 60], [12, 10, 50, 60]])
    assert split.average_precision([beside], (100, 100), names) == pytest.approx(100)
    assert split.categories({0: "LABEL_0", 1: "LABEL_1"}) == {0: 3, 1: 5}
    with pytest.raises(ValueError, match="the model has 3 classes, and data 2 categories"):
        split.categories({0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"})
    with pytest.raises(ValueError, match="the model has a class 3, and data 2 categories"):
        split.average_precision([other], (100, 100))


@pytest.mark.slow
def test_the_part_that_overflows_is_found_and_named(tmp_path: Path) -> None:
    host = ROWS["deformable-detr-refine"]
    model = wrapped(host)
    pixels = list(images(2))
    size = IMAGE_SIZE, IMAGE_SIZE
    expected = torch_detections(model, pixels)
    threshold = float(np.median(expected[0].scores))
    whole = export_onnx(model, tmp_path / "whole.onnx", size, precision="fp16")
    assert measure_parity(expected, onnx_detections(whole, pixels), threshold).passed
    rounded = export_onnx(model, tmp_path / "rounded.onnx", size, precision="fp16", simulate=True)
    assert measure_parity(expected, onnx_detections(rounded, pixels), threshold).passed

    # the same function, but beyond float16 on the way
    mlp = model.model.encoder.layers[0].mlp
    with torch.no_grad():
        for parameter in mlp.fc1.parameters():
            parameter.mul_(2.0**20)
        mlp.fc2.weight.mul_(2.0**-20)
    for one, other in zip(torch_detections(model, pixels), expected, strict=True):
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)
    broken = export_onnx(model, tmp_path / "broken.onnx", size, precision="fp16")
    assert not measure_parity(expected, onnx_detections(broken, pixels), threshold).passed
    name, move = find_culprit(model, "fp16", pixels, expected, threshold)
    assert name == "model.encoder"
    assert move < 0.5
    kept = export_onnx(model, tmp_path / "kept.onnx", size, precision="fp16", keep_float32=[name])
    assert measure_parity(expected, onnx_detections(kept, pixels), threshold).passed
