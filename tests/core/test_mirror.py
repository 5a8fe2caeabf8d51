"""Mirrored images: boxes, truths and distributions mirrored have the same losses, and mirrored gradients."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dfine_plugin import FDRConfig, decode_boxes, union_matching
from dfine_plugin.assignment import MatchingCost, SetToMatch, match_sets
from dfine_plugin.criterion import box_losses, distribution_losses, flatten_pairs
from dfine_plugin.record import FDRRecord

from .drawing import LAW, bins, random, random_boxes, seeds

EDGES = {0: [2, 1, 0, 3], 1: [0, 3, 2, 1]}
"""Where the edges left, top, right, bottom go, for images mirrored in x or in y."""


def mirrored(boxes: Tensor, axis: int) -> Tensor:
    """Boxes cxcywh of the mirrored image."""
    boxes = boxes.clone()
    boxes[..., axis] = 1 - boxes[..., axis]
    return boxes


def losses(
    initial_boxes: Tensor, logits: list[Tensor], class_logits: list[Tensor], truths: list[Tensor], shared: bool
) -> Tensor:
    """All box losses, FGL and DDF over the matches of each layer, or over their union."""
    weights = bins()
    boxes = [decode_boxes(initial_boxes.detach(), layer, weights) for layer in logits]
    labels = [torch.arange(len(of_image)) % 2 for of_image in truths]
    sets = [SetToMatch(*outputs, labels, truths) for outputs in zip(class_logits, boxes, strict=True)]
    matches = match_sets(sets, MatchingCost(2, 5, 2))
    if shared:
        pairs = [flatten_pairs(union_matching(matches), truths, torch.device("cpu"))] * len(boxes)
    else:
        pairs = [flatten_pairs(match, truths, torch.device("cpu")) for match in matches]
    record = FDRRecord(weights, initial_boxes, corner_logits=logits, boxes=boxes)
    fgl, ddf = distribution_losses(record, class_logits[-1], pairs, 3.0, FDRConfig.paper())
    of_boxes = [loss for layer, flat in zip(boxes, pairs, strict=True) for loss in box_losses([layer], flat, 3.0)]
    return torch.stack([*fgl, *ddf, *(term for terms in of_boxes for term in terms.values())])


@LAW
@given(
    seeds,
    st.integers(1, 4),
    st.integers(1, 6),
    st.lists(st.integers(0, 4), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from([0, 1]),
)
def test_mirrored_predictions_and_truths_have_the_same_losses_and_mirrored_gradients(
    seed: int, layers: int, queries: int, counts: list[int], shared: bool, axis: int
) -> None:
    initial_boxes = random_boxes(seed, len(counts), queries)
    class_logits = [random(seed + 10 + layer, len(counts), queries, 2) for layer in range(layers)]
    logits = [random(seed + 20 + layer, len(counts), queries, 4, 9).requires_grad_() for layer in range(layers)]
    truths = [random_boxes(seed + 30 + image, count) for image, count in enumerate(counts)]
    of_mirror = [layer.detach()[:, :, EDGES[axis]].requires_grad_() for layer in logits]

    found = losses(initial_boxes, logits, class_logits, truths, shared)
    mirror = mirrored(initial_boxes, axis), of_mirror, class_logits, [mirrored(boxes, axis) for boxes in truths]
    expected = losses(*mirror, shared)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    found.sum().backward()
    expected.sum().backward()
    for ours, theirs in zip(logits, of_mirror, strict=True):
        torch.testing.assert_close(ours.grad[:, :, EDGES[axis]], theirs.grad, rtol=1e-9, atol=1e-12)
