"""What ``save_pretrained`` of a transformers model wrote, as a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoModelForZeroShotObjectDetection,
    AutoTokenizer,
)
from transformers.models.grounding_dino.modeling_grounding_dino import SPECIAL_TOKENS
from transformers.utils import IMAGE_PROCESSOR_NAME, logging

from dfine_plugin.errors import first_line
from dfine_plugin.tools.image_sizes import check_image_size, check_windows

from ..host_parts import Host
from .prompt import fix_prompt, phrases
from .saving import SETTINGS, load_pretrained

IMAGE_SIZE = 640
"""Pixels, where neither the caller nor the checkpoint says."""


class TransformersCheckpoint:
    """A wrapped or bare model in a folder; see :class:`~dfine_plugin.checkpoints.Checkpoint`.

    A ``preprocessor_config.json`` beside the weights, as ``save_pretrained`` of an image processor writes it, says what
    becomes of images. Without one they are scaled to a square, and their values to ``[0, 1]``.

    A model that takes a text beside images is asked with one text for all of them, in tokens of the tokenizer that lies
    beside the weights, and its classes are the phrases of that text.
    """

    def __init__(self, folder: Path, text: str | None = None) -> None:
        self.folder = folder
        self.text = text
        self.processor = self.tokenizer = None
        try:
            # not even after a question: nothing that lies in the folder is run
            self.config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            self.takes_text = hasattr(self.config, "text_config")
            if self.takes_text and text is None:
                raise ValueError("it wants a text beside each image, such as 'a cat. a dog.', and none is given")
            if text is not None and not self.takes_text:
                raise ValueError("it takes no text")
            if (folder / IMAGE_PROCESSOR_NAME).is_file():
                self.processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
            if self.takes_text:
                self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
                # without its files transformers makes one that knows no words
                if self.tokenizer.convert_tokens_to_ids(".") not in SPECIAL_TOKENS:
                    raise ValueError("there is no tokenizer of its own beside it: save the processor there, too")
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} cannot be read: {first_line(error)}") from error

    def __str__(self) -> str:
        return self.folder.name

    def load(self) -> Host:
        """See :class:`~dfine_plugin.checkpoints.Checkpoint`."""
        logging.disable_progress_bar()
        try:
            if hasattr(self.config, SETTINGS):
                model = load_pretrained(self.folder, dtype=torch.float32)
            else:
                model = self._load_bare()
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise ValueError(f"{self.folder} cannot be loaded: {first_line(error)}") from error
        if self.takes_text:
            fix_prompt(model, **self.tokens())
        return model

    def _load_bare(self) -> Host:
        kind = AutoModelForZeroShotObjectDetection if self.takes_text else AutoModelForObjectDetection
        model, found = kind.from_pretrained(self.folder, dtype=torch.float32, output_loading_info=True)
        if missing := sorted(found["missing_keys"]):
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise ValueError(f"it lacks weights of the {type(model).__name__}: {shown}")
        return model.eval()

    def tokens(self) -> dict[str, Tensor]:
        """The text's, as the model takes them."""
        assert self.tokenizer is not None
        return dict(self.tokenizer(self.text, return_tensors="pt"))

    def check_size(self, size: tuple[int, int]) -> None:
        """See :class:`~dfine_plugin.checkpoints.Checkpoint`."""
        # only hosts that merge levels state their strides
        strides = getattr(self.config, "feat_strides", ())
        check_image_size(size, strides, getattr(self.config, "num_queries", 0))
        backbone: Any = getattr(self.config, "backbone_config", None)
        if hasattr(backbone, "num_windows"):  # LW-DETR's are so many in all, RF-DETR's on each side
            windows = getattr(backbone, "num_windows_side", backbone.num_windows)
            check_windows(size, backbone.patch_size, windows)

    def preprocess(self, image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
        """See :class:`~dfine_plugin.checkpoints.Checkpoint`."""
        image = image.convert("RGB")
        if self.processor is not None:
            sizes = {} if size is None else {"size": {"height": size[0], "width": size[1]}}
            return self.processor(images=image, return_tensors="pt", do_pad=False, **sizes)["pixel_values"]
        height, width = size or (IMAGE_SIZE, IMAGE_SIZE)
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32) / 255
        return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()

    def assumed(self) -> str | None:
        """See :class:`~dfine_plugin.checkpoints.Checkpoint`."""
        if self.processor is not None:
            return None
        return (
            f"there is no {IMAGE_PROCESSOR_NAME} in {self.folder}: images are scaled to {IMAGE_SIZE} x {IMAGE_SIZE} "
            "pixels, unless you say otherwise, and values to [0, 1]; save the image processor there if the model was "
            "trained on others"
        )

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
        if self.tokenizer is None:
            return self.config.id2label
        (ids,) = self.tokens()["input_ids"]
        return {number: str(self.tokenizer.decode(ids[phrase])) for number, phrase in enumerate(phrases(ids))}
