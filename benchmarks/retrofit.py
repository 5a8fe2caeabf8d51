"""Is a trained detector better for the wrap? It is trained on, bare and wrapped, for as many steps, and compared.

    python -m dfine_plugin.benchmarks.retrofit  # an RT-DETR that comes with the package, on its own data
    python -m dfine_plugin.benchmarks.retrofit --trained FOLDER --data COCO --image-size 640 --lr 1e-4  # your own

Rows: `baseline` is the host trained on; `wrapped` starts with a fresh FDR head, `calibrated` with one that has learnt
the host's boxes first, and `head` trains that head alone. Stop it at any time: the same command goes on from the runs
that have finished.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from rich.console import Console

from dfine_plugin.benchmarks.gain.paired import PairedDifference, paired_difference
from dfine_plugin.benchmarks.gain.report import (
    METRICS,
    every_seed,
    figures,
    gain,
    gains_by_class,
    options_of,
    variants_of,
    verdict_of,
)
from dfine_plugin.benchmarks.gain.runs import RetrofitSettings, with_row
from dfine_plugin.benchmarks.gain.scheduling import run_all
from dfine_plugin.benchmarks.gain.variants import BASELINE, parse_variants
from dfine_plugin.benchmarks.options import (
    FULL_SIZE_QUERIES,
    ClassLossOption,
    FirstSeedOption,
    MosaicsOption,
    TeacherOption,
    check_data,
    check_device_name,
    check_fair_baseline,
    check_host_takes,
    check_looks_forward,
    check_teacher,
)
from dfine_plugin.benchmarks.reporting import Result, table_header, table_row, write_json, write_text
from dfine_plugin.benchmarks.trained_hosts import IMAGE_SIZE, STEPS, facts, find_trained

DEFAULT_ROWS = f"{BASELINE} calibrated"


def ap_at(results: Sequence[Result], variant: str, step: int) -> dict[int, float]:
    """By seed, the variant's AP after so many steps."""
    return {
        r["settings"]["seed"]: point["AP"]
        for r in results
        if r["settings"]["variant"] == variant
        for point in r["curve"]
        if point["step"] == step
    }


def gain_at(results: Sequence[Result], variant: str, step: int) -> PairedDifference | None:
    """The paired difference of the variant to the host trained on, after so many steps of both."""
    return paired_difference(ap_at(results, variant, step), ap_at(results, BASELINE, step))


def markdown(results: Sequence[Result], failures: Sequence[str] = ()) -> str:
    """The report: AP over steps, the gain over the host trained on at every step and metric, every seed."""
    settings = results[0]["settings"]
    variants = variants_of(results)
    wrapped = [variant for variant in variants if variant != BASELINE]
    steps = [point["step"] for point in results[0]["curve"]]
    seeds = sorted({r["settings"]["seed"] for r in results})
    lines = [
        f"## {Path(settings['trained']).name}, trained, on {Path(settings['data']).name}",
        "",
        f"{settings['steps']} steps of batch {settings['batch_size']}, {settings['image_size']} px, learning rate "
        f"{settings['learning_rate']:g}, EMA weights{options_of(results)}, {len(seeds)} seeds. Gain: paired "
        "difference to the host trained on for as many steps, with its 95 % Student-t interval.",
        "",
        "### AP after so many steps",
        "",
        *table_header(["row", *(str(step) for step in steps), "s/step"]),
    ]
    for variant in variants:
        times = [r["seconds_per_step"] for r in results if r["settings"]["variant"] == variant]
        means = [fmean(ap_at(results, variant, step).values()) for step in steps]
        lines.append(table_row([variant, *(f"{mean:.2f}" for mean in means), f"{fmean(times):.3f}"]))
    lines += ["", "### Gain in AP", "", *table_header(["row", *(str(step) for step in steps)])]
    lines += [table_row([v, *(str(gain_at(results, v, step) or "-") for step in steps)]) for v in wrapped]
    lines += ["", f"### Gain by metric after {steps[-1]} steps", "", *table_header(["row", *METRICS])]
    lines += [table_row([v, *(str(gain(results, v, metric) or "-") for metric in METRICS)]) for v in wrapped]
    lines += gains_by_class(results)
    lines += every_seed(results, failures)
    return "\n".join([*lines, "", *closing_lines(results), ""])


def closing_lines(results: Sequence[Result]) -> list[str]:
    """For each wrapped row: how much of the host is kept at the start, the largest lag, and the gain at the end.

    A host without AP at the start has other classes than the data: its class heads were drawn anew.
    """
    steps = [point["step"] for point in results[0]["curve"]]
    start = ap_at(results, BASELINE, 0)
    lines = []
    for variant in variants_of(results):
        final = gain_at(results, variant, steps[-1])
        if variant == BASELINE or final is None:
            continue
        host, wrapped = fmean(start.values()), fmean(ap_at(results, variant, 0).values())
        kept = f"{100 * wrapped / host:.1f} % of the host's AP at step 0" if host >= 1 else "new class heads"
        gains = {step: gain_at(results, variant, step) for step in steps}
        worst = min((g.mean, step) for step, g in gains.items() if g is not None)
        lines.append(
            f"{variant}: {kept}; at worst {worst[0]:+.2f} AP (step {worst[1]}); after "
            f"{steps[-1]} steps AP {final}, {verdict_of(final)}."
        )
    return lines


def main(
    trained: Annotated[str, typer.Option(help=f"{', '.join(STEPS)}, or a folder as save_pretrained writes it")] = (
        "rt-detr"
    ),
    data: Annotated[str, typer.Option(help="'shapes', or a folder with a COCO-format data set")] = "shapes",
    rows: Annotated[str, typer.Option(help="such as 'baseline wrapped calibrated:union=true,ddf=true head'")] = (
        DEFAULT_ROWS
    ),
    seeds: Annotated[int, typer.Option(min=1)] = 2,
    first_seed: FirstSeedOption = 0,
    steps: Annotated[int, typer.Option(min=1)] = 1000,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    image_size: Annotated[
        int | None, typer.Option(min=32, help="default: what a host of the package was trained with")
    ] = None,
    lr: Annotated[float | None, typer.Option(min=1e-9, help="learning rate; the same default")] = None,
    train_images: Annotated[int, typer.Option(min=1, help="of the shapes")] = 2000,
    val_images: Annotated[int, typer.Option(min=1, help="of the shapes")] = 400,
    class_loss: ClassLossOption = "host",
    mosaics: MosaicsOption = 0.0,
    teacher: TeacherOption = None,
    device: Annotated[str, typer.Option(help="cpu or cuda", callback=check_device_name)] = "cpu",
    jobs: Annotated[int | None, typer.Option(help="processes at a time; default: the number of cores")] = None,
    output: Annotated[Path, typer.Option(file_okay=False, help="folder for runs, table, figures and plot")] = Path(
        "retrofit"
    ),
    save_models: Annotated[
        bool, typer.Option("--save-models", help="keep each run's averaged weights as well")
    ] = False,
) -> None:
    """Train a trained host on, bare and wrapped, and print what the wrap brings at every step."""
    console = Console()
    try:
        variants = parse_variants(rows, retrofit=True)
        config = json.loads((find_trained(trained) / "config.json").read_text())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    check_teacher(teacher, variants, config["model_type"])
    if "dfine_plugin" in config:
        raise typer.BadParameter(f"{trained} is wrapped already", param_hint="--trained")
    if trained in STEPS:
        image_size, lr = image_size or IMAGE_SIZE, lr or facts()[trained]["learning_rate"]
    if image_size is None or lr is None:
        raise typer.BadParameter("a host of your own has no defaults: say --image-size and --lr")
    host = config["model_type"]
    check_fair_baseline(host)
    as_benchmarks_spell_it = host.replace("_", "-")
    check_host_takes(as_benchmarks_spell_it, image_size, config.get("num_queries", FULL_SIZE_QUERIES))
    check_looks_forward(as_benchmarks_spell_it, variants, "--rows")
    check_data(data)
    settings = RetrofitSettings(
        host=host,
        variant=BASELINE,
        seed=0,
        data=data,
        image_size=image_size,
        steps=steps,
        batch_size=batch_size,
        learning_rate=lr,
        class_loss=class_loss,
        mosaics=mosaics,
        train_images=train_images,
        val_images=val_images,
        device=device,
        trained=trained,
    )
    jobs = jobs or (os.cpu_count() or 1 if device == "cpu" else 1)
    numbers = range(first_seed, first_seed + seeds)
    runs = [with_row(settings, row, seed, teacher) for seed in numbers for row in variants]
    models = output / "models" if save_models else None
    results, failures = run_all(runs, output / "runs", jobs, console, models)
    if results:
        write_report(results, failures, output, console)
    for failure in failures:
        console.print(f"failed: {failure}", markup=False)
    if failures:
        raise typer.Exit(1)


def write_report(results: Sequence[Result], failures: Sequence[str], output: Path, console: Console) -> None:
    """Write table, figures and plot to `output`, and print the table."""
    from dfine_plugin.benchmarks.gain.plots import plot_ap_over_steps

    table = markdown(results, failures)
    write_text(output / "retrofit.md", table)
    command = shlex.join(["python", "-m", "dfine_plugin.benchmarks.retrofit", *sys.argv[1:]])
    write_json(output / "retrofit.json", figures(results, command, None, failures))
    plot_ap_over_steps(results, output / "ap_over_steps.png")
    console.print(table, markup=False, soft_wrap=True)
    console.print(f"written to {output}: retrofit.md, retrofit.json, ap_over_steps.png")


if __name__ == "__main__":
    typer.run(main)
