"""How far off a box's edges may be: their standard deviations, and intervals with a stated coverage."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .boxes import at_least_float32


def edge_deviations(corner_logits: Tensor, weights: Tensor, initial_boxes: Tensor) -> Tensor:
    """The standard deviations of the edges left, top, right, bottom, from their distributions.

    ``sigma = s sqrt(sum_n W(n)^2 Pr(n) - (sum_n W(n) Pr(n))^2)`` with ``Pr = softmax(logits)``, where s is the initial
    box's width for left and right, its height for top and bottom. Computed as the mean of squares about the mean: never
    negative, and precise where one bin has all but all the weight. The gradient is finite there, too.

    It is what the distribution says, and not how far off edges are on average: that is for :class:`ConformalScale`.

    Args:
        corner_logits: ``(..., 4, K)``, one distribution over K bins an edge.
        weights: ``(K,)``, the bins' offsets W in initial-box sides.
        initial_boxes: ``(..., 4)`` cxcywh, in image sides or in pixels.

    Returns:
        ``(..., 4)`` in the unit of the boxes, float32 or float64.
    """
    probabilities = at_least_float32(corner_logits).softmax(-1)
    weights = weights.to(probabilities.dtype)
    means = (probabilities * weights).sum(-1, keepdim=True)
    variances = (probabilities * (weights - means).square()).sum(-1)
    sides = at_least_float32(initial_boxes)[..., 2:]
    # the root has no slope at 0, where one bin has all the weight
    return torch.cat([sides, sides], dim=-1) * variances.clamp(min=torch.finfo(variances.dtype).tiny).sqrt()


@dataclass(frozen=True)
class ConformalScale:
    """Factors that make edge deviations half-widths of intervals with a stated coverage: split conformal prediction
    with normalised residuals.

    Of n detections with known truths, fitted on none of them, the k-th smallest ``|error| / deviation`` is taken, with
    ``k = ceil((n + 1) coverage)``. Of a new detection from the same source, the interval ``edge ± factor * deviation``
    holds the true edge with a probability of at least ``coverage``, and at most ``1 / (n + 1)`` above it where no two
    residuals are equal; whatever the model, and whatever its deviations mean. The probability is that over all
    detections, and not for each class, size or image; and detections are those that found their truth.

    Attributes:
        coverage: that was asked for.
        count: n.
        edges: the factors of left, top, right, bottom, each for its edge alone.
        box: one factor for all four, whose intervals hold the four edges of a box at once.
    """

    coverage: float
    count: int
    edges: tuple[float, float, float, float]
    box: float

    @classmethod
    def fit(cls, errors: Tensor, deviations: Tensor, coverage: float = 0.9) -> "ConformalScale":
        """From detections whose truths are known.

        Args:
            errors: ``(n, 4)``, how far the edges are off, of either sign.
            deviations: ``(n, 4)``, in the same unit; above 0.
            coverage: between 0 and 1.

        Raises:
            ValueError: the coverage is not between 0 and 1, or n is too small for it; an error is not finite, a
                deviation not positive; the shapes differ.
        """
        if not 0 < coverage < 1:
            raise ValueError(f"coverage is a share between 0 and 1, got {coverage}")
        if errors.shape != deviations.shape or errors.ndim != 2 or errors.shape[-1] != 4:
            raise ValueError(
                f"errors and deviations are (n, 4) each, got {tuple(errors.shape)} and {tuple(deviations.shape)}"
            )
        if not errors.isfinite().all() or not (deviations.isfinite() & (deviations > 0)).all():
            raise ValueError("errors have to be finite, and deviations finite and above 0")
        residuals = errors.abs() / deviations
        edges = [conformal_quantile(residuals[:, edge], coverage) for edge in range(4)]
        box = conformal_quantile(residuals.amax(-1), coverage)
        return cls(coverage, len(errors), (edges[0], edges[1], edges[2], edges[3]), box)

    def half_widths(self, deviations: Tensor, whole_box: bool = False) -> Tensor:
        """How far the intervals reach to either side of the edges: ``(..., 4)`` deviations to ``(..., 4)``."""
        return deviations * (self.box if whole_box else deviations.new_tensor(self.edges))

    def intervals(self, edges: Tensor, deviations: Tensor, whole_box: bool = False) -> tuple[Tensor, Tensor]:
        """Where the true edges lie, with the stated coverage.

        Args:
            edges: ``(..., 4)`` left, top, right, bottom as predicted.
            deviations: ``(..., 4)`` in the same unit.
            whole_box: let the coverage be that of all four edges at once, and not of each by itself.

        Returns:
            The lower and the upper ends, ``(..., 4)`` each.
        """
        reach = self.half_widths(deviations, whole_box)
        return edges - reach, edges + reach


def conformal_quantile(scores: Tensor, coverage: float) -> float:
    """The ``ceil((n + 1) coverage)``-th smallest of ``(n,)`` scores: a new one of their kind is at most that large with
    a probability of at least ``coverage``.

    Raises:
        ValueError: n is too small, for there is no such score.
    """
    # (n + 1) coverage may be a whole number, and its product a hair above it
    rank = math.ceil(round((len(scores) + 1) * coverage, 9))
    if rank > len(scores):
        least = math.ceil(round(coverage / (1 - coverage), 9))
        raise ValueError(f"a coverage of {coverage:g} takes at least {least} scores to fit, got {len(scores)}")
    return float(scores.sort().values[rank - 1])
