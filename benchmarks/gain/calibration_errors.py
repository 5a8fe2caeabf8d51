"""Do deviations say how far off edges are: calibration errors, rank correlations, conformal intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from dfine_plugin.benchmarks.gain.edge_errors import EdgeErrors
from dfine_plugin.uncertainty import ConformalScale

LEVELS = tuple(level / 20 for level in range(1, 20))
"""The p at which the quantiles' calibration is looked at."""


@dataclass(frozen=True)
class Bins:
    """Edges in bins of equal count, by rising deviation: in pixels, B bins.

    Attributes:
        predicted: ``(B,)``, the root of the mean variance.
        real: ``(B,)``, the root of the mean squared error.
    """

    predicted: Tensor
    real: Tensor

    def ence(self) -> float:
        """The expected normalised calibration error (Levi et al., 2022): mean of ``|predicted - real| / predicted``."""
        return float(((self.predicted - self.real).abs() / self.predicted).mean())


def bin_edges(deviations: Tensor, errors: Tensor, bins: int) -> Bins:
    """Bins of edges, which come as ``(n, 4)`` or in any other shape; their counts differ by one at most.

    Raises:
        ValueError: there are fewer edges than bins.
    """
    if deviations.numel() < bins:
        raise ValueError(f"{deviations.numel()} edges do not fill {bins} bins")
    order = deviations.flatten().argsort()
    parts = [(deviations.flatten()[part], errors.flatten()[part]) for part in order.tensor_split(bins)]
    return Bins(
        torch.stack([one.double().square().mean().sqrt() for one, _ in parts]),
        torch.stack([one.double().square().mean().sqrt() for _, one in parts]),
    )


def observed_levels(levels: Tensor) -> Tensor:
    """For each p of :data:`LEVELS`, the share of true edges below their distribution's p-quantile."""
    return (levels.flatten()[:, None] <= levels.new_tensor(LEVELS)).double().mean(0)


def quantile_error(observed: Tensor) -> float:
    """The mean of ``|observed_p - p|`` over :data:`LEVELS`, after Kuleshov et al. (2018), who take squares."""
    return float((observed - observed.new_tensor(LEVELS)).abs().mean())


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's, over all elements."""
    return float(spearmanr(one.flatten().numpy(), other.flatten().numpy()).statistic)


def intervals(fit: EdgeErrors, measure: EdgeErrors, coverage: float) -> dict[str, dict[str, Any]]:
    """Conformal intervals fitted on one split, and how they do on another: as wide as the deviation says, and beside
    them as the box's side says, and of constant width.

    For each: the factors; of the edges, one by one, and of boxes, all four edges at once, the share that the intervals
    hold, and the intervals' mean width in pixels.
    """
    scales = {
        "deviation": (fit.deviations, measure.deviations),
        "side": (fit.sides, measure.sides),
        "constant": (torch.ones_like(fit.sides), torch.ones_like(measure.sides)),
    }
    found = {}
    for name, (known, new) in scales.items():
        scale = ConformalScale.fit(fit.errors, known, coverage)
        by_edge, by_box = scale.half_widths(new), scale.half_widths(new, whole_box=True)
        found[name] = {
            "edge_factors": list(scale.edges),
            "box_factor": scale.box,
            "edge_coverage": (measure.errors.abs() <= by_edge).double().mean(0).tolist(),
            "box_coverage": float((measure.errors.abs() <= by_box).all(-1).double().mean()),
            "edge_width": float(2 * by_edge.mean()),
            "box_width": float(2 * by_box.mean()),
        }
    return found


def summarise(fit: EdgeErrors, measure: EdgeErrors, coverage: float, bins: int) -> dict[str, Any]:
    """All figures of one model; what is fitted is fitted on the first split, and everything measured on the second.

    Raises:
        ValueError: there are too few detections for the bins or the coverage.
    """
    found = bin_edges(measure.deviations, measure.errors, bins)
    observed = observed_levels(measure.levels)
    # the deviations' best common factor (Levi et al.'s scaling), for what is left once they are right on average
    factor = float((fit.errors / fit.deviations).square().mean().sqrt())
    return {
        "detections": {"fit": len(fit), "measure": len(measure)},
        "rmse": float(measure.errors.square().mean().sqrt()),
        "deviation": float(measure.deviations.square().mean().sqrt()),
        "bins": {"predicted": found.predicted.tolist(), "real": found.real.tolist()},
        "ence": found.ence(),
        "factor": factor,
        "ence_scaled": bin_edges(factor * measure.deviations, measure.errors, bins).ence(),
        "observed_levels": observed.tolist(),
        "quantile_error": quantile_error(observed),
        "spearman": rank_correlation(measure.deviations, measure.errors.abs()),
        "spearman_of_side": rank_correlation(measure.sides, measure.errors.abs()),
        "spearman_of_score": rank_correlation(measure.scores, measure.errors.abs().mean(-1)),
        "spearman_of_mean": rank_correlation(measure.deviations.mean(-1), measure.errors.abs().mean(-1)),
        "intervals": intervals(fit, measure, coverage),
    }
