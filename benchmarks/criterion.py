"""How long the criterion takes: matching of all sets, union, box losses, VFL, FGL and DDF, forward and backward.

    python -m dfine_plugin.benchmarks.criterion
    python -m dfine_plugin.benchmarks.criterion --against PATH    # a checkout of the D-FINE authors' repository

With `--against` the authors' criterion is imported from there and run in turn on the same tensors, after a check that
the two agree. Ours is the one that a wrapped RT-DETR of transformers trains with.
"""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dfine_plugin.benchmarks.options import check_device_name, find_device
from dfine_plugin.benchmarks.reporting import save_figure, write_json

if TYPE_CHECKING:
    import torch

    from dfine_plugin.benchmarks.cost.criterion_steps import Sizes


def main(
    truths: Annotated[str, typer.Option(help="truths an image, parted by commas")] = "1,7,25,50,100,200,500",
    batch: Annotated[str, typer.Option(help="images, parted by commas")] = "8",
    queries: Annotated[int, typer.Option(min=1)] = 300,
    classes: Annotated[int, typer.Option(min=1)] = 80,
    layers: Annotated[int, typer.Option(min=2)] = 6,
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    against: Annotated[
        Path | None, typer.Option(help="a checkout of the D-FINE authors' repository", exists=True, file_okay=False)
    ] = None,
    most: Annotated[int, typer.Option(help="the authors' criterion runs up to so many truths an image")] = 100,
    device: Annotated[str, typer.Option(help="cpu or cuda", callback=check_device_name)] = "cpu",
    output: Annotated[Path, typer.Option(help="folder for figures and plot", file_okay=False)] = Path("criterion"),
) -> None:
    """Time the criterion over truths and batch, alone or in turn with the authors'."""
    batches, counts = _numbers(batch, "--batch"), _numbers(truths, "--truths")
    # from here on torch is needed, which takes seconds to import
    from dfine_plugin.benchmarks.cost.criterion_steps import (
        Sizes,
        check_agreement,
        make_ours,
        make_step,
        make_theirs,
        seconds,
    )

    console, where = Console(), find_device(device)
    rows = []
    for images in batches:
        for count in counts:
            sizes = Sizes(images, count, queries, classes, layers)
            step = make_step(sizes, where)
            runs = {"ours": make_ours(sizes, where)}
            if against is not None and count <= most:
                runs["theirs"] = make_theirs(against, sizes, where)
                check_agreement(runs["ours"](step), runs["theirs"](step))
            times: dict[str, list[float]] = {name: [] for name in runs}
            for repeat in range(repeats + 1):
                for name, run in runs.items():
                    spent = seconds(run, step, where)
                    if repeat:  # the first is warm-up
                        times[name].append(spent)
            row: dict[str, Any] = {"batch": images, "truths": count}
            row |= {name: {"median": median(values), "all": values} for name, values in times.items()}
            if "theirs" in times:
                row["ratio"] = median(b / a for a, b in zip(times["ours"], times["theirs"], strict=True))
            rows.append(row)
            console.print(_line(row))
    _report(rows, sizes, where, output, console)


def _numbers(text: str, option: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise typer.BadParameter(f"{text!r} is no list of numbers such as 1,7,25", param_hint=option)
    return [int(number) for number in text.split(",")]


def _line(row: dict[str, Any]) -> str:
    line = f"{row['batch']} images of {row['truths']} truths: {1000 * row['ours']['median']:.0f} ms"
    if "ratio" in row:
        line += f", the authors' {1000 * row['theirs']['median']:.0f} ms: {row['ratio']:.1f} times as long"
    return line


def _report(rows: list[dict[str, Any]], sizes: Sizes, device: torch.device, output: Path, console: Console) -> None:
    import matplotlib
    import torch

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from dfine_plugin.benchmarks.timing import device_name

    about = {"device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    write_json(output / "criterion.json", {**about, "sizes": vars(sizes), "rows": rows})
    table = Table("images", "truths an image", "ours, ms", "authors', ms", "ratio")
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for row in rows:
        theirs = f"{1000 * row['theirs']['median']:.0f}" if "theirs" in row else ""
        ratio = f"{row['ratio']:.1f}" if "ratio" in row else ""
        table.add_row(str(row["batch"]), str(row["truths"]), f"{1000 * row['ours']['median']:.0f}", theirs, ratio)
    for images in dict.fromkeys(row["batch"] for row in rows):
        for which, style in (("ours", "o-"), ("theirs", "s--")):
            points = [(r["truths"], r[which]["median"]) for r in rows if r["batch"] == images and which in r]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=f"{which}, {images} images")
    axes.set_xlabel("truths an image")
    axes.set_ylabel("seconds, forward and backward")
    axes.legend()
    figure.tight_layout()
    save_figure(figure, output / "criterion.png", dpi=120)
    console.print(table)
    console.print(f"{about}; written to {output}: criterion.json, criterion.png")


if __name__ == "__main__":
    typer.run(main)
