"""Statistics over seeds: mean, spread, and the paired difference of two variants with its Student-t interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any


@dataclass(frozen=True)
class PairedDifference:
    """Mean of differences, by seed or whatever parts the pairs; the interval is mean +- half_width (None: one pair)."""

    mean: float
    half_width: float | None
    differences: dict[Any, float]

    @property
    def excludes_zero(self) -> bool:
        return self.half_width is not None and abs(self.mean) > self.half_width

    def __str__(self) -> str:
        if self.half_width is None:
            return f"{self.mean:+.2f} (1 seed)"
        return f"{self.mean:+.2f} ± {self.half_width:.2f}"


def paired_difference(
    treated: Mapping[int, float], baseline: Mapping[int, float], confidence: float = 0.95
) -> PairedDifference | None:
    """`treated` - `baseline`, both value by seed, over the seeds in common; None without any."""
    differences = {seed: treated[seed] - baseline[seed] for seed in sorted(treated.keys() & baseline.keys())}
    return mean_of_differences(differences, confidence) if differences else None


def mean_of_differences(differences: Mapping[Any, float], confidence: float = 0.95) -> PairedDifference:
    """Of one pair or more, with the Student-t interval over them."""
    count = len(differences)
    half_width = None
    if count > 1:
        from scipy.stats import t as student_t

        quantile = float(student_t.ppf((1 + confidence) / 2, count - 1))
        half_width = quantile * stdev(differences.values()) / count**0.5
    return PairedDifference(fmean(differences.values()), half_width, dict(differences))


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0
