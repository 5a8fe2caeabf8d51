"""From an image to what a checkpoint of transformers was trained to see."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor
from transformers.utils import IMAGE_PROCESSOR_NAME

IMAGE_SIZE = 640
"""Pixels, where neither the caller nor the checkpoint says."""


def input_side(folder: str | Path, image_size: int | None = None) -> int:
    """The side in pixels of what :func:`preprocess` makes of a square image."""
    return preprocess(Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE)), folder, image_size).shape[-1]


def preprocess(image: Image.Image, folder: str | Path, image_size: int | None = None) -> Tensor:
    """One image as the pixel values that the model in a folder takes.

    A ``preprocessor_config.json`` beside the weights decides, as ``save_pretrained`` of an image processor writes it.
    Without one the image is scaled to a square, and its values to ``[0, 1]``.

    Args:
        image: of any size and colour mode.
        folder: of the checkpoint.
        image_size: side of the square to scale to, instead of the size that the checkpoint says.

    Returns:
        ``(1, 3, H, W)`` float32, without padding: boxes are in units of the whole image.
    """
    image = image.convert("RGB")
    if (Path(folder) / IMAGE_PROCESSOR_NAME).is_file():
        processor = AutoImageProcessor.from_pretrained(folder)
        size = {} if image_size is None else {"size": {"height": image_size, "width": image_size}}
        return processor(images=image, return_tensors="pt", do_pad=False, **size)["pixel_values"]
    side = image_size or IMAGE_SIZE
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
