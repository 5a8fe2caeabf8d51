"""What a latency run measures: hosts and their wrapped twins, models, graphs and engines, with images for parity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from dfine_plugin.benchmarks.full_size_hosts import HOSTS
from dfine_plugin.benchmarks.options import name_and_path
from dfine_plugin.benchmarks.runners import TORCH_BACKENDS, Engine, OnnxRuntime, Runner
from dfine_plugin.benchmarks.settled_hosts import settled_pair
from dfine_plugin.benchmarks.shapes import make_shapes
from dfine_plugin.checkpoints import open_checkpoint
from dfine_plugin.export import build_engine, export_onnx
from dfine_plugin.export.engine import check_precision
from dfine_plugin.pictures import read_picture
from dfine_plugin.registry import find_adapter
from dfine_plugin.targets import BACKENDS as ENGINE_BACKENDS

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png")
NUM_SCENES = 2
"""Drawn images that parity is measured on where the user gives none."""


@dataclass(frozen=True)
class Subject:
    """What is measured under one name.

    Attributes:
        name: in the table.
        images: ``(3, S, S)`` each, as the model takes them.
        model: in float32 on the CPU: what runs in PyTorch, is exported, and tells what the others should detect.
        graph: an ONNX graph, in place of the model's own.
        engine: in place of one built from the graph.
        fresh: the model has never been trained.
    """

    name: str
    images: Sequence[Tensor]
    model: nn.Module | None = None
    graph: Path | None = None
    engine: Path | None = None
    fresh: bool = False

    def runs_on(self, backend: str) -> bool:
        """Whether there is something of this subject that the backend can run."""
        if self.model is not None:
            return True
        return (self.graph is not None and backend not in TORCH_BACKENDS) or (
            self.engine is not None and backend in ENGINE_BACKENDS
        )

    def runner(self, backend: str, images: Tensor, precision: str, folder: Path) -> Runner:
        """The subject on a backend.

        Args:
            backend: one that it :meth:`runs_on`.
            images: the batch.
            precision: to export in; a given graph must have it.
            folder: for graphs and engines that are made on the way, of this subject alone.
        """
        if backend in TORCH_BACKENDS:
            assert self.model is not None
            return TORCH_BACKENDS[backend](images, self.model, precision)
        if self.engine is not None and backend in ENGINE_BACKENDS:
            return Engine(images, self.engine, backend)
        graph = self._graph(images, precision, folder)
        if backend in ENGINE_BACKENDS:
            count = len(images)
            path = folder / f"{backend}.engine"
            build_engine(graph, path, precision=precision, backend=backend, batch_sizes=(count, count, count))
            return Engine(images, path, backend)
        return OnnxRuntime(images, graph)

    def _graph(self, images: Tensor, precision: str, folder: Path) -> Path:
        if self.graph is not None:
            check_precision(self.graph, precision)
            return self.graph
        assert self.model is not None
        path = folder / "model.onnx"
        if not path.exists():  # another backend has asked for it
            height, width = images.shape[-2:]
            export_onnx(self.model, path, (height, width), batch_size=len(images), precision=precision)
        return path


def find_subjects(
    hosts: Sequence[str],
    models: Sequence[str],
    graphs: Sequence[str],
    engines: Sequence[str],
    image_size: int,
    photos: Path | None,
) -> list[Subject]:
    """The subjects that the options name, in that order.

    Args:
        hosts: names of full-size hosts; each gives two subjects with fresh weights, the host and its wrapped twin.
        models: ``[NAME=]PATH`` of checkpoints (:func:`~dfine_plugin.checkpoints.open_checkpoint`), wrapped or bare.
        graphs: ``[NAME=]FILE``, ONNX; under a model's name it is that model's graph.
        engines: ``[NAME=]FILE``, likewise.
        image_size: S.
        photos: a folder with images for parity, else drawn scenes. Hosts with fresh weights get those in any case.

    Raises:
        ValueError: an unknown host, a path without a model, a graph or an image, a name given twice.
        UnsupportedModelError: no adapter knows the model.
    """
    # all that can be wrong with what was given, before anything that takes long
    checkpoints = [(name, open_checkpoint(folder)) for name, folder in map(name_and_path, models)]
    for _, checkpoint in checkpoints:
        checkpoint.check_size((image_size, image_size))
    for _, file in map(name_and_path, (*graphs, *engines)):
        if not file.is_file():
            raise ValueError(f"there is no file {file}")
    drawn = make_shapes(NUM_SCENES, image_size, seed=0).images
    scenes = drawn.float()
    scaled = scenes / 127.5 - 1
    pictures = [to_pil_image(scene) for scene in drawn] if photos is None else _open_all(photos)
    subjects: dict[str, Subject] = {}

    def add(subject: Subject) -> None:
        if subject.name in subjects:
            raise ValueError(f"{subject.name!r} is given twice; name one of them: NAME=PATH")
        subjects[subject.name] = subject

    for host in hosts:
        if host not in HOSTS:
            raise ValueError(f"{host!r} is not one of {', '.join(HOSTS)}")
        batch = scenes if host.startswith("detrex/") else scaled  # detrex's hosts normalise themselves
        bare, wrapped = settled_pair(host, batch)
        add(Subject(host, list(batch), bare, fresh=True))
        add(Subject(f"{host} wrapped", list(batch), wrapped, fresh=True))
    for name, checkpoint in checkpoints:
        model = checkpoint.load()
        find_adapter(model)
        images = [checkpoint.preprocess(picture, (image_size, image_size))[0] for picture in pictures]
        add(Subject(name, images, model))
    for kind, specs in (("graph", graphs), ("engine", engines)):
        for spec in specs:
            name, file = name_and_path(spec)
            subject = subjects.get(name, Subject(name, list(scaled)))
            if getattr(subject, kind) is not None:
                raise ValueError(f"{name!r} has two files of one kind; name one of them: NAME=PATH")
            given: dict[str, Any] = {kind: file}
            subjects[name] = replace(subject, **given)
    return list(subjects.values())


def _open_all(folder: Path) -> list[Image.Image]:
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return [read_picture(file) for file in files]
