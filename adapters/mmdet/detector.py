"""A model of MMDetection as a function of tensors."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from ..host_parts import Host, sharing_copy


class MMDetDetector(nn.Module):
    """A model's logits and boxes for images ``(B, 3, H, W)`` as its data preprocessor takes them, all of one size."""

    def __init__(self, model: Host) -> None:
        super().__init__()
        self.model: Any = sharing_copy(model)
        # the host's reads sizes out of tensors in a way that torch.export cannot follow; and no bound method, for torch
        # would name the model's modules by way of it
        self.model.pre_transformer = partial(_flattened, self.model.positional_encoding, self.model.level_embed)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        preprocessor = self.model.data_preprocessor
        if preprocessor._channel_conversion:
            images = images.flip(1)
        if preprocessor._enable_normalize:
            images = (images - preprocessor.mean) / preprocessor.std
        logits, boxes = self.model(images, [DetDataSample()], mode="tensor")
        return logits[-1], boxes[-1]


def _flattened(
    positional_encoding: nn.Module, level_embed: Tensor, features: Sequence[Tensor], *_: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What encoder and decoder are given: the features of all levels, ``(B, N, C)``, where nothing is padded.

    Args:
        positional_encoding: the host's.
        level_embed: ``(levels, C)``.
        features: ``(B, C, H, W)`` of each level.
    """
    levels = zip(features, level_embed, strict=True)
    positions = [positional_encoding(None, input=x) + level[:, None, None] for x, level in levels]
    flat, position = (torch.cat([x.flatten(2).transpose(1, 2) for x in of], dim=1) for of in (features, positions))
    sizes = [tuple(x.shape[-2:]) for x in features]
    starts = [sum(height * width for height, width in sizes[:level]) for level in range(len(sizes))]
    of_levels = {
        "spatial_shapes": torch.tensor(sizes, device=flat.device),
        "level_start_index": torch.tensor(starts, device=flat.device),
        "valid_ratios": flat.new_ones(len(flat), len(sizes), 2),
    }
    return {"feat": flat, "feat_mask": None, "feat_pos": position, **of_levels}, {"memory_mask": None, **of_levels}
