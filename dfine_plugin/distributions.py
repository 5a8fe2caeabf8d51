"""Where a box's edges may lie: their distributions, after W, in the pixels of an image."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .boxes import at_least_float32, to_corners
from .uncertainty import edge_deviations


@dataclass(frozen=True)
class EdgeDistributions:
    """The distributions of boxes' edges; edges in the order left, top, right, bottom, lengths in pixels.

    Attributes:
        probabilities: ``(..., 4, K)``, Pr(n), what each bin has.
        offsets: ``(..., 4, K)``, how far outwards each bin moves its edge: W(n) times the initial box's side.
        initial_edges: ``(..., 4)``, where the initial box's edges lie: x of left and right, y of top and bottom.
        means: ``(..., 4)``, the expected offsets, which move the initial box's edges to the refined one's.
        deviations: ``(..., 4)``, the standard deviations of the offsets.
    """

    probabilities: Tensor
    offsets: Tensor
    initial_edges: Tensor
    means: Tensor
    deviations: Tensor

    @property
    def edges(self) -> Tensor:
        """``(..., 4)``, where the refined box's edges lie."""
        outwards = self.means.new_tensor([-1, -1, 1, 1])
        return self.initial_edges + outwards * self.means

    def of(self, box: int) -> "EdgeDistributions":
        """Those of one box of several: without the first dimension."""
        return EdgeDistributions(**{field.name: getattr(self, field.name)[box] for field in fields(self)})


def edge_distributions(
    initial_boxes: Tensor, corner_logits: Tensor, weights: Tensor, image_size: tuple[int, int]
) -> EdgeDistributions:
    """What logits say about the edges of boxes in an image.

    The offset of an edge has the expectation ``s sum_n W(n) Pr(n)``, by which the edge moves (D-FINE, eq. 1), where s
    is the initial box's width for left and right, its height for top and bottom; its deviation is that of
    :func:`~dfine_plugin.edge_deviations`.

    Args:
        initial_boxes: ``(..., 4)`` cxcywh in units of the image side.
        corner_logits: ``(..., 4, K)``; further leading dimensions, such as layers, are broadcast.
        weights: ``(K,)``, the bins' offsets W in initial-box sides.
        image_size: width and height in pixels.
    """
    boxes = at_least_float32(initial_boxes)
    boxes = boxes * boxes.new_tensor([*image_size, *image_size])
    sides = torch.cat([boxes[..., 2:], boxes[..., 2:]], dim=-1)
    offsets = sides[..., None] * weights.to(sides.dtype)
    probabilities = at_least_float32(corner_logits).softmax(-1)
    means = (probabilities * offsets).sum(-1)
    deviations = edge_deviations(corner_logits, weights, boxes)
    return EdgeDistributions(probabilities, offsets, to_corners(boxes), means, deviations)
