"""Small trained hosts that come with the package, to try it on: for the retrofit, tests, examples.

    python -m dfine_plugin.benchmarks.trained_hosts

trains them anew on the embedded data, as the ablation trains its baselines, and writes each to its folder in `trained`
as float16 safetensors, with the command, the AP and the digest of the weights in `trained.json`. Loaded, they are
float32.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dfine_plugin.benchmarks.gain.runs import RunSettings
from dfine_plugin.benchmarks.reporting import write_json

if TYPE_CHECKING:
    from torch import nn

TRAINED = Path(__file__).parent / "trained"
SEED = 100  # of none of the comparisons
IMAGE_SIZE = 96
STEPS = {"rt-detr": 1500, "deformable-detr": 2000}
LEARNING_RATES = {"rt-detr": 4e-3, "deformable-detr": 2e-3}


def facts() -> dict[str, Any]:
    """What is known of the hosts that come with the package, by name: AP, digest, size, how they were trained."""
    return json.loads((TRAINED / "trained.json").read_text())


def find_trained(name_or_folder: str) -> Path:
    """The folder of a trained transformers host: one of :data:`STEPS`, or what `save_pretrained` wrote.

    Raises:
        ValueError: there is no such host.
    """
    folder = TRAINED / name_or_folder if name_or_folder in STEPS else Path(name_or_folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name_or_folder} is neither one of {', '.join(STEPS)} nor a folder with a trained host")
    return folder


def load_trained(name_or_folder: str, class_names: list[str] | None = None) -> nn.Module:
    """The trained host that :func:`find_trained` finds, in float32, for images as the benchmarks normalise them.

    With `class_names` other than its own it gets new class heads, drawn at random.
    """
    import torch
    import transformers

    folder = find_trained(name_or_folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    if class_names is not None and list(config.id2label.values()) != class_names:
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: index for index, name in enumerate(class_names)}
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it would list the class heads that do not fit
    try:
        host_class = getattr(transformers, config.architectures[0])
        model = host_class.from_pretrained(folder, config=config, dtype=torch.float32, ignore_mismatched_sizes=True)
    finally:
        transformers.logging.set_verbosity(verbosity)
    take_benchmarks_images(model, folder)
    return model


def take_benchmarks_images(model: nn.Module, folder: Path) -> None:
    """Let a host that was trained on otherwise normalised images take those of `detection_data.normalise`."""
    from dfine_plugin.checkpoints import open_checkpoint

    own = open_checkpoint(folder).normalisation()
    if (own["mean"], own["std"]) != ([0.5] * 3, [0.5] * 3):
        model.register_forward_pre_hook(partial(_renormalise, own), with_kwargs=True)


def _renormalise(
    own: Mapping[str, Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    from dfine_plugin.benchmarks.data.detection_data import normalised

    pixels = args[0] if args else kwargs["pixel_values"]
    pixels = normalised((pixels + 1) * 127.5, own)
    return ((pixels, *args[1:]), kwargs) if args else ((), {**kwargs, "pixel_values": pixels})


def train(name: str, output: Path) -> dict[str, Any]:
    """Train the host of this name, write it to its folder in `output`, and return what there is to know of it."""
    import torch

    from dfine_plugin.benchmarks.gain.evaluation import coco_metrics, detect
    from dfine_plugin.benchmarks.gain.training import load_data, train_run
    from dfine_plugin.benchmarks.gain.variants import BASELINE
    from dfine_plugin.benchmarks.models.hosts import HOSTS

    rate = LEARNING_RATES[name]
    settings = RunSettings(
        name, BASELINE, SEED, "shapes", IMAGE_SIZE, STEPS[name], 16, rate, clip_norm=HOSTS[name].clip_norm
    )
    with tempfile.TemporaryDirectory() as scratch:
        train_run(settings, models=Path(scratch))
        (folder,) = Path(scratch).iterdir()
        model: Any = load_trained(str(folder))
        model.half().save_pretrained(output / name)
        preprocessing = "preprocessor_config.json"
        (output / name / preprocessing).write_bytes((folder / preprocessing).read_bytes())
    data = load_data("shapes", "val", settings.image_size, settings.val_images)
    metrics = coco_metrics(detect(load_trained(str(output / name)), data, 50, torch.device("cpu")), data.coco)
    weights = (output / name / "model.safetensors").read_bytes()
    return {
        "AP": {key: round(metrics[key], 2) for key in ("AP", "AP50", "AP75", "AP90")},
        "sha256": hashlib.sha256(weights).hexdigest(),
        "bytes": len(weights),
        "steps": settings.steps,
        "learning_rate": rate,
        "seed": SEED,
    }


def main(
    hosts: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(STEPS)}; default: all")] = None,
    output: Annotated[Path, typer.Option(help="where the folders go")] = TRAINED,
) -> None:
    """Train the hosts that come with the package."""
    import torch

    console = Console()
    torch.set_num_threads(1)
    path = output / "trained.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    for name in hosts or STEPS:
        found[name] = train(name, output)
        write_json(path, found)
        console.print(f"{name}: {json.dumps(found[name])}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
