"""The diagnosis against what is counted by hand, and layers against the host's own outputs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from dfine_plugin import FDRConfig
from dfine_plugin.benchmarks.data.detection_data import normalise
from dfine_plugin.benchmarks.data.shapes import make_shapes
from dfine_plugin.benchmarks.gain.diagnosis import (
    INITIAL,
    diagnose,
    overlaps,
    predict_layers,
    ranked_by_iou,
    within_bins,
    without_duplicates,
)
from dfine_plugin.benchmarks.gain.evaluation import coco_metrics, detect
from dfine_plugin.benchmarks.gain.runs import RunSettings
from dfine_plugin.benchmarks.gain.training import build_model
from dfine_plugin.benchmarks.models.detrex_hosts import without_cuda_calls
from dfine_plugin.benchmarks.models.hosts import HOSTS, width_of
from dfine_plugin.wrapping import predict_distributions

from .test_ablation import rows

TRUTH = [10.0, 10.0, 20.0, 20.0]


def coco(*boxes: list[float], **more: Any) -> dict[str, Any]:
    annotations = [{"id": i + 1, "image_id": 7, "category_id": 1, "bbox": box, **more} for i, box in enumerate(boxes)]
    return {"images": [{"id": 7}], "annotations": annotations}


def row(box: list[float], score: float, category: int = 1, image: int = 7) -> list[float]:
    return [image, *box, score, category]


def test_near_duplicates_are_what_comes_close_in_place_and_score() -> None:
    shifted = [10.0, 12.0, 20.0, 20.0]  # IoU 18 / 22
    detections = np.array(
        [
            row(TRUTH, 0.8),
            row(shifted, 0.5),
            row(shifted, 0.3),  # less than half the best score
            row([10.0, 24.0, 20.0, 20.0], 0.9),  # IoU 6 / 34
            row(TRUTH, 0.9, category=2),
            row(TRUTH, 0.9, image=8),
        ]
    )
    found = overlaps(detections, coco(TRUTH))
    assert found == {"recall50": 100.0, "recall75": 100.0, "near_duplicates": 2.0}
    found = overlaps(detections[1:2], coco(TRUTH, [50.0, 50.0, 5.0, 5.0]))
    assert found == {"recall50": 50.0, "recall75": 50.0, "near_duplicates": 1.0}
    assert overlaps(detections[3:4], coco(TRUTH)) == {"recall50": 0.0, "recall75": 0.0, "near_duplicates": 0.0}


def test_crowds_are_no_truths_to_find() -> None:
    detections = np.array([row(TRUTH, 0.8)])
    truths = coco(TRUTH)
    truths["annotations"] += coco([60.0, 60.0, 20.0, 20.0], iscrowd=1)["annotations"]
    assert overlaps(detections, truths)["recall50"] == 100.0


def test_ranked_by_iou_the_better_box_comes_first() -> None:
    truths = coco(TRUTH, [60.0, 60.0, 20.0, 20.0])
    shifted = [10.0, 14.0, 20.0, 20.0]  # IoU 16 / 24 with the first
    detections = np.array([row(shifted, 0.9), row(TRUTH, 0.1), row(TRUTH, 0.5, category=2), row(TRUTH, 0.5, image=8)])
    ranked = ranked_by_iou(detections, truths)
    np.testing.assert_allclose(ranked[:, 5], [16 / 24, 1.0, 0.0, 0.0])
    np.testing.assert_array_equal(ranked[:, :5], detections[:, :5])


def test_without_duplicates_the_right_ranking_finds_every_truth_first() -> None:
    """With them it does not: those of the one truth come before the other."""
    others = [60.0, 60.0, 20.0, 20.0]
    detections = np.array([row(TRUTH, 0.9), row([10.0, 11.0, 20.0, 20.0], 0.8), row([60.0, 62.0, 20.0, 20.0], 0.2)])
    truths = coco(TRUTH, others, area=400.0, iscrowd=0)
    truths["categories"] = [{"id": 1, "name": "shape"}]
    assert coco_metrics(ranked_by_iou(without_duplicates(detections), truths), truths)["AP50"] == pytest.approx(100)
    assert coco_metrics(ranked_by_iou(detections, truths), truths)["AP50"] < 99


def test_the_best_box_is_the_truth_as_far_as_edges_can_move() -> None:
    weights = FDRConfig(a=0.125).bin_values()  # edges move by a quarter of a side at most
    truths = coco(TRUTH, [60.0, 60.0, 20.0, 20.0])
    shifted = [10.0, 14.0, 20.0, 20.0]  # IoU 16 / 24 with the first truth
    far = [40.0, 40.0, 20.0, 20.0]
    detections = np.array([row(shifted, 0.9), row(shifted, 0.8), row(far, 0.7), row(TRUTH, 0.6, category=2)])
    frames = detections.copy()
    frames[1, 1:5] = [10.0, 20.0, 40.0, 20.0]
    best = within_bins(detections, frames, truths, weights)
    np.testing.assert_allclose(best[0, 1:5], TRUTH)
    # left stays, top goes from 20 to 15, right from 50 to 40, bottom from 40 to 35
    np.testing.assert_allclose(best[1, 1:5], [10.0, 15.0, 30.0, 20.0])
    np.testing.assert_array_equal(best[2:], detections[2:])
    np.testing.assert_array_equal(best[:, [0, 5, 6]], detections[:, [0, 5, 6]])


def test_suppression_is_within_an_image_and_a_class() -> None:
    detections = np.array(
        [
            row(TRUTH, 0.5),
            row(TRUTH, 0.9),
            row(TRUTH, 0.4, category=2),
            row(TRUTH, 0.3, image=8),
            row([10.0, 14.0, 20.0, 20.0], 0.2),  # IoU 16 / 24: below 0.7
        ]
    )
    assert without_duplicates(detections)[:, 5].tolist() == [0.9, 0.4, 0.3, 0.2]


@pytest.mark.parametrize("variant", ["baseline", "fdr+go-lsd"])
@pytest.mark.parametrize("host", rows())
def test_the_last_layer_is_what_the_model_predicts(host: str, variant: str) -> None:
    settings = RunSettings(
        host, variant, 0, "shapes", 64, steps=1, batch_size=2, learning_rate=1e-3, width=width_of(host)
    )
    data = make_shapes(4, 64, seed=3)
    model = build_model(settings, data).eval()
    # box heads start at zero, and layers alike
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    labels = [{"boxes": b, "class_labels": c} for b, c in zip(data.boxes, data.labels, strict=True)]
    with without_cuda_calls() if HOSTS[host].calls_cuda else nullcontext(), torch.no_grad():
        layers = predict_layers(model, normalise(data.images), labels)
        outputs = model(pixel_values=normalise(data.images))
    assert list(layers) == [*([INITIAL] if variant != "baseline" else []), "layer 1", "layer 2", "layer 3"]
    logits, boxes = layers["layer 3"]
    if host.startswith("detrex/"):  # detections, not queries, come out of it
        best = logits.sigmoid().flatten(1).max(1).values
        torch.testing.assert_close(outputs.logits.sigmoid().flatten(1).max(1).values, best, atol=1e-5, rtol=1e-4)
    else:
        torch.testing.assert_close(logits, outputs.logits)
        torch.testing.assert_close(boxes, outputs.pred_boxes)
    detector = getattr(model, "detector", model)
    assert not detector.training
    if variant != "baseline" and "/" not in host:
        record = predict_distributions(model, normalise(data.images))[2]
        torch.testing.assert_close(layers[INITIAL][1], record.initial_boxes)
        for index, of_layer in enumerate(record.boxes, start=1):
            torch.testing.assert_close(layers[f"layer {index}"][1], of_layer, atol=1e-5, rtol=1e-4)
    # the host's loss is in its place again
    with without_cuda_calls() if HOSTS[host].calls_cuda else nullcontext():
        outputs = model.train()(pixel_values=normalise(data.images), labels=labels)
    assert any("loss_fgl" in key for key in outputs.loss_dict) is (variant != "baseline")


def test_the_last_layers_ap_is_that_of_the_evaluation() -> None:
    settings = RunSettings("rt-detr", "fdr", 0, "shapes", 64, steps=1, batch_size=2, learning_rate=1e-3)
    data = make_shapes(5, 64, seed=3)
    model = build_model(settings, data)
    found = diagnose(model, data, 2, torch.device("cpu"))
    detections = detect(model, data, 2, torch.device("cpu"))
    expected = coco_metrics(detections, data.coco, data.sides)["AP"]
    assert found["AP_by_layer"]["layer 3"] == pytest.approx(expected, abs=1e-6)
    ranked = ranked_by_iou(without_duplicates(detections), data.coco)
    expected = coco_metrics(ranked, data.coco, data.sides)["AP"]
    assert found["AP_after_NMS_ranked_by_IoU"] == pytest.approx(expected, abs=1e-6)
    assert found["AP_within_bins"] >= found["AP_by_layer"]["layer 3"]
    assert model.training
