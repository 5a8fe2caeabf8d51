"""What a latency run measures: hosts and their wrapped twins, models, graphs and engines, with images for parity."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_pil_image

from dfine_plugin import deploy, is_wrapped
from dfine_plugin.benchmarks.data.shapes import make_shapes
from dfine_plugin.benchmarks.gain.runs import RunSettings
from dfine_plugin.benchmarks.gain.training import load_data
from dfine_plugin.benchmarks.models.full_size_hosts import HOSTS
from dfine_plugin.benchmarks.models.settled_hosts import settled_pair
from dfine_plugin.benchmarks.options import name_and_path
from dfine_plugin.benchmarks.speed.quantisation import quantise
from dfine_plugin.benchmarks.speed.runners import OPENVINO_TYPES, TORCH_BACKENDS, Engine, OnnxRuntime, OpenVINO, Runner
from dfine_plugin.checkpoints import open_checkpoint
from dfine_plugin.export import build_engine, export_onnx
from dfine_plugin.export.coco import CocoSplit
from dfine_plugin.export.engine import check_precision
from dfine_plugin.export.graph import inference_module
from dfine_plugin.export.parity import torch_detections
from dfine_plugin.registry import find_adapter
from dfine_plugin.tools.pictures import read_picture
from dfine_plugin.tools.targets import BACKENDS as ENGINE_BACKENDS

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
        host: the name of the bare host that the model is the wrapped twin of; None where there is no such twin.
        preprocess: what makes ``(1, 3, S, S)`` of a picture; None where the model is fresh, or there is none.
    """

    name: str
    images: Sequence[Tensor]
    model: nn.Module | None = None
    graph: Path | None = None
    engine: Path | None = None
    fresh: bool = False
    host: str | None = None
    preprocess: Callable[[Image.Image], Tensor] | None = None

    def with_layers(self, num_layers: int) -> Subject:
        """The subject with the first decoder layers of its model alone, named so; deployed, if wrapped.

        Raises:
            ValueError: the model does not have so many.
            WrapStateError: it is deployed already.
        """
        if self.model is None:
            return self
        model = copy.deepcopy(self.model)
        if is_wrapped(model):
            deploy(model, num_layers)
        else:
            find_adapter(model).keep_layers(model, num_layers)
        depth = f", {num_layers} layer{'s' * (num_layers > 1)}"
        return replace(self, name=self.name + depth, model=model, host=self.host and self.host + depth)

    def flops(self) -> int | None:
        """Floating point operations of one image's inference, as torch counts them; None without a model."""
        if self.model is None:
            return None
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            inference_module(self.model)(self.images[0][None])
        return counter.get_total_flops()

    def average_precision(self, split: CocoSplit, pictures: Sequence[Image.Image]) -> float | None:
        """AP of the model, in PyTorch and float32, on a split with these pictures; None where it is not trained."""
        if self.model is None or self.preprocess is None:
            return None
        pixels = [self.preprocess(picture)[0] for picture in pictures]
        height, width = pixels[0].shape[-2:]
        return split.average_precision(torch_detections(self.model, pixels), (height, width))

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
        if backend in OPENVINO_TYPES:
            return OpenVINO(images, graph, backend)
        return OnnxRuntime(images, quantise(graph, folder / "int8.onnx") if backend == "onnxruntime-int8" else graph)

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
        add(Subject(f"{host} wrapped", list(batch), wrapped, fresh=True, host=host))
    for name, checkpoint in checkpoints:
        model = checkpoint.load()
        find_adapter(model)
        preprocess = partial(checkpoint.preprocess, size=(image_size, image_size))
        add(Subject(name, [preprocess(picture)[0] for picture in pictures], model, preprocess=preprocess))
    for kind, specs in (("graph", graphs), ("engine", engines)):
        for spec in specs:
            name, file = name_and_path(spec)
            subject = subjects.get(name, Subject(name, list(scaled)))
            if getattr(subject, kind) is not None:
                raise ValueError(f"{name!r} has two files of one kind; name one of them: NAME=PATH")
            given: dict[str, Any] = {kind: file}
            subjects[name] = replace(subject, **given)
    return list(subjects.values())


def read_data(data: str, image_size: int) -> tuple[CocoSplit, list[Image.Image]]:
    """The validation split that AP is measured on, and its pictures.

    Args:
        data: ``"shapes"``, the ablation's, or a COCO-format folder.
        image_size: S, of the shapes.

    Raises:
        ValueError: the folder cannot be read.
    """
    if data != "shapes":
        split = CocoSplit.read(Path(data))
        return split, [read_picture(path) for path in split.image_paths()]
    scenes = load_data(data, "val", image_size, RunSettings.val_images)
    return CocoSplit(Path(), scenes.coco), [to_pil_image(image) for image in scenes.images]


def _open_all(folder: Path) -> list[Image.Image]:
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return [read_picture(file) for file in files]
