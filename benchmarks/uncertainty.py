"""Do the standard deviations of edges say how far off the edges are: wrapped models on images with known truths.

    python -m dfine_plugin.benchmarks.uncertainty ablation/models/rt-detr-fdr-*
    python -m dfine_plugin.benchmarks.uncertainty fdr=FOLDER --data COCO

Of the embedded data two new sets of images are made; of a COCO-format folder the val split is for what is fitted (the
conformal factors, a common factor for all deviations), and the test split for all that is measured. Writes
uncertainty.md, uncertainty.json and uncertainty.png.
"""

from __future__ import annotations

import shlex
import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from dfine_plugin.benchmarks.options import check_data, check_device_name, find_device, name_and_path
from dfine_plugin.benchmarks.reporting import Result, write_json, write_text

if TYPE_CHECKING:
    from dfine_plugin.benchmarks.data.detection_data import DetectionData

FIT, MEASURE = "val", "test"
"""The splits of a COCO-format folder."""
SHAPES_SEEDS = {FIT: 2, MEASURE: 3}
"""Of the embedded data: images that no training or validation of the benchmarks has seen."""


@lru_cache(maxsize=2)
def load_split(data: str, split: str, side: int, images: int) -> DetectionData:
    """The split of "shapes" (of so many images) or of a COCO-format folder, as squares."""
    from dfine_plugin.benchmarks.data.coco_data import read_split
    from dfine_plugin.benchmarks.data.shapes import make_shapes

    if data == "shapes":
        return make_shapes(images, side, SHAPES_SEEDS[split])
    return read_split(Path(data), split, side, side)


def main(
    models: Annotated[list[str], typer.Argument(help="[NAME=]FOLDER that save_pretrained wrote, of wrapped models")],
    data: Annotated[str, typer.Option(help="'shapes', or a COCO-format folder with a val and a test split")] = "shapes",
    images: Annotated[int, typer.Option(min=1, help="of the shapes, for each split")] = 1000,
    image_size: Annotated[
        int | None, typer.Option(min=32, help="side of the model's square input; default: the checkpoint's")
    ] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="least score of a detection")] = 0.3,
    coverage: Annotated[float, typer.Option(min=0.01, max=0.999, help="of the conformal intervals")] = 0.9,
    bins: Annotated[int, typer.Option(min=2, help="of the calibration error")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="images at a time")] = 50,
    device: Annotated[str, typer.Option(help="cpu or cuda", callback=check_device_name)] = "cpu",
    output: Annotated[Path, typer.Option(help="folder for table, figures and plot", file_okay=False)] = Path(
        "uncertainty"
    ),
) -> None:
    """Compare the deviations that models predict with how far off their edges are."""
    folders = dict(map(name_and_path, models))
    if len(folders) < len(models):
        raise typer.BadParameter("two models have the same name; name one of them: NAME=FOLDER", param_hint="MODELS")
    if missing := [str(folder) for folder in folders.values() if not folder.exists()]:
        raise typer.BadParameter(f"there is no {' and no '.join(missing)}", param_hint="MODELS")
    check_data(data, (FIT, MEASURE))
    # from here on torch is needed, which takes seconds to import
    from dfine_plugin.benchmarks.gain.calibration_errors import summarise
    from dfine_plugin.benchmarks.gain.edge_errors import edge_errors
    from dfine_plugin.benchmarks.reporting import machine
    from dfine_plugin.checkpoints import input_size, open_checkpoint
    from dfine_plugin.errors import DFinePluginError
    from dfine_plugin.wrapping import is_wrapped

    console = Console()
    where = find_device(device)
    rows: dict[str, Any] = {}
    try:
        checkpoints = {name: open_checkpoint(folder) for name, folder in folders.items()}
        sides = {image_size or max(input_size(checkpoint)) for checkpoint in checkpoints.values()}
        if len(sides) > 1:
            raise ValueError(
                f"models for images of {sorted(sides)} pixels: say --image-size, or look at them one by one"
            )
        (side,) = sides
        for checkpoint in checkpoints.values():
            checkpoint.check_size((side, side))
        detectors = {name: checkpoint.load().to(where) for name, checkpoint in checkpoints.items()}
        if bare := [name for name, model in detectors.items() if not is_wrapped(model)]:
            raise ValueError(f"{', '.join(bare)} is not wrapped: its boxes come from no distributions")
        for name, model in detectors.items():
            normalisation = checkpoints[name].normalisation()
            found = []
            for split in (FIT, MEASURE):
                with console.status(f"images of {side} px"):
                    loaded = load_split(data, split, side, images)
                bar = partial(track, console=console, description=f"{name}, {split}")
                found.append(edge_errors(model, loaded, normalisation, threshold, batch_size, where, bar))
            rows[name] = {"image_size": side, **summarise(found[0], found[1], coverage, bins)}
    except (DFinePluginError, ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    result: Result = {
        "command": shlex.join(["python", "-m", "dfine_plugin.benchmarks.uncertainty", *sys.argv[1:]]),
        **machine(),
        "settings": {
            "data": data,
            "images": {split: len(load_split(data, split, side, images)) for split in (FIT, MEASURE)},
            "truths": {split: sum(map(len, load_split(data, split, side, images).boxes)) for split in (FIT, MEASURE)},
            "threshold": threshold,
            "coverage": coverage,
            "bins": bins,
        },
        "models": rows,
    }
    write_report(result, output, console)


def write_report(result: Result, output: Path, console: Console) -> None:
    """Write tables, figures and plot to `output`, and print the tables."""
    from dfine_plugin.benchmarks.gain.plots import plot_uncertainty
    from dfine_plugin.benchmarks.gain.uncertainty_report import markdown

    table = markdown(result)
    write_json(output / "uncertainty.json", result)
    write_text(output / "uncertainty.md", table)
    plot_uncertainty(result, output / "uncertainty.png")
    console.print(table, markup=False, soft_wrap=True)
    console.print(f"written to {output}: uncertainty.md, uncertainty.json, uncertainty.png")


if __name__ == "__main__":
    typer.run(main)
