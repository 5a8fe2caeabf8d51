"""The paper's rows on COCO: trains baseline and plugin by detrex's own trainer, and prints ours beside the paper's.

    python -m dfine_plugin.projects.paper_rows train --detrex /path/to/detrex --gpus 8
    python -m dfine_plugin.projects.paper_rows show /path/to/detrex/output

`train` goes through the rows one after the other and can be stopped at any time: what has finished is not trained
again, and what was begun is resumed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from dfine_plugin.benchmarks.reporting import table_header, table_row

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
KINDS = ("baseline", "dfine")
FINISHED = "model_final.pth"
"""What detectron2's trainer writes at the end of a schedule."""


@dataclass(frozen=True)
class Row:
    """A host with its configs `<folder>/configs/<config>_{baseline,dfine}.py`, and what the paper reports for it.

    `paper` is the gain in AP on COCO val2017 with R50 after 12 epochs (D-FINE, section 5), None where the paper has no
    such row.
    """

    host: str
    folder: str
    config: str
    paper: str | None


ROWS = (
    Row("Deformable-DETR, two-stage", "deformable_detr", "deformable_detr_r50_two_stage_12ep", "+3.4"),
    Row("DAB-DETR", "dab_detr", "dab_detr_r50_12ep", "44.2 to 49.5 (+5.3)"),
    Row("DN-DETR", "dn_detr", "dn_detr_r50_12ep", "+3.7"),
    Row("DINO, 4 scales", "dino", "dino_r50_4scale_12ep", "49.0 to 51.6 (+2.6)"),
    Row("DAB-Deformable-DETR", "dab_deformable_detr", "dab_deformable_detr_r50_12ep", None),
    Row("DN-Deformable-DETR", "dn_deformable_detr", "dn_deformable_detr_r50_12ep", None),
    Row("H-Deformable-DETR, two-stage", "h_deformable_detr", "h_deformable_detr_r50_two_stage_12ep", None),
)

app = typer.Typer(help=__doc__, add_completion=False)


def read_metrics(folder: Path) -> tuple[dict[str, float], bool] | None:
    """The latest box metrics that detectron2's trainer wrote to a folder, and whether its schedule has ended; None
    where there are none."""
    path = folder / "metrics.json"
    if not path.is_file():
        return None
    entries = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    evaluated = [entry for entry in entries if "bbox/AP" in entry]
    if not evaluated:
        return None
    return {name: evaluated[-1][f"bbox/{name}"] for name in METRICS}, (folder / FINISHED).is_file()


def table(output: Path) -> str:
    """Our rows beside the paper's as Markdown, from the output folders in `output`."""
    header = ["host", *(f"{name}, baseline" for name in METRICS[:3]), *(f"{name}, plugin" for name in METRICS[:3])]
    header += ["our gain in AP", "the paper's"]
    lines = table_header(header)
    unfinished = []
    for row in ROWS:
        found: Mapping[str, tuple[dict[str, float], bool] | None] = {
            kind: read_metrics(output / f"{row.config}_{kind}") for kind in KINDS
        }
        cells = [row.host]
        for kind in KINDS:
            metrics = found[kind]
            cells += ["-"] * 3 if metrics is None else [f"{metrics[0][name]:.1f}" for name in METRICS[:3]]
            if metrics is not None and not metrics[1]:
                unfinished.append(f"{row.config}_{kind}")
        baseline, plugin = (found[kind] for kind in KINDS)
        both = baseline is not None and plugin is not None
        cells += [f"{plugin[0]['AP'] - baseline[0]['AP']:+.1f}" if both else "-"]  # type: ignore[index]
        lines.append(table_row([*cells, row.paper or "-"]))
    if unfinished:
        lines += ["", f"Not at the end of their schedule: {', '.join(unfinished)}."]
    return "\n".join(lines)


@app.command()
def show(output: Annotated[Path, typer.Argument(help="the folder that holds the runs' output folders")]) -> None:
    """Print our rows beside the paper's."""
    if not any((output / f"{row.config}_{kind}").is_dir() for row in ROWS for kind in KINDS):
        raise typer.BadParameter(f"{output} holds no output folder of these configs, such as {ROWS[0].config}_baseline")
    typer.echo(table(output))


@app.command()
def train(
    detrex: Annotated[Path, typer.Option(help="detrex's checkout, with COCO where detectron2 looks for it")],
    gpus: Annotated[int, typer.Option(min=1)] = 8,
    only: Annotated[list[str] | None, typer.Option(help="a config's name without its kind; again for more")] = None,
    override: Annotated[list[str] | None, typer.Option(help="for the configs, such as train.seed=1")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the commands only")] = False,
) -> None:
    """Train baseline and plugin of every row, one after the other, into the checkout's folder `output`."""
    trainer = detrex / "tools" / "train_net.py"
    if not trainer.is_file():
        raise typer.BadParameter(f"{trainer} is not there", param_hint="--detrex")
    unknown = set(only or ()) - {row.config for row in ROWS}
    if unknown:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: not one of {', '.join(r.config for r in ROWS)}")
    configs = Path(__file__).resolve().parent
    for row in ROWS:
        for kind in KINDS:
            name = f"{row.config}_{kind}"
            if (only and row.config not in only) or (detrex / "output" / name / FINISHED).is_file():
                continue
            config = configs / row.folder / "configs" / f"{name}.py"
            command = [sys.executable, str(trainer), "--num-gpus", str(gpus), "--resume", "--config-file", str(config)]
            command += override or []
            typer.echo(" ".join(command))
            if not dry_run:
                subprocess.run(command, cwd=detrex, check=True)


if __name__ == "__main__":
    app()
