"""Trained models in folders, whatever library wrote them, with the preprocessing that they were trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from .tools.installing import install_hint

if TYPE_CHECKING:
    from PIL import Image


class Checkpoint(Protocol):
    """A trained model, wrapped or bare, and what its library makes of an image."""

    def load(self) -> nn.Module:
        """The model, in float32, on the CPU and in evaluation mode.

        Raises:
            ValueError: the checkpoint lacks weights of the model, or its library's files cannot be read.
        """

    def check_size(self, size: tuple[int, int]) -> None:
        """Refuse images of a height and width that the model cannot take, before it is loaded.

        Raises:
            ValueError: names sizes that it can take.
        """

    def preprocess(self, image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
        """One image as the model's adapter takes it (:meth:`~dfine_plugin.registry.Adapter.detector`).

        Args:
            image: of any size and colour mode.
            size: height and width to scale to, instead of what the checkpoint says.

        Returns:
            ``(1, 3, H, W)`` float32, without padding: boxes are in units of the whole image.
        """

    def assumed(self) -> str | None:
        """In words what :meth:`preprocess` takes for granted, for the checkpoint does not say it; None if it does."""

    def normalisation(self) -> Mapping[str, Any]:
        """What :meth:`preprocess` does to values from 0 to 255, as JSON can hold it: the order of ``channels``, and
        ``(value * scale - mean) / std``."""

    def class_names(self) -> Mapping[int, str]:
        """From class to name, as far as the checkpoint knows them."""


def load_pretrained(path: str | Path, **kwargs: Any) -> nn.Module:
    """Load what ``save_pretrained`` of a wrapped transformers model wrote: with the same settings, bit for bit.

    Every other way to open such a folder (the host's ``from_pretrained``, an Auto class, ``pipeline``) would drop the
    FDR head, and raises an error that points here.

    Args:
        path: the folder, or the name of a repository on the hub.
        kwargs: for the host's ``from_pretrained``, such as ``dtype``, ``variant`` or ``revision``.

    Returns:
        The model, of the class that was saved (of one's own subclass of a host, too, once its module is imported),
        wrapped and in evaluation mode; deployed, if it was when it was saved. Unwrapped, it has box heads that are to
        be trained: the folder holds none of those that wrapping retired.

    Raises:
        ValueError: there is no wrapped model, not all of its weights, or nothing that defines its class.
        ImportError: transformers is not installed; names the extra.
    """
    try:
        from .adapters.transformers import saving
    except ImportError as error:
        raise ImportError(f"load_pretrained: {error}; {install_hint('transformers')}") from error
    return saving.load_pretrained(path, **kwargs)


def open_checkpoint(path: str | Path, trust: Sequence[str] = (), text: str | None = None) -> Checkpoint:
    """The checkpoint in a folder.

    Args:
        path: the folder that ``save_pretrained`` of a transformers model, wrapped or bare, wrote; or the output folder
            of detrex's trainer, whose latest checkpoint is taken; or one of the ``.pth`` files in there.
        trust: packages, beside detectron2, detrex and this one, whose code a run's config may call. Nothing else of
            what lies in the folder is run: weights are read as tensors, configs as data, and pickles not at all.
        text: what to look for, of a model that takes a text beside images: phrases that end in a full stop each.

    Raises:
        ValueError: there is neither, or a model that wants a text and has none, or the other way round.
        ImportError: the library that wrote it is not installed.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        from .adapters.transformers.checkpoint import TransformersCheckpoint

        return TransformersCheckpoint(path, text)
    folder, weights = (path.parent, path) if path.suffix == ".pth" else (path, None)
    if (folder / "config.yaml").is_file():
        if text is not None:
            raise ValueError(f"{folder} holds a run of detrex, whose models take no text")
        try:
            from .adapters.detrex.checkpoint import DetrexCheckpoint
        except ImportError as error:
            raise ImportError(
                f"{folder} holds a run of detrex, which needs detrex and detectron2 (see detrex's installation "
                f"instructions): {error}"
            ) from error
        return DetrexCheckpoint(folder, weights, trust)
    raise ValueError(
        f"{path} holds no model: there is neither a config.json (transformers) nor a config.yaml (detrex) in {folder}"
    )


def input_size(checkpoint: Checkpoint, side: int = 640) -> tuple[int, int]:
    """Height and width of what a checkpoint's preprocessing makes of a square image with sides of so many pixels."""
    from PIL import Image

    height, width = checkpoint.preprocess(Image.new("RGB", (side, side))).shape[-2:]
    return height, width
