"""Why a variant gains or loses AP: every decoder layer by itself, and whether what is lost are boxes or duplicates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_convert

from dfine_plugin.benchmarks.data.detection_data import DetectionData, normalise
from dfine_plugin.benchmarks.gain.evaluation import Detected, coco_metrics, read_out
from dfine_plugin.boxes import edge_offsets, to_corners
from dfine_plugin.record import FDRRecord
from dfine_plugin.wrapping import binding_of, is_wrapped, keep_records

NMS_IOU = 0.7
NEAR_IOU, NEAR_SCORE = 0.5, 0.5
"""A near duplicate overlaps its truth by more than this, and has this share of the best such detection's score."""

INITIAL = "initial boxes"

Layers = dict[str, tuple[Tensor, Tensor]]
"""From a layer's name to its class logits (B, Q, C) and boxes (B, Q, 4) cxcywh, in order."""


@torch.no_grad()
def diagnose(model: nn.Module, data: DetectionData, batch_size: int, device: torch.device) -> dict[str, Any]:
    """What the final metrics do not tell, in percent unless it says otherwise.

    AP of every decoder layer, and of the initial boxes of a wrapped model; of the last layer AP after NMS at an IoU of
    0.7, AP if what NMS leaves were ranked by its true IoU (what the boxes allow, were their scores right), recall at
    IoUs of 0.5 and 0.75, and the number of near duplicates of each truth that is found, itself included (1 is the
    best). Of a wrapped model also AP if every box were the best that its initial box and the bins allow
    (:func:`within_bins`).
    """
    was_training = model.training
    model.eval()
    layers: dict[str, list[np.ndarray]] = {}
    frames: list[np.ndarray] = []
    for start in range(0, len(data), batch_size):
        part = slice(start, start + batch_size)
        labels = [
            {"boxes": boxes.to(device), "class_labels": classes.to(device)}
            for boxes, classes in zip(data.boxes[part], data.labels[part], strict=True)
        ]
        predicted = predict_layers(model, normalise(data.images[part].to(device)), labels)
        for name, outputs in predicted.items():
            layers.setdefault(name, []).append(read_out(*outputs, data, part))
        if INITIAL in predicted:
            logits, _ = [*predicted.values()][-1]
            frames.append(read_out(logits, predicted[INITIAL][1], data, part))
    model.train(was_training)
    detections = {name: np.concatenate(parts) for name, parts in layers.items()}
    last = detections[list(detections)[-1]]
    single = without_duplicates(last)
    found = {
        "AP_by_layer": {name: coco_metrics(rows, data.coco, data.sides)["AP"] for name, rows in detections.items()},
        "AP_after_NMS": coco_metrics(single, data.coco, data.sides)["AP"],
        # of all detections the truths' near duplicates would come before the next truth
        "AP_after_NMS_ranked_by_IoU": coco_metrics(ranked_by_iou(single, data.coco), data.coco, data.sides)["AP"],
        **overlaps(last, data.coco),
    }
    if frames:
        binding = binding_of(getattr(model, "detector", model))
        assert binding is not None
        best = within_bins(last, np.concatenate(frames), data.coco, binding.config.bin_values())
        found["AP_within_bins"] = coco_metrics(best, data.coco, data.sides)["AP"]
    return found


def without_duplicates(detections: Detected) -> Detected:
    """What non-maximum suppression within images and classes leaves."""
    boxes = box_convert(torch.from_numpy(detections[:, 1:5]), "xywh", "xyxy")
    groups = np.unique(detections[:, [0, 6]], axis=0, return_inverse=True)[1].reshape(-1)
    kept = batched_nms(boxes, torch.from_numpy(detections[:, 5]), torch.from_numpy(groups), NMS_IOU)
    return detections[kept.sort().values.numpy()]


def ious(detections: Detected, coco: dict[str, Any]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each truth that is no crowd: its box (1, 4) xywh, the detections in its image and of its class as indices
    (n,), and their IoUs (n,)."""
    ours: dict[tuple[int, int], list[int]] = {}
    for index, (image, category) in enumerate(detections[:, [0, 6]].astype(int).tolist()):
        ours.setdefault((image, category), []).append(index)
    for truth in coco["annotations"]:
        if not truth.get("iscrowd"):
            rows = np.array(ours.get((truth["image_id"], truth["category_id"]), []), dtype=int)
            box = np.array([truth["bbox"]], dtype=np.float64)
            yield box, rows, coco_mask.iou(detections[rows, 1:5], box, [0])[:, 0] if len(rows) else np.zeros(0)


def ranked_by_iou(detections: Detected, coco: dict[str, Any]) -> Detected:
    """The detections with their best IoU to a truth of their class as score."""
    scores = np.zeros(len(detections))
    for _, rows, iou in ious(detections, coco):
        scores[rows] = np.maximum(scores[rows], iou)
    ranked = detections.copy()
    ranked[:, 5] = scores
    return ranked


def within_bins(detections: Detected, frames: Detected, coco: dict[str, Any], weights: Tensor) -> Detected:
    """The detections that overlap a truth by more than half, with the nearest box to it that their bins allow.

    frames: the same detections with their initial boxes, whose edges move by W(0) to W(N) of their sides. weights: W.
    """
    overlap = np.full(len(detections), NEAR_IOU)
    best = detections.copy()
    for truth, rows, iou in ious(detections, coco):
        nearest = iou > overlap[rows]
        rows = rows[nearest]
        overlap[rows] = iou[nearest]
        frame = box_convert(torch.from_numpy(frames[rows, 1:5]), "xywh", "cxcywh")
        target = box_convert(torch.from_numpy(truth), "xywh", "cxcywh").expand_as(frame)
        offsets = edge_offsets(frame, target).clamp(weights[0], weights[-1]) * frame[:, 2:].repeat(1, 2)
        outwards = offsets * offsets.new_tensor([-1, -1, 1, 1])
        best[rows, 1:5] = box_convert(to_corners(frame) + outwards, "xyxy", "xywh").numpy()
    return best


def overlaps(detections: Detected, coco: dict[str, Any]) -> dict[str, float]:
    """Recall at two IoUs in percent, and near duplicates per truth found, of truths that are no crowds."""
    best, duplicates = [], []
    for _, rows, iou in ious(detections, coco):
        best.append(float(iou.max(initial=0.0)))
        scores = detections[rows, 5][iou > NEAR_IOU]
        if len(scores):
            duplicates.append(int((scores >= NEAR_SCORE * scores.max()).sum()))
    return {
        "recall50": 100 * float(np.mean(np.array(best) >= 0.5)),
        "recall75": 100 * float(np.mean(np.array(best) >= 0.75)),
        "near_duplicates": float(np.mean(duplicates)) if duplicates else 0.0,
    }


def predict_layers(model: Any, pixels: Tensor, labels: list[dict[str, Tensor]]) -> Layers:
    """What each decoder layer predicts, as the host hands it to its loss; of a wrapped model the initial boxes before.

    model: in evaluation mode. labels: the images', which hosts want to see before they make losses.
    """
    detector = getattr(model, "detector", model)
    if detector is model:
        capture = _losses_of_transformers
    elif hasattr(detector, "bbox_head"):
        capture = _heads_of_mmdetection
    else:
        capture = _layers_of_detrex if hasattr(detector, "criterion") else _outputs_of_rtdetr
    keep: AbstractContextManager[list[FDRRecord]] = keep_records(detector) if is_wrapped(detector) else nullcontext([])
    with capture(detector) as found, keep as records:
        model(pixel_values=pixels, labels=labels)
    logits, boxes = found
    layers = {f"layer {index}": pair for index, pair in enumerate(zip(logits, boxes, strict=True), start=1)}
    if records and records[0].initial_logits is not None:
        queries = logits[0].shape[1]
        # denoising queries are in front, one-to-many queries behind
        matched = slice(queries) if hasattr(detector, "num_queries_one2one") else slice(-queries, None)
        record = records[0].queries(matched)
        assert record.initial_logits is not None
        layers = {INITIAL: (record.initial_logits, record.initial_boxes), **layers}
    if hasattr(model, "of_classes"):  # logits of a text's tokens
        layers = {name: (model.of_classes(of_tokens), boxes) for name, (of_tokens, boxes) in layers.items()}
    return layers


@contextmanager
def _losses_of_transformers(detector: Any) -> Iterator[list[list[Tensor]]]:
    """Put a loss function in the host's place that keeps all layers' logits and boxes."""
    found: list[list[Tensor]] = []

    def keep(logits: Tensor, labels: Any, device: Any, boxes: Tensor, config: Any, *layers: Tensor, **more: Any) -> Any:
        named = "outputs_class" in more
        classes, coordinates = (more["outputs_class"], more["outputs_coord"]) if named else layers[:2]
        # the layers are the second axis in RT-DETR, the first one elsewhere
        axis = 1 if classes[:, -1].shape == logits.shape and torch.equal(classes[:, -1], logits) else 0
        # the last layer as the host reports it: Conditional-DETR norms its states once more
        found.extend([[*classes.unbind(axis)[:-1], logits], [*coordinates.unbind(axis)[:-1], boxes]])
        return logits.sum(), {}, None

    own = detector.__dict__.get("_loss_function")
    detector.loss_function = keep
    try:
        yield found
    finally:
        del detector._loss_function
        if own is not None:
            detector.loss_function = own


@contextmanager
def _layers_of_detrex(detector: Any) -> Iterator[list[list[Tensor]]]:
    """Keep what the model would give its criterion of all layers."""
    found: list[list[Tensor]] = []

    def keep(logits: Tensor, boxes: Tensor) -> None:
        if not found:  # one-to-many queries come after
            found.extend([[*logits], [*boxes]])

    detector._set_aux_loss = keep
    try:
        yield found
    finally:
        del detector._set_aux_loss


@contextmanager
def _heads_of_mmdetection(detector: Any) -> Iterator[list[list[Tensor]]]:
    """Keep what the model's head reports of all layers."""
    found: list[list[Tensor]] = []
    forward = detector.bbox_head.forward

    def keep(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        logits, boxes = forward(*args, **kwargs)
        found.extend([[*logits], [*boxes]])
        return logits, boxes

    detector.bbox_head.forward = keep
    try:
        yield found
    finally:
        del detector.bbox_head.forward


@contextmanager
def _outputs_of_rtdetr(detector: Any) -> Iterator[list[list[Tensor]]]:
    """Let the decoder report all layers, its parts in evaluation mode and without denoising, and keep them."""
    found: list[list[Tensor]] = []
    decoder = detector.decoder
    holders, denoising = (decoder, decoder.decoder), decoder.num_denoising

    def keep(detector: nn.Module, arguments: tuple[Any, ...], outputs: dict[str, Any]) -> None:
        # the encoder's sets are behind those of the layers
        sets = [*outputs["aux_outputs"][: len(decoder.decoder.layers) - 1], outputs]
        found.extend([[layer["pred_logits"] for layer in sets], [layer["pred_boxes"] for layer in sets]])

    hook = detector.register_forward_hook(keep)
    decoder.num_denoising = 0
    for module in holders:
        module.training = True
    try:
        yield found
    finally:
        for module in holders:
            module.training = False
        decoder.num_denoising = denoising
        hook.remove()
