"""The hosts' selection of detections, as a part of the graph."""

import torch
from torch import Tensor, nn

from ..boxes import to_corners


def select_detections(
    logits: Tensor, boxes: Tensor, target_sizes: Tensor, num_detections: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``num_detections`` highest (query, class) scores, as the hosts with sigmoid classes select them.

    Args:
        logits: ``(B, Q, classes)``.
        boxes: ``(B, Q, 4)`` cxcywh in image sides.
        target_sizes: ``(B, 2)``, height and width in pixels of the images that boxes shall be given in.
        num_detections: n.

    Returns:
        Scores ``(B, n)``, labels ``(B, n)`` int64, boxes ``(B, n, 4)`` xyxy in pixels, best first.
    """
    num_classes = logits.shape[-1]
    # the logits' order is the scores': the highest ones need no sigmoid of all the others
    best, indices = logits.flatten(1).topk(num_detections, dim=-1)
    queries = (indices // num_classes).unsqueeze(-1).expand(-1, -1, 4)
    height, width = target_sizes.to(boxes.dtype).unbind(-1)
    sides = torch.stack([width, height, width, height], dim=-1).unsqueeze(1)
    return best.sigmoid(), indices % num_classes, to_corners(boxes.gather(1, queries)) * sides


class DetectorWithPostprocess(nn.Module):
    """A detector, images to logits and boxes, with :func:`select_detections` behind it."""

    def __init__(self, detector: nn.Module, num_detections: int) -> None:
        super().__init__()
        self.detector = detector
        self.num_detections = num_detections

    def forward(self, images: Tensor, target_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, boxes = self.detector(images)
        return select_detections(logits, boxes, target_sizes, self.num_detections)
