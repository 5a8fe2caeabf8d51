"""Plots of latencies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from dfine_plugin.benchmarks.reporting import Result, save_figure

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def plot_runs(latencies: Result, path: Path) -> None:
    """Every timed run of every row over the rounds: spread, drift and outliers."""
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for row in latencies["rows"]:
        milliseconds = 1000 * np.array(row["seconds"]["all"])
        (line,) = axes.plot(milliseconds, ".", markersize=4, label=_row_label(row))
        axes.axhline(1000 * row["seconds"]["median"], color=line.get_color(), linewidth=0.8)
    axes.set(xlabel="round", ylabel="ms (line: median)", title=_latency_title(latencies), ylim=(0, None))
    figure.legend(fontsize=8, loc="outside right upper")
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def plot_ap_over_latency(latencies: Result, path: Path) -> None:
    """AP over the median latency, a bar up to the 95th percentile, of the rows whose AP is known."""
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    axes.set_prop_cycle(color=matplotlib.color_sequences["tab20"])
    for row in latencies["rows"]:
        if row["AP"] is not None:
            middle, late = (1000 * row["seconds"][name] for name in ("median", "p95"))
            axes.errorbar(middle, row["AP"], xerr=[[0], [late - middle]], fmt="o", capsize=3, label=_row_label(row))
    axes.set(xlabel="ms (bar: to the 95th percentile)", ylabel="AP", title=_latency_title(latencies), xlim=(0, None))
    figure.legend(fontsize=8, loc="outside right upper")
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def _row_label(row: Mapping[str, Any]) -> str:
    return f"{row['model']}, {row['backend']}"


def _latency_title(latencies: Result) -> str:
    settings = latencies["settings"]
    size = f"{settings['batch_size']} x {settings['image_size']} px, {settings['precision']}"
    return f"{latencies['environment']['device']}: {size}"
