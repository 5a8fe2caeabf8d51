"""Pictures from files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


def read_picture(path: Path) -> Image.Image:
    """The picture in a file, in RGB and as it is to be seen: a camera may have held it otherwise.

    Raises:
        ValueError: there is no such file, no picture in it, not all of one, or one of more pixels than Pillow takes
            from strangers (179 million).
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # from half as many pixels on
            with Image.open(path) as file:
                return ImageOps.exif_transpose(file).convert("RGB")
    # Pillow's readers raise whatever stumbles on a broken file
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
