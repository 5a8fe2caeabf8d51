"""Sizes that hosts keep in tensors, as the constants they are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch._subclasses.fake_tensor as fake_tensor
import torch.fx.experimental.proxy_tensor as proxy_tensor

LARGEST = 64
"""Two integers a feature level are far below."""


@contextmanager
def static_sizes() -> Iterator[None]:
    """Within it, ``torch.export`` and the first call of a ``torch.compile``d model know the values of small constants.

    detrex's deformable transformers put the sizes of their feature maps into a tensor and read them out again to slice
    by. For images of a fixed size these are constants; torch follows constants of one element only, and takes the
    others for data. This raises the bound of one, which torch has no public setting for.
    """
    modules: tuple[Any, ...] = (fake_tensor, proxy_tensor)
    bounds = [module.CONSTANT_NUMEL_LIMIT for module in modules]
    try:
        for module in modules:
            module.CONSTANT_NUMEL_LIMIT = LARGEST
        yield
    finally:
        for module, bound in zip(modules, bounds, strict=True):
            module.CONSTANT_NUMEL_LIMIT = bound
