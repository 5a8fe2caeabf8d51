"""What ``dfine-plugin`` can do, by subcommand. Each imports what it needs when it runs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Export, build and look at wrapped DETRs.", no_args_is_help=True, add_completion=False)


@app.callback()
def _commands() -> None:
    """Keeps the names of subcommands, however many there are."""


class Layers(str, Enum):
    """Which decoder layers to show."""

    last = "last"
    all = "all"


@app.command()
def show(
    model: Annotated[Path, typer.Option(help="folder that save_pretrained of a wrapped transformers model wrote")],
    image: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="the image")],
    image_size: Annotated[
        int | None, typer.Option(min=32, help="side of the model's input; default: the checkpoint's own, or 640")
    ] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="least score of a detection")] = 0.5,
    top: Annotated[int, typer.Option(min=1, help="how many detections, the best first, to show in detail")] = 3,
    layers: Annotated[Layers, typer.Option(help="decoder layers to show")] = Layers.last,
    output: Annotated[Path, typer.Option(help="the picture to write")] = Path("distributions.png"),
) -> None:
    """Draw detections with the distribution of each edge, before and after W, and its standard deviation."""
    import numpy as np
    import torch
    import transformers
    from PIL import Image

    from .adapters.transformers_common import load_pretrained
    from .adapters.transformers_preprocessing import preprocess
    from .show import draw_detections, read_detections
    from .wrapping import predict_distributions

    if not (model / "config.json").is_file():
        raise typer.BadParameter(f"{model} holds no model: there is no config.json in it", param_hint="--model")
    transformers.utils.logging.disable_progress_bar()
    try:
        wrapped = load_pretrained(model, dtype=torch.float32)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error
    try:
        with Image.open(image) as file:
            picture = file.convert("RGB")
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--image") from error

    outputs, record = predict_distributions(wrapped, preprocess(picture, model, image_size))
    found = read_detections(outputs.logits, record, wrapped.config.id2label, picture.size)
    detections = [detection for detection in found if detection.score >= threshold]
    if not detections:
        typer.echo(f"no detection reaches a score of {threshold}; the best has {found[0].score:.3f}", err=True)
        raise typer.Exit(1)
    figure = draw_detections(np.asarray(picture), detections, detailed=top, all_layers=layers is Layers.all)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100)
    typer.echo(f"{len(detections)} of score {threshold} or above, {min(top, len(detections))} in detail: {output}")
