"""The hosts' selection of detections, as a part of the graph."""

import torch
from torch import Tensor, nn

from ..boxes import to_corners


class DetectorWithPostprocess(nn.Module):
    """A detector and the selection of its best detections: the ``num_detections`` highest (query, class) scores.

    It is what the hosts with sigmoid classes do: Deformable-DETR and its kin, DINO, RT-DETR.
    """

    def __init__(self, detector: nn.Module, num_detections: int) -> None:
        super().__init__()
        self.detector = detector
        self.num_detections = num_detections

    def forward(self, images: Tensor, target_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect.

        Args:
            images: ``(B, 3, H, W)``.
            target_sizes: ``(B, 2)``, height and width in pixels of the images that boxes shall be given in.

        Returns:
            Scores ``(B, n)``, labels ``(B, n)`` int64, boxes ``(B, n, 4)`` xyxy in pixels, best first.
        """
        logits, boxes = self.detector(images)
        num_classes = logits.shape[-1]
        # the logits' order is the scores'; the highest ones need no sigmoid of all the others
        best, indices = logits.flatten(1).topk(self.num_detections, dim=-1)
        queries = (indices // num_classes).unsqueeze(-1).expand(-1, -1, 4)
        height, width = target_sizes.to(boxes.dtype).unbind(-1)
        sides = torch.stack([width, height, width, height], dim=-1).unsqueeze(1)
        return best.sigmoid(), indices % num_classes, to_corners(boxes.gather(1, queries)) * sides
