"""What a latency run measures: hosts and their wrapped twins, models, graphs and engines, with images for parity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig

from dfine_plugin.adapters.transformers_common import SETTINGS, load_pretrained
from dfine_plugin.adapters.transformers_preprocessing import preprocess
from dfine_plugin.benchmarks.full_size_hosts import HOSTS, settled_pair
from dfine_plugin.benchmarks.runners import TORCH_BACKENDS, Engine, OnnxRuntime, Runner
from dfine_plugin.benchmarks.shapes import make_shapes
from dfine_plugin.export import build_engine, export_onnx
from dfine_plugin.export.engine import BACKENDS as ENGINE_BACKENDS
from dfine_plugin.export.engine import check_precision
from dfine_plugin.registry import find_adapter

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
        models: ``[NAME=]FOLDER`` of what ``save_pretrained`` of a wrapped or bare transformers model wrote.
        graphs: ``[NAME=]FILE``, ONNX; under a model's name it is that model's graph.
        engines: ``[NAME=]FILE``, likewise.
        image_size: S.
        photos: a folder with images for parity, else drawn scenes. Hosts with fresh weights get those in any case.

    Raises:
        ValueError: an unknown host, a path without a model, a graph or an image, a name given twice.
        UnsupportedModelError: no adapter knows the model.
    """
    scenes = make_shapes(NUM_SCENES, image_size, seed=0).images.float()
    scaled = scenes / 127.5 - 1
    subjects: dict[str, Subject] = {}

    def add(subject: Subject) -> None:
        if subject.name in subjects:
            raise ValueError(f"{subject.name!r} is given twice; name one of them: NAME=PATH")
        subjects[subject.name] = subject

    for host in hosts:
        if host not in HOSTS:
            raise ValueError(f"{host!r} is not one of {', '.join(HOSTS)}")
        images = scenes if host.startswith("detrex/") else scaled  # detrex's hosts normalise themselves
        bare, wrapped = settled_pair(host, images)
        add(Subject(host, list(images), bare, fresh=True))
        add(Subject(f"{host} wrapped", list(images), wrapped, fresh=True))
    for spec in models:
        name, folder = _name_and_path(spec)
        images_of = _photos(photos, folder, image_size) if photos else list(scaled)
        add(Subject(name, images_of, load_model(folder)))
    for kind, specs in (("graph", graphs), ("engine", engines)):
        for spec in specs:
            name, file = _name_and_path(spec)
            if not file.is_file():
                raise ValueError(f"there is no file {file}")
            subject = subjects.get(name, Subject(name, list(scaled)))
            if getattr(subject, kind) is not None:
                raise ValueError(f"{name!r} has two files of one kind; name one of them: NAME=PATH")
            given: dict[str, Any] = {kind: file}
            subjects[name] = replace(subject, **given)
    return list(subjects.values())


def load_model(folder: Path) -> nn.Module:
    """What ``save_pretrained`` of a transformers model, wrapped or bare, wrote: in float32 and evaluation mode.

    Raises:
        ValueError: the folder holds no model.
        UnsupportedModelError: no adapter knows the model.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model: there is no config.json in it")
    config = AutoConfig.from_pretrained(folder)
    load: Callable[..., nn.Module] = load_pretrained
    if not hasattr(config, SETTINGS):
        load = getattr(transformers, config.architectures[0]).from_pretrained
    transformers.utils.logging.disable_progress_bar()
    model = load(folder, dtype=torch.float32).eval()
    find_adapter(model)
    return model


def _name_and_path(spec: str) -> tuple[str, Path]:
    name, _, path = spec.rpartition("=")
    if Path(spec).exists() or not name:  # a folder's own name may have an equals sign
        return Path(spec).resolve().stem if Path(spec).is_file() else Path(spec).resolve().name, Path(spec)
    return name, Path(path)


def _photos(photos: Path, model: Path, image_size: int) -> list[Tensor]:
    files = sorted(file for file in photos.glob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"{photos} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    images = []
    for file in files:
        with Image.open(file) as picture:
            images.append(preprocess(picture, model, image_size)[0])
    return images
