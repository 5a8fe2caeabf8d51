"""Hungarian matching of many prediction sets in one go, with the cost that DETRs with sigmoid classes use.

Linear in the number of truths: each truth is compared with the queries of its own image only, all sets together, and
the costs cross to the CPU in one copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .boxes import at_least_float32
from .matching import Pairs
from .validation import FiniteCheck

CHUNK = {"cpu": 2**18, "cuda": 2**24}
"""So many costs are computed at a time at most: on a CPU what its cache holds, on a GPU what its memory spares."""


@dataclass(frozen=True)
class MatchingCost:
    """``class_weight * focal + bbox_weight * L1 - giou_weight * GIoU`` of a query and a truth.

    ``focal = alpha (1-p)^gamma (-log p) - (1-alpha) p^gamma (-log(1-p))``, p being the sigmoid of the query's logit for
    the truth's class.
    """

    class_weight: float
    bbox_weight: float
    giou_weight: float
    alpha: float = 0.25
    gamma: float = 2.0
    eps: float = 1e-8
    """Keeps the logarithms of probabilities of 0 finite."""

    def focal(self, logits: Tensor) -> Tensor:
        """The focal cost of each of the logits, at least float32."""
        p = at_least_float32(logits).sigmoid()
        q = 1 - p
        positive = self.alpha * q.pow(self.gamma) * -(p + self.eps).log()
        negative = (1 - self.alpha) * p.pow(self.gamma) * -(q + self.eps).log()
        return positive - negative

    def class_costs(self, logits: Sequence[Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """``(M, S, Q)``, the focal costs of M truths, and arguments as those of :meth:`matrices`; a new tensor."""
        return self.focal(torch.stack([x[images, :, labels] for x in logits], dim=1))

    @torch.no_grad()
    def matrices(
        self, logits: Sequence[Tensor], boxes: Sequence[Tensor], images: Tensor, labels: Tensor, truths: Tensor
    ) -> Tensor:
        """The costs of M truths against all queries of their images.

        Args:
            logits: ``(B, Q, C)`` each, of S prediction sets.
            boxes: ``(B, Q, 4)`` cxcywh each.
            images: ``(M,)``, which image a truth is in.
            labels: ``(M,)``.
            truths: ``(M, 4)`` cxcywh.

        Returns:
            ``(M, S, Q)``, float32 or float64.
        """
        cost = self.class_costs(logits, images, labels).mul_(self.class_weight)

        predicted = at_least_float32(torch.stack(list(boxes))).permute(3, 1, 0, 2).contiguous()  # (4, B, S, Q)
        truth = truths.to(cost.dtype).T[:, :, None, None]  # (4, M, 1, 1)
        for coordinate, of_truth in zip(predicted, truth, strict=True):
            cost.add_((coordinate[images] - of_truth).abs_(), alpha=self.bbox_weight)

        near, far = predicted[:2] - predicted[2:] / 2, predicted[:2] + predicted[2:] / 2
        truth_near, truth_far = truth[:2] - truth[2:] / 2, truth[:2] + truth[2:] / 2
        inner: Tensor | None = None
        hull: Tensor | None = None
        for axis in range(2):
            overlap = torch.minimum(far[axis][images], truth_far[axis])
            overlap.sub_(torch.maximum(near[axis][images], truth_near[axis]))
            # the greater of two plus the lesser of two is their sum: a side of the hull without another comparison
            side = (predicted[2 + axis][images] + truth[2 + axis]).sub_(overlap)
            overlap.clamp_(min=0)
            inner = overlap if inner is None else inner.mul_(overlap)
            hull = side if hull is None else hull.mul_(side)
        assert inner is not None
        assert hull is not None
        areas = predicted[2] * predicted[3]
        outer = (areas[images] + truth[2] * truth[3]).sub_(inner)
        # GIoU = inner / outer - (hull - outer) / hull
        return cost.sub_(inner.div_(outer).add_(outer.div_(hull)).sub_(1), alpha=self.giou_weight)


class SetToMatch(NamedTuple):
    """A prediction set with the truths that it is matched with.

    Attributes:
        logits: ``(B, Q, C)``.
        boxes: ``(B, Q, 4)`` cxcywh.
        labels: for each image ``(n,)``.
        truths: for each image ``(n, 4)`` cxcywh.
    """

    logits: Tensor
    boxes: Tensor
    labels: Sequence[Tensor]
    truths: Sequence[Tensor]

    def kind(self) -> tuple[Any, ...]:
        """Sets of one kind, with as many queries and the same truths, are computed together."""
        return self.boxes.shape, *(id(tensor) for tensor in (*self.labels, *self.truths))


@torch.no_grad()
def match_sets(sets: Sequence[SetToMatch], cost: MatchingCost, check: FiniteCheck | None = None) -> list[Pairs]:
    """One-to-one matches of least cost, for each set and image.

    Args:
        sets: fastest where sets of one kind follow one another.
        cost: of a pair.
        check: of what the costs are computed from; settled before any solver sees a cost.

    Returns:
        For each set and image ``(query indices, truth indices)``, int64 on the CPU, by ascending query; the fewer of
        truths and queries many.

    Raises:
        NonFiniteError: as the check says.
    """
    costs: list[Tensor] = []  # (M, S, Q) each, for so many sets at a time
    sizes: list[list[int]] = []  # for each set how many truths its images have
    for _, alike in groupby(sets, SetToMatch.kind):
        group = list(alike)
        device, num_queries = group[0].boxes.device, group[0].boxes.shape[1]
        counts = [len(truths) for truths in group[0].truths]
        images = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device, non_blocking=True)
        labels, truths = torch.cat(list(group[0].labels)), torch.cat(list(group[0].truths))
        step = max(1, CHUNK.get(device.type, CHUNK["cuda"]) // max(1, len(truths) * num_queries))
        for i in range(0, len(group), step):
            logits, boxes = [x.logits for x in group[i : i + step]], [x.boxes for x in group[i : i + step]]
            costs.append(cost.matrices(logits, boxes, images, labels, truths))
        sizes += [counts] * len(group)

    # the only wait for the device: one copy of all costs, and of the check's sums with them
    crossing = [chunk.flatten() for chunk in costs] + ([] if check is None else [check.sums])
    crossed = torch.cat(crossing).cpu().split([len(values) for values in crossing])
    if check is not None:
        check.settle(crossed[-1])
    matrices = [
        of_set for values, chunk in zip(crossed, costs, strict=False) for of_set in values.view_as(chunk).unbind(1)
    ]
    matches: list[Pairs] = []
    for of_set, counts in zip(matrices, sizes, strict=True):
        pairs: Pairs = []
        for of_image in of_set.split(counts):
            truths_matched, queries_matched = linear_sum_assignment(of_image.numpy())
            queries, order = torch.from_numpy(queries_matched).sort()
            pairs.append((queries, torch.from_numpy(truths_matched)[order]))
        matches.append(pairs)
    return matches
