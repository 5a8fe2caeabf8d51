"""What a look at deviations found: Markdown tables, with every figure's definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dfine_plugin.benchmarks.gain.paired import mean_and_spread
from dfine_plugin.benchmarks.reporting import Result, table_header, table_row

INTERVALS = {"deviation": "factor * deviation", "side": "factor * the box's side", "constant": "constant"}


def markdown(result: Result) -> str:
    """The report of what ``uncertainty.json`` holds; several models as their mean ± standard deviation."""
    settings, models = result["settings"], list(result["models"].values())
    sides = " and ".join(sorted({str(model["image_size"]) for model in models}))
    counts = _said(models, lambda model: model["detections"]["measure"], 0)
    fitted = _said(models, lambda model: model["detections"]["fit"], 0)
    lines = [
        f"## Deviations of edges on {Path(settings['data']).name}",
        "",
        f"{', '.join(result['models'])}; {sides} px. Of several models the mean ± standard deviation.",
        "",
        f"A detection is a query with its best class and a score of {settings['threshold']:g} or more. Detections and "
        "truths are matched by COCO's rule: from the highest score down, each detection takes the truth of its class "
        "that it overlaps most, of those that are left, where their IoU is 0.5 or above. All other detections, and "
        "truths that are not found, are left out: nothing here speaks of them. Measured on "
        f"{counts} detections of {settings['truths']['test']} truths in {settings['images']['test']} images; what is "
        f"fitted is fitted on {fitted} of {settings['truths']['val']} in {settings['images']['val']} others.",
        "",
        "### Calibration",
        "",
        *table_header(["", "deviations as they are", "times one factor, fitted"]),
        table_row(["root mean square, pixels", *_pair(models, "deviation", lambda model: model["factor"], 2)]),
        table_row(["ENCE", _said(models, lambda m: m["ence"], 3), _said(models, lambda m: m["ence_scaled"], 3)]),
        table_row(["quantile calibration error", _said(models, lambda m: m["quantile_error"], 3), "-"]),
        "",
        f"Root mean square of the errors: {_said(models, lambda m: m['rmse'], 2)} pixels. The factor is "
        f"{_said(models, lambda m: m['factor'], 2)}, the root mean square of error / deviation.",
        "",
        f"ENCE, the expected normalised calibration error (Levi et al., 2022): all edges in {settings['bins']} bins of "
        "equal count by deviation, the mean over the bins of `|RMV - RMSE| / RMV`, with `RMV = sqrt(mean deviation^2)` "
        "and `RMSE = sqrt(mean error^2)` of a bin. Quantile calibration error (after Kuleshov et al., 2018, who take "
        "squares): the mean of `|observed(p) - p|` over p = 0.05, 0.10, ..., 0.95, where observed(p) is the share of "
        "true edges with `F(true offset) <= p`, and F is the cumulative distribution that the model predicts for the "
        "offset, each bin's probability spread evenly over the offsets nearer to it than to its neighbours.",
        "",
        *_bins_table(models),
        "",
        "Spearman's rank correlation with the size of the error, over edges: "
        f"{_said(models, lambda m: m['spearman'], 2)} for the deviation, "
        f"{_said(models, lambda m: m['spearman_of_side'], 2)} for the box's side. With the mean size of the four "
        f"errors, over boxes: {_said(models, lambda m: m['spearman_of_mean'], 2)} for the mean deviation, "
        f"{_said(models, lambda m: m['spearman_of_score'], 2)} for the score.",
        "",
        f"### Intervals with a coverage of {100 * settings['coverage']:g} %",
        "",
        *_intervals_table(models),
        "",
        "Split conformal prediction (`ConformalScale`): half-widths are a factor, fitted on the other images, times "
        "the deviation; beside it, fitted in the same way, times the predicted box's width or height, and constant. "
        "Boxes: all four edges at once. Widths are means in pixels, the whole interval's. The promise holds for "
        "detections that are as good as drawn one by one from the same source; those of one image are more alike.",
    ]
    if len(models) > 1:
        lines += ["", *_every_model(result)]
    return "\n".join([*lines, ""])


def _said(models: Sequence[Any], figure: Callable[[Any], float], digits: int) -> str:
    mean, spread = mean_and_spread([figure(model) for model in models])
    return f"{mean:.{digits}f} ± {spread:.{digits}f}" if len(models) > 1 else f"{mean:.{digits}f}"


def _pair(models: Sequence[Any], key: str, factor: Callable[[Any], float], digits: int) -> list[str]:
    return [
        _said(models, lambda model: model[key], digits),
        _said(models, lambda model: factor(model) * model[key], digits),
    ]


def _bins_table(models: Sequence[Any]) -> list[str]:
    lines = table_header(["bin, by deviation", "RMV, pixels", "RMSE, pixels", "RMSE / RMV"])
    for index in range(len(models[0]["bins"]["real"])):
        predicted = [model["bins"]["predicted"][index] for model in models]
        real = [model["bins"]["real"][index] for model in models]
        ratio = fmean(there / said for there, said in zip(real, predicted, strict=True))
        lines.append(table_row([str(index + 1), f"{fmean(predicted):.2f}", f"{fmean(real):.2f}", f"{ratio:.2f}"]))
    return lines


def _intervals_table(models: Sequence[Any]) -> list[str]:
    header = ["half-width", "coverage of left, top, right, bottom", "width", "coverage of boxes", "width, boxes"]
    lines = table_header(header)
    for name, label in INTERVALS.items():
        found = [model["intervals"][name] for model in models]
        edges = [fmean(one["edge_coverage"][edge] for one in found) for edge in range(4)]
        lines.append(
            table_row(
                [
                    label,
                    ", ".join(f"{100 * share:.1f} %" for share in edges),
                    _said(found, lambda one: one["edge_width"], 2),
                    _said(found, lambda one: 100 * one["box_coverage"], 1) + " %",
                    _said(found, lambda one: one["box_width"], 2),
                ]
            )
        )
    return lines


def _every_model(result: Result) -> list[str]:
    header = ["model", "detections", "ENCE", "factor", "ENCE, scaled", "quantiles", "Spearman", "edges", "boxes"]
    lines = ["### Every model", "", *table_header(header)]
    for name, model in result["models"].items():
        by_deviation = model["intervals"]["deviation"]
        lines.append(
            table_row(
                [
                    name,
                    str(model["detections"]["measure"]),
                    *(f"{model[key]:.3f}" for key in ("ence", "factor", "ence_scaled", "quantile_error", "spearman")),
                    f"{100 * fmean(by_deviation['edge_coverage']):.1f} %",
                    f"{100 * by_deviation['box_coverage']:.1f} %",
                ]
            )
        )
    return lines
