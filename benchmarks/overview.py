"""All gains at a glance: a row for each report of the ablation or the retrofit, and a plot of the intervals.

    python -m dfine_plugin.benchmarks.overview benchmarks/results/*/ablation.json benchmarks/results/*/retrofit.json

Writes overview.md and overview.png to the folder of `--output`.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

from dfine_plugin.benchmarks.compare import read_rows, spelt
from dfine_plugin.benchmarks.gain.paired import PairedDifference, mean_of_differences
from dfine_plugin.benchmarks.gain.report import by_seed, gain, late_growth, options_of, variants_of
from dfine_plugin.benchmarks.gain.runs import RunSettings
from dfine_plugin.benchmarks.gain.variants import BASELINE
from dfine_plugin.benchmarks.reporting import NONE, Result, table_header, table_row, write_text

RECOMMENDED = "default fdr calibrated"
"""What the ablation and the retrofit call a host with the settings that are the default."""
METRICS = ("AP", "AP50", "AP90")
AS_IT_IS = {"data": "shapes", "class_loss": "host", "mosaics": 0.0}
FEWEST_HOSTS = 3
"""That a mean over hosts is worth the name of."""


@dataclass(frozen=True)
class Gain:
    """What one row of a report gains over the baseline beside it, paired by seed."""

    title: str
    report: Path
    host: str
    steps: int
    learning_rate: float
    from_scratch: bool
    as_it_is: bool  # on the embedded data, with the host's own loss of classes and no mosaics
    baseline: float  # its mean AP
    growth: float | None  # of the baseline's AP over the last quarter, as a share of itself
    by_metric: dict[str, PairedDifference]


def gains_of(report: Path, rows: list[str]) -> list[Gain]:
    """The gains of those rows that the report has.

    Raises:
        ValueError: it is no report of the ablation or the retrofit.
    """
    results = read_rows(report)
    wanted = [variant for variant in variants_of(results) if variant in rows and variant != BASELINE]
    found = []
    for variant in wanted:
        differences = {metric: gain(results, variant, metric) for metric in METRICS}
        by_metric = {metric: difference for metric, difference in differences.items() if difference is not None}
        if "AP" not in by_metric:
            continue
        baseline = by_seed(results, BASELINE, "AP")
        settings = results[0]["settings"]
        found.append(
            Gain(
                title=title_of(results) + (f", {variant}" if len(wanted) > 1 else ""),
                report=report,
                host=spelt(settings["host"]),
                steps=settings["steps"],
                learning_rate=settings["learning_rate"],
                from_scratch=not settings.get("trained"),
                as_it_is=all(settings.get(key, usual) == usual for key, usual in AS_IT_IS.items()),
                baseline=fmean(baseline[seed] for seed in by_metric["AP"].differences),
                growth=late_growth(results),
                by_metric=by_metric,
            )
        )
    return found


def title_of(results: list[Result]) -> str:
    """The host, whether it was trained before, its data where they are no shapes, and what else all rows share."""
    settings = results[0]["settings"]
    trained = "trained " if settings.get("trained") else ""
    data = Path(settings["data"]).name
    queries = settings["num_queries"]
    return (
        trained
        + spelt(settings["host"])
        + (f" on {data}" if data != "shapes" else "")
        + (f", {queries} queries" if queries != RunSettings.num_queries else "")
        + options_of(results)
    )


def in_order(gains: list[Gain]) -> list[Gain]:
    """Hosts from scratch first, and of each kind those that gain most; the rate tells apart what is titled alike."""
    alike = Counter((row.title, row.steps) for row in gains)
    gains = [
        replace(row, title=f"{row.title}, rate {row.learning_rate:g}") if alike[row.title, row.steps] > 1 else row
        for row in gains
    ]
    return sorted(gains, key=lambda row: (not row.from_scratch, -row.by_metric["AP"].mean))


def over_hosts(gains: list[Gain]) -> dict[str, PairedDifference]:
    """By metric: the mean of the hosts' gains from scratch, as they are, with the interval over hosts, all alike.

    Each host counts once, by its longest schedule; of two reports of that by the one with more seeds, and of as many by
    the one that knows the gain in AP better. None of it for fewer hosts than :data:`FEWEST_HOSTS`, or where a report
    has several of the rows.
    """
    longest: dict[str, Gain] = {}
    for row in sorted(gains, key=lambda row: (row.steps, *certainty(row.by_metric["AP"]))):
        if row.from_scratch and row.as_it_is:
            longest[row.host] = row
    if len(longest) < FEWEST_HOSTS or len({row.report for row in gains}) < len(gains):
        return {}
    return {m: mean_of_differences({host: row.by_metric[m].mean for host, row in longest.items()}) for m in METRICS}


def certainty(gain: PairedDifference) -> tuple[int, float]:
    """Sorts gains by the number of their seeds, and those of as many by their intervals, the narrowest last."""
    return len(gain.differences), -inf if gain.half_width is None else -gain.half_width


def summary(mean: dict[str, PairedDifference]) -> str:
    """:func:`over_hosts` in words."""
    hosts = len(mean["AP"].differences)
    intervals = ", ".join(f"{metric} {written(difference)}" for metric, difference in mean.items())
    ahead = ", ".join(f"in {metric} {sum(d > 0 for d in gain.differences.values())}" for metric, gain in mean.items())
    return (
        f"Mean of the {hosts} hosts trained from scratch as they are, each counted once, by its longest schedule, with "
        f"the 95 % interval over hosts: {intervals}. Ahead are {ahead} of {hosts}."
    )


def written(difference: PairedDifference | None) -> str:
    """The mean and its interval, in bold where that excludes zero."""
    bold = "**" if difference is not None and difference.excludes_zero else ""
    return f"{bold}{difference or NONE}{bold}"


def markdown(gains: list[Gain], folder: Path) -> str:
    """The table, its links relative to the folder; bold is an interval that excludes zero."""
    header = ["host", "steps", "seeds", "baseline's AP", "its growth at the end", *(f"gain in {m}" for m in METRICS)]
    lines = table_header(header)
    for row in gains:
        link = Path(os.path.relpath(row.report.with_suffix(".md"), folder)).as_posix()
        growth = NONE if row.growth is None else f"{100 * row.growth:.1f} %"
        cells = [f"[{row.title}]({link})", f"{row.steps:,}", str(len(row.by_metric["AP"].differences))]
        cells += [f"{row.baseline:.1f}", growth, *(written(row.by_metric.get(metric)) for metric in METRICS)]
        lines.append(table_row(cells))
    return "\n".join(lines)


def main(
    reports: Annotated[list[Path], typer.Argument(help="ablation.json and retrofit.json", exists=True, dir_okay=False)],
    rows: Annotated[str, typer.Option(help="of the reports, parted by blanks")] = RECOMMENDED,
    output: Annotated[Path, typer.Option(help="folder for table and plot", file_okay=False)] = Path("overview"),
) -> None:
    """Print what each report's rows gain over the baseline beside them, with 95 % intervals over paired seeds."""
    try:
        gains = in_order([row for report in reports for row in gains_of(report, rows.split())])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if not gains:
        raise typer.BadParameter(
            f"no report has a row {' or '.join(rows.split())} beside a baseline", param_hint="--rows"
        )
    from dfine_plugin.benchmarks.gain.plots import plot_gains

    text = markdown(gains, output)
    lines = [(row.title + f", {row.steps:,} steps", row.by_metric["AP"]) for row in gains]
    if mean := over_hosts(gains):
        text += f"\n\n{summary(mean)}"
        lines.insert(0, (f"mean of {len(mean['AP'].differences)} hosts from scratch", mean["AP"]))
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "overview.md", text + "\n")
    plot_gains(lines, output / "overview.png")
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
