"""Matching of many sets in one go: against the hosts' own matchers, and against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from dfine_plugin import NonFiniteError, assignment
from dfine_plugin.assignment import MatchingCost, SetToMatch, match_sets
from dfine_plugin.validation import FiniteCheck

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


def sets_of(logits: list[Tensor], boxes: list[Tensor], labels: list[Tensor], truths: list[Tensor]) -> list[SetToMatch]:
    return [SetToMatch(*of_set, labels, truths) for of_set in zip(logits, boxes, strict=True)]


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
    for index, pairs in enumerate(match_sets(sets_of(logits, boxes, labels, truths), cost)):
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
    together = match_sets(sets_of(logits, boxes, labels, truths), COST)
    for index in range(3):
        for image in range(3):
            part = slice(image, image + 1)
            alone = match_sets([SetToMatch(logits[index][part], boxes[index][part], labels[part], truths[part])], COST)
            for a, b in zip(together[index][image], alone[0][0], strict=True):
                assert torch.equal(a, b)


def test_sets_of_all_kinds_in_one_go() -> None:
    """With more queries, or matched with other labels, such as an encoder's proposals."""
    logits, boxes, labels, truths = scene((3, 0, 2))
    many = scene((3, 0, 2), num_sets=1, num_queries=50, seed=1)
    binary = [torch.zeros_like(x) for x in labels]
    sets = [
        *sets_of(logits, boxes, labels, truths),
        *sets_of(*many[:2], labels, truths),
        *sets_of(logits[:1], boxes[:1], binary, truths),
    ]
    for one, found in zip(sets, match_sets(sets, COST), strict=True):
        (alone,) = match_sets([one], COST)
        assert all(torch.equal(a, b) for x, y in zip(found, alone, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("sizes", [(3, 5), (0, 0)], ids=str)
def test_a_check_is_settled_before_the_solver_sees_a_cost(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there is nothing to match."""
    sets = sets_of(*scene(sizes))
    match_sets(sets, COST, FiniteCheck({f"logits {i}": x.logits for i, x in enumerate(sets)}))
    sets[1].logits[1, 2, 0] = float("nan")
    monkeypatch.setattr(assignment, "linear_sum_assignment", lambda matrix: pytest.fail("the solver was asked"))
    with pytest.raises(NonFiniteError, match=r"^not finite: logits 1 \(1 of 160 values\)$"):
        match_sets(sets, COST, FiniteCheck({f"logits {i}": x.logits for i, x in enumerate(sets)}))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = sets_of(*scene((3, 5), num_sets=7))
    whole = match_sets(sets, COST)
    monkeypatch.setitem(assignment.CHUNK, "cpu", 1)
    for first, second in zip(match_sets(sets, COST), whole, strict=True):
        assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def test_half_precision_is_computed_in_float32() -> None:
    logits, boxes, labels, truths = scene((3, 5))
    images = torch.tensor([0] * 3 + [1] * 5)
    half = [x.bfloat16() for x in logits]
    found = COST.matrices(half, boxes, images, torch.cat(labels), torch.cat(truths))
    wanted = COST.matrices([x.float() for x in half], boxes, images, torch.cat(labels), torch.cat(truths))
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
