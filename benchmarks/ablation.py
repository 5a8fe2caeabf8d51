"""What FDR and GO-LSD bring: trains a DETR and its wrapped twins on the same data and compares them.

    python -m dfine_plugin.benchmarks.ablation                       # about a quarter of an hour on two cores
    python -m dfine_plugin.benchmarks.ablation --long                # ten seeds
    python -m dfine_plugin.benchmarks.ablation --longer-schedule 4   # seed 0 on a schedule four times as long as well
    python -m dfine_plugin.benchmarks.ablation --data FOLDER --tune-lr
    torchrun --nproc-per-node 8 -m dfine_plugin.benchmarks.ablation --device cuda
    python -m dfine_plugin.benchmarks.ablation --long --device cuda --ray ray://head:10001 --gpus-per-run 0.25

Stop it at any time: the same command goes on from the runs that have finished.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.console import Console

from dfine_plugin.benchmarks.gain.runs import RunSettings, with_row
from dfine_plugin.benchmarks.gain.scheduling import Cluster, run_all
from dfine_plugin.benchmarks.gain.variants import BASELINE, DEFAULT_VARIANTS, parse_variants
from dfine_plugin.benchmarks.models.hosts import HOSTS, WIDTH, width_of
from dfine_plugin.benchmarks.options import (
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
from dfine_plugin.benchmarks.reporting import write_json, write_text

LONG_SEEDS = 10
# The learning rate is tuned with seeds that no comparison uses, as factors of the host's own. With one seed alone a
# rate won that turned out to collapse with two of the next three.
TUNING_SEEDS = (1000, 1001)
TUNING_FACTORS = (0.5, 1.0, 2.0)
MOST_RATES = 8


def tune_learning_rate(
    settings: RunSettings, folder: Path, jobs: int, console: Console, cluster: Cluster | None
) -> dict[str, Any]:
    """The baseline's AP at each learning rate of a grid, and the best on average: tuned on the baseline alone.

    Where the best rate is at the grid's edge, the grid grows beyond it: what is chosen has a worse rate on either side.
    """
    ap: dict[float, list[float]] = {settings.learning_rate * factor: [] for factor in TUNING_FACTORS}
    failed: list[str] = []
    new = list(ap)
    while True:
        candidates = [
            replace(settings, variant=BASELINE, seed=seed, learning_rate=rate) for rate in new for seed in TUNING_SEEDS
        ]
        results, failures = run_all(candidates, folder, jobs, console, cluster=cluster)
        failed += failures
        for result in results:
            ap[result["settings"]["learning_rate"]].append(round(result["final"]["AP"], 2))
        # a rate that does not train is worse than any that does
        mean = {rate: fmean(found) if len(found) == len(TUNING_SEEDS) else -1.0 for rate, found in ap.items()}
        best = max(mean, key=lambda rate: mean[rate])
        if mean[best] < 0 or len(ap) >= MOST_RATES:
            raise RuntimeError(f"no learning rate of {sorted(ap)} has a worse one on either side: {ap} {failed}")
        beyond = best * 2 if best == max(ap) else best / 2 if best == min(ap) else None
        if beyond is None:
            return {"seeds": TUNING_SEEDS, "ap": dict(sorted(ap.items())), "failures": failed, "chosen": best}
        ap[beyond] = []
        new = [beyond]


def main(
    host: Annotated[str, typer.Option(help=f"one of {', '.join(HOSTS)}")] = "rt-detr",
    data: Annotated[str, typer.Option(help="'shapes', or a folder with a COCO-format data set")] = "shapes",
    variants: Annotated[str, typer.Option(help="rows parted by blanks, such as 'baseline fdr N=16 a=0.25,c=0.5'")] = (
        DEFAULT_VARIANTS
    ),
    seeds: Annotated[int, typer.Option(min=1)] = 2,
    first_seed: FirstSeedOption = 0,
    steps: Annotated[int, typer.Option(min=1)] = 1500,
    batch_size: Annotated[int, typer.Option(min=1, help="images a step and process")] = 16,
    image_size: Annotated[int, typer.Option(min=32)] = 96,
    queries: Annotated[int, typer.Option(min=1, help="matched queries of the host")] = 30,
    width: Annotated[
        int | None,
        typer.Option(min=32, help=f"of the transformer; default: {WIDTH}, or the only one that a host's code takes"),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate; default: the host's")] = None,
    tune_lr: Annotated[bool, typer.Option("--tune-lr", help="tune the rate on the baseline alone first")] = False,
    clip_norm: Annotated[float | None, typer.Option(help="gradient clipping; default: the host's")] = None,
    train_images: Annotated[int, typer.Option(min=1, help="of the shapes")] = 2000,
    val_images: Annotated[int, typer.Option(min=1, help="of the shapes")] = 400,
    longer_schedule: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="the first seed's rows as well on a schedule so many times as long: does the baseline go on growing "
            "there, and does the gain last?",
        ),
    ] = None,
    long: Annotated[bool, typer.Option("--long", help=f"at least {LONG_SEEDS} seeds")] = False,
    class_loss: ClassLossOption = "host",
    mosaics: MosaicsOption = 0.0,
    teacher: TeacherOption = None,
    device: Annotated[str, typer.Option(help="cpu or cuda", callback=check_device_name)] = "cpu",
    jobs: Annotated[int | None, typer.Option(help="processes at a time; default: the number of cores")] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="carry the runs by Ray: 'local', or the address of a cluster such as ray://head:10001"),
    ] = None,
    gpus_per_run: Annotated[
        float | None, typer.Option(min=0.0, help="of a Ray cluster; less than 1 to share one. Default: 1 with cuda")
    ] = None,
    output: Annotated[Path, typer.Option(help="folder for runs, table, figures and plots", file_okay=False)] = Path(
        "ablation"
    ),
    save_models: Annotated[
        bool, typer.Option("--save-models", help="keep each run's averaged weights as well")
    ] = False,
) -> None:
    """Train the baseline and its wrapped twins, and print what the wrap brings with its 95 % interval."""
    console = Console()
    if host not in HOSTS:
        raise typer.BadParameter(f"{host!r} is not one of {', '.join(HOSTS)}", param_hint="--host")
    check_fair_baseline(host)
    check_host_takes(host, image_size, queries)
    check_data(data)
    if HOSTS[host].calls_cuda and device == "cpu":
        console.print(f"{host} calls .cuda() in its own code: trained without these calls")
    try:
        width = width_of(host, width)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--width") from error
    if width % 32:
        raise typer.BadParameter(f"{width} is no multiple of 32", param_hint="--width")
    if save_models and "/" in host:
        raise typer.BadParameter(
            f"{host} has no save_pretrained: for hosts of transformers", param_hint="--save-models"
        )
    if class_loss == "mal" and not HOSTS[host].bare_learns_by_mal:
        raise typer.BadParameter(f"no baseline {host} learns its classes by MAL", param_hint="--class-loss")
    try:
        rows = parse_variants(variants)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--variants") from error
    check_teacher(teacher, rows, host)
    check_looks_forward(host, rows, "--variants")
    settings = RunSettings(
        host=host,
        variant=BASELINE,
        seed=0,
        data=data,
        image_size=image_size,
        steps=steps,
        batch_size=batch_size,
        learning_rate=lr or HOSTS[host].learning_rate,
        num_queries=queries,
        width=width,
        clip_norm=clip_norm or HOSTS[host].clip_norm,
        class_loss=class_loss,
        mosaics=mosaics,
        train_images=train_images,
        val_images=val_images,
        device=device,
    )
    jobs = jobs or (os.cpu_count() or 1 if device == "cpu" else 1)
    cluster = None
    if ray is not None:
        share = float(device != "cpu") if gpus_per_run is None else gpus_per_run
        cluster = Cluster(ray, share)
    elif gpus_per_run is not None:
        raise typer.BadParameter("shares of GPUs are given out by Ray: add --ray", param_hint="--gpus-per-run")
    tuning = None
    if tune_lr:
        tuning = tune_learning_rate(settings, output / "runs", jobs, console, cluster)
        console.print(f"learning rate {tuning['chosen']:g} is the baseline's best of {tuning['ap']}")
        settings = replace(settings, learning_rate=tuning["chosen"])
    count = max(seeds, LONG_SEEDS) if long else seeds
    # Seed by seed, so that a comparison that is stopped holds whole pairs.
    runs = [with_row(settings, row, seed, teacher) for seed in range(first_seed, first_seed + count) for row in rows]
    models = output / "models" if save_models else None
    results, failures = run_all(runs, output / "runs", jobs, console, models, cluster)
    after_longer: list[dict[str, Any]] = []
    if longer_schedule is not None:
        longer = replace(settings, steps=steps * longer_schedule)
        once_more = [with_row(longer, row, first_seed, teacher) for row in rows]
        after_longer, failed = run_all(once_more, output / "runs", jobs, console, cluster=cluster)
        failures += failed
    if os.environ.get("RANK", "0") != "0":
        return
    if results:
        write_report(results, after_longer, failures, tuning, output, console)
    for failure in failures:
        console.print(f"failed: {failure}", markup=False)
    if failures:
        raise typer.Exit(1)


def write_report(
    results: list[dict[str, Any]],
    longer: list[dict[str, Any]],
    failures: list[str],
    tuning: dict[str, Any] | None,
    output: Path,
    console: Console,
) -> None:
    """Write table, figures and plots to `output`, print the table and, last, the gains with their intervals."""
    from dfine_plugin.benchmarks.gain.plots import plot_ap_over_steps, plot_ap_per_threshold
    from dfine_plugin.benchmarks.gain.report import closing_lines, figures, markdown

    command = shlex.join(["python", "-m", "dfine_plugin.benchmarks.ablation", *sys.argv[1:]])
    table = markdown(results, failures, longer)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "ablation.md", table)
    write_json(output / "ablation.json", figures(results, command, tuning, failures, longer))
    plot_ap_over_steps(results, output / "ap_over_steps.png")
    plot_ap_per_threshold(results, output / "ap_per_threshold.png")
    console.print(table.rsplit("\n\n", 1)[0], markup=False, soft_wrap=True)
    console.print(f"\nwritten to {output}: ablation.md, ablation.json, ap_over_steps.png, ap_per_threshold.png")
    for line in closing_lines(results, longer):
        console.print(line, markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
