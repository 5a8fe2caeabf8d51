"""The metrics against hand-made detections and against pycocotools' own summary."""

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dfine_plugin.benchmarks.data.detection_data import DetectionData
from dfine_plugin.benchmarks.data.shapes import make_shapes
from dfine_plugin.benchmarks.gain.evaluation import coco_metrics, detect, top_detections


class Oracle(torch.nn.Module):
    """Answers with the truth of the images in order: one query a box, no score for the others."""

    def __init__(self, data: DetectionData, queries: int = 8) -> None:
        super().__init__()
        self.data, self.queries, self.seen = data, queries, 0

    def forward(self, pixel_values: torch.Tensor) -> "Oracle":
        count = len(pixel_values)
        self.logits = torch.full((count, self.queries, 1), -9.0)
        self.pred_boxes = torch.full((count, self.queries, 4), 0.5)
        for i in range(count):
            boxes = self.data.boxes[self.seen + i]
            self.logits[i, : len(boxes)] = 5.0
            self.pred_boxes[i, : len(boxes)] = boxes
        self.seen += count
        return self


@pytest.fixture(scope="module")
def data() -> DetectionData:
    return make_shapes(12, 48, seed=0)


def test_a_perfect_detector_has_full_marks(data: DetectionData) -> None:
    metrics = coco_metrics(detect(Oracle(data), data, 5, torch.device("cpu")), data.coco, data.sides)
    assert metrics["AP"] == pytest.approx(100)
    assert metrics["by_threshold"] == pytest.approx([100] * 10)


def test_agrees_with_the_summary_of_pycocotools(data: DetectionData) -> None:
    random = np.random.default_rng(0)
    rows = [
        [a["image_id"], *(np.array(a["bbox"]) * random.uniform(0.8, 1.25, 4)), random.random(), a["category_id"]]
        for a in data.coco["annotations"] * 2
    ]
    detections = np.array(rows)
    metrics = coco_metrics(detections, data.coco)
    truth = COCO()
    truth.dataset = {"info": {}, **data.coco}
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    expected = dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), evaluation.stats, strict=False))
    for name, value in expected.items():
        assert metrics[name] == (pytest.approx(value * 100) if value > -1 else None)


def test_ap_by_class_is_that_of_the_class_alone() -> None:
    """pycocotools, asked for one category at a time."""
    random = np.random.default_rng(1)
    annotations = [
        {"id": i + 1, "image_id": i % 3, "category_id": (2, 5)[i % 2], "bbox": [9.0 * i, 5.0, 8.0, 8.0], "area": 64.0}
        for i in range(8)
    ]
    categories = [{"id": 2, "name": "cat"}, {"id": 5, "name": "dog"}, {"id": 7, "name": "unseen"}]
    coco = {
        "images": [{"id": i} for i in range(3)],
        "annotations": [{**a, "iscrowd": 0} for a in annotations],
        "categories": categories,
    }
    detections = np.array(
        [
            [a["image_id"], *(np.array(a["bbox"]) * random.uniform(0.9, 1.1, 4)), random.random(), a["category_id"]]
            for a in annotations
        ]
    )
    truth = COCO()
    truth.dataset = {"info": {}, **coco}
    truth.createIndex()
    expected = {}
    for category in categories[:2]:
        evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
        evaluation.params.catIds = [category["id"]]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        expected[category["name"]] = pytest.approx(100 * evaluation.stats[0])
    assert coco_metrics(detections, coco)["by_class"] == {**expected, "unseen": None}


def test_top_detections_rank_queries_and_classes_together() -> None:
    logits = torch.tensor([[[0.0, 2.0], [1.0, -3.0]]])
    boxes = torch.arange(8.0).reshape(1, 2, 4)
    scores, labels, chosen = top_detections(logits, boxes, k=3)
    assert torch.allclose(scores, torch.tensor([[2.0, 1.0, 0.0]]).sigmoid())
    assert labels.tolist() == [[1, 0, 0]]
    assert torch.equal(chosen[0], boxes[0, [0, 1, 0]])
