"""COCO metrics of a detector on data in memory, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from dfine_plugin.benchmarks.data.detection_data import COCO_SIDES, DetectionData, normalise

MAX_DETECTIONS = 100
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)

Detected = np.ndarray
"""Detections (D, 7) float64: image id, x, y, w, h in pixels of the original image, score, category id."""


def top_detections(logits: Tensor, boxes: Tensor, k: int = MAX_DETECTIONS) -> tuple[Tensor, Tensor, Tensor]:
    """The k best of queries x classes, as DETRs with sigmoid classes are read out.

    logits (B, Q, C), boxes (B, Q, 4) -> scores (B, k), labels (B, k), boxes (B, k, 4), best first.
    """
    classes = logits.shape[-1]
    scores, index = logits.sigmoid().flatten(1).topk(min(k, logits.shape[1] * classes), dim=1)
    query = index // classes
    return scores, index % classes, boxes.gather(1, query[..., None].expand(-1, -1, 4))


@torch.no_grad()
def detect(model: nn.Module, data: DetectionData, batch_size: int, device: torch.device) -> Detected:
    """The best detections in all images."""
    was_training = model.training
    model.eval()
    rows = []
    for start in range(0, len(data), batch_size):
        part = slice(start, start + batch_size)
        output = model(pixel_values=normalise(data.images[part].to(device)))
        rows.append(read_out(output.logits, output.pred_boxes, data, part))
    model.train(was_training)
    return np.concatenate(rows)


def read_out(logits: Tensor, boxes: Tensor, data: DetectionData, part: slice) -> Detected:
    """The best detections in a part of the images, from their class logits (B, Q, C) and boxes (B, Q, 4) cxcywh."""
    scores, labels, boxes = (t.cpu() for t in top_detections(logits.float(), boxes.float()))
    boxes = boxes * data.original_sizes()[part, None]
    corner = boxes[..., :2] - boxes[..., 2:] / 2
    ids = torch.tensor(data.image_ids)[part, None].expand_as(scores)
    categories = torch.tensor(data.category_ids)[labels]
    columns = [ids[..., None], corner, boxes[..., 2:], scores[..., None], categories[..., None]]
    return torch.cat([column.double() for column in columns], dim=-1).flatten(0, 1).numpy()


def coco_metrics(detections: Detected, coco: dict[str, Any], sides: tuple[float, float] = COCO_SIDES) -> dict[str, Any]:
    """AP, AP50, AP75, AP90, APs, APm, APl in percent (None where the data has no such object), AP per threshold and AP
    by class.

    detections as of `detect`, coco the ground truth as a COCO annotation dict. The sides, in pixels, part APs, APm and
    APl.
    """
    # pycocotools prints what it does; a benchmark of hundreds of evaluations cannot have that.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"info": {}, **coco}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
        small, large = (side**2 for side in sides)
        evaluation.params.areaRng = [[0, 1e10], [0, small], [small, large], [large, 1e10]]
        evaluation.params.maxDets = [MAX_DETECTIONS]
        evaluation.params.iouThrs = IOU_THRESHOLDS
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0]  # thresholds, recalls, classes, areas

    def mean(values: np.ndarray) -> float | None:
        known = values[values > -1]
        return float(known.mean()) * 100 if known.size else None

    by_threshold = [mean(precision[t, :, :, 0]) for t in range(len(IOU_THRESHOLDS))]
    return {
        "AP": mean(precision[..., 0]),
        "AP50": by_threshold[0],
        "AP75": by_threshold[5],
        "AP90": by_threshold[8],
        "APs": mean(precision[..., 1]),
        "APm": mean(precision[..., 2]),
        "APl": mean(precision[..., 3]),
        "by_threshold": by_threshold,
        "by_class": {
            category["name"]: mean(precision[:, :, index, 0])
            for index, category in enumerate(truth.loadCats(evaluation.params.catIds))
        },
    }
