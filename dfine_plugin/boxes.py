"""Boxes and distributions: from one to the other, and how well two boxes agree.

Boxes are ``(cx, cy, w, h)`` in units of the image side; edges come in the order left, top, right, bottom. Arithmetic is
float32 (or float64 where the input is), whatever the autocast.
"""

import torch
from torch import Tensor

MIN_SIDE = 1e-5
"""The least side of a decoded box, in image sides: each edge can move by a whole side, so raw sides can be negative."""


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` itself in float32 or float64, else cast to float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """``log(x / (1 - x))`` with both parts held at ``eps`` or above; any shape."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def straight_through_clamp(x: Tensor, minimum: float | None = None, maximum: float | None = None) -> Tensor:
    """Clamp the value, pass the gradient as if nothing had been clamped: what fell out can be pulled back."""
    held = x.clamp(minimum, maximum)
    return held.detach() + (x - x.detach()) if held.requires_grad else held


def to_corners(boxes: Tensor) -> Tensor:
    """``(..., 4)`` cxcywh to xyxy."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def decode_boxes(initial_boxes: Tensor, logits: Tensor, weights: Tensor) -> Tensor:
    """Move each edge of the initial boxes by the expectation of its distribution (D-FINE, eq. 1).

    ``offset = sum_n W(n) softmax(logits)(n)``; left and right edges move by ``offset * w``, top and bottom by
    ``offset * h`` of the initial box, outwards where the offset is positive. A side that would fall below
    :data:`MIN_SIDE` is held there, its gradient is not.

    Args:
        initial_boxes: ``(..., 4)`` cxcywh.
        logits: ``(..., 4, K)``, one distribution over K bins an edge.
        weights: ``(K,)``, the bins' offsets in initial-box sides.

    Returns:
        ``(..., 4)`` cxcywh, float32 or float64.
    """
    return move_edges(initial_boxes, at_least_float32(logits).softmax(-1), weights)


def move_edges(initial_boxes: Tensor, probabilities: Tensor, weights: Tensor) -> Tensor:
    """:func:`decode_boxes` for the distributions themselves, ``(..., 4, K)``."""
    initial_boxes = at_least_float32(initial_boxes)
    offsets = (probabilities * weights.to(probabilities.dtype)).sum(-1)
    near, far = offsets[..., :2], offsets[..., 2:]
    sides = initial_boxes[..., 2:]
    centres = initial_boxes[..., :2] + sides * (far - near) / 2
    moved_sides = straight_through_clamp(sides * (1 + near + far), MIN_SIDE)
    return torch.cat([centres, moved_sides], dim=-1)


def edge_offsets(initial_boxes: Tensor, target_boxes: Tensor) -> Tensor:
    """phi, how far out each edge of the initial boxes has to move to the target's: two ``(..., 4)`` cxcywh to
    ``(..., 4)`` in initial-box sides."""
    initial_boxes, target_boxes = at_least_float32(initial_boxes), at_least_float32(target_boxes)
    sides = initial_boxes[..., 2:].repeat(*[1] * (initial_boxes.ndim - 1), 2)
    outwards = to_corners(target_boxes) - to_corners(initial_boxes)
    return torch.cat([-outwards[..., :2], outwards[..., 2:]], dim=-1) / sides.clamp(min=1e-12)


@torch.no_grad()
def encode_boxes(initial_boxes: Tensor, target_boxes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two bins, and their weights, that would carry each edge of an initial box to the true edge (D-FINE, eq. 3).

    phi, the offset wanted in initial-box sides, lies between the bins ``left`` and ``left + 1``; the weights
    interpolate linearly in W, ``left_weight W(left) + right_weight W(left + 1) = phi``, and sum to 1. Beyond the range
    of W all weight is on the end bin.

    Args:
        initial_boxes: ``(M, 4)`` cxcywh.
        target_boxes: ``(M, 4)`` cxcywh.
        weights: ``(K,)`` increasing.

    Returns:
        ``left_bin (M, 4)`` int64 in ``[0, K - 2]``, ``left_weight (M, 4)``, ``right_weight (M, 4)``; no gradient.
    """
    return two_bins(edge_offsets(initial_boxes, target_boxes), weights)


@torch.no_grad()
def two_bins(phi: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`encode_boxes` for the offsets themselves, of any shape."""
    weights = weights.to(phi.dtype)
    phi = phi.clamp(weights[0], weights[-1])
    left_bin = torch.searchsorted(weights, phi, right=True).sub_(1).clamp_(0, len(weights) - 2)
    below, above = weights[left_bin], weights[left_bin + 1]
    right_weight = (phi - below) / (above - below)
    return left_bin, 1 - right_weight, right_weight


def aligned_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of ``boxes[i]`` with ``others[i]``: ``(..., 4)`` cxcywh twice, to ``(...)``."""
    return _overlap(boxes, others)[0]


def aligned_giou(boxes: Tensor, others: Tensor) -> Tensor:
    """Generalised IoU of ``boxes[i]`` with ``others[i]``: ``(..., 4)`` cxcywh twice, to ``(...)`` in ``[-1, 1]``."""
    iou, union, corners, other_corners = _overlap(boxes, others)
    hull = torch.max(corners[..., 2:], other_corners[..., 2:]) - torch.min(corners[..., :2], other_corners[..., :2])
    hull_area = _area(hull)
    return iou - (hull_area - union) / hull_area


def _overlap(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    corners, other_corners = to_corners(at_least_float32(boxes)), to_corners(at_least_float32(others))
    low = torch.max(corners[..., :2], other_corners[..., :2])
    high = torch.min(corners[..., 2:], other_corners[..., 2:])
    intersection = _area((high - low).clamp(min=0))
    union = _area(corners[..., 2:] - corners[..., :2]) + _area(other_corners[..., 2:] - other_corners[..., :2])
    union = union - intersection
    return intersection / union, union, corners, other_corners


def _area(sides: Tensor) -> Tensor:
    # not prod(-1), whose backward asks the device whether there is a zero
    return sides[..., 0] * sides[..., 1]
