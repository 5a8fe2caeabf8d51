"""The hosts' selection of detections, as a part of the graph."""

import torch
from torch import Tensor, nn

from ..boxes import to_corners
from ..record import close_scope, current_record, open_scope


def select_detections(
    logits: Tensor, boxes: Tensor, target_sizes: Tensor, num_detections: int, deviations: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The ``num_detections`` highest (query, class) scores, as the hosts with sigmoid classes select them.

    Args:
        logits: ``(B, Q, classes)``.
        boxes: ``(B, Q, 4)`` cxcywh in image sides.
        target_sizes: ``(B, 2)``, height and width in pixels of the images that boxes shall be given in.
        num_detections: n.
        deviations: ``(B, Q, 4)`` in image sides, of the boxes' edges.

    Returns:
        Scores ``(B, n)``, labels ``(B, n)`` int64, boxes ``(B, n, 4)`` xyxy in pixels, best first; and their deviations
        ``(B, n, 4)`` in pixels, if there are any.
    """
    num_classes = logits.shape[-1]
    # the logits' order is the scores': the highest ones need no sigmoid of all the others
    best, indices = logits.flatten(1).topk(num_detections, dim=-1)
    queries = (indices // num_classes).unsqueeze(-1).expand(-1, -1, 4)
    height, width = target_sizes.to(boxes.dtype).unbind(-1)
    sides = torch.stack([width, height, width, height], dim=-1).unsqueeze(1)
    selected = best.sigmoid(), indices % num_classes, to_corners(boxes.gather(1, queries)) * sides
    return selected if deviations is None else (*selected, deviations.gather(1, queries) * sides)


class DetectorWithPostprocess(nn.Module):
    """A detector, images to logits and boxes, or to deviations too, with :func:`select_detections` behind it."""

    def __init__(self, detector: nn.Module, num_detections: int) -> None:
        super().__init__()
        self.detector = detector
        self.num_detections = num_detections

    def forward(self, images: Tensor, target_sizes: Tensor) -> tuple[Tensor, ...]:
        logits, boxes, *deviations = self.detector(images)
        return select_detections(logits, boxes, target_sizes, self.num_detections, *deviations)


class DetectorWithDeviations(nn.Module):
    """A wrapped model's detector, images to logits and boxes, and the deviations of the boxes' edges besides.

    A deployed model opens no scope of its own for the record that its decoder leaves.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        open_scope()
        try:
            logits, boxes = self.detector(images)
            return logits, boxes, current_record().edge_deviations()
        finally:
            close_scope()
