"""One row against another, of one report or of two, against scipy's paired t-test and the published reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ttest_rel

from dfine_plugin.benchmarks.compare import main

from .commands import run

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FOCAL = RESULTS / "shapes-deformable-detr" / "ablation.json"
MAL = RESULTS / "shapes-deformable-detr-mal" / "ablation.json"
RETROFIT = RESULTS / "retrofit-deformable-detr" / "retrofit.json"


def cells(output: str, name: str) -> list[str]:
    """Means and difference of the table's line of this name."""
    (line,) = (line for line in output.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def of(report: Path, variant: str, metric: str = "AP") -> list[float]:
    runs = json.loads(report.read_text())["runs"]
    return [r["final"][metric] for r in runs if r["settings"]["variant"] == variant]


def written_out(ours: list[float], theirs: list[float]) -> str:
    """The mean difference of two paired rows, with scipy's interval."""
    low, high = ttest_rel(ours, theirs).confidence_interval(0.95)
    return f"{(low + high) / 2:+.2f} ± {(high - low) / 2:.2f}"


def test_rows_of_one_report_at_every_step() -> None:
    code, output = run(main, RETROFIT, "calibrated:union=true,ddf=true", "calibrated")
    assert code == 0, output
    assert output.startswith("5 paired seeds: 0, 1, 2, 3, 4\n")
    ours, theirs = (of(RETROFIT, row) for row in ("calibrated:union=true,ddf=true", "calibrated"))
    means = [f"{sum(values) / 5:.2f}" for values in (ours, theirs)]
    assert cells(output, "AP, step 1000") == [*means, written_out(ours, theirs)]
    assert cells(output, "AP, step 200")[2] == "-3.73 ± 3.49"  # as the page of results has it
    assert cells(output, "near duplicates")[:2] == ["2.17", "1.99"]


def test_a_row_against_one_of_another_report() -> None:
    code, output = run(main, MAL, "default", "baseline", "--against", FOCAL)
    assert code == 0, output
    assert cells(output, "AP, step 3000")[2] == written_out(of(MAL, "default"), of(FOCAL, "baseline"))
    assert cells(output, "AP90, step 3000")[2] == "+10.80 ± 2.95"  # as the page of results has it
    assert cells(output, "AP with the best boxes that the bins allow")[1:] == ["-", "-"]
    assert output.endswith("These runs were made with different states of the plugin's code.\n")
    by_mal = RESULTS / "retrofit-deformable-detr-mal" / "retrofit.json"
    code, output = run(main, by_mal, "calibrated", "calibrated", "--against", RETROFIT)
    assert code == 0, output  # whose host is spelt in another way
    assert cells(output, "AP, step 1000")[2].startswith("+3.7")


def test_seeds_can_be_chosen() -> None:
    code, output = run(main, MAL, "default", "baseline", "--seeds", "2,3,4")
    assert code == 0, output
    assert output.startswith("3 paired seeds: 2, 3, 4\n")
    ours, theirs = (of(MAL, row)[2:] for row in ("default", "baseline"))
    assert cells(output, "AP, step 3000")[2] == written_out(ours, theirs)


def test_what_one_of_the_rows_lacks_has_no_difference(tmp_path: Path) -> None:
    report = json.loads(RETROFIT.read_text())
    for r in report["runs"]:
        if r["settings"]["variant"] == "baseline":
            del r["diagnosis"]["recall75"]
    other = tmp_path / "retrofit.json"
    other.write_text(json.dumps(report))
    code, output = run(main, RETROFIT, "calibrated", "baseline", "--against", other)
    assert code == 0, output
    assert cells(output, "recall at 0.75")[1:] == ["-", "-"]
    assert cells(output, "recall at 0.5")[2] != "-"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((RETROFIT, "calibrated", "wrapped"), "there is no row 'wrapped', but baseline, calibrated"),
        ((RETROFIT, "calibrated", "baseline", "--against", MAL), "the rows differ in"),
        ((RETROFIT, "calibrated", "baseline", "--seeds", "7"), "the rows have no seed in common"),
        ((RETROFIT, "calibrated", "baseline", "--seeds", "one"), "'one' are no numbers parted by commas"),
        ((Path(__file__), "calibrated", "baseline"), "is no report of the ablation or the retrofit"),
    ],
)
def test_what_cannot_be_compared_is_told(arguments: tuple[Any, ...], message: str) -> None:
    code, output = run(main, *arguments)
    assert code == 2
    assert message in " ".join(output.split())


def test_runs_that_differ_in_more_than_their_row_are_no_twins(tmp_path: Path) -> None:
    report = json.loads(RETROFIT.read_text())
    for r in report["runs"]:
        if r["settings"]["variant"] == "calibrated":
            r["settings"]["learning_rate"] *= 2
    other = tmp_path / "retrofit.json"
    other.write_text(json.dumps(report))
    code, output = run(main, RETROFIT, "baseline", "calibrated", "--against", other)
    assert code == 2
    assert "the rows differ in learning_rate: no fair twins" in " ".join(output.split())
