"""What defines a run, and the store of finished ones: one JSON file each, so that a stopped comparison resumes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from dfine_plugin.benchmarks.gain.variants import is_taught
from dfine_plugin.benchmarks.models.hosts import WIDTH
from dfine_plugin.benchmarks.reporting import Result, write_json
from dfine_plugin.tools.writing import written_whole

ADDED_LATER = ("width", "mosaics", "teacher")
"""Settings that the digests of earlier runs do not have."""


@dataclass(frozen=True)
class RunSettings:
    """Everything that a run's outcome depends on, besides code and machine. `steps` are optimizer steps.

    `width` is that of a transformer which is trained from scratch. `class_loss` is FDRConfig's, and `mosaics` the share
    of the images that :func:`~dfine_plugin.make_mosaics` replaces in the first half of the schedule: both of baseline
    and wrapped alike. `teacher` is the folder of a wrapped model, for rows that learn from one. `data` is "shapes" or a
    folder in COCO format; the numbers of images hold for shapes only. `evaluations` are spread evenly over the
    schedule, the last at its end.
    """

    host: str
    variant: str
    seed: int
    data: str
    image_size: int
    steps: int
    batch_size: int
    learning_rate: float
    num_queries: int = 30
    width: int = WIDTH
    train_images: int = 2000
    val_images: int = 400
    warmup_steps: int = 100
    weight_decay: float = 1e-4
    clip_norm: float = 0.1
    class_loss: str = "host"
    mosaics: float = 0.0
    teacher: str = ""
    ema_decay: float = 0.99
    flip: bool = True
    evaluations: int = 4
    device: str = "cpu"

    def key(self) -> str:
        """A name for this run that tells any two settings apart, and that other commands can take as NAME=FOLDER."""
        readable = re.sub(r"[^\w.+-]+", "_", f"{self.host}-{self.variant}-seed{self.seed}")
        return f"{readable}-{self.digest()}"

    def digest(self) -> str:
        """What tells any two settings apart in :meth:`key`."""
        told = asdict(self)
        for field in fields(self):
            if field.name in ADDED_LATER and told[field.name] == field.default:
                del told[field.name]  # as when there was no choice
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:10]

    def evaluation_steps(self) -> list[int]:
        """The steps after which the model is evaluated, ascending, the last one included."""
        return sorted({max(1, self.steps * i // self.evaluations) for i in range(1, self.evaluations + 1)})


@dataclass(frozen=True)
class RetrofitSettings(RunSettings):
    """A run that starts from a trained host: the folder that `save_pretrained` wrote, or the name of a shipped one.

    `evaluate_at` are steps, 0 for before the first one; the last step is evaluated always.
    """

    trained: str = ""
    evaluate_at: tuple[int, ...] = (0, 100, 200, 400, 1000)

    def evaluation_steps(self) -> list[int]:
        return sorted({*(step for step in self.evaluate_at if step < self.steps), self.steps})


Settings = TypeVar("Settings", bound=RunSettings)


def with_row(settings: Settings, row: str, seed: int, teacher: Path | None) -> Settings:
    """The run of one row and seed: with the teacher, if the row is one that learns from it."""
    return replace(settings, variant=row, seed=seed, teacher=str(teacher) if is_taught(row) else "")


def code_digest() -> str:
    """A digest of the installed plugin's sources: tells results of different states of the code apart."""
    import dfine_plugin
    import dfine_plugin.adapters

    digest = hashlib.sha256()
    own, adapters = (Path(package.__path__[0]) for package in (dfine_plugin, dfine_plugin.adapters))
    for path in [*sorted(own.glob("*.py")), *sorted(adapters.rglob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def load_run(folder: Path, settings: RunSettings) -> Result | None:
    """The stored result of this very run, None where it has not finished."""
    path = _stored(folder, settings, ".json")
    return json.loads(path.read_text()) if path else None


def save_run(folder: Path, settings: RunSettings, result: Result) -> None:
    """Store a finished run."""
    write_json(folder / f"{settings.key()}.json", result)


def find_model(folder: Path, settings: RunSettings) -> Path | None:
    """Where :func:`save_model` has kept this very run's weights, if it has."""
    return _stored(folder, settings, "")


def _stored(folder: Path, settings: RunSettings, suffix: str) -> Path | None:
    # by the digest alone: what earlier versions stored has an equals sign in its name
    return next(iter(sorted(folder.glob(f"*-{settings.digest()}{suffix}"))), None)


def save_model(folder: Path, settings: RunSettings, model: Any) -> None:
    """Keep a run's model as the folder that transformers' `save_pretrained` writes, preprocessing included."""
    from transformers import RTDetrImageProcessor

    # squares, scaled as detection_data.normalise does, or as the host was trained with that goes on
    own: Mapping[str, Any] = {"scale": 1 / 255, "mean": [0.5] * 3, "std": [0.5] * 3}
    if isinstance(settings, RetrofitSettings):
        from dfine_plugin.benchmarks.trained_hosts import find_trained
        from dfine_plugin.checkpoints import open_checkpoint

        own = open_checkpoint(find_trained(settings.trained)).normalisation()
    processor = RTDetrImageProcessor(
        size={"height": settings.image_size, "width": settings.image_size},
        rescale_factor=own["scale"],
        do_normalize=True,
        image_mean=own["mean"],
        image_std=own["std"],
    )
    with written_whole(folder / settings.key()) as part:
        model.save_pretrained(part)
        processor.save_pretrained(part)
