"""Plots of AP over steps, per IoU threshold and on spoilt images, with the seeds' spread; of all gains with their
intervals; and of edges' deviations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

from dfine_plugin.benchmarks.gain.evaluation import IOU_THRESHOLDS
from dfine_plugin.benchmarks.gain.paired import PairedDifference
from dfine_plugin.benchmarks.gain.report import variants_of
from dfine_plugin.benchmarks.gain.variants import BASELINE
from dfine_plugin.benchmarks.reporting import Result, save_figure

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes


def _band(axes: Axes, x: np.ndarray, runs: np.ndarray, label: str) -> None:
    """The mean of `runs` (seeds, points) with a band of one standard deviation on each side."""
    mean, spread = runs.mean(axis=0), runs.std(axis=0, ddof=1 if len(runs) > 1 else 0)
    (line,) = axes.plot(x, mean, marker="o", markersize=3, label=label)
    axes.fill_between(x, mean - spread, mean + spread, color=line.get_color(), alpha=0.15, linewidth=0)


def plot_ap_over_steps(results: Sequence[Result], path: Path) -> None:
    """AP of the EMA weights at the evaluations of the schedule."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for variant in variants_of(results):
        curves = [r["curve"] for r in results if r["settings"]["variant"] == variant]
        steps = np.array([point["step"] for point in curves[0]])
        _band(axes, steps, np.array([[point["AP"] for point in curve] for curve in curves]), variant)
    axes.set(xlabel="steps", ylabel="AP")
    axes.set_title(_title(results), fontsize=10)
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def plot_ap_per_threshold(results: Sequence[Result], path: Path) -> None:
    """Final AP per IoU threshold, and below it the paired difference to the baseline."""
    figure, (top, bottom) = plt.subplots(2, figsize=(6, 6), sharex=True, layout="constrained")
    thresholds = {
        variant: {
            r["settings"]["seed"]: np.array(r["final"]["by_threshold"], dtype=float)
            for r in results
            if r["settings"]["variant"] == variant
        }
        for variant in variants_of(results)
    }
    baseline = thresholds.get(BASELINE, {})
    for variant, runs in thresholds.items():
        _band(top, IOU_THRESHOLDS, np.array(list(runs.values())), variant)
        common = sorted(runs.keys() & baseline.keys())
        if common:
            _band(bottom, IOU_THRESHOLDS, np.array([runs[seed] - baseline[seed] for seed in common]), variant)
    top.set_ylabel("AP at the threshold")
    top.set_title(_title(results), fontsize=10)
    bottom.set(xlabel="IoU threshold", ylabel="difference to the baseline")
    top.legend()
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def plot_gains(gains: Sequence[tuple[str, PairedDifference]], path: Path) -> None:
    """A line for each, its title beside it, from the top: the gain in AP, its 95 % interval and what it is the mean of.

    In colour where the interval excludes zero.
    """
    figure, axes = plt.subplots(figsize=(7, 1 + 0.28 * len(gains)), layout="constrained")
    for place, (_, difference) in enumerate(gains):
        colour = "tab:gray" if not difference.excludes_zero else "tab:blue" if difference.mean > 0 else "tab:red"
        axes.errorbar(
            difference.mean, place, xerr=difference.half_width, fmt="o", color=colour, capsize=3, markersize=4
        )
        axes.scatter(
            list(difference.differences.values()), [place] * len(difference.differences), s=6, color=colour, alpha=0.5
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(
        xlabel="gain in AP (95 % interval; dots: seeds, or hosts)",
        yticks=range(len(gains)),
        ylim=(len(gains) - 0.5, -0.5),
    )
    axes.set_yticklabels([title for title, _ in gains], fontsize=8)
    axes.grid(alpha=0.3, axis="x")
    save_figure(figure, path)


def plot_robustness(scores: Mapping[str, Mapping[str, Mapping[int, float]]], path: Path) -> None:
    """AP under each corruption over its strength, means over seeds, strength 0 being the images as they are."""
    clean, *spoilt = scores
    kinds = list(dict.fromkeys(condition.rsplit(" ", 1)[0] for condition in spoilt))
    figure, rows = plt.subplots(1, len(kinds), figsize=(2.4 * len(kinds), 3), sharey=True, layout="constrained")
    for axes, kind in zip(np.atleast_1d(rows), kinds, strict=True):
        shown = [clean, *(condition for condition in spoilt if condition.rsplit(" ", 1)[0] == kind)]
        for variant in scores[clean]:
            runs = np.array([[scores[c][variant][seed] for c in shown] for seed in scores[clean][variant]])
            _band(axes, np.arange(len(shown)), runs, variant)
        axes.set(xlabel="strength", title=kind, xticks=range(len(shown)))
        axes.grid(alpha=0.3)
    np.atleast_1d(rows)[0].set_ylabel("AP (band: one standard deviation)")
    np.atleast_1d(rows)[-1].legend(fontsize=8)
    save_figure(figure, path)


def plot_uncertainty(result: Result, path: Path) -> None:
    """Left the real error over the predicted one, in bins of edges; right observed over expected quantiles. A line for
    each model; on the diagonal deviations, and whole distributions, mean what they say."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.3), layout="constrained")
    for name, model in result["models"].items():
        left.plot(model["bins"]["predicted"], model["bins"]["real"], marker="o", markersize=3, label=name)
        levels = np.linspace(0, 1, len(model["observed_levels"]) + 2)
        right.plot(levels, [0, *model["observed_levels"], 1], marker="o", markersize=3)
    largest = max(left.get_xlim()[1], left.get_ylim()[1])
    left.set(xlim=(0, largest), ylim=(0, largest), xlabel="predicted: root mean variance, pixels")
    left.set(ylabel="real: root mean squared error, pixels", title=f"edges in {result['settings']['bins']} bins")
    right.set(xlim=(0, 1), ylim=(0, 1), xlabel="p", ylabel="true edges below the p-quantile", title="quantiles")
    for axes, end in ((left, largest), (right, 1)):
        axes.plot([0, end], [0, end], color="black", linestyle="--", linewidth=0.8, zorder=0)
        axes.set_aspect("equal")
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    figure.suptitle(f"deviations of edges on {Path(result['settings']['data']).name}", fontsize=10)
    save_figure(figure, path)


def _title(results: Sequence[Result]) -> str:
    settings = results[0]["settings"]
    seeds = len({r["settings"]["seed"] for r in results})
    return f"{settings['host']} on {Path(settings['data']).name}, {seeds} seeds, band: one standard deviation"
