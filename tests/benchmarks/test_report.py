"""Statistics against scipy's paired t-test, and what the report says about them."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_rel

from dfine_plugin.benchmarks.gain.paired import paired_difference
from dfine_plugin.benchmarks.gain.report import (
    METRICS,
    ap_at_equal_time,
    closing_lines,
    diagnosis,
    gains_by_class,
    gains_by_depth,
    growth_when_longer,
    has_converged,
    late_growth,
    losses_over_baseline,
    markdown,
)

BASELINE = {0: 45.0, 1: 47.5, 2: 44.1, 3: 46.0}


def result(variant: str, seed: int, ap: float, seconds: float = 10.0, late: float = 0.98) -> dict[str, Any]:
    """A run's result with an AP that grows from half its final value, and to the share `late` by three quarters."""
    metrics = {**dict.fromkeys(METRICS, ap), "APl": None}
    return {
        "settings": {
            "host": "rt-detr",
            "data": "shapes",
            "variant": variant,
            "seed": seed,
            "steps": 20,
            "batch_size": 4,
            "image_size": 64,
            "num_queries": 30,
            "learning_rate": 1e-3,
        },
        "final": metrics,
        "curve": [
            {"AP": share * ap, "seconds": seconds * step / 20, "step": step}
            for step, share in ((10, 0.5), (15, late), (20, 1.0))
        ],
        "diagnosis": None,
        "parameters": 800_000,
        "seconds_per_step": seconds / 20,
        "seconds": seconds,
        "code": "x",
    }


def runs(gains: list[float], seconds: float = 10.0) -> list[dict[str, Any]]:
    baseline = [result("baseline", seed, ap) for seed, ap in BASELINE.items()]
    return baseline + [result("fdr", s, BASELINE[s] + g, seconds) for s, g in enumerate(gains)]


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    treated = {seed: ap + gain for (seed, ap), gain in zip(BASELINE.items(), (1.0, 0.2, 2.0, 0.9), strict=True)}
    difference = paired_difference(treated, BASELINE)
    assert difference is not None
    assert difference.half_width is not None
    expected = ttest_rel(list(treated.values()), list(BASELINE.values())).confidence_interval(0.95)
    interval = (difference.mean - difference.half_width, difference.mean + difference.half_width)
    assert interval == pytest.approx((expected.low, expected.high))
    assert difference.excludes_zero == (expected.low > 0)


def test_only_seeds_in_common_are_paired() -> None:
    difference = paired_difference({1: 50.0, 9: 99.0}, BASELINE)
    assert difference is not None
    assert difference.differences == {1: 2.5}
    assert difference.half_width is None
    assert not difference.excludes_zero
    assert paired_difference({9: 1.0}, BASELINE) is None


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ([1.0, 1.1, 0.9, 1.0], "the 95 % interval excludes zero: a gain"),
        ([-1.0, -1.1, -0.9, -1.0], "the 95 % interval excludes zero: a LOSS"),
        ([3.0, -2.0, 1.0, -1.0], "the 95 % interval includes zero: no gain is shown"),
        ([1.0], "one seed gives no interval: this says nothing about a gain"),
    ],
)
def test_the_closing_line_claims_no_more_than_the_interval(gains: list[float], words: str) -> None:
    (line,) = closing_lines(runs(gains))
    assert line.startswith("fdr: AP ")
    assert words in line


def test_a_longer_schedule_tells_whether_the_first_was_long_enough() -> None:
    made = runs([1.0, 1.1, 0.9])
    longer = [result("baseline", 0, 54.0), result("fdr", 0, 54.5)]
    for run in longer:
        run["settings"]["steps"] = 80
    assert growth_when_longer(made, longer) == pytest.approx((4, 0.2))
    assert growth_when_longer(made, []) is None
    text = markdown(made, longer=longer)
    assert "| baseline | 45.0 | 54.0 | 20.0 % |  |" in text
    assert "| fdr | 46.0 | 54.5 | 18.5 % | +0.50 (1 seed) |" in text
    (line,) = closing_lines(made, longer)
    assert (
        "excludes zero: a gain, after this schedule: after one 4 times as long the baseline has 20 % more AP." in line
    )

    settled = [result("baseline", 0, 46.0)]
    assert closing_lines(made, settled) == closing_lines(made)


def test_there_is_no_verdict_before_the_baseline_has_converged() -> None:
    growing = [result("baseline", 0, 40.0, late=0.9), result("baseline", 1, 40.0, late=0.94)]
    wrapped = [result("fdr", seed, 50.0) for seed in (0, 1)]
    assert late_growth(growing) == pytest.approx(0.08)
    assert not has_converged(growing)
    (line,) = closing_lines(growing + wrapped)
    assert line == (
        "fdr: AP +10.00 ± 0.00 over 2 paired seeds; "
        "not converged, no verdict: the baseline's AP grew by 8 % of itself in the last quarter."
    )
    # what the wrapped runs do is no matter
    settled = [result("baseline", seed, 40.0, late=0.96) for seed in (0, 1)]
    assert has_converged([*settled, result("fdr", 0, 50.0, late=0.5), result("fdr", 1, 51.0, late=0.5)])
    # one evaluation, at the end, tells nothing of the last quarter
    for run in settled:
        run["curve"] = run["curve"][-1:]
    assert late_growth(settled) is None
    assert not has_converged(settled)


def test_the_diagnosis_has_each_layer_of_each_variant() -> None:
    both = [result("baseline", 0, 40.0), result("fdr", 0, 42.0)]
    for run, layers in zip(both, ({"layer 1": 30.0}, {"initial boxes": 20.0, "layer 1": 31.0}), strict=True):
        rest = {
            "AP_after_NMS": 41.0,
            "AP_after_NMS_ranked_by_IoU": 60.0,
            "near_duplicates": 1.25,
            "recall50": 90.0,
            "recall75": 70.0,
        }
        run["diagnosis"] = {"AP_by_layer": layers, **rest}
    both[1]["diagnosis"]["AP_within_bins"] = 98.0
    lines = diagnosis(both)
    assert "| variant | AP, initial boxes | AP, layer 1 | AP after NMS 0.7 | and ranked by true IoU |" in lines[3]
    assert lines[5:7] == [
        "| baseline | - | 30.0 | 41.0 | 60.0 | 1.25 | 90.0 | 70.0 | - |",
        "| fdr | 20.0 | 31.0 | 41.0 | 60.0 | 1.25 | 90.0 | 70.0 | 98.0 |",
    ]
    assert "baseline 2.0 %, fdr 2.0 %" in lines[-1]


def test_fewer_layers_are_compared_with_the_whole_baseline() -> None:
    both = runs([1.0, 3.0])
    for run in both:
        ap = run["final"]["AP"]
        run["diagnosis"] = {"AP_by_layer": {"initial boxes": ap - 9, "layer 1": ap - 5, "layer 2": ap}}
    _, title, _, header, _, baseline, fdr, *_ = gains_by_depth(both)
    assert title == "### Fewer layers"
    assert header == "| variant | first 1 | first 2 |"
    interval = ttest_1samp([1.0, 3.0], 0).confidence_interval(0.95)
    half_width = (interval.high - interval.low) / 2
    assert baseline == "| baseline | -5.00 ± 0.00 | +0.00 ± 0.00 |"
    assert fdr == f"| fdr | -3.00 ± {half_width:.2f} | +2.00 ± {half_width:.2f} |"
    assert gains_by_depth(runs([1.0])) == []  # no run was diagnosed


def test_equal_time_reads_the_slower_run_where_the_baseline_had_finished() -> None:
    slower = ap_at_equal_time(runs([1.0], seconds=20.0), "fdr")
    assert slower == {0: pytest.approx(46.0 / 2)}
    faster = ap_at_equal_time(runs([1.0], seconds=5.0), "fdr")
    assert faster == {0: pytest.approx(46.0)}


def test_the_table_has_every_row_seed_and_failure() -> None:
    text = markdown(runs([1.0, 1.1, 0.9]), failures=["fdr-seed3: RuntimeError: the loss is not finite"])
    mean, spread = np.mean(list(BASELINE.values())), np.std(list(BASELINE.values()), ddof=1)
    assert f"| baseline | 4 | {mean:.1f} ± {spread:.1f} |" in text
    assert "| 3 | 46.00 | - |" in text
    assert "- fdr-seed3: RuntimeError: the loss is not finite" in text


def test_loss_and_gradient_are_compared_quarter_by_quarter() -> None:
    """Two points a quarter; the variant's loss is the quarter's number times the baseline's, its gradient 1.5 times."""
    both = runs([1.0, 3.0])
    for run in both:
        host = 10.0 + run["settings"]["seed"]
        by, gradient = (1, 1.5) if run["settings"]["variant"] == "fdr" else (0, 1)
        run["losses"] = [{"loss": host * (i // 2 + 1) ** by, "grad_norm": host * gradient} for i in range(8)]
    *_, row, _, _ = losses_over_baseline(both)
    assert row == "| fdr | 1.00 | 2.00 | 3.00 | 4.00 | 1.50 | 1.50 | 1.50 | 1.50 |"
    del both[0]["losses"]  # its twin is left out, too
    assert row in losses_over_baseline(both)
    assert losses_over_baseline(runs([1.0])) == []  # no run has a log


def test_the_gain_of_each_class_is_paired_over_the_seeds_that_both_have() -> None:
    results = runs([1.0, 2.0])
    assert gains_by_class(results) == []  # runs of earlier versions, and data of one class
    for run in results:
        ap, wrapped = run["final"]["AP"], run["settings"]["variant"] != "baseline"
        run["final"]["by_class"] = {"red": ap, "rare": 10.0 - 3 * wrapped, "unseen": None}
    table = "\n".join(gains_by_class(results))
    differences = paired_difference({0: 46.0, 1: 49.5}, {0: 45.0, 1: 47.5})
    assert f"| fdr, gain | {differences} | -3.00 ± 0.00 | - |" in table
    assert f"| baseline | {np.mean([*BASELINE.values()]):.1f} ± " in table
