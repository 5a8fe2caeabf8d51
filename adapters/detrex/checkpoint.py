"""What detrex's trainer wrote, as a checkpoint."""

import copy
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import LazyCall as L
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detrex.modeling.ema import EMAState
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from dfine_plugin.errors import first_line
from dfine_plugin.tools.image_sizes import RT_DETR_STRIDES, check_image_size

from ..host_parts import Host
from .config import make, parts, read_config

DETECTRON2_NAMES = {"augmentation": "augmentations", "img_format": "image_format"}
"""From what detrex's mapper of data calls its arguments to what detectron2's does."""


class DetrexCheckpoint:
    """A checkpoint in an output folder of detrex's trainer; see :class:`~dfine_plugin.checkpoints.Checkpoint`.

    The config beside it makes the model anew, on the CPU. Where the run averaged its weights (``train.model_ema``), it
    is those that are taken. Images go through the test data's augmentation.

    Args:
        folder: with ``config.yaml``.
        weights: a ``.pth`` file; None for the latest in the folder.
        trust: packages, beside detectron2, detrex and this one, whose code its config may call.

    Raises:
        ValueError: the folder holds no checkpoint, or its config cannot be read here.
    """

    def __init__(self, folder: Path, weights: Path | None = None, trust: Sequence[str] = ()) -> None:
        latest = folder / "last_checkpoint"
        if weights is None and not latest.is_file():
            raise ValueError(f"{folder} holds no checkpoint: there is no last_checkpoint in it")
        self.weights = weights or folder / latest.read_text().strip()
        if not self.weights.is_file():
            raise ValueError(f"there is no file {self.weights}")
        self.config = read_config(folder / "config.yaml", trust)
        self.trust = trust
        self.averaged = self.config.train.get("model_ema", {}).get("enabled", False)
        # RT-DETR of dfine_plugin.projects holds transformers' model, which takes pixels from 0 to 1
        self.holds_detector = "detector" in self.config.model

    def __str__(self) -> str:
        return f"{self.weights.name}{', averaged weights' if self.averaged else ''}"

    def load(self) -> Host:
        """See :class:`~dfine_plugin.checkpoints.Checkpoint`."""
        model = make(_on_cpu(_only_wrapped(self.config.model)), self.trust)
        try:
            checkpoint = torch.load(self.weights, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self.weights} cannot be read: {first_line(error)}") from error
        try:
            model.load_state_dict(checkpoint["model"])
        except RuntimeError as error:  # other settings of the FDR head among them
            raise ValueError(f"{self.weights} does not fit its config: {error}") from error
        if self.averaged:
            if "ema_state" not in checkpoint:
                raise ValueError(f"{self.weights} has no averaged weights, though its config says train.model_ema")
            averages = EMAState()
            averages.load_state_dict(checkpoint["ema_state"])
            averages.apply_to(model)
        detector = model.detector if self.holds_detector else model
        return detector.float().eval()

    def of_mapper(self, name: str) -> Any:
        """What detrex's mapper of the test data calls so, or detectron2's, which has another name for it."""
        mapper = self.config.dataloader.test.mapper
        return mapper[name if name in mapper else DETECTRON2_NAMES[name]]

    def check_size(self, size: tuple[int, int]) -> None:
        """See :class:`~dfine_plugin.checkpoints.Checkpoint`."""
        # detrex's own hosts take any size
        check_image_size(size, RT_DETR_STRIDES if self.holds_detector else ())

    def preprocess(self, image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
        """See :class:`~dfine_plugin.checkpoints.Checkpoint`."""
        augmentation = make(self.of_mapper("augmentation"), self.trust) if size is None else [T.Resize(size)]
        inputs = T.AugInput(convert_PIL_to_numpy(image, self.of_mapper("img_format")))
        T.AugmentationList(augmentation)(inputs)
        pixels = torch.from_numpy(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))[None].float()
        return pixels / 255 if self.holds_detector else pixels

    def assumed(self) -> str | None:
        """See :class:`~dfine_plugin.checkpoints.Checkpoint`."""
        return None

    def normalisation(self) -> Mapping[str, Any]:
        """See :class:`~dfine_plugin.checkpoints.Checkpoint`."""
        channels = self.of_mapper("img_format")
        # detrex's own hosts normalise by themselves
        return {
            "channels": channels,
            "scale": 1 / 255 if self.holds_detector else 1.0,
            "mean": [0.0] * 3,
            "std": [1.0] * 3,
        }

    def class_names(self) -> Mapping[int, str]:
        """See :class:`~dfine_plugin.checkpoints.Checkpoint`."""
        names = make(self.config.dataloader.test.dataset.names, self.trust)
        metadata = MetadataCatalog.get(names if isinstance(names, str) else names[0])
        return dict(enumerate(metadata.get("thing_classes", [])))


def _only_wrapped(model: DictConfig) -> DictConfig:
    """A run's model without what made it from a trained host, which its own checkpoint holds as it became."""
    if model._target_ != "dfine_plugin.projects.trained.wrap_trained":
        return model
    return L("dfine_plugin.wrapping.wrap_decoder")(model=model.model, config=model.get("config"))


def _on_cpu(config: DictConfig) -> DictConfig:
    """A copy of a model's config with every ``device`` in it the CPU."""
    config = copy.deepcopy(config)
    for part in parts(config):
        if "device" in part:
            part.device = "cpu"
    return config
