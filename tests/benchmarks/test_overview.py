"""All gains at a glance: against scipy's paired t-test, and as published."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from scipy.stats import ttest_1samp, ttest_rel

from dfine_plugin.benchmarks.overview import main

from .commands import run
from .test_report import BASELINE, result

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def write(folder: Path, rows: dict[str, list[float]], **settings: Any) -> Path:
    """A report with these gains of each row and seed."""
    runs = [result("baseline", seed, ap) for seed, ap in BASELINE.items()]
    runs += [result(row, seed, BASELINE[seed] + gain) for row, gains in rows.items() for seed, gain in enumerate(gains)]
    for of_run in runs:
        of_run["settings"].update(settings)
    folder.mkdir()
    path = folder / "ablation.json"
    path.write_text(json.dumps({"runs": runs}))
    return path


def test_a_line_for_each_report_and_the_largest_gain_first(tmp_path: Path) -> None:
    gains = {"a": [1.0, 1.2, 0.9, 1.1], "b": [3.0, -2.0, 8.0, 1.0], "c": [9.0, 9.1, 9.2, 8.9]}
    reports = [
        write(tmp_path / "a", {"fdr": gains["a"], "fdr+go-lsd": gains["c"]}),
        write(tmp_path / "b", {"default": gains["b"]}, host="deformable_detr", width=128, num_queries=100),
        write(tmp_path / "c", {"calibrated": gains["c"]}, trained="rt-detr", data="data/bccd"),
    ]
    code, output = run(main, *reports, "--output", tmp_path / "all")
    assert code == 0, output
    _, _, *lines = output.strip().splitlines()
    intervals = [
        ttest_rel([BASELINE[s] + g for s, g in enumerate(of)], list(BASELINE.values())) for of in gains.values()
    ]
    limits = [interval.confidence_interval(0.95) for interval in intervals]
    written = [f"{(low + high) / 2:+.2f} ± {(high - low) / 2:.2f}" for low, high in limits]
    ap = f"{sum(BASELINE.values()) / 4:.1f}"
    assert [line.split(" | ")[:6] for line in lines] == [
        ["| [deformable-detr, 100 queries, width 128](../b/ablation.md)", "20", "4", ap, "2.0 %", written[1]],
        ["| [rt-detr](../a/ablation.md)", "20", "4", ap, "2.0 %", f"**{written[0]}**"],
        ["| [trained rt-detr on bccd](../c/ablation.md)", "20", "4", ap, "2.0 %", f"**{written[2]}**"],
    ]
    assert (tmp_path / "all" / "overview.md").read_text() == output
    assert (tmp_path / "all" / "overview.png").read_bytes().startswith(b"\x89PNG")


def test_the_mean_over_hosts_counts_each_once_by_its_longest_schedule(tmp_path: Path) -> None:
    gains = {
        "dino": [1.0, 1.4],
        "detr": [-0.5, 0.5],
        "long": [3.0, 2.0],
        "unsure": [3.0, 1.0],
        "short": [9.0, 8.0],
        "other": [7.0, 7.0],
    }
    reports = [
        write(tmp_path / "a", {"default": gains["dino"]}, host="detrex/dino", width=256),
        write(tmp_path / "b", {"default": gains["detr"]}, host="dab-detr"),
        write(tmp_path / "c", {"fdr": gains["long"]}, steps=40),
        write(tmp_path / "i", {"fdr": gains["unsure"]}, steps=40, learning_rate=2e-3),
        write(tmp_path / "d", {"fdr": gains["short"]}),
        write(tmp_path / "h", {"default": [*gains["detr"], 0.8]}, host="dab-detr", learning_rate=2e-3),
        write(tmp_path / "e", {"default": gains["other"]}, host="lw-detr", class_loss="mal"),
        write(tmp_path / "f", {"calibrated": gains["other"]}, host="rf-detr", trained="rt-detr"),
        write(tmp_path / "g", {"default": gains["other"]}, host="rt-detr-v2", data="data/bccd"),
    ]
    code, output = run(main, *reports, "--output", tmp_path / "all")
    assert code == 0, output
    low, high = ttest_1samp([1.2, 0.8 / 3, 2.5], 0).confidence_interval(0.95)
    *_, last = output.strip().splitlines()
    assert last.startswith("Mean of the 3 hosts trained from scratch as they are")
    assert f"interval over hosts: AP {(low + high) / 2:+.2f} ± {(high - low) / 2:.2f}, AP50 " in last
    assert "Ahead are in AP 3, " in last
    assert (tmp_path / "all" / "overview.md").read_text() == output


def test_two_hosts_and_several_rows_have_no_mean(tmp_path: Path) -> None:
    hosts = ["dab-detr", "lw-detr", "rf-detr"]
    one, *two = [write(tmp_path / host, {"fdr": [1.0, 1.2], "N=16": [0.5, 0.6]}, host=host) for host in hosts]
    for arguments in (two, [one, *two, "--rows", "N=16 fdr"]):
        code, output = run(main, *arguments, "--output", tmp_path / "all")
        assert code == 0, output
        assert "Mean of" not in output


def test_reports_that_differ_in_their_rate_are_told_apart(tmp_path: Path) -> None:
    reports = [
        write(tmp_path / "a", {"default": [1.0, 1.2]}, learning_rate=2e-3),
        write(tmp_path / "b", {"default": [0.5, 0.8]}, learning_rate=4e-3),
        write(tmp_path / "c", {"default": [0.1, 0.3]}, learning_rate=4e-3, steps=40),
    ]
    code, output = run(main, *reports, "--output", tmp_path / "all")
    assert code == 0, output
    assert re.findall(r"\[(.*)\]", output) == ["rt-detr, rate 0.002", "rt-detr, rate 0.004", "rt-detr"]


def test_rows_that_are_asked_for_are_named(tmp_path: Path) -> None:
    report = write(tmp_path / "a", {"fdr": [1.0, 1.2], "N=16": [0.5, 0.6], "lqe": [0.1, 0.2]})
    code, output = run(main, report, "--rows", "N=16 fdr", "--output", tmp_path / "all")
    assert code == 0, output
    assert re.findall(r"\[(.*)\]", output) == ["rt-detr, fdr", "rt-detr, N=16"]


def test_what_is_no_report_or_has_no_such_row_is_told(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    code, output = run(main, other, "--output", tmp_path / "all")
    assert code == 2
    assert "is no report of the ablation or the retrofit" in output
    code, output = run(main, write(tmp_path / "a", {"lqe": [0.1, 0.2]}), "--output", tmp_path / "all")
    assert code == 2
    assert "no report has a row default or fdr or calibrated beside a baseline" in output
    assert not (tmp_path / "all").exists()


def test_the_published_overview_is_that_of_the_published_reports(tmp_path: Path) -> None:
    published = (RESULTS / "overview" / "overview.md").read_text()
    reports = [RESULTS / "overview" / link for link in re.findall(r"\((\S+)\.md\)", published)]
    code, output = run(main, *(path.with_suffix(".json").resolve() for path in reports), "--output", tmp_path)
    assert code == 0, output

    def without_links(table: str) -> str:
        return re.sub(r"\(\S+\.md\)", "", table)

    assert without_links(output) == without_links(published)


def test_the_figures_in_the_readme_are_those_of_the_published_reports() -> None:
    published = "".join(path.read_text() for path in RESULTS.glob("*/*.md"))
    readme = (ROOT / "README.md").read_text().replace("&nbsp;", " ")
    table = readme[readme.index("| what was measured") : readme.index("Tiny models")]
    figures = re.findall(r"[+-]\d+\.\d+ ± \d+\.\d+", table)
    assert len(figures) >= 15
    assert [figure for figure in figures if figure not in published] == []
