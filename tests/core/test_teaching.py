"""Distributions seen from other boxes, and FGL with a teacher, against loops over single places and pairs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dfine_plugin import FDRConfig, decode_boxes, encode_boxes, weighting_function
from dfine_plugin.criterion import FlatPairs, distribution_losses
from dfine_plugin.record import FDRRecord
from dfine_plugin.teaching import Lesson, project_distributions

from . import reference
from .drawing import LAW, bins, random, random_boxes, seeds

OUTWARDS = (-1, -1, 1, 1)


def edges_of(boxes: Tensor, weights: Tensor) -> Tensor:
    """Where the bins of boxes put their edges: ``(M, 4)`` and ``(K,)`` to ``(M, 4, K)``, one by one."""
    places = torch.zeros(len(boxes), 4, len(weights), dtype=boxes.dtype)
    for pair, box in enumerate(boxes.tolist()):
        for edge, at in enumerate(reference.edges(box)):
            for n, value in enumerate(weights.tolist()):
                places[pair, edge, n] = at + OUTWARDS[edge] * value * box[2 + edge % 2]
    return places


def outwards_from(boxes: Tensor, edges: Tensor) -> Tensor:
    """How far out places ``(M, 4, J)`` lie from the edges of boxes, in their sides, one by one."""
    offsets = torch.zeros_like(edges)
    for pair, box in enumerate(boxes.tolist()):
        for edge, own in enumerate(reference.edges(box)):
            for n, place in enumerate(edges[pair, edge].tolist()):
                offsets[pair, edge, n] = OUTWARDS[edge] * (place - own) / box[2 + edge % 2]
    return offsets


def projected(probabilities: Tensor, edges: Tensor, boxes: Tensor, weights: Tensor) -> Tensor:
    """Place by place: its probability goes to the two bins that it lies between."""
    found = torch.zeros(*probabilities.shape[:2], len(weights), dtype=probabilities.dtype)
    for pair, box in enumerate(boxes.tolist()):
        for edge, own in enumerate(reference.edges(box)):
            for p, place in zip(probabilities[pair, edge].tolist(), edges[pair, edge].tolist(), strict=True):
                phi = OUTWARDS[edge] * (place - own) / box[2 + edge % 2]
                left, left_weight, right_weight = reference.two_bins(phi, weights.tolist())
                found[pair, edge, left] += p * left_weight
                found[pair, edge, left + 1] += p * right_weight
    return found


@LAW
@given(seeds, st.integers(0, 4), st.sampled_from([4, 8, 32]))
def test_a_projected_distribution_is_the_one_of_the_loop(seed: int, pairs: int, num_bins: int) -> None:
    probabilities = random(seed, pairs, 4, 7).softmax(-1)
    edges, boxes = random(seed + 1, pairs, 4, 7) / 2 + 0.5, random_boxes(seed + 2, pairs)
    weights = weighting_function(num_bins).double()
    found = project_distributions(probabilities, outwards_from(boxes, edges), weights)
    torch.testing.assert_close(found, projected(probabilities, edges, boxes, weights), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.sum(-1), torch.ones(pairs, 4, dtype=found.dtype))


@LAW
@given(seeds, st.floats(0.6, 1.5))
def test_the_box_stays_where_it_was_from_whatever_box_it_is_seen(seed: int, stretch: float) -> None:
    """Within the range of W: the expected edges are the same."""
    theirs = random_boxes(seed, 5)
    # bins of theirs alone that ours reach: near enough, and no larger by much
    ours = theirs * torch.tensor([1, 1, stretch, stretch], dtype=theirs.dtype)
    logits = random(seed + 1, 5, 4, 9) - 50 * (bins().abs() > 0.25)
    boxes = decode_boxes(theirs, logits, bins())
    weights = weighting_function(32).double()
    seen = project_distributions(logits.softmax(-1), outwards_from(ours, edges_of(theirs, bins())), weights)
    torch.testing.assert_close(decode_boxes(ours, seen.log().clamp(min=-1e3), weights), boxes, rtol=1e-7, atol=1e-9)


def test_from_the_same_box_and_in_the_same_bins_nothing_changes() -> None:
    boxes, weights = random_boxes(0, 6), bins()
    probabilities = random(1, 6, 4, len(weights)).softmax(-1)
    seen = project_distributions(probabilities, outwards_from(boxes, edges_of(boxes, weights)), weights)
    torch.testing.assert_close(seen, probabilities, rtol=1e-9, atol=1e-12)


def test_an_edge_that_is_known_becomes_its_two_bins() -> None:
    """A distribution at one place is FGL's target of that place."""
    boxes, truths, weights = random_boxes(0, 6), random_boxes(1, 6), bins()
    places = torch.tensor([reference.edges(truth) for truth in truths.tolist()], dtype=torch.float64)[..., None]
    seen = project_distributions(torch.ones(6, 4, 1, dtype=torch.float64), outwards_from(boxes, places), weights)
    left_bin, left_weight, right_weight = encode_boxes(boxes, truths, weights)
    expected = torch.zeros_like(seen).scatter_add_(-1, left_bin[..., None], left_weight[..., None])
    expected.scatter_add_(-1, left_bin[..., None] + 1, right_weight[..., None])
    torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-12)


def records(seed: int) -> tuple[FDRRecord, FDRRecord, FlatPairs]:
    """A learner's record of two layers and a teacher's, of other queries and bins, and five pairs in two images."""
    initial_boxes, theirs = random_boxes(seed, 2, 6), random_boxes(seed + 1, 2, 4)
    logits = [random(seed + 2 + layer, 2, 6, 4, 9).requires_grad_() for layer in range(2)]
    weights, others = bins(), weighting_function(16).double()
    boxes = [decode_boxes(initial_boxes, layer, weights) for layer in logits]
    taught = random(seed + 8, 2, 4, 4, 17)
    teacher = FDRRecord(others, theirs, corner_logits=[taught], boxes=[decode_boxes(theirs, taught, others)])
    truths = random_boxes(seed + 9, 5)
    pairs = FlatPairs(torch.tensor([0, 0, 1, 1, 1]), torch.tensor([2, 5, 0, 1, 4]), torch.arange(5), truths)
    return FDRRecord(weights, initial_boxes, corner_logits=logits, boxes=boxes), teacher, pairs


@LAW
@given(seeds, st.sampled_from([0.0, 0.3, 1.0]))
def test_fgl_with_a_teacher_is_the_one_of_the_loop(seed: int, share: float) -> None:
    record, teacher, pairs = records(seed)
    record.lesson = Lesson(lambda: teacher, share)
    found, _ = distribution_losses(record, random(seed + 20, 2, 6, 3), [pairs, pairs], 3.0, FDRConfig())
    expected = []
    for logits, boxes in zip(record.corner_logits, record.boxes, strict=True):
        total = logits.sum() * 0
        for image, query, truth in zip(pairs.images, pairs.queries, pairs.boxes, strict=True):
            overlaps = [reference_iou(box, truth) for box in teacher.boxes[-1][image]]
            best = overlaps.index(max(overlaps))
            frame = teacher.initial_boxes[image, best][None]
            p = teacher.corner_logits[-1][image, best].softmax(-1)[None]
            own = record.initial_boxes[image, query][None]
            seen = projected(p, edges_of(frame, teacher.weights), own, record.weights)[0]
            two = [
                reference.two_bins(phi, record.weights.tolist())
                for phi in reference.offsets_to(own[0].tolist(), truth.tolist())
            ]
            for edge, (left, left_weight, right_weight) in enumerate(two):
                log_p = logits[image, query, edge].log_softmax(-1)
                of_truth = -(left_weight * log_p[left] + right_weight * log_p[left + 1])
                of_teacher = -sum(seen[edge, n] * log_p[n] for n in range(len(log_p)))
                part = share * overlaps[best]
                weight = reference_iou(boxes[image, query].detach(), truth)
                total = total + weight * ((1 - part) * of_truth + part * of_teacher)
        expected.append(total / 3)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-8, atol=1e-10)
    ours = torch.autograd.grad(sum(found), record.corner_logits)
    torch.testing.assert_close(ours, torch.autograd.grad(sum(expected), record.corner_logits), rtol=1e-7, atol=1e-10)


def reference_iou(box: Tensor, other: Tensor) -> float:
    a, b = (reference.edges(x.tolist()) for x in (box, other))
    sides = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    inside = math.prod(max(side, 0) for side in sides)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return inside / (sum(areas) - inside)


def test_a_learner_that_says_what_its_teacher_says_has_nothing_to_learn_of_it() -> None:
    """Of one frame, in the same bins; the truth has no share, for the teacher's box is the truth."""
    frame, weights = random_boxes(0, 1, 3), bins()
    logits = random(1, 1, 3, 4, 9).requires_grad_()
    boxes = decode_boxes(frame, logits, weights).detach()
    record = FDRRecord(weights, frame, corner_logits=[logits], boxes=[boxes])
    teacher = FDRRecord(weights, frame, corner_logits=[logits.detach()], boxes=[boxes])
    record.lesson = Lesson(lambda: teacher, 1.0)
    pairs = FlatPairs(torch.zeros(3, dtype=torch.int64), torch.arange(3), torch.arange(3), boxes[0])
    (found,), _ = distribution_losses(record, random(2, 1, 3, 2), [pairs], 3.0, FDRConfig())
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum()
    assert found.item() == pytest.approx(entropy.item() / 3)
    (gradient,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_no_pairs_no_loss_and_a_gradient_of_zeros() -> None:
    record, teacher, _ = records(0)
    record.lesson = Lesson(lambda: teacher, 0.5)
    empty = torch.zeros(0, dtype=torch.int64)
    pairs = FlatPairs(empty, empty, empty, torch.zeros(0, 4, dtype=torch.float64))
    found, _ = distribution_losses(record, random(1, 2, 6, 3), [pairs, pairs], 1.0, FDRConfig())
    assert [term.item() for term in found] == [0, 0]
    for gradient in torch.autograd.grad(sum(found), record.corner_logits):
        assert not gradient.any()
