"""Options that several commands have, checked before anything is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfine_plugin.benchmarks.gain.variants import TWICE, fdr_settings, is_taught
from dfine_plugin.benchmarks.models.hosts import HOSTS
from dfine_plugin.config import CLASS_LOSSES
from dfine_plugin.tools.image_sizes import RT_DETR_STRIDES, check_image_size

if TYPE_CHECKING:
    import torch

FAIR_BASELINES = "5.18.0"
"""The first release of transformers whose main loss leaves RT-DETR's denoising queries out (its pull request 48528)."""


FULL_SIZE_QUERIES = 300
"""Of hosts of full size, RT-DETR's among them, whose config.json leaves out what is the default."""


def check_host_takes(host: str, side: int, num_queries: int = FULL_SIZE_QUERIES) -> None:
    """Refuse square images that a host of the benchmarks cannot take."""
    try:
        check_image_size((side, side), RT_DETR_STRIDES if host.startswith("rt-detr") else (), num_queries)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--image-size") from error


def check_looks_forward(host: str, rows: Sequence[str], param_hint: str) -> None:
    """Refuse the row of a bare host that looks forward twice where nothing makes the host do so."""
    able = [name for name, known in HOSTS.items() if known.bare_looks_twice]
    if TWICE in rows and host not in able:
        raise typer.BadParameter(f"the row {TWICE!r} is for {' and '.join(able)}", param_hint=param_hint)


def check_fair_baseline(host: str) -> None:
    """Refuse RT-DETR of a transformers before :data:`FAIR_BASELINES`.

    There the last layer's truths are matched with denoising queries, too: what inference uses learns from few of them.
    A wrapped model's loss parts the two whatever the release, so that a comparison would credit the wrap with that.
    """
    from packaging.version import Version

    found = version("transformers")
    if host.replace("_", "-").startswith("rt-detr") and Version(found) < Version(FAIR_BASELINES):
        raise typer.BadParameter(
            f"transformers {found} matches {host}'s denoising queries in its main loss, which makes a weak baseline: "
            f"pip install 'transformers>={FAIR_BASELINES}'"
        )


def check_device_name(device: str | None) -> str | None:
    """For typer: whether this names a device."""
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise typer.BadParameter(f"{device!r} is neither cpu nor cuda")
    return device


def check_class_loss(class_loss: str) -> str:
    """For typer: whether FDRConfig knows this loss."""
    if class_loss not in CLASS_LOSSES:
        raise typer.BadParameter(f"{class_loss!r} is neither {' nor '.join(CLASS_LOSSES)}")
    return class_loss


ClassLossOption = Annotated[
    str, typer.Option(help=f"of baseline and wrapped alike: {' or '.join(CLASS_LOSSES)}", callback=check_class_loss)
]

FirstSeedOption = Annotated[
    int, typer.Option(min=0, help="of as many as --seeds says: for fresh ones, or to share them out over machines")
]

MosaicsOption = Annotated[
    float,
    typer.Option(
        min=0.0, max=1.0, help="share of the images that are mosaics in the first half, of baseline and wrapped alike"
    ),
]

TeacherOption = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, help="folder of a wrapped model, for the row that learns from one"),
]


def check_teacher(teacher: Path | None, rows: Sequence[str], host: str) -> None:
    """Refuse rows that learn from a teacher without one, a teacher without such rows, and one that cannot teach."""
    wrong = _wrong_with_teacher(teacher, [row for row in rows if is_taught(row)], host)
    if wrong:
        raise typer.BadParameter(wrong, param_hint="--teacher")


def _wrong_with_teacher(teacher: Path | None, taught: Sequence[str], host: str) -> str | None:
    if teacher is None:
        return f"the row {taught[0]} learns from one" if taught else None
    if not taught:
        return "no row learns from one, as 'taught' does"
    if "/" in host:
        return f"{host} takes other inputs than a model in such a folder"
    if any((fdr_settings(row) or {}).get("fgl_weight") == 0 for row in taught):
        return "fgl_weight is 0, and FGL is what a teacher would take part in"
    try:
        own = json.loads((teacher / "config.json").read_text()).get("dfine_plugin")
    except (OSError, ValueError, AttributeError):
        return f"{teacher} has no config.json that can be read: give a folder that save_pretrained wrote"
    if own is None:
        return f"{teacher} is not wrapped: its boxes come from no distributions"
    return f"{teacher} is deployed, and keeps no record of its distributions" if own.get("deployed") else None


def find_device(name: str) -> torch.device:
    """The device of that name, if it is here."""
    import torch

    if name != "cpu" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no GPU here that PyTorch can use", param_hint="--device")
    return torch.device(name)


def check_data(data: str, splits: Sequence[str] = ("train", "val")) -> None:
    """Refuse what is neither the embedded data nor a COCO folder with these splits."""
    needed = [] if data == "shapes" else [Path(data) / f"instances_{split}.json" for split in splits]
    if missing := [str(path) for path in needed if not path.is_file()]:
        raise typer.BadParameter(
            f"there is no {' and no '.join(missing)}: give 'shapes' or a folder with these and images/",
            param_hint="--data",
        )


def name_and_path(spec: str) -> tuple[str, Path]:
    """The two parts of ``[NAME=]PATH``; without a name it is the folder's, or the file's without its suffix."""
    name, equals, path = spec.partition("=")
    if Path(spec).exists() or not equals:  # a folder's own name may have an equals sign
        return Path(spec).resolve().stem if Path(spec).is_file() else Path(spec).resolve().name, Path(spec)
    return name, Path(path)
