"""Matching of many sets in one go: against the hosts' own matchers, and against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from dfine_plugin import assignment
from dfine_plugin.assignment import MatchingCost, match_sets

COST = MatchingCost(class_weight=2.0, bbox_weight=5.0, giou_weight=2.0)


def scene(
    sizes: tuple[int, ...], num_sets: int = 3, num_queries: int = 20, seed: int = 0
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Logits, boxes, labels and truths; boxes of all kinds, also out of the image and tiny."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(sizes)
    logits = [torch.randn(batch, num_queries, 4, generator=generator) * 3 for _ in range(num_sets)]
    boxes = [torch.rand(batch, num_queries, 4, generator=generator) * 1.2 + 1e-5 for _ in range(num_sets)]
    labels = [torch.randint(0, 4, (n,), generator=generator) for n in sizes]
    truths = [torch.rand(n, 4, generator=generator) * 0.9 + 0.05 for n in sizes]
    return logits, boxes, labels, truths


def slow_cost(logits: Tensor, boxes: Tensor, labels: Tensor, truths: Tensor, cost: MatchingCost) -> Tensor:
    """(Q, n) of one image and set, pair by pair."""
    result = torch.zeros(len(logits), len(truths), dtype=torch.float64)
    for q, t in itertools.product(range(len(logits)), range(len(truths))):
        p = logits[q, labels[t]].double().sigmoid()
        focal = cost.alpha * (1 - p) ** cost.gamma * -torch.log(p + 1e-8)
        focal -= (1 - cost.alpha) * p**cost.gamma * -torch.log(1 - p + 1e-8)
        corners = [box_convert(b[None].double(), "cxcywh", "xyxy") for b in (boxes[q], truths[t])]
        l1 = (boxes[q] - truths[t]).abs().sum()
        giou = generalized_box_iou(*corners)[0, 0]
        result[q, t] = cost.class_weight * focal + cost.bbox_weight * l1 - cost.giou_weight * giou
    return result


@pytest.mark.parametrize("sizes", [(3, 5), (0, 4), (25, 1, 0)], ids=str)
@pytest.mark.parametrize("cost", [COST, MatchingCost(1.0, 0.5, 3.0, alpha=0.4, gamma=1.5)], ids=["gamma2", "gamma1.5"])
def test_matches_cost_least(sizes: tuple[int, ...], cost: MatchingCost) -> None:
    """Also with more truths than queries, and images without any."""
    logits, boxes, labels, truths = scene(sizes)
    for index, pairs in enumerate(match_sets(logits, boxes, labels, truths, cost)):
        for image, (queries, matched) in enumerate(pairs):
            matrix = slow_cost(logits[index][image], boxes[index][image], labels[image], truths[image], cost)
            assert len(queries) == len(matched) == min(matrix.shape)
            assert queries.tolist() == sorted(set(queries.tolist()))
            least = matrix[linear_sum_assignment(matrix)].sum()
            torch.testing.assert_close(matrix[queries, matched].sum(), least, atol=1e-4, rtol=1e-5)


def test_the_costs_are_those_of_the_formula() -> None:
    logits, boxes, labels, truths = scene((3, 5))
    logits, boxes, truths = ([x.double() for x in values] for values in (logits, boxes, truths))
    images = torch.tensor([0] * 3 + [1] * 5)
    found = COST.matrices(logits, boxes, images, torch.cat(labels), torch.cat(truths))
    for index in range(3):
        wanted = torch.cat([slow_cost(logits[index][i], boxes[index][i], labels[i], truths[i], COST).T for i in (0, 1)])
        torch.testing.assert_close(found[:, index], wanted, atol=1e-9, rtol=1e-9)


def test_sets_and_images_do_not_see_one_another() -> None:
    logits, boxes, labels, truths = scene((3, 5, 2))
    together = match_sets(logits, boxes, labels, truths, COST)
    for index in range(3):
        for image in range(3):
            alone = match_sets(
                [logits[index][image : image + 1]],
                [boxes[index][image : image + 1]],
                labels[image : image + 1],
                truths[image : image + 1],
                COST,
            )
            for a, b in zip(together[index][image], alone[0][0], strict=True):
                assert torch.equal(a, b)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = scene((3, 5), num_sets=7)
    whole = match_sets(*arguments, COST)
    monkeypatch.setitem(assignment.CHUNK, "cpu", 1)
    for first, second in zip(match_sets(*arguments, COST), whole, strict=True):
        assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def test_half_precision_is_computed_in_float32() -> None:
    logits, boxes, labels, truths = scene((3, 5))
    images = torch.tensor([0] * 3 + [1] * 5)
    half = [x.bfloat16() for x in logits]
    found = COST.matrices(half, boxes, images, torch.cat(labels), torch.cat(truths))
    wanted = COST.matrices([x.float() for x in half], boxes, images, torch.cat(labels), torch.cat(truths))
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
