"""Hungarian matching of many prediction sets in one go, with the cost that DETRs with sigmoid classes use.

Linear in the number of truths: each truth is compared with the queries of its own image only, all sets together, and
the costs cross to the CPU in one copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .boxes import at_least_float32
from .matching import Pairs

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
        p = at_least_float32(torch.stack([x[images, :, labels] for x in logits], dim=1)).sigmoid()
        q = 1 - p
        positive = self.alpha * q.pow(self.gamma) * -(p + 1e-8).log()
        negative = (1 - self.alpha) * p.pow(self.gamma) * -(q + 1e-8).log()
        cost = (positive - negative).mul_(self.class_weight)

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


@torch.no_grad()
def match_sets(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    truths: Sequence[Tensor],
    cost: MatchingCost,
) -> list[Pairs]:
    """One-to-one matches of least cost, for each set and image.

    Args:
        logits: ``(B, Q, C)`` for each set.
        boxes: ``(B, Q, 4)`` cxcywh for each set.
        labels: for each image ``(n,)``.
        truths: for each image ``(n, 4)`` cxcywh.
        cost: of a pair.

    Returns:
        For each set and image ``(query indices, truth indices)``, int64 on the CPU, by ascending query; the fewer of
        truths and queries many.
    """
    num_sets, (num_images, num_queries) = len(logits), logits[0].shape[:2]
    sizes = [len(boxes_of_image) for boxes_of_image in truths]
    if not sum(sizes):
        nothing = torch.zeros(0, dtype=torch.int64)
        return [[(nothing, nothing)] * num_images for _ in range(num_sets)]
    images = torch.repeat_interleave(torch.arange(num_images), torch.tensor(sizes)).to(logits[0].device)
    all_labels, all_truths = torch.cat(list(labels)), torch.cat(list(truths))
    chunk = CHUNK.get(logits[0].device.type, CHUNK["cuda"])
    step = max(1, chunk // (sum(sizes) * num_queries))
    costs = torch.cat(
        [
            cost.matrices(logits[i : i + step], boxes[i : i + step], images, all_labels, all_truths)
            for i in range(0, num_sets, step)
        ],
        dim=1,
    )
    matrices = costs.cpu().numpy()
    matches: list[Pairs] = []
    for index in range(num_sets):
        pairs: Pairs = []
        start = 0
        for size in sizes:
            rows, columns = linear_sum_assignment(matrices[start : start + size, index])
            queries, order = torch.from_numpy(columns).sort()
            pairs.append((queries, torch.from_numpy(rows)[order]))
            start += size
        matches.append(pairs)
    return matches
