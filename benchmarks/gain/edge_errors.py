"""Detections that found their truth: how far off each edge is, and how far off its distribution says it may be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from dfine_plugin.benchmarks.data.detection_data import DetectionData, normalised
from dfine_plugin.boxes import edge_offsets, to_corners
from dfine_plugin.wrapping import predict_distributions

LEAST_IOU = 0.5


@dataclass(frozen=True)
class EdgeErrors:
    """n detections with their truths; edges in the order left, top, right, bottom, lengths in pixels.

    Attributes:
        errors: ``(n, 4)``, the predicted edge less the true one, x to the right and y downwards.
        deviations: ``(n, 4)``, the standard deviations that the distributions say.
        levels: ``(n, 4)``, the share of its distribution that lies below the true offset.
        sides: ``(n, 4)``, the predicted box's width for left and right, its height for top and bottom.
        scores: ``(n,)``.
    """

    errors: Tensor
    deviations: Tensor
    levels: Tensor
    sides: Tensor
    scores: Tensor

    def __len__(self) -> int:
        return len(self.errors)


def match(
    scores: Tensor,
    classes: Tensor,
    boxes: Tensor,
    truths: Tensor,
    labels: Tensor,
    threshold: float,
    least_iou: float = LEAST_IOU,
) -> tuple[Tensor, Tensor]:
    """Detections of one image and the truths that they found, by COCO's rule.

    From the highest score down to the threshold, each detection takes the truth of its class that it overlaps most, of
    those that are left, where their IoU is ``least_iou`` or above. So a truth has the surest detection that fits, not
    the best box.

    Args:
        scores: ``(Q,)``.
        classes: ``(Q,)``.
        boxes: ``(Q, 4)`` cxcywh.
        truths: ``(M, 4)`` cxcywh.
        labels: ``(M,)``, their classes.
        threshold: least score.
        least_iou: above 0.

    Returns:
        ``(n,)`` indices of detections, ``(n,)`` indices of truths.
    """
    iou = box_iou(to_corners(boxes), to_corners(truths))
    iou[classes[:, None] != labels] = 0
    found: list[tuple[int, int]] = []
    for query in scores.argsort(descending=True, stable=True).tolist():
        if len(found) == len(truths) or scores[query] < threshold:
            break
        truth = int(iou[query].argmax())
        if iou[query, truth] >= least_iou:
            found.append((query, truth))
            iou[:, truth] = 0
    queries, indices = torch.tensor(found, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return queries, indices


def cumulative(probabilities: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """The share of each distribution that lies below an offset, each bin's probability spread evenly over the offsets
    that are nearer to it than to its neighbours.

    Args:
        probabilities: ``(..., K)``.
        weights: ``(K,)``, W.
        offsets: ``(...)``, in the same unit.

    Returns:
        ``(...)`` in ``[0, 1]``.
    """
    borders = torch.cat([weights[:1], (weights[1:] + weights[:-1]) / 2, weights[-1:]])
    inside = (offsets[..., None] - borders[:-1]) / borders.diff()
    return (probabilities * inside.clamp(0, 1)).sum(-1)


@torch.no_grad()
def edge_errors(
    model: nn.Module,
    data: DetectionData,
    normalisation: Mapping[str, Any],
    threshold: float,
    batch_size: int,
    device: torch.device,
    track: Callable[[range], Iterable[int]] = iter,
) -> EdgeErrors:
    """What a wrapped model's detections in all images are off by; each query stands for its best class.

    Args:
        model: in evaluation mode, on the device.
        data: its images and truths; crowd regions are no truths.
        normalisation: of the model's checkpoint.
        threshold: least score of a detection.
        batch_size: images at a time.
        device: of the model.
        track: shows how far it is, given the images at which batches start.
    """
    parts: list[EdgeErrors] = []
    for start in track(range(0, len(data), batch_size)):
        part = slice(start, start + batch_size)
        logits, boxes, record = predict_distributions(model, normalised(data.images[part].to(device), normalisation))
        probabilities = record.corner_logits[-1].float().softmax(-1).cpu()
        scores, classes = logits.float().sigmoid().max(-1)
        predictions = zip(
            scores.cpu(),
            classes.cpu(),
            boxes.float().cpu(),
            record.edge_deviations().cpu(),
            record.initial_boxes.float().cpu(),
            probabilities,
            data.boxes[part],
            data.labels[part],
            data.original_sizes()[part],
            strict=True,
        )
        for score, label, box, deviation, initial, probability, truths, labels, size in predictions:
            found, theirs = match(score, label, box, truths, labels, threshold)
            true = truths[theirs]
            parts.append(
                EdgeErrors(
                    errors=(to_corners(box[found]) - to_corners(true)) * size,
                    deviations=deviation[found] * size,
                    levels=cumulative(probability[found], record.weights.cpu(), edge_offsets(initial[found], true)),
                    sides=box[found][:, 2:].repeat(1, 2) * size,
                    scores=score[found],
                )
            )
    columns = {field.name: torch.cat([getattr(one, field.name) for one in parts]) for field in fields(EdgeErrors)}
    return EdgeErrors(**columns)
