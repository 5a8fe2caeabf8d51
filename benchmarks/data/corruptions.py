"""Five ways to spoil images, each in three strengths, by torchvision; the same images at every call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.transforms import v2

STRENGTHS = (1, 2, 3)

Corruption = Callable[[Tensor, int], Tensor]
"""From an image (3, H, W) uint8 and a strength to the spoilt one, with random numbers of torch's global generator."""


def occlusion(image: Tensor, strength: int) -> Tensor:
    """A grey rectangle over 6, 12 or 24 % of the image."""
    share = (0.06, 0.12, 0.24)[strength - 1]
    return v2.RandomErasing(p=1.0, scale=(share, share), ratio=(0.5, 2.0), value=127)(image)


def blur(image: Tensor, strength: int) -> Tensor:
    """A Gaussian of 1/128, 1/64 or 1/32 of the image's height as standard deviation."""
    sigma = image.shape[-2] * (1 / 128, 1 / 64, 1 / 32)[strength - 1]
    return v2.functional.gaussian_blur(image, [2 * round(3 * sigma) + 1] * 2, [sigma] * 2)


def noise(image: Tensor, strength: int) -> Tensor:
    """Gaussian noise of 5, 10 or 20 % of the range as standard deviation."""
    spoilt = v2.functional.gaussian_noise(
        v2.functional.to_dtype(image, scale=True), sigma=(0.05, 0.1, 0.2)[strength - 1]
    )
    return v2.functional.to_dtype(spoilt, torch.uint8, scale=True)


def low_light(image: Tensor, strength: int) -> Tensor:
    """All values times 0.5, 0.25 or 0.125."""
    return v2.functional.adjust_brightness(image, (0.5, 0.25, 0.125)[strength - 1])


def low_contrast(image: Tensor, strength: int) -> Tensor:
    """Half, a quarter or an eighth of the distance from the mean grey."""
    return v2.functional.adjust_contrast(image, (0.5, 0.25, 0.125)[strength - 1])


CORRUPTIONS: dict[str, Corruption] = {
    "occlusion": occlusion,
    "blur": blur,
    "noise": noise,
    "low light": low_light,
    "low contrast": low_contrast,
}


def corrupt(images: Tensor | Sequence[Tensor], name: str, strength: int) -> Tensor:
    """Images (N, 3, H, W) uint8 spoilt by the corruption of that name; every image has random numbers of its own."""
    spoilt = []
    with torch.random.fork_rng(devices=[]):
        for index, image in enumerate(images):
            torch.manual_seed(index)
            spoilt.append(CORRUPTIONS[name](image, strength))
    return torch.stack(spoilt)
