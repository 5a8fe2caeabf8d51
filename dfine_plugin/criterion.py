"""FGL and DDF over all layers of a decoder, and what the hosts' box losses need for the union."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .boxes import aligned_giou, aligned_iou, at_least_float32, encode_boxes
from .config import FDRConfig
from .losses import ddf_of_targets, fgl_of_bins, fgl_of_distributions, query_counts, soft_targets
from .matching import Pairs
from .record import FDRRecord


class FlatPairs(NamedTuple):
    """The M pairs of a batch: ``(M,)`` indices of their images, queries and truths (counted over all images), and the
    truths' boxes ``(M, 4)``."""

    images: Tensor
    queries: Tensor
    truths: Tensor
    boxes: Tensor

    def of(self, predictions: Sequence[Tensor]) -> Tensor:
        """What several layers or sets, ``(B, Q, ...)`` each, predict for the pairs: ``(S, M, ...)``."""
        return torch.stack([tensor[self.images, self.queries] for tensor in predictions])


def flatten_pairs(pairs: Pairs, truths: list[Tensor], device: torch.device) -> FlatPairs:
    """Pairs of all images in one go, from their indices and each image's truths ``(n, 4)``."""
    queries, indices = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    images = torch.repeat_interleave(torch.arange(len(pairs)), torch.tensor([len(queries) for queries, _ in pairs]))
    starts = torch.tensor([0, *accumulate(len(boxes) for boxes in truths[:-1])])[images]
    # to the device in one copy, that nothing waits for, of what is not there yet
    images, starts = torch.stack([images, starts]).to(queries.device, non_blocking=True)
    images, queries, indices = torch.stack([images, queries, indices + starts]).to(device, non_blocking=True)
    return FlatPairs(images, queries, indices, torch.cat(list(truths)).to(device)[indices])


def copy_pairs(sets: Sequence[Pairs], device: torch.device) -> list[Pairs]:
    """The pairs of several sets on a device, in one copy that nothing waits for."""
    indices = [index for pairs in sets for pair in pairs for index in pair]
    copies = iter(torch.cat(indices).to(device, non_blocking=True).split([len(index) for index in indices]))
    return [[(next(copies), next(copies)) for _ in pairs] for pairs in sets]


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
    return average_over_processes(torch.full((), float(count), device=device)).clamp(min=1)


def box_losses(sets: Sequence[Tensor], pairs: FlatPairs, num_boxes: float | Tensor) -> list[dict[str, Tensor]]:
    """The hosts' L1 and GIoU losses, over aligned pairs instead of the diagonal of all against all.

    Args:
        sets: boxes of prediction sets, ``(B, Q, 4)`` cxcywh each.
        pairs: which query answers for which truth, in all of the sets.
        num_boxes: the normaliser.

    Returns:
        For each set ``loss_bbox`` and ``loss_giou``, scalars.
    """
    predicted = at_least_float32(pairs.of(sets))
    target = pairs.boxes.to(predicted.dtype).expand_as(predicted)
    l1 = (predicted - target).abs().sum((1, 2)) / num_boxes
    giou = (1 - aligned_giou(predicted, target)).sum(1) / num_boxes
    # copies: hosts weigh them in place, which a part of a stack would pass on to the others
    return [{"loss_bbox": a.clone(), "loss_giou": b.clone()} for a, b in zip(l1, giou, strict=True)]


def distribution_losses(
    record: FDRRecord,
    teacher_class_logits: Tensor,
    pairs: Sequence[FlatPairs],
    num_boxes: float | Tensor,
    config: FDRConfig,
    over_processes: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """FGL of every layer, and DDF of every layer but the last.

    Args:
        record: the predictions of the queries in question.
        teacher_class_logits: ``(B, Q, classes)`` of the last layer; their highest confidence weighs DDF where a query
            has no truth.
        pairs: for each layer its pairs; one object for all layers, such as the union, is dealt with in one go.
        num_boxes: FGL's normaliser.
        config: temperature, and whether there is DDF. Its parts are weighted by the counts of these very queries; the
            authors' code weighs denoising queries by the counts of the matched ones, and no difference was shown.
        over_processes: whether DDF's parts are weighted by the counts of all processes of a distributed run; then each
            of them must call this.

    Returns:
        L unweighted FGL terms, and L - 1 unweighted DDF terms (none without ``config.ddf``).
    """
    num_layers = len(record.boxes)
    frame = record.initial_boxes.detach()
    logits = record.supervised_logits()
    fgl: list[Tensor] = []
    iou: list[Tensor] = []
    shared = all(of_layer is pairs[0] for of_layer in pairs)
    for layers in [slice(0, num_layers)] if shared else [slice(i, i + 1) for i in range(num_layers)]:
        flat = pairs[layers.start]
        target = flat.boxes.to(frame.dtype)
        frames = frame[flat.images, flat.queries]
        boxes = flat.of([layer.detach() for layer in record.boxes[layers]])
        quality = aligned_iou(boxes, target.expand_as(boxes))
        predicted = flat.of(logits[layers])
        if record.lesson is None:
            of_layers = fgl_of_bins(predicted, *encode_boxes(frames, target, record.weights), quality, num_boxes)
        else:
            lesson = record.lesson.targets(flat.images, target, frames, record.weights)
            of_layers = fgl_of_distributions(predicted, lesson, quality, num_boxes)
        # copies: hosts weigh them in place, which a part of a stack would pass on to the others
        fgl += [x.clone() for x in of_layers]
        iou += quality.unbind()
    if not config.ddf or num_layers == 1:
        return fgl, []

    confidence = at_least_float32(teacher_class_logits.detach()).sigmoid().amax(-1)
    taught: list[tuple[Tensor, Tensor]] = []  # of each layer but the last: which queries are matched, all qualities
    for flat, quality in zip(pairs[:-1], iou, strict=False):
        at, known = (flat.images, flat.queries), torch.ones_like(flat.images, dtype=torch.bool)
        # not matched[at] = True, which would bring the True to the device and wait for it
        matched = torch.zeros_like(confidence, dtype=torch.bool).index_put_(at, known)
        taught.append((matched, confidence.index_put(at, quality.to(confidence.dtype))))
    counts = torch.stack([query_counts(matched) for matched, _ in taught]).to(frame.dtype)
    if over_processes:
        counts = average_over_processes(counts)
    targets = soft_targets(logits[-1], config.temperature)
    ddf = [
        ddf_of_targets(student, *targets, *of_queries, config.temperature, of_layer)
        for student, of_queries, of_layer in zip(logits, taught, counts, strict=False)
    ]
    return fgl, ddf
