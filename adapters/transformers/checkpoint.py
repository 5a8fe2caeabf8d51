"""What ``save_pretrained`` of a transformers model wrote, as a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection
from transformers.utils import IMAGE_PROCESSOR_NAME, logging

from dfine_plugin.errors import first_line
from dfine_plugin.tools.image_sizes import check_image_size

from ..host_parts import Host
from .saving import SETTINGS, load_pretrained

IMAGE_SIZE = 640
"""Pixels, where neither the caller nor the checkpoint says."""


class TransformersCheckpoint:
    """A wrapped or bare model in a folder; see :class:`~dfine_plugin.checkpoints.Checkpoint`.

    A ``preprocessor_config.json`` beside the weights, as ``save_pretrained`` of an image processor writes it, says what
    becomes of images. Without one they are scaled to a square, and their values to ``[0, 1]``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processor = None
        try:
            self.config = AutoConfig.from_pretrained(folder)
            if (folder / IMAGE_PROCESSOR_NAME).is_file():
                self.processor = AutoImageProcessor.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} cannot be read: {first_line(error)}") from error
        if hasattr(self.config, "text_config"):
            raise ValueError(
                f"{folder} holds a {self.config.model_type}, which wants a text beside each image, and commands have "
                "none to give; in Python, dfine_plugin.adapters.transformers.prompt.fix_prompt does"
            )

    def __str__(self) -> str:
        return self.folder.name

    def load(self) -> Host:
        """See :class:`~dfine_plugin.checkpoints.Checkpoint`."""
        load = load_pretrained if hasattr(self.config, SETTINGS) else AutoModelForObjectDetection.from_pretrained
        logging.disable_progress_bar()
        try:
            return load(self.folder, dtype=torch.float32).eval()
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise ValueError(f"{self.folder} cannot be loaded: {first_line(error)}") from error

    def check_size(self, size: tuple[int, int]) -> None:
        """See :class:`~dfine_plugin.checkpoints.Checkpoint`."""
        # only hosts that merge levels state their strides
        strides = getattr(self.config, "feat_strides", ())
        check_image_size(size, strides, getattr(self.config, "num_queries", 0))

    def preprocess(self, image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
        """See :class:`~dfine_plugin.checkpoints.Checkpoint`."""
        image = image.convert("RGB")
        if self.processor is not None:
            sizes = {} if size is None else {"size": {"height": size[0], "width": size[1]}}
            return self.processor(images=image, return_tensors="pt", do_pad=False, **sizes)["pixel_values"]
        height, width = size or (IMAGE_SIZE, IMAGE_SIZE)
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32) / 255
        return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()

    def normalisation(self) -> Mapping[str, Any]:
        """See :class:`~dfine_plugin.checkpoints.Checkpoint`."""
        scale, mean, std = 1 / 255, [0.0] * 3, [1.0] * 3
        if self.processor is not None:
            scale = self.processor.rescale_factor if self.processor.do_rescale else 1.0
            if self.processor.do_normalize:
                mean, std = list(self.processor.image_mean), list(self.processor.image_std)
        return {"channels": "RGB", "scale": scale, "mean": mean, "std": std}

    def class_names(self) -> Mapping[int, str]:
        """See :class:`~dfine_plugin.checkpoints.Checkpoint`."""
        return self.config.id2label
