"""What ``save_pretrained`` of a transformers model wrote, as a checkpoint."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection
from transformers.utils import IMAGE_PROCESSOR_NAME, logging

from .common import Host
from .transformers_saving import SETTINGS, load_pretrained

IMAGE_SIZE = 640
"""Pixels, where neither the caller nor the checkpoint says."""


class TransformersCheckpoint:
    """A wrapped or bare model in a folder; see :class:`~dfine_plugin.checkpoints.Checkpoint`.

    A ``preprocessor_config.json`` beside the weights, as ``save_pretrained`` of an image processor writes it, says what
    becomes of images. Without one they are scaled to a square, and their values to ``[0, 1]``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = AutoConfig.from_pretrained(folder)
        self.processor = None
        if (folder / IMAGE_PROCESSOR_NAME).is_file():
            self.processor = AutoImageProcessor.from_pretrained(folder)

    def __str__(self) -> str:
        return self.folder.name

    def load(self) -> Host:
        """See :class:`~dfine_plugin.checkpoints.Checkpoint`."""
        load = load_pretrained if hasattr(self.config, SETTINGS) else AutoModelForObjectDetection.from_pretrained
        logging.disable_progress_bar()
        try:
            return load(self.folder, dtype=torch.float32).eval()
        except OSError as error:
            raise ValueError(str(error)) from error

    def preprocess(self, image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
        """See :class:`~dfine_plugin.checkpoints.Checkpoint`."""
        image = image.convert("RGB")
        if self.processor is not None:
            sizes = {} if size is None else {"size": {"height": size[0], "width": size[1]}}
            return self.processor(images=image, return_tensors="pt", do_pad=False, **sizes)["pixel_values"]
        height, width = size or (IMAGE_SIZE, IMAGE_SIZE)
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32) / 255
        return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()

    def class_names(self) -> Mapping[int, str]:
        """See :class:`~dfine_plugin.checkpoints.Checkpoint`."""
        return self.config.id2label
