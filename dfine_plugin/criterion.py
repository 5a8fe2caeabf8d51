"""FGL and DDF over all layers of a decoder, and what the hosts' box losses need for the union."""

import torch
import torch.distributed as dist
from torch import Tensor

from .boxes import aligned_giou, aligned_iou, at_least_float32, encode_boxes
from .config import FDRConfig
from .losses import ddf_loss, fgl_of_bins, query_counts
from .matching import Pairs
from .record import FDRRecord


def flatten_pairs(pairs: Pairs, truths: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of all images in one go: image indices and query indices ``(M,)``, and the truths' boxes ``(M, 4)``."""
    images = torch.cat([torch.full_like(queries, image) for image, (queries, _) in enumerate(pairs)])
    queries = torch.cat([queries for queries, _ in pairs])
    boxes = torch.cat([boxes[indices.to(boxes.device)] for boxes, (_, indices) in zip(truths, pairs, strict=True)])
    return images.to(device), queries.to(device), boxes.to(device)


def average_over_processes(values: Tensor) -> Tensor:
    """The mean of a tensor over the processes of a distributed run; every process must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / dist.get_world_size()


def mean_over_processes(count: float, device: torch.device) -> Tensor | float:
    """A count of pairs as a normaliser: averaged over the processes of a distributed run, at least 1."""
    if not (dist.is_available() and dist.is_initialized()):
        return max(float(count), 1.0)
    return average_over_processes(torch.tensor(float(count), device=device)).clamp(min=1)


def box_losses(boxes: Tensor, truths: list[Tensor], pairs: Pairs, num_boxes: float | Tensor) -> dict[str, Tensor]:
    """The hosts' L1 and GIoU losses, over aligned pairs instead of the diagonal of all against all.

    Args:
        boxes: ``(B, Q, 4)`` cxcywh.
        truths: for each image ``(n, 4)`` cxcywh.
        pairs: which query answers for which truth.
        num_boxes: the normaliser.

    Returns:
        ``loss_bbox`` and ``loss_giou``, scalars.
    """
    images, queries, target = flatten_pairs(pairs, truths, boxes.device)
    predicted = at_least_float32(boxes[images, queries])
    target = target.to(predicted.dtype)
    return {
        "loss_bbox": (predicted - target).abs().sum() / num_boxes,
        "loss_giou": (1 - aligned_giou(predicted, target)).sum() / num_boxes,
    }


def distribution_losses(
    record: FDRRecord,
    teacher_class_logits: Tensor,
    truths: list[Tensor],
    pairs: list[Pairs],
    num_boxes: float | Tensor,
    config: FDRConfig,
    over_processes: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """FGL of every layer, and DDF of every layer but the last.

    Args:
        record: the predictions of the queries in question.
        teacher_class_logits: ``(B, Q, classes)`` of the last layer; their highest confidence weighs DDF where a query
            has no truth.
        truths: for each image ``(n, 4)`` cxcywh.
        pairs: for each layer its pairs; one object for all layers (the union) is encoded once.
        num_boxes: FGL's normaliser.
        config: temperature, and whether there is DDF.
        over_processes: whether DDF's parts are weighted by the counts of all processes of a distributed run; then each
            of them must call this.

    Returns:
        L unweighted FGL terms, and L - 1 unweighted DDF terms (none without ``config.ddf``).
    """
    fgl: list[Tensor] = []
    taught: list[tuple[Tensor, Tensor]] = []  # of each layer but the last: which queries are matched, and all qualities
    device = record.initial_boxes.device
    frame = record.initial_boxes.detach()
    confidence = at_least_float32(teacher_class_logits.detach()).sigmoid().amax(-1)
    encoded_for: Pairs | None = None
    for layer, (logits, boxes) in enumerate(zip(record.corner_logits, record.boxes, strict=True)):
        if pairs[layer] is not encoded_for:
            encoded_for = pairs[layer]
            images, queries, target = flatten_pairs(encoded_for, truths, device)
            target = target.to(frame.dtype)
            bins = encode_boxes(frame[images, queries], target, record.weights)
        iou = aligned_iou(boxes[images, queries].detach(), target)
        fgl.append(fgl_of_bins(logits[images, queries], *bins, iou, num_boxes))
        if config.ddf and layer < len(record.corner_logits) - 1:
            matched = torch.zeros_like(confidence, dtype=torch.bool)
            matched[images, queries] = True
            taught.append((matched, confidence.index_put((images, queries), iou.to(confidence.dtype))))
    if not taught:
        return fgl, []
    counts = torch.stack([query_counts(matched) for matched, _ in taught]).to(frame.dtype)
    if over_processes:
        counts = average_over_processes(counts)
    teacher = record.corner_logits[-1]
    ddf = [
        ddf_loss(student, teacher, *of_queries, config.temperature, of_layer)
        for student, of_queries, of_layer in zip(record.corner_logits, taught, counts, strict=False)
    ]
    return fgl, ddf
