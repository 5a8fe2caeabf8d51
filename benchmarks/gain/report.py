"""The ablation's outcome: table, diagnosis, closing line and figures, from the results of its runs.

A verdict needs a baseline that has converged: before a DETR has learnt one-to-one, better boxes are worse AP, for they
coincide. It has converged where its AP grows by less than `CONVERGED` of itself over the last quarter of the schedule.
That tells a schedule which is broken off, not one which is too short: a rate that falls to zero stops any model from
growing. Whether there is more to be had is for a longer schedule to tell (`longer`: some seeds' runs on one), and where
the baseline is better by `CONVERGED` for it, the verdict says so.

Two tables. *Equal steps* compares the final metrics. *Equal time* reads each wrapped run's AP at the moment when the
baseline of the same seed had finished, on the line between its evaluations, and compares that with the baseline's
final AP. This is hard on a wrapped run that is slower: it is read within its schedule, before the learning rate has
come down, where a schedule cut to the shorter time would do better. It leans towards understating a gain. A wrapped
run that is faster is read at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from dfine_plugin.benchmarks.gain.paired import PairedDifference, mean_and_spread, paired_difference
from dfine_plugin.benchmarks.gain.variants import BASELINE
from dfine_plugin.benchmarks.models.hosts import WIDTH
from dfine_plugin.benchmarks.reporting import NONE, Result, machine, table_header, table_row

METRICS = ("AP", "AP50", "AP75", "AP90", "APs", "APm", "APl")
CONVERGED = 0.05
DIAGNOSIS = {
    "AP_after_NMS": "AP after NMS 0.7",
    "AP_after_NMS_ranked_by_IoU": "and ranked by true IoU",
    "near_duplicates": "near duplicates",
    "recall50": "recall at 0.5",
    "recall75": "recall at 0.75",
    "AP_within_bins": "AP with the best boxes that the bins allow",
}
"""What :func:`~dfine_plugin.benchmarks.gain.diagnosis.diagnose` finds besides AP by layer, as columns."""


def by_seed(results: Sequence[Result], variant: str, metric: str) -> dict[int, float]:
    """The final `metric` of the variant's finished runs, by seed."""
    runs = (r for r in results if r["settings"]["variant"] == variant)
    return {r["settings"]["seed"]: r["final"][metric] for r in runs if r["final"][metric] is not None}


def ap_at_equal_time(results: Sequence[Result], variant: str) -> dict[int, float]:
    """By seed, the variant's AP when the baseline of that seed had finished training (see the module's docstring)."""
    end = {r["settings"]["seed"]: r["seconds"] for r in results if r["settings"]["variant"] == BASELINE}
    return {
        r["settings"]["seed"]: float(
            np.interp(
                end[r["settings"]["seed"]],
                [0.0, *(point["seconds"] for point in r["curve"])],
                [0.0, *(point["AP"] for point in r["curve"])],
            )
        )
        for r in results
        if r["settings"]["variant"] == variant and r["settings"]["seed"] in end
    }


def late_growth(results: Sequence[Result], variant: str = BASELINE) -> float | None:
    """Which share of its final AP the variant gained over the last quarter of the schedule, mean over seeds; None
    where no run of it was evaluated before that."""
    shares = []
    for run in results:
        before = [point for point in run["curve"] if point["step"] <= 0.75 * run["settings"]["steps"]]
        if run["settings"]["variant"] == variant and before and run["final"]["AP"]:
            steps, ap = ([point[key] for point in run["curve"]] for key in ("step", "AP"))
            shares.append(1 - float(np.interp(0.75 * run["settings"]["steps"], steps, ap)) / run["final"]["AP"])
    return fmean(shares) if shares else None


def has_converged(results: Sequence[Result]) -> bool:
    """Whether the baseline allows a verdict (see the module's docstring)."""
    growth = late_growth(results)
    return growth is not None and growth < CONVERGED


def growth_when_longer(
    results: Sequence[Result], longer: Sequence[Result], variant: str = BASELINE
) -> tuple[float, float] | None:
    """How many times as long the longer schedule is, and by which share the variant's AP is higher after it, mean over
    the seeds that have both; None where none has."""
    before, after = by_seed(results, variant, "AP"), by_seed(longer, variant, "AP")
    shares = [after[seed] / before[seed] - 1 for seed in after if before.get(seed)]
    return (longer[0]["settings"]["steps"] / results[0]["settings"]["steps"], fmean(shares)) if shares else None


def gain(results: Sequence[Result], variant: str, metric: str = "AP") -> PairedDifference | None:
    """The paired difference of `variant` to the baseline at equal steps."""
    return paired_difference(by_seed(results, variant, metric), by_seed(results, BASELINE, metric))


def gain_at_equal_time(results: Sequence[Result], variant: str) -> PairedDifference | None:
    """The paired difference in AP of `variant` to the baseline at equal training time."""
    return paired_difference(ap_at_equal_time(results, variant), by_seed(results, BASELINE, "AP"))


def variants_of(results: Sequence[Result]) -> list[str]:
    """The variants with a finished run, in the order of the results."""
    return list(dict.fromkeys(r["settings"]["variant"] for r in results))


def _figure(values: dict[int, float]) -> str:
    if not values:
        return NONE
    mean, spread = mean_and_spread(list(values.values()))
    return f"{mean:.1f} ± {spread:.1f}" if len(values) > 1 else f"{mean:.1f}"


def options_of(results: Sequence[Result]) -> str:
    """What the description of runs says more: width, MAL and mosaics of all, and the teacher of those with one."""
    settings = results[0]["settings"]
    width = settings.get("width", WIDTH)
    said = f", width {width}" if width != WIDTH else ""
    said += ", classes by MAL for all" if settings.get("class_loss") == "mal" else ""
    if share := settings.get("mosaics", 0):
        said += f", mosaics for {100 * share:g} % of the images of all in the first half"
    teachers = {Path(r["settings"].get("teacher", "")).name for r in results} - {""}
    return said + "".join(f", taught by {name}" for name in sorted(teachers))


def markdown(results: Sequence[Result], failures: Sequence[str] = (), longer: Sequence[Result] = ()) -> str:
    """The report as Markdown: equal steps, gains at every metric, equal time, every seed, how it was made.

    `longer` are some seeds' runs on a longer schedule, which have a section of their own.
    """
    settings = results[0]["settings"]
    variants = variants_of(results)
    lines = [f"## {settings['host']} on {Path(settings['data']).name}", ""]
    lines += [
        f"{settings['steps']} steps of batch {settings['batch_size']}, {settings['image_size']} px, "
        f"{settings['num_queries']} queries, learning rate {settings['learning_rate']:g}, EMA weights"
        f"{options_of(results)}. Mean ± standard deviation over the seeds; gain: paired difference to the "
        "baseline with its 95 % Student-t interval.",
        "",
        "### Equal steps",
        "",
        *table_header(["variant", "seeds", *METRICS, "params", "s/step", "gain in AP"]),
    ]
    for variant in variants:
        runs = [r for r in results if r["settings"]["variant"] == variant]
        lines.append(
            table_row(
                [
                    variant,
                    str(len(runs)),
                    *(_figure(by_seed(results, variant, metric)) for metric in METRICS),
                    f"{runs[0]['parameters'] / 1e6:.3f} M",
                    f"{median(r['seconds_per_step'] for r in runs):.3f}",
                    "" if variant == BASELINE else str(gain(results, variant) or NONE),
                ]
            )
        )
    compared = [v for v in variants if v != BASELINE and gain(results, v)]
    if compared:
        lines += ["", "### Gain by metric, equal steps", "", *table_header(["variant", *METRICS])]
        lines += [table_row([v, *(str(gain(results, v, metric) or NONE) for metric in METRICS)]) for v in compared]
        lines += [
            "",
            "### Equal time",
            "",
            *table_header(["variant", "AP when the baseline had finished", "gain in AP"]),
        ]
        lines += [
            table_row([v, _figure(ap_at_equal_time(results, v)), str(gain_at_equal_time(results, v))]) for v in compared
        ]
    lines += gains_by_class(results)
    lines += diagnosis(results)
    lines += gains_by_depth(results)
    lines += losses_over_baseline(results)
    lines += after_a_longer_schedule(results, longer)
    lines += every_seed(results, failures)
    lines += states_of_code([*results, *longer])
    lines += ["", *closing_lines(results, longer), ""]
    return "\n".join(lines)


def states_of_code(results: Sequence[Result]) -> list[str]:
    """What is to be said where runs were not all made with the same code; the lines of Markdown."""
    if len({r["code"] for r in results}) == 1:
        return []
    return ["", "These runs were made with different states of the plugin's code."]


def gains_by_class(results: Sequence[Result]) -> list[str]:
    """A table with the final AP of each class, the baseline's and what the variants gain; the lines of Markdown."""
    found = [(r["settings"]["variant"], r["settings"]["seed"], r["final"].get("by_class", {})) for r in results]
    classes = list(dict.fromkeys(name for *_, by_class in found for name in by_class))
    if len(classes) < 2:
        return []

    def of(variant: str, name: str) -> dict[int, float]:
        return {seed: ap[name] for v, seed, ap in found if v == variant and ap.get(name) is not None}

    lines = ["", "### AP by class", "", *table_header(["variant", *classes])]
    for variant in variants_of(results):
        cells = (
            _figure(of(variant, name))
            if variant == BASELINE
            else str(paired_difference(of(variant, name), of(BASELINE, name)) or NONE)
            for name in classes
        )
        lines.append(table_row([variant if variant == BASELINE else f"{variant}, gain", *cells]))
    return lines


def after_a_longer_schedule(results: Sequence[Result], longer: Sequence[Result]) -> list[str]:
    """A table with AP after either schedule, of the seeds that have both, and the gain there; the lines of Markdown."""
    if not longer:
        return []
    steps = results[0]["settings"]["steps"], longer[0]["settings"]["steps"]
    header = ["variant", *(f"AP after {n} steps" for n in steps), "growth", f"gain after {steps[1]}"]
    lines = ["", "### A longer schedule", "", *table_header(header)]
    for variant in variants_of(longer):
        after = by_seed(longer, variant, "AP")
        before = {seed: ap for seed, ap in by_seed(results, variant, "AP").items() if seed in after}
        grown = growth_when_longer(results, longer, variant)
        growth = NONE if grown is None else f"{100 * grown[1]:.1f} %"
        difference = "" if variant == BASELINE else str(gain(longer, variant) or NONE)
        lines.append(table_row([variant, _figure(before), _figure(after), growth, difference]))
    seeds = sorted({r["settings"]["seed"] for r in longer})
    return [*lines, "", f"Of seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))} alone."]


def every_seed(results: Sequence[Result], failures: Sequence[str]) -> list[str]:
    """A table with the final AP of every run, and what failed; the lines of Markdown."""
    variants = variants_of(results)
    lines = ["", "### AP of every seed", "", *table_header(["seed", *variants])]
    for seed in sorted({r["settings"]["seed"] for r in results}):
        values = (by_seed(results, v, "AP").get(seed) for v in variants)
        lines.append(table_row([str(seed), *(NONE if value is None else f"{value:.2f}" for value in values)]))
    if failures:
        lines += ["", "### Failed runs", "", *(f"- {failure}" for failure in failures)]
    return lines


def diagnosis(results: Sequence[Result]) -> list[str]:
    """A table with AP by layer, duplicates and recall of every variant, means over the seeds; the lines of Markdown."""
    found = {v: [r["diagnosis"] for r in results if r["settings"]["variant"] == v] for v in variants_of(results)}
    found = {variant: runs for variant, runs in found.items() if all(runs)}
    if not found:
        return []
    layers = list(dict.fromkeys(name for runs in found.values() for run in runs for name in run["AP_by_layer"]))
    layers.sort(key=lambda name: name.startswith("layer"))  # the initial boxes, which a baseline has not, come first
    known = [key for key in DIAGNOSIS if any(key in run for runs in found.values() for run in runs)]
    header = ["variant", *(f"AP, {name}" for name in layers), *(DIAGNOSIS[key] for key in known)]
    lines = ["", "### Diagnosis", "", *table_header(header)]
    for variant, runs in found.items():
        by_layer = [[run["AP_by_layer"][name] for run in runs if name in run["AP_by_layer"]] for name in layers]
        row = [NONE if not values else f"{fmean(values):.1f}" for values in by_layer]
        for key in known:
            values = [run[key] for run in runs if key in run]  # bins have the wrapped alone
            row.append(f"{fmean(values):.{2 if key == 'near_duplicates' else 1}f}" if values else NONE)
        lines.append(table_row([variant, *row]))
    growth = {variant: late_growth(results, variant) for variant in found}
    grown = [f"{variant} {100 * share:.1f} %" for variant, share in growth.items() if share is not None]
    lines += [
        "",
        "Near duplicates: detections of a found truth's class with an IoU above 0.5 to it and at least half the best "
        f"such detection's score, itself included. AP gained over the last quarter, of itself: {', '.join(grown)}.",
    ]
    return lines


def ap_of_layer(results: Sequence[Result], variant: str, layer: str) -> dict[int, float]:
    """By seed, the AP of one decoder layer of the variant: what a model with no layers behind it predicts."""
    runs = (r for r in results if r["settings"]["variant"] == variant and r.get("diagnosis"))
    return {r["settings"]["seed"]: ap for r in runs if (ap := r["diagnosis"]["AP_by_layer"].get(layer)) is not None}


def gains_by_depth(results: Sequence[Result]) -> list[str]:
    """A table with the first layers of each variant against all layers of the baseline; the lines of Markdown."""
    found = [run["diagnosis"]["AP_by_layer"] for run in results if run.get("diagnosis")]
    layers = sorted({name for by_layer in found for name in by_layer if name.startswith("layer")})
    baseline = ap_of_layer(results, BASELINE, layers[-1]) if layers else {}
    if not baseline:
        return []
    lines = ["", "### Fewer layers", "", *table_header(["variant", *(f"first {name[6:]}" for name in layers)])]
    for variant in variants_of(results):
        gains = [paired_difference(ap_of_layer(results, variant, layer), baseline) for layer in layers]
        lines.append(table_row([variant, *(str(difference or NONE) for difference in gains)]))
    return [
        *lines,
        "",
        "AP of the first decoder layers alone, as `deploy(model, num_layers=k)` leaves them (not fewer than "
        "`initial_layer`), over the AP of the whole baseline, paired. Their latency: "
        "`python -m dfine_plugin.benchmarks.latency --num-layers`, on the models that `--save-models` keeps.",
    ]


def losses_over_baseline(results: Sequence[Result]) -> list[str]:
    """A table of each variant's loss and gradient norm over the baseline's, by quarters; the lines of Markdown."""
    logs = {(r["settings"]["variant"], r["settings"]["seed"]): r["losses"] for r in results if r.get("losses")}

    def means(variant: str, seeds: Sequence[int], key: str) -> list[float]:
        values = np.array([[point[key] for point in logs[variant, seed]] for seed in seeds]).mean(axis=0)
        return [float(quarter.mean()) for quarter in np.array_split(values, 4)]

    rows = []
    for variant in variants_of(results):
        seeds = [seed for name, seed in logs if name == variant and (BASELINE, seed) in logs]
        if variant != BASELINE and seeds:
            ratios = [
                ours / theirs
                for key in ("loss", "grad_norm")
                for ours, theirs in zip(means(variant, seeds, key), means(BASELINE, seeds, key), strict=True)
            ]
            rows.append(table_row([variant, *(f"{ratio:.2f}" for ratio in ratios)]))
    if not rows:
        return []
    header = ["variant", *(f"{name}, quarter {n}" for name in ("loss", "gradient") for n in range(1, 5))]
    return [
        *("", "### Loss and gradient", "", *table_header(header), *rows, ""),
        "The sum of all losses, and its gradient's norm before clipping, over the baseline's; means over the seeds.",
    ]


def verdict_of(difference: PairedDifference) -> str:
    """What a paired difference in AP shows."""
    if difference.half_width is None:
        return "one seed gives no interval: this says nothing about a gain"
    if difference.excludes_zero:
        return "the 95 % interval excludes zero: a " + ("gain" if difference.mean > 0 else "LOSS")
    return "the 95 % interval includes zero: no gain is shown"


def closing_lines(results: Sequence[Result], longer: Sequence[Result] = ()) -> list[str]:
    """One sentence a variant: its gain with the interval, and what that shows, if the baseline allows a verdict."""
    lines = []
    more = growth_when_longer(results, longer)
    caution = ""
    if more is not None and more[1] >= CONVERGED:
        caution = (
            f", after this schedule: after one {more[0]:g} times as long the baseline has {100 * more[1]:.0f} % more AP"
        )
    converged, growth = has_converged(results), late_growth(results)
    share = "" if growth is None else f": the baseline's AP grew by {100 * growth:.0f} % of itself in the last quarter"
    for variant in variants_of(results):
        difference = gain(results, variant)
        if variant == BASELINE or difference is None:
            continue
        seeds = len(difference.differences)
        verdict = verdict_of(difference) + caution if converged else f"not converged, no verdict{share}"
        lines.append(f"{variant}: AP {difference} over {seeds} paired seed{'s' * (seeds > 1)}; {verdict}.")
    return lines


def figures(
    results: Sequence[Result],
    command: str,
    tuning: dict[str, Any] | None,
    failures: Sequence[str],
    longer: Sequence[Result] = (),
) -> Result:
    """All that the run found and how, ready for JSON."""
    summary = {}
    for variant in variants_of(results):
        differences = {metric: gain(results, variant, metric) for metric in METRICS}
        summary[variant] = {
            "metrics": {metric: by_seed(results, variant, metric) for metric in METRICS},
            "gain": {
                metric: {"mean": d.mean, "half_width": d.half_width, "excludes_zero": d.excludes_zero}
                for metric, d in differences.items()
                if d is not None and variant != BASELINE
            },
            "ap_at_equal_time": ap_at_equal_time(results, variant),
        }
    return {
        "command": command,
        **machine(),
        "learning_rate_tuning": tuning,
        "late_growth": late_growth(results),
        "converged": has_converged(results),
        "summary": summary,
        "failures": list(failures),
        "runs": list(results),
        "longer": list(longer),
    }
