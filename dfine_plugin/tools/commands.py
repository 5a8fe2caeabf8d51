"""What ``dfine-plugin`` can do, by subcommand. Each imports what it needs when it runs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from ..errors import DFinePluginError
from .targets import compute_capability

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

    from ..checkpoints import Checkpoint
    from ..export.coco import CocoSplit

app = typer.Typer(no_args_is_help=True, add_completion=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dfine-plugin {__version__}")
        raise typer.Exit


@app.callback(help="Export, build and look at wrapped DETRs.")
def _commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version, and exit")
    ] = False,
) -> None:
    """Keeps the names of subcommands, however many there are."""


class Layers(str, Enum):
    """Which decoder layers to show."""

    last = "last"
    all = "all"


class Precision(str, Enum):
    """What a graph computes in."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class Backend(str, Enum):
    """What builds engines."""

    tensorrt_rtx = "tensorrt-rtx"
    tensorrt = "tensorrt"


def _parse_size(text: str) -> tuple[int, int]:
    """Height and width from ``640`` or ``480x640``."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    size = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if min(size) < LEAST_SIDE:
        raise typer.BadParameter(f"{text!r} is no side, or HEIGHTxWIDTH, of at least {LEAST_SIDE} pixels")
    return size


def _parse_target(text: str) -> str:
    try:
        return compute_capability(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _check_parent(path: Path) -> Path:
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise typer.BadParameter(f"{parent} is no folder that can be written to")
    return path


def _check_graph_name(path: Path) -> Path:
    if path.suffix != ".onnx":
        raise typer.BadParameter(f"{str(path)!r} does not end in .onnx")
    return _check_parent(path)


def _check_picture_name(path: Path) -> Path:
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise typer.BadParameter(f"{str(path)!r} does not end in one of .{', .'.join(sorted(known))}")
    return _check_parent(path)


LEAST_SIDE = 32
ModelOption = Annotated[
    Path, typer.Option(help="folder that save_pretrained (transformers) or detrex's trainer wrote, or its .pth file")
]
SizeOption = Annotated[
    Any,
    typer.Option(
        parser=_parse_size,
        metavar="SIDE|HEIGHTxWIDTH",
        help="pixels of the model's input; default: what the checkpoint makes of a square image",
    ),
]
TrustOption = Annotated[
    list[str] | None,
    typer.Option(help="a package whose code the config of a run of detrex may call, beside detectron2 and detrex"),
]
TextOption = Annotated[
    str | None,
    typer.Option(help="what to look for, of a model that takes a text beside images, such as 'a cat. a dog.'"),
]


@app.command()
def export(
    model: ModelOption,
    output: Annotated[Path, typer.Option(help="the graph to write", dir_okay=False, callback=_check_graph_name)] = Path(
        "model.onnx"
    ),
    image_size: SizeOption = None,
    precision: Annotated[Precision, typer.Option(help="what the graph computes in")] = Precision.fp32,
    batch_size: Annotated[int, typer.Option(min=1, help="images at a time")] = 1,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="any number of images at a time")] = False,
    detections: Annotated[
        int | None, typer.Option(min=1, help="put the selection of so many detections into the graph")
    ] = None,
    num_layers: Annotated[
        int | None, typer.Option(min=1, help="keep so many decoder layers, the first ones, of a wrapped model")
    ] = None,
    deviations: Annotated[
        bool, typer.Option("--deviations", help="let the graph give the standard deviations of the boxes' edges, too")
    ] = False,
    images: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="folder of images to compare torch's and the graph's boxes on"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="COCO-format folder: compare on its val split, AP too"),
    ] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="least score of detections to compare")] = 0.3,
    text: TextOption = None,
    trust: TrustOption = None,
) -> None:
    """Write a model as ONNX, and compare its detections with torch's on images; exits with 3 where they differ."""
    from ..checkpoints import input_size
    from ..export import export_onnx
    from ..export.coco import CocoSplit
    from ..wrapping import deploy
    from .pictures import read_picture

    if images and data:
        raise typer.BadParameter("either this or --data", param_hint="--images")
    if dynamic_batch and batch_size != 1:
        raise typer.BadParameter("either this or --dynamic-batch", param_hint="--batch-size")
    with _told("--data"):
        split = CocoSplit.read(data) if data else None
    paths = split.image_paths() if split else _image_files(images) if images else []
    for path in paths:
        _picture(path, "--data" if split else "--images")
    checkpoint = _open(model, trust, text)
    class_names = checkpoint.class_names()
    height, width = size = image_size or input_size(checkpoint)
    with _told("--image-size"):
        checkpoint.check_size(size)
    if split:
        with _told("--data"):
            split.categories(class_names)
    detector = _load(checkpoint)
    if num_layers is not None:
        with _told("--num-layers"):
            deploy(detector, num_layers)
    batch = None if dynamic_batch else batch_size
    with _told():
        about = {"class_names": dict(class_names), "normalisation": dict(checkpoint.normalisation())}
        export_onnx(detector, output, size, batch, precision.value, detections, metadata=about, deviations=deviations)
    count = "any number of" if batch is None else batch
    typer.echo(f"{checkpoint} -> {output}: {precision.value}, {count} images of {height} x {width}")
    if not paths:
        typer.echo("not compared with torch: give --images or --data")
        return
    pixels = [checkpoint.preprocess(read_picture(path), size)[0] for path in paths]
    _compare(detector, output, precision, detections, pixels, threshold, split, class_names)


def _compare(
    detector: nn.Module,
    graph: Path,
    precision: Precision,
    num_detections: int | None,
    pixels: list[Tensor],
    threshold: float,
    split: CocoSplit | None,
    class_names: Mapping[int, str],
) -> None:
    """Say how far the graph's detections are from torch's; exits with 3 where they differ, naming the part to blame."""
    from tempfile import TemporaryDirectory

    from ..export import export_onnx, find_culprit, measure_parity
    from ..export.parity import LARGEST_MOVE, NUM_DETECTIONS, onnx_detections, torch_detections

    height, width = pixels[0].shape[-2:]
    expected = torch_detections(detector, pixels, min(num_detections or NUM_DETECTIONS, NUM_DETECTIONS))
    with TemporaryDirectory() as folder:
        if precision is Precision.bf16:
            rounded = Path(folder) / "rounded.onnx"
            graph = export_onnx(detector, rounded, (height, width), 1, "bf16", num_detections, simulate=True)
            typer.echo(
                "onnxruntime has no bf16 on a CPU: compared by a float32 graph that rounds to bf16 after each op"
            )
        found = onnx_detections(graph, pixels)
    with _told("--threshold"):
        parity = measure_parity(expected, found, threshold)
    typer.echo(str(parity))
    if split:
        with _told("--data"):
            ours, theirs = (split.average_precision(part, (height, width), class_names) for part in (expected, found))
        typer.echo(f"AP {ours:.3f} in torch, {theirs:.3f} of the graph: {theirs - ours:+.3f}")
    if parity.passed:
        return
    typer.echo(f"boxes moved by more than {LARGEST_MOVE} px at the 99th percentile, or were lost", err=True)
    if precision is not Precision.fp32:
        # of the images that have anything to compare
        some = [i for i, detected in enumerate(expected) if len(detected.above(threshold).scores)][:8]
        images, wanted = [pixels[i] for i in some], [expected[i] for i in some]
        name, move = find_culprit(detector, precision.value, images, wanted, threshold)
        typer.echo(f"it is {name} that costs the most: in float32 alone, {move:.4f} px would be left", err=True)
    raise typer.Exit(3)


@app.command()
def build_engine(
    onnx: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="a graph that export wrote")],
    target: Annotated[
        str | None,
        typer.Option(
            help="a GPU such as T4, or its compute capability, sm75; default: the device at hand",
            parser=_parse_target,
            metavar="GPU",
        ),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="the graph's, which is checked")] = Precision.fp16,
    backend: Annotated[Backend | None, typer.Option(help="default: tensorrt-rtx where it is installed")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="the engine; default: beside the graph",
            dir_okay=False,
            callback=lambda path: path and _check_parent(path),
        ),
    ] = None,
) -> None:
    """Build a TensorRT engine."""
    from ..export.engine import build_engine

    path = output or onnx.with_suffix(f".{target or 'local'}.engine")
    try:
        built = build_engine(onnx, path, target, precision.value, backend.value if backend else None)
    except (ValueError, RuntimeError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(
        f"{path}: {built.backend} {built.version}, {built.target}, {built.precision}, "
        f"{built.num_bytes / 2**20:.1f} MiB, {built.num_layers} layers, built in {built.seconds:.1f} s"
    )


@app.command()
def show(
    model: ModelOption,
    image: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="the image")],
    image_size: SizeOption = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="least score of a detection")] = 0.5,
    top: Annotated[int, typer.Option(min=1, help="how many detections, the best first, to show in detail")] = 3,
    layers: Annotated[Layers, typer.Option(help="decoder layers to show")] = Layers.last,
    text: TextOption = None,
    trust: TrustOption = None,
    dpi: Annotated[int, typer.Option(min=20, max=1200, help="pixels an inch; the picture is 14 inches wide")] = 100,
    output: Annotated[
        Path, typer.Option(help="the picture to write", dir_okay=False, callback=_check_picture_name)
    ] = Path("distributions.png"),
) -> None:
    """Draw detections with the distribution of each edge, before and after W, and its standard deviation."""
    import numpy as np

    from ..wrapping import predict_distributions
    from .show import draw_detections, read_detections
    from .writing import written_whole

    picture = _picture(image, "--image")
    checkpoint = _open(model, trust, text)
    pixels = checkpoint.preprocess(picture, image_size)
    height, width = pixels.shape[-2:]
    with _told("--image-size"):
        checkpoint.check_size((height, width))
    detector = _load(checkpoint)
    with _told("--model"):
        logits, _, record = predict_distributions(detector, pixels)
    found = read_detections(logits, record, checkpoint.class_names(), picture.size)
    detections = [detection for detection in found if detection.score >= threshold]
    if not detections:
        typer.echo(f"no detection reaches a score of {threshold}; the best has {found[0].score:.3f}", err=True)
        raise typer.Exit(1)
    figure = draw_detections(np.asarray(picture), detections, detailed=top, all_layers=layers is Layers.all)
    with _told("--output"), written_whole(output) as part:
        figure.savefig(part, dpi=dpi)
    typer.echo(f"{len(detections)} of score {threshold} or above, {min(top, len(detections))} in detail: {output}")
    for number, detection in enumerate(detections[:top], start=1):
        typer.echo(f"{number} {detection}")


@contextmanager
def _told(option: str | None = None) -> Iterator[None]:
    """What is wrong with an option's value, in one line in place of a traceback."""
    try:
        yield
    except (DFinePluginError, ValueError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _open(path: Path, trust: list[str] | None, text: str | None) -> Checkpoint:
    """The checkpoint at a path, of whose weights nothing is read; what it leaves open is said."""
    from ..checkpoints import open_checkpoint

    with _told("--model"):
        checkpoint = open_checkpoint(path, trust or (), text)
    if assumed := checkpoint.assumed():
        typer.echo(f"note: {assumed}", err=True)
    return checkpoint


def _load(checkpoint: Checkpoint) -> Any:
    """A checkpoint's model."""
    from ..registry import find_adapter

    with _told("--model"):
        model = checkpoint.load()
        find_adapter(model)
    return model


def _picture(path: Path, option: str) -> Image.Image:
    from .pictures import read_picture

    with _told(option):
        return read_picture(path)


def _image_files(folder: Path) -> list[Path]:
    """All images in a folder, in the order of their names."""
    from PIL import Image

    known = Image.registered_extensions()
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in known)
    if not files:
        raise typer.BadParameter(f"{folder} holds no image", param_hint="--images")
    return files
