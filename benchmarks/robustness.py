"""Does the gain survive bad images: the models of an ablation on validation images that are spoilt in five ways.

    python -m dfine_plugin.benchmarks.ablation --host rt-detr --save-models --output ablation
    python -m dfine_plugin.benchmarks.robustness ablation

Writes robustness.md, robustness.json and robustness.png beside the ablation's own report.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from dfine_plugin.benchmarks.gain.paired import PairedDifference, paired_difference
from dfine_plugin.benchmarks.gain.runs import RunSettings, find_model
from dfine_plugin.benchmarks.gain.variants import BASELINE
from dfine_plugin.benchmarks.options import check_device_name, find_device
from dfine_plugin.benchmarks.reporting import Result, table_header, table_row, write_json, write_text

if TYPE_CHECKING:
    from dfine_plugin.benchmarks.data.detection_data import DetectionData

CLEAN = "clean"

Scores = dict[str, dict[str, dict[int, float]]]
"""AP by condition (a corruption and its strength), variant and seed."""


def conditions(data: DetectionData) -> dict[str, DetectionData]:
    """The data as it is, and spoilt in every way and strength."""
    from dfine_plugin.benchmarks.data.corruptions import CORRUPTIONS, STRENGTHS, corrupt

    spoilt = {
        f"{name} {strength}": replace(data, images=corrupt(data.images, name, strength))
        for name in CORRUPTIONS
        for strength in STRENGTHS
    }
    return {CLEAN: data, **spoilt}


def find_models(folder: Path) -> dict[RunSettings, Path]:
    """The finished runs in an ablation's folder whose models were kept, by settings."""
    found = {}
    for path in sorted((folder / "runs").glob("*.json")):
        settings = RunSettings(**json.loads(path.read_text())["settings"])
        if (model := find_model(folder / "models", settings)) is not None:
            found[settings] = model
    return found


def gains(scores: Scores) -> dict[str, dict[str, PairedDifference]]:
    """The paired difference in AP to the baseline, by condition and variant."""
    return {
        condition: {
            variant: difference
            for variant, by_seed in variants.items()
            if variant != BASELINE
            and (difference := paired_difference(by_seed, variants.get(BASELINE, {}))) is not None
        }
        for condition, variants in scores.items()
    }


def markdown(scores: Scores, title: str) -> str:
    """A table of the baseline's mean AP and each variant's gain under each condition."""
    variants = [variant for variant in scores[CLEAN] if variant != BASELINE]
    seeds = len(scores[CLEAN][BASELINE])
    lines = [f"## {title}, spoilt images", "", f"{seeds} paired seeds; gain in AP with its 95 % interval.", ""]
    lines += table_header(["images", f"AP, {BASELINE}", *(f"gain, {variant}" for variant in variants)])
    for condition, differences in gains(scores).items():
        baseline = list(scores[condition][BASELINE].values())
        cells = [str(differences[variant]) if variant in differences else "-" for variant in variants]
        lines.append(table_row([condition, f"{sum(baseline) / len(baseline):.1f}", *cells]))
    return "\n".join([*lines, ""])


def main(
    folder: Annotated[Path, typer.Argument(help="output of an ablation that kept its models (--save-models)")],
    batch_size: Annotated[int, typer.Option(min=1, help="images at a time")] = 50,
    device: Annotated[str, typer.Option(help="cpu or cuda", callback=check_device_name)] = "cpu",
) -> None:
    """Evaluate an ablation's models on spoilt validation images."""
    console = Console()
    models = find_models(folder)
    if not any(settings.variant == BASELINE for settings in models):
        raise typer.BadParameter(f"{folder} has no models of a finished ablation with a baseline (--save-models)")
    comparisons = dict.fromkeys(replace(settings, variant=BASELINE, seed=0, teacher="") for settings in models)
    if len(comparisons) > 1:
        found = ", ".join(
            f"{one.host} after {one.steps} steps on {Path(one.data).name} at {one.learning_rate:g}"
            for one in comparisons
        )
        raise typer.BadParameter(
            f"{folder} has models of more than one comparison ({found}): give each its own --output"
        )
    from dfine_plugin.benchmarks.gain.evaluation import coco_metrics, detect
    from dfine_plugin.benchmarks.gain.plots import plot_robustness
    from dfine_plugin.benchmarks.gain.training import load_data
    from dfine_plugin.checkpoints import open_checkpoint

    where = find_device(device)
    first = next(iter(models))
    data = load_data(first.data, "val", first.image_size, first.val_images)
    scores: Scores = {}
    loaded = {settings: open_checkpoint(path).load().to(where) for settings, path in models.items()}
    for condition, spoilt in track(conditions(data).items(), console=console, description="conditions"):
        for settings, model in loaded.items():
            metrics = coco_metrics(detect(model, spoilt, batch_size, where), data.coco, data.sides)
            scores.setdefault(condition, {}).setdefault(settings.variant, {})[settings.seed] = metrics["AP"]
    table = markdown(scores, f"{first.host} on {Path(first.data).name}")
    write_text(folder / "robustness.md", table)
    command = shlex.join(["python", "-m", "dfine_plugin.benchmarks.robustness", *sys.argv[1:]])
    write_json(folder / "robustness.json", summary(scores, command))
    plot_robustness(scores, folder / "robustness.png")
    console.print(table, markup=False, soft_wrap=True)
    console.print(f"written to {folder}: robustness.md, robustness.json, robustness.png")


def summary(scores: Scores, command: str) -> Result:
    """All figures, ready for JSON."""
    found: dict[str, Any] = {
        condition: {
            variant: {"mean": d.mean, "half_width": d.half_width, "differences": d.differences}
            for variant, d in differences.items()
        }
        for condition, differences in gains(scores).items()
    }
    return {"command": command, "AP": scores, "gain": found}


if __name__ == "__main__":
    typer.run(main)
