"""One row against another, of one report or of two: their paired difference by seed, with its 95 % interval.

    python -m dfine_plugin.benchmarks.compare retrofit/retrofit.json calibrated:lqe=true calibrated
    python -m dfine_plugin.benchmarks.compare MAL/ablation.json default baseline --against FOCAL/ablation.json

The reports say what each row gains over the baseline beside it; this says what one gains over any other.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from dfine_plugin.benchmarks.gain.paired import paired_difference
from dfine_plugin.benchmarks.gain.report import DIAGNOSIS, METRICS, states_of_code, variants_of
from dfine_plugin.benchmarks.gain.runs import RetrofitSettings
from dfine_plugin.benchmarks.reporting import NONE, Result, table_header, table_row

DEFAULTS = {field.name: field.default for field in fields(RetrofitSettings)}
"""What earlier reports do not say, for nothing else could be chosen."""

MAY_DIFFER = ("variant", "seed", "class_loss", "mosaics", "teacher")
"""Settings that two rows need not have in common."""

REPORT = {"exists": True, "dir_okay": False}


def read_rows(report: Path) -> list[Result]:
    """The runs in the JSON that the ablation or the retrofit has written.

    Raises:
        ValueError: it is none of these.
    """
    try:
        return json.loads(report.read_text())["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{report} is no report of the ablation or the retrofit") from error


def runs_of(results: list[Result], row: str) -> dict[int, Result]:
    """A row's runs, by seed.

    Raises:
        ValueError: there is no such row.
    """
    found = {r["settings"]["seed"]: r for r in results if r["settings"]["variant"] == row}
    if not found:
        raise ValueError(f"there is no row {row!r}, but {', '.join(variants_of(results))}")
    return found


def check_fair(one: Result, other: Result) -> None:
    """Refuse two runs that differ in more than what is compared.

    Raises:
        ValueError: names the settings.
    """
    settings = [r["settings"] for r in (one, other)]
    names = {name for found in settings for name in found} - {*MAY_DIFFER}
    values = {name: [spelt(found.get(name, DEFAULTS.get(name))) for found in settings] for name in names}
    wrong = sorted(name for name, (first, second) in values.items() if first != second)
    if wrong:
        raise ValueError(f"the rows differ in {', '.join(wrong)}: no fair twins")


def spelt(value: Any) -> Any:
    """Of hosts' names, which the ablation spells with a hyphen and transformers without, one spelling."""
    return value.replace("_", "-") if isinstance(value, str) else value


def figures_of(result: Result) -> dict[str, float]:
    """What is compared of a run, by its name in the table: AP on the way, all metrics at the end, the diagnosis."""
    *before, last = result["curve"]
    figures = {f"AP, step {point['step']}": point["AP"] for point in before}
    figures |= {f"{metric}, step {last['step']}": last[metric] for metric in METRICS}
    figures |= {title: result["diagnosis"].get(key) for key, title in DIAGNOSIS.items()} if result["diagnosis"] else {}
    return {name: value for name, value in figures.items() if value is not None}


def markdown(rows: dict[int, Result], others: dict[int, Result]) -> str:
    """The table: each figure's mean in both rows over the seeds in common, and the paired difference."""
    seeds = sorted(rows.keys() & others.keys())
    lines = [f"{len(seeds)} paired seeds: {', '.join(map(str, seeds))}", ""]
    lines += table_header(["", "row", "other", "difference"])
    ours, theirs = ({seed: figures_of(found[seed]) for seed in seeds} for found in (rows, others))
    for name in dict.fromkeys(name for found in (ours, theirs) for figures in found.values() for name in figures):
        row, other = ({seed: of[seed][name] for seed in seeds if name in of[seed]} for of in (ours, theirs))
        means = (f"{fmean(by_seed.values()):.2f}" if by_seed else NONE for by_seed in (row, other))
        lines.append(table_row([name, *means, str(paired_difference(row, other) or NONE)]))
    lines += states_of_code([found[seed] for found in (rows, others) for seed in seeds])
    return "\n".join(lines)


def parse_seeds(text: str | None) -> set[int] | None:
    """The seeds in "2,3,4"; None for all."""
    if text is None:
        return None
    try:
        return {int(seed) for seed in text.split(",")}
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} are no numbers parted by commas", param_hint="--seeds") from error


def main(
    report: Annotated[Path, typer.Argument(help="ablation.json or retrofit.json", **REPORT)],
    row: Annotated[str, typer.Argument(help="of the report, such as default")],
    other: Annotated[str, typer.Argument(help="the row to compare it with")],
    against: Annotated[Path | None, typer.Option(help="the other row's report, if it is another", **REPORT)] = None,
    seeds: Annotated[str | None, typer.Option(help="such as 2,3,4; default: all that both have")] = None,
) -> None:
    """Print what one row has more than another, seed by seed, with the 95 % interval of the mean."""
    kept = parse_seeds(seeds)
    try:
        found = [
            {seed: r for seed, r in runs_of(read_rows(path), name).items() if kept is None or seed in kept}
            for path, name in ((report, row), (against or report, other))
        ]
        common = found[0].keys() & found[1].keys()
        if not common:
            raise ValueError("the rows have no seed in common")
        for seed in common:
            check_fair(found[0][seed], found[1][seed])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(markdown(*found))


if __name__ == "__main__":
    typer.run(main)
